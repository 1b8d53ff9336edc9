"""(1 - w) CE + w KD from hidden states and output heads, without ever holding the logits of all tokens.

The logits of some tokens are made, turned in place into the gradient by these logits, multiplied into the gradients of
the hidden states and of the head, and forgotten. So value and gradients are complete when the forward pass ends; what
is kept for the backward pass has the size of the inputs, whatever the number of tokens times the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srd_lightning.losses.base import FLOOR, DistillationLoss, log_probabilities, upcast
from srd_lightning.losses.checks import check_gradient
from srd_lightning.losses.head import Head
from srd_lightning.losses.top_k import Likeliest

CHUNK = 256
"""Response tokens whose logits exist at a time."""
PIECE = 16
"""Tokens of these that are turned into gradients at a time on a CPU: few enough to stay in its cache."""


class Objective(NamedTuple):
    """The loss, which has the gradient, and its two parts as they are before weighting; scalars in fp32."""

    loss: Tensor
    ce: Tensor
    kd: Tensor


def chunked_objective(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    loss: DistillationLoss,
    teacher_logits: Callable[[slice], Tensor | Likeliest] | None,
    kd_weight: float,
    num_tokens: Tensor | int | None = None,
    chunk: int = CHUNK,
    compile: bool = False,
) -> Objective:
    r"""Return :math:`(1 - w) \, \mathrm{CE} + w \, T^2 D_T(\text{teacher} \| \text{student})`, chunk by chunk.

    Args:
        hidden: The student's final hidden states at the positions that predict the response, ``[N, d]``.
        head: The student's head. Autocast, where it is on, decides the type of its product; sums are at least fp32.
        targets: The tokens of the response, ``[N]``.
        loss: The distillation loss; one with `DistillationLoss.value_and_gradient` in closed form is faster.
        teacher_logits: Gives the teacher's logits ``[n, V]``, or its likeliest tokens, of a slice of the N tokens; not
            asked where w is 0.
        kd_weight: w, in [0, 1]; a part that has no weight is not computed, and is 0.
        num_tokens: What the sums over tokens are divided by; by default N, or 1 where there is none.
        chunk: Tokens whose logits exist at a time.
        compile: Compile what turns logits into gradients.

    Returns:
        The loss and its parts; the loss is connected to the graph also where there is no token.

    Example:
        >>> from srd_lightning import ForwardKL
        >>> hidden, head = torch.eye(2), Head(torch.eye(2))
        >>> teacher = lambda tokens: torch.zeros(2, 2)[tokens]
        >>> chunked_objective(hidden, head, torch.tensor([0, 0]), ForwardKL(), teacher, kd_weight=0.5)
        Objective(loss=tensor(0.4667), ce=tensor(0.8133), kd=tensor(0.1201))
    """
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    total = torch.as_tensor(max(len(targets), 1) if num_tokens is None else num_tokens, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        work = _Work(head, targets, loss, teacher_logits, kd_weight, chunk, compile)
        sums = cast(Any, _Chunked).apply(hidden.to(dtype), head.weight, head.bias, work)
    return Objective(*(part / total for part in sums))


@dataclass(frozen=True)
class _Work:
    """What turns the logits of some tokens into values and gradients."""

    head: Head
    targets: Tensor
    loss: DistillationLoss
    teacher_logits: Callable[[slice], Tensor | Likeliest] | None
    kd_weight: float
    chunk: int
    compile: bool

    def pieces(self, logits: Tensor, tokens: slice) -> Iterator[tuple[Tensor, Tensor | Likeliest | None, Tensor]]:
        """Yield the student's logits, the teacher's and the targets of a few tokens of a chunk at a time."""
        teacher = self.teacher_logits(tokens) if self.teacher_logits is not None and self.kd_weight > 0 else None
        targets = self.targets[tokens]
        size = PIECE if logits.device.type == "cpu" else len(logits)
        for first in range(0, len(logits), size):
            some = slice(first, first + size)
            yield logits[some], _some(teacher, some), targets[some]

    def piece_to_gradient(
        self, logits: Tensor, teacher: Tensor | Likeliest | None, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Overwrite logits, before they are capped, with their gradient; return the sums of CE and KD."""
        student, cap, weight = upcast(logits), self.head.soft_cap, self.kd_weight
        if cap is not None:
            student = cap * torch.tanh(student / cap)
        ce = kd = student.new_zeros(())
        own = gradient = None
        if weight < 1:
            own = student.log_softmax(-1)
            ce = -own.gather(1, targets[:, None]).sum()
        if teacher is not None:
            loss = self.loss
            shared = own is not None and loss.temperature == 1
            logp = own.clamp_(min=FLOOR) if own is not None and shared else log_probabilities(student, loss.temperature)
            if isinstance(teacher, Likeliest):
                teacher_logp = teacher.at(loss.temperature, logp)
            else:
                teacher_logp = log_probabilities(teacher, loss.temperature)
            values, gradient = loss.value_and_gradient(teacher_logp, logp)
            check_gradient(loss, values, gradient, logp)
            kd = upcast(values).sum() * loss.scale
            gradient = gradient.mul_(weight * loss.scale / loss.temperature)
        if own is not None:
            part = own.exp_()
            part.scatter_add_(1, targets[:, None], part.new_full((len(targets), 1), -1.0))
            gradient = part.mul_(1 - weight) if gradient is None else gradient.add_(part, alpha=1 - weight)
        assert gradient is not None, "without a teacher kd_weight must be below 1"
        if cap is not None:
            gradient = gradient * (1 - (student / cap) ** 2)
        logits.copy_(gradient if self.head.scale == 1 else gradient * self.head.scale)
        return ce, kd


