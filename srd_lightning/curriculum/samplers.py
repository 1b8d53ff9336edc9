"""Samplers that grow with a curriculum, for loops and trainers that are not Lightning's.

`CurriculumSampler` has the rows of the epoch that it is told. `WholeRunSampler` has those of all epochs, one after the
other: trainers that take every epoch for as long as the first one would cut off what comes in later.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate

import torch
from torch.utils.data import Sampler

from srd_lightning.curriculum.curriculum import Curriculum
from srd_lightning.errors import SettingError


class CurriculumSampler(Sampler[int]):
    """The rows of one epoch in random order, dealt to the ranks as `DistributedSampler` deals them.

    The epoch is an attribute, ``sampler.epoch = epoch``, to be set before each of them. There is no ``set_epoch``:
    Fabric and Accelerate would call that by themselves, with a count that begins anew in a run that is resumed.

    Args:
        curriculum: Of the rows of a data set.
        num_replicas: Ranks that see different rows; the first rows of the order fill up what the last ones lack. 1
            where the loop deals batches to its ranks by itself, as Accelerate does.
        rank: This process.
        seed: Of the order, with the epoch.

    Raises:
        SettingError: There is no such rank.

    Example:
        >>> sampler = CurriculumSampler(Curriculum(torch.tensor([3, 0, 2, 1]), {0: 0.5, 1: 1.0}))
        >>> list(sampler), len(sampler)
        ([3, 0], 2)
        >>> sampler.epoch = 1
        >>> list(sampler), len(sampler)
        ([0, 1, 2, 3], 4)
    """

    def __init__(self, curriculum: Curriculum, num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        if not 0 <= rank < num_replicas:
            raise SettingError(f"rank must be one of {num_replicas}, from 0, but is {rank}")
        self.curriculum = curriculum
        self.num_replicas = num_replicas
        self.rank = rank
        self.seed = seed
        self.epoch = 0
        """Whose rows it has."""

    def __len__(self) -> int:
        """Return how many rows this rank has in the epoch."""
        return math.ceil(self.curriculum.size(self.epoch) / self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        """Deal the row numbers of this rank."""
        rows = self.curriculum.rows(self.epoch)
        shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed + self.epoch))]
        places = self.rank + self.num_replicas * torch.arange(len(self))
        return iter(shuffled[places % len(rows)].tolist())


class WholeRunSampler(Sampler[int]):
    """The rows of all epochs of a run, one after the other, each epoch in whole optimizer steps.

    For trainers that learn the length of an epoch once, such as `transformers.Trainer`: to them the run is one epoch,
    so that the steps, and with them the learning rate, are planned as they come, and a resumed run goes on with its
    next row. The first rows of an epoch's order fill up its last step.

    Args:
        epochs: Of one epoch at a time, for all ranks together (``num_replicas`` 1).
        max_epochs: How many there are.
        rows_per_step: Rows of an optimizer step: of all ranks and accumulated batches.

    Raises:
        SettingError: A number is below 1, or the sampler is for some of the ranks.

    Example:
        >>> run = WholeRunSampler(CurriculumSampler(Curriculum(torch.arange(6), {0: 0.5, 2: 1.0})), 3, rows_per_step=2)
        >>> list(run)
        [2, 0, 1, 2, 1, 2, 0, 1, 0, 3, 1, 2, 4, 5]
        >>> run.steps, [run.epoch_of(step) for step in range(run.steps)]
        (7, [0, 0, 1, 1, 2, 2, 2])
    """

    def __init__(self, epochs: CurriculumSampler, max_epochs: int, rows_per_step: int) -> None:
        if max_epochs < 1 or rows_per_step < 1:
            raise SettingError(
                f"max_epochs and rows_per_step must be at least 1, but are {max_epochs} and {rows_per_step}"
            )
        if epochs.num_replicas != 1:
            raise SettingError(
                f"WholeRunSampler needs the rows of all ranks, but its sampler deals them to {epochs.num_replicas}; "
                "leave num_replicas and rank out: the trainer deals them"
            )
        self.epochs = epochs
        self.max_epochs = max_epochs
        self.rows_per_step = rows_per_step
        sizes = [epochs.curriculum.epoch_steps(epoch, rows_per_step) for epoch in range(max_epochs)]
        self._ends = list(accumulate(sizes))

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self._ends[-1]

    def epoch_of(self, step: int) -> int:
        """Return the epoch that a step belongs to; after the last one, the last epoch.

        Args:
            step: How many were made before it.
        """
        return min(bisect_right(self._ends, step), self.max_epochs - 1)

    def __len__(self) -> int:
        """Return how many rows the run has, with those that fill up steps."""
        return self.steps * self.rows_per_step

    def __iter__(self) -> Iterator[int]:
        """Deal the row numbers of all epochs."""
        for epoch in range(self.max_epochs):
            self.epochs.epoch = epoch
            rows = list(self.epochs)
            for place in range(self.epochs.curriculum.epoch_steps(epoch, self.rows_per_step) * self.rows_per_step):
                yield rows[place % len(rows)]
