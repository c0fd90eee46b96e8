"""What an index says of itself, and whether it belongs to what is running.

The nominal index: build, distances, neighbours, save, load. The only place with hnswlib.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np

from semantic_anomaly.embedding.identity import EmbedderIdentity, SegmenterIdentity
from semantic_anomaly.errors import ArtefactError, IndexFormatError
from semantic_anomaly.index.build import (
    BuildReport,
    NominalFrame,
    PartPlan,
    PartSelections,
    Selection,
    suited,
)
from semantic_anomaly.index.content import Edit, IndexContent, check_part, check_part_name
from semantic_anomaly.index.format import (
    GRAPH,
    check_graph,
    read_content,
    refuse_other_folder,
    write_content,
)
from semantic_anomaly.index.hnsw import GrowingGraph, predicted_graph_bytes
from semantic_anomaly.index.search import NeighbourSearch, Ranking, nearest_entries
from semantic_anomaly.io.images import decode_compressed
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.settings import Settings
from semantic_anomaly.storage import atomic_folder
from semantic_anomaly.structures import NominalExample


class DescribedIndex:
    """What an index says of itself; made by `NominalIndex` alone."""

    _content: IndexContent
    _manifest: dict[str, Any]
    _folder: Path | None

    @property
    def content(self) -> IndexContent:
        """Return all that it holds, besides the graph; not to be changed."""
        return self._content

    @property
    def identity(self) -> EmbedderIdentity:
        """Return the embedder that made the entries."""
        return self._content.identity

    @property
    def region_description(self) -> dict[str, Any]:
        """Return `ImageRegion.describe()` of the build."""
        return dict(self._content.region)

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

    def check_embedder(self, identity: EmbedderIdentity) -> None:
        """Raise IndexMismatchError where the running embedder's space is another one."""
        self._content.check_embedder(identity, self._name)

    def check_region(self, region: ImageRegion) -> None:
        """Raise IndexMismatchError where region of interest or ego mask are others."""
        self._content.check_region(region, self._name)

    @staticmethod
    def predicted_bytes(count: int, dim: int, m: int) -> int:
        """Return about how many bytes an index takes on disk, thumbnails and manifest aside."""
        return predicted_graph_bytes(count, dim, m) + count * (4 * dim + 12)

    @property
    def _name(self) -> str:
        return f"index '{self._folder}'" if self._folder else "index"


