"""The nominal index: build, distances, neighbours, save, load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from semantic_anomaly.embedding.identity import EmbedderIdentity, SegmenterIdentity
from semantic_anomaly.errors import (
    ArtefactError,
    IndexFormatError,
    IndexMismatchError,
    ModelOutputError,
)
from semantic_anomaly.index.build import (
    INSTANCE_STAGE,
    INSTANCES,
    PATCH_STAGE,
    BuildReport,
    NominalFrame,
    Selection,
    select,
)
from semantic_anomaly.index.content import Edit, IndexContent
from semantic_anomaly.index.format import (
    read_content,
    read_graph,
    refuse_existing,
    write_content,
)
from semantic_anomaly.index.hnsw import HnswGraph, predicted_graph_bytes
from semantic_anomaly.index.search import (
    are_unit_vectors,
    nearest_rows,
    nearest_similarities,
    to_distances,
)
from semantic_anomaly.io.images import decode_compressed
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.settings import GRID, Settings
from semantic_anomaly.storage import atomic_folder
from semantic_anomaly.structures import NominalExample

# Entries times dimensions up to which a product with all of them is as quick as the graph with
# its exact checks (5200 entries of 192 dimensions): benchmarks/stages.py.
_AUTO_EXACT_UP_TO = 1_000_000
_SEED = 100


class NominalIndex:
    """Nominal embeddings, the frames that they come from, and the search for the nearest of them.

    k-nearest-neighbour distances as in AnomalyDINO (Damm et al. 2024), with a graph (HNSW,
    Malkov and Yashunin 2018) where there are many entries. Made by `build` or `load`.

    Example:
        >>> index = NominalIndex.load("index")
        >>> distances = index.distances(grid.features.reshape(-1, grid.dim), k=1)

    Args:
        content: what the index holds.
        manifest: as read from a folder; None: made of the content.
        graph: of the content's embeddings in their order; None: read or built when it is needed.
        folder: that the index was loaded from.
        parts: indexes of other embeddings of the frames, by name; see `parts`.

    Attributes:
        search_is_exact: whether `distances` are exact rather than upper bounds.
    """

    def __init__(
        self,
        content: IndexContent,
        *,
        manifest: dict[str, Any] | None = None,
        graph: HnswGraph | None = None,
        folder: Path | None = None,
        parts: Mapping[str, NominalIndex] | None = None,
    ) -> None:
        self._content = content
        self._manifest = content.manifest() if manifest is None else manifest
        self._graph = graph
        self._folder = folder
        self._parts = dict(parts or {})
        self._ef = content.search_ef
        self.search_is_exact = content.embeddings.size <= _AUTO_EXACT_UP_TO

    @classmethod
    def build(
        cls,
        frames: Iterable[NominalFrame],
        *,
        identity: EmbedderIdentity,
        roi: RegionOfInterest,
        settings: Settings,
        source: Sequence[str] = (),
        camera: str = "camera",
        segmenter: SegmenterIdentity | None = None,
        backbone: str = "",
    ) -> NominalIndex:
        """Build an index in one pass; memory grows with what is stored, not with what is seen.

        Args:
            frames: nominal frames and grids, and (rows, cols) bool where not all is nominal.
            identity: of the embedder that made the grids.
            roi: patches outside take no part.
            settings: `dedup_distance`, `max_entries`, `search_ef`, and for `fixed_settings`:
                `backbone`, `variant` and `segmenter_model`.
            source, camera: names of the sources and the camera, for the manifest.
            segmenter: that made the instances of the grids; None: no part of instances is built.
            backbone: from which the embedder can be loaded; default: that of the settings, or
                else the identity's `model_id`.

        Raises:
            IndexMismatchError: a grid of another dimension than the identity's.
            ArtefactError: there is no nominal patch, or grids are too small to measure
                `dedup_distance`.
            ModelOutputError: there is a segmenter, and a grid without instances.
        """

        def index_of(selection: Selection, segmenter: SegmenterIdentity | None) -> NominalIndex:
            content = IndexContent(
                identity=identity,
                roi=roi.describe(),
                camera=camera,
                source=tuple(source),
                settings={
                    "backbone": backbone or settings.backbone or identity.model_id,
                    "variant": settings.variant or GRID,
                    "segmenter_model": settings.segmenter_model,
                },
                embeddings=selection.embeddings.copy(),
                entries=selection.entries.copy(),
                frames=tuple(selection.frames),
                report=selection.report,
                search_ef=settings.search_ef,
                limits={
                    "dedup_distance": selection.dedup_distance,
                    "max_entries": settings.max_entries,
                },
                segmenter=segmenter,
            )
            return cls(content, graph=selection.graph)

        patches, instances = (
            Selection(stage, identity.dim, roi, settings.dedup_distance, settings.max_entries)
            for stage in (PATCH_STAGE, INSTANCE_STAGE)
        )
        select(frames, [patches] if segmenter is None else [patches, instances])
        if not patches.count:
            raise ArtefactError(
                f"index: expected nominal patches, found none in {patches.report.frames} frames"
            )
        index = index_of(patches, None)
        if instances.count:
            index = index.with_parts({INSTANCES: index_of(instances, segmenter)})
        return index

    @classmethod
    def load(cls, folder: str | Path) -> NominalIndex:
        """Read an index folder; the graph itself is read, and checked, when it is first needed.

        Raises:
            IndexFormatError: missing, incomplete, damaged, tampered with, or of another version.
            IndexMismatchError: a part that belongs to another index.
        """
        folder = Path(folder).expanduser()
        content, manifest = read_content(folder)
        parts = {name: cls.load(folder / name) for name in content.parts}
        for name, part in parts.items():
            if part.fingerprint != content.parts[name]:
                raise IndexFormatError(
                    f"index '{folder}': part '{name}': expected fingerprint "
                    f"{content.parts[name]}, found {part.fingerprint}"
                )
            _check_part(content, name, part.content)
        return cls(content, manifest=manifest, folder=folder, parts=parts)

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
            for name, part in self._parts.items():
                (temporary / name).mkdir()
                write_content(temporary / name, part.content, part._ready_graph())
            try:
                written = NominalIndex.load(temporary)
                for index in (written, *written.parts.values()):
                    index._ready_graph()
            except IndexFormatError as error:
                raise ArtefactError(f"cannot write index '{folder}': {error}") from error
            if beside is not None:
                beside(temporary)
        self._manifest, self._folder = written.manifest, folder
        for name, part in self._parts.items():
            part._manifest, part._folder = written.parts[name].manifest, folder / name

    @property
    def content(self) -> IndexContent:
        """Return all that the index holds, besides the graph; not to be changed."""
        return self._content

    @property
    def identity(self) -> EmbedderIdentity:
        """Return the embedder that made the entries."""
        return self._content.identity

    @property
    def segmenter(self) -> SegmenterIdentity | None:
        """Return the segmenter of the part of instances, None without such a part."""
        return self._parts[INSTANCES].content.segmenter if INSTANCES in self._parts else None

    @property
    def fixed_settings(self) -> dict[str, Any]:
        """Return the settings that the index fixes, by name; of a segmenter, if it needs one.

        The backbone is named as it was given: shipped name, hub id or folder.
        """
        settings = self._content.settings
        fixed = {
            "backbone": settings["backbone"],
            "layers": self.identity.layers,
            "input_size": self.identity.input_size,
            "place_weight": self.identity.place_weight,
            "variant": settings["variant"],
        }
        if self.segmenter is not None:
            fixed["segmenter"] = self.segmenter.family
            fixed["segmenter_model"] = settings["segmenter_model"]
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
        """Return what became of the patches that it was built from."""
        return self._content.report

    @property
    def edits(self) -> tuple[Edit, ...]:
        """Return the edits since the build that are not undone."""
        return self._content.edits

    @property
    def count(self) -> int:
        """Return the number of entries."""
        return len(self._content.embeddings)

    @property
    def dim(self) -> int:
        """Return the length of an embedding."""
        return int(self._content.embeddings.shape[1])

    @property
    def frame_names(self) -> tuple[str, ...]:
        """Return the names of the frames that contributed entries."""
        return tuple(frame.name for frame in self._content.frames)

    def thumbnail(self, frame_name: str) -> np.ndarray | None:
        """Return (height, width, 3) uint8 RGB of a contributing frame, or None."""
        for frame in self._content.frames:
            if frame.name == frame_name:
                return decode_compressed(frame.thumbnail, "jpeg")
        return None

    @staticmethod
    def predicted_bytes(count: int, dim: int) -> int:
        """Return about how many bytes an index takes on disk, thumbnails and manifest aside."""
        return predicted_graph_bytes(count, dim) + count * (4 * dim + 12)

    @property
    def parts(self) -> Mapping[str, NominalIndex]:
        """Return the parts by name: indexes of other embeddings of the frames, `INSTANCES`."""
        return dict(self._parts)

    def with_parts(self, parts: Mapping[str, NominalIndex]) -> NominalIndex:
        """Return this index with these parts and no others; their fingerprints enter its own.

        Raises:
            ArtefactError: a part of another name than `INSTANCES`, or not one of instances.
            IndexMismatchError: a part of another embedder or region of interest.
        """
        for name, part in parts.items():
            _check_part(self._content, name, part.content)
        fingerprints = {name: part.fingerprint for name, part in parts.items()}
        content = replace(self._content, parts=fingerprints)
        return NominalIndex(content, graph=self._ready_graph(), parts=parts)

    def with_content(self, content: IndexContent, graph: HnswGraph | None = None) -> NominalIndex:
        """Return an index of other content, and its graph if there is one, with the same parts."""
        return NominalIndex(content, graph=graph, parts=self._parts)

    def check_embedder(self, identity: EmbedderIdentity) -> None:
        """Raise IndexMismatchError if the running embedder's space is another one."""
        if difference := self.identity.difference(identity):
            name, expected, found = difference
            hint = "use the settings it was built with, or build it again"
            raise IndexMismatchError(f"{self._name}: {name} of the embedder", expected, found, hint)

    def check_segmenter(self, running: SegmenterIdentity | None) -> None:
        """Raise IndexMismatchError if instances of the running segmenter cannot be compared."""
        if running is None:
            return
        expected = self.segmenter
        if expected is None:
            raise IndexMismatchError(
                f"{self._name}: instances", "a part of them", "none", "build the index again"
            )
        if not expected.matches(running):
            raise IndexMismatchError(
                f"{self._name}: segmenter",
                f"{expected.family} {expected.digest[:12]}",
                f"{running.family} {running.digest[:12]}",
                "use the settings it was built with, or build it again",
            )

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

    def configure_search(self, search: str, ef: int) -> None:
        """Choose how `distances` searches, reading the graph if it is to be used.

        Args:
            search: 'exact', 'graph', or 'auto': exact for small indexes.
            ef: breadth of the graph search, >= 1.

        Raises:
            IndexFormatError: the graph is not that of the index.
        """
        small = self._content.embeddings.size <= _AUTO_EXACT_UP_TO
        self.search_is_exact = search == "exact" or (search == "auto" and small)
        self._ef = ef
        if not self.search_is_exact:
            self._ready_graph()

    def distances(self, embeddings: np.ndarray, k: int) -> np.ndarray:
        """Return (n,) float32 mean cosine distances in [0, 2] to the k nearest entries.

        A graph search can only overestimate a distance: it never hides an anomaly. Computing the
        large ones again with `exact_distances` gives the decisions of an exact search.

        Args:
            embeddings: (n, dim) float32, unit norm.
            k: 1 to count.

        Raises:
            IndexMismatchError: another dimension, or k out of range.
            ModelOutputError: embeddings that are not finite or not of unit norm.
        """
        if self.search_is_exact:
            return self.exact_distances(embeddings, k)
        return to_distances(self._graph_similarities(self._checked(embeddings, k), k))

    def exact_distances(self, embeddings: np.ndarray, k: int) -> np.ndarray:
        """Return what `distances` returns, by a product with every entry."""
        queries = self._checked(embeddings, k)
        return to_distances(nearest_similarities(queries, self._content.embeddings, k))

    def nearest(self, embedding: np.ndarray) -> NominalExample:
        """Return the entry nearest to an embedding (dim,), searched exactly.

        Raises:
            IndexMismatchError, ModelOutputError: as `distances`.
        """
        return self.nearest_many(embedding[None])[0]

    def nearest_many(self, embeddings: np.ndarray) -> list[NominalExample]:
        """Return the entries nearest to embeddings (n, dim), reading the entries once for all."""
        queries = self._checked(embeddings, 1)
        rows, similarities = nearest_rows(queries, self._content.embeddings, 1)
        examples = []
        for (entry,), (similarity,) in zip(rows.tolist(), similarities.tolist(), strict=True):
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

    def _ready_graph(self) -> HnswGraph:
        if self._graph is None:
            if self._folder is None:
                self._graph = HnswGraph.build(self._content.embeddings)
            else:
                self._graph = read_graph(self._folder, self._content, self._manifest)
        return self._graph


def _check_part(content: IndexContent, name: str, part: IndexContent) -> None:
    """Refuse an index that cannot be a part of another one; raises as `with_parts`."""
    if name != INSTANCES or part.segmenter is None or part.parts:
        raise ArtefactError(f"part '{name}' of an index: expected '{INSTANCES}', found another one")
    expected = replace(content.identity, dim=part.identity.dim)
    if difference := expected.difference(part.identity):
        field, *values = difference
        raise IndexMismatchError(f"part '{name}' of an index: {field}", *values)
    if dict(part.roi) != dict(content.roi):
        raise IndexMismatchError(
            f"part '{name}' of an index: region of interest", dict(content.roi), dict(part.roi)
        )
