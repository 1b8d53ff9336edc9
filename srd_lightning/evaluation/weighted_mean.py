"""A mean over tokens or rows of all batches and all ranks, for which no batch waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class WeightedMean(Metric):
    """Mean of values with weights.

    `torchmetrics.MeanMetric` asks of each value whether it is NaN, for which a GPU must finish all work before it, and
    where that is disabled it takes all weights for 1 (seen in torchmetrics 1.9.0). Here NaN makes the mean NaN, and the
    sums stay fp32 in a module of half precision, in which they would soon stand still.

    Example:
        >>> mean = WeightedMean()
        >>> mean.update(1.0, 1)
        >>> mean.update(torch.tensor(4.0), 2)
        >>> mean.compute()
        tensor(3.)
    """

    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("weight", torch.tensor(0.0), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **options: Any) -> nn.Module:
        return super()._apply(lambda values: fn(values).to(values.dtype), *args, **options)

    def update(self, value: Tensor | float, weight: Tensor | float) -> None:
        """Add a mean of some tokens or rows.

        Args:
            value: The mean, a scalar.
            weight: How many they are.
        """
        self.total += value * weight
        self.weight += weight

    def compute(self) -> Tensor:
        """Return the mean; NaN where there was nothing."""
        return self.total / self.weight
