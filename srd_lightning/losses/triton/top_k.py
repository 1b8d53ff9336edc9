"""The same as `token_loss.to_gradient` where a teacher's likeliest tokens are known, in two kernels of Triton.

All other tokens are one, whose mass is split as the student splits it: so value and gradient are those of k + 1 tokens,
made by operations of torch. What has the size of the vocabulary is the student's row alone: it is read for what the
others sum up to, read again, and overwritten. No logits of the teacher are made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from srd_lightning.losses.base import FLOOR
from srd_lightning.losses.token_loss import TokenLoss
from srd_lightning.losses.top_k import TopKTeacher
from srd_lightning.losses.triton.kernel import LOWEST, add_exp, exp, shape_of_block, student_logits


@triton.jit
def sum_up(
    students: tl.tensor,
    plain: tl.tensor,
    tempered: tl.tensor,
    stride: tl.tensor,
    vocabulary: tl.tensor,
    scale: tl.tensor,
    inverse_temperature: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Write log-sum-exp of a token's logits, as they are and at the temperature."""
    token, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    row, so_far = students + token * stride, tl.full((), LOWEST, tl.float32)
    plain_sum, tempered_sum = tl.zeros((block,), tl.float32), tl.zeros((block,), tl.float32)
    for first in range(0, vocabulary, block):
        at = first + lanes
        logits = student_logits(row, at, at < vocabulary, scale, scale, False)
        top = tl.maximum(so_far, tl.max(logits, 0))
        plain_sum = add_exp(plain_sum, so_far, top, logits, 1.0)
        tempered_sum = add_exp(tempered_sum, so_far, top, logits, inverse_temperature)
        so_far = top
    tl.store(plain + token, so_far + tl.log(tl.sum(plain_sum, 0)))
    tl.store(tempered + token, so_far * inverse_temperature + tl.log(tl.sum(tempered_sum, 0)))


@triton.jit
def overwrite(
    students: tl.tensor,
    targets: tl.tensor,
    plain: tl.tensor,
    tempered: tl.tensor,
    weights: tl.tensor,
    stride: tl.tensor,
    vocabulary: tl.tensor,
    scale: tl.tensor,
    inverse_temperature: tl.tensor,
    ce_weight: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Write the gradient: that of CE, and what that of all others together is, split as the student does."""
    token, lanes = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    row, target = students + token * stride, tl.load(targets + token).to(tl.int32)
    plain_sum, tempered_sum = tl.load(plain + token), tl.load(tempered + token)
    weight = tl.load(weights + token)
    for first in range(0, vocabulary, block):
        at = first + lanes
        logits = tl.load(row + at, mask=at < vocabulary, other=0.0).to(tl.float32) * scale
        gradient = ce_weight * (exp(logits - plain_sum) - tl.where(at == target, 1.0, 0.0))
        gradient += weight * exp(logits * inverse_temperature - tempered_sum)
        tl.store(row + at, (gradient * scale).to(students.dtype.element_ty), mask=at < vocabulary)


def to_gradient(cost: TokenLoss, logits: Tensor, teacher: TopKTeacher, targets: Tensor) -> Tensor:
    """See `token_loss.to_gradient`; only where `choice.way` says so."""
    temperature, scale, ids = cost.loss.temperature, float(cost.scale), teacher.ids
    ce_weight = 1.0 - cost.kd_weight
    of_target = logits.gather(1, targets[:, None]).float()[:, 0] * scale
    best = logits.gather(1, ids).float() * scale
    logits.scatter_(1, ids, -torch.inf)  # now only the others have mass
    plain, tempered = torch.empty(2, len(logits), device=logits.device)
    sizes, shape = (logits.stride(0), logits.shape[1]), shape_of_block(logits.shape[1])
    with torch.cuda.device_of(logits):
        sum_up[(len(logits),)](logits, plain, tempered, *sizes, scale, 1 / temperature, **shape)
        # none of the others may have any: then their gradient is 0, not NaN
        tempered = tempered.clamp_(min=LOWEST.value)
        log_q = torch.cat([best / temperature, tempered[:, None]], 1).log_softmax(-1).clamp_(min=FLOOR)
        log_p = teacher.and_others(temperature).clamp_(min=FLOOR)
        values, gradient = cost.loss.value_and_gradient(log_p, log_q)
        gradient = gradient * cost.divergence_weight
        plain = torch.logaddexp(plain, best.logsumexp(-1))
        overwrite[(len(logits),)](
            logits,
            targets,
            plain,
            tempered,
            gradient[:, -1].contiguous(),
            *sizes,
            scale,
            1 / temperature,
            ce_weight,
            **shape,
        )
    of_ce = (best - plain[:, None]).exp() - (ids == targets[:, None]).float()
    logits.scatter_(1, ids, ((gradient[:, :-1] + ce_weight * of_ce) * scale).to(logits.dtype))
    ce = (plain - of_target).sum() if ce_weight > 0 else plain.new_zeros(())
    return torch.stack([ce, values.sum() * cost.loss.scale])
