"""What a run has left in its folder, as far as it is there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from srd_lightning.errors import StorageError
from srd_lightning.studies.curves import last_tested, read_curves

EVALUATION = "evaluation"


def read_json(path: Path) -> Any | None:
    """Return what a JSON file holds, nothing where there is none.

    Raises:
        StorageError: It cannot be read.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read ({error}); delete it, or write it anew") from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a JSON Lines file, none where there is none.

    Raises:
        StorageError: It cannot be read.
    """
    if not path.is_file():
        return
    try:
        with path.open() as file:
            yield from map(json.loads, file)
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read ({error}); delete it, or write it anew") from error


def evaluation_metrics(folder: Path) -> dict[str, dict[str, float]]:
    """Return what ``srd evaluate`` measured: by metric its ``mean``, and what else is known of it."""
    found = read_json(folder / EVALUATION / "evaluation.json") or {}
    return {name: value for name, value in found.get("metrics", {}).items() if isinstance(value.get("mean"), float)}


def last_metrics(folder: Path) -> dict[str, float]:
    """Return the last value of everything that was measured on held-out rows: validated, tested, evaluated."""
    curves = {name: float(curve.values[-1]) for name, curve in read_curves(folder).items() if name.startswith("val_")}
    evaluated = {name: value["mean"] for name, value in evaluation_metrics(folder).items()}
    return {**curves, **last_tested(folder), **evaluated}


def row_values(folder: Path) -> dict[str, dict[str, float]]:
    """Return what ``srd evaluate`` measured of each row: by metric, by row id.

    ``rouge_l`` is the mean over a row's sampled answers, ``greedy_rouge_l`` that of its greedy one.
    """
    found: dict[str, dict[str, float]] = {}
    for row in read_lines(folder / EVALUATION / "rows.jsonl"):
        for name, value in row.items():
            if name != "id" and isinstance(value, int | float):
                found.setdefault(name, {})[row["id"]] = float(value)
    of_answers: dict[str, dict[str, list[float]]] = {}
    for answer in read_lines(folder / EVALUATION / "answers.jsonl"):
        name = "greedy_rouge_l" if answer["seed"] is None else "rouge_l"
        of_answers.setdefault(name, {}).setdefault(answer["id"], []).append(answer["rouge_l"])
    means = {
        name: {row: sum(values) / len(values) for row, values in rows.items()} for name, rows in of_answers.items()
    }
    return {**found, **means}
