"""From the embeddings of a frame to its anomaly map and score.

Each stage gives a map of standardised distances z (`normalisation.py`); an instance has one
distance on all patches that it covers. The anomaly map is the mean of the stages' maps by weight,
on the finest grid, smoothed:

    anomaly_map = smoothed(sum_s weight_s * resized(z_s) / sum_s weight_s)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

from semantic_anomaly.errors import IndexMismatchError, ModelOutputError
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.anomaly_map import smoothed, smoothing_support, tail_count, tail_mean
from semantic_anomaly.scoring.normalisation import ScoreNormalisation
from semantic_anomaly.segmentation.masks import StageEmbeddings, stage_embeddings
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import PatchGrid
from semantic_anomaly.timing import SEARCH, timed

# 4:3 and 16:9 differ by a factor of 1.33; 16:9 and 2:1, which occur in one set, by 1.13.
_MAX_RATIO_FACTOR = 1.25
# A patch of the finest grid has a value of a stage where so much of the interpolation is inside.
_LEAST_WEIGHT = 1e-3
# Share of the patches up to which localizations are those of an exact search.
_MAX_EXACT_SHARE = 0.05
# More values than the score needs are made exact at once: each search reads all entries.
_SPARE = 1.5


@dataclass(frozen=True, eq=False)
class DistanceMap:
    """The distances of one stage.

    Attributes:
        values: (rows, cols) float32 in [0, 2], 0 outside the region of interest.
        inside: (rows, cols) bool, the n patches of the region of interest.
        embeddings: (n, dim) float32, of those patches.
    """

    values: np.ndarray
    inside: np.ndarray
    embeddings: np.ndarray


@dataclass(frozen=True, eq=False)
class StageMap:
    """The map of one stage on the finest grid.

    Attributes:
        values: (rows, cols) float32, standardised distances times weight.
        embeddings: of the stage, on its own grid.
    """

    values: np.ndarray
    embeddings: StageEmbeddings


@dataclass(frozen=True, eq=False)
class FrameScore:
    """The score of a frame.

    Attributes:
        score: in deviations of nominal distances; any finite number.
        anomaly_map: (rows, cols) float32 on the finest grid, 0 outside the region of interest.
        inside: (rows, cols) bool, the patches of the region of interest.
        stage_maps: what the map is the sum of.
        stage_scores: score of each stage alone by its name, an upper bound where the search is not
            exact; empty for one stage.
        coarse: whether more than 5 % of the patches exceed the threshold; values of the map that
            the score does not depend on are then upper bounds.
    """

    score: float
    anomaly_map: np.ndarray
    inside: np.ndarray
    stage_maps: tuple[StageMap, ...]
    stage_scores: Mapping[str, float] = field(default_factory=dict)
    coarse: bool = False


class FrameScorer:
    """Scores frames against an index.

    Args:
        index: has the stages of the grids.
        settings: `neighbours`, `smoothing`, `tail_percent`; none of them is live.
        roi: patches outside are ignored.
    """

    def __init__(self, index: NominalIndex, settings: Settings, roi: RegionOfInterest) -> None:
        self._index, self._settings, self._roi = index, settings, roi
        self._ratios = {frame.cols / frame.rows for frame in index.content.frames}
        names = [stage.stage.name for stage in index.stages]
        # Different backbones in two folders may have one name.
        self._stage_names = [
            name if names.count(name) == 1 else f"{name} ({number})"
            for number, name in enumerate(names)
        ]

    def distance_maps(self, grid: PatchGrid) -> list[DistanceMap]:
        """Return distances of each stage for calibration: the largest exact, others upper bounds.

        Raises:
            ModelOutputError: the image has grids of another number of stages.
            IndexMismatchError: the image has another ratio of its sides than those of the index.
            SettingsError: no patch lies inside the region of interest.
        """
        self._check_grid(grid)
        maps = []
        for index, stage_grid in zip(self._index.stages, grid.stages, strict=True):
            stage = stage_embeddings(stage_grid, self._roi)
            neighbours = self._settings.neighbours
            frame = _Frame([_Stage.of(index, stage, 1.0, None, neighbours)], self._settings)
            frame.search()
            values = stage.paint(frame.stages[0].distances)
            maps.append(DistanceMap(values, stage.inside, stage.features[stage.inside]))
        return maps

    def score(
        self,
        grid: PatchGrid,
        normalisations: Sequence[ScoreNormalisation],
        threshold: float | None,
    ) -> FrameScore:
        """Return score and anomaly map of a frame.

        The score is that of an exact search, and so is every value of the map above the threshold
        unless the result is coarse.

        Args:
            grid: embeddings of the frame.
            normalisations: of each stage.
            threshold: of the score; None: there is none.

        Raises:
            ModelOutputError: a distance is not finite, or the image has grids of another number of
                stages.
            IndexMismatchError: the image has another ratio of its sides than those of the index.
            SettingsError: no patch lies inside the region of interest.
        """
        self._check_grid(grid)
        settings = self._settings
        stages = [
            _Stage.of(
                index,
                stage_embeddings(stage_grid, self._roi),
                index.stage.spec.weight,
                normalisation,
                settings.neighbours,
            )
            for index, stage_grid, normalisation in zip(
                self._index.stages, grid.stages, normalisations, strict=True
            )
        ]
        frame = _Frame(stages, settings)
        frame.search(threshold)
        anomaly_map = frame.anomaly_map()
        stage_maps = frame.stage_maps()
        stage_scores = {}
        if len(stages) > 1:
            stage_scores = {
                name: tail_mean(
                    smoothed(values, frame.inside, settings.smoothing)[frame.inside],
                    settings.tail_percent,
                )
                for name, values in zip(self._stage_names, frame.z_maps(), strict=True)
            }
        return FrameScore(
            tail_mean(anomaly_map[frame.inside], settings.tail_percent),
            anomaly_map,
            frame.inside,
            stage_maps,
            stage_scores,
            frame.coarse,
        )

    def _check_grid(self, grid: PatchGrid) -> None:
        expected, found = len(self._index.stages), len(grid.stages)
        if found != expected:
            raise ModelOutputError(
                f"patch grids: expected those of {expected} stages, found {found}"
            )
        height, width = grid.image_hw
        factors = [max(width / height / ratio, ratio * height / width) for ratio in self._ratios]
        if factors and min(factors) > _MAX_RATIO_FACTOR:
            ratios = ", ".join(f"{ratio:.2f}" for ratio in sorted(self._ratios)[:4])
            raise IndexMismatchError(
                "image, width by height",
                f"about {ratios} as in the index",
                f"{width}x{height}, {width / height:.2f}",
                "crop or turn the images as those of the index, or build an index of such images",
            )


@dataclass(eq=False)
class _Stage:
    """A stage of a frame: its embeddings, and their distances as far as they are known.

    Attributes:
        index: the index of the stage.
        embeddings: n embeddings.
        weight: of its map.
        mean, deviation: (rows, cols) float32, of nominal distances.
        neighbours: number of entries of a distance, at most those of the index.
        distances: (n,) float32, upper bounds.
        exact: (n,) bool, distances that are exact.
    """

    index: NominalIndex
    embeddings: StageEmbeddings
    weight: float
    mean: np.ndarray
    deviation: np.ndarray
    neighbours: int
    distances: np.ndarray
    exact: np.ndarray

    @classmethod
    def of(
        cls,
        index: NominalIndex,
        embeddings: StageEmbeddings,
        weight: float,
        normalisation: ScoreNormalisation | None,
        neighbours: int,
    ) -> _Stage:
        inside = embeddings.inside
        mean, deviation = np.zeros(inside.shape, np.float32), np.ones(inside.shape, np.float32)
        if normalisation is not None:
            mean[inside], deviation[inside] = normalisation.parameters(
                inside, embeddings.features[inside]
            )
        count = len(embeddings.embeddings)
        return cls(
            index,
            embeddings,
            weight,
            mean,
            deviation,
            min(neighbours, index.count),
            np.zeros(count, np.float32),
            np.zeros(count, bool),
        )

    def z(self) -> np.ndarray:
        """Return (rows, cols) float32: standardised distances, 0 outside the region of interest."""
        z = (self.embeddings.paint(self.distances) - self.mean) / self.deviation
        return np.where(self.embeddings.inside, z, np.float32(0))


class _Frame:
    """The stages of a frame and their common map.

    Args:
        stages: at least one.
        settings: of the scorer.
    """

    def __init__(self, stages: Sequence[_Stage], settings: Settings) -> None:
        self.stages = stages
        self._settings = settings
        # The finest grid; of equally fine ones the first.
        finest = max(stages, key=lambda stage: stage.embeddings.inside.size)
        self.inside = finest.embeddings.inside
        self.coarse = False
        # (rows, cols) each: how much of the interpolated value of every stage is inside.
        self._shares = [self._resized(stage.embeddings.inside) for stage in stages]
        # The weight of every stage at every patch; they add up to 1 where any stage has a weight.
        weights = [
            stage.weight * (share > _LEAST_WEIGHT)
            for stage, share in zip(stages, self._shares, strict=True)
        ]
        total = np.sum(weights, axis=0)
        total[total == 0.0] = 1.0
        self._weights = [np.asarray(weight / total, np.float32) for weight in weights]

    def search(self, threshold: float | None = None) -> None:
        """Search all distances, exactly wherever score or decision depend on them.

        Distances are upper bounds until they are exact, and the map grows with every distance. Once
        the K largest values of the map are exact, no other value can exceed them: docs/method.md
        has the proof.
        """
        for stage in self.stages:
            with timed(SEARCH):
                stage.distances = stage.index.distances(
                    stage.embeddings.embeddings, stage.neighbours
                )
            stage.exact[:] = stage.index.search_is_exact
        if all(stage.exact.all() for stage in self.stages):
            return
        values = self.anomaly_map()[self.inside]
        count = tail_count(len(values), self._settings.tail_percent)
        most = int(_MAX_EXACT_SHARE * len(values))
        while True:
            values = self.anomaly_map()[self.inside]
            needed = _largest(values, count)
            if threshold is not None:
                above = values > threshold
                self.coarse = bool(above.sum() > most)
                needed |= _largest(values, most + 1) if self.coarse else above
            if self._is_exact(needed):
                break
            spare = min(int(_SPARE * count), len(values))
            self._search_exactly(needed | _largest(values, spare))
        self.coarse &= not all(stage.exact.all() for stage in self.stages)

    def z_maps(self) -> list[np.ndarray]:
        """Return (rows, cols) float32 by stage: standardised distances on the finest grid."""
        maps = []
        for stage, share in zip(self.stages, self._shares, strict=True):
            z = stage.z()
            if z.shape != self.inside.shape:
                z = self._resized(z) / np.maximum(share, np.float32(_LEAST_WEIGHT))
            maps.append(np.where(self.inside, z, np.float32(0)))
        return maps

    def stage_maps(self) -> tuple[StageMap, ...]:
        """Return the map of each stage times its weight."""
        return tuple(
            StageMap(weight * z, stage.embeddings)
            for weight, z, stage in zip(self._weights, self.z_maps(), self.stages, strict=True)
        )

    def anomaly_map(self) -> np.ndarray:
        """Return (rows, cols) float32, 0 outside the region of interest."""
        total = np.sum([stage_map.values for stage_map in self.stage_maps()], axis=0)
        return smoothed(total, self.inside, self._settings.smoothing)

    def _resized(self, values: np.ndarray) -> np.ndarray:
        """Return float32 values of a coarser grid, interpolated on the finest."""
        values = values.astype(np.float32)
        if values.shape == self.inside.shape:
            return values
        return cv2.resize(values, self.inside.shape[::-1], interpolation=cv2.INTER_LINEAR)

    def _is_exact(self, chosen: np.ndarray) -> bool:
        """Return whether chosen values of the map depend on exact distances only."""
        return next(self._rows_behind(chosen), None) is None

    def _search_exactly(self, chosen: np.ndarray) -> None:
        """Make exact what the chosen values of the map inside the region of interest depend on."""
        for stage, rows in self._rows_behind(chosen):
            queries = stage.embeddings.embeddings[rows]
            with timed(SEARCH):
                stage.distances[rows] = stage.index.exact_distances(
                    queries, stage.neighbours, stage.distances[rows]
                )
            stage.exact[rows] = True

    def _rows_behind(self, chosen: np.ndarray) -> Iterator[tuple[_Stage, np.ndarray]]:
        """Yield stages, and (n,) bool: distances behind chosen values that are not exact."""
        chosen_map = np.zeros(self.inside.shape, bool)
        chosen_map[self.inside] = chosen
        support = smoothing_support(chosen_map, self._settings.smoothing)
        for stage in self.stages:
            if not stage.weight:
                continue
            cells = support
            if support.shape != stage.embeddings.inside.shape:
                cells = _coarse_support(support, stage.embeddings.inside.shape)
            rows = stage.embeddings.painting(cells) & ~stage.exact
            if rows.any():
                yield stage, rows


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Return (n,) bool: the largest `count` of (n,) values."""
    largest = np.zeros(len(values), bool)
    largest[np.argpartition(values, len(values) - count)[len(values) - count :]] = True
    return largest


def _coarse_support(chosen: np.ndarray, grid_hw: tuple[int, int]) -> np.ndarray:
    """Return (rows, cols) bool: patches of another grid that interpolated ones depend on.

    Args:
        chosen: bool, patches of the grid on which the other is interpolated.
        grid_hw: (rows, cols) of the other grid.
    """
    support = np.zeros(grid_hw, bool)
    sources = [
        _interpolated_from(index, fine, coarse)
        for index, fine, coarse in zip(np.nonzero(chosen), chosen.shape, grid_hw, strict=True)
    ]
    for row in sources[0]:
        for col in sources[1]:
            support[row, col] = True
    return support


def _interpolated_from(
    index: np.ndarray, count: int, source_count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the two samples of `source_count` that linear interpolation to `count` mixes."""
    before = np.floor((index + 0.5) * source_count / count - 0.5).astype(int)
    return before.clip(0, source_count - 1), (before + 1).clip(0, source_count - 1)
