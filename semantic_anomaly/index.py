"""The nominal index: build, distances, neighbours, save, load. The only place with hnswlib."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np

from semantic_anomaly.errors import ArtefactError, IndexFormatError
from semantic_anomaly.exact_search import nearest_entries
from semantic_anomaly.growing_graph import GrowingGraph
from semantic_anomaly.identity import EmbedderIdentity
from semantic_anomaly.index_build import NominalFrame, Selection, suited
from semantic_anomaly.index_content import IndexContent, check_part, check_part_name
from semantic_anomaly.index_description import DescribedIndex
from semantic_anomaly.index_format import (
    GRAPH,
    check_graph,
    read_content,
    refuse_other_folder,
    write_content,
)
from semantic_anomaly.index_parts import PartPlan, PartSelections
from semantic_anomaly.neighbour_search import NeighbourSearch, Ranking
from semantic_anomaly.regions import ImageRegion
from semantic_anomaly.segmentation import SegmenterIdentity
from semantic_anomaly.settings import Settings
from semantic_anomaly.storage import atomic_folder
from semantic_anomaly.structures import NominalExample


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
