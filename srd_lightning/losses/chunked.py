"""(1 - w) CE + w KD from hidden states and output heads, without ever holding the logits of all tokens.

The logits of some tokens are made, turned in place into the gradient by these logits, multiplied into the gradients of
the hidden states and of the head, and forgotten. So value and gradients are complete when the forward pass ends; what
is kept for the backward pass has the size of the inputs, whatever the number of tokens times the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srd_lightning.losses.base import DistillationLoss
from srd_lightning.losses.by_token import ByToken
from srd_lightning.losses.head import Head
from srd_lightning.losses.look_ahead import look_ahead, of_places
from srd_lightning.losses.pieces import TEACHER_TOKENS, Logits, size_of_piece, slices, some_of
from srd_lightning.losses.token_loss import TokenLoss, compiled, to_gradient
from srd_lightning.losses.top_k import TopKTeacher

CHUNK = 256
"""Response tokens whose logits exist at a time on a CPU."""

ToGradient = Callable[[TokenLoss, Tensor, Tensor | TopKTeacher | None, Tensor], Tensor]
"""`to_gradient`, or what does the same in one kernel."""


class Objective(NamedTuple):
    """The loss, which has the gradient, and its two parts as they are before weighting; scalars in fp32."""

    loss: Tensor
    ce: Tensor
    kd: Tensor


def chunk_size(device: str, width: int, dtype: torch.dtype) -> int:
    """Return the tokens whose logits exist at a time.

    On a CPU these are few. Elsewhere each chunk has its price, reading and writing the gradient of the head ``[V, d]``
    in fp32; so the student's logits of a chunk take as much memory as this gradient, which is needed in any case.

    Args:
        device: Its type.
        width: d, of the hidden states.
        dtype: Of the logits.

    Example:
        >>> chunk_size("cpu", 4096, torch.bfloat16), chunk_size("cuda", 4096, torch.bfloat16)
        (256, 8192)
    """
    return CHUNK if device == "cpu" else max(1024, width * torch.float32.itemsize // dtype.itemsize)


def chunked_objective(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    loss: DistillationLoss,
    teacher_logits: Logits | None,
    kd_weight: float,
    num_tokens: Tensor | int | None = None,
    chunk: int | Literal["auto"] = "auto",
    compile: bool = False,
    rows: Sequence[int] | None = None,
    cast_head: Head | None = None,
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
        chunk: Tokens whose logits exist at a time; by default as `chunk_size` says.
        compile: Compile what turns logits into gradients, where no kernel does it.
        rows: How many of the N tokens each row has, for losses that choose among the tokens of a row, see `ByToken`; by
            default all are of one.
        cast_head: The head in the type of its product, where it is cast once for several calls.

    Returns:
        The loss and its parts; the loss is connected to the graph also where there is no token.

    Example:
        >>> from srd_lightning import ForwardKL
        >>> hidden, head = torch.eye(2), Head(torch.eye(2))
        >>> teacher = lambda tokens: torch.zeros(2, 2)[tokens]
        >>> chunked_objective(hidden, head, torch.tensor([0, 0]), ForwardKL(), teacher, kd_weight=0.5)
        Objective(loss=tensor(0.4667), ce=tensor(0.8133), kd=tensor(0.1201))
    """
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    total = max(len(targets), 1) if num_tokens is None else num_tokens
    if chunk == "auto":
        chunk = chunk_size(device, hidden.shape[1], dtype)
    with torch.autocast(device, enabled=False):
        cost, hidden = TokenLoss(loss, kd_weight, head.scale, head.soft_cap), hidden.to(dtype)
        taught = len(targets) if kd_weight > 0 and teacher_logits is not None else 0
        if isinstance(loss, ByToken) and taught and teacher_logits is not None:
            plan = look_ahead(loss, hidden, cast_head or head, teacher_logits, rows or [len(targets)], chunk)
            places = plan.order() if kd_weight < 1 else plan.order()[: plan.chosen]
            temperatures = None if plan.temperatures is None else plan.temperatures[places]
            cost = replace(cost, weights=plan.weights[places], temperatures=temperatures)
            hidden, targets, taught = hidden[places], targets[places], plan.chosen
            teacher_logits = of_places(teacher_logits, places)
        work = _Work(cast_head or head, targets, cost, teacher_logits, taught, chunk, compile)
        sums = cast(Any, _Chunked).apply(hidden, head.weight, head.bias, work)
    return Objective(*(part / total for part in sums))


