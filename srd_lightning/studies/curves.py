"""What a run logged while it trained: a curve for each measure, over steps and over seconds of training."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from srd_lightning.errors import StorageError

Floats = NDArray[np.float64]
Axis = Literal["steps", "seconds"]
HIGHER = ("rouge", "accuracy", "match", "bleu", "chrf", "pass_at", "top1")
"""Parts of the names of measures of which more is better; of all others less is."""
LOWER = ("nll", "kl", "ece", "loss")


def higher_is_better(name: str) -> bool:
    """Return whether more of a measure is better, by its name.

    Example:
        >>> higher_is_better("test_rouge_l"), higher_is_better("val_nll")
        (True, False)
    """
    return any(part in name for part in HIGHER)


def is_quality(name: str) -> bool:
    """Return whether a measure says how good a model is, by its name; lengths of answers do not.

    Example:
        >>> is_quality("greedy_rouge_l"), is_quality("own_kl"), is_quality("greedy_tokens")
        (True, True, False)
    """
    return any(part in name for part in (*HIGHER, *LOWER))


@dataclass(frozen=True)
class Curve:
    """Values of a measure in the order in which they were logged.

    Args:
        steps: Optimizer steps that were made before each value ``[points]``.
        seconds: Of training until each value ``[points]``; NaN where no `TrainingClock` logged them.
        values: ``[points]``.
    """

    steps: Floats
    seconds: Floats
    values: Floats

    def axis(self, axis: Axis) -> Floats:
        """Return what the values stand over."""
        return self.steps if axis == "steps" else self.seconds

    def at(self, place: float, axis: Axis) -> float | None:
        """Return the value at a place, on a straight line between its neighbours; nothing outside of the curve.

        Example:
            >>> Curve(np.array([10.0, 20.0]), np.array([1.0, 3.0]), np.array([5.0, 4.0])).at(2.0, "seconds")
            4.5
        """
        places = self.axis(axis)
        if not places[0] <= place <= places[-1]:
            return None
        return float(np.interp(place, places, self.values))

    def reaches(self, value: float, axis: Axis, higher: bool) -> float | None:
        """Return where the curve is first as good as a value, on a straight line between neighbours.

        Args:
            value: To be reached.
            axis: On which the place is.
            higher: Whether more is better.

        Returns:
            The place; the first one of the curve where it begins as good, nothing where it never is.

        Example:
            >>> Curve(np.array([10.0, 20.0]), np.array([1.0, 3.0]), np.array([5.0, 4.0])).reaches(4.5, "steps", False)
            15.0
        """
        lead = (self.values - value) * (1 if higher else -1)
        good = np.flatnonzero(lead >= 0)
        if not len(good):
            return None
        places, first = self.axis(axis), good[0]
        if first == 0:
            return float(places[0])
        share = -lead[first - 1] / (lead[first] - lead[first - 1])
        return float(places[first - 1] + share * (places[first] - places[first - 1]))


def read_curves(folder: Path) -> dict[str, Curve]:
    """Return the curves of a run by the names of the measures, from the files of its `CSVLogger`.

    A run that was resumed has several files; what a later one has logged takes the place of the same steps of earlier
    ones.

    Args:
        folder: The run's ``default_root_dir``.

    Raises:
        StorageError: A file cannot be read.
    """
    lines: list[dict[str, float]] = []
    for path in _metrics_files(folder):
        found = _read(path)
        if any(name.startswith("train_") or name == "seconds" for line in found for name in line):  # not of a test
            lines = [line for line in lines if line["step"] < found[0]["step"]] + found
    names = dict.fromkeys(name for line in lines for name in line)
    return {
        name: Curve(
            np.array([line["step"] + 1 for line in lines if name in line]),  # Lightning counts from 0
            np.array([line.get("seconds", np.nan) for line in lines if name in line]),
            np.array([line[name] for line in lines if name in line]),
        )
        for name in names
        if name not in ("step", "epoch", "seconds", "processor_seconds")
    }


def last_tested(folder: Path) -> dict[str, float]:
    """Return the measures ``test_…`` that were logged last."""
    lines = (line for path in _metrics_files(folder) for line in _read(path))
    return {name: value for line in lines for name, value in line.items() if name.startswith("test_")}


def _metrics_files(folder: Path) -> list[Path]:
    """Return the files of a run in the order in which its loggers made them; not those of runs inside of its folder."""
    own = (path for path in folder.rglob("metrics.csv") if "cells" not in path.relative_to(folder).parts)
    return sorted(own, key=lambda path: [int(part) if part.isdigit() else 0 for part in re.split(r"(\d+)", str(path))])


def _read(path: Path) -> list[dict[str, float]]:
    try:
        with path.open(newline="") as file:
            lines = [{name: float(text) for name, text in line.items() if text} for line in csv.DictReader(file)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise StorageError(f"{path} cannot be read ({error}); it is not what CSVLogger writes") from error
    return [line for line in lines if "step" in line]
