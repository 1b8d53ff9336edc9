"""``srd report``: what runs have written, side by side, as one HTML page that needs nothing else."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from srd_lightning.storage import write_atomically
from srd_lightning.studies import plots
from srd_lightning.studies.curves import Axis, is_quality
from srd_lightning.studies.run_files import read_json
from srd_lightning.studies.runs import Run, Scores
from srd_lightning.studies.summary import HEADERS, Outcome, cells

SHOWN_ANSWERS = 12
GIB = 2**30


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Args:
        caption: Says what it shows.
        headers: Of its columns.
        rows: Of texts, the first of which heads its row.
    """

    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A picture of a page, with what it shows in words."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        title: Its heading.
        lines: Sentences, among them those of what is not there.
        tables: Beneath them.
        pictures: Beneath these.
        legend: What colours and dashes stand for.
        answers: Rows with the answers of the runs.
    """

    title: str
    lines: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    legend: Mapping[str, plots.Look] = field(default_factory=dict)
    answers: Sequence[Mapping[str, Any]] = ()

    @property
    def anchor(self) -> str:
        """By which links find it."""
        return self.title.lower().replace(" ", "-")


def write_report(runs: Sequence[Run], folders: Sequence[Path], path: Path) -> None:
    """Write the page.

    Args:
        runs: That are shown.
        folders: By which they were named; where one is a study, its summary is shown.
        path: The file.

    Raises:
        StorageError: A file of a run cannot be read, or the page not be written.
    """
    environment = Environment(
        loader=PackageLoader("srd_lightning.studies"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html").render(
        title=", ".join(folder.resolve().name for folder in folders),
        written=f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
        sections=sections(runs, folders),
    )
    write_atomically(path, page.encode("utf-8", errors="backslashreplace"))


def sections(runs: Sequence[Run], folders: Sequence[Path]) -> list[Section]:
    """Return all parts of a page."""
    return [
        compared(runs, folders),
        quality(runs),
        training(runs),
        times(runs),
        memory(runs),
        curation(runs),
        answers(runs),
        settings(runs),
        versions(runs),
    ]


def compared(runs: Sequence[Run], folders: Sequence[Path]) -> Section:
    """All runs in one table, and the summaries of studies."""
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    rows = [[run.name, *(_with_interval(run.metrics.get(name)) for name in names)] for run in runs]
    tables = [Table("last values on held-out rows, with 95 % intervals where they are known", ["run", *names], rows)]
    for folder in folders:
        if summary := read_json(folder / "summary.json"):
            outcomes = [Outcome(**outcome) for outcome in summary["outcomes"]]
            caption = f"{folder.name}: means over seeds; differences from {summary['baseline']}, paired by row and seed"
            tables.append(Table(caption, HEADERS, [[outcome.measure, *cells(outcome)] for outcome in outcomes]))
    lacking = [run.name for run in runs if not any("low" in value for value in run.metrics.values())]
    return Section("Runs compared", _without(lacking, "evaluation (srd evaluate writes it)"), tables)


def quality(runs: Sequence[Run]) -> Section:
    """Held-out measures over steps, over seconds, and at the end against what training took."""
    by_arm, looks = _by_arm(runs), _looks(runs)
    curves = {
        arm: [{n: c for n, c in run.curves.items() if n.startswith("val_")} for run in of_arm]
        for arm, of_arm in by_arm.items()
    }
    pictures = _curve_pictures(curves)
    for name in dict.fromkeys(
        name for run in runs for name, value in run.metrics.items() if "low" in value and is_quality(name)
    ):
        points = [
            plots.Point(seconds, value["mean"], value.get("low"), value.get("high"), looks[run.arm])
            for run in runs
            if (value := run.metrics.get(name)) and (seconds := training_seconds(run)) is not None
        ]
        if points:
            caption = f"{name} against seconds of training, a point for each run; bars are 95 % intervals over rows"
            pictures.append(_picture(plots.draw_points(name, points), caption))
    lacking = [run.name for run in runs if not any(name.startswith("val_") for name in run.curves)]
    lines = _without(lacking, "validation in a metrics.csv (trainer.logger=CSVLogger, and a split validation)")
    untimed = [run.name for run in runs if run.curves and not _timed(run)]
    lines += _without(untimed, "seconds beside their measures (trainer.callbacks+=TrainingClock)")
    return Section("Quality against time", lines, pictures=pictures, legend=looks)


def training(runs: Sequence[Run]) -> Section:
    """Losses of the training."""
    curves = {
        arm: [{n: c for n, c in run.curves.items() if n.startswith("train_")} for run in of_arm]
        for arm, of_arm in _by_arm(runs).items()
    }
    lacking = [run.name for run in runs if not any(name.startswith("train_") for name in run.curves)]
    lines = _without(lacking, "losses in a metrics.csv (trainer.logger=CSVLogger, log_every_n_steps)")
    return Section("Training", lines, pictures=_curve_pictures(curves), legend=_looks(runs))


def times(runs: Sequence[Run]) -> Section:
    """Where the time went."""
    parts = {run.name: found for run in runs if (found := time_parts(run))}
    names = list(dict.fromkeys(name for found in parts.values() for name in found))
    rows = [
        [run, *(_seconds(found.get(name)) for name in names), _seconds(sum(found.values()))]
        for run, found in parts.items()
    ]
    tables = [Table("seconds of a run by part", ["run", *names, "sum"], rows)] if rows else []
    stages = [
        [run.name, str(number), *(_number(stage.get(key)) for key in STAGE)]
        for run in runs
        for number, stage in enumerate(run.runtime.get("stages", []))
    ]
    if stages:
        tables.append(Table("stages", ["run", "stage", *(name.replace("_", " ") for name in STAGE)], stages))
    joules = [
        [run.name, of, f"{value:,.0f}"] for run in runs for of, value in run.runtime.get("energy_joules", {}).items()
    ]
    if joules:
        tables.append(Table("energy of the training", ["run", "of", "joules"], joules))
    commands = [
        [run.name, command["command"], _seconds(command["seconds"]), _seconds(command["processor_seconds"])]
        for run in runs
        for command in run.record.get("commands", [])
    ]
    if commands:
        tables.append(
            Table("commands of a study, from start to end", ["run", "srd", "seconds", "processor seconds"], commands)
        )
    lacking = [run.name for run in runs if run.name not in parts]
    figure = (
        _picture(plots.draw_bars(parts, "seconds"), "seconds of each run by part, as in the table") if parts else None
    )
    legend = {name: plots.Look(place) for place, name in enumerate(names)}
    lines = _without(lacking, "runtime.json (RuntimeBenchmark(path=...) writes it)")
    return Section("Where the time went", lines, tables, [figure] if figure else [], legend)


STAGE = (
    *("first_epoch", "rows", "steps", "tokens", "padding", "seconds"),
    *("rows_per_second", "response_tokens_per_second", "positions_per_second", "mfu"),
)


def time_parts(run: Run) -> dict[str, float]:
    """Return the seconds of a run by part, from what `RuntimeBenchmark` has measured."""
    runtime = run.runtime
    if "parts" in runtime:
        return _worth_showing({name.replace("_", " "): seconds for name, seconds in runtime["parts"].items()})
    found = {"curation": (runtime.get("curation") or {}).get("seconds", 0.0)}  # as earlier versions wrote it
    for stage in runtime.get("stages", []):
        own = {key: value for key, value in stage.items() if key.endswith("_seconds")}
        for name, seconds in {**own, "steps_seconds": stage["seconds"] - sum(own.values())}.items():
            label = name.removesuffix("_seconds").replace("_", " ")
            found[label] = found.get(label, 0.0) + seconds
    for name, value in runtime.items():
        if name.endswith("_seconds") and isinstance(value, int | float):
            found[name.removesuffix("_seconds").replace("_", " ")] = value
    return _worth_showing(found)


def _worth_showing(parts: Mapping[str, float]) -> dict[str, float]:
    total = sum(parts.values())
    return {name: seconds for name, seconds in parts.items() if seconds > 0.001 * total}


def memory(runs: Sequence[Run]) -> Section:
    """How much memory was taken at most."""
    rows = []
    for run in runs:
        measured = {name: value for name, value in run.runtime.items() if name.endswith("_bytes")}
        own = [(name.replace("_", " ").removesuffix(" bytes"), value) for name, value in measured.items()]
        own += [
            (f"srd {command['command']}", command["peak_memory_bytes"]) for command in run.record.get("commands", [])
        ]
        rows += [[run.name, name, f"{value / GIB:.2f}"] for name, value in own if value is not None]
    known = {row[0] for row in rows}
    lines = _without([run.name for run in runs if run.name not in known], "runtime.json (RuntimeBenchmark(path=...))")
    table = Table("GiB at most: of the run's device, and of the processes of a command", ["run", "of", "GiB"], rows)
    return Section("Memory", lines, [table] if rows else [])


def curation(runs: Sequence[Run]) -> Section:
    """What the student scored, and which rows were kept."""
    kept = [
        [run.name, *(_number(found.get(key)) for key in ("rows", "kept", "scored", "seconds"))]
        for run in runs
        if (found := run.runtime.get("curation"))
    ]
    tables = [
        Table(
            "rows that were ranked, kept, and scored in this run", ["run", "ranked", "kept", "scored", "seconds"], kept
        )
    ]
    pictures = []
    for scores, of in _scores(runs):
        for name, values in scores.columns.items():
            caption = f"{name} of {len(values):,} rows, as the student of {of} answered them before it was trained"
            pictures.append(_picture(plots.draw_histogram(name, values, scores.stages), caption))
    lines = _without(
        [run.name for run in runs if run.scores is None], "scores (rows that are all trained on need none)"
    )
    if any(scores.stages is None for scores, _ in _scores(runs)):
        lines.append(
            "Where histograms are of one colour, srd curate with the run's settings adds which rows each stage has."
        )
    return Section("Curation", lines, tables if kept else [], pictures)


def answers(runs: Sequence[Run]) -> Section:
    """Answers of all runs, or of the first one of each arm, to the same rows."""
    of_runs = {of_arm[0].arm: found for of_arm in _by_arm(runs).values() if (found := of_arm[0].answers())}
    lacking = [run.name for run in runs if run.arm not in of_runs]
    shared = list(dict.fromkeys(key for found in of_runs.values() for key in found))
    chosen = (
        [shared[place] for place in np.unique(np.linspace(0, len(shared) - 1, SHOWN_ANSWERS).astype(int))]
        if shared
        else []
    )
    rows = []
    for key in chosen:
        texts = {arm: found[key] for arm, found in of_runs.items() if key in found}
        first = next(iter(texts.values()))
        rows.append({"id": key, "prompt": first["prompt"], "reference": first["reference"], "answers": texts})
    lines = [f"{len(rows)} of {len(shared)} rows, evenly spaced; greedy answers where there are any."] if rows else []
    return Section(
        "Answers side by side", [*lines, *_without(lacking, "answers (srd evaluate writes them)")], answers=rows
    )


def settings(runs: Sequence[Run]) -> Section:
    """In what settings the runs differ, and all of the first one's."""
    known = [run for run in runs if run.settings]
    names = dict.fromkeys(name for run in known for name in run.settings)
    differ = [name for name in names if len({run.settings.get(name) for run in known}) > 1]
    tables = []
    if differ:
        rows = [[name, *(run.settings.get(name, "") for run in known)] for name in differ]
        tables.append(Table("settings in which runs differ", ["setting", *(run.name for run in known)], rows))
    if known:
        tables.append(Table(f"all settings of {known[0].name}", ["setting", "value"], list(known[0].settings.items())))
    return Section("Settings", _without([run.name for run in runs if not run.settings], "config.yaml"), tables)


