"""From several difficulty criteria to one order, easiest row first."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Floats = NDArray[np.float64]


def reciprocal_rank_fusion(*ease: ArrayLike, k: float = 60, ties: Literal["average", "order"] = "average") -> Tensor:
    r"""Order rows by the sum of their reciprocal ranks, :math:`\sum_c 1 / (k + \mathrm{rank}_c)`, easiest first.

    Args:
        ease: One or more criteria, each ``[N]``, higher = easier (pass ``-nll``). The easiest row has rank 1.
        k: Damping constant; the larger, the less the first ranks stand out. The paper uses 60.
        ties: ``"average"``: equal values share the mean of their ranks, and rows of equal fused score are ordered by
            the first criterion, then the next, so the order of the file never decides between different rows.
            ``"order"``: the paper's code (``tools/rank.py``), three chained stable sorts: ties of the first criterion
            keep the order of the file, ties of each later one and of the fused score keep the order before it.

    Returns:
        Row numbers ``[N]``, int64, easiest first.

    Raises:
        ValueError: No criterion, criteria of different lengths, a NaN, or an unknown ``ties``.

    Example:
        >>> rouge_l, nll = torch.tensor([0.1, 0.9, 0.5]), torch.tensor([3.0, 1.0, 2.5])
        >>> reciprocal_rank_fusion(rouge_l, -nll)
        tensor([1, 2, 0])
    """
    if not ease:
        raise ValueError("expected at least one criterion, but got none")
    criteria = [torch.as_tensor(values, dtype=torch.float64).detach().cpu().numpy() for values in ease]
    for number, values in enumerate(criteria):
        if values.ndim != 1 or len(values) != len(criteria[0]):
            raise ValueError(
                f"criterion {number} must have shape [{criteria[0].size}] like the first, but has {list(values.shape)}"
            )
        if missing := int(np.isnan(values).sum()):
            raise ValueError(
                f"criterion {number} is NaN for {missing} of {len(values)} rows; give every row a score or drop it"
            )
    if ties == "average":
        order = _fuse_with_shared_ranks(criteria, k)
    elif ties == "order":
        order = _fuse_with_chained_sorts(criteria, k)
    else:
        raise ValueError(f"ties must be 'average' or 'order', but is {ties!r}")
    return torch.from_numpy(order.astype(np.int64))


def _fuse_with_shared_ranks(criteria: list[Floats], k: float) -> NDArray[np.int64]:
    reciprocals = np.stack([1 / (k + _average_ranks(values)) for values in criteria])
    reciprocals.sort(axis=0)  # a fixed order of addition: the same ranks, swapped, must give the same sum
    fused = reciprocals.sum(axis=0)
    return np.lexsort([-values for values in reversed(criteria)] + [-fused])


def _average_ranks(values: Floats) -> Floats:
    _, group, size = np.unique(-values, return_inverse=True, return_counts=True)
    last = np.cumsum(size)
    return np.asarray((last - (size - 1) / 2)[group], dtype=np.float64)


def _fuse_with_chained_sorts(criteria: list[Floats], k: float) -> NDArray[np.int64]:
    order = np.arange(len(criteria[0]))
    fused = np.zeros(len(order))
    for values in criteria:
        order = order[np.argsort(-values[order], kind="stable")]
        fused[order] += 1 / (k + np.arange(1, len(order) + 1))
    return order[np.argsort(-fused[order], kind="stable")]
