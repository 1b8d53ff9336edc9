"""What the answers to all test rows are worth: scores of tasks, each one number of a whole test.

A score of one's own is a name and one method::

    class Polite(AnswerScore):
        name = "polite"

        def score(self, rows):
            return sum("please" in row["answer"] for row in rows) / len(rows)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from srd_lightning.errors import SettingError
from srd_lightning.evaluation.text_metrics import sacrebleu_metrics, same_number, same_words

Row = Mapping[str, str]
"""``prompt``, ``response`` (the reference) and ``answer``, as `predict` gives them."""


class AnswerScore:
    """One number for the answers of a test.

    Attributes:
        name: Logged as ``test_<name>``.
    """

    name: str

    def check(self, prompts: Sequence[str]) -> None:
        """See whether answers to these prompts can be scored, before there are any; by default nothing is seen.

        Args:
            prompts: Of all test rows, in their order.

        Raises:
            SRDError: They cannot.
        """

    def score(self, rows: Sequence[Row]) -> float:
        """Return the score; the one method that a new one must write.

        Args:
            rows: All test rows that have a response, of all ranks, in no certain order; at least one.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score(rows)")


class NumericAccuracy(AnswerScore):
    """Share of answers whose last number is that of the reference, in [0, 1]; for GSM8K and the like.

    Example:
        >>> rows = [{"response": "... #### 72", "answer": "That is 72."}, {"response": "#### 5", "answer": "6"}]
        >>> NumericAccuracy().score(rows)
        0.5
    """

    name = "numeric_accuracy"

    def score(self, rows: Sequence[Row]) -> float:
        """See `AnswerScore.score`."""
        return _share(rows, same_number)


class ExactAccuracy(AnswerScore):
    """Share of answers that are the reference but for case, punctuation and spaces, in [0, 1]."""

    name = "exact_accuracy"

    def score(self, rows: Sequence[Row]) -> float:
        """See `AnswerScore.score`."""
        return _share(rows, same_words)


class CorpusBleu(AnswerScore):
    """BLEU of all answers together, in [0, 100], as sacrebleu gives it; needs the ``translation`` extra.

    Args:
        tokenize: As sacrebleu's: ``13a``, ``zh``, ``ja-mecab``, …; 13a by default.
    """

    name = "bleu"

    def __init__(self, tokenize: str = "13a") -> None:
        try:
            self._metric = sacrebleu_metrics().BLEU(tokenize=tokenize)
        except (AssertionError, ImportError, KeyError, RuntimeError) as error:
            raise SettingError(f"sacrebleu has no tokenize {tokenize!r} here: {error}") from error

    def score(self, rows: Sequence[Row]) -> float:
        """See `AnswerScore.score`."""
        return float(self._metric.corpus_score(*_texts(rows)).score)


class CorpusChrF(AnswerScore):
    """chrF of all answers together, in [0, 100], as sacrebleu gives it; needs the ``translation`` extra.

    Args:
        word_order: Highest order of n-grams of words: 0 is chrF, 2 is chrF++.
    """

    name = "chrf"

    def __init__(self, word_order: int = 0) -> None:
        self._metric = sacrebleu_metrics().CHRF(word_order=word_order)

    def score(self, rows: Sequence[Row]) -> float:
        """See `AnswerScore.score`."""
        return float(self._metric.corpus_score(*_texts(rows)).score)


def check_scores(scores: Sequence[AnswerScore]) -> None:
    """Check that they are scores, each with a name of its own.

    Raises:
        SettingError: They are not.
    """
    for score in scores:
        if not isinstance(score, AnswerScore):
            raise SettingError(f"scores must be AnswerScore objects, such as NumericAccuracy(), but holds {score!r}")
    names = [score.name for score in scores]
    taken = ("nll", "kl", "rouge_l")  # which every test logs
    if wrong := sorted({name for name in names if names.count(name) > 1 or name in taken}):
        raise SettingError(f"every score needs a name of its own, but {', '.join(wrong)} is there twice; rename one")


def _share(rows: Sequence[Row], right: Callable[[str, str], bool]) -> float:
    return sum(right(row["response"], row["answer"]) for row in rows) / len(rows)


def _texts(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    return [row["answer"] for row in rows], [[row["response"] for row in rows]]
