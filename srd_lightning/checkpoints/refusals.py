"""Why a run may not go on from a checkpoint: every reason, with its sentence, and when it is known.

===========================  ======================================================================
what                         known
===========================  ======================================================================
the file itself              before anything is read
settings (`ADVICE`)          before anything is read
the optimizer                before anything is read
``rows``, ``tokens``         when rows are tokenised, before the student answers
``ranking``, ``order``       when rows are ranked
===========================  ======================================================================

Lightning reads a checkpoint after all of that. So it is found here (`checkpoint_to_resume`): it is the one that
``ckpt_path="last"`` has found, or that ``trainer.ckpt_path`` names, as the command line sets it. A path that is only
given to ``Trainer.fit`` is known to Lightning alone: it is checked when that reads it, after curation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from srd_lightning.checkpoints import files
from srd_lightning.distributed.process_group import Ranks
from srd_lightning.errors import ResumeError, in_one_line, lacks_memory
from srd_lightning.preflight import callbacks_of
from srd_lightning.protocols import FindsLast

ADVICE = {
    "schedule": "set `schedule` as it was",
    "arrangement": "set `arrangement` as it was",
    "refresh": "set `refresh` as it was",
    "decontaminate": "set `decontaminate` as it was",
    "seed": "set `seed` as it was",
    "group_by_length": "set `group_by_length` as it was",
    "sampler": "set `sampler` as it was",
    "global_batch": "rows of a batch, of all ranks: set `batch_size` so that it is as it was",
    "accumulate_grad_batches": "set `trainer.accumulate_grad_batches` as it was",
    "rows": "or in another order of the file: use the same `data`",
    "tokens": "of the same rows: use the same `template`, `tokenizer`, `max_length` and `max_prompt_length`",
    "ranking": "of the same rows: use the same `scores`, `criteria`, `ties` and student",
    "order": "of the same ranking: use the same `arrangement`",
    "replay": "set `rollouts` as it was",
}
"""What decides which rows come when, and what to do where it differs."""
DIGESTS = {"rows", "tokens", "ranking", "order"}
"""Parts of which only digests are known."""
PLANNED_EPOCHS = "planned_epochs"
"""Where a checkpoint keeps the ``max_epochs`` that a schedule of the learning rate was planned for."""
NOT_COMPARED = {"params", "lr", "fused", "foreach", "capturable", "max_lr", "min_lr", "max_momentum", "base_momentum"}
"""Of a group of parameters: what is no setting of it, or a schedule's own; ``lr`` is compared as it was at first."""


def checkpoint_to_resume(trainer: Trainer) -> Path | None:
    """Return the checkpoint from which ``fit`` goes on, if that is known yet."""
    if trainer.state.fn != "fit":
        return None
    found = [callback.found_last() for callback in callbacks_of(trainer) if isinstance(callback, FindsLast)]
    given = trainer.ckpt_path if trainer._checkpoint_connector._user_managed else None  # else it is of an earlier run
    path = next(filter(None, found), None) or given
    return None if path is None or "://" in str(path) else Path(path)


def outline_to_resume(trainer: Trainer | None) -> dict[str, Any]:
    """Return what the checkpoint from which ``fit`` goes on says; nothing where there is none, or where none is known.

    Raises:
        ResumeError: It is damaged, or no checkpoint.
    """
    path = None if trainer is None else checkpoint_to_resume(trainer)
    if path is None:
        return {}
    Ranks().rank0_result(lambda: check_intact(path))
    try:
        outline = _outline(path)
    except UnpicklingError:
        return {}  # only who loads it knows whether it is trusted: see `check_no_code`
    if not isinstance(outline, dict) or "pytorch-lightning_version" not in outline:
        raise ResumeError(f"ckpt_path: {path} is not a checkpoint of Lightning; give one that a Trainer has saved")
    return outline


def _outline(path: Path) -> Any:
    """Return what a checkpoint says, whose checksums are right; all that is wrong with it but code in it is damage."""
    try:
        return files.read_outline(path)
    except UnpicklingError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        raise ResumeError(
            f"ckpt_path: {path} is damaged, torch cannot read it ({in_one_line(error)[:200]}); give another "
            "checkpoint, or a copy of it"
        ) from error


