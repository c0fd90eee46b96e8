"""The nominal index: build, distances, neighbours, save, load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from semantic_anomaly.embedding.identity import StageIdentity
from semantic_anomaly.errors import (
    ArtefactError,
    IndexFormatError,
    IndexMismatchError,
    ModelOutputError,
)
from semantic_anomaly.index.build import BuildReport, NominalFrame, Selection, select
from semantic_anomaly.index.content import Edit, IndexContent, RecordedSource, Support
from semantic_anomaly.index.device import DeviceEntries
from semantic_anomaly.index.format import (
    check_graph,
    read_content,
    read_graph,
    refuse_existing,
    stage_folder,
    write_content,
)
from semantic_anomaly.index.hnsw import HnswGraph, predicted_graph_bytes
from semantic_anomaly.index.partition import Partition, PartitionedEntries, list_count
from semantic_anomaly.index.search import (
    are_unit_vectors,
    nearest_entries,
    nearest_similarities,
    to_distances,
)
from semantic_anomaly.io.images import decode_compressed
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.settings import Settings
from semantic_anomaly.storage import atomic_folder
from semantic_anomaly.structures import NominalExample

# Entries times dimensions up to which every distance is exact (5200 entries of 192 dimensions).
# There a product with all entries was as quick as the graph; lists were not compared.
_AUTO_EXACT_UP_TO = 1_000_000
_SEED = 100


class NominalIndex:
    """Nominal embeddings, the frames that they come from, and the search for the nearest of them.

    k-nearest-neighbour distances as in AnomalyDINO (Damm et al. 2024), with lists around centroids
    or a graph (HNSW, Malkov and Yashunin 2018) where there are many entries. An index has one or
    more stages, each with its own entries: it is the index of its first stage, and holds those of
    the further ones. Made by `build` or `load`.

    Example:
        >>> index = NominalIndex.load("index")
        >>> distances = index.distances(grid.features.reshape(-1, grid.dim), k=1)

    Args:
        content: what the first stage holds.
        manifest: as read from a folder; None: made of the content.
        graph: of the content's embeddings in their order; None: read or built when it is needed.
        folder: that the index was loaded from.
        further: indexes of the further stages.

    Attributes:
        search_is_exact: whether `distances` of the first stage are exact rather than upper bounds.
    """

    def __init__(
        self,
        content: IndexContent,
        *,
        manifest: dict[str, Any] | None = None,
        graph: HnswGraph | None = None,
        folder: Path | None = None,
        further: Sequence[NominalIndex] = (),
    ) -> None:
        self._content = content
        self._manifest = content.manifest() if manifest is None else manifest
        self._graph = graph
        self._folder = folder
        self._further = tuple(further)
        self._ef = content.search_ef
        self._partitioned: PartitionedEntries | None = None
        self._on_device: DeviceEntries | None = None
        self._use_graph = False
        self.search_is_exact = content.embeddings.size <= _AUTO_EXACT_UP_TO

    @classmethod
    def of_stages(
        cls, contents: Sequence[IndexContent], graphs: Sequence[HnswGraph | None]
    ) -> NominalIndex:
        """Return the index of the contents of its stages.

        Args:
            contents: of each stage, first to last.
            graphs: of the contents' embeddings in their order; None: built when it is needed.

        Raises:
            IndexMismatchError: stages of another region of interest, or with other edits.
        """
        further = [
            cls(replace(content, further=()), graph=graph)
            for content, graph in zip(contents[1:], graphs[1:], strict=True)
        ]
        first = replace(contents[0], further=tuple(index.fingerprint for index in further))
        for number, content in enumerate(contents[1:], start=1):
            _check_stage(first, number, content)
        return cls(first, graph=graphs[0], further=further)

    @classmethod
    def build(
        cls,
        frames: Iterable[NominalFrame],
        *,
        stages: Sequence[StageIdentity],
        roi: RegionOfInterest,
        settings: Settings,
        sources: Sequence[RecordedSource] = (),
        stride: int = 1,
        camera: str = "camera",
        dedup_distances: Sequence[float] | None = None,
    ) -> NominalIndex:
        """Build an index in one pass; memory grows with what is stored, not with what is seen.

        Args:
            frames: nominal frames and grids, and (height, width) bool where not all is nominal.
            stages: of the embedder that made the grids, at least one.
            roi: patches outside take no part.
            settings: `dedup_distance`, `max_entries`, `search_ef` and `segmenter_model`.
            sources, stride: where the frames come from, and of how many one was taken.
            camera: its name.
            dedup_distances: of each stage, instead of the setting; None: the setting.

        Raises:
            IndexMismatchError: a grid of other stages or of another dimension.
            ArtefactError: there is no nominal patch, or grids are too small to measure
                `dedup_distance`.
        """
        distances = dedup_distances or [settings.dedup_distance] * len(stages)
        selections = [
            Selection(number, stage, roi, distance, settings.max_entries)
            for number, (stage, distance) in enumerate(zip(stages, distances, strict=True))
        ]
        select(frames, selections)
        for selection in selections:
            if not selection.count:
                raise ArtefactError(
                    f"index: stage '{selection.stage.name}': expected nominal patches, found none "
                    f"in {selection.report.frames} frames"
                )
        contents = [
            IndexContent(
                # The hidden state is known only now.
                stage=replace(
                    selection.stage,
                    spec=replace(selection.stage.spec, layer=selection.stage.embedder.layer),
                ),
                roi=roi.describe(),
                camera=camera,
                sources=tuple(sources),
                stride=stride,
                support=Support.of(selection.support),
                segmenter_model=settings.segmenter_model,
                embeddings=selection.embeddings.copy(),
                entries=selection.entries.copy(),
                radii=selection.radii.copy(),
                partition=Partition.of(selection.embeddings),
                frames=tuple(selection.frames),
                report=selection.report,
                search_ef=settings.search_ef,
                limits={
                    "dedup_distance": selection.dedup_distance,
                    "max_entries": settings.max_entries,
                },
            )
            for selection in selections
        ]
        return cls.of_stages(contents, [selection.graph for selection in selections])

    @classmethod
    def load(cls, folder: str | Path) -> NominalIndex:
        """Read an index folder; the graph itself is read, and checked, when it is first needed.

        Raises:
            IndexFormatError: missing, incomplete, damaged, tampered with, or of another version.
            IndexMismatchError: a stage that belongs to another index.
        """
        folder = Path(folder).expanduser()
        content, manifest = read_content(folder)
        further = [
            cls.load(folder / stage_folder(number + 1)) for number in range(len(content.further))
        ]
        for number, (fingerprint, stage) in enumerate(
            zip(content.further, further, strict=True), start=1
        ):
            if stage.fingerprint != fingerprint:
                raise IndexFormatError(
                    f"index '{folder}': stage {number}: expected fingerprint {fingerprint}, found "
                    f"{stage.fingerprint}"
                )
            _check_stage(content, number, stage.content)
        return cls(content, manifest=manifest, folder=folder, further=further)

    def without(self, recording: str) -> NominalIndex:
        """Return the index without the entries that only one recording supports.

        It covers what the other recordings showed as the index built without that recording does:
        each of their embeddings lies within `dedup_distance` of an entry.

        Raises:
            ArtefactError: no entry of a stage would be left.
        """
        contents = []
        for stage in self.stages:
            content = stage.content
            is_kept = content.supported_without(recording)
            if not is_kept.any():
                raise ArtefactError(
                    f"{self._name}: stage '{stage.stage.name}': expected entries of other "
                    f"recordings than '{recording}', found none"
                )
            partition = replace(content.partition, lists=content.partition.lists[is_kept])
            contents.append(
                replace(
                    content,
                    embeddings=content.embeddings[is_kept],
                    entries=content.entries[is_kept],
                    partition=partition,
                    radii=content.radii[content.numbers][is_kept],
                    retracted=None,
                    support=Support(),
                )
            )
        return NominalIndex.of_stages(contents, [None] * len(contents))

    def save(
        self,
        folder: str | Path,
        beside: Callable[[Path], object] | None = None,
        force: bool = False,
    ) -> None:
        """Write the index as a whole, read it back, and only then put it in place.

        hnswlib reports neither a full disk nor a short write, so its file is checked byte by byte.

        Args:
            folder: of the index to be.
            beside: writes more into the folder, such as calibrations, before it is put in place.
            force: replace another index there, with its calibrations. The folder that this index
                was loaded from or saved to is replaced without it.

        Raises:
            ArtefactError: the folder holds another index or something else, or it cannot be
                written.
        """
        folder = Path(folder).expanduser()
        refuse_existing(folder, force or self._folder == folder)
        with atomic_folder(folder) as temporary:
            write_content(temporary, self._content, self._ready_graph())
            for number, stage in enumerate(self._further, start=1):
                (temporary / stage_folder(number)).mkdir()
                write_content(temporary / stage_folder(number), stage.content, stage._ready_graph())
            try:
                written = NominalIndex.load(temporary)
                for number, stage in enumerate(written.stages):
                    path = temporary / stage_folder(number) if number else temporary
                    check_graph(path, stage.content, stage.manifest)
            except IndexFormatError as error:
                raise ArtefactError(f"cannot write index '{folder}': {error}") from error
            if beside is not None:
                beside(temporary)
        for number, stage in enumerate(self.stages):
            stage._manifest = written.stages[number].manifest
            stage._folder = folder / stage_folder(number) if number else folder

    @property
    def stages(self) -> tuple[NominalIndex, ...]:
        """Return the indexes of all stages, this one first."""
        return self, *self._further

    @property
    def content(self) -> IndexContent:
        """Return all that the first stage holds, besides the graph; not to be changed."""
        return self._content

    @property
    def stage(self) -> StageIdentity:
        """Return how the embeddings of the first stage are made."""
        return self._content.stage

    @property
    def fixed_settings(self) -> dict[str, Any]:
        """Return the settings that the index fixes, by name; of a segmenter, if it needs one."""
        fixed: dict[str, Any] = {
            "stages": tuple(str(index.stage.spec) for index in self.stages),
            "place_weight": self.stage.embedder.place_weight,
        }
        for index in self.stages:
            if index.stage.segmenter is not None:
                fixed["segmenter"] = index.stage.segmenter.family
                fixed["segmenter_model"] = index.content.segmenter_model
        return fixed

    @property
    def roi_description(self) -> dict[str, Any]:
        """Return `RegionOfInterest.describe()` of the build."""
        return dict(self._content.roi)

    @property
    def camera(self) -> str:
        """Return the name of the camera."""
        return self._content.camera

    @property
    def fingerprint(self) -> str:
        """Return the digest of the content; equal builds have equal ones."""
        return str(self._manifest["fingerprint"])

    @property
    def manifest(self) -> dict[str, Any]:
        """Return the manifest; it names files and digests once the index was saved."""
        return self._manifest

    @property
    def report(self) -> BuildReport:
        """Return what became of the patches that the first stage was built from."""
        return self._content.report

    @property
    def edits(self) -> tuple[Edit, ...]:
        """Return the edits since the build that are not undone, with the entries of all stages."""
        edits_of_stages = [index.content.edits for index in self.stages]
        return tuple(
            replace(
                same[0],
                entries=sum(edit.entries for edit in same),
                frames=max(edit.frames for edit in same),
            )
            for same in zip(*edits_of_stages, strict=True)
        )

    @property
    def count(self) -> int:
        """Return the number of entries of the first stage."""
        return len(self._content.embeddings)

    @property
    def dim(self) -> int:
        """Return the length of an embedding of the first stage."""
        return int(self._content.embeddings.shape[1])

    @property
    def recordings(self) -> tuple[str, ...]:
        """Return the names of the recordings that support entries of any stage."""
        return tuple(dict.fromkeys(r for stage in self.stages for r in stage.content.recordings))

    @property
    def frame_names(self) -> tuple[str, ...]:
        """Return the names of the frames that contributed entries to any stage."""
        names = (frame.name for index in self.stages for frame in index.content.frames)
        return tuple(dict.fromkeys(names))

    def thumbnail(self, frame_name: str) -> np.ndarray | None:
        """Return (height, width, 3) uint8 RGB of a contributing frame, or None."""
        return next(self.thumbnails(frame_name), None)

    def thumbnails(self, frame_name: str) -> Iterator[np.ndarray]:
        """Yield (height, width, 3) uint8 RGB of the contributing frames of a name."""
        of_name = (f for index in self.stages for f in index.content.frames if f.name == frame_name)
        for jpeg in dict.fromkeys(frame.thumbnail for frame in of_name):
            yield decode_compressed(jpeg, "jpeg")

    @staticmethod
    def predicted_bytes(count: int, dim: int) -> int:
        """Return about how many bytes an index takes on disk, thumbnails and manifest aside."""
        centroid_bytes = 4 * dim * list_count(count)
        return predicted_graph_bytes(count, dim) + count * (4 * dim + 16) + centroid_bytes

    def check_embedder(self, stages: Sequence[StageIdentity]) -> None:
        """Raise IndexMismatchError if the stages of the running embedder are others.

        Names of backbones and segmenters may differ, and weights of the maps come from the index.
        """
        hint = "use the settings it was built with, or build it again"
        if len(stages) != len(self.stages):
            raise IndexMismatchError(
                f"{self._name}: stages of the embedder", len(self.stages), len(stages), hint
            )
        for number, (index, running) in enumerate(zip(self.stages, stages, strict=True)):
            what = self._name
            if len(stages) > 1:
                what += f", stage {number} ({index.stage.name})"
            difference = index.stage.embedder.difference(running.embedder)
            if difference is not None:
                name, expected, found = difference
                raise IndexMismatchError(f"{what}: {name} of the embedder", expected, found, hint)
            own, other = index.stage.segmenter, running.segmenter
            if (own is None) != (other is None) or (own and other and not own.matches(other)):
                expected, found = (
                    "none" if s is None else f"{s.family} {s.digest[:12]}" for s in (own, other)
                )
                raise IndexMismatchError(f"{what}: segmenter", expected, found, hint)

    def check_roi(self, roi: RegionOfInterest) -> None:
        """Check that a region of interest is a part of the index's own.

        Raises:
            IndexMismatchError: it reaches outside, or the index has another ego mask.
        """
        running = roi.describe()
        expected, found = self._content.roi["ego_mask_sha256"], running["ego_mask_sha256"]
        if expected and expected != found:
            hint = "set the mask it was built with"
            raise IndexMismatchError(f"{self._name}: ego mask", expected, found or "none", hint)
        if not roi.is_within(self._content.roi):
            raise IndexMismatchError(
                f"{self._name}: region of interest",
                f"a part of the index's own {self._content.roi['polygon_xy']}",
                running["polygon_xy"] or "the whole image",
                "build the index again",
            )

    def configure_search(self, search: str, ef: int, device: str = "cpu") -> None:
        """Choose how `distances` of all stages searches, reading graphs that are to be used.

        Args:
            search: 'exact'; 'lists' or 'graph', where bounds come from, on the CPU; or 'auto':
                exact for small indexes and on a GPU, lists for others.
            ef: breadth of the graph search, >= 1.
            device: that exact searches run on: cpu, cuda or cuda:N.

        Raises:
            IndexFormatError: the graph is not that of the index.
            IndexMismatchError: the entries do not fit into the memory of the GPU.
        """
        for index in self.stages:
            small = index.content.embeddings.size <= _AUTO_EXACT_UP_TO
            on_gpu = device != "cpu" and search in ("auto", "exact")
            index.search_is_exact = search == "exact" or (search == "auto" and small) or on_gpu
            index._ef = ef
            index._use_graph = search == "graph"
            if index._use_graph:
                index._ready_graph()
            if not on_gpu:
                index._on_device = None
            elif index._on_device is None or index._on_device.device != device:
                index._on_device = DeviceEntries(index.content.embeddings, device)
            if not index.search_is_exact:
                index._ready_lists()

    def distances(self, embeddings: np.ndarray, k: int) -> np.ndarray:
        """Return (n,) float32 mean cosine distances in [0, 2] to the k nearest entries.

        Unless the search is exact, they are upper bounds, from the lists nearest to each embedding
        or from the graph: they never hide an anomaly, and depend on nothing but embedding and
        index. Computing the large ones again with `exact_distances` gives the decisions of an
        exact search.

        Args:
            embeddings: (n, dim) float32, unit norm.
            k: 1 to count.

        Raises:
            IndexMismatchError: another dimension, or k out of range.
            ModelOutputError: embeddings that are not finite or not of unit norm.
        """
        if self.search_is_exact:
            return self.exact_distances(embeddings, k)
        queries = self._checked(embeddings, k)
        if self._use_graph:
            return to_distances(self._graph_similarities(queries, k))
        return to_distances(self._ready_lists().similarities(queries, k))

    def exact_distances(
        self, embeddings: np.ndarray, k: int, bounds: np.ndarray | None = None
    ) -> np.ndarray:
        """Return what `distances` returns, to 1e-5 those of a product with every entry.

        Args:
            embeddings, k: as `distances`.
            bounds: (n,) float32 that `distances` returned, to save their computation; or None.

        Raises:
            IndexMismatchError, ModelOutputError: as `distances`.
        """
        queries = self._checked(embeddings, k)
        if self._on_device is not None:
            return to_distances(self._on_device.similarities(queries, k))
        if self.search_is_exact:
            return to_distances(nearest_similarities(queries, self._content.embeddings, k))
        # The mean of several does not tell the farthest of them.
        known = None if bounds is None or k > 1 else 1.0 - bounds[:, None]
        return to_distances(self._ready_lists().exact_similarities(queries, k, known))

    def nearest(self, embedding: np.ndarray) -> NominalExample:
        """Return the entry nearest to an embedding (dim,), searched exactly.

        Raises:
            IndexMismatchError, ModelOutputError: as `distances`.
        """
        return self.nearest_many(embedding[None])[0]

    def nearest_many(self, embeddings: np.ndarray) -> list[NominalExample]:
        """Return the entries nearest to embeddings (n, dim), reading the entries once for all."""
        queries = self._checked(embeddings, 1)
        rows, similarities = nearest_entries(queries, self._content.embeddings)
        examples = []
        for entry, similarity in zip(rows.tolist(), similarities.tolist(), strict=True):
            number, row, col = self._content.entries[entry].tolist()
            frame = self._content.frames[number]
            distance = min(max(1.0 - similarity, 0.0), 2.0)
            examples.append(
                NominalExample(frame.name, row, col, (frame.rows, frame.cols), distance)
            )
        return examples

    def recall(self, queries: np.ndarray | int, k: int) -> dict[str, float]:
        """Return how the graph search at the current breadth compares with the exact one.

        Args:
            queries: (n, dim) float32 unit embeddings of real frames, or a number: so many
                entries, each mixed with another one, seeded.
            k: 1 to count.

        Returns:
            'queries', 'k', 'ef', 'recall' (share of the k nearest found), 'mean_error' and
            'max_error' of the mean distance.
        """
        entries = self._content.embeddings
        if isinstance(queries, int):
            first, second = np.random.default_rng(_SEED).integers(0, self.count, (2, queries))
            mixed = entries[first] + 0.5 * entries[second]
            queries = mixed / np.maximum(np.linalg.norm(mixed, axis=1, keepdims=True), 1e-6)
        points = self._checked(np.asarray(queries), k)
        exact = nearest_similarities(points, entries, k)
        approximate = self._graph_similarities(points, k)
        error = to_distances(approximate) - to_distances(exact)
        # Entries at the same distance count alike, whichever the graph returns.
        hits = approximate >= exact.min(axis=1, keepdims=True) - 1e-5
        return {
            "queries": len(points),
            "k": k,
            "ef": max(self._ef, k),
            "recall": float(hits.mean()),
            "mean_error": float(error.mean()),
            "max_error": float(error.max()),
        }

    def _checked(self, embeddings: np.ndarray, k: int) -> np.ndarray:
        """Return queries that are safe to search with; raises as `distances`."""
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim:
            raise IndexMismatchError(
                f"{self._name}: embeddings", f"(n, {self.dim})", embeddings.shape
            )
        if not 1 <= k <= self.count:
            raise IndexMismatchError(f"{self._name}: neighbours", f"1 to {self.count}", k)
        queries = np.ascontiguousarray(embeddings, np.float32)
        if not are_unit_vectors(queries):
            raise ModelOutputError("embeddings: expected finite unit vectors, found others")
        return queries

    def _graph_similarities(self, queries: np.ndarray, k: int) -> np.ndarray:
        try:
            return self._ready_graph().similarities(queries, k, self._ef)
        except RuntimeError:
            # The graph is in pieces, with fewer than k entries within reach.
            return nearest_similarities(queries, self._content.embeddings, k)

    @property
    def _name(self) -> str:
        return f"index '{self._folder}'" if self._folder else "index"

    def _ready_lists(self) -> PartitionedEntries:
        if self._partitioned is None:
            content = self._content
            self._partitioned = PartitionedEntries(content.embeddings, content.partition)
        return self._partitioned

    def _ready_graph(self) -> HnswGraph:
        if self._graph is None:
            if self._folder is None:
                self._graph = HnswGraph.build(self._content.embeddings)
            else:
                self._graph = read_graph(self._folder, self._content, self._manifest)
        return self._graph


def _check_stage(first: IndexContent, number: int, stage: IndexContent) -> None:
    """Refuse a further stage that belongs to another index.

    Raises:
        IndexMismatchError: stages of its own, another region of interest, or other edits.
    """
    edits, own_edits = ([(e.number, e.kind) for e in c.edits] for c in (first, stage))
    pairs = {
        "further stages": (0, len(stage.further)),
        "region of interest": (dict(first.roi), dict(stage.roi)),
        "edits": (edits, own_edits),
    }
    for name, (expected, found) in pairs.items():
        if expected != found:
            raise IndexMismatchError(f"stage {number} of an index: {name}", expected, found)
