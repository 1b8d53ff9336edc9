"""Rows out of files and of Python, every value as the text that stands there.

Readers that guess types turn "2020-01-01" into a moment and "1.50" into a number, which no model should have to answer;
so all fields but conversations are read as text, and a field that only some rows have is empty in the others. Fields
that templates look at (`srd_lightning.data.fields`) must be text; what the others hold is written down as it comes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from lightning.pytorch.utilities import rank_zero_info

from srd_lightning.data.fields import TEXT_FIELDS, TURNS_FIELDS, has_turns, is_missing, kind_of, text_of, turns_of
from srd_lightning.data.formats import check_there, delimiter_of, names_in, read
from srd_lightning.errors import DataError, SRDError, StorageError

Row = dict[str, Any]
VERSION = 2
"""Of the code below and of the readers: to be raised whenever they read other text out of the same file."""
TURNS = List({"role": Value("string"), "content": Value("string")})


def from_rows(rows: Iterable[Any], split: str = "train") -> Dataset:
    """Return rows that are in memory as a data set.

    Args:
        rows: Mappings, or a pandas DataFrame.
        split: For messages.

    Raises:
        DataError: A row has no named fields, or one that must be text is not.
    """
    if isinstance(rows, pd.DataFrame):
        rows = rows.astype(object).where(rows.notna(), None).to_dict("records")
    rows = list(rows)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
            raise DataError(
                f"{split} row {number} must have named fields, such as {{'instruction': …, 'output': …}}, but is "
                f"{kind_of(row)}{' with names that are no text' if isinstance(row, Mapping) else ''}"
            )
    features = _features(name for row in rows for name in row)
    return Dataset.from_list(
        [_as_text(row, features, f"{split} row {number}") for number, row in enumerate(rows)], features=features
    )


def from_files(files: Sequence[str | Path]) -> Dataset:
    """Return the rows of files, one after the other, memory-mapped.

    Args:
        files: Each of one of the forms in `srd_lightning.data.formats`.

    Raises:
        MissingDataError: A file is not there.
        DataError: A file is not what its ending says, or a field that must be text is not; names file and line.
        StorageError: The rows cannot be written to the cache of `datasets`.
    """
    paths = [Path(file).expanduser() for file in files]
    for path in paths:
        check_there(path)
    for path in paths:
        if (delimiter := delimiter_of(path)) != ",":
            rank_zero_info(f"{path}: values are separated by {delimiter!r}, as in its first line")
    if not any(next(read(path), None) for path in paths):
        return Dataset.from_list([])
    features = _features(name for path in paths for name in names_in(path))
    state = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]
    arguments = {"state": [state], "features": features, "version": VERSION}
    try:
        return Dataset.from_generator(_generate, features=features, gen_kwargs=arguments)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, SRDError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, OSError):
            raise unwritable_cache(error.__cause__) from error
        raise
    except OSError as error:
        raise unwritable_cache(error) from error


def unwritable_cache(error: OSError) -> StorageError:
    """Return the error that says where rows could not be written, and what to do."""
    return StorageError(
        f"rows cannot be written to the cache of datasets, {datasets.config.HF_DATASETS_CACHE}: {error}; make room "
        "there, or set the environment variable HF_DATASETS_CACHE to another folder"
    )


def _generate(state: list[list[tuple[str, int, int]]], features: Features, version: int) -> Iterator[Row]:
    """Yield the rows of files; their times and sizes are arguments so that a changed file is read anew."""
    for files in state:
        for path, *_ in files:
            for place, row in read(Path(path)):
                yield _as_text(row, features, place)


def _features(names: Iterable[str]) -> Features:
    """Return what the rows have; all names of a conversation are one."""
    found = dict.fromkeys("messages" if name in TURNS_FIELDS else name for name in names)
    return Features({name: TURNS if name == "messages" else Value("string") for name in found})


def _as_text(row: Mapping[str, Any], features: Features, place: str) -> Row:
    try:
        return {name: _value(row, name) for name in features}
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _value(row: Mapping[str, Any], name: str) -> Any:
    if name == "messages":
        return turns_of(row) if has_turns(row) else None
    value = row.get(name)
    if is_missing(value):
        return None
    if name in TEXT_FIELDS or isinstance(value, str):
        return text_of(value, name)
    return json.dumps(value, default=str) if isinstance(value, (list, dict)) else str(value)
