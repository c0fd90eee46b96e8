"""Score normalisation: nominal distances by image cell and by patch class.

Nominal distances differ over the image: buildings vary from street to street, the road hardly does.
Standardised by mean and deviation of nominal distances in the same cell of the image, as PaDiM does
with its Gaussians (Defard et al. 2021, arXiv 2011.08785), a small object on the road outweighs a
new building. Distances also differ by what is seen. They are therefore standardised once more over
the patches of a class: those whose embeddings have the same anchor entry as the nearest.

    z_cell = (d - mean_cell) / deviation_cell          mean and deviation interpolated between cells
    z      = (z_cell - mean_class) / deviation_class
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import cv2
import numpy as np

from semantic_anomaly.errors import CalibrationError
from semantic_anomaly.structures import UNIT_NORM_TOLERANCE

# Cells over the image: coarse enough that a few frames fill them.
CELLS_HW = (18, 32)
_MAX_CLASSES = 256
_ENTRIES_PER_CLASS = 8
_SEED = 100
# Least deviation of a cell as a share of the median one: where nothing ever changed, any small
# change would count as an anomaly.
_LEAST_CELL_DEVIATION = 0.25
# Least deviation of a class, in deviations of the cell.
_LEAST_CLASS_DEVIATION = 0.7
# A cell seen in fewer frames takes the statistics of all cells: an instance has one value for all
# of its patches, and a single one has no deviation.
_LEAST_FRAMES = 5
# Prior of a class: as if seen in that many frames with the statistics of its cells. Patches of one
# frame resemble each other, so a few frames say little.
_PRIOR_FRAMES = 40
_MAX_DEVIATIONS = 1e6


@dataclass(frozen=True, eq=False)
class PatchClasses:
    """Classes of patches with the mean and deviation of z_cell in each.

    Attributes:
        anchors: (classes, dim) float32 unit vectors; a patch belongs to the nearest.
        mean, deviation: (classes,) float32, in deviations of the cell; deviations > 0.

    Raises:
        CalibrationError: other shapes, or numbers out of range.
    """

    anchors: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray

    def __post_init__(self) -> None:
        count = self.mean.size
        shapes = self.anchors.shape[:-1], self.mean.shape, self.deviation.shape
        dtypes = {self.anchors.dtype, self.mean.dtype, self.deviation.dtype}
        if not count or shapes != ((count,),) * 3 or dtypes != {np.dtype(np.float32)}:
            raise CalibrationError(
                f"score normalisation: patch classes: expected float32 anchors (classes, dim), "
                f"means and deviations (classes,), found {self.anchors.shape} and {shapes[1:]}"
            )
        norms = np.linalg.norm(self.anchors, axis=1)
        # NaN fails the comparisons.
        unit = np.all(np.abs(norms - 1) <= UNIT_NORM_TOLERANCE)
        if not (unit and np.all(np.abs(self.mean) <= _MAX_DEVIATIONS)):
            raise CalibrationError(
                "score normalisation: patch classes: expected unit anchors and finite means"
            )
        if not np.all((self.deviation > 0) & (self.deviation <= _MAX_DEVIATIONS)):
            raise CalibrationError(
                "score normalisation: patch classes: expected deviations above 0"
            )


def class_anchors(entries: np.ndarray) -> np.ndarray | None:
    """Return (classes, dim) float32 anchors of patch classes, chosen by a fixed seed.

    Near-duplicates are not in an index, so its entries are spread over everything seen. A small
    index has one class for every eight entries; None for less than 2.

    Args:
        entries: (n, dim) float32, unit norm, of an index.
    """
    count = min(_MAX_CLASSES, len(entries) // _ENTRIES_PER_CLASS)
    if count < 2:
        return None
    rows = np.random.default_rng(_SEED).choice(len(entries), count, replace=False)
    return np.ascontiguousarray(entries[np.sort(rows)])


def class_of(embeddings: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Return (n,) int64: the row of the nearest anchor of each embedding.

    Args:
        embeddings: (n, dim) float32, unit norm.
        anchors: (classes, dim) float32, unit norm.

    Raises:
        CalibrationError: embeddings of another dimension than the anchors.
    """
    # Calibrations are read by commands that need no torch.
    from semantic_anomaly.linalg import inner_products

    if embeddings.shape[-1] != anchors.shape[1]:
        raise CalibrationError(
            f"score normalisation: expected embeddings (n, {anchors.shape[1]}) as the patch "
            f"classes have, found {embeddings.shape}"
        )
    return inner_products(embeddings, anchors.T).argmax(axis=1)


