"""Rows out of files and of Python, every value as the text that stands there.

Readers that guess types turn "2020-01-01" into a moment and "1.50" into a number, which no model should have to answer;
so all fields but conversations are read as text, and a field that only some rows have is empty in the others. Fields
that templates look at (`srd_lightning.data.templates`) must be text; what the others hold is written down as it comes.

`from_files` and `from_rows` make data sets. Below them is a reader for each form of file, which yields where a row
stands ("line 7") and the row; a value that could be read in two ways (a field that stands twice, a quote that is never
closed) is refused with its line.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from lightning.pytorch.utilities import rank_zero_info

from srd_lightning.data.templates import TEXT_FIELDS, TURNS_FIELDS, has_turns, is_missing, kind_of, text_of, turns_of
from srd_lightning.errors import DataError, MissingDataError, SRDError, StorageError, in_one_line

Row = dict[str, Any]
Placed = Iterator[tuple[str, Any]]
"""Where a row stands in its file, and the row."""
FIELD_LIMIT = 2**31 - 1
"""Characters of a value in a table; by itself Python's module refuses texts over 128 KiB."""
SPACE = re.compile(r"\s*")
ROW_FIELDS = TEXT_FIELDS.union(TURNS_FIELDS)
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
    features = _features(_checked(dict.fromkeys(name for row in rows for name in row), f"{split}: "))
    return Dataset.from_list(
        [_as_text(row, features, f"{split} row {number}") for number, row in enumerate(rows)], features=features
    )


