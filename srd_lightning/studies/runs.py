"""A run as a report shows it: its name and folder, and what is asked of its files."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from srd_lightning.errors import DataError, MissingDataError, StorageError
from srd_lightning.studies.cell_run import RECORD
from srd_lightning.studies.curves import Curve, last_tested, read_curves
from srd_lightning.studies.run_files import evaluation_metrics, evaluations, read_json, read_lines

TRACES = ("**/metrics.csv", "**/config.yaml", "runtime.json", RECORD, "evaluation/**/evaluation.json", "scores/*")
"""What a run leaves in its folder: where none of it is, there was no run."""


@dataclass(frozen=True)
class Run:
    """A run.

    Args:
        name: By which the report calls it.
        arm: Whose curve it belongs to: of a study the arm, else the name.
        folder: Its ``default_root_dir``.
    """

    name: str
    arm: str
    folder: Path

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """What a study has written down of it, else nothing: ``commands``, ``versions``, ``hardware``."""
        return read_json(self.folder / RECORD) or {}

    @functools.cached_property
    def runtime(self) -> dict[str, Any]:
        """What `RuntimeBenchmark` has measured, else nothing."""
        return read_json(self.folder / "runtime.json") or {}

    @functools.cached_property
    def curves(self) -> dict[str, Curve]:
        """By measure."""
        return read_curves(self.folder)

    @functools.cached_property
    def metrics(self) -> dict[str, dict[str, float]]:
        """What was measured last on held-out rows: ``mean``, of an evaluation with ``low``, ``high`` and ``sd``."""
        validated = {name: curve.values[-1] for name, curve in self.curves.items() if name.startswith("val_")}
        plain = {**validated, **last_tested(self.folder)}
        return {**{name: {"mean": float(value)} for name, value in plain.items()}, **evaluation_metrics(self.folder)}

    @functools.cached_property
    def settings(self) -> dict[str, str]:
        """By name, as they were saved when it was trained; the folder of the run is ``{run}`` in them."""
        saved = sorted(self.folder.rglob("config.yaml"), key=lambda path: (path.stat().st_mtime, path))
        trained = [path for path in saved if (path.parent / "metrics.csv").exists()] or saved
        if not trained:
            return {}
        try:
            tree = yaml.safe_load(trained[0].read_text())
        except yaml.YAMLError as error:
            raise StorageError(f"{trained[0]} cannot be read ({error}); it is not what srd writes") from error
        here = (str(self.folder.resolve()), str(self.folder))
        return {name: str(value).replace(here[0], "{run}").replace(here[1], "{run}") for name, value in _flat(tree)}

    @functools.cached_property
    def scores(self) -> Scores | None:
        """What the curation went by, where it can be found."""
        shared = Path(self.settings.get("data.scores", "").replace("{run}", str(self.folder)))
        own = sorted(path.parent for path in (self.folder / "scores").rglob("*.parquet"))
        folder = shared if shared.is_dir() and shared != Path() else next(iter(own), None)
        return None if folder is None else read_scores(folder)

    def answers(self) -> dict[str, dict[str, Any]]:
        """Return the greedy answers, or where there are none the first ones, by set and row id."""
        found: dict[str, dict[str, Any]] = {}
        for of_set, folder in evaluations(self.folder).items():
            for answer in read_lines(folder / "answers.jsonl"):
                key = f"{of_set}{answer['id']}"
                if key not in found or answer["seed"] is None:
                    found[key] = answer
        return found


@dataclass(frozen=True)
class Scores:
    """Scores of rows.

    Args:
        folder: Where they are.
        columns: By criterion ``[rows]``.
        stages: Of each row, -1 of dropped ones ``[rows]``; nothing where no curation was shown.
    """

    folder: Path
    columns: Mapping[str, np.ndarray[Any, Any]]
    stages: np.ndarray[Any, Any] | None


def read_scores(folder: Path) -> Scores | None:
    """Return the scores in a folder of them; nothing where there are none.

    Raises:
        StorageError: They cannot be read.
    """
    ranking = folder / "ranking.parquet"
    paths = [ranking] if ranking.exists() else sorted(folder.glob("part-*.parquet"))
    if not paths:
        return None
    try:
        table = pa.concat_tables(map(pq.read_table, paths), promote_options="default")
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"the scores in {folder} cannot be read ({error})") from error
    numbers = {name: table[name].to_numpy() for name in table.column_names if name not in ("id", "answer", "position")}
    return Scores(folder, numbers, numbers.pop("stage", None))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs in folders, of a study those of its cells.

    Raises:
        MissingDataError: A folder is not there.
        DataError: It holds no run.
    """
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise MissingDataError(
                f"there is no folder {folder}; name the default_root_dir of a run, or a study's folder"
            )
        cells = sorted(filter(_is_run, folder.glob("cells/*/seed-*")))
        if cells:
            found += [
                Run(f"{cell.parent.name}, {cell.name.replace('-', ' ')}", cell.parent.name, cell) for cell in cells
            ]
        elif _is_run(folder):
            found.append(Run(folder.name, folder.name, folder))
        else:
            raise DataError(
                f"{folder} is no run: it has neither logs nor settings, runtime.json, scores or an evaluation; name "
                "the default_root_dir of a run"
            )
    names = [run.name for run in found]
    return [run if names.count(run.name) == 1 else _with_path(run) for run in found]


def _is_run(folder: Path) -> bool:
    return any(next(folder.glob(trace), None) for trace in TRACES)


def _with_path(run: Run) -> Run:
    return Run(str(run.folder), str(run.folder), run.folder)


def _flat(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of settings by their names."""
    branches: list[tuple[Any, Any]] = []
    if isinstance(tree, dict):
        branches = list(tree.items())
    elif isinstance(tree, list) and any(isinstance(item, dict | list) for item in tree):
        branches = list(enumerate(tree))
    if not branches:
        yield name, tree
    for key, value in branches:
        yield from _flat(value, f"{name}.{key}" if name else str(key))
