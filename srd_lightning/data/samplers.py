"""Which rows each rank sees in an epoch, and in which order: plain, or with rows of similar length together.

Another grouping is one class: a `LengthGrouped` with an ``order`` of its own, or any `MakeSampler`, given to
``SRDDataModule(sampler=...)``.

Rows are dealt like cards: of a global order, process ``r`` of ``R`` takes places ``r``, ``r + R``, … So what stands
together in the order, one *global* batch of ``batch_size * R`` rows, is one training step of all ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from srd_lightning.errors import SettingError

Ints = NDArray[np.int64]
Lengths = NDArray[np.integer[Any]]
PIECE = 65_536
"""Row numbers that are made Python numbers at a time: all of them at once would take 3 GB per 100 million rows."""


def length_grouped_order(lengths: Lengths, group: int, seed: int, epoch: int, window: int = 50) -> Ints:
    """Return a random order in which rows of similar length stand together.

    All rows are shuffled and cut into windows; within a window they are sorted by length and cut into groups, and then
    the groups are shuffled. So the company of a row changes from epoch to epoch, and lengths do not drift within one.

    Args:
        lengths: Of the rows, in tokens, ``[N]``.
        group: Rows that stand together: those of one step of all ranks.
        seed: Of the order.
        epoch: Another epoch, another order.
        window: Groups that are sorted together: more pads less, and mixes less.

    Returns:
        Row numbers ``[N]``, each once. Where ``group`` does not divide N, the last group is the short one.

    Example:
        >>> lengths = np.array([9, 2, 8, 1, 5])
        >>> lengths[length_grouped_order(lengths, group=2, seed=0, epoch=0)]
        array([8, 9, 1, 2, 5])
    """
    generator = torch.Generator().manual_seed(seed + epoch)  # as DistributedSampler does it
    order = torch.randperm(len(lengths), generator=generator).numpy()
    for first in range(0, len(order), group * window):
        rows = order[first : first + group * window]
        rows[:] = rows[np.argsort(lengths[rows], kind="stable")]  # equal lengths stay shuffled
    groups, rest = divmod(len(order), group)
    if rest:  # the last window gives up a short group, short rows or long ones, as chance has it
        longer = int(torch.randint(groups % window + 1, (), generator=generator))
        cut = len(order) - rest - group * longer
        order[cut:] = np.roll(order[cut:], -rest)
    whole = order[: groups * group].reshape(groups, group)
    whole[:] = whole[torch.randperm(groups, generator=generator).numpy()]
    return order


def batches_by_token_budget(lengths: Lengths, tokens: int) -> Iterator[Ints]:
    """Yield row numbers, short rows first, as many as make so many tokens with their padding.

    Example:
        >>> [batch.tolist() for batch in batches_by_token_budget(np.array([5, 1, 2, 1]), tokens=4)]
        [[1, 3], [2], [0]]
    """
    order = np.argsort(lengths, kind="stable")
    first = 0
    for position, row in enumerate(order):
        if position > first and (position + 1 - first) * lengths[row] > tokens:
            yield order[first:position]
            first = position
    yield order[first:]


class Shuffled(DistributedSampler[Any]):
    """A plain shuffle, row for row as `DistributedSampler` makes it, without a list of all rows.

    Args:
        dataset: Has a length.
        num_replicas: Ranks that see different rows; the first rows of the order fill up what they lack.
        rank: This process.
        seed: Of the order, with the epoch (``set_epoch``).
        start: Rows that this rank has already seen of the epoch. They are left out; the length stays.

    Example:
        >>> list(Shuffled(range(5), num_replicas=2, rank=0)), list(Shuffled(range(5), num_replicas=2, rank=1))
        ([4, 1, 2], [0, 3, 4])
    """

    def __init__(self, dataset: Any, num_replicas: int, rank: int, seed: int = 0, start: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed)
        self.start = start

    def order(self) -> Ints:
        """Return the row numbers of all ranks, ``[N]``."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(len(self.dataset), generator=generator).numpy()  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        """Deal the rows of this rank."""
        order = self.order()
        for first in range(self.start, self.num_samples, PIECE):
            places = self.rank + self.num_replicas * np.arange(first, min(first + PIECE, self.num_samples))
            yield from order[places % len(order)].tolist()


class LengthGrouped(Shuffled):
    """A shuffle that pads less: the rows of one step, of all ranks, are of similar length.

    Every epoch has the rows of a plain shuffle, and as many batches; see `length_grouped_order`.

    Args:
        dataset: Has a length.
        lengths: Of its rows, in tokens, ``[N]``.
        batch_size: Rows per rank and step.
        num_replicas: As for `Shuffled`.
        rank: As for `Shuffled`.
        seed: As for `Shuffled`.
        start: As for `Shuffled`.

    Example:
        >>> lengths = np.array([9, 2, 8, 1])
        >>> [lengths[list(LengthGrouped(range(4), lengths, 1, num_replicas=2, rank=rank))].tolist() for rank in (0, 1)]
        [[1, 8], [2, 9]]
    """

    def __init__(
        self,
        dataset: Any,
        lengths: Lengths,
        batch_size: int,
        num_replicas: int,
        rank: int,
        seed: int = 0,
        start: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, seed, start)
        self.lengths = lengths
        self.group = batch_size * num_replicas

    def order(self) -> Ints:
        """Return the row numbers of all ranks, ``[N]``, those of similar length together."""
        return length_grouped_order(self.lengths, self.group, self.seed, self.epoch)


MakeSampler = Callable[[Any, Lengths, int, int, int, int], DistributedSampler[Any]]
"""Says which rows make a batch: a class such as `LengthGrouped`, or a function, which are given, in this order:

