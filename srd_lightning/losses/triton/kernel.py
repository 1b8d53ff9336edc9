"""The same as `token_loss.to_gradient` in one kernel of Triton, for GPUs and divergences that are sums of q f(p / q).

A program takes a token. It reads the rows of student and teacher for their normalisers, again for the sum that makes
the gradient one by logits, and a last time to write the gradient in place of the student's row; nothing else of the
size of the vocabulary is read or written. The second reading goes backwards, so that it begins with what the first one
has left in the GPU's cache. What differs between divergences is one function each, right below.

Triton comes with torch for GPUs; this file is imported only there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from srd_lightning.losses.base import FLOOR, DistillationLoss
from srd_lightning.losses.standard import (
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)
from srd_lightning.losses.token_loss import TokenLoss

LEAST, LARGEST_BLOCK, PER_THREAD = tl.constexpr(FLOOR), 4096, 8
LOWEST, TINY = tl.constexpr(-3.0e38), tl.constexpr(1.2e-38)
LOG2_E, LN_2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))


# Of a token's log-probabilities log p (teacher) and log q (student), and the share of one in a mixture: its term of the
# value, and q h with h = dD / dq up to a constant, so that the gradient is q h - q sum(q h). See `divergences`.


@triton.jit
def forward_kl(log_p: tl.tensor, log_q: tl.tensor, share: tl.tensor) -> tl.tensor:
    """D = sum p log (p / q); q h = -p, whose sum is known: -1."""
    p = exp(log_p)
    return p * (log_p - log_q), -p


@triton.jit
def reverse_kl(log_p: tl.tensor, log_q: tl.tensor, share: tl.tensor) -> tl.tensor:
    """D = sum q log (q / p); h = log (q / p)."""
    term = exp(log_q) * (log_q - log_p)
    return term, term


@triton.jit
def jensen_shannon(log_p: tl.tensor, log_q: tl.tensor, share: tl.tensor) -> tl.tensor:
    """D = b KL(p, m) + (1 - b) KL(q, m) with m = b p + (1 - b) q; h = (1 - b) log (q / m)."""
    p, q = exp(log_p), exp(log_q)
    log_m = _log(share * p + (1 - share) * q)
    of_student = (1 - share) * q * (log_q - log_m)
    return share * p * (log_p - log_m) + of_student, of_student


@triton.jit
def total_variation(log_p: tl.tensor, log_q: tl.tensor, share: tl.tensor) -> tl.tensor:
    """D = sum |p - q| / 2; h = sign(q - p) / 2."""
    p, q = exp(log_p), exp(log_q)
    half = tl.where(q > p, 0.5, tl.where(q < p, -0.5, 0.0))
    return half * (q - p), half * q


@triton.jit
def skew_forward_kl(log_p: tl.tensor, log_q: tl.tensor, share: tl.tensor) -> tl.tensor:
    """D = sum p log (p / m) with m = a p + (1 - a) q; h = -(1 - a) p / m."""
    p = exp(log_p)
    log_m = _log(share * p + (1 - share) * exp(log_q))
    return p * (log_p - log_m), (share - 1) * exp(log_p + log_q - log_m)


@triton.jit
def skew_reverse_kl(log_p: tl.tensor, log_q: tl.tensor, share: tl.tensor) -> tl.tensor:
    """D = sum q log (q / m) with m = (1 - a) p + a q; h = log (q / m) - a q / m."""
    q = exp(log_q)
    ratio = log_q - _log((1 - share) * exp(log_p) + share * q)
    return q * ratio, q * (ratio - share * exp(ratio))


@triton.jit
def exp(x: tl.tensor) -> tl.tensor:
    """One instruction, once it is multiplied; that of the natural exponential takes five."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _log(x: tl.tensor) -> tl.tensor:
    return tl.log2(_at_least(x, TINY)) * LN_2  # both probabilities of a mixture may underflow


@triton.jit
def _at_least(x: tl.tensor, bound: tl.constexpr) -> tl.tensor:
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


