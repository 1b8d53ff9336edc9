"""How sure a mean over rows is, and the difference of two models on the same rows: percentile bootstrap over rows.

Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13. Nothing but NumPy, so that reports and studies
of one's own can use it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from srd_lightning.errors import DataError

CONFIDENCE = 0.95
RESAMPLES = 1000
Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A mean, and the bounds between which it lies in most resamples of the rows."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the mean of one value per row, with its percentile interval over resamples of the rows.

    Args:
        values: ``[N]``, finite.
        weights: Of the rows, such as their tokens where the mean is one over tokens, positive, ``[N]``; by default each
            row counts the same.
        confidence: Share of the resamples between the two bounds.
        resamples: How often N rows are drawn, with putting back.
        seed: Of the draws: the same seed draws the same rows, whatever the values.

    Raises:
        DataError: There are no values, some are not finite, or there are not as many weights.

    Example:
        >>> bootstrap_interval([0, 1] * 50)
        Interval(mean=0.5, low=0.4, high=0.6)
    """
    numbers = _checked(values, "values")
    weighing = np.ones_like(numbers) if weights is None else _checked(weights, "weights")
    if weighing.shape != numbers.shape:
        raise DataError(f"each value needs a weight, but there are {len(numbers)} values and {len(weighing)} weights")
    columns = np.stack([numbers * weighing, weighing], axis=1)
    total, weight = columns.sum(axis=0)
    sums = resampled_sums(columns, resamples, seed)
    return Interval(float(total / weight), *bounds(sums[:, 0] / sums[:, 1], confidence))


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    weights: ArrayLike | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return how much higher the first of two models is on the same rows; how hard a row is cancels out.

    Args:
        first: One value per row, ``[N]``.
        second: Of the same rows in the same order, ``[N]``.
        weights: Of the rows, the same for both, ``[N]``; see `bootstrap_interval`.
        confidence: See `bootstrap_interval`.
        resamples: See `bootstrap_interval`.
        seed: See `bootstrap_interval`.

    Returns:
        Mean of first minus second; where the interval leaves out 0, the two differ.

    Raises:
        DataError: They are not of the same rows; and as for `bootstrap_interval`.

    Example:
        >>> paired_difference([2, 9, 4, 7], [1, 8, 3, 6])
        Interval(mean=1.0, low=1.0, high=1.0)
    """
    one, other = _checked(first, "first"), _checked(second, "second")
    if one.shape != other.shape:
        raise DataError(f"paired values are of the same rows, but there are {len(one)} and {len(other)} of them")
    return bootstrap_interval(one - other, weights, confidence, resamples, seed)


def resampled_sums(columns: Floats, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Return the sum over the rows of each resample, of which any ratio of sums has its distribution.

    Args:
        columns: ``[N, K]``
        resamples: How many, R.
        seed: Of the draws.

    Returns:
        ``[R, K]``
    """
    random, number = np.random.default_rng(seed), len(columns)
    counts = (np.bincount(random.integers(number, size=number), minlength=number) for _ in range(resamples))
    return np.stack([count @ columns for count in counts])


def bounds(statistics: Floats, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the two quantiles between which a share of the statistics lies, as many below as above.

    Args:
        statistics: One per resample, ``[R]``.
        confidence: The share.
    """
    tail = (1 - confidence) / 2
    low, high = np.quantile(statistics, [tail, 1 - tail])
    return float(low), float(high)


def _checked(values: ArrayLike, name: str) -> Floats:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise DataError(f"{name} must be finite numbers, at least one, in one list; leave out rows that have none")
    return numbers