class NominalIndex(DescribedIndex):
    """Nominal embeddings, where they come from, and the search for the nearest of them.

    k-nearest-neighbour distances as in AnomalyDINO (Damm et al. 2024), with a graph (HNSW,
    Malkov and Yashunin 2018) where there are many entries. Made by `build` or `load`.
    """

    def __init__(
        self,
        content: IndexContent,
        manifest: dict[str, Any],
        graph: hnswlib.Index | None,
        folder: Path | None,
        parts: Mapping[str, NominalIndex] | None = None,
    ) -> None:
        self._content = content
        self._manifest = manifest
        self._graph = graph
        self._folder = folder
        self._parts = dict(parts or {})
        self._search = NeighbourSearch(
            content.embeddings, self._ready_graph, self._name, content.search_ef
        )

    @classmethod
    def build(
        cls,
        frames: Iterable[NominalFrame],
        *,
        identity: EmbedderIdentity,
        region: ImageRegion,
        settings: Settings,
        source: Sequence[str] = (),
        camera: str = "camera",
        segmenter: SegmenterIdentity | None = None,
    ) -> NominalIndex:
        """Build an index in one pass; memory grows with what is stored, not with what is seen.

        Parts for instances, their surroundings and scenes are made as the settings need them.

        Args:
            frames: nominal frames and grids, and (rows, cols) bool where not all is nominal.
            identity: of the embedder that made them.
            region: patches outside take no part.
            settings: `dedup_distance`, `max_entries`, and the graph's.
            source, camera: names of the sources and the camera, for the manifest.
            segmenter: that gave the grids their instances; None: they have none.

        Raises:
            IndexMismatchError: a grid of another dimension than the identity's.
            ArtefactError: there is no nominal patch.
            ModelOutputError: there is a segmenter, and a grid without instances.
        """

        def new_graph(dim: int) -> GrowingGraph:
            return GrowingGraph(dim, settings.graph_m, settings.graph_ef_construction)

        plan = PartPlan.of_settings(settings, segmenter)
        beside = PartSelections(plan, settings, region, new_graph)
        frames, settings = suited(beside.watch(frames), settings)
        graph = new_graph(identity.dim)
        selection = Selection(graph, identity.dim, settings.dedup_distance, settings.max_entries)
        selection.extend(frames, region)
        selection.finish()
        told = region, settings, source, camera
        content = IndexContent.of_selection(selection, identity, *told)
        index = cls(content, content.manifest(), graph.finished(), None)
        beside.finish()
        parts = {}
        for name, chosen in beside.selections.items():
            own = replace(identity, dim=chosen.embeddings.shape[1])
            told = region, beside.settings[name], source, camera
            content = IndexContent.of_selection(chosen, own, *told, made=plan.made[name])
            grown = beside.graphs[name].finished()
            parts[name] = cls(content, content.manifest(), grown, None)
        return index.with_parts(parts) if parts else index

    @classmethod
    def load(cls, folder: Path) -> NominalIndex:
        """Read an index folder; the graph itself is read, and checked, when it is first needed.

        Raises:
            IndexFormatError: missing, incomplete, damaged, tampered with, or of another version.
        """
        folder = Path(folder).expanduser()
        content, manifest = read_content(folder)
        for name in content.parts:
            check_part_name(name)
        parts = {name: cls.load(folder / name) for name in content.parts}
        for name, part in parts.items():
            expected = content.parts[name]
            if part.fingerprint != expected:
                raise IndexFormatError(
                    f"index '{folder}': part '{name}': expected fingerprint {expected}, "
                    f"found {part.fingerprint}"
                )
            check_part(content, name, part.content)
        loaded = cls(content, manifest, None, folder, parts)
        loaded.plan  # noqa: B018 Reading it checks it.
        return loaded

    def save(self, folder: Path, beside: Callable[[Path], object] | None = None) -> None:
        """Write the index as a whole, read it back, and only then put it in place.

        An index that was there is replaced, its calibration with it. hnswlib reports neither a
        full disk nor a short write, so what it wrote is checked byte by byte.

        Args:
            folder: of the index to be.
            beside: writes more into the folder, its calibration say, before it is put in place.

        Raises:
            ArtefactError: the folder holds something else, or it cannot be written.
        """
        folder = Path(folder).expanduser()
        refuse_other_folder(folder)
        with atomic_folder(folder, replace=True) as temporary:
            self._write(temporary)
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
    def parts(self) -> Mapping[str, NominalIndex]:
        """Return the parts by name: indexes of their own, of other embeddings of the frames."""
        return dict(self._parts)

    @property
    def plan(self) -> PartPlan:
        """Return which parts there are, and what they are made with."""
        return PartPlan.of_made({name: part.content.made for name, part in self._parts.items()})

    def with_parts(self, parts: Mapping[str, NominalIndex]) -> NominalIndex:
        """Return this index with these parts and no others; their fingerprints enter its own.

        Raises:
            ArtefactError: a name that no part can have, or a part with parts.
            IndexMismatchError: a part of another embedder, its dimension aside, or region.
        """
        for name, part in parts.items():
            check_part(self._content, name, part.content)
        prints = {name: part.fingerprint for name, part in parts.items()}
        content = replace(self._content, parts=prints)
        return NominalIndex(content, content.manifest(), self._ready_graph(), None, parts)

    def with_content(
        self, content: IndexContent, graph: GrowingGraph | None = None
    ) -> NominalIndex:
        """Return an index of other content with the same parts.

        Args:
            content: what it holds.
            graph: of the content's embeddings in their order; None: made when it is needed.
        """
        ready = graph.finished() if graph else None
        return NominalIndex(content, content.manifest(), ready, None, self._parts)

    def configure_search(self, search: str, ef: int) -> None:
        """Choose how `distances` searches, reading the graph if it is to be used.

        Args:
            search: 'exact', 'graph', or 'auto': exact for small indexes.
            ef: breadth of the graph search, >= 1.

        Raises:
            IndexFormatError: the graph is not that of the index.
        """
        self._search.configure(search, ef)

    def distances(
        self,
        embeddings: np.ndarray,
        k: int,
        *,
        exact_above: float | None = None,
        exact_top: int = 0,
        ranking: Ranking | None = None,
    ) -> np.ndarray:
        """Return (n,) float32 mean cosine distances in [0, 2] to the k nearest entries.

        The graph can only overestimate a distance, never hide an anomaly. Checking the large
        ones exactly makes decisions those of an exact search.

        Args:
            embeddings: (n, dim) float32, unit norm.
            k: 1 to count.
            exact_above: distances above are exact.
            exact_top: so many of the largest are exact, hence exactly the largest there are.
            ranking: what is large, and made of which distances; None: distances themselves.

        Raises:
            IndexMismatchError: another dimension, or k out of range.
            ModelOutputError: embeddings that are not finite or not of unit norm.
        """
        return self._search.distances(embeddings, k, exact_above, exact_top, ranking)

    def exact_distances(self, embeddings: np.ndarray, k: int) -> np.ndarray:
        """Return what `distances` returns, by a product with every entry."""
        return self._search.exact_distances(embeddings, k)

    def nearest(self, embedding: np.ndarray) -> NominalExample:
        """Return the entry nearest to an embedding (dim,), found exactly; raises as `distances`."""
        return self.nearest_many(embedding[None])[0]

    def nearest_many(self, embeddings: np.ndarray) -> list[NominalExample]:
        """Return the entries nearest to embeddings (n, dim), reading the entries once for all."""
        queries = self._search.checked(embeddings, 1)
        rows, similarities = nearest_entries(queries, self._content.embeddings)
        found = []
        for row_of_entry, similarity in zip(rows.tolist(), similarities.tolist(), strict=True):
            number, row, col = (int(v) for v in self._content.entries[row_of_entry])
            frame = self._content.frames[number]
            distance = min(max(1.0 - similarity, 0.0), 2.0)
            found.append(NominalExample(frame.name, row, col, (frame.rows, frame.cols), distance))
        return found

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
        return self._search.recall(queries, k)

    def _write(self, folder: Path) -> None:
        self._ready_graph().save_index(str(folder / GRAPH))
        write_content(folder, self._content, self._content.manifest())
        for name, part in self._parts.items():
            (folder / name).mkdir()
            part._write(folder / name)

    def _ready_graph(self) -> hnswlib.Index:
        if self._graph is None:
            if self._folder is None:
                content = self._content
                made = GrowingGraph(self.dim, content.graph["m"], content.graph["ef_construction"])
                made.add(content.embeddings)
                self._graph = made.finished()
                return self._graph
            check_graph(self._folder, self._content, self._manifest)
            # After a failed load hnswlib crashes at the next query, so a failure keeps nothing.
            graph = hnswlib.Index("ip", self.dim)
            try:
                graph.load_index(str(self._folder / GRAPH), max_elements=self.count)
            except RuntimeError as error:
                raise IndexFormatError(f"{self._name}: {GRAPH}: {error}") from error
            self._graph = graph
        return self._graph