def terms_of(loss: DistillationLoss) -> tuple[Any, float] | None:
    """Return a divergence's function and share, or nothing for a loss of one's own, also one that is derived."""
    if type(loss) not in (ForwardKL, ReverseKL, JensenShannon, TotalVariation, SkewForwardKL, SkewReverseKL):
        return None
    match loss:
        case ForwardKL() | SkewForwardKL(alpha=0):
            return forward_kl, 0.0
        case ReverseKL() | SkewReverseKL(alpha=0):
            return reverse_kl, 0.0
        case JensenShannon(beta=share):
            return jensen_shannon, share
        case SkewForwardKL(alpha=share):
            return skew_forward_kl, share
        case SkewReverseKL(alpha=share):
            return skew_reverse_kl, share
    return total_variation, 0.0


@triton.jit
def add_exp(total: tl.tensor, so_far: tl.tensor, top: tl.tensor, logits: tl.tensor, power: tl.tensor) -> tl.tensor:
    """Add exponentials to a total from which the largest logit so far was taken out; from now on it is ``top``."""
    return total * exp((so_far - top) * power) + exp((logits - top) * power)


@triton.jit
def student_logits(
    row: tl.tensor, at: tl.tensor, inside: tl.tensor, scale: tl.tensor, cap: tl.tensor, capped: tl.constexpr
) -> tl.tensor:
    """Logits of some tokens, scaled and capped; -inf behind the last."""
    logits = _head(tl.load(row + at, mask=inside, other=0.0), scale, cap, capped)
    return tl.where(inside, logits, -float("inf"))


@triton.jit
def _head(product: tl.tensor, scale: tl.tensor, cap: tl.tensor, capped: tl.constexpr) -> tl.tensor:
    logits = product.to(tl.float32) * scale
    if capped:
        logits = cap * (2 * tl.sigmoid(2 * logits / cap) - 1)  # a tanh
    return logits


@triton.jit
def _teacher(row: tl.tensor, at: tl.tensor, inside: tl.tensor) -> tl.tensor:
    return tl.load(row + at, mask=inside, other=-float("inf")).to(tl.float32)


@triton.jit
def _log_probability(logits: tl.tensor, inverse_temperature: tl.tensor, normaliser: tl.tensor) -> tl.tensor:
    """As `losses.log_probabilities`: at least `FLOOR`, and NaN where it is."""
    return _at_least(logits * inverse_temperature - normaliser, LEAST)


