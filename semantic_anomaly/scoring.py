"""From patch distances to the score of a frame."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from semantic_anomaly.errors import ModelOutputError


def tail_count(count: int, tail_percent: float) -> int:
    """Return how many of `count` distances make the tail: at least one, rounded up."""
    # The small term keeps 300 * 1 / 100 at 3 where the product lands a little above.
    return min(count, max(1, math.ceil(count * tail_percent / 100.0 - 1e-9)))


def tail_mean(distances: np.ndarray, tail_percent: float) -> float:
    """Return the mean of the largest distances: AnomalyDINO's score (Damm et al. 2024).

    Args:
        distances: (n,) patch distances.
        tail_percent: share of the patches that is averaged, in (0, 100].

    Raises:
        ModelOutputError: no distances, or one that is not finite.
    """
    check_distances(distances)
    size = tail_count(len(distances), tail_percent)
    tail = np.partition(distances, len(distances) - size)[-size:]
    return float(tail.mean(dtype=np.float64))


def resolve_tail(
    distances: np.ndarray, tail_percent: float, exact: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return distances whose tail is exact, given ones that can only be too large.

    An approximate search never finds a nearer neighbour than there is, so once the largest
    distances are exact and no unchecked one exceeds them, `tail_mean` equals that of an exact
    search.

    Args:
        distances: (n,) float32, each at least the exact one.
        tail_percent: as in `tail_mean`.
        exact: gives the exact distances of the rows of an (m,) integer array.

    Raises:
        ModelOutputError: no distances, or one that is not finite.
    """
    check_distances(distances)
    size = tail_count(len(distances), tail_percent)
    resolved = distances.copy()
    unchecked = np.ones(len(distances), bool)
    while True:
        tail = np.argpartition(resolved, len(resolved) - size)[-size:]
        rows = tail[unchecked[tail]]
        if not len(rows):
            return resolved
        resolved[rows] = exact(rows)
        unchecked[rows] = False


def check_distances(distances: np.ndarray) -> None:
    """Refuse what no comparison with a threshold would notice.

    Raises:
        ModelOutputError: no distances, or one that is not finite.
    """
    if distances.ndim != 1 or not len(distances):
        raise ModelOutputError(f"distances: expected non-empty (n,), found {distances.shape}")
    if not np.isfinite(distances).all():
        raise ModelOutputError("distances: expected finite numbers, found NaN or infinity")
