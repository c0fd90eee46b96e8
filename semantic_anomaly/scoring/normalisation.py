"""Kinds of patches: those whose embeddings have the same of some index entries as the nearest.

What distance is usual where in the image and for what, and how unusual another one is there.

Nominal distances differ over the image: houses vary from street to street, the road hardly does.
Standardised by the mean and deviation of nominal frames at the same place, as PaDiM does with its
Gaussians (Defard et al. 2021, arXiv 2011.08785), a small thing on the road outweighs a new house.
They differ by what is seen, too: what is left is standardised once more over patches of a kind,
those whose embeddings have the same of some index entries as the nearest (`Kinds`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from operator import add
from typing import Any

import cv2
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
    from semantic_anomaly.linalg import inner_products

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


# Cells over the image: coarse enough that a few frames fill them.
CELLS_HW = (18, 32)
# A place where nothing ever changed would make a mountain of a molehill.
_LEAST_DEVIATION = 0.25
# In deviations of the place.
_LEAST_OF_KIND = 0.7
# Frames that must have shown something at a place before it is believed to be usual there: an
# instance has one value for all of its patches, and a single one no deviation at all.
_LEAST_FRAMES = 5
# Frames in which a kind is taken to have been as usual as its place, before any was seen: patches
# of one frame resemble each other, and a few frames say little.
_PRIOR_FRAMES = 40


class PlaceSums:
    """Collects nominal distances by kind and cell of the image, in memory that does not grow.

    Args:
        anchors: (kinds, dim) float32; None: all patches are of one kind.
    """

    def __init__(self, anchors: np.ndarray | None = None) -> None:
        self._anchors = anchors
        kinds = 1 if anchors is None else len(anchors)
        # Patches, their sum, and their squares' sum.
        self._sums = np.zeros((3, kinds, *CELLS_HW), np.float64)
        self._frames = np.zeros(CELLS_HW, np.int64)
        self._frames_of_kind = np.zeros(kinds, np.int64)

    def add(
        self, distances: np.ndarray, inside: np.ndarray, embeddings: np.ndarray | None = None
    ) -> None:
        """Take in the distances of a nominal frame.

        Args:
            distances: (rows, cols) float32.
            inside: (rows, cols) bool, the n patches that take part.
            embeddings: (n, dim) float32, of those; needed where there are kinds.
        """
        cell = _cell_of(distances.shape)[inside]
        self._frames.flat[np.unique(cell)] += 1
        if self._anchors is not None:
            kind = kind_of(embeddings, self._anchors)
            self._frames_of_kind[np.unique(kind)] += 1
            cell = cell + self._frames.size * kind
        values = distances[inside].astype(np.float64)
        powers = np.ones_like(values), values, values**2
        for total, weights in zip(self._sums, powers, strict=True):
            total += np.bincount(cell, weights, minlength=total.size).reshape(total.shape)

    def __add__(self, other: PlaceSums) -> PlaceSums:
        added = PlaceSums(self._anchors)
        added._sums = self._sums + other._sums
        added._frames = self._frames + other._frames
        added._frames_of_kind = self._frames_of_kind + other._frames_of_kind
        return added

    @property
    def empty(self) -> bool:
        """Return whether nothing was taken in."""
        return not self._sums[0].any()

    def usual(self) -> UsualDistances:
        """Return mean and deviation by cell; cells of hardly any frame get those of all.

        Raises:
            CalibrationError: nothing was taken in, or all distances are the same.
        """
        if self.empty:
            raise CalibrationError("usual distances: expected nominal frames, found none")
        by_cell = self._sums.sum(axis=1)
        known = self._frames >= _LEAST_FRAMES
        if not known.any():
            known = by_cell[0] > 0
        patches, summed, squares = by_cell.sum(axis=(1, 2))
        count = np.where(known, by_cell[0], 1)
        mean = np.where(known, by_cell[1] / count, summed / patches)
        variance = np.maximum(by_cell[2] / count - mean**2, 0)
        typical = float(np.sqrt(np.median(variance[known])))
        if typical < 1e-6:
            # Nearly every place was seen but once: what is usual is the same everywhere.
            known = np.zeros_like(known)
            mean = np.full_like(mean, summed / patches)
            typical = float(np.sqrt(max(squares / patches - (summed / patches) ** 2, 0)))
        least = max(_LEAST_DEVIATION * typical, 1e-6)
        deviation = np.where(known, np.maximum(np.sqrt(variance), least), max(typical, least))
        kinds = None if self._anchors is None else self._kinds(self._anchors, mean, deviation)
        return UsualDistances(mean.astype(np.float32), deviation.astype(np.float32), kinds)

    def _kinds(self, anchors: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> Kinds:
        """Return what is usual for each kind, of the deviations from what is usual by cell."""
        count, summed, squares = self._sums
        relative = (summed - mean * count) / deviation
        relative_squares = (squares - 2 * mean * summed + mean**2 * count) / deviation**2
        patches = count.sum(axis=(1, 2))
        # As many patches in each of those frames as in the ones that showed the kind.
        prior = _PRIOR_FRAMES * np.maximum(patches, 1) / np.maximum(self._frames_of_kind, 1)
        own = relative.sum(axis=(1, 2)) / (patches + prior)
        variance = (relative_squares.sum(axis=(1, 2)) + prior) / (patches + prior) - own**2
        spread = np.sqrt(np.maximum(variance, _LEAST_OF_KIND**2))
        return Kinds(anchors, own.astype(np.float32), spread.astype(np.float32))


@dataclass(frozen=True, eq=False)
class UsualDistances:
    """Mean and deviation of nominal distances by cell of the image.

    Attributes:
        mean, deviation: `CELLS_HW` float32, means in [0, 2], deviations > 0.
        kinds: what is usual besides, by kind of patch; None: the same for all.

    Raises:
        CalibrationError: other shapes, or numbers out of range.
    """

    mean: np.ndarray
    deviation: np.ndarray
    kinds: Kinds | None = None
    _relations: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("deviation", self.deviation)):
            if values.shape != CELLS_HW or values.dtype != np.float32:
                raise CalibrationError(
                    f"usual distances: {name}: expected {CELLS_HW} float32, found {values.shape} "
                    f"{values.dtype}"
                )
        # NaN fails the comparisons.
        if not np.all((self.mean >= 0) & (self.mean <= 2)):
            raise CalibrationError("usual distances: expected means in [0, 2]")
        if not np.all((self.deviation > 0) & (self.deviation <= 2)):
            raise CalibrationError("usual distances: expected deviations above 0")

    def relation(
        self, inside: np.ndarray, embeddings: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return factor and offset, (n,) float32, that make a distance a relative one.

        A relative distance is the distance that would be as unusual at a typical place: mean and
        deviation of all cells take the place of the patch's own, interpolated between cells.

        Args:
            inside: (rows, cols) bool, the n patches that take part.
            embeddings: (n, dim) float32, of those; needed where there are kinds.

        Raises:
            CalibrationError: embeddings of another dimension than those of the kinds.
        """
        grid_hw = (inside.shape[0], inside.shape[1])
        if grid_hw not in self._relations:
            mean, deviation = (
                cv2.resize(values, grid_hw[::-1], interpolation=cv2.INTER_LINEAR)
                for values in (self.mean, self.deviation)
            )
            factor = np.float32(self.deviation.mean()) / deviation
            offset = np.float32(self.mean.mean()) - factor * mean
            self._relations[grid_hw] = factor, offset
        factor, offset = (each[inside] for each in self._relations[grid_hw])
        if self.kinds is None:
            return factor, offset
        kind = kind_of(embeddings, self.kinds.anchors)
        mean, deviation = self.typical
        spread = self.kinds.deviation[kind]
        beyond = offset - np.float32(mean) - np.float32(deviation) * self.kinds.mean[kind]
        return factor / spread, np.float32(mean) + beyond / spread

    @property
    def typical(self) -> tuple[float, float]:
        """Return mean and deviation at a typical place: those of relative distances."""
        return float(self.mean.mean()), float(self.deviation.mean())

    def describe(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        told: dict[str, Any] = {"mean": _told(self.mean), "deviation": _told(self.deviation)}
        if self.kinds is not None:
            told["kinds"] = {name: _told(values) for name, values in vars(self.kinds).items()}
        return told

    @classmethod
    def from_description(cls, values: Mapping[str, Any]) -> UsualDistances:
        """Return what `describe` described.

        Raises:
            CalibrationError: it describes nothing of the kind.
        """
        kinds = None
        if isinstance(values, Mapping) and "kinds" in values:
            kinds = Kinds(**_read(values["kinds"], {"anchors", "mean", "deviation"}))
            values = {name: each for name, each in values.items() if name != "kinds"}
        return cls(**_read(values, {"mean", "deviation"}), kinds=kinds)


def _told(values: np.ndarray) -> list[Any]:
    # Nine digits are a float32, no more and no less; the rest would be noise to digest.
    if values.ndim > 1:
        return [_told(row) for row in values]
    return [float(f"{value:.9g}") for value in values]


def _read(values: Any, names: set[str]) -> dict[str, Any]:
    if not isinstance(values, Mapping) or set(values) != names:
        raise CalibrationError(f"usual distances: expected {', '.join(sorted(names))}")
    try:
        return {name: np.array(rows, np.float32) for name, rows in values.items()}
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"usual distances: no table of numbers: {error}") from error


def usual_of_others(
    folds: Mapping[int, Mapping[str, PlaceSums]], left_out: int | None
) -> dict[str, UsualDistances]:
    """Return what is usual in all folds but one, by branch, so that no frame is its own measure.

    Where a single fold has frames, they are: a calibration so small promises little in any case.
    """
    usual = {}
    for branch in sorted({name for sums in folds.values() for name in sums}):
        held = {
            fold: sums[branch]
            for fold, sums in folds.items()
            if branch in sums and not sums[branch].empty
        }
        if not held:
            continue
        others = [sums for fold, sums in held.items() if fold != left_out]
        usual[branch] = reduce(add, others or held.values()).usual()
    return usual


@lru_cache(maxsize=8)
def _cell_of(grid_hw: tuple[int, int]) -> np.ndarray:
    rows, cols = (
        np.minimum(np.arange(n) * cells // n, cells - 1)
        for n, cells in zip(grid_hw, CELLS_HW, strict=True)
    )
    cell = rows[:, None] * CELLS_HW[1] + cols[None]
    cell.flags.writeable = False
    return cell
