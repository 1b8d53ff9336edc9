"""What the logits of some tokens cost, and the gradient by them that takes their place."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srd_lightning.losses.base import FLOOR, DistillationLoss, log_probabilities, upcast
from srd_lightning.losses.checks import check_gradient
from srd_lightning.losses.top_k import TopKTeacher, spread


@dataclass(frozen=True)
class TokenLoss:
    """(1 - w) CE + w T² D of logits that are scaled and capped.

    Args:
        loss: The distillation loss.
        kd_weight: w; a part that has no weight is not computed.
        scale: Multiplies the product of the head.
        soft_cap: Bounds what comes of that.
        weights: Of the divergence of each token, ``[n]``, where they differ.
        temperatures: Of each token, ``[n]``, where they differ.
    """

    loss: DistillationLoss
    kd_weight: float
    scale: float = 1.0
    soft_cap: float | None = None
    weights: Tensor | None = None
    temperatures: Tensor | None = None

    def of(self, tokens: slice) -> TokenLoss:
        """Return the cost of some of the tokens."""
        if self.weights is None:
            return self
        temperatures = None if self.temperatures is None else self.temperatures[tokens]
        return replace(self, weights=self.weights[tokens], temperatures=temperatures)

    @property
    def temperature(self) -> float | Tensor:
        """What logits are divided by: a number, or ``[n, 1]``."""
        return self.loss.temperature if self.temperatures is None else self.temperatures[:, None]

    @property
    def value_weight(self) -> Any:
        """What divergences are multiplied by: a number, or ``[n]``."""
        scale = self.loss.scale if self.temperatures is None else self.loss.scale_at(self.temperatures)
        return scale if self.weights is None else scale * self.weights

    @property
    def divergence_weight(self) -> Any:
        """What the gradient of the divergence, by logits at the temperature, is multiplied by; or ``[n, 1]``."""
        weight = self.kd_weight * self.value_weight
        return (weight if self.weights is None else weight[:, None]) / self.temperature


def teacher_log_probabilities(
    teacher: Tensor | TopKTeacher, temperature: float | Tensor, student_logp: Tensor
) -> Tensor:
    """Return log-probabilities at a temperature, ``[n, V]``, of a teacher's logits or its likeliest tokens."""
    if isinstance(teacher, TopKTeacher):
        assert not isinstance(temperature, Tensor), "refused before training"
        return teacher.at(temperature, student_logp)
    return log_probabilities(teacher, temperature)


class Numbers(NamedTuple):
    """The numbers of a `TokenLoss`, as tensors: what was compiled with them holds for others as well.

    Args:
        temperature: ``[]``, or of each token, ``[n, 1]``; nothing where it is 1, and that is made use of.
        ce: 1 - w, ``[]``; nothing where w is 1, and CE is not computed.
        kd: What divergences are multiplied by, ``[]`` or ``[n]``.
        gradient: What their gradient, by logits at the temperature, is multiplied by, ``[]`` or ``[n, 1]``.
    """

    temperature: Tensor | None
    ce: Tensor | None
    kd: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, cost: TokenLoss, logits: Tensor, any_temperature: bool = False) -> Numbers:
        """Return those of a cost, for logits; a temperature of 1 like any other, if it is to be."""
        dtype, loss = torch.float64 if logits.dtype == torch.float64 else torch.float32, cost.loss
        weights = (1.0, 1.0) if cost.weights is not None else (cost.value_weight, cost.divergence_weight)
        numbers = loss.temperature, 1 - cost.kd_weight, *weights
        temperature, ce, kd, gradient = _tensors(numbers, dtype, logits.device)
        if cost.weights is not None:
            kd, gradient = cost.value_weight, cost.divergence_weight
        if cost.temperatures is not None:
            temperature, any_temperature = cost.temperatures[:, None], True
        return cls(
            temperature if any_temperature or loss.temperature != 1 else None,
            ce if cost.kd_weight < 1 else None,
            kd,
            gradient,
        )


