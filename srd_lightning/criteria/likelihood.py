"""Criteria that ask the student how likely it finds the true response."""

from __future__ import annotations

import math
from collections.abc import Sequence

from srd_lightning.criteria.base import Criterion
from srd_lightning.criteria.batch import Reflected


class NegativeLogLikelihood(Criterion):
    """Mean loss of the true response's tokens, end token included, in nats; the paper's second criterion."""

    column, higher_is_easier = "nll", False

    def scores(self, reflected: Reflected) -> Sequence[float]:
        return reflected.row_means(reflected.token_losses)


class Perplexity(NegativeLogLikelihood):
    """The exponential of `NegativeLogLikelihood`: ranks rows the same, reads better."""

    column = "perplexity"

    def scores(self, reflected: Reflected) -> Sequence[float]:
        return [math.exp(min(loss, 700.0)) for loss in super().scores(reflected)]


class RankSurprisalRatio(Criterion):
    """Summed rank over summed loss of the true response's tokens (arXiv 2601.14249).

    It is low where the student finds the tokens unlikely, and yet has them among its first choices.

    Args:
        max_rank: Higher ranks count as this one.
        weight: As in `Criterion`.
    """

    column, higher_is_easier = "rank_surprisal_ratio", False

    def __init__(self, max_rank: int = 100, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.max_rank = max_rank

    def scores(self, reflected: Reflected) -> Sequence[float]:
        ranks = reflected.row_means(reflected.token_ranks.clamp(max=self.max_rank).double())
        losses = reflected.row_means(reflected.token_losses)
        return [rank / max(loss, 1e-9) for rank, loss in zip(ranks, losses, strict=True)]


class InstructionFollowingDifficulty(Criterion):
    """Loss of the true response after its prompt over the loss without: how little it helps (IFD, arXiv 2308.12032)."""

    column, higher_is_easier = "ifd", False

    def scores(self, reflected: Reflected) -> Sequence[float]:
        with_prompt = reflected.row_means(reflected.token_losses)
        without = reflected.row_means(reflected.token_losses_without_prompt)
        return [loss / max(alone, 1e-9) for loss, alone in zip(with_prompt, without, strict=True)]