class NormalisationSums:
    """Sums of nominal distances by patch class and image cell, in memory of fixed size.

    Args:
        anchors: (classes, dim) float32; None: all patches are of one class.
    """

    def __init__(self, anchors: np.ndarray | None = None) -> None:
        self._anchors = anchors
        classes = 1 if anchors is None else len(anchors)
        # Number of patches, sum of distances, sum of squares.
        self._sums = np.zeros((3, classes, *CELLS_HW), np.float64)
        self._frames = np.zeros(CELLS_HW, np.int64)
        self._frames_of_class = np.zeros(classes, np.int64)

    def add(self, distances: np.ndarray, inside: np.ndarray, embeddings: np.ndarray) -> None:
        """Add the distances of a nominal frame.

        Args:
            distances: (rows, cols) float32.
            inside: (rows, cols) bool, the n patches that have a distance.
            embeddings: (n, dim) float32, of those patches.
        """
        cell = _cell_of(distances.shape)[inside]  # (n,)
        self._frames.flat[np.unique(cell)] += 1
        if self._anchors is not None:
            patch_class = class_of(embeddings, self._anchors)  # (n,)
            self._frames_of_class[np.unique(patch_class)] += 1
            cell = cell + self._frames.size * patch_class
        values = distances[inside].astype(np.float64)
        powers = np.ones_like(values), values, values**2
        for total, weights in zip(self._sums, powers, strict=True):
            total += np.bincount(cell, weights, minlength=total.size).reshape(total.shape)

    def __add__(self, other: NormalisationSums) -> NormalisationSums:
        total = NormalisationSums(self._anchors)
        total._sums = self._sums + other._sums
        total._frames = self._frames + other._frames
        total._frames_of_class = self._frames_of_class + other._frames_of_class
        return total

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return all that was added, without the anchors."""
        return {
            "sums": self._sums,
            "frames": self._frames,
            "frames_of_class": self._frames_of_class,
        }

    @classmethod
    def from_arrays(
        cls, anchors: np.ndarray | None, arrays: Mapping[str, np.ndarray]
    ) -> NormalisationSums:
        """Return the sums of `to_arrays` with the same anchors.

        Raises:
            CalibrationError: arrays of other shapes or types.
        """
        sums = cls(anchors)
        for name, own in sums.to_arrays().items():
            found = arrays.get(name)
            if found is None or found.shape != own.shape or found.dtype != own.dtype:
                raise CalibrationError(
                    f"score normalisation: {name}: expected {own.shape} {own.dtype}, found another"
                )
            own[:] = found
        return sums

    @property
    def empty(self) -> bool:
        """Return whether no frame was added."""
        return not self._sums[0].any()

    def normalisation(self) -> ScoreNormalisation:
        """Return mean and deviation by cell and class.

        Cells seen in fewer than 5 frames take the statistics of all cells.

        Raises:
            CalibrationError: no frame was added.
        """
        if self.empty:
            raise CalibrationError("score normalisation: expected nominal frames, found none")
        count, sums, squares = self._sums.sum(axis=1)  # each CELLS_HW
        known = self._frames >= _LEAST_FRAMES
        if not known.any():
            known = count > 0
        all_mean = sums.sum() / count.sum()
        divisor = np.where(known, count, 1)
        mean = np.where(known, sums / divisor, all_mean)
        variance = np.maximum(squares / divisor - mean**2, 0)
        typical = float(np.sqrt(np.median(variance[known])))
        if typical < 1e-6:
            # Nearly every cell was seen only once: use the statistics of all cells everywhere.
            known = np.zeros_like(known)
            mean = np.full_like(mean, all_mean)
            typical = float(np.sqrt(max(squares.sum() / count.sum() - all_mean**2, 0)))
        least = max(_LEAST_CELL_DEVIATION * typical, 1e-6)
        deviation = np.where(known, np.maximum(np.sqrt(variance), least), max(typical, least))
        classes = None if self._anchors is None else self._classes(self._anchors, mean, deviation)
        return ScoreNormalisation(mean.astype(np.float32), deviation.astype(np.float32), classes)

    def _classes(
        self, anchors: np.ndarray, mean: np.ndarray, deviation: np.ndarray
    ) -> PatchClasses:
        """Return mean and deviation of z_cell by class, from the joint sums."""
        count, sums, squares = self._sums  # each (classes, *CELLS_HW)
        z = (sums - mean * count) / deviation
        z_squares = (squares - 2 * mean * sums + mean**2 * count) / deviation**2
        patches = count.sum(axis=(1, 2))  # (classes,)
        # The prior frames have as many patches of the class as the frames that showed it.
        prior = _PRIOR_FRAMES * np.maximum(patches, 1) / np.maximum(self._frames_of_class, 1)
        class_mean = z.sum(axis=(1, 2)) / (patches + prior)
        variance = (z_squares.sum(axis=(1, 2)) + prior) / (patches + prior) - class_mean**2
        class_deviation = np.sqrt(np.maximum(variance, _LEAST_CLASS_DEVIATION**2))
        return PatchClasses(
            anchors, class_mean.astype(np.float32), class_deviation.astype(np.float32)
        )


@dataclass(frozen=True, eq=False)
class ScoreNormalisation:
    """Mean and deviation of nominal distances by image cell and by patch class.

    Attributes:
        mean, deviation: `CELLS_HW` float32, means in [0, 2], deviations > 0.
        classes: mean and deviation of z_cell by patch class; None: one class.

    Raises:
        CalibrationError: other shapes, or numbers out of range.
    """

    mean: np.ndarray
    deviation: np.ndarray
    classes: PatchClasses | None = None

    def __post_init__(self) -> None:
        for name, values in (("mean", self.mean), ("deviation", self.deviation)):
            if values.shape != CELLS_HW or values.dtype != np.float32:
                raise CalibrationError(
                    f"score normalisation: {name}: expected {CELLS_HW} float32, "
                    f"found {values.shape} {values.dtype}"
                )
        # NaN fails the comparisons.
        if not np.all((self.mean >= 0) & (self.mean <= 2)):
            raise CalibrationError("score normalisation: expected means in [0, 2]")
        if not np.all((self.deviation > 0) & (self.deviation <= 2)):
            raise CalibrationError("score normalisation: expected deviations above 0, at most 2")

    def parameters(
        self, inside: np.ndarray, embeddings: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and deviation, (n,) float32 each, such that z = (d - mean) / deviation.

        Args:
            inside: (rows, cols) bool, the n patches that have a distance.
            embeddings: (n, dim) float32, of those patches.

        Raises:
            CalibrationError: embeddings of another dimension than the patch classes have.
        """
        mean, deviation = (
            cv2.resize(values, inside.shape[::-1], interpolation=cv2.INTER_LINEAR)[inside]
            for values in (self.mean, self.deviation)
        )  # (n,)
        if self.classes is None:
            return mean, deviation
        patch_class = class_of(embeddings, self.classes.anchors)  # (n,)
        # z = ((d - mean) / deviation - class_mean) / class_deviation
        mean = mean + deviation * self.classes.mean[patch_class]
        return mean, deviation * self.classes.deviation[patch_class]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        classes = None
        if self.classes is not None:
            classes = {name: _plain(values) for name, values in vars(self.classes).items()}
        return {"mean": _plain(self.mean), "deviation": _plain(self.deviation), "classes": classes}

    @classmethod
    def from_dict(cls, values: Any) -> ScoreNormalisation:
        """Make a normalisation from the values of `to_dict`.

        Raises:
            CalibrationError: keys missing or unknown, or values that are no numbers in range.
        """
        if not isinstance(values, Mapping) or set(values) != {"mean", "deviation", "classes"}:
            raise CalibrationError("score normalisation: expected mean, deviation and classes")
        classes = values["classes"]
        if classes is not None:
            if not isinstance(classes, Mapping) or set(classes) != {"anchors", "mean", "deviation"}:
                raise CalibrationError(
                    "score normalisation: patch classes: expected anchors, mean and deviation"
                )
            classes = PatchClasses(**{name: _float32(rows) for name, rows in classes.items()})
        return cls(_float32(values["mean"]), _float32(values["deviation"]), classes)