@functools.lru_cache
def _tensors(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return numbers as tensors, each one of its own: what is compiled for one that stands twice holds for no two."""
    return [torch.full((), number, dtype=dtype, device=device) for number in numbers]


class Likeliest(NamedTuple):
    """What a teacher's likeliest tokens say at a temperature, see `spread`."""

    known: Tensor
    ids: Tensor


def to_gradient(cost: TokenLoss, logits: Tensor, teacher: Tensor | TopKTeacher | None, targets: Tensor) -> Tensor:
    """Overwrite the products of a head with the gradient by them.

    Args:
        cost: What is minimised.
        logits: Before they are scaled and capped, ``[n, V]``.
        teacher: Its logits, ``[n, V]``, its likeliest tokens, or nothing where w is 0.
        targets: The tokens of the response, ``[n]``.

    Returns:
        The sums over tokens of CE and of T² D, ``[2]``, at least fp32.

    Example:
        >>> from srd_lightning import ForwardKL
        >>> logits, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, -1.0]])
        >>> to_gradient(TokenLoss(ForwardKL(), kd_weight=1.0), logits, teacher, torch.tensor([0]))
        tensor([0.0000, 0.3278])
        >>> logits
        tensor([[-0.3808,  0.3808]])
    """
    sums, gradient = _value_and_gradient(*_parts(cost, Numbers.of(cost, logits), logits, teacher, targets))
    logits.copy_(gradient)
    return sums


@functools.cache
def compiled() -> Callable[[TokenLoss, Tensor, Tensor | TopKTeacher | None, Tensor], Tensor]:
    """Return `to_gradient`, compiled: once for a loss, whatever its temperature, its share below 1, its own numbers."""
    in_one = torch.compile(_rounded)

    def way(cost: TokenLoss, logits: Tensor, teacher: Tensor | TopKTeacher | None, targets: Tensor) -> Tensor:
        numbers = Numbers.of(cost, logits, any_temperature=True)
        cost = replace(cost, loss=with_tensors(cost.loss, numbers.kd))
        sums, gradient = in_one(*_parts(cost, numbers, logits, teacher, targets))
        logits.copy_(gradient)  # in place, the compiler of torch 2.9 reads logits after they are written
        return sums

    return way


def with_tensors(loss: DistillationLoss, like: Tensor) -> DistillationLoss:
    """Return a copy of a loss whose `numbers`, also of losses inside, are tensors of the type and on the device of one.

    Example:
        >>> from srd_lightning import SkewForwardKL
        >>> with_tensors(SkewForwardKL(alpha=0.25), torch.zeros(())).alpha
        tensor(0.2500)
    """
    made = copy.deepcopy(loss, {id(kept): kept for kept in loss.buffers()})
    owners = [(part, name) for part in made.modules() for name in getattr(part, "numbers", ())]
    values = _tensors(tuple(getattr(part, name) for part, name in owners), like.dtype, like.device)
    for (part, name), value in zip(owners, values, strict=True):
        vars(part)[f"_{name}"] = value
    return made


def _parts(
    cost: TokenLoss, numbers: Numbers, logits: Tensor, teacher: Tensor | TopKTeacher | None, targets: Tensor
) -> tuple[DistillationLoss, float, float | None, Numbers, Tensor, Tensor | Likeliest | None, Tensor]:
    """Return what is computed with: numbers that may change from step to step are in tensors."""
    taught: Tensor | Likeliest | None
    if isinstance(teacher, TopKTeacher):
        assert cost.temperatures is None, "refused before training"
        taught = Likeliest(teacher.and_others(cost.loss.temperature), teacher.ids)
    else:
        taught = teacher
    return cost.loss, cost.scale, cost.soft_cap, numbers, logits, taught, targets


def _rounded(
    loss: DistillationLoss,
    scale: float,
    cap: float | None,
    numbers: Numbers,
    logits: Tensor,
    teacher: Tensor | Likeliest | None,
    targets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradient in the type of the logits."""
    sums, gradient = _value_and_gradient(loss, scale, cap, numbers, logits, teacher, targets)
    return sums, gradient.to(logits.dtype)


def _value_and_gradient(
    loss: DistillationLoss,
    scale: float,
    cap: float | None,
    numbers: Numbers,
    logits: Tensor,
    teacher: Tensor | Likeliest | None,
    targets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return sums over tokens as `to_gradient` does, and the gradient, ``[n, V]``, at least fp32."""
    student = upcast(logits)
    if scale != 1:
        student = student * scale
    if cap is not None:
        student = cap * torch.tanh(student / cap)
    ce = kd = student.new_zeros(())
    own = gradient = None
    if numbers.ce is not None:
        own = student.log_softmax(-1)
        ce = -own.gather(1, targets[:, None]).sum()
    if teacher is not None:
        temperature = 1.0 if numbers.temperature is None else numbers.temperature
        shared = own is not None and numbers.temperature is None
        logp = own.clamp_(min=FLOOR) if own is not None and shared else log_probabilities(student, temperature)
        if isinstance(teacher, Likeliest):
            teacher_logp = spread(teacher.known, teacher.ids, logp)
        else:
            teacher_logp = log_probabilities(teacher, temperature)
        values, gradient = loss.value_and_gradient(teacher_logp, logp)
        check_gradient(loss, values, gradient, logp)
        kd = (upcast(values) * numbers.kd).sum()
        gradient = gradient.mul_(numbers.gradient)
    if own is not None and numbers.ce is not None:
        part = own.exp_()
        part.scatter_add_(1, targets[:, None], part.new_full((len(targets), 1), -1.0))
        gradient = part.mul_(numbers.ce) if gradient is None else gradient.addcmul_(part, numbers.ce)
    assert gradient is not None, "without a teacher kd_weight must be below 1"
    if cap is not None:
        gradient = gradient * (1 - (student / cap) ** 2)
    return torch.stack([ce, kd]), gradient if scale == 1 else gradient * scale
