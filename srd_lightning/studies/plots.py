"""Pictures of runs, for a file (PNG) or within a page (SVG that takes the page's colour of text)."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, get_args

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from srd_lightning.studies.curves import Axis, Curve

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which can be told apart whatever colours one sees; then dashed, and so on."""
DASHES = ("solid", "dashed", "dotted")
INK = "#102030"
"""Of text and axes; in a page its colour of text takes the place of it."""
STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 11,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "legend.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-3, 5),
}
AXIS_LABELS: dict[Axis, str] = {"steps": "steps", "seconds": "seconds of training"}
SIZE = (4.6, 3.1)
"""Inches of a picture within a page, where it is as wide as there is room."""


@dataclass(frozen=True)
class Look:
    """How something is drawn wherever it is.

    Args:
        place: Its number.
    """

    place: int

    @property
    def colour(self) -> str:
        """As ``#rrggbb``."""
        return COLOURS[self.place % len(COLOURS)]

    @property
    def dash(self) -> str:
        """In the words of CSS, which are matplotlib's too."""
        return DASHES[self.place // len(COLOURS) % len(DASHES)]


def draw_curves(runs: Mapping[str, Sequence[Mapping[str, Curve]]]) -> Figure | None:
    """Draw each measure over steps, and over seconds where they are known.

    Args:
        runs: Curves by measure, of each run of an arm, by arm. A thin line is a run; where an arm has several, a thick
            one is their mean.

    Returns:
        The picture; nothing where there are no curves.
    """
    every = [run for of_arm in runs.values() for run in of_arm]
    measures = list(dict.fromkeys(name for run in every for name in run))
    if not measures:
        return None
    timed = any(np.isfinite(curve.seconds).any() for run in every for curve in run.values())
    axes: list[Axis] = [axis for axis in get_args(Axis) if axis == "steps" or timed]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(axes), 2.9 * len(measures) + 0.5), dpi=120, layout="constrained")
        grid = figure.subplots(len(measures), len(axes), squeeze=False)
        for (row, measure), (column, axis) in itertools.product(enumerate(measures), enumerate(axes)):
            _draw_measure(grid[row, column], measure, axis, runs)
        if len(runs) > 1:
            labels = grid[0, 0].get_legend_handles_labels()
            figure.legend(*labels, loc="outside upper center", ncols=min(len(runs), 4), frameon=False)
        figure.draw_without_rendering()
    return figure


def draw_curve(measure: str, axis: Axis, runs: Mapping[str, Sequence[Mapping[str, Curve]]]) -> Figure:
    """Draw one measure over steps or seconds; see `draw_curves`."""
    figure, plot = _figure()
    with mpl.rc_context(STYLE):
        _draw_measure(plot, measure, axis, runs)
    return figure


def _figure(height: float = SIZE[1]) -> tuple[Figure, Axes]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0], height), layout="constrained")
        return figure, figure.subplots()


def _draw_measure(plot: Axes, measure: str, axis: Axis, runs: Mapping[str, Sequence[Mapping[str, Curve]]]) -> None:
    for place, (arm, of_arm) in enumerate(runs.items()):
        curves = [run[measure] for run in of_arm if measure in run and np.isfinite(run[measure].axis(axis)).all()]
        _draw_arm(plot, axis, curves, arm, Look(place))
    plot.set(xlabel=AXIS_LABELS[axis], ylabel=measure)
    plot.grid(alpha=0.25)