def versions(runs: Sequence[Run]) -> Section:
    """With what the runs were made."""
    found = {run.name: {**run.record.get("versions", {}), **run.record.get("hardware", {})} for run in runs}
    found = {name: value for name, value in found.items() if value}
    names = dict.fromkeys(name for value in found.values() for name in value)
    rows = [[run, *(_text(value.get(name, "")) for name in names)] for run, value in found.items()]
    lines = _without([run.name for run in runs if run.name not in found], "versions (srd study writes them down)")
    return Section(
        "Versions and hardware", lines, [Table("versions and hardware", ["run", *names], rows)] if rows else []
    )


def training_seconds(run: Run) -> float | None:
    """Return how long a run was trained: by its clock, else by its stages."""
    if _timed(run):
        return float(max(np.nanmax(curve.seconds) for curve in run.curves.values() if np.isfinite(curve.seconds).any()))
    stages = run.runtime.get("stages")
    return sum(stage["seconds"] for stage in stages) if stages else None


def _timed(run: Run) -> bool:
    return any(np.isfinite(curve.seconds).any() for curve in run.curves.values())


def _by_arm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.arm, []).append(run)
    return found


def _looks(runs: Sequence[Run]) -> dict[str, plots.Look]:
    return {arm: plots.Look(place) for place, arm in enumerate(_by_arm(runs))}