def description_of(setting: object) -> str:
    """Return the class and the plain attributes of an object of the user's, by which it is known again.

    Args:
        setting: Such as an `Arrangement`.

    Example:
        >>> from srd_lightning.curriculum.ranking import RandomOrder
        >>> description_of(RandomOrder(seed=3))
        'RandomOrder(seed=3)'
    """
    plain = (bool, int, float, str, type(None))  # of the rest every rank has another description
    own = sorted(getattr(setting, "__dict__", {}).items())
    values = ", ".join(f"{name}={value!r}" for name, value in own if isinstance(value, plain))
    return f"{type(setting).__name__}({values})"


def check_same_rows(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on where the rows still to come would be others than in the run that was interrupted.

    Args:
        saved: Parts by name, from the checkpoint; one that older checkpoints lack is not looked at.
        now: The same of this run, as far as it is known.

    Raises:
        ResumeError: Some parts differ; names each with both values and what to do.

    Example:
        >>> check_same_rows({"seed": 0, "global_batch": 16}, {"seed": 1, "global_batch": 16})
        Traceback (most recent call last):
        srd_lightning.errors.ResumeError: this run would not see the rows that the one in the checkpoint had to see:
        - seed was 0 and is 1 (set `seed` as it was)
        To train on other rows from the same weights, begin a new run with them, without ckpt_path
    """
    different = [part for part in now if part in saved and saved[part] != now[part]]
    if different[:-1] and different[-1] == "order":  # which follows from the others
        different.pop()
    if different:
        parts = "\n".join(f"- {_what_differs(part, saved[part], now[part])} ({ADVICE[part]})" for part in different)
        raise ResumeError(
            "this run would not see the rows that the one in the checkpoint had to see:\n"
            f"{parts}\nTo train on other rows from the same weights, begin a new run with them, without ckpt_path"
        )


def _what_differs(part: str, was: object, now: object) -> str:
    return f"other {part}" if part in DIGESTS else f"{part} was {was!r} and is {now!r}"


def check_same_optimizer(saved: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> None:
    """Refuse another optimizer, and say which of its settings are those of the checkpoint.

    Args:
        saved: Groups of parameters, from the checkpoint.
        now: The same of the optimizer of this run, before any step.

    Raises:
        ResumeError: It has other settings than the one that was saved, so it is another optimizer.
    """
    was, new = dict(saved[0]), dict(now[0])
    was.setdefault("initial_lr", was["lr"])  # which a schedule changes
    new["initial_lr"] = new["lr"]
    if different := sorted((was.keys() ^ new.keys()) - NOT_COMPARED):
        names = ", ".join(different)
        raise ResumeError(
            f"the checkpoint was saved by another optimizer: settings {names} are of one of the two only; set "
            "`optimizer` as it was, or begin a new run, without ckpt_path"
        )
    changed = [name for name in was if name not in NOT_COMPARED and was[name] != new[name]]
    if changed:
        values = ", ".join(f"{name.removeprefix('initial_')} {was[name]!r} and not {new[name]!r}" for name in changed)
        rank_zero_warn(
            f"the optimizer goes on as it was saved, with {values}; to change that, begin a new run, without ckpt_path"
        )


def check_optimizer(trainer: Trainer, make: Callable[[list[nn.Parameter]], Optimizer]) -> None:
    """Compare the optimizer of a run with that of the checkpoint from which it goes on; see `check_same_optimizer`.

    A schedule of the learning rate goes on as it was planned; where that was for other epochs, a warning says so.

    Args:
        trainer: That sets up its data.
        make: Makes the optimizer of some parameters.
    """
    outline = outline_to_resume(trainer)
    planned = outline.get(PLANNED_EPOCHS)
    if outline.get("lr_schedulers") and planned not in (None, trainer.max_epochs):
        rank_zero_warn(
            f"the learning rate goes on as it was planned for max_epochs {planned}, which is {trainer.max_epochs} now; "
            "to plan it anew, begin a new run, without ckpt_path"
        )
    states = outline.get("optimizer_states")
    if states:
        example = make([nn.Parameter(torch.zeros(2, 2))])
        check_same_optimizer(states[0]["param_groups"], example.state_dict()["param_groups"])


def check_rows(checkpoint: Mapping[str, Any], data: object, now: Callable[[], Mapping[str, Any]]) -> None:
    """Refuse to go on from a checkpoint with other rows; see `check_same_rows`.

    Args:
        checkpoint: Or what `outline_to_resume` has found.
        data: Data module of the run that goes on.
        now: Returns the parts of its rows that are known; only asked where the checkpoint has some.
    """
    if saved := checkpoint.get(type(data).__qualname__, {}).get("rows"):
        check_same_rows(saved, now())


def check_found(folder: Path, extension: str, trainer: Trainer) -> Path | None:
    """Return the newest complete checkpoint of a folder, if this run can go on from it.

    Args:
        folder: Of checkpoints.
        extension: Of theirs, such as ``.ckpt``.
        trainer: Of the run.

    Raises:
        ResumeError: There are only some that were cut off, or it is sharded and the strategy is not.
    """
    newest, cut = files.newest(folder, extension)
    names = ", ".join(map(str, cut))
    if cut and newest is None:
        raise ResumeError(
            f"no checkpoint can be read: {names} was cut off while it was written or copied; put a sound "
            "copy in its place, or remove it to begin anew"
        )
    if cut:
        rank_zero_warn(f"{names} was cut off while it was written or copied; going on from {newest}")
    if newest and newest.is_dir() and not isinstance(trainer.strategy, (ModelParallelStrategy, FSDPStrategy)):
        raise ResumeError(
            f"{newest} is sharded, which {type(trainer.strategy).__name__} cannot read; make a file of it, python "
            f"-m srd_lightning.consolidate {newest} FILE, and give that as ckpt_path, or resume with FSDP2"
        )
    return newest


def check_alike(how: str, place: object, folder: Path) -> None:
    """Refuse to go on where ranks would do so at different places; all of them must ask.

    Args:
        how: What the place is, for the message.
        place: Where this rank would go on.
        folder: Of checkpoints.

    Raises:
        ResumeError: They would.
    """
    places = Ranks().all_results(lambda: place)
    if len(set(places)) > 1:
        raise ResumeError(
            f"the ranks would go on {how} {', '.join(map(str, places))}: they do not all see the same "
            f"checkpoints in {folder}; use a folder that all see, and wait until its files have come"
        )


def check_intact(path: Path) -> None:
    """Refuse a checkpoint that is not as it was written; see `files.damaged_part`.

    Args:
        path: A file, or a folder of shards.

    Raises:
        ResumeError: It is not there, no checkpoint, cut off, or its bytes are not those that were written.
    """
    if not path.exists():
        raise ResumeError(f"ckpt_path: there is no checkpoint {path}; check the path, or leave it out to begin anew")
    if path.is_dir() and not files.is_complete(path):
        raise ResumeError(f"ckpt_path: the folder {path} is no checkpoint, or not a complete one; give another one")
    if files.is_cut_off(path):
        size = path.stat().st_size
        raise ResumeError(
            f"ckpt_path: {path} ({size} bytes) is no checkpoint, or was cut off while it was written or copied; give "
            "another one"
        )
    if (part := files.damaged_part(path)) is not None:
        raise ResumeError(
            f"ckpt_path: {path} is damaged: {part} in it is not what was written; give another checkpoint, or a copy "
            "of it"
        )


TO_TRUST = "set --weights_only false (in Python: SRDTrainer.fit(..., weights_only=False))"


def check_no_code(path: Path, to_trust: str = TO_TRUST) -> None:
    """Refuse a checkpoint that holds more than tensors and plain values: to load a class is to call it.

    Args:
        path: A file, or a folder of shards, if it is there.
        to_trust: What to do where it is trusted, for the message.

    Raises:
        ResumeError: It does (names what), or as for `check_intact`.
    """
    if not path.exists():
        return  # which is said by who loads it
    check_intact(path)
    try:
        _outline(path)
    except UnpicklingError as error:
        what = ", ".join(files.classes_in(path)) or "objects"
        raise ResumeError(
            f"ckpt_path: {path} holds {what} beside tensors and plain values, and to load that runs code; where you "
            f"trust who wrote it, {to_trust}"
        ) from error


def check_refresh_is_known(first: int, epoch: int) -> None:
    """Refuse a refresh that lies behind a checkpoint which says nothing of it.

    Args:
        first: Epoch at whose beginning it was due.
        epoch: With which the run goes on.

    Raises:
        ResumeError: It does.
    """
    if epoch > first:
        raise ResumeError(
            f"the checkpoint does not say in which order rows came after the refresh at epoch {first}; resume "
            f"from one that was trained with the same refresh, or from the end of epoch {first - 1}"
        )


def check_scores_are_kept(there: bool, folder: Path) -> None:
    """Refuse to go on without the scores of a refresh, whose student is gone.

    Args:
        there: Whether they are, and all of them.
        folder: Where they were.

    Raises:
        ResumeError: They are not.
    """
    if not there:
        raise ResumeError(
            f"some of the scores that this run was trained with are not in {folder} any more; bring them back"
        )
