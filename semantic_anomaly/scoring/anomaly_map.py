"""From patch distances to the score of a frame.

The map that a frame's score is made of: distances relative to their place, smoothed.

A thing covers neighbouring patches, the error of a single one does not: maps are smoothed by a
Gaussian, as those of PatchCore (Roth et al. 2022) and PaDiM (Defard et al. 2021) are.
"""

from __future__ import annotations

import math
from functools import lru_cache

import cv2
import numpy as np

from semantic_anomaly.errors import ModelOutputError


def tail_count(count: int, tail_percent: float) -> int:
    """Return how many of `count` distances make the tail: at least one, rounded up."""
    # The small term keeps 1000 * 16.1 / 100 at 161, where the product lands a little above.
    return min(count, max(1, math.ceil(count * tail_percent / 100.0 - 1e-9)))


def tail_mean(distances: np.ndarray, tail_percent: float) -> float:
    """Return the mean of the largest distances: AnomalyDINO's score (Damm et al. 2024).

    Args:
        distances: (n,) patch distances.
        tail_percent: share of the patches that is averaged, in (0, 100].

    Raises:
        ModelOutputError: no distances, or one that is not finite.
    """
    if distances.ndim != 1 or not len(distances):
        raise ModelOutputError(f"distances: expected non-empty (n,), found {distances.shape}")
    # NaN compares false with any threshold, and would pass for nominal.
    if not np.isfinite(distances).all():
        raise ModelOutputError("distances: expected finite numbers, found NaN or infinity")
    size = tail_count(len(distances), tail_percent)
    tail = np.partition(distances, len(distances) - size)[-size:]
    return float(tail.mean(dtype=np.float64))


# Beyond two deviations lie 5 % of a Gaussian's weight.
_DEVIATIONS = 2.0


class ScoreMap:
    """How the values that are scored follow from plain distances; they grow where those grow.

    Args:
        inside: (rows, cols) bool, the n patches that take part.
        relation: (n,) factors > 0 and offsets of what is usual at their place; None: nothing is.
        smoothing: deviation of the Gaussian in patches, >= 0; 0: none.
    """

    def __init__(
        self,
        inside: np.ndarray,
        relation: tuple[np.ndarray, np.ndarray] | None,
        smoothing: float,
    ) -> None:
        self._inside, self._relation, self._smoothing = inside, relation, smoothing

    def values(self, distances: np.ndarray) -> np.ndarray:
        """Return (n,) float32 in [0, 2] of (n,) float32 plain distances in [0, 2]."""
        if self._relation is not None:
            factor, offset = self._relation
            # Clipped, so that scores and heatmaps keep the range of distances.
            distances = np.clip(factor * distances + offset, 0.0, 2.0)
        if not self._smoothing:
            return distances
        painted = np.zeros(self._inside.shape, np.float32)
        painted[self._inside] = distances
        return smoothed(painted, self._inside, self._smoothing)[self._inside]

    def made_of(self, chosen: np.ndarray) -> np.ndarray:
        """Return (n,) bool: the distances that the (n,) bool chosen values are made of."""
        if not self._smoothing or not chosen.any():
            return chosen
        painted = np.zeros(self._inside.shape, np.uint8)
        painted[self._inside] = chosen
        side = _side(self._smoothing)
        near: np.ndarray = cv2.dilate(painted, np.ones((side, side), np.uint8))[self._inside] > 0
        return near


def smoothed(values: np.ndarray, inside: np.ndarray, smoothing: float) -> np.ndarray:
    """Return (rows, cols) float32 means of neighbouring values, weighted by a Gaussian.

    What takes no part, and what lies beyond the image, weighs nothing.

    Args:
        values: (rows, cols) float32.
        inside: (rows, cols) bool, what takes part; the others are 0.
        smoothing: deviation of the Gaussian in patches, >= 0; 0: none.
    """
    if not smoothing:
        return values
    present = inside.astype(np.float32)
    weight = _weight(present.tobytes(), present.shape, smoothing)
    blurred = _blurred(values * present, smoothing)
    found = np.zeros(values.shape, np.float32)
    np.divide(blurred, weight, out=found, where=inside)
    return found


# A camera keeps its region of interest.
@lru_cache(maxsize=32)
def _weight(present: bytes, grid_hw: tuple[int, int], smoothing: float) -> np.ndarray:
    weight = _blurred(np.frombuffer(present, np.float32).reshape(grid_hw), smoothing)
    weight.flags.writeable = False
    return weight


def _blurred(values: np.ndarray, smoothing: float) -> np.ndarray:
    side = (_side(smoothing),) * 2
    return cv2.GaussianBlur(values, side, smoothing, borderType=cv2.BORDER_CONSTANT)


def _side(smoothing: float) -> int:
    return 2 * math.ceil(_DEVIATIONS * smoothing) + 1
