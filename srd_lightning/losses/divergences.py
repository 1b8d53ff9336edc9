r"""The divergences, each written once: log-probabilities ``[N, V]`` of teacher and student to ``[N]`` values.

Throughout, the teacher is :math:`p` and the student is :math:`q`. All are true divergences: never negative, and zero
when the two are equal. Inputs must be finite (`losses.log_probabilities` sees to that), then no term is ``0 * inf``.
Formulas: arXiv 2306.13649 (generalised JSD), 2402.03898 (skew), 2508.06135 (the set).

``…_gradient`` returns the values and, ``[N, V]``, their derivatives by the student's logits at the temperature. With
:math:`h = \partial D / \partial q` that is :math:`q (h - \sum_v q h)`; any constant in :math:`h` cancels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward_kl(teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
    r"""Return :math:`\mathrm{KL}(p \| q) = \sum_v p \log (p / q)`, ``[N]``: covers all the teacher would say.

    Example:
        >>> forward_kl(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log())
        tensor([0.5108])
    """
    return (teacher_logp.exp() * (teacher_logp - student_logp)).sum(-1)


def forward_kl_gradient(teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return `forward_kl` and its gradient, :math:`q - p`.

    Example:
        >>> forward_kl_gradient(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log())[1]
        tensor([[ 0.4000, -0.4000]])
    """
    teacher = teacher_logp.exp()
    value = (teacher_logp - student_logp).mul_(teacher).sum(-1)
    return value, student_logp.exp().sub_(teacher)


def reverse_kl(teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
    r"""Return :math:`\mathrm{KL}(q \| p) = \sum_v q \log (q / p)`, ``[N]``: keeps to what the teacher would say.

    Example:
        >>> reverse_kl(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log())
        tensor([0.3681])
    """
    return forward_kl(student_logp, teacher_logp)


def reverse_kl_gradient(teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return `reverse_kl` and its gradient: :math:`h = \log (q / p)`.

    Example:
        >>> reverse_kl_gradient(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log())[1]
        tensor([[ 0.1978, -0.1978]])
    """
    ratio = student_logp - teacher_logp
    student = student_logp.exp()
    value = (student * ratio).sum(-1)
    return value, ratio.sub_(value[:, None]).mul_(student)


def jensen_shannon(teacher_logp: Tensor, student_logp: Tensor, beta: float) -> Tensor:
    r"""Return :math:`\beta \mathrm{KL}(p \| m) + (1 - \beta) \mathrm{KL}(q \| m)`, :math:`m = \beta p + (1 - \beta) q`.

    Args:
        teacher_logp: ``[N, V]``.
        student_logp: ``[N, V]``.
        beta: Share of the teacher in the mixture, in (0, 1); 0.5 is the symmetric divergence, at most ln 2.

    Returns:
        ``[N]``

    Example:
        >>> jensen_shannon(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log(), beta=0.5)
        tensor([0.1017])
    """
    mixture = _log_mixture(teacher_logp, student_logp, beta)
    return beta * forward_kl(teacher_logp, mixture) + (1 - beta) * forward_kl(student_logp, mixture)


def jensen_shannon_gradient(teacher_logp: Tensor, student_logp: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    r"""Return `jensen_shannon` and its gradient: :math:`h = (1 - \beta) \log (q / m)`.

    Example:
        >>> jensen_shannon_gradient(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log(), beta=0.5)[1]
        tensor([[ 0.0607, -0.0607]])
    """
    mixture = _log_mixture(teacher_logp, student_logp, beta)
    of_student, gradient = reverse_kl_gradient(mixture, student_logp)
    return beta * forward_kl(teacher_logp, mixture) + (1 - beta) * of_student, gradient.mul_(1 - beta)


def total_variation(teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
    r"""Return :math:`\frac12 \sum_v |p - q|`, ``[N]``, at most 1.

    Example:
        >>> total_variation(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log())
        tensor([0.4000])
    """
    return (teacher_logp.exp() - student_logp.exp()).abs().sum(-1) / 2


def total_variation_gradient(teacher_logp: Tensor, student_logp: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return `total_variation` and its gradient: :math:`h = \frac12 \operatorname{sign}(q - p)`.

    Example:
        >>> total_variation_gradient(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log())[1]
        tensor([[ 0.0900, -0.0900]])
    """
    student = student_logp.exp()
    difference = student - teacher_logp.exp()
    value = difference.abs().sum(-1) / 2
    return value, _to_logits(difference.sign_().mul_(student).div_(2), student)


def skew_forward_kl(teacher_logp: Tensor, student_logp: Tensor, alpha: float) -> Tensor:
    r"""Return :math:`\mathrm{KL}(p \| \alpha p + (1 - \alpha) q)`, ``[N]``.

    Args:
        teacher_logp: ``[N, V]``.
        student_logp: ``[N, V]``.
        alpha: Share of the teacher in the mixture, in [0, 1); 0 is the forward KL.

    Returns:
        ``[N]``

    Example:
        >>> skew_forward_kl(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log(), alpha=0.1)
        tensor([0.3653])
    """
    return forward_kl(teacher_logp, _log_mixture(teacher_logp, student_logp, alpha))


def skew_forward_kl_gradient(teacher_logp: Tensor, student_logp: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    r"""Return `skew_forward_kl` and its gradient: :math:`h = -(1 - \alpha) p / m`.

    Example:
        >>> skew_forward_kl_gradient(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log(), alpha=0.1)[1]
        tensor([[ 0.2422, -0.2422]])
    """
    mixture = _log_mixture(teacher_logp, student_logp, alpha)
    weighted = (student_logp - mixture).add_(teacher_logp).exp_().mul_(alpha - 1)
    return forward_kl(teacher_logp, mixture), _to_logits(weighted, student_logp.exp())


def skew_reverse_kl(teacher_logp: Tensor, student_logp: Tensor, alpha: float) -> Tensor:
    r"""Return :math:`\mathrm{KL}(q \| (1 - \alpha) p + \alpha q)`, ``[N]``.

    Args:
        teacher_logp: ``[N, V]``.
        student_logp: ``[N, V]``.
        alpha: Share of the student in the mixture, in [0, 1); 0 is the reverse KL.

    Returns:
        ``[N]``

    Example:
        >>> skew_reverse_kl(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log(), alpha=0.1)
        tensor([0.3071])
    """
    return skew_forward_kl(student_logp, teacher_logp, alpha)


def skew_reverse_kl_gradient(teacher_logp: Tensor, student_logp: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    r"""Return `skew_reverse_kl` and its gradient: :math:`h = \log (q / m) - \alpha q / m`.

    Example:
        >>> skew_reverse_kl_gradient(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log(), alpha=0.1)[1]
        tensor([[ 0.1703, -0.1703]])
    """
    ratio = student_logp - _log_mixture(student_logp, teacher_logp, alpha)
    student = student_logp.exp()
    share = student * ratio
    value = share.sum(-1)
    weighted = share.sub_(ratio.exp_().mul_(student), alpha=alpha) if alpha else share
    return value, _to_logits(weighted, student)


def _to_logits(weighted: Tensor, student: Tensor) -> Tensor:
    """Return q (h - sum q h) from ``weighted`` = q h and ``student`` = q; overwrites both."""
    return weighted.sub_(student.mul_(weighted.sum(-1, keepdim=True)))


def _log_mixture(first_logp: Tensor, second_logp: Tensor, share: float) -> Tensor:
    """Return log(share * first + (1 - share) * second) without leaving log space."""
    if share == 0:
        return second_logp
    return torch.logaddexp(first_logp + math.log(share), second_logp + math.log(1 - share))
