"""Signal-to-quantization-noise ratio: how much of a tensor quantization loses."""

from __future__ import annotations

import numpy as np


def noise_to_signal(x: np.ndarray, quantized: np.ndarray) -> float:
    """sum (x - quantized)^2 / sum x^2, summed in float64; NaN where x is all zero.

    Both are divided by max|x| first, so that no square overflows or is flushed to zero.
    """
    largest = np.max(np.abs(x), initial=0)
    if not 0 < largest < np.inf:
        return np.nan
    noise = np.mean(np.square((x - quantized) / largest), dtype=np.float64)
    return float(noise / np.mean(np.square(x / largest), dtype=np.float64))


def sqnr_db(ratio: np.typing.ArrayLike) -> np.ndarray:
    """SQNR = -10 log10(noise to signal) = 20 log10(||x|| / ||x - quantized||) in decibels.

    NaN where it is not defined: nothing is lost (a ratio of 0), or there is no signal (NaN).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        found = -10 * np.log10(np.asarray(ratio, float))
    return np.where(np.isfinite(found), found, np.nan)
