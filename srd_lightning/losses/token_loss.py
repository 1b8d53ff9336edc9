"""What the logits of some tokens cost, and the gradient by them that takes their place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from srd_lightning.losses.base import FLOOR, DistillationLoss, log_probabilities, upcast
from srd_lightning.losses.checks import check_gradient
from srd_lightning.losses.top_k import TopKTeacher


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


def to_gradient(
    cost: TokenLoss,
    logits: Tensor,
    teacher: Tensor | TopKTeacher | None,
    targets: Tensor,
    gradients: Tensor | None = None,
) -> Tensor:
    """Overwrite the products of a head with the gradient by them.

    Args:
        cost: What is minimised.
        logits: Before they are scaled and capped, ``[n, V]``.
        teacher: Its logits, ``[n, V]``, its likeliest tokens, or nothing where w is 0.
        targets: The tokens of the response, ``[n]``.
        gradients: Where the gradient goes instead, ``[n, V]``.

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
    weight, cap = cost.kd_weight, cost.soft_cap
    student = upcast(logits)
    if cost.scale != 1:
        student = student * cost.scale
    if cap is not None:
        student = cap * torch.tanh(student / cap)
    ce = kd = student.new_zeros(())
    own = gradient = None
    if weight < 1:
        own = student.log_softmax(-1)
        ce = -own.gather(1, targets[:, None]).sum()
    if teacher is not None:
        loss = cost.loss
        shared = own is not None and cost.temperatures is None and loss.temperature == 1
        logp = own.clamp_(min=FLOOR) if own is not None and shared else log_probabilities(student, cost.temperature)
        teacher_logp = teacher_log_probabilities(teacher, cost.temperature, logp)
        values, gradient = loss.value_and_gradient(teacher_logp, logp)
        check_gradient(loss, values, gradient, logp)
        kd = upcast(values).sum() * loss.scale if cost.weights is None else (upcast(values) * cost.value_weight).sum()
        gradient = gradient.mul_(cost.divergence_weight)
    if own is not None:
        part = own.exp_()
        part.scatter_add_(1, targets[:, None], part.new_full((len(targets), 1), -1.0))
        gradient = part.mul_(1 - weight) if gradient is None else gradient.add_(part, alpha=1 - weight)
    assert gradient is not None, "without a teacher kd_weight must be below 1"
    if cap is not None:
        gradient = gradient * (1 - (student / cap) ** 2)
    place = logits if gradients is None else gradients
    place.copy_(gradient if cost.scale == 1 else gradient * cost.scale)
    return torch.stack([ce, kd])
