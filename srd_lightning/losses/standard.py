"""The six divergences of the paper as losses."""

from __future__ import annotations

from torch import Tensor

from srd_lightning.losses import divergences
from srd_lightning.losses.base import IGNORE_INDEX, DistillationLoss
from srd_lightning.losses.checks import share


class ForwardKL(DistillationLoss):
    """KL(teacher ‖ student), the classic distillation loss; see `divergences.forward_kl`."""

    def divergence(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        return divergences.forward_kl(teacher_logp, student_logp)

    def value_and_gradient(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        return divergences.forward_kl_gradient(teacher_logp, student_logp)


class ReverseKL(DistillationLoss):
    """KL(student ‖ teacher); see `divergences.reverse_kl`."""

    def divergence(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        return divergences.reverse_kl(teacher_logp, student_logp)

    def value_and_gradient(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        return divergences.reverse_kl_gradient(teacher_logp, student_logp)


class TotalVariation(DistillationLoss):
    """Half the summed absolute difference; see `divergences.total_variation`."""

    def divergence(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        return divergences.total_variation(teacher_logp, student_logp)

    def value_and_gradient(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        return divergences.total_variation_gradient(teacher_logp, student_logp)


class JensenShannon(DistillationLoss):
    """The generalised Jensen-Shannon divergence; see `divergences.jensen_shannon`.

    Args:
        beta: Share of the teacher in the mixture, in (0, 1). The authors' code is 0.1 (their lambda 0.9 weighs the
            student).
        temperature: As in `DistillationLoss`.
        scale_by_temperature: As in `DistillationLoss`.
        ignore_index: As in `DistillationLoss`.
    """

    beta: float = share("beta", lambda b: 0 < b < 1, "between 0 and 1", "; at the ends use ReverseKL or ForwardKL")
    numbers = ("beta",)

    def __init__(
        self,
        beta: float = 0.5,
        temperature: float = 1.0,
        scale_by_temperature: bool = True,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__(temperature, scale_by_temperature, ignore_index)
        self.beta = beta

    def divergence(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        return divergences.jensen_shannon(teacher_logp, student_logp, self.beta)

    def value_and_gradient(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        return divergences.jensen_shannon_gradient(teacher_logp, student_logp, self.beta)


class _Skew(DistillationLoss):
    """A KL against a mixture.

    Args:
        alpha: Share that is mixed in, in [0, 1); the authors use 0.1.
        temperature: As in `DistillationLoss`.
        scale_by_temperature: As in `DistillationLoss`.
        ignore_index: As in `DistillationLoss`.
    """

    alpha: float = share("alpha", lambda a: 0 <= a < 1, "in [0, 1)")
    numbers = ("alpha",)

    def __init__(
        self,
        alpha: float = 0.1,
        temperature: float = 1.0,
        scale_by_temperature: bool = True,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__(temperature, scale_by_temperature, ignore_index)
        self.alpha = alpha


class SkewForwardKL(_Skew):
    """KL(teacher ‖ mixture with the student); see `divergences.skew_forward_kl`."""

    def divergence(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        return divergences.skew_forward_kl(teacher_logp, student_logp, self.alpha)

    def value_and_gradient(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        return divergences.skew_forward_kl_gradient(teacher_logp, student_logp, self.alpha)


class SkewReverseKL(_Skew):
    """KL(student ‖ mixture with the teacher); see `divergences.skew_reverse_kl`."""

    def divergence(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        return divergences.skew_reverse_kl(teacher_logp, student_logp, self.alpha)

    def value_and_gradient(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        return divergences.skew_reverse_kl_gradient(teacher_logp, student_logp, self.alpha)
