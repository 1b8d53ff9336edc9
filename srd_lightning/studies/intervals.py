"""How sure a mean of paired differences is: the bootstrap over rows and seeds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306)
"""Quantile 0.975 of Student's distribution with 1, 2, … degrees of freedom."""
RESAMPLES, AT_ONCE = 2000, 200


def paired_interval(differences: Floats, weights: Floats | None = None) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of paired differences, by the percentile bootstrap.

    Rows and seeds are drawn anew, each with replacement and independently of the other (Owen, 2007, "The pigeonhole
    bootstrap", Annals of Applied Statistics 1(2), 386–411), so the interval is about other rows and other seeds. Of a
    single seed it is about other rows only, and of two or three what is about seeds is narrow. Where nothing is known
    of rows, and there are few seeds, the interval is that of Student's t.

    Args:
        differences: Of the same row and seed ``[seeds, rows]``; one column where nothing is known of rows.
        weights: Of the rows, such as their tokens where the mean is one over tokens ``[rows]``; all the same without.

    Returns:
        Its bounds; nothing where there is but one difference.

    Example:
        >>> low, high = paired_interval(np.array([[0.0, 1.0] * 50]))
        >>> round(low, 1), round(high, 1)
        (0.4, 0.6)
    """
    if differences.size < 2:
        return None
    seeds, rows = differences.shape
    if rows == 1 and seeds <= len(STUDENT) + 1:
        half = STUDENT[seeds - 2] * float(differences.std(ddof=1)) / np.sqrt(seeds)
        return float(differences.mean() - half), float(differences.mean() + half)
    rng = np.random.default_rng(0)

    def times_drawn(number: int) -> Floats:
        return rng.multinomial(number, np.full(number, 1 / number), size=AT_ONCE).astype(float)  # [AT_ONCE, number]

    means = []
    for _ in range(RESAMPLES // AT_ONCE):
        of_rows = times_drawn(rows) * (1 if weights is None else weights)
        means.append((times_drawn(seeds) / seeds @ differences * of_rows).sum(1) / of_rows.sum(1))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