@triton.jit
def one_token(
    students: tl.tensor,
    teachers: tl.tensor,
    targets: tl.tensor,
    values: tl.tensor,
    student_stride: tl.tensor,
    teacher_stride: tl.tensor,
    vocabulary: tl.tensor,
    scale: tl.tensor,
    cap: tl.tensor,
    inverse_temperature: tl.tensor,
    ce_weight: tl.tensor,
    kd_weight: tl.tensor,
    value_scale: tl.tensor,
    share: tl.tensor,
    terms: tl.constexpr,
    needs_sum: tl.constexpr,
    capped: tl.constexpr,
    taught: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Turn the logits of a token into their gradient; keep its CE and its divergence."""
    token = tl.program_id(0).to(tl.int64)
    student, teacher = students + token * student_stride, teachers + token * teacher_stride
    blocks, lanes = tl.cdiv(vocabulary, block), tl.arange(0, block)
    target = tl.load(targets + token)
    known = (target >= 0) & (target < vocabulary)
    of_target = _head(tl.load(student + target, mask=known, other=float("nan")), scale, cap, capped)

    # the first reading: normalisers, with the largest logit so far taken out
    student_top, teacher_top = tl.full((), LOWEST, tl.float32), tl.full((), LOWEST, tl.float32)
    plain, student_sum = tl.zeros((block,), tl.float32), tl.zeros((block,), tl.float32)
    teacher_sum = tl.zeros((block,), tl.float32)
    for number in range(blocks):
        at = number * block + lanes
        logits = student_logits(student, at, at < vocabulary, scale, cap, capped)
        top = tl.maximum(student_top, tl.max(logits, 0))
        plain = add_exp(plain, student_top, top, logits, 1.0)
        student_sum = add_exp(student_sum, student_top, top, logits, inverse_temperature)
        student_top = top
        if taught:
            logits = _teacher(teacher, at, at < vocabulary)
            top = tl.maximum(teacher_top, tl.max(logits, 0))
            teacher_sum = add_exp(teacher_sum, teacher_top, top, logits, inverse_temperature)
            teacher_top = top
    plain_normaliser = student_top + tl.log(tl.sum(plain, 0))
    student_normaliser = student_top * inverse_temperature + tl.log(tl.sum(student_sum, 0))
    teacher_normaliser = teacher_top * inverse_temperature + tl.log(tl.sum(teacher_sum, 0))

    # the second: the sum of q h
    centre = tl.full((), -1.0, tl.float32)
    if needs_sum:
        weighted_sum = tl.zeros((block,), tl.float32)
        for number in range(blocks):
            at = (blocks - 1 - number) * block + lanes
            logits = student_logits(student, at, at < vocabulary, scale, cap, capped)
            log_q = _log_probability(logits, inverse_temperature, student_normaliser)
            log_p = _log_probability(_teacher(teacher, at, at < vocabulary), inverse_temperature, teacher_normaliser)
            _, weighted = terms(log_p, log_q, share)
            weighted_sum += weighted
        centre = tl.sum(weighted_sum, 0)

    # the last: the gradient in place of the logits
    value = tl.zeros((block,), tl.float32)
    for number in range(blocks):
        at = number * block + lanes
        logits = student_logits(student, at, at < vocabulary, scale, cap, capped)
        gradient = ce_weight * (exp(logits - plain_normaliser) - tl.where(at == target.to(tl.int32), 1.0, 0.0))
        if taught:
            log_q = _log_probability(logits, inverse_temperature, student_normaliser)
            log_p = _log_probability(_teacher(teacher, at, at < vocabulary), inverse_temperature, teacher_normaliser)
            term, weighted = terms(log_p, log_q, share)
            value += term
            gradient += kd_weight * (weighted - exp(log_q) * centre)
        if capped:
            gradient *= 1 - (logits / cap) * (logits / cap)
        tl.store(student + at, (gradient * scale).to(students.dtype.element_ty), mask=at < vocabulary)
    tl.store(values + token, tl.where(ce_weight > 0, plain_normaliser - of_target, 0.0))
    tl.store(values + tl.num_programs(0) + token, tl.sum(value, 0) * value_scale)


def to_gradient(cost: TokenLoss, logits: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
    """See `token_loss.to_gradient`; only where `choice.way` says so."""
    terms, share = terms_of(cost.loss) or (None, 0.0)
    values = torch.empty(2, len(logits), device=logits.device)
    other = logits if teacher is None else teacher
    cap = math.inf if cost.soft_cap is None else cost.soft_cap
    weights = 1 - cost.kd_weight, cost.divergence_weight
    numbers = cost.scale, cap, 1 / cost.loss.temperature, *weights, cost.loss.scale, share
    with torch.cuda.device_of(logits):
        one_token[(len(logits),)](
            logits,
            other,
            targets,
            values,
            logits.stride(0),
            other.stride(0),
            logits.shape[1],
            *map(float, numbers),
            terms=terms,
            needs_sum=teacher is not None and terms is not forward_kl,
            capped=cost.soft_cap is not None,
            taught=teacher is not None,
            **shape_of_block(logits.shape[1]),
        )
    return values.sum(1)


def shape_of_block(vocabulary: int) -> dict[str, int]:
    """Return how many logits a program has in hand, and the warps that share them."""
    block = max(128, min(LARGEST_BLOCK, triton.next_power_of_2(vocabulary)))
    return {"block": block, "num_warps": max(1, block // (32 * PER_THREAD))}
