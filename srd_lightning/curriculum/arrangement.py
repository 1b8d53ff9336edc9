"""How the ranked rows enter training: the paper's way, and the ways to compare it with.

Each control changes one thing only, either in which order the kept rows enter or which rows are kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from srd_lightning.errors import SettingError


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
