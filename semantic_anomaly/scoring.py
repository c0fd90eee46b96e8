"""From patch distances to the score of a frame."""

from __future__ import annotations

import math

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
