"""What makes a row hard: criteria, each a column of scores and the direction in which it is easy.

A criterion of one's own is two attributes and one method::

    class Shouting(Criterion):
        column, higher_is_easier = "shouting", False

        def scores(self, reflected):
            return [answer.count("!") for answer in reflected.answers]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from srd_lightning.criteria.batch import Reflected
from srd_lightning.digests import weights_digest
from srd_lightning.errors import ModelError, SettingError
from srd_lightning.evaluation.matching import same_number, same_words
from srd_lightning.evaluation.rouge import rouge_l
from srd_lightning.losses import divergences
from srd_lightning.losses.base import log_probabilities
from srd_lightning.models.pretrained import Pretrained


class Criterion:
    """One measure of how hard a row is; the rows' order is fused from the ranks by each of them.

    Args:
        weight: Of this criterion's reciprocal rank in the fusion.

    Attributes:
        column: Name of its scores.
        higher_is_easier: Whether a row with a higher score is easier.
        from_answers: Whether rows and answers are all that it looks at, so that answers from elsewhere will do.
    """

    column: str
    higher_is_easier: bool
    from_answers: bool = False

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def scores(self, reflected: Reflected) -> Sequence[float]:
        """Return one score per row of a batch; the one method that a new criterion must write.

        Args:
            reflected: Rows, the student's answers to them, and its logits where responses are predicted. Each part is
                computed when it is first asked for: a criterion that does not look at answers costs no generation.

        Returns:
            ``[B]``
        """
        raise NotImplementedError(f"{type(self).__name__} must define scores(reflected)")

    def settings(self) -> str:
        """Return what its scores depend on, as text; scores made with other settings are not used.

        By default all attributes, models by their weights, but ``weight`` and those that begin with ``_``.
        """
        settings = {name: value for name, value in sorted(vars(self).items()) if name != "weight" and name[0] != "_"}
        digests = {name: weights_digest(value) for name, value in settings.items() if isinstance(value, nn.Module)}
        text = f"{type(self).__name__} {settings | digests}"
        if " at 0x" in text:
            raise SettingError(f"{text} holds an object that is another in every run; define settings() for it")
        return text

    def finish(self) -> None:
        """Free what the scoring needed."""


def check_criteria(criteria: Sequence[Criterion]) -> list[Criterion]:
    """Return the criteria.

    Raises:
        SettingError: Two have one column, a name is taken, or a weight is not positive.
    """
    columns = [criterion.column for criterion in criteria]
    if wrong := sorted({column for column in columns if columns.count(column) > 1 or column in ("id", "answer")}):
        raise SettingError(
            f"every criterion needs a column of its own that is not called id or answer, but {', '.join(wrong)} stands "
            f"in {columns}; give one another column: criterion.column = …"
        )
    if wrong := [criterion.column for criterion in criteria if not criterion.weight > 0]:
        raise SettingError(f"weights of criteria must be positive, but those of {', '.join(wrong)} are not")
    return list(criteria)


class RougeL(Criterion):
    """ROUGE-L of the answer against the true response, in [0, 1]; the paper's first criterion."""

    column, higher_is_easier, from_answers = "rouge_l", True, True

    def scores(self, reflected: Reflected) -> Sequence[float]:
        """See `Criterion.scores`."""
        return [rouge_l(row["response"], answer) for row, answer in reflected.pairs()]


class NegativeLogLikelihood(Criterion):
    """Mean loss of the true response's tokens, end token included, in nats; the paper's second criterion."""

    column, higher_is_easier = "nll", False

    def scores(self, reflected: Reflected) -> Sequence[float]:
        """See `Criterion.scores`."""
        return reflected.row_means(reflected.token_losses)


class Perplexity(NegativeLogLikelihood):
    """The exponential of `NegativeLogLikelihood`: ranks rows the same, reads better."""

    column = "perplexity"

    def scores(self, reflected: Reflected) -> Sequence[float]:
        """See `Criterion.scores`."""
        return [math.exp(min(loss, 700.0)) for loss in super().scores(reflected)]


class AnswerLength(Criterion):
    """Words of the student's answer. A control: short answers look easy to many measures."""

    column, higher_is_easier, from_answers = "answer_length", False, True

    def scores(self, reflected: Reflected) -> Sequence[float]:
        """See `Criterion.scores`."""
        return [len(answer.split()) for answer in reflected.answers]


