"""The files of an evaluation: its numbers, the answers, and one line per row, by which two models are compared.

``evaluation.json`` has ``rows``, ``metrics``, ``calibration`` and ``settings``; ``answers.jsonl`` a line per row and
answer, ``rows.jsonl`` a line per row. Rows are found by ``id``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srd_lightning.errors import DataError, MissingDataError
from srd_lightning.storage import write_atomically

NUMBERS, ANSWERS, ROWS = "evaluation.json", "answers.jsonl", "rows.jsonl"


def write_results(
    folder: Path,
    numbers: Mapping[str, Any],
    answers: Iterable[Mapping[str, Any]],
    rows: Iterable[Mapping[str, Any]],
) -> None:
    """Write the three files, the numbers last: where they are there, all is.

    Args:
        folder: Made if it does not exist.
        numbers: Of ``evaluation.json``.
        answers: Lines of ``answers.jsonl``.
        rows: Lines of ``rows.jsonl``.

    Raises:
        StorageError: They cannot be written.
    """
    for name, lines in ((ANSWERS, answers), (ROWS, rows)):
        text = "".join(json.dumps(dict(line), ensure_ascii=False) + "\n" for line in lines)
        write_atomically(folder / name, text.encode("utf-8", errors="backslashreplace"))
    write_atomically(folder / NUMBERS, json.dumps(dict(numbers), indent=2).encode())


def read_rows(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Return the lines of ``rows.jsonl`` by id.

    Args:
        folder: Of an evaluation, such as ``runs/a/evaluation``.

    Raises:
        MissingDataError: There is none.
    """
    path = Path(folder) / ROWS
    if not path.is_file():
        raise MissingDataError(f"{path} is not there; srd evaluate writes it")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["id"]: row for row in rows}


def paired_values(first: str | Path, second: str | Path, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a measure of two evaluations on the same rows, as `paired_difference` takes it.

    Args:
        first: Folder of one evaluation.
        second: Folder of the other.
        name: Of the measure, such as ``greedy_rouge_l``.

    Returns:
        ``[N]`` of each, in the order of the first.

    Raises:
        DataError: They are of other rows, or one of them lacks the measure.
    """
    one, other = read_rows(first), read_rows(second)
    if different := one.keys() ^ other.keys():
        raise DataError(
            f"{first} and {second} are of other rows, {len(different)} stand in one of them only, such as "
            f"{min(different)!r}; evaluate both on the same rows"
        )
    for folder, rows in ((first, one), (second, other)):
        if lacking := [row_id for row_id, row in rows.items() if name not in row]:
            has = ", ".join(key for key in rows[lacking[0]] if key != "id")
            raise DataError(f"the rows of {folder} have no {name!r}; they have {has}")
    values = ([rows[row_id][name] for row_id in one] for rows in (one, other))
    a, b = (np.array(column, dtype=np.float64) for column in values)
    return a, b
