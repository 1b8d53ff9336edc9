"""The output head of a language model, apart from its body."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """The output head of a language model: from hidden states ``[n, d]`` to logits ``[n, V]``.

    Args:
        weight: ``[V, d]``
        bias: ``[V]``, if there is one.
        scale: Multiplies the logits (Cohere, Granite).
        soft_cap: Bounds the logits to ± this by tanh (Gemma).

    Example:
        >>> Head(torch.eye(2), scale=3.0)(torch.tensor([[1.0, 2.0]]))
        tensor([[3., 6.]])
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return logits."""
        logits = self.linear(hidden)
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)

    def linear(self, hidden: Tensor) -> Tensor:
        """Return logits before they are capped."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return logits if self.scale == 1 else logits * self.scale

    def narrow(self, vocabulary: int | None) -> Head:
        """Return the head of the first so many tokens, or of all."""
        if vocabulary in (None, len(self.weight)):
            return self
        bias = None if self.bias is None else self.bias[:vocabulary]
        return replace(self, weight=self.weight[:vocabulary], bias=bias)

    def to(self, target: torch.dtype | torch.device) -> Head:
        """Return the head in another type or on another device."""
        return replace(self, weight=self.weight.to(target), bias=None if self.bias is None else self.bias.to(target))
