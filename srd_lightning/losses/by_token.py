"""Losses that look at all response tokens of a row before they say how much each of them counts, and how warm it is.

What they look at are scores of each token, made without gradients. A row decides for itself, so neither chunks nor
parts of a batch nor ranks change what is chosen. Every row counts as much as it does without choice: where k of its n
tokens are chosen, each weighs n / k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from srd_lightning.errors import SettingError
from srd_lightning.losses import checks, divergences
from srd_lightning.losses.around import Around
from srd_lightning.losses.base import DistillationLoss, log_probabilities, upcast
from srd_lightning.losses.standard import ForwardKL


class TokenPlan(NamedTuple):
    """What is distilled at which tokens.

    Args:
        chosen: How many have a weight; known without asking the device.
        weights: ``[N]``, 0 where nothing is distilled.
        temperatures: ``[N]``, where each token has its own.
    """

    chosen: int
    weights: Tensor
    temperatures: Tensor | None = None

    def order(self) -> Tensor:
        """Return places of the tokens, ``[N]``: those that are chosen first, else as they stand."""
        return (self.weights == 0).to(torch.uint8).argsort(stable=True)


class TokenScore:
    """Scores tokens; the higher, the sooner a token is chosen. One's own is one method.

    Example:
        >>> class Confidence(TokenScore):
        ...     def __call__(self, teacher_logp, student_logp):
        ...         return student_logp.amax(-1)
    """

    needs_teacher = False
    """Whether it must be given the teacher's log-probabilities of all tokens, which cost a product of its head."""

    def __call__(self, teacher_logp: Tensor | None, student_logp: Tensor) -> Tensor:
        """Return the score of each token.

        Args:
            teacher_logp: ``[N, V]``, at the temperature of the loss; nothing, unless the teacher is needed.
            student_logp: ``[N, V]``.

        Returns:
            ``[N]``
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__(teacher_logp, student_logp)")


class StudentEntropy(TokenScore):
    """How uncertain the student is; see `divergences.entropy`."""

    def __call__(self, teacher_logp: Tensor | None, student_logp: Tensor) -> Tensor:
        """See `TokenScore.__call__`."""
        return divergences.entropy(student_logp)


class Hellinger(TokenScore):
    """How far apart the two models are; see `divergences.hellinger`."""

    needs_teacher = True

    def __call__(self, teacher_logp: Tensor | None, student_logp: Tensor) -> Tensor:
        """See `TokenScore.__call__`."""
        assert teacher_logp is not None, "needs_teacher says so"
        return divergences.hellinger(teacher_logp, student_logp)


class ByToken(Around):
    """A loss around another one that plans what counts before any gradient is made.

    Args:
        loss: What is planned; it may plan something itself.
        by: What scores tokens.
    """

    def __init__(self, loss: DistillationLoss, by: TokenScore) -> None:
        super().__init__(loss)
        self.by = by

    def inner(self, loss: DistillationLoss) -> DistillationLoss:
        """Return the other loss, which may plan too."""
        return loss if isinstance(loss, ByToken) else super().inner(loss)

    def plan_row(self, scores: Sequence[Tensor]) -> TokenPlan:
        """Return what counts of the tokens of a row.

        Args:
            scores: ``[n]`` of each score that this loss and those inside it asked for, from the outside in.
        """
        raise NotImplementedError

    def scorers(self) -> list[TokenScore]:
        """Return what scores tokens, from the outside in."""
        return [self.by, *(self.loss.scorers() if isinstance(self.loss, ByToken) else [])]

    @property
    def needs_teacher(self) -> bool:
        """Whether a score needs the teacher's log-probabilities of all tokens."""
        return any(scorer.needs_teacher for scorer in self.scorers())

    def scores(self, teacher_logp: Tensor | None, student_logp: Tensor) -> Tensor:
        """Return all scores, ``[S, N]``; arguments as for `TokenScore`."""
        scorers = self.scorers()
        found = [scorer(teacher_logp, student_logp) for scorer in scorers]
        for scorer, values in zip(scorers, found, strict=True):
            if values.shape != student_logp.shape[:1]:
                raise SettingError(
                    f"{type(scorer).__name__} must return one score per token, of shape [{len(student_logp)}], but "
                    f"returned shape {list(values.shape)}"
                )
        return torch.stack(found)

    def plan(self, scores: Tensor, rows: Sequence[int]) -> TokenPlan:
        """Return what counts of all tokens.

        Args:
            scores: ``[S, N]``
            rows: How many tokens each row has; together N.
        """
        plans = [self.plan_row(part.unbind()) for part in torch.split(scores, list(rows), dim=1) if part.shape[1]]
        weights = torch.cat([scores.new_zeros(0), *(plan.weights for plan in plans)])
        temperatures = [plan.temperatures for plan in plans if plan.temperatures is not None]
        return TokenPlan(sum(plan.chosen for plan in plans), weights, torch.cat(temperatures) if temperatures else None)

    def of_tokens(
        self, student_logits: Tensor, teacher_logits: Tensor, num_tokens: Tensor, rows: Sequence[int] | None = None
    ) -> Tensor:
        """See `DistillationLoss.of_tokens`."""
        with torch.no_grad():
            logp = [log_probabilities(logits, self.temperature) for logits in (teacher_logits, student_logits)]
            plan = self.plan(self.scores(*logp), [len(student_logits)] if rows is None else rows)
        places = plan.order()[: plan.chosen]
        temperatures = self.temperature if plan.temperatures is None else plan.temperatures[places]
        weights = plan.weights[places] * self.scale_at(temperatures)
        divisor = temperatures[:, None] if isinstance(temperatures, Tensor) else temperatures
        teacher, student = (log_probabilities(one[places], divisor) for one in (teacher_logits, student_logits))
        values = checks.check_values(self, self.divergence(teacher, student), plan.chosen, student.requires_grad)
        total: Tensor = (upcast(values) * weights).sum() / num_tokens
        return total


