"""What a run needs to go on as if it had never been interrupted, besides what Lightning restores by itself.

=========================================  ================================  =======================================
piece                                      in a checkpoint                   who writes and restores it
=========================================  ================================  =======================================
weights, optimizer, learning rate          several keys                      Lightning
epoch, step, batch, validation             ``loops``                         Lightning, repaired by `ResumeState`
batches of the epoch that were delivered   ``loops``, of the loader          `ResumableLoader`
seed of the run                            ``run_seed``                      `RunSeed`
which rows come when, and refreshments     named after the data module       `ResumeState`, for a `HasResumeState`
epochs that the run was planned for        ``planned_epochs``                `ResumeState`; only compared
settings that follow the loss              ``callbacks``                     Lightning, for a `TAIDSchedule` and others
what rollouts have learnt and kept         ``rollouts``, of all ranks        `RolloutHooks`
=========================================  ================================  =======================================

Stage, temperature and weight follow from the epoch, and randomness from seed, batch and rank: they are nowhere. Whether
a run may go on from a checkpoint is said in `refusals`.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from srd_lightning.checkpoints.refusals import PLANNED_EPOCHS, check_rows
from srd_lightning.distributed.process_group import Ranks
from srd_lightning.preflight import callbacks_of
from srd_lightning.protocols import HasResumeState

OF_TUNERS = (".scale_batch_size_", ".lr_find_")
"""How Lightning (tested with 2.6.6) names the checkpoints that its tuners go back to after trying other batches."""


class ResumeState(Callback):
    """Keeps in checkpoints which rows are still to come, refuses others, and repairs what Lightning counted.

    Whoever of ours is in a run brings it along: `KDLightningModule`, `SRDDataModule`, `CurriculumCallback` and
    `ResumeCheckpoint`.
    """

    @staticmethod
    def attach_to(trainer: Trainer) -> None:
        """Make one a callback of a trainer that has none; to be called in the set-up of a run."""
        if not any(isinstance(callback, ResumeState) for callback in callbacks_of(trainer)):
            callbacks_of(trainer).append(ResumeState())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep which rows are still to come, and for how many epochs the run was planned."""
        checkpoint[PLANNED_EPOCHS] = trainer.max_epochs
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, HasResumeState):
            checkpoint.setdefault(type(data).__qualname__, {}).update(data.resume_state())

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with the rows and the counters of the run that is resumed.

        Raises:
            ResumeError: Its rows, or their order, are not those of this run.
        """
        repair_progress(checkpoint, trainer)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, HasResumeState) and (state := checkpoint.get(type(data).__qualname__)):
            data.go_on_with(state["generations"])
            path = trainer.state.fn == "fit" and trainer.ckpt_path
            if path and not Path(path).name.startswith(OF_TUNERS):
                check_rows(checkpoint, data, lambda: data.resume_state()["rows"])


class RunSeed(Callback):
    """Seeds each batch, so that a resumed run draws the same: by the run's seed, the batch's number and the rank.

    The seed is that of rank 0 when the run began, also where it is resumed under another one.
    """

    def __init__(self) -> None:
        self._seed: int | None = None
        self._loaded: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the seed of the run that is resumed, else the one that is set."""
        seed = Ranks().rank0_result(torch.initial_seed)
        self._seed, self._loaded = seed if self._loaded is None else self._loaded, None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed torch for the batch."""
        if self._seed is not None:
            rank = (trainer.distributed_sampler_kwargs or {"rank": 0})["rank"]
            torch.manual_seed(batch_seed(self._seed, trainer.fit_loop.epoch_loop.total_batch_idx, rank))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep it."""
        if self._seed is not None:
            checkpoint["run_seed"] = self._seed

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take that of the run that is resumed; older checkpoints have none."""
        if trainer.state.fn == "fit":
            self._loaded = checkpoint.get("run_seed")


def batch_seed(run_seed: int, batch: int, rank: int) -> int:
    """Return what randomness in a batch is seeded with: nothing before it matters.

    Args:
        run_seed: Of the run.
        batch: How many batches came before it.
        rank: Of the process among those that see different rows.

    Example:
        >>> batch_seed(0, batch=3, rank=1)
        12016646869668231906
    """
    return int.from_bytes(hashlib.sha256(f"{run_seed} {batch} {rank}".encode()).digest()[:8], "big")


@runtime_checkable
class CanSkip(Iterable[int], Protocol):
    """A sampler that leaves out the first rows of an epoch, such as `Shuffled`."""

    start: int
    epoch: int


class ResumableLoader(DataLoader[Any]):
    """A loader that goes on within an epoch: what was delivered before is left out, and not even loaded.

    Its sampler is a `CanSkip`. The length stays that of the whole epoch.
    """

    delivered = 0
    """Batches of the epoch that were delivered, also by the run that is resumed."""
    _start = 0

    @property
    def _skipping(self) -> CanSkip:
        return cast(CanSkip, self.sampler)

    @property
    def _in_order(self) -> bool:
        return isinstance(self.sampler, CanSkip)

    def __iter__(self) -> Any:
        """Deliver what is left of the epoch; the next time, all of it."""
        self._skipping.start = self._start * cast(int, self.batch_size)
        self.delivered = self._start
        return self._count(super().__iter__())  # workers begin now, not at the first batch

    def _count(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._start = 0  # not before: Lightning makes an iterator twice, and uses the second
            self.delivered += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and how many of its batches were delivered; nothing where ``overfit_batches`` repeats."""
        return {"epoch": self._skipping.epoch, "delivered": self.delivered} if self._in_order else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Leave out what was delivered, if it was of this epoch: another one begins with its first batch."""
        same_epoch = self._in_order and state_dict.get("epoch") == self._skipping.epoch
        self._start = self.delivered = state_dict["delivered"] if same_epoch else 0

    def ids(self, batch_idx: int) -> list[str]:
        """Return the ids of the rows of a batch, whether it was delivered or not.

        Args:
            batch_idx: Its number within the epoch.
        """
        sampler = copy.copy(self._skipping)
        sampler.start = batch_idx * cast(int, self.batch_size)
        return [str(self.dataset[place]["id"]) for place in itertools.islice(sampler, self.batch_size)]


def repair_progress(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Let a run that was saved at the end of an epoch go on with what was left of it, and then with the next one.

    Lightning (tested with 2.6.6) takes a checkpoint after the last batch for one within an epoch, and holds its
    counters against the next loader: where the rows grow, batches are left out in silence; where they do not, a
    validation is. An epoch that was saved at its very end it repeats if there are ``max_steps``, and what follows on
    the last one, such as an export, never comes.

    Args:
        checkpoint: As Lightning has read it; changed in place.
        trainer: Of the run that goes on.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if not loops:
        return
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]["total"]
    if epochs["started"] > epochs["processed"]:
        if batches["is_last_batch"] and batches["total"]["completed"] < batches["total"]["processed"]:
            _go_on_with_validation(loops, trainer)
    elif epochs["completed"] < epochs["processed"]:
        if epochs["processed"] == trainer.max_epochs:
            _go_on_with_end_of_epoch(loops, trainer)
        elif trainer.max_steps != -1:
            _go_on_with_next_epoch(loops, trainer)


def _go_on_with_validation(loops: dict[str, Any], trainer: Trainer) -> None:
    """Say "all batches done, validation begun", which Lightning restores rightly."""
    batches = loops["epoch_loop.batch_progress"]
    for counters in (batches["total"], batches["current"]):
        counters["completed"] = counters["processed"]
    if _validates(trainer, loops["epoch_progress"]["current"]["processed"]):
        validation = loops["epoch_loop.val_loop.batch_progress"]
        validation["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        validation["current"] = dict.fromkeys(validation["current"], 0)
    else:
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1


def _go_on_with_end_of_epoch(loops: dict[str, Any], trainer: Trainer) -> None:
    """Say "all batches done, and validated"."""
    for counters in (loops["epoch_progress"]["total"], loops["epoch_progress"]["current"]):
        counters["processed"] = counters["completed"]
    if _validates(trainer, loops["epoch_progress"]["current"]["completed"]):
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # Lightning skips a validation, and counts that


def _go_on_with_next_epoch(loops: dict[str, Any], trainer: Trainer) -> None:
    """Say "epoch done, no batch of the next one"."""
    for counters in (loops["epoch_progress"]["total"], loops["epoch_progress"]["current"]):
        counters["completed"] = counters["processed"]
    batches = loops["epoch_loop.batch_progress"]
    batches |= {"current": dict.fromkeys(batches["current"], 0), "is_last_batch": False}
    if _validates(trainer, loops["epoch_progress"]["current"]["processed"]):
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1  # Lightning skips a validation, and counts that


def _validates(trainer: Trainer, epoch: int) -> bool:
    every = trainer.check_val_every_n_epoch
    return trainer.enable_validation and (every is None or (epoch + 1) % every == 0)
