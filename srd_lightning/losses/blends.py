"""Divergences beside the six of the paper: the α-β divergence, and a KL that is weighted between both directions."""

from __future__ import annotations

import math

from torch import Tensor

from srd_lightning.errors import SettingError
from srd_lightning.losses import divergences
from srd_lightning.losses.base import IGNORE_INDEX, DistillationLoss
from srd_lightning.losses.checks import share


class AlphaBeta(DistillationLoss):
    """The α-β divergence of ABKD (Wang et al., ICML 2025, arXiv 2505.04560); see `divergences.alpha_beta`.

    (1, 0) is the forward KL and (0, 1) the reverse KL. The gradient says what each does: beta is how much the student's
    confidence weighs, alpha whether absolute errors count (1) or relative ones (0).

    Args:
        alpha: Power of the teacher's probabilities, at least 0; the authors use 0.2 for instructions.
        beta: Power of the student's, at least 0; the authors use 0.7. Negative powers, and 0 of both, are infinite
            where one model finds a token impossible, and are refused.
        temperature: As in `DistillationLoss`.
        scale_by_temperature: As in `DistillationLoss`.
        ignore_index: As in `DistillationLoss`.

    Raises:
        SettingError: One is negative, or both are 0.
    """

    alpha: float = share("alpha", lambda a: 0 <= a < math.inf, "at 0 or above")
    beta: float = share("beta", lambda b: 0 <= b < math.inf, "at 0 or above")

    def __init__(
        self,
        alpha: float = 0.2,
        beta: float = 0.7,
        temperature: float = 1.0,
        scale_by_temperature: bool = True,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__(temperature, scale_by_temperature, ignore_index)
        self.alpha, self.beta = alpha, beta
        self._powers()

    def _powers(self) -> tuple[float, float]:
        if self.alpha == self.beta == 0:
            raise SettingError("alpha and beta must not both be 0, where the divergence is infinite; raise one of them")
        return self.alpha, self.beta

    def divergence(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        """See `DistillationLoss.divergence`."""
        return divergences.alpha_beta(teacher_logp, student_logp, *self._powers())

    def value_and_gradient(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        """See `DistillationLoss.value_and_gradient`."""
        return divergences.alpha_beta_gradient(teacher_logp, student_logp, *self._powers())


class AdaptiveKL(DistillationLoss):
    """Forward and reverse KL, weighted token by token (AKL: Wu et al., COLING 2025); see `divergences.adaptive_kl`.

    Args:
        head: Most probability of the head of the teacher's distribution, in (0, 1); the authors' μ is 0.5.
        temperature: As in `DistillationLoss`.
        scale_by_temperature: As in `DistillationLoss`.
        ignore_index: As in `DistillationLoss`.
    """

    head: float = share("head", lambda h: 0 < h < 1, "between 0 and 1")

    def __init__(
        self,
        head: float = 0.5,
        temperature: float = 1.0,
        scale_by_temperature: bool = True,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__(temperature, scale_by_temperature, ignore_index)
        self.head = head

    def divergence(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        """See `DistillationLoss.divergence`."""
        return divergences.adaptive_kl(teacher_logp, student_logp, self.head)

    def value_and_gradient(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        """See `DistillationLoss.value_and_gradient`."""
        return divergences.adaptive_kl_gradient(teacher_logp, student_logp, self.head)
