"""How sure a mean of paired differences is: the bootstrap over rows and seeds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES, AT_ONCE = 2000, 200


def paired_interval(differences: NDArray[np.float64]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of paired differences, by the percentile bootstrap.

    Rows and seeds are drawn anew, each with replacement and independently of the other (the pigeonhole bootstrap of
    Owen, 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2)), so the interval is about other rows and
    other seeds; of a single seed it is about other rows only.

    Args:
        differences: Of the same row and seed ``[seeds, rows]``; one column where nothing is known of rows.

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
    rng = np.random.default_rng(0)

    def times_drawn(number: int) -> NDArray[np.float64]:
        return rng.multinomial(number, np.full(number, 1 / number), size=AT_ONCE) / number  # [AT_ONCE, number]

    sums = [(times_drawn(seeds) @ differences * times_drawn(rows)).sum(1) for _ in range(RESAMPLES // AT_ONCE)]
    means = np.concatenate(sums)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
