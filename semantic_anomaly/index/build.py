"""Choosing, in one pass and with bounded memory, which nominal embeddings an index stores.

Each stage has its own entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from semantic_anomaly.embedding.identity import StageIdentity
from semantic_anomaly.errors import ArtefactError, IndexMismatchError
from semantic_anomaly.index.hnsw import HnswGraph
from semantic_anomaly.index.partition import Partition, nearest_in_lists
from semantic_anomaly.index.search import nearest_entries
from semantic_anomaly.io.images import encode_jpeg
from semantic_anomaly.linalg import inner_products
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.segmentation.masks import stage_embeddings
from semantic_anomaly.stages import INSTANCES
from semantic_anomaly.structures import Frame, PatchGrid

# Frame and grid, and (height, width) bool where not all of the image is nominal.
NominalFrame = tuple[Frame, PatchGrid] | tuple[Frame, PatchGrid, np.ndarray]

_THUMBNAIL_PX = 320
# Below, a product with all stored embeddings is as quick as the graph, and has no error.
_EXACT_UP_TO = 20_000
_BLOCK = 2048
# Entries that are added to the graph between two reports of progress.
_GRAPH_BLOCK = 4096
# A dedup_distance of -1 is measured on so many frames, with at most so many queries per frame.
MEASURED_FRAMES = 8
_MEASURED_QUERIES = 512
# Patches near a patch resemble it because they see the same.
_NEIGHBOURHOOD = 4
# `dedup_distance` as a share of the median distance inside frames. Half of the share of patches
# stores four times as much.
_PATCH_SHARE, _INSTANCE_SHARE = 1.0, 0.5


@dataclass(frozen=True, eq=False)
class FrameEmbeddings:
    """The nominal embeddings of a frame in a stage.

    Attributes:
        frame, grid_hw: the frame, and (rows, cols) of its patch grid.
        cells: (n, 2) int, row and col of each embedding in that grid.
        embeddings: (n, dim) float32, unit norm.
    """

    frame: Frame
    grid_hw: tuple[int, int]
    cells: np.ndarray
    embeddings: np.ndarray

    @classmethod
    def of(cls, nominal_frame: NominalFrame, stage: int, roi: RegionOfInterest) -> FrameEmbeddings:
        """Return the embeddings of a stage; all patches of each must be nominal.

        Raises:
            SettingsError: no patch lies in the region of interest.
        """
        frame, grid, *masks = nominal_frame
        grid = grid.stages[stage]
        of_stage = stage_embeddings(grid, roi)
        cells, embeddings = of_stage.cells, of_stage.embeddings
        for mask in masks:
            kept = ~of_stage.painting(~nominal_patches(mask, grid.grid_hw))
            cells, embeddings = cells[kept], embeddings[kept]
        return cls(frame, grid.grid_hw, cells, embeddings)

    def nearest_distances(self, min_cells_apart: int) -> np.ndarray:
        """Return (n,) cosine distances to the nearest other embedding of the frame.

        Args:
            min_cells_apart: embeddings fewer rows and columns apart are not compared.
        """
        # Some queries are enough, spread over the image.
        count = len(self.cells)
        queries = np.linspace(0, count - 1, min(count, _MEASURED_QUERIES)).astype(int)
        apart = np.abs(self.cells[queries, None] - self.cells[None]).max(axis=2)  # (queries, n)
        compared = (apart >= min_cells_apart) & (queries[:, None] != np.arange(count))
        products = inner_products(self.embeddings[queries], self.embeddings.T)
        products = np.where(compared, products, -1.0)[compared.any(axis=1)]
        return np.asarray(1.0 - products.max(axis=1, initial=-1.0))


def nominal_patches(mask: np.ndarray, grid_hw: tuple[int, int]) -> np.ndarray:
    """Return (rows, cols) bool: patches whose every pixel is nominal.

    Args:
        mask: (height, width) bool, nominal pixels.
        grid_hw: rows and columns of patches.
    """
    share = cv2.resize(mask.astype(np.float32), grid_hw[::-1], interpolation=cv2.INTER_AREA)
    return share > 1.0 - 1e-4


@dataclass(frozen=True)
class FrameRecord:
    """A nominal frame that contributed entries.

    Attributes:
        name: as its source calls it.
        rows, cols: its patch grid.
        thumbnail: JPEG of the frame, long side 320 pixels at most.
        recording: that it is a part of.
    """

    name: str
    rows: int
    cols: int
    thumbnail: bytes = field(repr=False)
    recording: str = ""


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


@dataclass(frozen=True, eq=False)
class TakenEntries:
    """What became of the entries of another selection.

    Attributes:
        rows: (n,) int64, the row of each entry, or of the entry that covers it; -1: dropped.
        is_stored: (n,) bool, entries that were stored.
        nearest: (n,) int64, the row of the entry nearest to each; -1: none within `dedup_distance`.
        frame_numbers: (frames,) int64, the new numbers of the frames; -1: nothing points to it.
    """

    rows: np.ndarray
    is_stored: np.ndarray
    nearest: np.ndarray
    frame_numbers: np.ndarray


class Selection:
    """The entries of one stage: each embedding at least `dedup_distance` from those before it.

    The greedy cover of one pass: everything seen lies within `dedup_distance` of something
    stored, unless `max_entries` is reached. Memory grows with what is stored, not with what is
    seen.

    Args:
        number: of the stage among the grids of a frame.
        stage: the stage.
        roi: what lies outside takes no part.
        dedup_distance: cosine distance; 0 stores everything; -1: measured on the first frames.
        max_entries: most that are stored.

    Attributes:
        dedup_distance: as measured, if it was -1.
        stage, max_entries: as given.
        frames: frames that entries point to.
        graph: of the entries, complete after `finish`.
    """

    def __init__(
        self,
        number: int,
        stage: StageIdentity,
        roi: RegionOfInterest,
        dedup_distance: float,
        max_entries: int,
    ) -> None:
        dim = stage.embedder.dim
        self.dedup_distance = dedup_distance
        self.stage = stage
        self.graph = HnswGraph.empty(dim)
        self.frames: list[FrameRecord] = []
        self._number, self._roi = number, roi
        self._in_graph = 0
        # Additions to the graph that are under way, with their entries.
        self._growing: list[tuple[Future[None], int]] = []
        self.max_entries = max_entries
        # (max_entries,) bool or less by recording: entries that suppressed its embeddings.
        self._supported: dict[str, np.ndarray] = {}
        self._embeddings = np.empty((min(max_entries, 4096), dim), np.float32)
        self._entries = np.empty((len(self._embeddings), 3), np.int32)
        self._radii = np.zeros((len(self._embeddings), 1), np.float32)
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
    def radii(self) -> np.ndarray:
        """Return (count,) float32: largest cosine distance of an embedding that is suppressed."""
        return self._radii[: self.count, 0]

    @property
    def support(self) -> dict[str, np.ndarray]:
        """Return (n,) int64 by recording: entries of others that suppressed its embeddings."""
        support = {}
        for recording, is_supported in self._supported.items():
            rows = np.flatnonzero(is_supported)
            own = np.array([frame.recording == recording for frame in self.frames])
            support[recording] = rows[~own[self.entries[rows, 0]]]
        return support

    @property
    def report(self) -> BuildReport:
        """Return what became of the embeddings so far."""
        return BuildReport(**self._counts)

    def resume(
        self,
        embeddings: np.ndarray,
        entries: np.ndarray,
        radii: np.ndarray,
        frames: Sequence[FrameRecord],
    ) -> None:
        """Begin with the entries, at most `max_entries`, their radii and frames of an index."""
        self._store(embeddings, entries, radii)
        self.frames = list(frames)

    def reserve(self, count: int) -> None:
        """Make room for `count` entries, so that memory is not copied while they are stored."""
        self._enlarge(min(self.max_entries, count))

    def add_entries(
        self,
        embeddings: np.ndarray,
        entries: np.ndarray,
        radii: np.ndarray,
        frames: Sequence[FrameRecord],
        further_frames: np.ndarray,
    ) -> TakenEntries:
        """Take in entries of another selection, each with all embeddings that it suppressed.

        An entry is suppressed only if another one lies so near that it is within `dedup_distance`
        of all that the entry suppressed itself. Angles of unit vectors add up at most, so that is
        certain if the angle between both and that of the radius add up to less than that of
        `dedup_distance`. Entries are not compared with others of the same call.

        Args:
            embeddings: (n, dim) float32, unit norm.
            entries: (n, 3) int32: frame, row, col.
            radii: (n,) float32, as `radii`.
            frames: that entries point to.
            further_frames: (m,) numbers of frames that are kept besides those of stored entries.
        """
        nearest = np.full(len(embeddings), -1, np.int64)
        is_covered = np.zeros(len(embeddings), bool)
        if self.count and self.dedup_distance > 0.0:
            rows, similarities = self._nearest_of_many(embeddings)
            is_near = similarities > np.float32(1.0 - self.dedup_distance)
            nearest[is_near] = rows[is_near]
            angles = _angles(1.0 - similarities) + _angles(radii)
            is_covered = angles <= _angles(np.array(self.dedup_distance))
            reached = 1.0 - np.cos(angles[is_covered])
            np.maximum.at(self._radii[:, 0], rows[is_covered], reached.astype(np.float32))
        before, new = self.count, np.flatnonzero(~is_covered)
        stored = new[: self.max_entries - before]
        self._counts["suppressed"] += int(is_covered.sum())
        self._counts["dropped"] += len(new) - len(stored)
        used = np.unique(np.concatenate([entries[stored, 0], further_frames])).astype(np.int64)
        frame_numbers = np.full(len(frames), -1, np.int64)
        frame_numbers[used] = len(self.frames) + np.arange(len(used))
        self.frames += [frames[number] for number in used.tolist()]
        renumbered = np.column_stack([frame_numbers[entries[stored, 0]], entries[stored, 1:]])
        self._store(embeddings[stored], renumbered, radii[stored])
        is_stored = np.zeros(len(embeddings), bool)
        is_stored[stored] = True
        rows = np.where(is_covered, nearest, -1)
        rows[stored] = before + np.arange(len(stored))
        return TakenEntries(rows, is_stored, nearest, frame_numbers)

    def grow_graph(self, executor: Executor) -> None:
        """Add the entries so far to the graph while more are taken in; `finish` waits for it.

        Args:
            executor: of one thread, so that equal entries give equal graphs.
        """
        if not self._growing:
            self.graph.reserve(len(self._embeddings))
        for start in range(self._in_graph, self.count, _GRAPH_BLOCK):
            block = self.embeddings[start : start + _GRAPH_BLOCK]
            self._growing.append((executor.submit(self.graph.add, block), len(block)))
        self._in_graph = self.count

    def add_report(self, report: BuildReport) -> None:
        """Count what another selection has read, suppressed and dropped."""
        for name in ("frames", "seen", "suppressed", "dropped"):
            self._counts[name] += getattr(report, name)

    def add(self, nominal_frame: NominalFrame) -> None:
        """Take in the embeddings of a frame.

        Raises:
            IndexMismatchError: embeddings of another dimension.
        """
        frame = nominal_frame[0]
        embeddings = FrameEmbeddings.of(nominal_frame, self._number, self._roi)
        found, dim = embeddings.embeddings.shape[1], self._embeddings.shape[1]
        if found != dim:
            raise IndexMismatchError(f"frame '{frame.name}': embedding dimension", dim, found)
        self._counts["frames"] += 1
        self._counts["seen"] += len(embeddings.embeddings)
        if not len(embeddings.embeddings):
            return
        if self.dedup_distance >= 0.0:
            self._take(embeddings)
            return
        self._waiting.append(embeddings)
        self._distances.append(self._distances_inside(nominal_frame))
        if len(self._waiting) == MEASURED_FRAMES:
            self._take_waiting()

    def finish(self, report_progress: Callable[[int], object] | None = None) -> None:
        """Take in what is waiting, and complete the graph.

        Args:
            report_progress: called with numbers of entries that were added to the graph.

        Raises:
            ArtefactError: `dedup_distance` is to be measured, and grids are too small.
        """
        if self._waiting:
            self._take_waiting()
        if self.count:
            self._complete_graph(report_progress)
            self.graph.trim()

    def _distances_inside(self, nominal_frame: NominalFrame) -> np.ndarray:
        if self.stage.spec.kind == INSTANCES:
            embeddings = FrameEmbeddings.of(nominal_frame, self._number, self._roi)
            return embeddings.nearest_distances(0)
        # On the whole image, so that the distance does not depend on the region of interest.
        embeddings = FrameEmbeddings.of(nominal_frame[:2], self._number, RegionOfInterest())
        return embeddings.nearest_distances(_NEIGHBOURHOOD + 1)

    def _suitable_distance(self) -> float:
        """Return a `dedup_distance` that suits the stage.

        Distances of one backbone are ten times those of another. The median distance from an
        embedding to the nearest other one of its own image tells how far apart things that are
        alike lie; it does not depend on how fast the frames of a drive change.
        """
        distances = np.concatenate(self._distances)
        instances = self.stage.spec.kind == INSTANCES
        if len(distances):
            share = _INSTANCE_SHARE if instances else _PATCH_SHARE
            return float(np.clip(share * np.median(distances), 0.0, 2.0))
        if instances:
            return 0.0
        raise ArtefactError(
            f"index: dedup_distance -1: expected grids of more than {_NEIGHBOURHOOD} patches a "
            "side; set the distance"
        )

    def _take_waiting(self) -> None:
        self.dedup_distance = self._suitable_distance()
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
            first, new = self.count, self._new_rows(block, frame_embeddings.frame.recording)
            stored = new[: self.max_entries - first]
            self._counts["suppressed"] += len(block) - len(new)
            self._counts["dropped"] += len(new) - len(stored)
            self._store(block[stored], entries[start + stored])
            self._note_radii(block, np.setdiff1d(np.arange(len(block)), new), first)
        if self.count > before:
            thumbnail = _thumbnail(frame_embeddings.frame.image)
            name, grid_hw = frame_embeddings.frame.name, frame_embeddings.grid_hw
            recording = frame_embeddings.frame.recording
            self.frames.append(FrameRecord(name, *grid_hw, thumbnail, recording))

    def _new_rows(self, embeddings: np.ndarray, recording: str) -> np.ndarray:
        """Return the rows that are far enough from all entries and from the rows before them.

        The nearest entries of the others are noted as supported by the recording.
        """
        if self.dedup_distance == 0.0:
            return np.arange(len(embeddings))
        limit = np.float32(1.0 - self.dedup_distance)
        nearest, similarities = self._nearest(embeddings)
        is_far = similarities <= limit
        self._note_support(recording, nearest[~is_far])
        distances = 1.0 - similarities[~is_far]
        np.maximum.at(self._radii[:, 0], nearest[~is_far], np.maximum(distances, 0.0))
        candidates = np.flatnonzero(is_far)
        products = inner_products(embeddings[candidates], embeddings[candidates].T)
        is_new = np.ones(len(candidates), bool)
        for position in range(len(candidates)):
            if is_new[position]:
                is_new[position + 1 :] &= products[position, position + 1 :] <= limit
        return candidates[is_new]

    def _note_radii(self, embeddings: np.ndarray, suppressed: np.ndarray, first: int) -> None:
        """Note rows that entries from row `first` on have suppressed, rather than older ones."""
        if first == self.count or not len(suppressed):
            return
        products = inner_products(embeddings[suppressed], self.embeddings[first:].T)
        nearest, similarities = products.argmax(axis=1), products.max(axis=1)
        # Others are covered by older entries, or by one that was dropped.
        is_near = similarities > np.float32(1.0 - self.dedup_distance)
        distances = np.maximum(1.0 - similarities[is_near], 0.0)
        np.maximum.at(self._radii[:, 0], first + nearest[is_near], distances)

    def _note_support(self, recording: str, rows: np.ndarray) -> None:
        is_supported = self._supported.get(recording, np.empty(0, bool))
        if len(is_supported) < self.count:
            is_supported = np.pad(is_supported, (0, len(self._embeddings) - len(is_supported)))
            self._supported[recording] = is_supported
        is_supported[rows] = True

    def _nearest(self, embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (n,) int64 and (n,) float32: the nearest entry, and the inner product with it."""
        if not self.count:
            return np.zeros(len(embeddings), np.int64), np.full(len(embeddings), -1.0, np.float32)
        if self.count <= _EXACT_UP_TO:
            return nearest_entries(embeddings, self.embeddings)
        self._complete_graph()
        return self.graph.nearest(embeddings)

    def _nearest_of_many(self, embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what `_nearest` does, of many embeddings: lists are faster than the graph."""
        if self.count <= _EXACT_UP_TO:
            return nearest_entries(embeddings, self.embeddings)
        return nearest_in_lists(embeddings, self.embeddings, Partition.of(self.embeddings))

    def _complete_graph(self, report_progress: Callable[[int], object] | None = None) -> None:
        for future, entries in self._growing:
            future.result()
            if report_progress is not None:
                report_progress(entries)
        self._growing.clear()
        if self._in_graph == self.count:
            return
        if report_progress is None:
            self.graph.add(self.embeddings[self._in_graph :])
        else:
            self.graph.reserve(self.count)
            for start in range(self._in_graph, self.count, _GRAPH_BLOCK):
                block = self.embeddings[start : start + _GRAPH_BLOCK]
                self.graph.add(block)
                report_progress(len(block))
        self._in_graph = self.count

    def _store(
        self, embeddings: np.ndarray, entries: np.ndarray, radii: np.ndarray | None = None
    ) -> None:
        before, count = self.count, self.count + len(embeddings)
        if count > len(self._embeddings):
            self._enlarge(min(self.max_entries, max(count, 2 * len(self._embeddings))))
        self._embeddings[before:count] = embeddings
        self._entries[before:count] = entries
        self._radii[before:count, 0] = 0.0 if radii is None else radii
        self._counts["stored"] = count

    def _enlarge(self, size: int) -> None:
        if size > len(self._embeddings):
            self._embeddings = _enlarged(self._embeddings, size)
            self._entries = _enlarged(self._entries, size)
            self._radii = _enlarged(self._radii, size)


def select(frames: Iterable[NominalFrame], selections: Sequence[Selection]) -> None:
    """Add nominal frames to all selections, and finish them.

    Raises:
        IndexMismatchError: a grid of another number of stages, or embeddings of another dimension.
        ArtefactError: as `Selection.finish`.
    """
    for nominal_frame in frames:
        frame, grid = nominal_frame[:2]
        if len(grid.stages) != len(selections):
            raise IndexMismatchError(
                f"frame '{frame.name}': stages", len(selections), len(grid.stages)
            )
        for selection in selections:
            selection.add(nominal_frame)
    for selection in selections:
        selection.finish()


def _angles(distances: np.ndarray) -> np.ndarray:
    """Return the float64 angles in radians of unit vectors by their cosine distances."""
    angles: np.ndarray = np.arccos(np.clip(1.0 - np.asarray(distances, np.float64), -1.0, 1.0))
    return angles


def _enlarged(array: np.ndarray, size: int) -> np.ndarray:
    larger: np.ndarray = np.empty((size, array.shape[1]), array.dtype)
    larger[: len(array)] = array
    return larger


def _thumbnail(image: np.ndarray) -> bytes:
    height, width = image.shape[:2]
    scale = min(1.0, _THUMBNAIL_PX / max(height, width))
    size: Any = (max(1, round(width * scale)), max(1, round(height * scale)))
    return encode_jpeg(cv2.resize(image, size, interpolation=cv2.INTER_AREA), 85)
