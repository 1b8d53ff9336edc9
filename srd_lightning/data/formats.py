"""The forms of file that rows stand in, each read as the characters that stand there.

A reader yields where a row stands ("line 7") and the row. Numbers of JSON stay as they are written; a value that could
be read in two ways (a field that stands twice, a quote that is never closed) is refused with its line.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from srd_lightning.data.fields import TEXT_FIELDS, TURNS_FIELDS
from srd_lightning.errors import DataError, MissingDataError, SRDError, in_one_line

Placed = Iterator[tuple[str, Any]]
"""Where a row stands in its file, and the row."""
ROW_FIELDS = TEXT_FIELDS.union(TURNS_FIELDS)


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
    with _blamed(path):
        for place, row in _reader(path)(path):
            if not isinstance(row, dict):
                raise DataError(f"{place} must have named fields, but is {_shown(row)}")
            yield f"{path} {place}", row


def names_in(path: Path) -> Iterable[str]:
    """Return the names of the fields in a file, reading as little of it as its form allows."""
    if _reader(path) is _read_json:
        return dict.fromkeys(name for _, row in read(path) for name in row)
    with _blamed(path):
        if _reader(path) is _read_parquet:
            return list(pq.read_schema(path).names)
        with _open(path, newline="") as file:
            return _header(next(csv.reader(file, delimiter=_delimiter(path)), []))


def _reader(path: Path) -> Callable[[Path], Placed]:
    return FORMATS[form_of(path) or ""]


@contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """Say of everything that may be wrong with a file which file it is."""
    try:
        yield
    except SRDError as error:
        raise type(error)(f"{path} {error}") from error.__cause__
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.object[error.start]:#x}); save it as UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked, it is cut or no gzip file: {error}") from error
    except (pa.ArrowInvalid, OSError, RecursionError) as error:
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
    position, number = len(text) - len(text.lstrip()), 0
    while position < len(text):
        try:
            value, position = DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"line {error.lineno} is not JSON: {error.msg} at character {error.colno}") from error
        rows = _contained(value)
        for row in [value] if rows is None else rows:
            yield f"row {number}", row
            number += 1
        position += len(text[position:]) - len(text[position:].lstrip())


def _contained(value: Any) -> list[Any] | None:
    """Return the rows of a value that holds several."""
    if isinstance(value, dict) and value.keys().isdisjoint(ROW_FIELDS):
        value = value.get("data")
    return value if isinstance(value, list) else None


def delimiter_of(path: Path) -> str:
    """Return what separates the values of a table: what stands most often in its first line, else a comma."""
    with _blamed(path):
        return _delimiter(path) if _reader(path) is _read_table else ","


def _delimiter(path: Path) -> str:
    if (form_of(path) or "").startswith(".tsv"):
        return "\t"
    with _open(path, newline="") as file:
        header = file.readline()
    return max(",;\t|", key=lambda mark: header.count(mark))


def _read_table(path: Path) -> Placed:
    csv.field_size_limit(2**31 - 1)  # the module refuses texts over 128 KiB
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
