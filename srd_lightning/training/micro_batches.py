"""A batch that is too large for the memory goes through in parts, and the result is the same.

The gradient of each part is complete before the next one begins, so the longest rows alone do not set the peak: what is
held at a time belongs to one part. To autograd, Lightning and DDP it is one loss of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from srd_lightning.losses.chunked import Objective


def in_parts(objectives: Sequence[Callable[[], Objective]], parameters: Iterable[nn.Parameter]) -> Objective:
    """Add up objectives, with one part's activations in memory at a time.

    Args:
        objectives: Each computes its part.
        parameters: Those that get the gradient: of the student, and of a loss that learns too.

    Returns:
        The sums; the gradient of the loss is complete already.
    """
    if not torch.is_grad_enabled():
        return Objective(*(torch.stack(values).sum() for values in zip(*(part() for part in objectives), strict=True)))
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return Objective(*cast(Any, _InParts).apply(objectives, *trained))


class _InParts(torch.autograd.Function):
    """Computes value and gradients in the forward pass; the backward pass only scales the gradients."""

    @staticmethod
    def forward(
        ctx: Any, objectives: Sequence[Callable[[], Objective]], *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        totals: list[Tensor | None] = [None] * len(parameters)
        sums: list[Objective] = []
        for objective in objectives:
            with torch.enable_grad():
                part = objective()
            gradients = torch.autograd.grad(part.loss, parameters, allow_unused=True)
            given: set[int] = set()
            for place, gradient in enumerate(gradients):
                if gradient is None:
                    continue
                total = totals[place]
                totals[place] = _own(gradient, given) if total is None else total.add_(gradient)
            sums.append(Objective(*(value.detach() for value in part)))
        ctx.gradients = totals
        loss, ce, kd = (torch.stack(values).sum() for values in zip(*sums, strict=True))
        ctx.mark_non_differentiable(ce, kd)
        return loss, ce, kd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("a batch in parts makes its gradients once, and cannot be differentiated twice")
        gradients, ctx.gradients = ctx.gradients[::-1], None
        scaled = []
        while gradients:
            gradient = gradients.pop()  # and free it
            scaled.append(None if gradient is None else gradient * grad_loss)
        return (None, *scaled)


def _own(gradient: Tensor, given: set[int]) -> Tensor:
    """Return a tensor to add to: autograd may give one to two parameters, or repeat one value without copying it."""
    shared = gradient.data_ptr() in given or not gradient.is_contiguous()
    given.add(gradient.data_ptr())
    return gradient.clone() if shared else gradient
