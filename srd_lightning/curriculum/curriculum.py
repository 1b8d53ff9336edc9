"""Which rows an epoch trains on, and how many optimizer steps that makes.

Everything that is staged is said as ``{first epoch: value}``, and a value holds until the next key. The stage is a
function of the epoch: nothing is counted, so nothing needs to be restored.
"""

from __future__ import annotations

import math
import warnings
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from srd_lightning.errors import DataError, SettingError

PAPER_SCHEDULE: Mapping[int, float] = {0: 0.25, 8: 0.5, 16: 0.75}
"""The paper's stages for GPT-2: a quarter more of the rows every eight epochs, the hardest quarter never."""

PAPER_EPOCHS = 24
"""Of these stages."""


def check_schedule(schedule: Mapping[Any, float], name: str = "schedule") -> dict[int, float]:
    """Return the schedule sorted by epoch.

    Args:
        schedule: ``{first epoch: value}``; epochs may be text, as files and command lines have it.
        name: For messages.

    Raises:
        SettingError: It does not begin at epoch 0, or an epoch is negative, no whole number, or stands twice.

    Example:
        >>> check_schedule({"8": 0.5, 0: 0.25})
        {0: 0.25, 8: 0.5}
    """
    if not isinstance(schedule, Mapping):
        raise SettingError(f"{name} must be {{first epoch: value}}, such as {{0: 0.25, 8: 0.5}}, but is {schedule!r}")
    epochs = [_epoch(key, name) for key in schedule]
    if len(set(epochs)) < len(epochs):
        raise SettingError(f"{name} must have one value per epoch, but its epochs are {epochs}")
    ordered = dict(sorted(zip(epochs, schedule.values(), strict=True)))
    if not ordered or next(iter(ordered)) != 0:
        raise SettingError(
            f"{name} must begin at epoch 0, but its epochs are {list(ordered)}; add a value for 0 and none before it"
        )
    return ordered


def _epoch(key: Any, name: str) -> int:
    if isinstance(key, str) and key.removeprefix("-").isdecimal():
        return int(key)
    if not isinstance(key, int) or isinstance(key, bool):
        raise SettingError(f"the epochs of {name} must be whole numbers, but one is {key!r}")
    return key


def never_reached(schedule: Mapping[int, float], max_epochs: int | None) -> list[int]:
    """Return the epochs of a schedule that a run does not have.

    Example:
        >>> never_reached({0: 1.0, 8: 1.5, 16: 2.0}, max_epochs=8)
        [8, 16]
    """
    return [] if max_epochs in (None, -1) else [epoch for epoch in schedule if 0 < epoch >= (max_epochs or 0)]


def check_fractions(schedule: Mapping[Any, float]) -> dict[int, float]:
    """Return the schedule of a curriculum sorted by epoch.

    Raises:
        SettingError: It does not begin at epoch 0, shrinks, or leaves (0, 1].
    """
    ordered = check_schedule(schedule)
    fractions = list(ordered.values())
    if any(not isinstance(fraction, (int, float)) or not 0 < fraction <= 1 for fraction in fractions):
        raise SettingError(f"every fraction of the schedule must lie in (0, 1], but they are {fractions}")
    if fractions != sorted(fractions):
        raise SettingError(f"the schedule must not shrink, but its fractions are {fractions}")
    return ordered