def _scores(runs: Sequence[Run]) -> list[tuple[Scores, str]]:
    """Return the scores of all runs, those that runs share once, with the names of the runs."""
    found: dict[Path, tuple[Scores, list[str]]] = {}
    for run in runs:
        if run.scores is not None:
            found.setdefault(run.scores.folder, (run.scores, []))[1].append(run.name)
    return [(scores, _some(names)) for scores, names in found.values()]


def _curve_pictures(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Picture]:
    found = []
    names = dict.fromkeys(name for of_arm in curves.values() for run in of_arm for name in run)
    for name in names:
        for axis in get_args(Axis):
            known = (run[name] for of_arm in curves.values() for run in of_arm if name in run)
            if any(np.isfinite(curve.axis(axis)).all() for curve in known):
                figure = plots.draw_curve(name, axis, curves)
                found.append(_picture(figure, f"{name} over {plots.AXIS_LABELS[axis]}"))
    return found


def _picture(figure: Any, caption: str) -> Picture:
    return Picture(Markup(plots.as_svg(figure, caption)), caption)  # which escapes texts


def _without(names: Sequence[str], what: str) -> list[str]:
    """Return a sentence about what some runs lack; none if they do not."""
    return [f"Without {what}: {_some(names)}."] if names else []


def _some(names: Sequence[str]) -> str:
    return "; ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _with_interval(value: Mapping[str, float] | None) -> str:
    if value is None:
        return ""
    bounds = f" ({value['low']:.4g} – {value['high']:.4g})" if value.get("low") is not None else ""
    return f"{value['mean']:.4g}{bounds}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
