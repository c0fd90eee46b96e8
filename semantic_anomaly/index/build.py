"""Nominal frames as an index takes them in: whole grids, parts of them, or places of any kind.

Choosing, in one pass and with bounded memory, which nominal embeddings an index stores.

What an index holds besides patches: instances, pairs with surroundings, and whole scenes.

Each is a part of the index, an index of its own with the same manifest, checks and edits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import cv2
import numpy as np

from semantic_anomaly.embedding.identity import SegmenterIdentity
from semantic_anomaly.errors import (
    ArtefactError,
    IndexFormatError,
    IndexMismatchError,
    ModelOutputError,
)
from semantic_anomaly.index.search import nearest_similarities
from semantic_anomaly.io.images import encode_jpeg
from semantic_anomaly.linalg import inner_products
from semantic_anomaly.roi import ImageRegion, patch_regions
from semantic_anomaly.segmentation.masks import Instances, instances_of, pairs_of
from semantic_anomaly.settings import Settings
from semantic_anomaly.storage import canonical_json
from semantic_anomaly.structures import Frame, PatchGrid


@dataclass(frozen=True, eq=False)
class NominalPlaces:
    """Embeddings of some places of a nominal frame, which need not be its patches.

    Attributes:
        frame: the frame.
        grid_hw: (rows, cols) of the grid that the places are told in.
        places: (n, 2) int, row and col of each.
        embeddings: (n, dim) float32, unit norm.

    Raises:
        ModelOutputError: shapes that do not agree, or places outside the grid.
    """

    frame: Frame
    grid_hw: tuple[int, int]
    places: np.ndarray
    embeddings: np.ndarray

    def __post_init__(self) -> None:
        shapes = self.places.shape, self.embeddings.shape
        if shapes[0] != (len(self.embeddings), 2) or len(shapes[1]) != 2:
            raise ModelOutputError(
                f"frame '{self.frame.name}': expected (n, 2) places and (n, dim) embeddings, "
                f"found {shapes[0]} and {shapes[1]}"
            )
        if not np.all((self.places >= 0) & (self.places < self.grid_hw)):
            raise ModelOutputError(
                f"frame '{self.frame.name}': expected places in a grid of {self.grid_hw}"
            )


# Frame and grid, and (rows, cols) bool where not all of the frame is nominal; or places of it.
NominalFrame = tuple[Frame, PatchGrid] | tuple[Frame, PatchGrid, np.ndarray] | NominalPlaces


def nominal_patches(
    given: tuple[Frame, PatchGrid] | tuple[Frame, PatchGrid, np.ndarray], region: ImageRegion
) -> NominalPlaces:
    """Return the patches of a nominal frame that take part.

    Args:
        given: frame, grid and, where not all of it is nominal, (rows, cols) bool.
        region: patches outside take no part.

    Raises:
        SettingsError: no patch lies in the region.
    """
    frame, grid, *nominal = given
    regions = patch_regions(grid, region)
    wanted = regions.label_map >= 0
    for mask in nominal:
        wanted &= mask
    rows, cols = np.nonzero(wanted)
    embeddings = regions.embeddings[regions.label_map[rows, cols]]
    return NominalPlaces(frame, grid.grid_hw, np.stack([rows, cols], axis=1), embeddings)


THUMBNAIL_PX = 320
# Below, a product with all stored embeddings is as quick as the graph, and has no error.
_EXACT_UP_TO = 20_000
_BLOCK = 2048
GRAPH_SEED = 100
# Neighbours of a place resemble it because they see the same.
_SURROUNDINGS = 4
_SUITABLE_QUERIES = 512
_SUITABLE_FRAMES = 8


class Graph(Protocol):
    """What suppression needs of a graph that grows."""

    def add(self, embeddings: np.ndarray) -> None:
        """Add (n, dim) float32 under the next labels."""

    def similarities(self, embeddings: np.ndarray) -> np.ndarray:
        """Return (n,) float32: inner product with the nearest that the graph finds."""


@dataclass(frozen=True)
class FrameRecord:
    """A nominal frame that contributed entries.

    Attributes:
        name: as its source calls it.
        rows, cols: its patch grid.
        thumbnail: JPEG of the frame, long side 320 pixels at most.
    """

    name: str
    rows: int
    cols: int
    thumbnail: bytes = field(repr=False)


@dataclass(frozen=True)
class BuildReport:
    """What became of the patches that an index was built from.

    Attributes:
        frames: frames read.
        seen: patches that took part.
        stored: entries of the index.
        suppressed: nearer than `dedup_distance` to a stored one.
        dropped: new, but `max_entries` was reached.
    """

    frames: int
    seen: int
    stored: int
    suppressed: int
    dropped: int

    def to_dict(self) -> dict[str, int]:
        """Return plain values for JSON."""
        return asdict(self)


class Selection:
    """Embeddings chosen from a stream: each new one at least `dedup_distance` from those before.

    The greedy cover of one pass: everything seen lies within `dedup_distance` of something
    stored, the very first included, unless `max_entries` is reached. Memory grows with what is
    stored, not with what is seen.

    Args:
        graph: empty; takes the stored embeddings once they are many.
        dim: length of an embedding.
        dedup_distance: cosine distance; 0 stores everything.
        max_entries: most that are stored.
    """

    def __init__(self, graph: Graph, dim: int, dedup_distance: float, max_entries: int) -> None:
        self._graph = graph
        self._graphed = 0
        self._dedup = dedup_distance
        self._most = max_entries
        self._vectors = np.empty((min(max_entries, 4096), dim), np.float32)
        self._entries = np.empty((len(self._vectors), 3), np.int32)
        self._counts = {"frames": 0, "seen": 0, "stored": 0, "suppressed": 0, "dropped": 0}
        self.frames: list[FrameRecord] = []

    @property
    def embeddings(self) -> np.ndarray:
        """Return (stored, dim) float32."""
        return self._vectors[: self._counts["stored"]]

    @property
    def entries(self) -> np.ndarray:
        """Return (stored, 3) int32: frame, row, col."""
        return self._entries[: self._counts["stored"]]

    @property
    def report(self) -> BuildReport:
        """Return what became of the patches so far."""
        return BuildReport(**self._counts)

    def extend(self, frames: Iterable[NominalFrame], region: ImageRegion) -> None:
        """Take in the patches of frames that lie in the region.

        Args:
            frames: with their grids and, where not all of a frame is nominal, its nominal patches.
            region: patches outside take no part.

        Raises:
            IndexMismatchError: a grid of another dimension.
        """
        for given in frames:
            found = given if isinstance(given, NominalPlaces) else nominal_patches(given, region)
            dim = self._vectors.shape[1]
            if found.embeddings.shape[1] != dim:
                raise IndexMismatchError(
                    f"frame '{found.frame.name}': embedding dimension",
                    dim,
                    found.embeddings.shape[1],
                )
            number = np.full((len(found.places), 1), len(self.frames))
            places = np.concatenate([number, found.places], axis=1)
            before = self._counts["stored"]
            for start in range(0, len(places), _BLOCK):
                part = slice(start, start + _BLOCK)
                self._take(found.embeddings[part], places[part])
            self._counts["frames"] += 1
            self._counts["seen"] += len(places)
            if self._counts["stored"] > before:
                picture = _thumbnail(found.frame.image)
                self.frames.append(FrameRecord(found.frame.name, *found.grid_hw, picture))

    def resume(
        self, embeddings: np.ndarray, entries: np.ndarray, frames: Sequence[FrameRecord]
    ) -> None:
        """Begin with what an index holds, before anything else is taken in.

        Args:
            embeddings: (n, dim) float32, at most `max_entries`.
            entries: (n, 3) int32.
            frames: that the entries point to.
        """
        self._store(embeddings, entries)
        self.frames = list(frames)

    def finish(self) -> BuildReport:
        """Put what is not yet in the graph there, and return the report.

        Raises:
            ArtefactError: nothing was stored.
        """
        if not self._counts["stored"]:
            raise ArtefactError(
                f"index: expected nominal patches, found none in {self._counts['frames']} frames"
            )
        self._graph.add(self.embeddings[self._graphed :])
        self._graphed = self._counts["stored"]
        return self.report

    def _take(self, embeddings: np.ndarray, places: np.ndarray) -> None:
        new = self._new_among(embeddings)
        room = self._most - self._counts["stored"]
        self._counts["suppressed"] += len(embeddings) - len(new)
        self._counts["dropped"] += max(0, len(new) - room)
        self._store(embeddings[new[:room]], places[new[:room]])

    def _new_among(self, embeddings: np.ndarray) -> np.ndarray:
        if self._dedup <= 0.0:
            return np.arange(len(embeddings))
        limit = np.float32(1.0 - self._dedup)
        candidates = np.flatnonzero(self._similarities(embeddings) <= limit)
        rows = embeddings[candidates]
        products = inner_products(rows, rows.T)
        alive = np.ones(len(rows), bool)
        for position in range(len(rows)):
            if alive[position]:
                alive[position + 1 :] &= products[position, position + 1 :] <= limit
        return candidates[alive]

    def _similarities(self, embeddings: np.ndarray) -> np.ndarray:
        if not self._counts["stored"]:
            return np.full(len(embeddings), -1.0, np.float32)
        if self._counts["stored"] <= _EXACT_UP_TO:
            return nearest_similarities(embeddings, self.embeddings, 1)[:, 0]
        if self._graphed < self._counts["stored"]:
            self._graph.add(self.embeddings[self._graphed :])
            self._graphed = self._counts["stored"]
        return self._graph.similarities(embeddings)

    def _store(self, embeddings: np.ndarray, places: np.ndarray) -> None:
        stored = self._counts["stored"]
        needed = stored + len(embeddings)
        if needed > len(self._vectors):
            size = min(self._most, max(needed, 2 * len(self._vectors)))
            self._vectors = _grown(self._vectors, size)
            self._entries = _grown(self._entries, size)
        self._vectors[stored:needed] = embeddings
        self._entries[stored:needed] = places
        self._counts["stored"] = needed


def suited(
    frames: Iterable[NominalFrame], settings: Settings
) -> tuple[Iterable[NominalFrame], Settings]:
    """Return all frames, and settings whose `dedup_distance` is one.

    Raises:
        ArtefactError: as `suitable_distance`.
    """
    if settings.dedup_distance >= 0:
        return frames, settings
    stream = iter(frames)
    first = list(itertools.islice(stream, _SUITABLE_FRAMES))
    if first:
        distance = suitable_distance(f[1] for f in first if not isinstance(f, NominalPlaces))
        settings = settings.replace(dedup_distance=distance)
    return itertools.chain(first, stream), settings


def suitable_distance(grids: Iterable[PatchGrid]) -> float:
    """Return a `dedup_distance` that suits the backbone that made some grids.

    Distances of one backbone are ten times those of another. The median distance from a place to
    the nearest other place of its own image, its surroundings left out, tells how far apart things
    that are alike lie; it does not depend on how fast the frames of a drive change. Half of it
    stores four times as much.

    Raises:
        ArtefactError: no grid with places far enough apart.
    """
    found = []
    for grid in grids:
        rows, cols = np.divmod(np.arange(grid.grid_hw[0] * grid.grid_hw[1]), grid.grid_hw[1])
        flat = grid.features.reshape(-1, grid.dim)
        # Some queries are enough, spread over the image.
        chosen = np.linspace(0, len(flat) - 1, min(len(flat), _SUITABLE_QUERIES)).astype(int)
        apart = np.maximum(
            np.abs(rows[chosen, None] - rows[None]), np.abs(cols[chosen, None] - cols[None])
        )
        products = np.where(apart > _SURROUNDINGS, inner_products(flat[chosen], flat.T), -1.0)
        found.append(1.0 - products[(apart > _SURROUNDINGS).any(axis=1)].max(axis=1, initial=-1.0))
    distances = np.concatenate(found) if found else np.zeros(0)
    if not len(distances):
        raise ArtefactError(
            f"index: dedup_distance -1: expected grids of more than {_SURROUNDINGS} places a side; "
            "set the distance"
        )
    return float(np.median(distances))


def _grown(array: np.ndarray, size: int) -> np.ndarray:
    larger: np.ndarray = np.empty((size, array.shape[1]), array.dtype)
    larger[: len(array)] = array
    return larger


def _thumbnail(image: np.ndarray) -> bytes:
    height, width = image.shape[:2]
    scale = min(1.0, THUMBNAIL_PX / max(height, width))
    size: Any = (max(1, round(width * scale)), max(1, round(height * scale)))
    return encode_jpeg(cv2.resize(image, size, interpolation=cv2.INTER_AREA), 85)


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