def paper_schedule(max_epochs: int | None) -> dict[int, float]:
    """Return the paper's stages for a run of some epochs: a third of them each; the later ones get what is over.

    Args:
        max_epochs: Of the run; without an end (``None`` or -1) the paper's 24.

    Returns:
        ``{first epoch: share of the rows}``; of a run with fewer than three epochs the first stages are left out.

    Example:
        >>> paper_schedule(24), paper_schedule(10), paper_schedule(1)
        ({0: 0.25, 8: 0.5, 16: 0.75}, {0: 0.25, 3: 0.5, 6: 0.75}, {0: 0.75})
    """
    epochs = PAPER_EPOCHS if max_epochs in (None, -1) else (max_epochs or 0)
    return {stage * epochs // 3: share for stage, share in enumerate(PAPER_SCHEDULE.values())}


def value_at(schedule: Mapping[int, float], epoch: int) -> float:
    """Return the value that holds in an epoch.

    Example:
        >>> value_at({0: 1.0, 8: 1.5, 16: 2.0}, epoch=9)
        1.5
    """
    return schedule[max(first for first in schedule if first <= epoch)]


@dataclass(frozen=True, eq=False)
class Curriculum:
    """Rows that enter training easiest first, in stages that begin at fixed epochs.

    Args:
        order: Row numbers ``[N]``, easiest first, from `reciprocal_rank_fusion`.
        schedule: ``{first epoch: fraction of order}``. Fractions lie in (0, 1] and never shrink; the last one is the
            share of the rows that is kept.

    Raises:
        SettingError: The schedule lacks epoch 0, shrinks, leaves (0, 1], or its first stage holds no row; the order is
            not one-dimensional or names a row twice.

    Example:
        >>> curriculum = Curriculum(torch.tensor([3, 0, 2, 1]), {0: 0.25, 8: 0.5, 16: 0.75})
        >>> curriculum.rows(epoch=9)
        tensor([3, 0])
        >>> curriculum.num_steps(batch_size=2, max_epochs=24)
        32
    """

    order: Tensor
    schedule: Mapping[int, float] = field(default_factory=lambda: dict(PAPER_SCHEDULE))

    def __post_init__(self) -> None:
        """Validate both, once."""
        if len(self.order) and torch.as_tensor(self.order).is_floating_point():
            raise SettingError(
                "order must hold row numbers, but holds fractions, as scores are; make one by "
                "reciprocal_rank_fusion(scores)"
            )
        order = torch.as_tensor(self.order, dtype=torch.int64)
        schedule = check_fractions(self.schedule)
        if order.ndim != 1:
            raise SettingError(f"order must have one dimension, but has shape {list(order.shape)}")
        if len(order) == 0:
            raise DataError("no row is left to train on; look at what was dropped, and why")
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "schedule", schedule)
        if self.size(0) == 0:
            raise SettingError(
                f"the first stage holds no row: {schedule[0]} of {len(order)} rows; use a larger fraction or more data"
            )
        if (lowest := order.min()) < 0:
            raise SettingError(f"order must hold row numbers from 0, but holds {int(lowest)}")
        named = torch.zeros(int(order.max() - lowest) + 1, dtype=torch.bool, device=order.device)
        named[order - lowest] = True
        if repeats := len(order) - int(named.sum()):
            raise SettingError(f"order must name every row once, but {repeats} of {len(order)} entries repeat one")

    @classmethod
    def uniform(cls, order: Tensor, num_stages: int = 3, keep: float = 0.75, epochs_per_stage: int = 8) -> Curriculum:
        """Stages of equal length that grow by equal shares; the defaults are the paper's.

        Args:
            order: Row numbers ``[N]``, easiest first.
            num_stages: Number of stages.
            keep: Share of the rows in the last stage.
            epochs_per_stage: Epochs between two stages.

        Returns:
            The curriculum.

        Example:
            >>> dict(Curriculum.uniform(torch.arange(8)).schedule)
            {0: 0.25, 8: 0.5, 16: 0.75}
        """
        if num_stages < 1 or epochs_per_stage < 1:
            raise SettingError(
                f"num_stages and epochs_per_stage must be at least 1, but are {num_stages} and {epochs_per_stage}"
            )
        return cls(order, {stage * epochs_per_stage: keep * (stage + 1) / num_stages for stage in range(num_stages)})

    def size(self, epoch: int) -> int:
        """Return the number of rows in an epoch: the fraction of ``len(order)``, rounded down."""
        return math.floor(round(value_at(self.schedule, epoch) * len(self.order), 6))

    @property
    def kept(self) -> int:
        """Number of rows in the last stage."""
        return self.size(max(self.schedule))

    def stage(self, epoch: int) -> int:
        """Return the number of the stage, from 0, that an epoch belongs to."""
        return sum(first <= epoch for first in self.schedule) - 1

    def rows(self, epoch: int) -> Tensor:
        """Return the row numbers of an epoch, int64, easiest first."""
        return self.order[: self.size(epoch)]

    def epochs_alike(self, epoch: int) -> int | None:
        """Return how many epochs, from this one on, have the same rows; ``None`` where all that may come do."""
        later = [first - epoch for first in self.schedule if first > epoch and self.size(first) > self.size(epoch)]
        return min(later, default=None)

    def subset(self, dataset: Dataset[Any], epoch: int) -> EpochRows:
        """Return the rows of an epoch as a data set, which warns where it is read in epochs that have more.

        Raises:
            DataError: The order names a row that the data set does not have.
        """
        if (highest := int(self.order.max())) >= len(dataset):  # type: ignore[arg-type]
            raise DataError(
                f"the order names row {highest}, but the data set has {len(dataset)} rows"  # type: ignore[arg-type]
                "; it was made of other rows: rank these"
            )
        rows = array("q", self.rows(epoch).cpu().numpy().tobytes())  # a list takes five times as much
        return EpochRows(dataset, rows, epoch, self.epochs_alike(epoch))

    def num_steps(self, batch_size: int, max_epochs: int, world_size: int = 1, accumulate: int = 1) -> int:
        """Return how many optimizer steps a run takes, as Lightning counts them.

        Args:
            batch_size: Rows per rank and batch.
            max_epochs: Epochs of the run.
            world_size: Ranks that share the rows; the last of them may see a row again to even out.
            accumulate: Batches per optimizer step; the last step of an epoch may have fewer.

        Returns:
            The number of steps of the whole run.
        """
        return sum(self.epoch_steps(epoch, batch_size, world_size, accumulate) for epoch in range(max_epochs))

    def epoch_steps(self, epoch: int, batch_size: int, world_size: int = 1, accumulate: int = 1) -> int:
        """Return how many optimizer steps one epoch takes; arguments as for `num_steps`."""
        batches = math.ceil(math.ceil(self.size(epoch) / world_size) / batch_size)
        return math.ceil(batches / accumulate)


