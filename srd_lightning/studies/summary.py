"""A study in numbers: each measure of each arm, over seeds, and its difference from the baseline with an interval."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Column, Table

from srd_lightning.storage import write_atomically
from srd_lightning.studies.curves import Axis, Curve, higher_is_better, read_curves
from srd_lightning.studies.intervals import paired_interval
from srd_lightning.studies.plan import Study
from srd_lightning.studies.plots import as_png, draw_curves
from srd_lightning.studies.run_files import row_values

HEADERS = ["measure", "arm", "seeds", "mean", "sd", "difference", "95 %"]
TOKENS = "response_tokens"
OVER_TOKENS = ("nll", "accuracy", "kl", "top1")
"""Measures of ``srd evaluate`` that are means over the tokens of reference responses."""
UNIT: dict[Axis, str] = {"steps": "steps", "seconds": "s"}


@dataclass(frozen=True)
class Outcome:
    """A measure of an arm.

    Args:
        measure: What was measured.
        arm: Of which arm.
        seeds: Of how many seeds it is known.
        mean: Over these.
        sd: Standard deviation over these; nothing of a single one.
        difference: Mean of what the arm has more than the baseline with the same seed, on the same rows; nothing of
            the baseline, and where no seed has both.
        low: Lower bound of the difference's 95 % interval, see `paired_interval`.
        high: Upper bound.
        rows: That were paired; 0 where whole runs were.
    """

    measure: str
    arm: str
    seeds: int
    mean: float
    sd: float | None
    difference: float | None
    low: float | None
    high: float | None
    rows: int


@dataclass(frozen=True)
class Runs:
    """The finished runs of a study.

    Args:
        results: Lines of ``results.jsonl``.
        folder: Of the study.
        baseline: The arm that others are compared with.
        reach: Values of measures that runs are to reach, as in `Study`.
    """

    results: Sequence[Mapping[str, Any]]
    folder: Path
    baseline: str
    reach: Mapping[str, float]

    def curves(self) -> dict[str, dict[int, dict[str, Curve]]]:
        """Return the curves of held-out measures: by arm, seed and measure."""
        found: dict[str, dict[int, dict[str, Curve]]] = {}
        for result in self.results:
            curves = read_curves(self.folder / result["folder"])
            found.setdefault(result["arm"], {})[result["seed"]] = {
                name: curve for name, curve in curves.items() if name.startswith("val_")
            }
        return found


def summarize(runs: Runs) -> list[Outcome]:
    """Return all measures of all arms, measure by measure."""
    of_rows = {(result["arm"], result["seed"]): row_values(runs.folder / result["folder"]) for result in runs.results}
    numbers = {(result["arm"], result["seed"]): dict(result["metrics"]) for result in runs.results}
    for key, more in numbers_of_curves(runs.curves(), runs.baseline, runs.reach).items():
        numbers[key] |= more
    for result in runs.results:
        numbers[result["arm"], result["seed"]] |= _costs(result["commands"])
    measures = dict.fromkeys(name for found in numbers.values() for name in found)
    arms = dict.fromkeys(arm for arm, _ in numbers)
    outcomes = []
    for measure in measures:
        for arm in arms:
            values = {seed: found[measure] for (of, seed), found in numbers.items() if of == arm and measure in found}
            if values:
                outcomes.append(_outcome(measure, arm, values, numbers, of_rows, runs.baseline))
    return outcomes


def _costs(commands: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found = {}
    for command in commands:
        name = command["command"]
        found[f"{name}: s"] = command["seconds"]
        found[f"{name}: processor s"] = command["processor_seconds"]
        found[f"{name}: peak GiB"] = command["peak_memory_bytes"] / 2**30
    return found


Key = tuple[str, int]


def _outcome(
    measure: str,
    arm: str,
    values: Mapping[int, float],
    numbers: Mapping[Key, Mapping[str, float]],
    of_rows: Mapping[Key, Mapping[str, Mapping[str, float]]],
    baseline: str,
) -> Outcome:
    """Return what a measure of an arm is, and how it differs from the baseline's."""
    mean = statistics.fmean(values.values())
    sd = statistics.stdev(values.values()) if len(values) > 1 else None
    shared = [seed for seed in values if measure in numbers.get((baseline, seed), {})]
    if arm == baseline or not shared:
        return Outcome(measure, arm, len(values), mean, sd, None, None, None, 0)
    pairs = [(of_rows[arm, seed].get(measure, {}), of_rows[baseline, seed].get(measure, {})) for seed in shared]
    rows = sorted(set.intersection(*(own.keys() & other.keys() for own, other in pairs)))
    weights = None
    if rows:
        differences = np.array([[own[row] - other[row] for row in rows] for own, other in pairs])
        of_set, _, name = measure.rpartition(": ")
        tokens = of_rows[arm, shared[0]].get(f"{of_set}: {TOKENS}" if of_set else TOKENS)
        if name in OVER_TOKENS and tokens is not None:
            weights = np.array([tokens[row] for row in rows])
    else:
        differences = np.array([[values[seed] - numbers[baseline, seed][measure]] for seed in shared])
    difference = float(np.average(differences.mean(0), weights=weights))
    low, high = paired_interval(differences, weights) or (None, None)
    return Outcome(measure, arm, len(values), mean, sd, difference, low, high, len(rows))


