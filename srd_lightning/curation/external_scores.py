"""Scores of rows that something else has made, in a file."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from srd_lightning.criteria.base import CUT, Criterion, ReflectionBatch, score_batch
from srd_lightning.curation.score_store import Scores, answers_by_id, by_id
from srd_lightning.curriculum.ranking import Floats
from srd_lightning.data.readers import FORMATS, blamed, form_of, from_files, names_in
from srd_lightning.data.tokenization import ids_of
from srd_lightning.errors import DataError, MissingDataError, in_one_line
from srd_lightning.models.generation import Decoding


def check_scores_file(path: Path, criteria: Sequence[Criterion]) -> None:
    """Look whether a file can have the scores that are wanted, by the names of its columns.

    Args:
        path: The file.
        criteria: The columns that are wanted, or can be computed from answers.

    Raises:
        MissingDataError: It is not there.
        DataError: It is no file of columns, or one is missing.
    """
    if not path.is_file():
        raise MissingDataError(f"`scores` names the file {path}, which is not there; a folder has another name")
    if form_of(path) is None:
        raise DataError(f"`scores` names the file {path}, but files of scores are {', '.join(FORMATS)}")
    names = list(names_in(path))
    if "id" not in names:
        raise DataError(f"{path} must have the column `id`, but has {', '.join(names) or 'none'}")
    for criterion in criteria:
        if criterion.column not in names and not (criterion.from_answers and "answer" in names):
            raise DataError(
                f"{path} has no column {criterion.column!r} for {type(criterion).__name__}, only {', '.join(names)}; "
                "add it, or leave the criterion out"
            )


def read_scores(path: Path, rows: Dataset, criteria: Sequence[Criterion], tokenizer: PreTrainedTokenizerBase) -> Scores:
    """Take scores from a file of ``id`` and columns, which something else has made.

    Where the file has ``answer``, criteria that look at nothing else are computed from it. Where it has ``cut``, 1 or 0
    (or true or false), that says which answers were cut; without, all have ended.

    Args:
        path: The file, of one of the forms in `srd_lightning.data.readers`.
        rows: Tokenised rows.
        criteria: The columns that are wanted.
        tokenizer: The student's.

    Returns:
        The scores.

    Raises:
        MissingDataError: The file is not there.
        DataError: A column is missing or holds no numbers, a row has no score, or has two.
    """
    check_scores_file(path, criteria)
    table = _table(path)
    here = [criterion.column for criterion in criteria if criterion.column in table.column_names]
    beside = [name for name in ("answer", CUT) if name in table.column_names]
    table = _numbers(table, [*here, *(name for name in beside if name == CUT)], path)
    _check_once(table, [*here, *beside], path)
    ids = ids_of(rows)
    absent = [criterion for criterion in criteria if criterion.column not in here]
    columns = by_id(table, ids, here) | _from_answers(table, rows, absent, tokenizer)
    for name, values in columns.items():
        missing = np.flatnonzero(np.isnan(values))
        if len(missing):
            raise DataError(
                f"{path} has no {name} for {len(missing)} of {len(ids)} rows, {ids[int(missing[0])].as_py()!r} among "
                "them; score every row, or leave it out of `data`"
            )
    if CUT not in table.column_names:  # then all have ended
        table = table.append_column(CUT, pa.array(np.zeros(len(table))))
    return Scores(
        columns,
        path.with_suffix(""),
        0,
        functools.partial(answers_by_id, table),
        lambda some: by_id(table, some, [CUT])[CUT],
    )


def _table(path: Path) -> pa.Table:
    if form_of(path) != ".parquet":
        rows = from_files([path])
        if not len(rows):
            raise DataError(f"{path} holds no scores; score every row")
        return rows.with_format("arrow")[:]
    with blamed(path):
        table = pq.read_table(path, memory_map=True)
    try:
        return table.set_column(table.column_names.index("id"), "id", table["id"].cast(pa.string()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{path}: ids must be text or numbers, but are {table['id'].type}") from error


def _numbers(table: pa.Table, names: Sequence[str], path: Path) -> pa.Table:
    for name in names:
        try:
            table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.float64()))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            reason = in_one_line(error)
            raise DataError(f"{path}: the column {name!r} must hold numbers, but does not: {reason}") from error
    return table


def _check_once(table: pa.Table, names: Sequence[str], path: Path) -> None:
    """Check that no row has two different scores; the same one may stand there twice."""
    if len(table) == pc.count_distinct(table["id"]).as_py():
        return
    values = table.group_by("id").aggregate([(name, "count_distinct") for name in names])
    for name in names:
        twice = values.filter(pc.greater(values[f"{name}_count_distinct"], 1))["id"]
        if len(twice):
            raise DataError(
                f"{path} has more than one {name} for {len(twice)} rows, {twice[0].as_py()!r} among them; keep one"
            )


def _from_answers(
    table: pa.Table, rows: Dataset, criteria: Sequence[Criterion], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Floats]:
    if not criteria:
        return {}
    ids = ids_of(rows)
    answers, scores = answers_by_id(table, ids), []
    for part in rows.with_format("arrow").iter(batch_size=1000):
        known = [row for row in part.to_pylist() if row["id"] in answers]
        texts = [answers[row["id"]] for row in known]
        scores += score_batch(ReflectionBatch(nn.Identity(), tokenizer, known, Decoding(), answers=texts), criteria)
    return by_id(pa.Table.from_pylist(scores), ids, [criterion.column for criterion in criteria])