class EpochRows(Subset[Any]):
    """The rows of an epoch, which warn where a loader goes on with them when others should have come in.

    Only what loaders read in this process counts: theirs that have workers are not seen.

    Args:
        dataset: Of all rows.
        indices: Numbers of those of the epoch.
        epoch: Its number.
        epochs: How many epochs, from this one on, have these rows; ``None``: all.

    Example:
        >>> rows = Curriculum(torch.arange(4), {0: 0.5, 3: 1.0}).subset("abcd", epoch=1)
        >>> list(rows), rows.epochs
        (['a', 'b'], 2)
    """

    def __init__(self, dataset: Dataset[Any], indices: Sequence[int], epoch: int, epochs: int | None) -> None:
        super().__init__(dataset, indices)
        self.epoch = epoch
        self.epochs = epochs
        self._read = 0

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Return the rows of a batch: so loaders ask, and nobody else."""
        before, self._read = self._read, self._read + len(indices)
        if self.epochs is not None and before <= self.epochs * len(self) < self._read:
            warnings.warn(
                f"the {len(self)} rows of epoch {self.epoch} are read again after the {self.epochs} epochs that have "
                "these rows only: to let those in that come later, build the loader anew in every epoch (with "
                "Lightning: add CurriculumCallback() to the callbacks)",
                stacklevel=2,
            )
        return super().__getitems__(indices)


def find_curriculum(trainer: Any) -> Curriculum | None:
    """Return the curriculum of the trainer's data module or of its `CurriculumCallback`, if there is one.

    Args:
        trainer: Of Lightning, which is not needed to plan a curriculum, and so is not imported here.
    """
    for holder in (getattr(trainer, "datamodule", None), *getattr(trainer, "callbacks", [])):
        curriculum = getattr(holder, "curriculum", None)
        if isinstance(curriculum, Curriculum):
            return curriculum
    return None
