"""In which order rows enter training: criteria become one order, easiest first, which an arrangement may change.

`EasyToHard` is the paper's arrangement. The others are controls, and each changes one thing only: in which order the
kept rows enter, or which rows are kept.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from srd_lightning.errors import DataError, SettingError

Floats = NDArray[np.float64]


def reciprocal_rank_fusion(
    *ease: ArrayLike,
    k: float = 60,
    ties: Literal["average", "order"] = "average",
    weights: Sequence[float] | None = None,
) -> Tensor:
    r"""Order rows by the sum of their reciprocal ranks, :math:`\sum_c w_c / (k + \mathrm{rank}_c)`, easiest first.

    Args:
        ease: One or more criteria, each ``[N]``, higher = easier (pass ``-nll``). The easiest row has rank 1.
            Float64 arrays of numpy, also memory-mapped ones, are not copied.
        k: Damping constant; the larger, the less the first ranks stand out. The paper uses 60.
        ties: ``"average"``: equal values share the mean of their ranks, and rows of equal fused score are ordered by
            the first criterion, then the next, so the order of the file never decides between different rows.
            ``"order"``: the paper's code (``tools/rank.py``), three chained stable sorts: ties of the first criterion
            keep the order of the file, ties of each later one and of the fused score keep the order before it.
        weights: One positive number per criterion, how much it counts. Only their ratios matter. Default: all 1.

    Returns:
        Row numbers ``[N]``, int64, easiest first.

    Raises:
        SettingError: No criterion, a negative ``k``, an unknown ``ties``, or weights that are not positive or not one
            per criterion.
        DataError: Criteria of different lengths, or a NaN.

    Example:
        >>> rouge_l, nll = torch.tensor([0.1, 0.9, 0.5]), torch.tensor([3.0, 1.0, 2.5])
        >>> reciprocal_rank_fusion(rouge_l, -nll)
        tensor([1, 2, 0])
    """
    criteria = [_float64(values) for values in ease]
    _check_criteria(criteria)
    if not 0 <= k < math.inf:
        raise SettingError(f"k must not be negative, but is {k}")
    weights = [1.0] * len(criteria) if weights is None else list(weights)
    if len(weights) != len(criteria) or not all(0 < weight < math.inf for weight in weights):
        raise SettingError(
            f"expected one positive weight for each of {len(criteria)} criteria, but got {weights}; "
            "leave a criterion out instead of giving it no weight"
        )
    if ties == "average":
        order = _fuse_with_shared_ranks(criteria, k, weights)
    elif ties == "order":
        order = _fuse_with_chained_sorts(criteria, k, weights)
    else:
        raise SettingError(f"ties must be 'average' or 'order', but is {ties!r}")
    return torch.from_numpy(order.astype(np.int64, copy=False))


def _float64(values: ArrayLike) -> Floats:
    if isinstance(values, Tensor):
        return np.asarray(values.detach().cpu().double().numpy())
    return np.asarray(values, dtype=np.float64)


def _check_criteria(criteria: list[Floats]) -> None:
    if not criteria:
        raise SettingError("expected at least one criterion, but got none")
    for number, values in enumerate(criteria):
        if values.ndim != 1 or len(values) != len(criteria[0]):
            raise DataError(
                f"criterion {number} must have shape [{criteria[0].size}] like the first, but has {list(values.shape)}"
            )
        if missing := int(np.isnan(values).sum()):
            raise DataError(
                f"criterion {number} is NaN for {missing} of {len(values)} rows; give every row a score or drop it"
            )


def _fuse_with_shared_ranks(criteria: list[Floats], k: float, weights: list[float]) -> NDArray[np.int64]:
    shares = np.empty((len(criteria), len(criteria[0])))
    for share, values, weight in zip(shares, criteria, weights, strict=True):
        share[:] = weight / (k + average_ranks(values))
    shares.sort(axis=0)  # a fixed order of addition: the same shares, swapped, must give the same sum
    fused = shares.sum(axis=0)
    del shares
    order = np.argsort(-fused)
    _break_ties(order, fused, criteria)
    return order


def average_ranks(values: Floats) -> Floats:
    """Return the rank of each row, highest value first; equal values share the mean of their ranks.

    Arrays are freed as soon as possible here: this is where the most memory is in use.
    """
    highest_first = np.argsort(values)[::-1]
    sequence = values[highest_first]
    last = np.append(np.flatnonzero(sequence[1:] != sequence[:-1]) + 1, len(values))  # rank in each group of equals
    del sequence
    size = np.diff(last, prepend=0)
    mean = last - size / 2 + 0.5
    del last
    ranks = np.empty(len(values))
    ranks[highest_first] = np.repeat(mean, size)
    return ranks


def _break_ties(order: NDArray[np.int64], fused: Floats, criteria: list[Floats]) -> None:
    """Sort the rows of equal fused score by the first criterion, then the next, then the row number, in place."""
    sequence = fused[order]
    equal = sequence[1:] == sequence[:-1]
    del sequence
    tied = np.flatnonzero(np.append(equal, False) | np.append(False, equal))
    rows = np.sort(order[tied])
    for values in [*reversed(criteria), fused]:
        rows = rows[np.argsort(-values[rows], kind="stable")]
    order[tied] = rows


def _fuse_with_chained_sorts(criteria: list[Floats], k: float, weights: list[float]) -> NDArray[np.int64]:
    order = np.arange(len(criteria[0]))
    fused = np.zeros(len(order))
    for values, weight in zip(criteria, weights, strict=True):
        order = order[np.argsort(-values[order], kind="stable")]
        fused[order] += weight / (k + np.arange(1, len(order) + 1))
    return order[np.argsort(-fused[order], kind="stable")]


class Arrangement(ABC):
    """Base class: a way to rearrange an order of rows before a `Curriculum` cuts it into stages."""

    @abstractmethod
    def __call__(self, order: Tensor, kept: int) -> Tensor:
        """Rearrange an order.

        Args:
            order: Row numbers ``[N]``, int64, easiest first, from `reciprocal_rank_fusion`.
            kept: Number of rows in the last stage.

        Returns:
            The row numbers ``[N]`` again. The first ``kept`` of them are trained on and enter in this order.
        """


def arranged(arrangement: Arrangement, order: Tensor, kept: int) -> Tensor:
    """Return what an arrangement makes of an order, if that names the same rows.

    Args:
        arrangement: Perhaps one of the user's own.
        order: Row numbers ``[N]``, easiest first.
        kept: Number of rows in the last stage.

    Raises:
        SettingError: It names others: a shorter order would silently be cut once more.

    Example:
        >>> arranged(HardToEasy(), torch.tensor([3, 0, 2, 1]), kept=3)
        tensor([2, 0, 3, 1])
    """
    found = torch.as_tensor(arrangement(order.clone(), kept))
    if found.shape != order.shape or not torch.equal(found.sort().values, order.sort().values):
        raise SettingError(
            f"{type(arrangement).__name__} must return the {len(order)} row numbers that it is given in another order, "
            f"but returned {'others' if found.shape == order.shape else f'shape {list(found.shape)}'}; those that are "
            "not to be trained on come last"
        )
    return found


class EasyToHard(Arrangement):
    """The paper's: the easiest rows are kept, and the easiest of them enter first.

    Example:
        >>> EasyToHard()(torch.tensor([3, 0, 2, 1]), kept=3)
        tensor([3, 0, 2, 1])
    """

    def __call__(self, order: Tensor, kept: int) -> Tensor:
        """Return the order as it is."""
        return order


class HardToEasy(Arrangement):
    """The easiest rows are kept, but the hardest of them enter first.

    Example:
        >>> HardToEasy()(torch.tensor([3, 0, 2, 1]), kept=3)
        tensor([2, 0, 3, 1])
    """

    def __call__(self, order: Tensor, kept: int) -> Tensor:
        """Return the order with its kept rows reversed."""
        return torch.cat([order[:kept].flip(0), order[kept:]])


class RandomOrder(Arrangement):
    """The easiest rows are kept, but enter in random order: a difference to `EasyToHard` is due to the order.

    Args:
        seed: Decides the random order.

    Example:
        >>> arranged = RandomOrder(seed=0)(torch.tensor([3, 0, 2, 1]), kept=3)
        >>> sorted(arranged[:3].tolist()), int(arranged[3])
        ([0, 2, 3], 1)
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, order: Tensor, kept: int) -> Tensor:
        """Return the order with its kept rows shuffled."""
        return torch.cat([order[_shuffle(kept, self.seed)], order[kept:]])