def numbers_of_curves(
    curves: Mapping[str, Mapping[int, Mapping[str, Curve]]], baseline: str, reach: Mapping[str, float]
) -> dict[Key, dict[str, float]]:
    """Return what curves say at equal steps, at equal seconds, and of the seconds until a value is reached.

    Args:
        curves: By arm, seed and measure.
        baseline: Where it ends is to be reached by default.
        reach: Values to be reached instead, by measure.

    Returns:
        By arm and seed, numbers by what they are.
    """
    every = [found for seeds in curves.values() for found in seeds.values()]
    found: dict[Key, dict[str, float]] = {(arm, seed): {} for arm, seeds in curves.items() for seed in seeds}
    for measure in dict.fromkeys(name for of_run in every for name in of_run):
        all_of_it = [of_run[measure] for of_run in every if measure in of_run]
        ends = [of_run[measure].values[-1] for of_run in curves.get(baseline, {}).values() if measure in of_run]
        goal = reach.get(measure, float(np.mean(ends)) if ends else None)
        for (arm, seed), numbers in found.items():
            curve = curves[arm][seed].get(measure)
            if curve is None:
                continue
            for axis, unit in UNIT.items():
                end = min(other.axis(axis)[-1] for other in all_of_it)
                if (value := curve.at(end, axis)) is not None:
                    numbers[f"{measure} at {end:.4g} {unit}"] = value
                if goal is None or np.isnan(end):
                    continue
                if (place := curve.reaches(goal, axis, higher_is_better(measure))) is not None:
                    numbers[f"{unit} until {measure} {goal:.4g}"] = place
    return found


def rich_table(outcomes: Sequence[Outcome], baseline: str) -> Table:
    """Return the outcomes as a table for a terminal."""
    headers = [
        Column(name, justify="left" if name in ("measure", "arm") else "right", no_wrap=name != "measure")
        for name in HEADERS
    ]
    table = Table(*headers, caption=f"difference from {baseline}, and its 95 % interval")
    measure = None
    for outcome in outcomes:
        if measure not in (None, outcome.measure):
            table.add_section()
        table.add_row(outcome.measure if outcome.measure != measure else "", *cells(outcome))
        measure = outcome.measure
    return table


def markdown_table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a table in Markdown."""
    lines = [HEADERS, ["---", "---", *["--:"] * 5]]
    lines += [[outcome.measure, *cells(outcome)] for outcome in outcomes]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cells(outcome: Outcome) -> list[str]:
    """Return what stands in the columns after the measure."""
    difference = "" if outcome.difference is None else f"{outcome.difference:+.3g}"
    interval = "" if outcome.low is None else f"{outcome.low:+.3g} to {outcome.high:+.3g}"
    sd = "" if outcome.sd is None else f"{outcome.sd:.2g}"
    return [outcome.arm, str(outcome.seeds), f"{outcome.mean:.4g}", sd, difference, interval]


def write_summary(study: Study, runs: Runs) -> list[Outcome]:
    """Write ``summary.json``, ``summary.md`` and, where there are curves, ``summary.png`` into the study's folder."""
    outcomes, baseline = summarize(runs), study.baseline_arm
    found = {"baseline": baseline, "outcomes": [asdict(outcome) for outcome in outcomes]}
    write_atomically(runs.folder / "summary.json", json.dumps(found, indent=1).encode())
    curves = {arm: list(seeds.values()) for arm, seeds in runs.curves().items()}
    figure = draw_curves(curves)
    picture = "" if figure is None else "![Held-out measures over steps and seconds](summary.png)\n\n"
    text = f"# {runs.folder.name}\n\n{picture}Differences are from {baseline}.\n\n{markdown_table(outcomes)}"
    write_atomically(runs.folder / "summary.md", text.encode())
    if figure is not None:
        write_atomically(runs.folder / "summary.png", as_png(figure))
    return outcomes
