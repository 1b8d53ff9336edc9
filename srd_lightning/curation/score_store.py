"""Scores on disk, by row id, that are never trusted without a look.

A folder holds ``manifest.json``, which says what the scores were made from, and shards, parquet files of ids and
columns. The name of a shard is a digest of its bytes and of the manifest, so that one that was cut, changed or brought
from another folder is noticed, named and made again. Shards are written whole, under a name of their own: ranks
need no lock against each other. A run holds the folder's lock, so that a second run does not write at the same time.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from srd_lightning.checkpoints.refusals import check_scores_are_kept
from srd_lightning.criteria.base import CUT, Criterion
from srd_lightning.curriculum.ranking import Floats
from srd_lightning.data.tokenization import ids_of
from srd_lightning.results_folder import MANIFEST, ResultsFolder
from srd_lightning.storage import write_atomically

SHARDS_PER_MERGE = 64
COMPACT = b"tidy"
"""In the metadata of shards that `ScoreStore.compact` wrote."""
ROWS_PER_SHARD = 65_536
"""Of a finished store, whose shards are sorted by id."""


class ScoreStore:
    """Scores of rows in a folder.

    Args:
        folder: Made if it does not exist.
        made_of: What all scores depend on, by name of the part: rows, student, tokenizer, …
        criteria: What each column depends on besides; columns that are new to the folder are added to it.

    Raises:
        StorageError: The folder holds scores that were made of something else (the message names the parts that
            differ), or cannot be written.
    """

    def __init__(self, folder: str | Path, made_of: Mapping[str, str], criteria: Mapping[str, str]) -> None:
        self.folder = Path(folder)
        self._salt = json.dumps(dict(made_of), sort_keys=True).encode()
        self._own: list[Path] = []
        kept = _results(self.folder)
        found = kept.manifest(made_of=dict, criteria=dict)
        stored: Any = {"made_of": dict(made_of), "criteria": {}} if found is None else found
        kept.refuse(_different(stored, made_of, criteria))
        if found is None or not criteria.keys() <= stored["criteria"].keys():
            stored["criteria"] |= criteria
            kept.write_manifest(stored)

    @classmethod
    def reopen(cls, folder: Path) -> ScoreStore:
        """Open a folder as it is, whatever its scores were made of."""
        stored = _results(folder).manifest(made_of=dict) or {"made_of": {}}
        return cls(folder, stored["made_of"], {})

    def refuse_another(self, made_of: Mapping[str, str], criteria: Mapping[str, str]) -> None:
        """Raise where the scores are not of this, as making the store with it would; nothing is written."""
        kept = _results(self.folder)
        kept.refuse(_different(kept.manifest(made_of=dict, criteria=dict) or {}, made_of, criteria))

    @classmethod
    @contextmanager
    def locked(cls, folder: Path, made_of: Mapping[str, str], criteria: Mapping[str, str]) -> Iterator[ScoreStore]:
        """Open a folder to write to it; other runs are kept from it until this rank has done so, or has ended.

        Raises:
            StorageError: Another run holds the lock, for longer than one needs to read; or the folder cannot be made.
        """
        with _results(folder).locked():
            yield cls(folder, made_of, criteria)

    def append(self, scores: Sequence[Mapping[str, Any]]) -> None:
        """Write the scores of some rows, each with its ``id``; they are safe when this returns."""
        self._own.append(self._write(pa.Table.from_pylist(list(scores))))
        if len(self._own) == SHARDS_PER_MERGE:
            self._merge(self._own, rows_per_shard=2**31)
            self._own = []

    def is_compact(self, rows: int) -> bool:
        """Return whether all shards were written by `compact`, and hold each of so many rows once."""
        found = [pq.read_metadata(shard) for shard in self._shards()]
        return all(COMPACT in file.metadata for file in found) and sum(file.num_rows for file in found) == rows

    def compact(self) -> None:
        """Rewrite all shards as few, sorted by id: the same scores give the same files, however they came about."""
        self._merge(self._shards(), ROWS_PER_SHARD, {COMPACT: b"1"})
        for left in self.folder.glob(".part-*"):  # half-written by a process that was killed
            left.unlink(missing_ok=True)

    def _merge(self, shards: Sequence[Path], rows_per_shard: int, metadata: dict[bytes, bytes] | None = None) -> None:
        whole = _one_row_per_id(self._read_all(shards)).replace_schema_metadata(metadata)
        written = {self._write(whole.slice(start, rows_per_shard)) for start in range(0, len(whole), rows_per_shard)}
        for shard in set(shards) - written:
            shard.unlink(missing_ok=True)

    def _write(self, table: pa.Table) -> Path:
        buffer = io.BytesIO()
        if "answer" in table.column_names:  # those of many rows are more than 32-bit offsets can address
            place = table.column_names.index("answer")
            table = table.set_column(place, "answer", table["answer"].cast(pa.large_string()))
        pq.write_table(table.combine_chunks(), buffer)
        path = self.folder / self._name(buffer.getvalue())
        write_atomically(path, buffer.getvalue())
        return path

    def _name(self, content: bytes) -> str:
        return f"part-{hashlib.sha256(self._salt + hashlib.sha256(content).digest()).hexdigest()[:32]}.parquet"

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def _read_all(self, shards: Sequence[Path], columns: Sequence[str] | None = None) -> pa.Table:
        """Return sound shards one after the other; a row stands in as many as it was written to."""
        empty = pa.table({"id": pa.array([], pa.string())})
        tables = [table for table in (self._read(shard, columns) for shard in shards) if table is not None]
        return pa.concat_tables([empty, *tables], promote_options="default")

    def _read(self, shard: Path, columns: Sequence[str] | None) -> pa.Table | None:
        """Return a shard, or put it aside and return nothing if it is not what was written here."""
        try:
            content = shard.read_bytes()
        except FileNotFoundError:  # another rank has just merged it
            return None
        if self._name(content) != shard.name:
            aside = shard.with_suffix(".damaged")
            shard.replace(aside)
            warnings.warn(
                f"{shard} is damaged or belongs to another store; it was renamed to {aside.name}, and its rows are "
                "scored again",
                stacklevel=2,
            )
            return None
        file = pq.ParquetFile(io.BytesIO(content))
        return file.read(columns and [name for name in ("id", *columns) if name in file.schema_arrow.names])

    def columns(self, ids: pa.Array, names: Sequence[str]) -> dict[str, Floats]:
        """Return scores in the order of ``ids``, ``[N]`` each, NaN where there is none."""
        return by_id(self._read_all(self._shards(), names), ids, names)

    def answers(self, ids: pa.Array) -> dict[str, str]:
        """Return the answers to some rows by id, where there are."""
        return answers_by_id(self._read_all(self._shards(), ["answer"]), ids)

    def cut(self, ids: pa.Array) -> Floats:
        """Return whether the answers to some rows were cut, ``[N]``: 1, 0, or NaN where that is not known."""
        return self.columns(ids, [CUT])[CUT]


def answers_by_id(table: pa.Table, ids: pa.Array) -> dict[str, str]:
    """Return what the column ``answer`` holds for some rows, by id; nothing where there is no such column."""
    if "answer" not in table.column_names:
        return {}
    chosen = table.filter(pc.and_(pc.is_in(table["id"], ids), pc.is_valid(table["answer"])))
    return dict(zip(chosen["id"].to_pylist(), chosen["answer"].to_pylist(), strict=True))


def by_id(table: pa.Table, ids: pa.Array, names: Sequence[str]) -> dict[str, Floats]:
    """Look scores up.

    Args:
        table: Has ``id`` and some of the columns; a row may stand in it several times.
        ids: ``[N]``
        names: The columns.

    Returns:
        By column ``[N]``, NaN where the table has no score.

    Example:
        >>> table = pa.table({"id": ["a", "b"], "nll": [0.5, 1.5]})
        >>> by_id(table, pa.array(["b", "c"]), ["nll"])
        {'nll': array([1.5, nan])}
    """
    found = {}
    for name in names:
        if name not in table.column_names:
            found[name] = np.full(len(ids), np.nan)
            continue
        scored = table.filter(pc.is_valid(table[name]))
        places = pc.index_in(ids, value_set=scored["id"].combine_chunks())
        values = scored[name].cast(pa.float64()).take(places)
        found[name] = values.to_numpy()
    return found


def _results(folder: Path) -> ResultsFolder:
    return ResultsFolder(folder, "scores", "scores")


def _different(stored: Mapping[str, Any], made_of: Mapping[str, str], criteria: Mapping[str, str]) -> list[str]:
    """Return which parts of what scores were made of, and which columns, are others in a manifest."""
    known = stored["criteria"].keys() & criteria.keys()
    parts = [part for part in made_of if stored["made_of"].get(part) != made_of[part]]
    return [*parts, *(column for column in sorted(known) if stored["criteria"][column] != criteria[column])]


def _one_row_per_id(table: pa.Table) -> pa.Table:
    """Sort by id and join what several shards say of a row."""
    names = sorted(name for name in table.column_names if name != "id")
    joined = table.group_by("id", use_threads=False).aggregate([(name, "first") for name in names])  # not null
    return joined.rename_columns(["id", *names]).sort_by("id")


@dataclass(frozen=True)
class Scores:
    """Scores of all rows, ``[N]`` by column, and where they come from.

    Args:
        columns: By name.
        folder: Where they are kept.
        scored: How many rows were scored in this run.
        answers: Takes ids; returns the answers that there are, by id.
        cut: Takes ids; returns whether the answers were cut, ``[N]``: 1, 0, or NaN where that is not known.
    """

    columns: dict[str, Floats]
    folder: Path
    scored: int
    answers: Callable[[pa.Array], dict[str, str]]
    cut: Callable[[pa.Array], Floats]


def stored_scores(folder: Path, rows: Dataset, criteria: Sequence[Criterion]) -> Scores:
    """Read the scores of an earlier reflection as they are, without the student that made them.

    Raises:
        ResumeError: They are not there, or not all.
    """
    check_scores_are_kept((folder / MANIFEST).exists(), folder)
    store = ScoreStore.reopen(folder)
    columns = store.columns(ids_of(rows), [criterion.column for criterion in criteria])
    check_scores_are_kept(not any(np.isnan(values).any() for values in columns.values()), folder)
    return Scores(columns, folder, 0, store.answers, store.cut)
