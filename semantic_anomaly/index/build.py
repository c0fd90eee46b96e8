"""Choosing, in one pass and with bounded memory, which nominal embeddings an index stores.

A stage is one path from a patch grid to embeddings: the patches themselves, or instances pooled
over masks. Each stage has its own entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from semantic_anomaly.errors import ArtefactError, IndexMismatchError
from semantic_anomaly.index.hnsw import HnswGraph
from semantic_anomaly.index.search import nearest_similarities
from semantic_anomaly.io.images import encode_jpeg
from semantic_anomaly.linalg import inner_products
from semantic_anomaly.roi import RegionOfInterest, patches_inside
from semantic_anomaly.segmentation.masks import instances_of
from semantic_anomaly.structures import Frame, PatchGrid

INSTANCES = "instances"
# Frame and grid, and (rows, cols) bool where not all of the frame is nominal.
NominalFrame = tuple[Frame, PatchGrid] | tuple[Frame, PatchGrid, np.ndarray]

_THUMBNAIL_PX = 320
# Below, a product with all stored embeddings is as quick as the graph, and has no error.
_EXACT_UP_TO = 20_000
_BLOCK = 2048
# A dedup_distance of -1 is measured on so many frames, with at most so many queries per frame.
_MEASURED_FRAMES = 8
_MEASURED_QUERIES = 512


@dataclass(frozen=True, eq=False)
class FrameEmbeddings:
    """The embeddings that a nominal frame gives to a stage.

    Attributes:
        frame, grid_hw: the frame, and (rows, cols) of its patch grid.
        cells: (n, 2) int, row and col of each embedding in that grid.
        embeddings: (n, dim) float32, unit norm.
    """

    frame: Frame
    grid_hw: tuple[int, int]
    cells: np.ndarray
    embeddings: np.ndarray


def patch_embeddings(nominal_frame: NominalFrame, roi: RegionOfInterest) -> FrameEmbeddings:
    """Return the nominal patches of a frame inside the region of interest.

    Raises:
        SettingsError: no patch lies in the region of interest.
    """
    frame, grid, *nominal = nominal_frame
    inside = patches_inside(grid, roi)
    for mask in nominal:
        inside = inside & mask
    return FrameEmbeddings(frame, grid.grid_hw, np.argwhere(inside), grid.features[inside])


def instance_embeddings(nominal_frame: NominalFrame, roi: RegionOfInterest) -> FrameEmbeddings:
    """Return the instances of a frame that are nominal on all patches that they cover.

    Raises:
        ModelOutputError: the frame was not segmented.
    """
    frame, grid, *nominal = nominal_frame
    instances = instances_of(grid, roi)
    cells, embeddings = instances.cells, instances.embeddings
    for mask in nominal:
        kept = ~(instances.shares[:, ~mask] > 0).any(axis=1)
        cells, embeddings = cells[kept], embeddings[kept]
    return FrameEmbeddings(frame, grid.grid_hw, cells, embeddings)


def nearest_in_frame(frame_embeddings: FrameEmbeddings, min_cells_apart: int) -> np.ndarray:
    """Return (n,) cosine distances from embeddings to the nearest other one of the same frame.

    Embeddings fewer than `min_cells_apart` rows and columns apart are not compared.
    """
    cells, embeddings = frame_embeddings.cells, frame_embeddings.embeddings
    # Some queries are enough, spread over the image.
    queries = np.linspace(0, len(cells) - 1, min(len(cells), _MEASURED_QUERIES)).astype(int)
    apart = np.abs(cells[queries, None] - cells[None]).max(axis=2)  # (queries, n)
    compared = (apart >= min_cells_apart) & (queries[:, None] != np.arange(len(cells)))
    products = inner_products(embeddings[queries], embeddings.T)
    products = np.where(compared, products, -1.0)[compared.any(axis=1)]
    return np.asarray(1.0 - products.max(axis=1, initial=-1.0))


@dataclass(frozen=True)
class Stage:
    """One path from a patch grid to embeddings.

    Attributes:
        embeddings_of: what a nominal frame gives to the stage.
        distances_of: distances between the embeddings of one frame.
        dedup_share: `dedup_distance` as a share of the median of these distances.
        needs_distances: whether it is an error if there are none; otherwise all is stored.
    """

    embeddings_of: Callable[[NominalFrame, RegionOfInterest], FrameEmbeddings]
    distances_of: Callable[[NominalFrame, RegionOfInterest], np.ndarray]
    dedup_share: float
    needs_distances: bool

    def suitable_distance(self, distances: Sequence[np.ndarray]) -> float:
        """Return a `dedup_distance` that suits the backbone that made some frames.

        Distances of one backbone are ten times those of another. The median distance from an
        embedding to the nearest other one of its own image tells how far apart things that are
        alike lie; it does not depend on how fast the frames of a drive change.

        Raises:
            ArtefactError: there are no distances, and the stage needs them.
        """
        joined = np.concatenate(distances) if distances else np.empty(0)
        if len(joined):
            return float(np.clip(self.dedup_share * np.median(joined), 0.0, 2.0))
        if self.needs_distances:
            raise ArtefactError(
                f"index: dedup_distance -1: expected grids of more than {_NEIGHBOURHOOD} patches a "
                "side; set the distance"
            )
        return 0.0


# Patches near a patch resemble it because they see the same.
_NEIGHBOURHOOD = 4
PATCH_STAGE = Stage(
    patch_embeddings,
    # On the whole image, so that the distance does not depend on the region of interest.
    lambda f, roi: nearest_in_frame(
        patch_embeddings(f[:2], RegionOfInterest()), _NEIGHBOURHOOD + 1
    ),
    # Half of it stores four times as much.
    dedup_share=1.0,
    needs_distances=True,
)
INSTANCE_STAGE = Stage(
    instance_embeddings,
    lambda f, roi: nearest_in_frame(instance_embeddings(f, roi), 0),
    dedup_share=0.5,
    needs_distances=False,
)


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
    """What became of the embeddings that an index was built from.

    Attributes:
        frames: frames read.
        seen: embeddings that took part.
        stored: entries of the index.
        suppressed: nearer than `dedup_distance` to a stored one.
        dropped: new, but `max_entries` was reached.
    """

    frames: int
    seen: int
    stored: int
    suppressed: int
    dropped: int


class Selection:
    """The entries of a stage: each embedding at least `dedup_distance` from those before it.

    The greedy cover of one pass: everything seen lies within `dedup_distance` of something
    stored, unless `max_entries` is reached. Memory grows with what is stored, not with what is
    seen.

    Args:
        stage: gives the embeddings of frames.
        dim: length of an embedding.
        roi: what lies outside takes no part.
        dedup_distance: cosine distance; 0 stores everything; -1: measured on the first frames.
        max_entries: most that are stored.

    Attributes:
        dedup_distance: as measured, if it was -1.
        frames: frames that entries point to.
        graph: of the entries, complete after `finish`.
    """

    def __init__(
        self, stage: Stage, dim: int, roi: RegionOfInterest, dedup_distance: float, max_entries: int
    ) -> None:
        self.dedup_distance = dedup_distance
        self.graph = HnswGraph.empty(dim)
        self.frames: list[FrameRecord] = []
        self._stage, self._roi = stage, roi
        self._in_graph = 0
        self._max_entries = max_entries
        self._embeddings = np.empty((min(max_entries, 4096), dim), np.float32)
        self._entries = np.empty((len(self._embeddings), 3), np.int32)
        self._counts = {"frames": 0, "seen": 0, "stored": 0, "suppressed": 0, "dropped": 0}
        self._waiting: list[FrameEmbeddings] = []
        self._distances: list[np.ndarray] = []

    @property
    def count(self) -> int:
        """Return the number of entries."""
        return self._counts["stored"]

    @property
    def embeddings(self) -> np.ndarray:
        """Return (count, dim) float32."""
        return self._embeddings[: self.count]

    @property
    def entries(self) -> np.ndarray:
        """Return (count, 3) int32: frame, row, col."""
        return self._entries[: self.count]

    @property
    def report(self) -> BuildReport:
        """Return what became of the embeddings so far."""
        return BuildReport(**self._counts)

    def resume(
        self, embeddings: np.ndarray, entries: np.ndarray, frames: Sequence[FrameRecord]
    ) -> None:
        """Begin with the entries, at most `max_entries`, and the frames of an index."""
        self._store(embeddings, entries)
        self.frames = list(frames)

    def add(self, nominal_frame: NominalFrame) -> None:
        """Take in what a frame gives to the stage.

        Raises:
            IndexMismatchError: embeddings of another dimension.
        """
        frame_embeddings = self._stage.embeddings_of(nominal_frame, self._roi)
        found, dim = frame_embeddings.embeddings.shape[1], self._embeddings.shape[1]
        if found != dim:
            raise IndexMismatchError(
                f"frame '{frame_embeddings.frame.name}': embedding dimension", dim, found
            )
        self._counts["frames"] += 1
        self._counts["seen"] += len(frame_embeddings.embeddings)
        if not len(frame_embeddings.embeddings):
            return
        if self.dedup_distance >= 0.0:
            self._take(frame_embeddings)
            return
        self._waiting.append(frame_embeddings)
        self._distances.append(self._stage.distances_of(nominal_frame, self._roi))
        if len(self._waiting) == _MEASURED_FRAMES:
            self._take_waiting()

    def finish(self) -> None:
        """Take in what is waiting, and complete the graph.

        Raises:
            ArtefactError: as `Stage.suitable_distance`.
        """
        if self._waiting:
            self._take_waiting()
        if self.count:
            self._complete_graph()
            self.graph.trim()

    def _take_waiting(self) -> None:
        self.dedup_distance = self._stage.suitable_distance(self._distances)
        for frame_embeddings in self._waiting:
            self._take(frame_embeddings)
        self._waiting.clear()

    def _take(self, frame_embeddings: FrameEmbeddings) -> None:
        """Store what is new of a frame, and the frame if anything is."""
        cells, before = frame_embeddings.cells, self.count
        frame_number = np.full((len(cells), 1), len(self.frames))
        entries = np.concatenate([frame_number, cells], axis=1)  # (n, 3)
        for start in range(0, len(entries), _BLOCK):
            block = frame_embeddings.embeddings[start : start + _BLOCK]
            new = self._new_rows(block)
            stored = new[: self._max_entries - self.count]
            self._counts["suppressed"] += len(block) - len(new)
            self._counts["dropped"] += len(new) - len(stored)
            self._store(block[stored], entries[start + stored])
        if self.count > before:
            thumbnail = _thumbnail(frame_embeddings.frame.image)
            name, grid_hw = frame_embeddings.frame.name, frame_embeddings.grid_hw
            self.frames.append(FrameRecord(name, *grid_hw, thumbnail))

    def _new_rows(self, embeddings: np.ndarray) -> np.ndarray:
        """Return the rows that are far enough from all entries and from the rows before them."""
        if self.dedup_distance == 0.0:
            return np.arange(len(embeddings))
        limit = np.float32(1.0 - self.dedup_distance)
        candidates = np.flatnonzero(self._similarities(embeddings) <= limit)
        products = inner_products(embeddings[candidates], embeddings[candidates].T)
        is_new = np.ones(len(candidates), bool)
        for position in range(len(candidates)):
            if is_new[position]:
                is_new[position + 1 :] &= products[position, position + 1 :] <= limit
        return candidates[is_new]

    def _similarities(self, embeddings: np.ndarray) -> np.ndarray:
        """Return (n,) inner products with the nearest entry."""
        if not self.count:
            return np.full(len(embeddings), -1.0, np.float32)
        if self.count <= _EXACT_UP_TO:
            return nearest_similarities(embeddings, self.embeddings, 1)[:, 0]
        self._complete_graph()
        return self.graph.similarities(embeddings, 1)[:, 0]

    def _complete_graph(self) -> None:
        if self._in_graph < self.count:
            self.graph.add(self.embeddings[self._in_graph :])
            self._in_graph = self.count

    def _store(self, embeddings: np.ndarray, entries: np.ndarray) -> None:
        before, count = self.count, self.count + len(embeddings)
        if count > len(self._embeddings):
            size = min(self._max_entries, max(count, 2 * len(self._embeddings)))
            self._embeddings = _enlarged(self._embeddings, size)
            self._entries = _enlarged(self._entries, size)
        self._embeddings[before:count] = embeddings
        self._entries[before:count] = entries
        self._counts["stored"] = count


def select(frames: Iterable[NominalFrame], selections: Sequence[Selection]) -> None:
    """Add nominal frames to all selections, and finish them.

    Raises:
        IndexMismatchError: embeddings of another dimension.
        ModelOutputError: a selection of instances, and a frame that was not segmented.
        ArtefactError: as `Stage.suitable_distance`.
    """
    for nominal_frame in frames:
        for selection in selections:
            selection.add(nominal_frame)
    for selection in selections:
        selection.finish()


def _enlarged(array: np.ndarray, size: int) -> np.ndarray:
    larger: np.ndarray = np.empty((size, array.shape[1]), array.dtype)
    larger[: len(array)] = array
    return larger


def _thumbnail(image: np.ndarray) -> bytes:
    height, width = image.shape[:2]
    scale = min(1.0, _THUMBNAIL_PX / max(height, width))
    size: Any = (max(1, round(width * scale)), max(1, round(height * scale)))
    return encode_jpeg(cv2.resize(image, size, interpolation=cv2.INTER_AREA), 85)
