"""From the embeddings of a frame to its anomaly map and score.

A stage is one path from a patch grid to a map of standardised distances z (`normalisation.py`): the
patches themselves (grid), or instances pooled over masks, whose distance holds on all patches that
they cover. The anomaly map is the mean of the stages' maps where instances are, and the map of the
grid elsewhere, in units of a typical nominal distance, and smoothed:

    anomaly_map = smoothed(clip(mean_unit + deviation_unit * mean over stages of z, 0, 2))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from semantic_anomaly.index.build import INSTANCES
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import RegionOfInterest, patches_inside
from semantic_anomaly.scoring.anomaly_map import smoothed, smoothing_support, tail_count, tail_mean
from semantic_anomaly.scoring.normalisation import ScoreNormalisation
from semantic_anomaly.segmentation.masks import instances_of
from semantic_anomaly.settings import GRID, INSTANCE, Settings
from semantic_anomaly.structures import PatchGrid

NO_INSTANCES = "no instances: scored by patches alone"
NOT_CALIBRATED = "calibration frames had no instances: scored by patches alone"


@dataclass(frozen=True, eq=False)
class DistanceMap:
    """The distances of one stage.

    Attributes:
        values: (rows, cols) float32 in [0, 2], 0 where there is no distance.
        inside: (rows, cols) bool, the n patches that have a distance.
        embeddings: (n, dim) float32, of those patches.
    """

    values: np.ndarray
    inside: np.ndarray
    embeddings: np.ndarray

    def standardised(self, normalisation: ScoreNormalisation | None) -> np.ndarray:
        """Return (rows, cols) float32 z values, the plain distances for None."""
        if normalisation is None:
            return self.values
        mean, deviation = normalisation.parameters(self.inside, self.embeddings)  # (n,)
        return _painted((self.values[self.inside] - mean) / deviation, self.inside)


@dataclass(frozen=True, eq=False)
class FrameScore:
    """The score of a frame.

    Attributes:
        score: in [0, 2].
        anomaly_map: (rows, cols) float32 in [0, 2], 0 outside the region of interest.
        parts: score of each stage in deviations, where there are several and a calibration.
        note: a remark for people, may be empty.
    """

    score: float
    anomaly_map: np.ndarray
    parts: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


class FrameScorer:
    """Scores frames against an index.

    Args:
        index: has the part that the variant needs.
        settings: `variant`, `neighbours`, `smoothing`, `tail_percent`; none of them is live.
        roi: patches outside are ignored.
    """

    def __init__(self, index: NominalIndex, settings: Settings, roi: RegionOfInterest) -> None:
        self._index, self._settings, self._roi = index, settings, roi

    def distance_maps(self, grid: PatchGrid) -> dict[str, DistanceMap]:
        """Return the distances of each stage, for calibration.

        Raises:
            ModelOutputError: instances are needed and the grid has none computed.
            SettingsError: no patch lies inside the region of interest.
        """
        inside = patches_inside(grid, self._roi)
        embeddings = grid.features[inside]
        distances = self._distances(embeddings, inside, lambda d: _painted(d, inside), 0.0, None)
        patches = DistanceMap(_painted(distances, inside), inside, embeddings)
        return {GRID: patches, **self._instance_maps(grid)}

    def score(
        self,
        grid: PatchGrid,
        normalisations: Mapping[str, ScoreNormalisation],
        threshold: float | None,
    ) -> FrameScore:
        """Return score and anomaly map of a frame.

        The score, and every value of the map above the threshold, is that of an exact search.

        Args:
            grid: embeddings of the frame.
            normalisations: by stage; empty: the map consists of plain distances.
            threshold: of the score; None: there is none.

        Raises:
            ModelOutputError: a distance is not finite, or the grid has no instances computed.
            SettingsError: no patch lies inside the region of interest.
        """
        settings = self._settings
        inside = patches_inside(grid, self._roi)
        embeddings = grid.features[inside]
        maps, note = self._instance_maps(grid), ""
        if settings.segments and not maps:
            note = NO_INSTANCES
        elif normalisations and not maps.keys() <= normalisations.keys():
            maps, note = {}, NOT_CALIBRATED
        z_maps = {name: m.standardised(normalisations.get(name)) for name, m in maps.items()}
        mean, deviation = np.float32(0.0), np.float32(1.0)
        unit_mean, unit_deviation = 0.0, 1.0
        if normalisations:
            mean, deviation = normalisations[GRID].parameters(inside, embeddings)  # (n,)
            unit_mean, unit_deviation = normalisations[GRID].unit

        def grid_z(distances: np.ndarray) -> np.ndarray:
            return _painted((distances - mean) / deviation, inside)

        def to_map(distances: np.ndarray) -> np.ndarray:
            z = grid_z(distances)
            if maps:
                stages = list(z_maps.values())
                if settings.variant != INSTANCE:
                    stages.insert(0, z)
                covered = next(iter(maps.values())).inside & inside
                z = np.where(covered, np.mean(stages, axis=0, dtype=np.float32), z)
            values = np.clip(z * np.float32(unit_deviation) + np.float32(unit_mean), 0.0, 2.0)
            return smoothed(np.where(inside, values, np.float32(0)), inside, settings.smoothing)

        distances = self._distances(embeddings, inside, to_map, settings.smoothing, threshold)
        anomaly_map = to_map(distances)
        parts = {}
        if settings.segments and normalisations:
            parts = {
                name: tail_mean(
                    smoothed(z, inside, settings.smoothing)[inside], settings.tail_percent
                )
                for name, z in {GRID: grid_z(distances), **z_maps}.items()
            }
        score = tail_mean(anomaly_map[inside], settings.tail_percent)
        return FrameScore(score, anomaly_map, parts, note)

    def _distances(
        self,
        embeddings: np.ndarray,
        inside: np.ndarray,
        to_map: Callable[[np.ndarray], np.ndarray],
        smoothing: float,
        threshold: float | None,
    ) -> np.ndarray:
        """Return (n,) distances, exact wherever score or decision depend on them.

        A graph search can only overestimate a distance, and the map grows with every distance.
        Once the K values of the map that were largest are exact, their minimum is a lower bound of
        the K-th largest exact value, so any value that is not above it need not be exact. Two exact
        searches are enough: the K largest, then everything above that bound or the threshold.

        Args:
            embeddings: (n, dim) float32, of the patches inside.
            inside: (rows, cols) bool.
            to_map: makes the (rows, cols) map, of this smoothing, of (n,) distances.
            smoothing, threshold: as for the map and the score.
        """
        neighbours = self._settings.neighbours
        distances = self._index.distances(embeddings, neighbours)  # (n,) upper bounds
        if self._index.search_is_exact:
            return distances
        exact = np.zeros(len(distances), bool)

        def search_exactly(chosen: np.ndarray) -> None:
            """Make exact what the chosen (n,) values of the map depend on."""
            rows = smoothing_support(_painted(chosen, inside), smoothing)[inside] & ~exact
            distances[rows] = self._index.exact_distances(embeddings[rows], neighbours)
            exact[rows] = True

        count = tail_count(len(distances), self._settings.tail_percent)
        largest = np.zeros(len(distances), bool)
        largest[np.argpartition(to_map(distances)[inside], len(distances) - count)[-count:]] = True
        search_exactly(largest)
        values = to_map(distances)[inside]
        bound = float(values[largest].min())
        search_exactly(values > (bound if threshold is None else min(bound, threshold)))
        return distances

    def _instance_maps(self, grid: PatchGrid) -> dict[str, DistanceMap]:
        """Return the distances of instances on the patches that they cover; empty without any."""
        if not self._settings.segments:
            return {}
        instances = instances_of(grid, self._roi)
        if not len(instances.embeddings):
            return {}
        part = self._index.parts[INSTANCES]
        neighbours = min(self._settings.neighbours, part.count)
        distances = part.exact_distances(instances.embeddings, neighbours)  # (instances,)
        covered = instances.covered
        values = instances.paint(distances) * covered
        return {INSTANCES: DistanceMap(values, covered, grid.features[covered])}


def _painted(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Return (rows, cols) with the (n,) values inside, 0 elsewhere."""
    painted = np.zeros(inside.shape, values.dtype)
    painted[inside] = values
    return painted
