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

Share = float | Tensor
"""Of a mixture: a number, or a scalar with which one compilation holds for all numbers."""


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


def jensen_shannon(teacher_logp: Tensor, student_logp: Tensor, beta: Share) -> Tensor:
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


def jensen_shannon_gradient(teacher_logp: Tensor, student_logp: Tensor, beta: Share) -> tuple[Tensor, Tensor]:
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


def skew_forward_kl(teacher_logp: Tensor, student_logp: Tensor, alpha: Share) -> Tensor:
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


def skew_forward_kl_gradient(teacher_logp: Tensor, student_logp: Tensor, alpha: Share) -> tuple[Tensor, Tensor]:
    r"""Return `skew_forward_kl` and its gradient: :math:`h = -(1 - \alpha) p / m`.

    Example:
        >>> skew_forward_kl_gradient(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log(), alpha=0.1)[1]
        tensor([[ 0.2422, -0.2422]])
    """
    mixture = _log_mixture(teacher_logp, student_logp, alpha)
    weighted = (student_logp - mixture).add_(teacher_logp).exp_().mul_(alpha - 1)
    return forward_kl(teacher_logp, mixture), _to_logits(weighted, student_logp.exp())


def skew_reverse_kl(teacher_logp: Tensor, student_logp: Tensor, alpha: Share) -> Tensor:
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


def skew_reverse_kl_gradient(teacher_logp: Tensor, student_logp: Tensor, alpha: Share) -> tuple[Tensor, Tensor]:
    r"""Return `skew_reverse_kl` and its gradient: :math:`h = \log (q / m) - \alpha q / m`.

    Example:
        >>> skew_reverse_kl_gradient(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log(), alpha=0.1)[1]
        tensor([[ 0.1703, -0.1703]])
    """
    ratio = student_logp - _log_mixture(student_logp, teacher_logp, alpha)
    student = student_logp.exp()
    share = student * ratio
    value = share.sum(-1)
    weighted = share.sub_(ratio.exp_().mul_(student).mul_(alpha)) if isinstance(alpha, Tensor) or alpha else share
    return value, _to_logits(weighted, student)


def alpha_beta(teacher_logp: Tensor, student_logp: Tensor, alpha: float, beta: float) -> Tensor:
    r"""Return the :math:`\alpha`-:math:`\beta` divergence, ``[N]`` (Cichocki et al. 2011; ABKD, arXiv 2505.04560).

    .. math:: -\frac{1}{\alpha\beta} \sum_v \Big( p^\alpha q^\beta - \frac{\alpha}{\alpha+\beta} p^{\alpha+\beta}
        - \frac{\beta}{\alpha+\beta} q^{\alpha+\beta} \Big)

    and its limits, where one of the two is 0:
    :math:`\beta^{-2} \sum_v (q^\beta \log (q^\beta / p^\beta) - q^\beta + p^\beta)` for :math:`\alpha = 0`, and the
    same with :math:`p` and :math:`q` exchanged for :math:`\beta = 0`. So (1, 0) is the forward KL, (0, 1) the reverse
    KL, (½, ½) twice the summed squared difference of square roots, and (1, 1) half that of probabilities.

    Args:
        teacher_logp: ``[N, V]``.
        student_logp: ``[N, V]``.
        alpha: Power of the teacher, at least 0.
        beta: Power of the student, at least 0, and not 0 where alpha is.

    Example:
        >>> alpha_beta(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log(), alpha=1.0, beta=1.0)
        tensor([0.1600])
    """
    if beta == 0:
        return alpha_beta(student_logp, teacher_logp, 0.0, alpha)
    if alpha == 0:
        of_teacher, of_student = beta * teacher_logp, beta * student_logp
        return (of_student.exp() * (of_student - of_teacher - 1) + of_teacher.exp()).sum(-1) / beta**2
    total = alpha + beta
    of_both = (alpha * teacher_logp + beta * student_logp).exp()
    of_each = alpha / total * (total * teacher_logp).exp() + beta / total * (total * student_logp).exp()
    return (of_each - of_both).sum(-1) / (alpha * beta)


