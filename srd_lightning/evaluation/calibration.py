"""Whether a model is as often right as it is confident: expected calibration error of its next tokens.

Naeini, Cooper and Hauskrecht, AAAI 2015, in the form of Guo et al., On Calibration of Modern Neural Networks, ICML 2017
(arXiv 1706.04599), equation 3, with their 15 bins.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
BINS = 15


def binned(confidence: Floats, right: Floats, bins: int = BINS) -> Floats:
    """Sort predictions by confidence into bins of equal width, of which the m-th of M holds ((m - 1) / M, m / M].

    Args:
        confidence: Probability of the likeliest token, in (0, 1], ``[N]``.
        right: Whether it is the token that stands there, 1 or 0, ``[N]``.
        bins: How many, M.

    Returns:
        Of each bin the number of predictions, their summed confidence, and how many are right, ``[M, 3]``. These add
        up over rows.

    Example:
        >>> binned(np.array([0.4, 0.9, 1.0]), np.array([1.0, 1.0, 0.0]), bins=2)
        array([[1. , 0.4, 1. ],
               [2. , 1.9, 1. ]])
    """
    number = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    weights = (None, confidence, right)
    return np.stack([np.bincount(number, weight, minlength=bins) for weight in weights], axis=1).astype(np.float64)


def calibration_error(sums: Floats) -> Floats:
    r"""Return :math:`\sum_m \frac{n_m}{N} |\mathrm{acc}_m - \mathrm{conf}_m|`, in [0, 1].

    Args:
        sums: See `binned`, ``[..., M, 3]``.

    Returns:
        ``[...]``

    Example:
        >>> float(calibration_error(np.array([[1.0, 0.4, 1.0], [2.0, 1.9, 1.0]])).round(3))  # (0.6 + 0.9) / 3
        0.5
    """
    error: Floats = np.abs(sums[..., 2] - sums[..., 1]).sum(-1) / sums[..., 0].sum(-1)
    return error
