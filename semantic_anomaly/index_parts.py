"""What an index holds besides patches: instances, pairs with surroundings, and whole scenes.

Each is a part of the index, an index of its own with the same manifest, checks and edits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from semantic_anomaly.errors import IndexFormatError, IndexMismatchError
from semantic_anomaly.index_build import Graph, Selection
from semantic_anomaly.instances import Instances, instances_of, pairs_of
from semantic_anomaly.nominal_frames import NominalFrame, NominalPlaces
from semantic_anomaly.regions import ImageRegion
from semantic_anomaly.segmentation import SegmenterIdentity
from semantic_anomaly.settings import Settings
from semantic_anomaly.storage import canonical_json
from semantic_anomaly.structures import PatchGrid

INSTANCES, PAIRS, SCENES = "instances", "pairs", "scenes"
# Of the first frames, which say how far apart instances that are alike lie.
_MEASURED_FRAMES = 8
_SUITABLE_SHARE = 0.5


@dataclass(frozen=True)
class PartPlan:
    """Which parts an index has, and what they are made with.

    Attributes:
        segmenter: that finds the instances; None: there is no such part.
        surroundings_weight: of the pairs, in [0, 1); 0: there is no such part.
        scenes: whether global features are kept.
    """

    segmenter: SegmenterIdentity | None = None
    surroundings_weight: float = 0.0
    scenes: bool = False

    @classmethod
    def of_settings(cls, settings: Settings, segmenter: SegmenterIdentity | None) -> PartPlan:
        """Return the plan of an index that is to serve these settings."""
        weight = settings.surroundings_weight if segmenter else 0.0
        return cls(segmenter, weight, settings.scene_frames > 0)

    @classmethod
    def of_made(cls, made: Mapping[str, Mapping[str, Any]]) -> PartPlan:
        """Return the plan that parts were made by, from what `made` says of each of them.

        Parts of other names are none of its business.

        Raises:
            IndexFormatError: it says nothing of the kind.
        """
        told = {name: each for name, each in made.items() if name in (INSTANCES, PAIRS, SCENES)}
        segmenter, weight = None, 0.0
        try:
            if INSTANCES in told:
                segmenter = SegmenterIdentity.from_dict(told[INSTANCES]["segmenter"])
            if PAIRS in told:
                weight = told[PAIRS]["surroundings_weight"]
            plan = cls(segmenter, weight, SCENES in told)
            sound = not weight or (type(weight) is float and 0.0 < weight < 1.0)
            agree = sound and canonical_json(plan.made) == canonical_json(told)
        except (KeyError, TypeError, ValueError) as error:
            raise IndexFormatError(f"parts of an index: {type(error).__name__}: {error}") from error
        if not agree:
            raise IndexFormatError(
                f"parts of an index: expected what they are made with to agree, found {told!r:.300}"
            )
        return plan

    @property
    def made(self) -> dict[str, dict[str, Any]]:
        """Return what the manifest of each part says of how its embeddings are made."""
        parts: dict[str, dict[str, Any]] = {}
        if self.segmenter is not None:
            parts[INSTANCES] = {"segmenter": self.segmenter.to_dict()}
            if self.surroundings_weight:
                weight = {"surroundings_weight": self.surroundings_weight}
                parts[PAIRS] = {**parts[INSTANCES], **weight}
        if self.scenes:
            parts[SCENES] = {"scenes": "global_feature"}
        return parts

    def check(self, wanted: PartPlan) -> None:
        """Refuse to serve what needs other parts.

        Args:
            wanted: what the running settings need.

        Raises:
            IndexMismatchError: naming the part, what is needed and what there is.
        """
        advice = "build the index again with the settings it is to be used with"
        if wanted.segmenter is not None:
            if self.segmenter is None:
                raise IndexMismatchError("index: instances", "a part of them", "none", advice)
            self.check_segmenter(wanted.segmenter)
        weights = self.surroundings_weight, wanted.surroundings_weight
        if wanted.surroundings_weight and weights[0] != weights[1]:
            raise IndexMismatchError("index: surroundings_weight", *weights, advice)
        if wanted.scenes and not self.scenes:
            raise IndexMismatchError("index: scenes", "a part of them", "none", advice)

    def check_segmenter(self, running: SegmenterIdentity | None) -> None:
        """Raise IndexMismatchError where the parts' instances are another segmenter's."""
        if self.segmenter is not None and not (running and self.segmenter.matches(running)):
            found = f"{running.family} {running.digest[:12]}" if running else "none"
            raise IndexMismatchError(
                "index: segmenter",
                f"{self.segmenter.family} {self.segmenter.digest[:12]}",
                found,
                "set 'variant', 'segmenter' and 'segmenter_model' as it was built, or build again",
            )

    def places(self, given: NominalFrame, region: ImageRegion) -> dict[str, NominalPlaces]:
        """Return what a nominal frame gives to each part; nothing of frames without grids.

        An instance is nominal where all that it covers is, and a scene where all of it is.

        Raises:
            ModelOutputError: instances are wanted and the frame was not segmented.
        """
        if isinstance(given, NominalPlaces):
            return {}
        frame, grid, *masks = given
        nominal = masks[0] if masks else None
        found: dict[str, NominalPlaces] = {}
        if self.scenes and (nominal is None or nominal.all()):
            whole = unit_scene(grid)[None]
            place = np.zeros((1, 2), np.int64)
            found[SCENES] = NominalPlaces(frame, grid.grid_hw, place, whole)
        if self.segmenter is None:
            return found
        instances = instances_of(grid, region)
        if nominal is not None:
            kept = ~(instances.shares[:, ~nominal] > 0).any(axis=1)
            instances = Instances(instances.embeddings[kept], instances.shares[kept])
        places = instances.places
        found[INSTANCES] = NominalPlaces(frame, grid.grid_hw, places, instances.embeddings)
        if self.surroundings_weight:
            pairs = pairs_of(grid, instances, region, self.surroundings_weight, nominal)
            found[PAIRS] = NominalPlaces(frame, grid.grid_hw, places, pairs.embeddings)
        return found


def unit_scene(grid: PatchGrid) -> np.ndarray:
    """Return (dim,) float32, the global feature of an image as a unit vector."""
    whole = grid.global_feature.astype(np.float32)
    return np.asarray(whole / max(float(np.linalg.norm(whole)), 1e-12), np.float32)


_GraphType = TypeVar("_GraphType", bound=Graph)


class PartSelections(Generic[_GraphType]):
    """Chooses the entries of the parts while the frames of an index pass by.

    Args:
        plan: which parts.
        settings: `dedup_distance`, `max_entries`.
        region: what takes part.
        new_graph: makes an empty graph for a dimension.
    """

    def __init__(
        self,
        plan: PartPlan,
        settings: Settings,
        region: ImageRegion,
        new_graph: Callable[[int], _GraphType],
    ) -> None:
        self._plan, self._settings, self._region = plan, settings, region
        self._new_graph = new_graph
        self._waiting: dict[str, list[NominalPlaces]] = {}
        self.settings: dict[str, Settings] = {}
        self.selections: dict[str, Selection] = {}
        self.graphs: dict[str, _GraphType] = {}

    def watch(self, frames: Iterable[NominalFrame]) -> Iterator[NominalFrame]:
        """Yield the frames as they are, having taken what they give to the parts."""
        for given in frames:
            for name, places in self._plan.places(given, self._region).items():
                if len(places.embeddings):
                    self._take(name, places)
            yield given

    def finish(self) -> None:
        """Take what is still waiting, and put everything into the graphs."""
        for name in list(self._waiting):
            self._begin(name)
        for selection in self.selections.values():
            selection.finish()

    def _take(self, name: str, places: NominalPlaces) -> None:
        if name in self.selections:
            self.selections[name].extend([places], self._region)
            return
        waiting = self._waiting.setdefault(name, [])
        waiting.append(places)
        if len(waiting) == _MEASURED_FRAMES:
            self._begin(name)

    def _begin(self, name: str) -> None:
        waiting = self._waiting.pop(name)
        dim = waiting[0].embeddings.shape[1]
        settings = self._settings
        if name == SCENES:
            settings = settings.replace(dedup_distance=0.0)
        elif settings.dedup_distance < 0.0:
            settings = settings.replace(dedup_distance=_suitable_distance(waiting))
        graph = self._new_graph(dim)
        selection = Selection(graph, dim, settings.dedup_distance, settings.max_entries)
        selection.extend(waiting, self._region)
        self.settings[name], self.selections[name] = settings, selection
        self.graphs[name] = graph


def _suitable_distance(frames: Iterable[NominalPlaces]) -> float:
    """Return half the median distance from an instance to the nearest other one of its image."""
    nearest = [np.zeros(0)]
    for places in frames:
        if len(places.embeddings) < 2:
            continue
        products = places.embeddings @ places.embeddings.T
        np.fill_diagonal(products, -1.0)
        nearest.append(1.0 - products.max(axis=1))
    distances = np.concatenate(nearest)
    return float(np.clip(_SUITABLE_SHARE * np.median(distances), 0, 1)) if len(distances) else 0.0
