"""What a curation has made of rows, as a data set that any trainer reads: their texts, scores, ranks and stages."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from srd_lightning.curation.result import CurationResult
from srd_lightning.data.tokenization import row_ids
from srd_lightning.errors import DataError, SettingError
from srd_lightning.storage import check_file, write_atomically

SUFFIXES = (".jsonl", ".parquet")
OWN = ("id", "prompt", "response", "kept", "stage", "position")
"""Columns that every such file has, by which it is known to be one that may be replaced."""


def curated_rows(result: CurationResult, rows: Dataset, originals: Dataset, answers: Mapping[str, str]) -> pa.Table:
    """Put together what is known of each row that was ranked.

    Args:
        result: What the curation made.
        rows: Tokenised rows, in the order of its ``ids``.
        originals: The same rows, and perhaps others, as they were read.
        answers: The student's answers by row id.

    Returns:
        A row for each, in the order of their ids: ``id``, ``prompt`` and ``response`` as they are trained on, ``kept``,
        ``stage`` (in which it enters, from 0; -1 for a row that never does), ``position`` (0 is the easiest), each
        score by the name of its criterion, its rank as ``rank_…`` (1 is the easiest), ``answer`` where there are any,
        and the fields that it was read with; one whose name is taken is called ``original_…``.

    Raises:
        DataError: A row is not among those that were read.
    """
    numbers = {row_id: number for number, row_id in enumerate(row_ids(originals))}
    ids: list[str] = rows["id"][:]
    if missing := [row_id for row_id in ids if row_id not in numbers]:
        raise DataError(
            f"{len(missing)} of {len(ids)} curated rows, {missing[0]!r} among them, are no longer in `data`, which was "
            "changed meanwhile; curate again"
        )
    scores = {name: values.tolist() for name, values in result.columns.items()}
    ranks = {f"rank_{name}": values.tolist() for name, values in result.ranks.items()}
    columns: dict[str, Any] = {
        "id": ids,
        "prompt": rows["prompt"][:],
        "response": rows["response"][:],
        "kept": (result.stages >= 0).tolist(),
        "stage": result.stages.tolist(),
        "position": result.places.tolist(),
        **scores,
        **ranks,
    }
    if answers:
        columns["answer"] = [answers.get(row_id) for row_id in ids]
    read = originals.select([numbers[row_id] for row_id in ids]).with_format("arrow")[:]
    for name in sorted(read.column_names):  # as they come they depend on which row was read first
        if name != "id":
            columns[_free(name, columns)] = read[name]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return pa.table(columns).take(order).replace_schema_metadata(None)


def _free(name: str, taken: Mapping[str, Any]) -> str:
    while name in taken:
        name = f"original_{name}"
    return name


def write(table: pa.Table, path: Path) -> None:
    """Write rows to a file, all of them or nothing, in the form that its ending says."""
    if path.suffix == ".parquet":
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        write_atomically(path, buffer.getvalue())
    else:
        write_atomically(path, "".join(_lines(table)).encode())


def _lines(table: pa.Table) -> Iterator[str]:
    for batch in table.to_batches(max_chunksize=1000):
        for row in batch.to_pylist():
            yield json.dumps(row, ensure_ascii=False, default=str) + "\n"


def check_path(path: Path) -> None:
    """Refuse a file that cannot be written, or that holds something else than such rows; before rows are read.

    Raises:
        SettingError: Its ending says no form that can be written.
        StorageError: It cannot be written, or holds something else.
    """
    if path.suffix not in SUFFIXES:
        raise SettingError(f"export must name a {' or '.join(SUFFIXES)} file, but is {path}; give it such an ending")
    check_file(path, "export", "the rows of an earlier curation", _is_ours)


def _is_ours(path: Path) -> bool:
    try:
        if path.suffix == ".parquet":
            names = set(pq.read_schema(path).names)
        else:
            with path.open("rb") as file:
                names = set(json.loads(file.readline()))
    except (ValueError, TypeError, pa.ArrowException):
        return False
    return names.issuperset(OWN)
