"""Which kernel takes the place of `token_loss.to_gradient`, if one does: it is tried before it is believed.

Triton comes with torch for GPUs; this file, and the kernels, are imported only where it is there.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from srd_lightning.losses import token_loss
from srd_lightning.losses.base import DistillationLoss
from srd_lightning.losses.token_loss import TokenLoss
from srd_lightning.losses.top_k import POWERS, TopKTeacher
from srd_lightning.losses.triton import kernel, top_k

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def way(cost: TokenLoss, logits: Tensor, teacher: Tensor | TopKTeacher | None) -> Callable[..., Tensor] | None:
    """Return the kernel for some logits, or nothing where operations of torch must do.

    Args:
        cost: What is minimised.
        logits: Of the student, ``[n, V]``.
        teacher: As in `token_loss.to_gradient`.
    """
    if kernel.terms_of(cost.loss) is None or logits.dtype not in DTYPES:
        return None
    of_teacher: torch.dtype | int | None
    if isinstance(teacher, TopKTeacher):
        fits, of_teacher = cost.soft_cap is None, teacher.ids.shape[1]
    elif teacher is not None:
        fits = teacher.shape == logits.shape and teacher.dtype in DTYPES and teacher.stride(1) == 1
        of_teacher = teacher.dtype
    else:
        fits, of_teacher = True, None
    make_loss: Callable[..., DistillationLoss] = type(cost.loss)
    shares = tuple((name, getattr(cost.loss, name)) for name in ("alpha", "beta") if hasattr(cost.loss, name))
    head = cost.scale, cost.soft_cap
    return _tried(make_loss, shares, logits.dtype, of_teacher, logits.shape[1], head, logits.device) if fits else None


@functools.cache
def _tried(
    make_loss: Callable[..., DistillationLoss],
    shares: tuple[tuple[str, float], ...],
    dtype: torch.dtype,
    of_teacher: torch.dtype | int | None,
    vocabulary: int,
    head: tuple[float, float | None],
    device: torch.device,
) -> Callable[..., Tensor] | None:
    """Try a kernel on three random tokens, given the type of a teacher's logits or the number of its likeliest."""
    generator = torch.Generator(device).manual_seed(0)
    logits, teacher = 3 * torch.randn(2, 3, vocabulary, generator=generator, device=device)
    found, expected = logits.to(dtype, copy=True), logits.to(dtype, copy=True)
    likeliest = isinstance(of_teacher, int)
    to_gradient = top_k.to_gradient if likeliest else kernel.to_gradient
    taught: Any = (
        _likeliest(teacher, of_teacher) if isinstance(of_teacher, int) else of_teacher and teacher.to(of_teacher)
    )
    cost = TokenLoss(make_loss(temperature=1.5, **dict(shares)), 0.0 if taught is None else 0.5, *head)
    targets = torch.zeros(3, dtype=torch.int64, device=device)
    try:
        values = to_gradient(cost, found, taught, targets)
    except Exception as error:  # whatever a compiler may raise
        _warn(f"it cannot be run here ({error})")
        return None
    pairs = (values, token_loss.to_gradient(cost, expected, taught, targets)), (found.float(), expected.float())
    off = max(float((one - other).norm() / other.norm()) for one, other in pairs)
    if off < 4 * torch.finfo(dtype).eps + 1e-4:
        return to_gradient
    _warn(f"it is off by {off:.1e}")
    return None


def _likeliest(logits: Tensor, k: int) -> TopKTeacher:
    """Return what a cache would keep of a teacher's logits."""
    logp, ids = logits.log_softmax(-1).sort(descending=True)
    return TopKTeacher(
        logp[:, :k], ids[:, :k], torch.stack([(power * logp[:, k:]).logsumexp(-1) for power in POWERS], 1)
    )


def _warn(why: str) -> None:
    warnings.warn(
        f"the objective is made without its Triton kernel, which takes more time and memory: {why}", stacklevel=2
    )
