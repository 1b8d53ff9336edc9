"""Criteria that look at rows and answers only, so that answers from elsewhere will do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from srd_lightning.criteria.base import Criterion
from srd_lightning.criteria.batch import Reflected
from srd_lightning.data.rows import response_lengths
from srd_lightning.errors import SettingError
from srd_lightning.evaluation.text_metrics import rouge_l, same_number, same_words


class RougeL(Criterion):
    """ROUGE-L of the answer against the true response, in [0, 1]; the paper's first criterion."""

    column, higher_is_easier, from_answers = "rouge_l", True, True

    def scores(self, reflected: Reflected) -> Sequence[float]:
        return [rouge_l(row["response"], answer) for row, answer in reflected.pairs()]


class AnswerLength(Criterion):
    """Words of the student's answer. A control: short answers look easy to many measures."""

    column, higher_is_easier, from_answers = "answer_length", False, True

    def scores(self, reflected: Reflected) -> Sequence[float]:
        return [len(answer.split()) for answer in reflected.answers]


class ResponseLength(Criterion):
    """Tokens of the true response, end token included. A control; it asks nothing of the student."""

    column, higher_is_easier, from_answers = "response_length", False, True

    def scores(self, reflected: Reflected) -> Sequence[float]:
        return response_lengths(reflected.rows)


class ExactMatch(Criterion):
    """1 where the answer is the true response, but for case, punctuation and spaces; else 0."""

    column, higher_is_easier, from_answers = "exact_match", True, True

    def scores(self, reflected: Reflected) -> Sequence[float]:
        return [float(same_words(row["response"], answer)) for row, answer in reflected.pairs()]


class NumericAnswer(Criterion):
    """1 where the last number of the answer is the last number of the true response, else 0; for mathematics."""

    column, higher_is_easier, from_answers = "numeric_answer", True, True

    def scores(self, reflected: Reflected) -> Sequence[float]:
        return [float(same_number(row["response"], answer)) for row, answer in reflected.pairs()]


class ChrF(Criterion):
    """chrF of the answer, in [0, 100]; for translation. Needs the ``translation`` extra."""

    column, higher_is_easier, from_answers = "chrf", True, True

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)
        _sacrebleu()

    def scores(self, reflected: Reflected) -> Sequence[float]:
        return _sentence_scores(_sacrebleu().CHRF(), reflected)


class Bleu(Criterion):
    """Sentence BLEU of the answer, in [0, 100]; for translation. Needs the ``translation`` extra."""

    column, higher_is_easier, from_answers = "bleu", True, True

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)
        _sacrebleu()

    def scores(self, reflected: Reflected) -> Sequence[float]:
        return _sentence_scores(_sacrebleu().BLEU(effective_order=True), reflected)


def _sacrebleu() -> Any:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise SettingError('ChrF and Bleu need sacrebleu: pip install "srd-lightning[translation]"') from error
    return metrics


def _sentence_scores(metric: Any, reflected: Reflected) -> list[float]:
    return [metric.sentence_score(answer, [row["response"]]).score for row, answer in reflected.pairs()]