def from_files(files: Sequence[str | Path]) -> Dataset:
    """Return the rows of files, one after the other, memory-mapped.

    Args:
        files: Each of one of the forms in `srd_lightning.data.readers`.

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
    if not features:
        return Dataset.from_list([])
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


def form_of(path: str | Path) -> str | None:
    """Return the ending by which a file is read, ``.gz`` included, or nothing for another kind of file.

    Example:
        >>> form_of("rows.JSONL.gz"), form_of("rows.txt")
        ('.jsonl.gz', None)
    """
    name = Path(path).name.lower()
    return next((form for form in FORMATS if name.endswith(form)), None)


def check_there(path: Path) -> None:
    """Check that a file can be read.

    Raises:
        MissingDataError: It is not there, or is a folder.
    """
    if path.is_dir():
        raise MissingDataError(f"{path} is a folder, but its name is that of a file; rename it, or name a file in it")
    if not path.is_file():
        raise MissingDataError(f"there is no file {path}; `data` takes {', '.join(FORMATS)} files")


def read(path: Path) -> Placed:
    """Yield the rows of a file, each a dict, and where each stands.

    Raises:
        DataError: The file is not what its ending says; the message names file and line.
    """
    with blamed(path):
        for place, row in _reader(path)(path):
            if not isinstance(row, dict):
                raise DataError(f"{place} must have named fields, but is {_shown(row)}")
            yield f"{path} {place}", row


def names_in(path: Path) -> Iterable[str]:
    """Return the names of the fields in a file, reading as little of it as its form allows."""
    if _reader(path) is _read_json:
        return _checked(dict.fromkeys(name for _, row in read(path) for name in row), f"{path}: ")
    with blamed(path):
        if _reader(path) is _read_parquet:
            return list(pq.read_schema(path).names)
        csv.field_size_limit(FIELD_LIMIT)
        with _open(path, newline="") as file:
            return _header(next(csv.reader(file, delimiter=_delimiter(path)), []))


def _checked(names: Iterable[str], place: str) -> Iterable[str]:
    """Return the names of fields, which must be text as their values must."""
    for name in names:
        if "\0" in text_of(name, f"{place}the name of a field"):
            raise DataError(f"{place}the name of a field holds a null character: {name!r}; write another one")
    return names


def _reader(path: Path) -> Callable[[Path], Placed]:
    return FORMATS[form_of(path) or ""]


@contextmanager
def blamed(path: Path) -> Iterator[None]:
    """Say of everything that may be wrong with a file which file it is."""
    try:
        yield
    except SRDError as error:
        raise type(error)(f"{path} {error}") from error.__cause__
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.object[error.start]:#x}); save it as UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked, it is cut or no gzip file: {error}") from error
    except (pa.ArrowException, csv.Error, OSError, RecursionError, OverflowError) as error:
        form = (form_of(path) or "")[1:]
        raise DataError(f"{path} cannot be read as {form}: {in_one_line(error)}") from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _open(path: Path, newline: str | None = None) -> TextIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"has the field {twice!r} twice in one object; remove one of them")
    return row


def _constant(name: str) -> str | None:
    return None if name == "NaN" else name


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=str, parse_int=str, parse_constant=_constant)


def _read_json(path: Path) -> Placed:
    """Yield one row per line; where the first line is no whole value, the rows of the whole file."""
    with _open(path) as file:
        first = True
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = DECODER.decode(line)
            except json.JSONDecodeError as error:
                if first:
                    break
                raise DataError(f"line {number} is not JSON: {error.msg} at character {error.colno}") from error
            except DataError as error:
                raise DataError(f"line {number} {error}") from None
            if first and _contained(value) is not None:
                break
            yield f"line {number}", value
            first = False
        else:
            return
        file.seek(0)
        yield from _rows_in(file.read())


def _rows_in(text: str) -> Placed:
    """Yield the rows of JSON over several lines: an array, an object with the array ``data``, or objects in a row."""
    position, number = _next(text, 0), 0
    while position < len(text):
        try:
            value, position = DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"line {error.lineno} is not JSON: {error.msg} at character {error.colno}") from error
        rows = _contained(value)
        for row in [value] if rows is None else rows:
            yield f"row {number}", row
            number += 1
        position = _next(text, position)


def _next(text: str, position: int) -> int:
    """Return where the next value begins; without a copy of the text, which may be long and have many."""
    return cast(re.Match[str], SPACE.match(text, position)).end()


def _contained(value: Any) -> list[Any] | None:
    """Return the rows of a value that holds several."""
    if isinstance(value, dict) and value.keys().isdisjoint(ROW_FIELDS):
        value = value.get("data")
    return value if isinstance(value, list) else None


def delimiter_of(path: Path) -> str:
    """Return what separates the values of a table: what stands most often in its first line, else a comma."""
    with blamed(path):
        return _delimiter(path) if _reader(path) is _read_table else ","


def _delimiter(path: Path) -> str:
    if (form_of(path) or "").startswith(".tsv"):
        return "\t"
    with _open(path, newline="") as file:
        header = file.readline()
    return max(",;\t|", key=lambda mark: header.count(mark))


def _read_table(path: Path) -> Placed:
    csv.field_size_limit(FIELD_LIMIT)
    delimiter = _delimiter(path)
    with _open(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        names: list[str] = []
        line = 1
        try:
            names = _header(next(reader, []))
            line = reader.line_num + 1
            for values in reader:
                if values:
                    yield f"line {line}", _row_of(names, values, line)
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"line {line}: {error} (values are separated by {delimiter!r}); a text that begins with a quote must "
                "end with one, and quotes in it are written twice"
            ) from error


def _header(names: list[str]) -> list[str]:
    if wrong := [name for name in names if names.count(name) > 1 or name != name.strip()]:
        raise DataError(f"line 1: every name must stand once and without spaces around it, but {wrong[0]!r} does not")
    return names


def _row_of(names: list[str], values: list[str], line: int) -> dict[str, str]:
    if len(values) > len(names):
        raise DataError(
            f"line {line} has more values than the first line has names, {len(values)} and {len(names)}; put texts "
            "in quotes that contain what separates values"
        )
    if [value.lstrip("\ufeff") for value in values] == names:
        raise DataError(f"line {line} repeats the first line; remove it")
    return dict(zip(names, values, strict=False))


def _read_parquet(path: Path) -> Placed:
    number = 0
    for batch in pq.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            yield f"row {number}", row
            number += 1


FORMATS: dict[str, Callable[[Path], Placed]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".jsonl.gz": _read_json,
    ".json.gz": _read_json,
    ".csv.gz": _read_table,
    ".tsv.gz": _read_table,
    ".parquet": _read_parquet,
}
