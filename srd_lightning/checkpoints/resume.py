"""What a run needs to go on as if it had never been interrupted: rows, randomness and Lightning's counters."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from lightning import Trainer

from srd_lightning.distributed.process_group import Team


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


class RunSeed:
    """The seed of a run: that of the first process when it began, also where it is resumed under another one."""

    def __init__(self) -> None:
        self._seed: int | None = None
        self._loaded: int | None = None

    def begin(self) -> None:
        """Take the seed of the run that is resumed, else the one that is set."""
        seed = Team().from_first(torch.initial_seed)
        self._seed, self._loaded = seed if self._loaded is None else self._loaded, None

    def seed_batch(self, trainer: Trainer) -> None:
        """Seed torch for the batch that comes next."""
        if self._seed is not None:
            rank = (trainer.distributed_sampler_kwargs or {"rank": 0})["rank"]
            torch.manual_seed(batch_seed(self._seed, trainer.fit_loop.epoch_loop.total_batch_idx, rank))

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Keep it in a checkpoint."""
        if self._seed is not None:
            checkpoint["run_seed"] = self._seed

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Take it from a checkpoint; older ones have none."""
        self._loaded = checkpoint.get("run_seed")


def repair_progress(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Let a run that was saved at the end of an epoch go on with what was left of it, and then with the next one.

    Lightning (tested with 2.6.6) takes a checkpoint after the last batch for one within an epoch, and holds its
    counters against the next loader: where the rows grow, batches are left out in silence; where they do not, a
    validation is. An epoch that was saved at its very end it repeats if there are ``max_steps``, and what follows on
    the last one, such as an export, never comes. Asked for by whoever of ours is in a run, and none is in every one:
    hooks of the module, `CurriculumCallback`, `ResumeCheckpoint`. To repair twice changes nothing.

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