def _draw_arm(plot: Axes, axis: Axis, curves: Sequence[Curve], arm: str, look: Look) -> None:
    style: dict[str, Any] = {"color": look.colour, "linestyle": look.dash}
    alone = len(curves) == 1
    for curve in curves:
        plot.plot(
            *(curve.axis(axis), curve.values),
            marker="o" if len(curve.values) < 25 else "",
            markersize=3,
            linewidth=1.8 if alone else 0.8,
            alpha=1.0 if alone else 0.45,
            label=arm if alone else None,
            **style,
        )
    if not alone and curves:
        places = [curve.axis(axis) for curve in curves]
        grid = np.linspace(max(found[0] for found in places), min(found[-1] for found in places), 50)
        mean = np.mean([np.interp(grid, curve.axis(axis), curve.values) for curve in curves], axis=0)
        plot.plot(grid, mean, linewidth=2.2, label=arm, **style)


@dataclass(frozen=True)
class Point:
    """A run by what it took and what it gave.

    Args:
        seconds: That it took.
        value: Of a measure.
        low: Lower bound of its interval, if it has one.
        high: Upper bound.
        look: Of its arm.
    """

    seconds: float
    value: float
    low: float | None
    high: float | None
    look: Look


def draw_points(measure: str, points: Sequence[Point]) -> Figure:
    """Draw a measure of runs against the seconds of their training, with intervals where they are known."""
    figure, plot = _figure()
    for point in points:
        bars = (
            None if point.low is None or point.high is None else [[point.value - point.low], [point.high - point.value]]
        )
        marker = "os^"[point.look.place // len(COLOURS) % 3]
        plot.errorbar([point.seconds], [point.value], yerr=bars, fmt=marker, color=point.look.colour, capsize=3)
    plot.set(xlabel=AXIS_LABELS["seconds"], ylabel=measure)
    plot.set_xlim(left=0)
    plot.grid(alpha=0.25)
    return figure


def draw_histogram(name: str, values: np.ndarray[Any, Any], stages: np.ndarray[Any, Any] | None) -> Figure:
    """Draw how a criterion is distributed, by stage where stages are known."""
    figure, plot = _figure()
    values = np.clip(values, *np.nanquantile(values, [0.005, 0.995]))
    known = [] if stages is None else [stage for stage in (*sorted(set(stages) - {-1}), -1) if (stages == stage).any()]
    if stages is None or not known:
        plot.hist(values, bins=25, color=COLOURS[0])
    else:
        blues = mpl.colormaps["Blues_r"](np.linspace(0.1, 0.6, len(known)))
        colours = [COLOURS[1] if stage == -1 else blue for stage, blue in zip(known, blues, strict=True)]
        labels = ["dropped" if stage == -1 else f"stage {stage}" for stage in known]
        plot.hist([values[stages == stage] for stage in known], bins=25, stacked=True, color=colours, label=labels)
        figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    plot.set(xlabel=name, ylabel="rows")
    plot.locator_params(axis="y", integer=True)
    return figure


def draw_bars(parts: Mapping[str, Mapping[str, float]], unit: str) -> Figure:
    """Draw stacked bars, one for each run.

    Args:
        parts: By run, then by part.
        unit: Of the numbers.
    """
    figure, plot = _figure(1.3 + 0.38 * len(parts))
    names = list(dict.fromkeys(name for of_run in parts.values() for name in of_run))
    left = np.zeros(len(parts))
    for place, name in enumerate(names):
        widths = np.array([of_run.get(name, 0.0) for of_run in parts.values()])
        hatch = ("", "//", "..")[place // len(COLOURS) % 3]
        plot.barh(list(parts), widths, left=left, color=COLOURS[place % len(COLOURS)], hatch=hatch, label=name)
        left += widths
    plot.invert_yaxis()
    plot.set(xlabel=unit)
    return figure


def as_png(figure: Figure) -> bytes:
    """Return a picture for a file."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def as_svg(figure: Figure, label: str) -> str:
    """Return a picture for a page: no names of its own, no addresses, in the page's colour of text.

    Args:
        figure: The picture.
        label: What it shows, for who does not see it; also makes its inner names its own.
    """
    buffer = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": label}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(
        r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg role="img" aria-label="{escape(label)}" viewBox="\1">', svg
    )
    return svg.replace(INK, "currentColor")
