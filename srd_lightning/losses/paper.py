"""The six losses to the letter of the paper's code (arXiv 2508.06135), for who wants its numbers.

T² multiplies forward KL, JSD and skew reverse KL, and not the other three. Forward KL and skew forward KL leave out the
teacher's entropy, so their values are cross-entropies; the gradient is the same. Mixtures have the authors' shares.
"""

from __future__ import annotations

from torch import Tensor

from srd_lightning.losses.standard import (
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
)


class PaperForwardKL(ForwardKL):
    r"""The authors' ``tfkl``: :math:`-T^2 \sum_v p \log q`."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__(temperature)

    def divergence(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        """See `DistillationLoss.divergence`."""
        return _cross_entropy(teacher_logp, student_logp)

    def value_and_gradient(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        """See `DistillationLoss.value_and_gradient`."""
        value, gradient = ForwardKL.value_and_gradient(self, teacher_logp, student_logp)
        return value + _cross_entropy(teacher_logp, teacher_logp), gradient


class PaperReverseKL(ReverseKL):
    r"""The authors' ``trkl``: :math:`\sum_v q \log (q / p)`, without T²."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__(temperature, scale_by_temperature=False)


class PaperJensenShannon(JensenShannon):
    r"""The authors' ``tjsd``: T² times the divergence with a tenth of the teacher in the mixture (their λ is 0.9)."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__(0.1, temperature)


class PaperTotalVariation(TotalVariation):
    r"""The authors' ``ttvd``: :math:`\frac12 \sum_v |p - q|`, without T²."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__(temperature, scale_by_temperature=False)


class PaperSkewForwardKL(SkewForwardKL):
    r"""The authors' ``tsfkl``: :math:`-\sum_v p \log (0.1 \, p + 0.9 \, q)`, without T²."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__(0.1, temperature, scale_by_temperature=False)

    def divergence(self, teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
        """See `DistillationLoss.divergence`."""
        return super().divergence(teacher_logp, student_logp) + _cross_entropy(teacher_logp, teacher_logp)

    def value_and_gradient(self, teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
        """See `DistillationLoss.value_and_gradient`."""
        value, gradient = SkewForwardKL.value_and_gradient(self, teacher_logp, student_logp)
        return value + _cross_entropy(teacher_logp, teacher_logp), gradient


class PaperSkewReverseKL(SkewReverseKL):
    r"""The authors' ``tsrkl``: T² times :math:`\sum_v q \log (q / (0.9 \, p + 0.1 \, q))`."""

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__(0.1, temperature)


def _cross_entropy(teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
    return -(teacher_logp.exp() * student_logp).sum(-1)
