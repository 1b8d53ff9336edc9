"""Rows out of files, every value as the text that stands there.

Readers that guess types turn "2020-01-01" into a moment and "1.50" into a number, which no model should have to answer;
so all fields but ``messages`` are read as text, and a field that only some rows have is empty in the others.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value

Row = dict[str, Any]


def from_rows(rows: Iterable[Mapping[str, Any]]) -> Dataset:
    """Return rows that are in memory as a data set."""
    rows = list(rows)
    features = _features(rows)
    return Dataset.from_list([_as_text(row, features) for row in rows], features=features)


def from_files(files: Sequence[str | Path]) -> Dataset:
    """Return the rows of jsonl, json, csv and parquet files, one after the other, memory-mapped.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: A file is not what its ending says; the message names the line.
    """
    paths = [Path(file) for file in files]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}; `data` takes {', '.join(FORMATS)} files")
    features = _features(_read(paths))
    if not features:
        return Dataset.from_list([])
    state = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]
    return Dataset.from_generator(_generate, features=features, gen_kwargs={"state": [state], "features": features})


def _generate(state: list[list[tuple[str, int, int]]], features: Features) -> Iterator[Row]:
    """Yield the rows of files; their times and sizes are arguments so that a changed file is read anew."""
    for files in state:
        for row in _read(Path(path) for path, *_ in files):
            yield _as_text(row, features)


def _read(paths: Iterable[Path]) -> Iterator[Row]:
    for path in paths:
        try:
            for number, row in enumerate(FORMATS[path.suffix](path)):
                yield _check(row, f"{path} row {number}")
        except (json.JSONDecodeError, UnicodeDecodeError, csv.Error, pa.ArrowInvalid) as error:
            raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {' '.join(str(error).split())}") from error


def _check(row: Any, name: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{name} must have named fields, but is {type(row).__name__}")
    if None in row:  # how the csv module says it
        raise ValueError(f"{name} has more values than the first line has names")
    if not isinstance(row.get("messages") or [], list):
        raise ValueError(f"{name}: messages must be a list of turns, but is {type(row['messages']).__name__}")
    return row


def _read_json(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        first = next((line.lstrip() for line in file if line.strip()), "")
        file.seek(0)
        if first.startswith("["):
            yield from json.load(file)
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path} line {number} is not JSON: {error}") from error


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the module refuses texts over 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _read_parquet(path: Path) -> Iterator[Row]:
    for batch in pq.ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


FORMATS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _features(rows: Iterable[Mapping[str, Any]]) -> Features:
    names = dict.fromkeys(name for row in rows for name in row)
    turns = List({"role": Value("string"), "content": Value("string")})
    return Features({name: turns if name == "messages" else Value("string") for name in names})


def _as_text(row: Mapping[str, Any], features: Features) -> Row:
    return {name: _text(row.get(name)) if name != "messages" else row.get(name) for name in features}


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)
