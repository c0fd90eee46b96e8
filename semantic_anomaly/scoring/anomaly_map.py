"""The anomaly map of a frame and the anomaly score: smoothing, and the mean of the largest values.

An anomaly covers neighbouring patches, the error of a single distance does not. Maps are therefore
smoothed by a Gaussian, as those of PatchCore (Roth et al. 2022) and PaDiM (Defard et al. 2021).
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from semantic_anomaly.errors import ModelOutputError

# The kernel reaches two standard deviations; 5 % of a Gaussian lie beyond.
_KERNEL_DEVIATIONS = 2.0


def tail_count(count: int, tail_percent: float) -> int:
    """Return the number of values in the tail of `count` values: at least one, rounded up."""
    # The small term keeps 1000 * 16.1 / 100 at 161, where the product is slightly larger.
    return min(count, max(1, math.ceil(count * tail_percent / 100.0 - 1e-9)))


def tail_mean(values: np.ndarray, tail_percent: float) -> float:
    """Return the mean of the largest values: the score of AnomalyDINO (Damm et al. 2024).

    Args:
        values: (n,) values of the anomaly map inside the region of interest.
        tail_percent: share of the values that is averaged, in (0, 100].

    Raises:
        ModelOutputError: no values, or one that is not finite.
    """
    if values.ndim != 1 or not len(values):
        raise ModelOutputError(f"anomaly map: expected non-empty (n,), found {values.shape}")
    # NaN compares false with any threshold, and would be called nominal.
    if not np.isfinite(values).all():
        raise ModelOutputError("anomaly map: expected finite numbers, found NaN or infinity")
    size = tail_count(len(values), tail_percent)
    tail = np.partition(values, len(values) - size)[-size:]
    return float(tail.mean(dtype=np.float64))


def smoothed(values: np.ndarray, inside: np.ndarray, smoothing: float) -> np.ndarray:
    """Return (rows, cols) float32: means of neighbouring values weighted by a Gaussian.

    Patches outside the region of interest or the image have no weight:
    smoothed = G * (values inside) / G * inside, with the Gaussian G.

    Args:
        values: (rows, cols) float32.
        inside: (rows, cols) bool, the region of interest; the result is 0 outside.
        smoothing: standard deviation of the Gaussian in patches, >= 0; 0: none.
    """
    if not smoothing:
        return values
    present = inside.astype(np.float32)
    blurred, weight = _blurred(values * present, smoothing), _blurred(present, smoothing)
    return np.divide(blurred, weight, out=np.zeros(values.shape, np.float32), where=inside)


def smoothing_support(chosen: np.ndarray, smoothing: float) -> np.ndarray:
    """Return (rows, cols) bool: the patches that the chosen smoothed values depend on.

    Args:
        chosen: (rows, cols) bool.
        smoothing: as in `smoothed`.
    """
    if not smoothing or not chosen.any():
        return chosen
    side = _kernel_side(smoothing)
    support: np.ndarray = cv2.dilate(chosen.view(np.uint8), np.ones((side, side), np.uint8)) > 0
    return support


def _blurred(values: np.ndarray, smoothing: float) -> np.ndarray:
    kernel_hw = (_kernel_side(smoothing),) * 2
    return cv2.GaussianBlur(values, kernel_hw, smoothing, borderType=cv2.BORDER_CONSTANT)


def _kernel_side(smoothing: float) -> int:
    return 2 * math.ceil(_KERNEL_DEVIATIONS * smoothing) + 1
