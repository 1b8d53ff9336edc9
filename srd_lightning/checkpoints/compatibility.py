"""May a run go on from a checkpoint? What must be the same, when that is known, and what to do where it is not.

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
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from srd_lightning.checkpoints.files import check_intact, read_outline
from srd_lightning.checkpoints.resume_checkpoint import ResumeCheckpoint
from srd_lightning.distributed.process_group import Team
from srd_lightning.errors import ResumeError
from srd_lightning.preflight import callbacks_of

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
}
"""What decides which rows come when, and what to do where it differs."""
DIGESTS = {"rows", "tokens", "ranking", "order"}
"""Parts of which only digests are known."""
NOT_COMPARED = {"params", "lr", "fused", "foreach", "capturable", "max_lr", "min_lr", "max_momentum", "base_momentum"}
"""Of a group of parameters: what is no setting of it, or a schedule's own; ``lr`` is compared as it was at first."""


def checkpoint_to_resume(trainer: Trainer) -> Path | None:
    """Return the checkpoint from which ``fit`` goes on, if that is known yet.

    Args:
        trainer: That sets up its data.
    """
    if trainer.state.fn != "fit":
        return None
    found = [callback.resumes_from for callback in callbacks_of(trainer) if isinstance(callback, ResumeCheckpoint)]
    given = trainer.ckpt_path if trainer._checkpoint_connector._user_managed else None  # else it is of an earlier run
    path = next(filter(None, found), None) or given
    return None if path is None or "://" in str(path) else Path(path)


def outline_to_resume(trainer: Trainer) -> dict[str, Any] | None:
    """Return what the checkpoint from which ``fit`` goes on says without its weights, once it is seen to be sound.

    Args:
        trainer: That sets up its data.

    Raises:
        ResumeError: It is damaged, or no checkpoint.
    """
    path = checkpoint_to_resume(trainer)
    if path is None:
        return None
    Team().from_first(lambda: check_intact(path))
    return read_outline(path)


def description_of(setting: object) -> str:
    """Return the class and the plain attributes of an object of the user's, by which it is known again.

    Args:
        setting: Such as an `Arrangement`.

    Example:
        >>> from srd_lightning.curriculum.ranking import RandomOrder
        >>> description_of(RandomOrder(seed=3))
        'RandomOrder(seed=3)'
    """
    plain = (bool, int, float, str, type(None))  # of the rest every process has another description
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

    Args:
        trainer: That sets up its data.
        make: Makes the optimizer of some parameters.
    """
    states = (outline_to_resume(trainer) or {}).get("optimizer_states")
    if states:
        example = make([nn.Parameter(torch.zeros(2, 2))])
        check_same_optimizer(states[0]["param_groups"], example.state_dict()["param_groups"])


def saved_rows(trainer: Trainer | None, data: LightningDataModule) -> Mapping[str, Any]:
    """Return what the checkpoint from which ``fit`` goes on says of its rows, for `check_same_rows`.

    Args:
        trainer: That sets up its data.
        data: Whose state the checkpoint has.
    """
    outline = None if trainer is None else outline_to_resume(trainer)
    found: Mapping[str, Any] = (outline or {}).get(type(data).__qualname__, {}).get("rows", {})
    return found