def alpha_beta_gradient(teacher_logp: Tensor, student_logp: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    r"""Return `alpha_beta` and its gradient: :math:`q h = (q^{\alpha+\beta} - p^\alpha q^\beta) / \alpha`.

    For :math:`\alpha = 0` that is :math:`q h = q^\beta \log (q / p)`.

    Example:
        >>> alpha_beta_gradient(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log(), 1.0, 1.0)[1]
        tensor([[ 0.0720, -0.0720]])
    """
    value = alpha_beta(teacher_logp, student_logp, alpha, beta)
    if alpha == 0:
        weighted = (student_logp - teacher_logp).mul_((beta * student_logp).exp_())
    else:
        of_both = torch.add(beta * student_logp, teacher_logp, alpha=alpha).exp_()
        weighted = ((alpha + beta) * student_logp).exp_().sub_(of_both).div_(alpha)
    return value, _to_logits(weighted, student_logp.exp())


def adaptive_kl(teacher_logp: Tensor, student_logp: Tensor, head: float) -> Tensor:
    r"""Return :math:`w \, \mathrm{KL}(p \| q) + (1 - w) \, \mathrm{KL}(q \| p)`, ``[N]`` (AKL, arXiv 2404.02657).

    :math:`w` is the share of the head in :math:`\sum_v |p - q|`, and has no gradient. The head of a token is made of
    what the teacher finds likeliest: tokens whose probabilities sum to at most ``head``, and at least one.

    Args:
        teacher_logp: ``[N, V]``.
        student_logp: ``[N, V]``.
        head: Most probability of the head.

    Example:
        >>> teacher, student = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.4, 0.2, 0.4]]).log()
        >>> adaptive_kl(teacher, student, head=0.5)  # the head misses 0.1 of 0.4: 0.25 * 0.0946 + 0.75 * 0.1069
        tensor([0.1038])
    """
    share = _share_of_head(teacher_logp, student_logp.detach(), head)
    return share * forward_kl(teacher_logp, student_logp) + (1 - share) * reverse_kl(teacher_logp, student_logp)


def adaptive_kl_gradient(teacher_logp: Tensor, student_logp: Tensor, head: float) -> tuple[Tensor, Tensor]:
    r"""Return `adaptive_kl` and its gradient: the two, weighted alike.

    Example:
        >>> teacher, student = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.4, 0.2, 0.4]]).log()
        >>> adaptive_kl_gradient(teacher, student, head=0.5)[1]
        tensor([[-0.1240, -0.1019,  0.2259]])
    """
    share = _share_of_head(teacher_logp, student_logp, head)
    forward, gradient = forward_kl_gradient(teacher_logp, student_logp)
    backward, other = reverse_kl_gradient(teacher_logp, student_logp)
    gradient.mul_(share[:, None]).add_(other.mul_((1 - share)[:, None]))
    return share * forward + (1 - share) * backward, gradient


def _share_of_head(teacher_logp: Tensor, student_logp: Tensor, head: float) -> Tensor:
    teacher, place = teacher_logp.exp().sort(descending=True)
    missed = (teacher - student_logp.gather(-1, place).exp_()).abs_()
    inside = teacher.cumsum(-1) <= head
    inside[..., 0] = True
    return (missed * inside).sum(-1) / missed.sum(-1).clamp(min=torch.finfo(missed.dtype).tiny)


def hellinger(teacher_logp: Tensor, student_logp: Tensor) -> Tensor:
    r"""Return the Hellinger distance :math:`\sqrt{\frac12 \sum_v (\sqrt p - \sqrt q)^2}`, ``[N]``, at most 1.

    Example:
        >>> hellinger(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log())
        tensor([0.3249])
    """
    return ((teacher_logp / 2).exp() - (student_logp / 2).exp()).square().sum(-1).div(2).sqrt()


def entropy(logp: Tensor) -> Tensor:
    r"""Return the entropy :math:`-\sum_v q \log q`, ``[N]``.

    Example:
        >>> entropy(torch.tensor([[0.9, 0.1]]).log())
        tensor([0.3251])
    """
    return -(logp.exp() * logp).sum(-1)


def _to_logits(weighted: Tensor, student: Tensor) -> Tensor:
    """Return q (h - sum q h) from ``weighted`` = q h and ``student`` = q; overwrites both."""
    return weighted.sub_(student.mul_(weighted.sum(-1, keepdim=True)))


def _log_mixture(first_logp: Tensor, second_logp: Tensor, share: Share) -> Tensor:
    """Return log(share * first + (1 - share) * second) without leaving log space."""
    if isinstance(share, Tensor):
        return torch.logaddexp(first_logp + share.log(), second_logp + (1 - share).log())
    if share == 0:
        return second_logp
    return torch.logaddexp(first_logp + math.log(share), second_logp + math.log(1 - share))