@dataclass(frozen=True)
class _Work:
    """What turns the logits of a chunk into values and gradients."""

    head: Head
    targets: Tensor
    cost: TokenLoss
    teacher_logits: Logits | None
    taught: int
    """How many tokens, the first, the teacher is asked for."""
    chunk: int
    compile: bool

    def pieces(
        self, logits: Tensor, first: int
    ) -> Iterator[tuple[ToGradient, TokenLoss, Tensor, Tensor | TopKTeacher | None, Tensor]]:
        """Yield the logits of the tokens from the first on, a few at a time, and what turns these into gradients.

        Args:
            logits: Of tokens that stand together, ``[n, V]``.
            first: Where the first of them stands among all.
        """
        for some in slices(len(logits), TEACHER_TOKENS, border=self.taught - first):
            tokens = slice(first + some.start, first + some.stop)
            teacher = self.teacher_logits(tokens) if self.teacher_logits and tokens.start < self.taught else None
            cost = self.cost.of(tokens)
            way, size = _kernel(cost, logits[some], teacher), TEACHER_TOKENS
            if way is None:
                way = compiled() if self.compile and cost.weights is None else to_gradient
                size = size_of_piece(logits)
            for piece in slices(some.stop - some.start, size):
                yield way, cost.of(piece), logits[some][piece], some_of(teacher, piece), self.targets[tokens][piece]
            del teacher


def has_kernel(device: torch.device) -> bool:
    """Return whether there is Triton for a device; it comes with torch for GPUs."""
    return device.type == "cuda" and find_spec("triton") is not None


def _kernel(cost: TokenLoss, logits: Tensor, teacher: Tensor | TopKTeacher | None) -> ToGradient | None:
    if not has_kernel(logits.device):
        return None
    from srd_lightning.losses.triton import choice

    return choice.way(cost, logits, teacher)


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
        for tokens in slices(len(hidden), work.chunk):
            logits = torch.nn.functional.linear(hidden[tokens], head.weight, head.bias)
            costs = []
            for way, cost, piece, teacher, targets in work.pieces(logits, tokens.start):
                costs.append(way(cost, piece, teacher, targets))  # overwrites the logits
                del piece, teacher  # which would be held while there are the next
            sums += torch.stack(costs).sum(0)
            if grad_hidden is not None:
                torch.mm(logits, head.weight, out=grad_hidden[tokens])
            if ctx.needs_input_grad[1]:
                grad_weight = _add_product(grad_weight, logits, hidden[tokens], wide)
            if ctx.needs_input_grad[2]:
                part = logits.sum(0, dtype=wide)
                grad_bias = part if grad_bias is None else grad_bias + part
        if len(hidden) == 0:
            grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
            grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        ctx.gradients = [grad_hidden, grad_weight, grad_bias]
        ctx.dtypes = [None if leaf is None else leaf.dtype for leaf in (hidden, weight, bias)]
        ce, kd = sums.unbind()
        ctx.mark_non_differentiable(ce, kd)
        return (1 - work.cost.kd_weight) * ce + work.cost.kd_weight * kd, ce, kd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the chunked objective makes its gradients once, and cannot be differentiated twice")
        gradients, ctx.gradients = ctx.gradients, None
        pairs = zip(gradients, ctx.dtypes, strict=True)
        return (
            *(None if gradient is None else _multiplied(gradient, dtype, grad_loss) for gradient, dtype in pairs),
            None,
        )


def _add_product(total: Tensor | None, gradient: Tensor, hidden: Tensor, wide: torch.dtype) -> Tensor:
    """Add ``gradientᵀ hidden`` to a total that may be wider than they are."""
    if hidden.dtype != wide and _adds_to_fp32(hidden.device, hidden.dtype):
        if total is None:
            return torch.mm(gradient.T, hidden, out_dtype=wide)
        return torch.addmm(total, gradient.T, hidden, out_dtype=wide, out=total)
    if total is None:
        return (gradient.T @ hidden).to(wide)
    return total.addmm_(gradient.T, hidden) if hidden.dtype == wide else total.add_(gradient.T @ hidden)


@functools.cache
def _adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products of half precision can be added to fp32 in one go, as newer versions can on GPUs."""
    total, ones = torch.ones(8, 8, device=device), torch.ones(8, 8, device=device, dtype=dtype)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 9).all())


def _multiplied(gradient: Tensor, dtype: torch.dtype, factor: Tensor) -> Tensor:
    """Return a gradient times a factor in the type of its parameter, rounded once."""
    if gradient.dtype == dtype or gradient.device.type == "cpu":
        return gradient.mul_(factor).to(dtype)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