def _some(teacher: Tensor | Likeliest | None, tokens: slice) -> Tensor | Likeliest | None:
    if isinstance(teacher, Likeliest):
        return Likeliest(*(values[tokens] for values in teacher))
    return None if teacher is None else teacher[tokens]


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_Work.piece_to_gradient)


class _Chunked(torch.autograd.Function):
    """Computes value and gradients in the forward pass; the backward pass only scales the gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        head = work.head.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        sums = hidden.new_zeros(2, dtype=wide)
        to_gradient = _compiled() if work.compile else _Work.piece_to_gradient
        for first in range(0, len(hidden), work.chunk):
            tokens = slice(first, min(first + work.chunk, len(hidden)))
            logits, ces, kds = head.linear(hidden[tokens]), [], []
            for piece in work.pieces(logits, tokens):
                ce, kd = to_gradient(work, *piece)
                ces.append(ce)
                kds.append(kd)
            sums += torch.stack([torch.stack(ces).sum(), torch.stack(kds).sum()])
            if grad_hidden is not None:
                torch.mm(logits, head.weight, out=grad_hidden[tokens])
            if ctx.needs_input_grad[1]:
                grad_weight = _add_product(grad_weight, logits, hidden[tokens], wide)
            if ctx.needs_input_grad[2]:
                part = logits.sum(0, dtype=wide)
                grad_bias = part if grad_bias is None else grad_bias + part
        wanted = ctx.needs_input_grad
        ctx.gradients = [grad_hidden, _like(grad_weight, weight, wanted[1]), _like(grad_bias, bias, wanted[2])]
        ce, kd = sums.unbind()
        ctx.mark_non_differentiable(ce, kd)
        return (1 - work.kd_weight) * ce + work.kd_weight * kd, ce, kd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the chunked objective makes its gradients once, and cannot be differentiated twice")
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients), None)


def _add_product(total: Tensor | None, gradient: Tensor, hidden: Tensor, wide: torch.dtype) -> Tensor:
    """Add ``gradientᵀ hidden`` to a total that may be wider than they are."""
    if total is None:
        return (gradient.T @ hidden).to(wide)
    return total.addmm_(gradient.T, hidden) if hidden.dtype == wide else total.add_(gradient.T @ hidden)


def _like(gradient: Tensor | None, parameter: Tensor | None, wanted: bool) -> Tensor | None:
    """Return a gradient that is wanted in the type of its parameter; it is zero where there was no token."""
    if not wanted or parameter is None:
        return None
    return torch.zeros_like(parameter) if gradient is None else gradient.to(parameter.dtype)
