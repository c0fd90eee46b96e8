"""Choosing, in one pass and with bounded memory, which nominal embeddings an index stores."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import cv2
import numpy as np

from semantic_anomaly.errors import ArtefactError, IndexMismatchError
from semantic_anomaly.exact_search import inner_products, nearest_similarities
from semantic_anomaly.images import encode_jpeg
from semantic_anomaly.nominal_frames import NominalFrame, NominalPlaces, nominal_patches
from semantic_anomaly.regions import ImageRegion
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import PatchGrid

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