class RandomSubset(Arrangement):
    """Randomly chosen rows are kept, and the easiest of them enter first: a difference is due to the selection.

    Args:
        seed: Decides which rows are kept.

    Example:
        >>> arranged = RandomSubset(seed=0)(torch.arange(8), kept=6)
        >>> bool((arranged[:6].diff() > 0).all())
        True
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, order: Tensor, kept: int) -> Tensor:
        """Return the chosen rows, then the others, each easiest first."""
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[_shuffle(len(order), self.seed)[:kept]] = True
        return torch.cat([order[chosen], order[~chosen]])


def _shuffle(number: int, seed: int) -> Tensor:
    """Return 0 to number - 1 in an order that the seed decides, without touching the global random state."""
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed))


def order_by_id(ranked: Sequence[object], ids: Sequence[object]) -> Tensor:
    """Return the order of a ranking, such as that in ``ranking.parquet``, as row numbers of another data set.

    Args:
        ranked: Ids, easiest first.
        ids: Of the rows of the data set, in its order; rows that were not ranked stay out.

    Returns:
        Row numbers ``[N]``, int64, for `Curriculum`.

    Raises:
        DataError: An id stands twice, or is ranked and not in the data set.

    Example:
        >>> order_by_id(["c", "a"], ["a", "b", "c"])
        tensor([2, 0])
    """
    places = {str(name): place for place, name in enumerate(ids)}
    for what, names in (("the data set", ids), ("the ranking", ranked)):
        if twice := len(names) - len({str(name) for name in names}):
            raise DataError(f"ids must stand once, but {twice} of {len(names)} in {what} stand there before")
    if unknown := [str(name) for name in ranked if str(name) not in places]:
        raise DataError(
            f"the ranking has {len(unknown)} ids that the data set has not, such as {unknown[0]!r}; rank its rows, or "
            "give it the ids that were ranked"
        )
    return torch.tensor([places[str(name)] for name in ranked], dtype=torch.int64)


def digest_of_order(order: Tensor) -> str:
    """Return a digest of row numbers.

    Args:
        order: ``[N]``, int64.
    """
    return hashlib.sha256(np.ascontiguousarray(order.numpy()).tobytes()).hexdigest()[:16]
