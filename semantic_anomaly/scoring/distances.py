"""Comparison with the nominal frames that resemble an image, rather than with all of them.

From the embeddings of a frame to its map of distances, by patches, instances and surroundings.

Each branch gives a distance to every place: a patch its own, an instance its own to all patches
that it covers, overlapping ones by what they cover. The distance of a pair is taken relative to
what its surroundings alone would give, for surroundings are new by themselves. Branches are
standardised by what is usual at each place in nominal calibration frames (`places.py`) and
averaged, in the unit of the grid. Where there is no instance, the grid alone counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from semantic_anomaly.detection.filters import patch_agreement
from semantic_anomaly.errors import IndexMismatchError
from semantic_anomaly.index.build import INSTANCES, PAIRS, SCENES, unit_scene
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.index.search import mean_distances
from semantic_anomaly.linalg import inner_products
from semantic_anomaly.roi import ImageRegion, patch_regions
from semantic_anomaly.scoring.anomaly_map import ScoreMap, smoothed, tail_count, tail_mean
from semantic_anomaly.scoring.normalisation import UsualDistances
from semantic_anomaly.segmentation.masks import Instances, Pairs, instances_of, pairs_of
from semantic_anomaly.settings import GRID, INSTANCE, Settings
from semantic_anomaly.structures import PatchGrid


class SceneSearch:
    """Exact distances to the entries of the nominal frames whose global feature is nearest.

    An index leaves out what resembles an earlier entry, and then the frames that resemble an image
    do not have everything that they showed: build with `dedup_distance` 0 for exact scenes.

    Args:
        index: with a part of scenes.
        frames: how many of the frames that have entries are compared.

    Raises:
        IndexMismatchError: none of the scenes is of a frame that has entries.
    """

    def __init__(self, index: NominalIndex, frames: int) -> None:
        content, scenes = index.content, index.parts[SCENES].content
        self._entries = content.embeddings
        self._order = np.argsort(content.entries[:, 0], kind="stable")
        bounds = np.searchsorted(
            content.entries[self._order, 0], np.arange(len(content.frames) + 1)
        )
        pieces = np.split(self._order, bounds[1:-1])
        # Frames of different drives may have the same name, but not the same picture as well.
        rows = {
            (frame.name, frame.thumbnail): piece
            for frame, piece in zip(content.frames, pieces, strict=True)
            if len(piece)
        }
        seen = [scenes.frames[number] for number in scenes.entries[:, 0].tolist()]
        known = [n for n, frame in enumerate(seen) if (frame.name, frame.thumbnail) in rows]
        if not known:
            raise IndexMismatchError("index: scenes", "those of frames with entries", "none")
        self._rows = [rows[seen[n].name, seen[n].thumbnail] for n in known]
        self._scenes = np.ascontiguousarray(scenes.embeddings[known])
        self._frames = min(frames, len(known))

    def distances(self, grid: PatchGrid, embeddings: np.ndarray, k: int) -> np.ndarray:
        """Return (n,) float32 mean cosine distance in [0, 2] to the k nearest of those entries.

        Args:
            grid: of the image; its global feature says which frames it resembles.
            embeddings: (n, dim) float32, unit norm.
            k: >= 1; all of them where there are fewer.
        """
        whole = unit_scene(grid)[None]
        similar = inner_products(whole, self._scenes.T)[0]
        nearest = np.argsort(-similar, kind="stable")[: self._frames]
        rows = np.unique(np.concatenate([self._rows[n] for n in nearest]))
        return mean_distances(embeddings, self._entries[rows], min(k, len(rows)))


NO_INSTANCES = "no instances: scored by patches alone"
NOTHING_USUAL = "instances of which calibration knows nothing usual: scored by patches alone"
# Of the patches where the grid is one branch of several: the largest fiftieth is exact, about as
# many as lie two deviations above what is usual.
_EXACT_SHARE = 50
# Deviations above what is usual from which a patch, or a pair, is unusual by itself.
_UNUSUAL = 2.0


@dataclass(frozen=True, eq=False)
class DistanceMap:
    """The distances of one branch.

    Attributes:
        values: (rows, cols) float32 in [0, 2], 0 where nothing takes part.
        inside: (rows, cols) bool, places that have a distance.
        embeddings: (n, dim) float32, of the patches at those places.
    """

    values: np.ndarray
    inside: np.ndarray
    embeddings: np.ndarray

    def relative(self, usual: UsualDistances | None) -> np.ndarray:
        """Return (rows, cols) float32, deviations from what is usual; plain ones for None."""
        if usual is None:
            return self.values
        factor, offset = usual.relation(self.inside, self.embeddings)
        mean, deviation = usual.typical
        found = np.zeros(self.values.shape, np.float32)
        found[self.inside] = (factor * self.values[self.inside] + offset - mean) / deviation
        return found


@dataclass(frozen=True, eq=False)
class FrameScore:
    """The score of a frame.

    Attributes:
        score: in [0, 2].
        distances: (rows, cols) float32 in [0, 2], the map that the score is made of.
        parts: deviations of each branch by itself, where there are several and a calibration.
        note: what is to be said of it, may be empty.
    """

    score: float
    distances: np.ndarray
    parts: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


class Branches:
    """Scores frames by the branches that the settings ask for.

    Args:
        index: has the parts that they need.
        settings: `variant` and what shapes a distance or a score; none of them is live.
        region: what takes part.
    """

    def __init__(self, index: NominalIndex, settings: Settings, region: ImageRegion) -> None:
        self._index, self._settings, self._region = index, settings, region
        self._parts = index.parts
        self._scenes = SceneSearch(index, settings.scene_frames) if settings.scene_frames else None
        self._surroundings: np.ndarray | None = None
        if settings.surroundings_weight:
            pairs = self._parts[PAIRS].content.embeddings
            around = pairs[:, pairs.shape[1] // 2 :]
            lengths = np.linalg.norm(around, axis=1, keepdims=True)
            self._surroundings = np.ascontiguousarray(around / lengths)

    def maps(self, grid: PatchGrid) -> dict[str, DistanceMap]:
        """Return the plain distances of every branch, for calibration.

        Raises:
            ModelOutputError: a distance is not finite, or there are no instances to look at.
        """
        regions = patch_regions(grid, self._region)
        distances = self._patch_distances(grid, regions.embeddings, None, None)
        inside = regions.label_map >= 0
        maps = {GRID: DistanceMap(regions.paint(distances), inside, regions.embeddings)}
        instances, values = self._instance_values(grid)
        return {**maps, **_painted(grid, instances, values)} if instances else maps

    def score(
        self, grid: PatchGrid, usual: Mapping[str, UsualDistances], threshold: float | None
    ) -> FrameScore:
        """Return the score of a frame.

        Patches alone are exact above the threshold and in the tail, whatever the search; beside
        instances, which are always exact, the largest fiftieth of them.

        Args:
            grid: of the frame.
            usual: by branch; empty: distances are relative to nothing.
            threshold: of the frame score; None: there is none.

        Raises:
            ModelOutputError: a distance is not finite, or there are no instances to look at.
            SettingsError: no patch takes part.
        """
        regions = patch_regions(grid, self._region)
        inside, percent = regions.label_map >= 0, self._settings.tail_percent
        relation = usual[GRID].relation(inside, regions.embeddings) if usual else None
        scored = ScoreMap(inside, relation, self._settings.smoothing)
        alone = self._settings.variant == GRID
        # With the tail exact the score is exact, whatever the search: no false alarms by its error.
        distances = self._patch_distances(
            grid, regions.embeddings, scored, threshold if alone else None
        )
        if not alone:
            patches = DistanceMap(regions.paint(distances), inside, regions.embeddings)
            return self._combined(grid, patches, usual)
        values = scored.values(distances)
        return FrameScore(tail_mean(values, percent), regions.paint(values))

    def _patch_distances(
        self,
        grid: PatchGrid,
        embeddings: np.ndarray,
        scored: ScoreMap | None,
        threshold: float | None,
    ) -> np.ndarray:
        k = self._settings.neighbours
        if self._scenes is not None:
            return self._scenes.distances(grid, embeddings, k)
        top = tail_count(len(embeddings), self._settings.tail_percent)
        if self._settings.variant != GRID:
            top = max(top, len(embeddings) // _EXACT_SHARE)
        return self._index.distances(
            embeddings, k, exact_above=threshold, exact_top=top, ranking=scored
        )

    def _instance_values(self, grid: PatchGrid) -> tuple[Instances | None, dict[str, np.ndarray]]:
        """Return the instances, None without any, and by branch their (n,) plain distances."""
        if self._settings.variant == GRID:
            return None, {}
        instances = instances_of(grid, self._region)
        if not len(instances.embeddings):
            return None, {}
        part = self._parts[INSTANCES]
        values = {
            INSTANCES: part.exact_distances(
                instances.embeddings, min(self._settings.neighbours, part.count)
            )
        }
        weight = self._settings.surroundings_weight
        if weight:
            pairs = pairs_of(grid, instances, self._region, weight)
            values[PAIRS] = self._pair_distances(pairs, weight)
        return instances, values

    def _pair_distances(self, pairs: Pairs, weight: float) -> np.ndarray:
        """Return (n,) float32: how much farther the pair is than its surroundings explain."""
        assert self._surroundings is not None
        part = self._parts[PAIRS]
        k = min(self._settings.neighbours, part.count)
        around = mean_distances(pairs.surroundings, self._surroundings, k)
        excess = part.exact_distances(pairs.embeddings, k) - np.float32(weight) * around
        return np.asarray(np.clip(excess, 0.0, 2.0), np.float32)

    def _combined(
        self, grid: PatchGrid, patches: DistanceMap, usual: Mapping[str, UsualDistances]
    ) -> FrameScore:
        percent, inside = self._settings.tail_percent, patches.inside
        instances, values = self._instance_values(grid)
        note = "" if instances else NO_INSTANCES
        if usual and not values.keys() <= usual.keys():
            instances, note = None, NOTHING_USUAL
        if instances and usual and self._settings.min_agreement:
            kept = self._agreeing(grid, instances, values, patches, usual)
            instances = Instances(instances.embeddings[kept], instances.shares[kept])
            values = {name: each[kept] for name, each in values.items()}
        maps = _painted(grid, instances, values) if instances else {}
        relative = {GRID: patches.relative(usual.get(GRID))}
        relative |= {name: found.relative(usual.get(name)) for name, found in maps.items()}
        counted = list(maps) if self._settings.variant == INSTANCE else [GRID, *maps]
        mixed = relative[GRID]
        if maps:
            covered = next(iter(maps.values())).inside & inside
            mean = np.mean([relative[name] for name in counted], axis=0, dtype=np.float32)
            mixed = np.where(covered, mean, mixed)
        unit = usual[GRID].typical if usual else (0.0, 1.0)
        distances = np.clip(mixed * np.float32(unit[1]) + np.float32(unit[0]), 0.0, 2.0)
        smoothing = self._settings.smoothing
        distances = smoothed(distances.astype(np.float32), inside, smoothing) * inside
        # Plain distances are no deviations.
        parts = {
            name: tail_mean(smoothed(each, inside, smoothing)[inside], percent)
            for name, each in (relative if usual else {}).items()
        }
        return FrameScore(tail_mean(distances[inside], percent), distances, parts, note)

    def _agreeing(
        self,
        grid: PatchGrid,
        instances: Instances,
        values: Mapping[str, np.ndarray],
        patches: DistanceMap,
        usual: Mapping[str, UsualDistances],
    ) -> np.ndarray:
        """Return (n,) bool: instances of which enough patches, or the pair, are unusual."""
        count = len(instances.shares)
        weights = instances.shares.reshape(count, -1)
        weights = weights / weights.sum(axis=1, keepdims=True)
        unusual = patches.relative(usual[GRID]) > _UNUSUAL
        kept = patch_agreement(weights, unusual.ravel()) >= self._settings.min_agreement
        if PAIRS in values:
            everywhere = np.ones(patches.inside.shape, bool)
            relation = usual[PAIRS].relation(everywhere, grid.features.reshape(-1, grid.dim))
            own = weights @ np.stack(relation, axis=1)
            mean, deviation = usual[PAIRS].typical
            relative = (own[:, 0] * values[PAIRS] + own[:, 1] - mean) / deviation
            kept |= relative > _UNUSUAL
        return np.asarray(kept)


def _painted(
    grid: PatchGrid, instances: Instances, values: Mapping[str, np.ndarray]
) -> dict[str, DistanceMap]:
    """Return the maps of branches from the (n,) distances of their instances."""
    covered = instances.covered
    embeddings = grid.features[covered]
    return {
        name: DistanceMap(instances.paint(each) * covered, covered, embeddings)
        for name, each in values.items()
    }
