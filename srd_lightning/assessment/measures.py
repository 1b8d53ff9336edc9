"""What is measured of each row while a model answers it: columns beside ROUGE-L, kept as scores are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srd_lightning.criteria.base import Criterion, ReflectionBatch
from srd_lightning.data.tokenization import response_lengths
from srd_lightning.evaluation.calibration import BINS, binned
from srd_lightning.evaluation.next_token import agreement, likelihood
from srd_lightning.models.pretrained import Pretrained

LIKELIHOOD = ("nll", "accuracy", "confidence")
AGREEMENT = ("kl", "top1")
OWN = ("own_kl", "own_top1")
BINNED = [f"{what}_in_bin{number}" for number in range(BINS) for what in ("tokens", "confidence", "right")]


class AnswerTokens(Criterion):
    """Tokens of the answer, the end token included."""

    column, higher_is_easier = "tokens", False

    def scores(self, reflected: ReflectionBatch) -> list[float]:
        """See `Criterion.scores`."""
        return [float(len(ids)) for ids in reflected.answer_ids]


class Predictions:
    """What a model, and a teacher beside it, predict on the rows of a batch: computed once for all columns.

    Args:
        teacher: Loaded when it is first needed; without one there are no columns of it.
        vocabulary: Says how many tokens it shares with the model, or nothing where all are.
    """

    def __init__(self, teacher: Pretrained | nn.Module | None, vocabulary: Callable[[nn.Module], int | None]) -> None:
        self.teacher = teacher
        self.vocabulary = vocabulary
        self._loaded: nn.Module | None = None
        self._last: tuple[ReflectionBatch, dict[str, Sequence[float]]] | None = None

    def criteria(self) -> list[Criterion]:
        """Return the columns: means over the tokens of each row, and its predictions by confidence."""
        of_teacher = () if self.teacher is None else (*AGREEMENT, *OWN)
        return [_Column(name, self) for name in (*LIKELIHOOD, *BINNED, *of_teacher)]

    def of(self, reflected: ReflectionBatch) -> Mapping[str, Sequence[float]]:
        """Return all columns of a batch, ``[B]`` each."""
        if self._last is None or self._last[0] is not reflected:
            self._last = reflected, self._columns(reflected)
        return self._last[1]

    def free(self) -> None:
        """Free the teacher if it was loaded here, and what is known of the last batch."""
        self._loaded = self._last = None

    def _columns(self, reflected: ReflectionBatch) -> dict[str, Sequence[float]]:
        if self.teacher is None:
            return _of_likelihood(_by_row(reflected.per_token(likelihood, reflected.model), reflected.rows))
        teacher = self._teacher(reflected.device)
        shared = self.vocabulary(teacher)

        def near(_: Tensor, of_teacher: Tensor, of_student: Tensor) -> Tensor:
            return agreement(of_teacher, of_student, shared)

        def both(tokens: Tensor, of_teacher: Tensor, of_student: Tensor) -> Tensor:
            return torch.cat([likelihood(tokens, of_student), near(tokens, of_teacher, of_student)], dim=1)

        models, answered = (teacher, reflected.model), _answered(reflected)
        on_reference = _by_row(reflected.per_token(both, *models), reflected.rows)
        on_own = _by_row(reflected.per_token(near, *models, rows=answered), answered)
        return {
            **_of_likelihood(on_reference),
            **_means(AGREEMENT, [values[:, len(LIKELIHOOD) :] for values in on_reference]),
            **_means(OWN, on_own),
        }

    def _teacher(self, device: torch.device) -> nn.Module:
        if self._loaded is None:
            self._loaded = self.teacher.model() if isinstance(self.teacher, Pretrained) else self.teacher
        assert self._loaded is not None
        return self._loaded.to(device)


class _Column(Criterion):
    """One of the columns of `Predictions`."""

    higher_is_easier = False

    def __init__(self, column: str, predictions: Predictions) -> None:
        super().__init__()
        self.column = column
        self._predictions = predictions

    def scores(self, reflected: ReflectionBatch) -> Sequence[float]:
        return self._predictions.of(reflected)[self.column]

    def finish(self) -> None:
        self._predictions.free()


def _answered(reflected: ReflectionBatch) -> list[dict[str, Any]]:
    """Return the rows of a batch with the answers in place of their responses, token by token."""
    return [
        {"input_ids": [*row["input_ids"][: row["prompt_length"]], *ids], "prompt_length": row["prompt_length"]}
        for row, ids in zip(reflected.rows, reflected.answer_ids, strict=True)
    ]


def _by_row(values: Tensor, rows: Sequence[Mapping[str, Any]]) -> list[np.ndarray[Any, Any]]:
    return [part.double().numpy() for part in torch.split(values.cpu(), response_lengths(rows))]


def _means(names: Sequence[str], rows: Sequence[np.ndarray[Any, Any]]) -> dict[str, Sequence[float]]:
    return dict(zip(names, np.stack([values.mean(0) for values in rows], axis=1), strict=True))


def _of_likelihood(rows: Sequence[np.ndarray[Any, Any]]) -> dict[str, Sequence[float]]:
    sums = np.stack([binned(confidence=values[:, 2], right=values[:, 1]).ravel() for values in rows], axis=1)
    means = _means(LIKELIHOOD, [values[:, : len(LIKELIHOOD)] for values in rows])
    return {**means, **dict(zip(BINNED, sums, strict=True))}
