"""Pictures of runs, for a file (PNG) or within a page (SVG that takes the page's colour of text)."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from srd_lightning.studies.curves import Axis, Curve

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which can be told apart whatever colours one sees; then dashed, and so on."""
DASHES = ("-", "--", ":", "-.")
INK = "#102030"
"""Of text and axes; in a page its colour of text takes the place of it."""
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "srd_lightning",
    "font.size": 11,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "legend.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
AXIS_LABELS: dict[Axis, str] = {"steps": "steps", "seconds": "seconds of training"}


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
    timed = any(np.isfinite(curve.seconds).any() for run in every for curve in run.values())
    axes: list[Axis] = [axis for axis in get_args(Axis) if axis == "steps" or timed]
    if not measures:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(axes), 2.9 * len(measures) + 0.5), dpi=120, layout="constrained")
        grid = figure.subplots(len(measures), len(axes), squeeze=False)
        for (row, measure), (column, axis) in itertools.product(enumerate(measures), enumerate(axes)):
            plot = grid[row, column]
            for place, (arm, of_arm) in enumerate(runs.items()):
                _draw_arm(plot, axis, [run[measure] for run in of_arm if measure in run], arm, place)
            plot.set(xlabel=AXIS_LABELS[axis], ylabel=measure if column == 0 else "")
            plot.grid(alpha=0.25)
        if len(runs) > 1:
            labels = grid[0, 0].get_legend_handles_labels()
            figure.legend(*labels, loc="outside upper center", ncols=min(len(runs), 4), frameon=False)
        figure.draw_without_rendering()
    return figure


def _draw_arm(plot: Axes, axis: Axis, curves: Sequence[Curve], arm: str, place: int) -> None:
    style: dict[str, Any] = {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": DASHES[place // len(COLOURS) % len(DASHES)],
    }
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


def as_png(figure: Figure) -> bytes:
    """Return a picture for a file."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="png")
    return buffer.getvalue()