class Selected(ByToken):
    """Only a share of a row's response tokens are distilled, those with the highest scores.

    By the student's entropy and with a fifth this is SE-KD (arXiv 2602.01395); by `Hellinger` the selection of AdaKD
    (arXiv 2510.11615). The cross-entropy stays one of all tokens. The teacher's head is applied to chosen tokens only,
    unless the score needs it; where ``kd_weight`` is 1 the others have no gradient, and none is made.

    Args:
        loss: What is distilled with, by default `ForwardKL`; may be a `TokenTemperature`.
        by: What scores tokens, such as `StudentEntropy` (the default) or `Hellinger`.
        share: Of the tokens of each row, in (0, 1], rounded up. Staged by
            ``HyperparameterScheduler({"loss.share": …})``.

    Example:
        >>> loss = Selected(ForwardKL(), share=0.5)
        >>> loss.plan(torch.tensor([[0.1, 0.9, 0.2, 0.5]]), rows=[3, 1]).weights
        tensor([0.0000, 1.5000, 1.5000, 1.0000])
    """

    share: float = checks.share("share", lambda s: 0 < s <= 1, "in (0, 1]")

    def __init__(self, loss: DistillationLoss | None = None, by: TokenScore | None = None, share: float = 0.2) -> None:
        super().__init__(ForwardKL() if loss is None else loss, StudentEntropy() if by is None else by)
        self.share = share

    def plan_row(self, scores: Sequence[Tensor]) -> TokenPlan:
        """See `ByToken.plan_row`."""
        own, *others = scores
        chosen = math.ceil(round(self.share * len(own), 6))
        places = own.topk(chosen).indices
        if not isinstance(self.loss, ByToken):
            return TokenPlan(chosen, _spread(own, places, own.new_full((chosen,), len(own) / chosen)))
        inner = self.loss.plan_row([values[places] for values in others])
        weights = _spread(own, places, inner.weights * (len(own) / chosen))
        warmth = inner.temperatures
        return TokenPlan(inner.chosen, weights, None if warmth is None else _spread(own, places, warmth))


class TokenTemperature(ByToken):
    r"""Hard tokens are distilled at a low temperature, easy ones at a high one (AdaKD's IDTS, arXiv 2510.11615).

    :math:`T_t = T \exp(-c \tanh \log (s_t / \tilde s))`, where :math:`s_t` is the Hellinger distance of the two models
    at the loss's temperature T and :math:`\tilde s` the median of a row's tokens, or of those that a `Selected` around
    it has chosen; the authors take the median of the batch. Each divergence is multiplied by the square of its own
    temperature.

    Args:
        loss: What is distilled with, by default `ForwardKL`.
        strength: c, at least 0; 0 is the loss itself. The authors use 0.3 to 0.5.
        by: What is hard; `Hellinger` by default.

    Example:
        >>> loss = TokenTemperature(ForwardKL(temperature=2.0), strength=0.5)
        >>> loss.plan(torch.tensor([[0.2, 0.4, 0.8]]), rows=[3]).temperatures  # tanh(log 2) is 0.6
        tensor([2.6997, 2.0000, 1.4816])
    """

    strength: float = checks.share("strength", lambda c: 0 <= c < math.inf, "at 0 or above")

    def __init__(
        self, loss: DistillationLoss | None = None, strength: float = 0.3, by: TokenScore | None = None
    ) -> None:
        if isinstance(loss, ByToken):
            raise SettingError(
                f"TokenTemperature stands inside a {type(loss).__name__}, not around it, such as in "
                "Selected(TokenTemperature(ForwardKL()))"
            )
        super().__init__(ForwardKL() if loss is None else loss, Hellinger() if by is None else by)
        self.strength = strength

    def plan_row(self, scores: Sequence[Tensor]) -> TokenPlan:
        """See `ByToken.plan_row`."""
        (own,) = scores
        least = torch.finfo(own.dtype).tiny
        relative = own.clamp(min=least) / own.median().clamp(min=least)
        temperatures = self.temperature * (-self.strength * relative.log().tanh()).exp()
        return TokenPlan(len(own), torch.ones_like(own), temperatures)


def has_token_temperatures(loss: DistillationLoss) -> bool:
    """Return whether tokens have temperatures of their own, so that more is asked of a teacher than its loss says."""
    return any(isinstance(part, TokenTemperature) for part in loss.modules())


def _spread(like: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Return ``[n]`` with values at some places, and 0 at the others."""
    return torch.zeros_like(like).scatter_(0, places, values)
