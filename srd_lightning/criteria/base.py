"""What makes a row hard: criteria, each a column of scores and the direction in which it is easy.

A criterion of one's own is two attributes and one method::

    class Shouting(Criterion):
        column, higher_is_easier = "shouting", False

        def scores(self, reflected):
            return [answer.count("!") for answer in reflected.answers]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from srd_lightning.criteria.batch import Reflected
from srd_lightning.digests import weights_digest
from srd_lightning.errors import SettingError


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