class ResponseLength(Criterion):
    """Tokens of the true response, end token included. A control; it asks nothing of the student."""

    column, higher_is_easier, from_answers = "response_length", False, True

    def scores(self, reflected: Reflected) -> Sequence[float]:
        """See `Criterion.scores`."""
        return [len(row["input_ids"]) - row["prompt_length"] for row in reflected.rows]


class TeacherKL(Criterion):
    """Mean KL(teacher ‖ student) over the true response's tokens, in nats: how much the teacher would have to say.

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

    def scores(self, reflected: Reflected) -> Sequence[float]:
        """See `Criterion.scores`."""
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
        """See `Criterion.scores`."""
        ranks = reflected.row_means(reflected.token_ranks.clamp(max=self.max_rank).double())
        losses = reflected.row_means(reflected.token_losses)
        return [rank / max(loss, 1e-9) for rank, loss in zip(ranks, losses, strict=True)]


class InstructionFollowingDifficulty(Criterion):
    """Loss of the true response after its prompt over the loss without: how little it helps (IFD, arXiv 2308.12032)."""

    column, higher_is_easier = "ifd", False

    def scores(self, reflected: Reflected) -> Sequence[float]:
        """See `Criterion.scores`."""
        with_prompt = reflected.row_means(reflected.token_losses)
        without = reflected.row_means(reflected.token_losses_without_prompt)
        return [loss / max(alone, 1e-9) for loss, alone in zip(with_prompt, without, strict=True)]


class ExactMatch(Criterion):
    """1 where the answer is the true response, but for case, punctuation and spaces; else 0."""

    column, higher_is_easier, from_answers = "exact_match", True, True

    def scores(self, reflected: Reflected) -> Sequence[float]:
        """See `Criterion.scores`."""
        return [float(same_words(row["response"], answer)) for row, answer in reflected.pairs()]


class NumericAnswer(Criterion):
    """1 where the last number of the answer is the last number of the true response, else 0; for mathematics."""

    column, higher_is_easier, from_answers = "numeric_answer", True, True

    def scores(self, reflected: Reflected) -> Sequence[float]:
        """See `Criterion.scores`."""
        return [float(same_number(row["response"], answer)) for row, answer in reflected.pairs()]


class ChrF(Criterion):
    """chrF of the answer, in [0, 100]; for translation. Needs the ``translation`` extra."""

    column, higher_is_easier, from_answers = "chrf", True, True

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)
        _sacrebleu()

    def scores(self, reflected: Reflected) -> Sequence[float]:
        """See `Criterion.scores`."""
        return _sentence_scores(_sacrebleu().CHRF(), reflected)


class Bleu(Criterion):
    """Sentence BLEU of the answer, in [0, 100]; for translation. Needs the ``translation`` extra."""

    column, higher_is_easier, from_answers = "bleu", True, True

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)
        _sacrebleu()

    def scores(self, reflected: Reflected) -> Sequence[float]:
        """See `Criterion.scores`."""
        return _sentence_scores(_sacrebleu().BLEU(effective_order=True), reflected)


def _sacrebleu() -> Any:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise SettingError('ChrF and Bleu need sacrebleu: pip install "srd-lightning[translation]"') from error
    return metrics


def _sentence_scores(metric: Any, reflected: Reflected) -> list[float]:
    return [metric.sentence_score(answer, [row["response"]]).score for row, answer in reflected.pairs()]


class Column(Criterion):
    """Scores that were made elsewhere and stand in the file that `SRDDataModule(scores=...)` names.

    Args:
        column: Name of the column.
        higher_is_easier: Whether a row with a higher score is easier.
        weight: As in `Criterion`.
    """

    def __init__(self, column: str, higher_is_easier: bool, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.column = column
        self.higher_is_easier = higher_is_easier

    def scores(self, reflected: Reflected) -> Sequence[float]:
        """Refuse: there is nothing to compute."""
        raise SettingError(f"scores of {self.column!r} are read from a file: SRDDataModule(scores='….parquet')")


def score_batch(reflected: Reflected, criteria: Sequence[Criterion]) -> list[dict[str, Any]]:
    """Return ``id``, a column per criterion, and the ``answer`` where a criterion looked at it, for each row."""
    columns: dict[str, Sequence[Any]] = {"id": [row["id"] for row in reflected.rows]}
    with torch.no_grad():
        for criterion in criteria:
            columns[criterion.column] = [float(score) for score in criterion.scores(reflected)]
    if "answers" in vars(reflected):
        columns["answer"] = reflected.answers
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
