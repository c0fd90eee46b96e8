"""Kinds of patches: those whose embeddings have the same of some index entries as the nearest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from semantic_anomaly.errors import CalibrationError
from semantic_anomaly.structures import UNIT_NORM_TOLERANCE

_ENTRIES_A_KIND = 8
_MOST_DEVIATIONS = 1e6
_SEED = 100


@dataclass(frozen=True, eq=False)
class Kinds:
    """Kinds of patches, and what is usual for each beyond what is usual at its place.

    Attributes:
        anchors: (kinds, dim) float32 unit vectors; a patch is of the kind of the nearest.
        mean, deviation: (kinds,) float32, in deviations of the place; deviations > 0.

    Raises:
        CalibrationError: other shapes, or numbers out of range.
    """

    anchors: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray

    def __post_init__(self) -> None:
        count = len(self.mean)
        shapes = self.anchors.shape[:-1], self.mean.shape, self.deviation.shape
        dtypes = {self.anchors.dtype, self.mean.dtype, self.deviation.dtype}
        if not count or shapes != ((count,),) * 3 or dtypes != {np.dtype(np.float32)}:
            raise CalibrationError(
                f"usual distances: kinds: expected float32 anchors (kinds, dim), means and "
                f"deviations (kinds,), found {self.anchors.shape} and {shapes[1:]}"
            )
        lengths = np.linalg.norm(self.anchors, axis=1)
        # NaN fails the comparisons.
        sound = np.all(np.abs(lengths - 1) <= UNIT_NORM_TOLERANCE)
        if not (sound and np.all(np.abs(self.mean) <= _MOST_DEVIATIONS)):
            raise CalibrationError("usual distances: kinds: expected unit anchors, finite means")
        if not np.all((self.deviation > 0) & (self.deviation <= _MOST_DEVIATIONS)):
            raise CalibrationError("usual distances: kinds: expected deviations above 0")


def kind_of(embeddings: np.ndarray | None, anchors: np.ndarray) -> np.ndarray:
    """Return (n,) int64: of (n, dim) float32 embeddings the rows of the nearest anchors.

    Args:
        embeddings: (n, dim) float32, unit norm.
        anchors: (kinds, dim) float32, unit norm.

    Raises:
        CalibrationError: no embeddings, or of another dimension than the anchors.
    """
    # Calibrations are read where torch need not be.
    from semantic_anomaly.exact_search import inner_products

    if embeddings is None or embeddings.shape[-1] != anchors.shape[1]:
        found = "none" if embeddings is None else embeddings.shape
        raise CalibrationError(
            f"usual distances: expected embeddings (n, {anchors.shape[1]}) as those of their "
            f"kinds, found {found}"
        )
    return inner_products(embeddings, anchors.T).argmax(axis=1)


def anchors_of(entries: np.ndarray, kinds: int) -> np.ndarray | None:
    """Return (kinds, dim) float32: some of the (n, dim) entries of an index, None for 0 kinds.

    Chosen by a fixed seed. Entries leave out what is alike, so that they are spread over what
    there is without more ado. Of a small index they are fewer, one for every eighth entry.
    """
    count = min(kinds, len(entries) // _ENTRIES_A_KIND)
    if count < 2:
        return None
    chosen = np.random.default_rng(_SEED).choice(len(entries), count, replace=False)
    return np.ascontiguousarray(entries[np.sort(chosen)])