def constant_normalisation(mean: float, deviation: float) -> ScoreNormalisation:
    """Return a normalisation with the same mean and deviation everywhere."""
    return ScoreNormalisation(
        np.full(CELLS_HW, mean, np.float32), np.full(CELLS_HW, deviation, np.float32)
    )


def normalisations_without(
    folds: Mapping[int, Sequence[NormalisationSums]], left_out: int | None
) -> list[ScoreNormalisation]:
    """Return the normalisation of each stage from all folds but one.

    So no frame is standardised by itself. If only one fold has frames, it is used nevertheless.

    Args:
        folds: sums of each stage by fold.
        left_out: fold to leave out; None: none.

    Raises:
        CalibrationError: no frame was added.
    """
    others = [sums for fold, sums in folds.items() if fold != left_out] or [*folds.values()]
    return [reduce(add, of_stage).normalisation() for of_stage in zip(*others, strict=True)]


def _plain(values: np.ndarray) -> list[Any]:
    # Nine digits identify a float32; more would be noise in the digest.
    if values.ndim > 1:
        return [_plain(row) for row in values]
    return [float(f"{value:.9g}") for value in values]


def _float32(rows: Any) -> np.ndarray:
    try:
        return np.array(rows, np.float32)
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"score normalisation: not a table of numbers: {error}") from error


def _cell_of(grid_hw: tuple[int, ...]) -> np.ndarray:
    """Return (rows, cols) int, the number of the cell of each patch."""
    rows, cols = (
        np.minimum(np.arange(n) * cells // n, cells - 1)
        for n, cells in zip(grid_hw, CELLS_HW, strict=True)
    )
    return rows[:, None] * CELLS_HW[1] + cols  # (rows, cols)
