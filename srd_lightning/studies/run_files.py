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


def evaluations(folder: Path) -> dict[str, Path]:
    """Return the folders of what ``srd evaluate`` wrote, by what names of measures begin with: nothing, or the set."""
    found = sorted((folder / EVALUATION).rglob("evaluation.json"))
    return {"" if path.parent.name == EVALUATION else f"{path.parent.name}: ": path.parent for path in found}


def evaluation_metrics(folder: Path) -> dict[str, dict[str, float]]:
    """Return what ``srd evaluate`` measured: by measure its ``mean``, and ``sd``, ``low`` and ``high`` where known."""
    return {
        f"{of_set}{name}": value
        for of_set, path in evaluations(folder).items()
        for name, value in (read_json(path / "evaluation.json") or {}).get("metrics", {}).items()
        if value.get("mean") is not None
    }


def last_metrics(folder: Path) -> dict[str, float]:
    """Return the last value of everything that was measured on held-out rows: validated, tested, evaluated."""
    curves = {name: float(curve.values[-1]) for name, curve in read_curves(folder).items() if name.startswith("val_")}
    evaluated = {name: value["mean"] for name, value in evaluation_metrics(folder).items()}
    return {**curves, **last_tested(folder), **evaluated}


def row_values(folder: Path) -> dict[str, dict[str, float]]:
    """Return what ``srd evaluate`` measured of each row: by measure, by row id."""
    found: dict[str, dict[str, float]] = {}
    for of_set, path in evaluations(folder).items():
        for row in read_lines(path / "rows.jsonl"):
            for name, value in row.items():
                if name != "id" and value is not None:
                    found.setdefault(f"{of_set}{name}", {})[row["id"]] = float(value)
    return found