- the rows of the epoch, which have a length N,
- theirs in tokens, ``[N]``,
- rows per rank and step: these, from each rank, are one step,
- how many ranks see different rows,
- this rank,
- the seed of the order.

The sampler gives ``ceil(N / ranks)`` row numbers, so that all ranks together see each row. They depend on what was
given and on ``set_epoch(epoch)`` alone, so that a run that is resumed sees the rest of the same epoch.
"""


def plain_shuffle(
    dataset: Any, lengths: Lengths, batch_size: int, num_replicas: int, rank: int, seed: int
) -> DistributedSampler[Any]:
    """Return a sampler that does not group rows; see `MakeSampler`."""
    return Shuffled(dataset, num_replicas, rank, seed)


def sampler_of(
    make: MakeSampler, dataset: Any, lengths: Lengths, batch_size: int, ranks: Mapping[str, int], seed: int
) -> Shuffled:
    """Return a sampler that can leave out what was seen of an epoch.

    Args:
        make: Makes it.
        dataset: The rows of the epoch.
        lengths: Theirs, in tokens, ``[N]``.
        batch_size: Rows per rank and step.
        ranks: ``rank`` and ``num_replicas``.
        seed: Of the order.

    Raises:
        SettingError: It gives another number of rows than were planned.
    """
    sampler = make(dataset, lengths, batch_size, ranks["num_replicas"], ranks["rank"], seed)
    if not isinstance(sampler, DistributedSampler):
        raise SettingError(f"sampler must return a DistributedSampler, but returned a {type(sampler).__name__}")
    planned = math.ceil(len(dataset) / ranks["num_replicas"])
    if len(sampler) != planned:
        raise SettingError(
            f"sampler must give each of {ranks['num_replicas']} ranks {planned} of {len(dataset)} rows, but gives "
            f"{len(sampler)}"
        )
    return sampler if isinstance(sampler, Shuffled) else _Given(sampler, **ranks)


class _Given(Shuffled):
    """A sampler of the user's; what was seen of the epoch is left out."""

    def __init__(self, sampler: DistributedSampler[Any], num_replicas: int, rank: int) -> None:
        super().__init__(sampler.dataset, num_replicas, rank)
        self.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(iter(self.sampler), self.start, None)


def check_sampler(make: MakeSampler) -> None:
    """Try a user's sampler on ten rows for two ranks, so that one that cannot work is known before there are rows.

    Raises:
        SettingError: It takes other arguments, or its ranks do not see each row in every epoch, the same when asked
            again.

    Example:
        >>> check_sampler(LengthGrouped)
    """
    lengths = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    for epoch in (0, 1):
        orders: list[list[int]] = []
        for rank in (0, 1, 0, 1):
            try:
                sampler = sampler_of(make, range(10), lengths, 2, {"num_replicas": 2, "rank": rank}, seed=0)
            except TypeError as error:
                raise SettingError(f"sampler must take what `MakeSampler` says, in its order: {error}") from error
            sampler.set_epoch(epoch)
            orders.append([int(row) for row in sampler])
        if orders[2:] != orders[:2]:
            raise SettingError(
                f"sampler must give the same rows for the same seed and epoch, or no run can be resumed, but gives "
                f"{orders[0]} and then {orders[2]}"
            )
        if sorted(orders[0] + orders[1]) != list(range(10)):
            raise SettingError(
                f"sampler must let the ranks see each row of an epoch once, but gives rows {orders[0]} to one and "
                f"{orders[1]} to the other of two ranks that share rows 0 to 9"
            )
