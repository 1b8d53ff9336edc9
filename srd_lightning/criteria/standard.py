"""The criteria: by answers alone, by how likely the student finds the reference response, by what the teacher says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from srd_lightning.criteria.base import Criterion, ReflectionBatch
from srd_lightning.data.tokenization import response_lengths
from srd_lightning.errors import ModelError
from srd_lightning.evaluation.text_metrics import rouge_l, sacrebleu_metrics, same_number, same_words
from srd_lightning.losses import divergences
from srd_lightning.losses.base import log_probabilities
from srd_lightning.models.pretrained import Pretrained


class RougeL(Criterion):
    """ROUGE-L of the answer against the reference response, in [0, 1]; the paper's first criterion."""

    column, higher_is_easier, from_answers = "rouge_l", True, True

    def scores(self, reflected: ReflectionBatch) -> Sequence[float]:
        return [rouge_l(row["response"], answer) for row, answer in reflected.pairs()]


class AnswerLength(Criterion):
    """Words of the student's answer. A control: short answers look easy to many measures."""

    column, higher_is_easier, from_answers = "answer_length", False, True

    def scores(self, reflected: ReflectionBatch) -> Sequence[float]:
        return [len(answer.split()) for answer in reflected.answers]


class ResponseLength(Criterion):
    """Tokens of the reference response, end token included. A control; it asks nothing of the student."""

    column, higher_is_easier, from_answers = "response_length", False, True

    def scores(self, reflected: ReflectionBatch) -> Sequence[float]:
        return response_lengths(reflected.rows)


class ExactMatch(Criterion):
    """1 where the answer is the reference response, but for case, punctuation and spaces; else 0."""

    column, higher_is_easier, from_answers = "exact_match", True, True

    def scores(self, reflected: ReflectionBatch) -> Sequence[float]:
        return [float(same_words(row["response"], answer)) for row, answer in reflected.pairs()]


class NumericAnswer(Criterion):
    """1 where the last number of the answer is the last number of the reference response, else 0; for mathematics."""

    column, higher_is_easier, from_answers = "numeric_answer", True, True

    def scores(self, reflected: ReflectionBatch) -> Sequence[float]:
        return [float(same_number(row["response"], answer)) for row, answer in reflected.pairs()]


class ChrF(Criterion):
    """chrF of the answer, in [0, 100]; for translation. Needs the ``translation`` extra."""

    column, higher_is_easier, from_answers = "chrf", True, True

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)
        sacrebleu_metrics()

    def scores(self, reflected: ReflectionBatch) -> Sequence[float]:
        return _sentence_scores(sacrebleu_metrics().CHRF(), reflected)


class Bleu(Criterion):
    """Sentence BLEU of the answer, in [0, 100]; for translation. Needs the ``translation`` extra."""

    column, higher_is_easier, from_answers = "bleu", True, True

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)
        sacrebleu_metrics()

    def scores(self, reflected: ReflectionBatch) -> Sequence[float]:
        return _sentence_scores(sacrebleu_metrics().BLEU(effective_order=True), reflected)


def _sentence_scores(metric: Any, reflected: ReflectionBatch) -> list[float]:
    return [metric.sentence_score(answer, [row["response"]]).score for row, answer in reflected.pairs()]


class NegativeLogLikelihood(Criterion):
    """Mean loss of the reference response's tokens, end token included, in nats; the paper's second criterion."""

    column, higher_is_easier = "nll", False

    def scores(self, reflected: ReflectionBatch) -> Sequence[float]:
        return reflected.row_means(reflected.token_losses)


class Perplexity(NegativeLogLikelihood):
    """The exponential of `NegativeLogLikelihood`: ranks rows the same, reads better."""

    column = "perplexity"

    def scores(self, reflected: ReflectionBatch) -> Sequence[float]:
        return [math.exp(min(loss, 700.0)) for loss in super().scores(reflected)]


class RankSurprisalRatio(Criterion):
    """Summed rank over summed loss of the reference response's tokens (arXiv 2601.14249).

    It is low where the student finds the tokens unlikely, and yet has them among its first choices.

    Args:
        max_rank: Higher ranks count as this one.
        weight: As in `Criterion`.
    """

    column, higher_is_easier = "rank_surprisal_ratio", False

    def __init__(self, max_rank: int = 100, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.max_rank = max_rank

    def scores(self, reflected: ReflectionBatch) -> Sequence[float]:
        ranks = reflected.row_means(reflected.token_ranks.clamp(max=self.max_rank).double())
        losses = reflected.row_means(reflected.token_losses)
        return [rank / max(loss, 1e-9) for rank, loss in zip(ranks, losses, strict=True)]


class InstructionFollowingDifficulty(Criterion):
    """Loss of the response after its prompt over the loss without: how little that helps (IFD, arXiv 2308.12032)."""

    column, higher_is_easier = "ifd", False

    def scores(self, reflected: ReflectionBatch) -> Sequence[float]:
        with_prompt = reflected.row_means(reflected.token_losses)
        without = reflected.row_means(reflected.token_losses_without_prompt)
        return [loss / max(alone, 1e-9) for loss, alone in zip(with_prompt, without, strict=True)]


class TeacherKL(Criterion):
    """Mean KL(teacher ‖ student) over the reference response's tokens, in nats: how much the teacher would have to say.

    Args:
        teacher: The teacher; loaded when it is first needed and freed afterwards. Its scores are kept under its name
            and revision: a teacher that changes under the same name needs another folder of scores.
        weight: As in `Criterion`.
    """

    column, higher_is_easier = "teacher_kl", False

    def __init__(self, teacher: Pretrained | nn.Module, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.teacher = teacher
        self._loaded: nn.Module | None = None

    def scores(self, reflected: ReflectionBatch) -> Sequence[float]:
        if self._loaded is None:
            self._loaded = self.teacher.model() if isinstance(self.teacher, Pretrained) else self.teacher
        self._loaded.to(reflected.device)
        return reflected.row_means(reflected.per_token(_kl, self._loaded, reflected.model))

    def finish(self) -> None:
        """Free the teacher if it was loaded here."""
        self._loaded = None


def _kl(_: Tensor, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    if teacher_logits.shape != student_logits.shape:
        raise ModelError(
            f"student and teacher give logits of {student_logits.shape[1]} and {teacher_logits.shape[1]} tokens; "
            "TeacherKL needs two models with the same vocabulary"
        )
    return divergences.forward_kl(log_probabilities(teacher_logits, 1.0), log_probabilities(student_logits, 1.0))
