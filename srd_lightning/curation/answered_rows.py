"""Rows with what the student has answered in place of the response, for training that replays the reflection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from torch.utils.data import Dataset as Rows
from torch.utils.data import Subset
from transformers import PreTrainedTokenizerBase

from srd_lightning.data.tokenization import with_answers

Ints = NDArray[np.int64]


class AnsweredRows:
    """Some rows with answers in place of their responses.

    Args:
        number: Of all rows.
        tokenizer: Of the rows.
        max_length: Tokens of prompt and answer.
    """

    def __init__(self, number: int, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.rows: Dataset | None = None
        """Those that have an answer; one that was renewed stands in it twice."""
        self._where: Ints = np.full(number, -1)

    def renew(self, numbers: Ints, rows: Dataset, answers: Mapping[str, str], limits: Sequence[float]) -> None:
        """Take answers to rows in place of those that they had; empty ones are left out.

        Args:
            numbers: Of the rows, ``[M]``.
            rows: These, tokenised, ``[M]``.
            answers: By id.
            limits: Tokens from which on an answer has no end token, ``[M]``.
        """
        texts = [answers.get(row_id, "").strip() for row_id in rows["id"]]
        self._where[numbers] = -1
        if not (given := [place for place, text in enumerate(texts) if text]):
            return
        own = [limits[place] for place in given]
        chosen = [texts[place] for place in given]
        answered = with_answers(rows.select(given), chosen, self.tokenizer, self.max_length, own)
        before = 0 if self.rows is None else len(self.rows)
        self.rows = answered if self.rows is None else concatenate_datasets([self.rows, answered])
        self._where[numbers[given]] = before + np.arange(len(given))

    def in_place(self, pool: Subset[Any], replaced: NDArray[np.bool_]) -> Rows[Any]:
        """Return the rows of an epoch, some of them with their answers.

        Args:
            pool: Rows, ``[N]``.
            replaced: Which of them are to have answers, where there are, ``[N]``.
        """
        numbers = np.asarray(pool.indices)
        return _InPlace(pool, self.rows, np.where(replaced, self._where[numbers], -1))


class _InPlace(Rows[Any]):
    def __init__(self, pool: Subset[Any], answered: Dataset | None, where: Ints) -> None:
        self.pool = pool
        self.answered = answered
        self.where = where

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, place: int) -> Any:
        (row,) = self.__getitems__([place])
        return row

    def __getitems__(self, places: list[int]) -> list[Any]:
        """Return the rows of a batch, which are read together; the loaders of torch ask so."""
        where = self.where[places]
        answered = iter(self.answered.__getitems__(where[where >= 0].tolist()) if self.answered else ())
        others = iter(self.pool.__getitems__([place for place, at in zip(places, where, strict=True) if at < 0]))
        return [next(others if at < 0 else answered) for at in where]
