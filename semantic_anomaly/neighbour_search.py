"""The policy of neighbour search: exact, or a graph whose large distances are checked exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from semantic_anomaly.errors import IndexMismatchError, ModelOutputError
from semantic_anomaly.exact_search import mean_distances, nearest_similarities, to_distances
from semantic_anomaly.structures import UNIT_NORM_TOLERANCE

# Entries times dimensions up to which a product with all of them is as quick as the graph with
# its exact checks (5200 entries of 192 dimensions): benchmarks/stages.py.
AUTO_EXACT_UP_TO = 1_000_000
_SEED = 100


class SearchGraph(Protocol):
    """What of hnswlib's index the search uses."""

    def set_ef(self, ef: int) -> None:
        """Set the breadth of the search."""

    def knn_query(self, data: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return labels and distances (n, k)."""


class Ranking(Protocol):
    """What makes distances large or not; it grows where they grow."""

    def values(self, distances: np.ndarray) -> np.ndarray:
        """Return (n,) float32 values of (n,) distances."""

    def made_of(self, chosen: np.ndarray) -> np.ndarray:
        """Return (n,) bool: the distances that the (n,) bool chosen values are made of."""


class NeighbourSearch:
    """k-nearest-neighbour distances to fixed unit vectors.

    The graph (HNSW, Malkov and Yashunin 2018) can only overestimate a distance: it never hides
    an anomaly, it raises false alarms. Checking exactly what it calls large makes decisions
    those of an exact search.

    Args:
        entries: (count, dim) float32, unit norm, C order.
        graph: gives the graph of the entries in space 'ip'; called when it is needed.
        name: of the index, for messages.
        ef: breadth of the graph search.
    """

    def __init__(
        self, entries: np.ndarray, graph: Callable[[], SearchGraph], name: str, ef: int
    ) -> None:
        self._entries = entries
        self._graph = graph
        self._name = name
        self._ef = ef
        self._uses_graph = entries.size > AUTO_EXACT_UP_TO

    def configure(self, search: str, ef: int) -> None:
        """Choose 'exact', 'graph' or 'auto' (exact while small) and the breadth."""
        large = self._entries.size > AUTO_EXACT_UP_TO
        self._uses_graph = search == "graph" or (search == "auto" and large)
        self._ef = ef
        if self._uses_graph:
            self._graph()

    def distances(
        self,
        embeddings: np.ndarray,
        k: int,
        exact_above: float | None,
        exact_top: int,
        ranking: Ranking | None,
    ) -> np.ndarray:
        """Return (n,) float32; as `NominalIndex.distances`."""
        queries = self.checked(embeddings, k)
        if not self._uses_graph:
            return mean_distances(queries, self._entries, k)
        distances = to_distances(self._graph_similarities(queries, k))
        unchecked = np.ones(len(queries), bool)
        top = min(exact_top, len(queries))
        while True:
            large = np.zeros(len(queries), bool)
            ranked = ranking.values(distances) if ranking else distances
            if top:
                large[np.argpartition(ranked, len(queries) - top)[-top:]] = True
            if exact_above is not None:
                large |= ranked > exact_above
            if ranking:
                large = ranking.made_of(large)
            large &= unchecked
            if not large.any():
                return distances
            distances[large] = mean_distances(queries[large], self._entries, k)
            unchecked &= ~large

    def exact_distances(self, embeddings: np.ndarray, k: int) -> np.ndarray:
        """Return (n,) float32, by a product with every entry."""
        return mean_distances(self.checked(embeddings, k), self._entries, k)

    def recall(self, queries: np.ndarray | int, k: int) -> dict[str, float]:
        """Compare the graph with the exact search; as `NominalIndex.recall`."""
        points = self.checked(self._mixed(queries) if isinstance(queries, int) else queries, k)
        exact = nearest_similarities(points, self._entries, k)
        found = self._graph_similarities(points, k)
        error = to_distances(found) - to_distances(exact)
        # Entries at the same distance count alike, whichever the graph returns.
        hits = found >= exact.min(axis=1, keepdims=True) - 1e-5
        return {
            "queries": len(points),
            "k": k,
            "ef": max(self._ef, k),
            "recall": float(hits.mean()),
            "mean_error": float(error.mean()),
            "max_error": float(error.max()),
        }

    def checked(self, embeddings: np.ndarray, k: int) -> np.ndarray:
        """Return queries that are safe to search with.

        Raises:
            IndexMismatchError: another dimension, or k not in 1 to count.
            ModelOutputError: not finite or not of unit norm.
        """
        count, dim = self._entries.shape
        if embeddings.ndim != 2 or embeddings.shape[1] != dim:
            raise IndexMismatchError(f"{self._name}: embeddings", f"(n, {dim})", embeddings.shape)
        if not 1 <= k <= count:
            raise IndexMismatchError(f"{self._name}: neighbours", f"1 to {count}", k)
        queries = np.ascontiguousarray(embeddings, np.float32)
        squares = np.einsum("nd,nd->n", queries, queries)
        # NaN compares false, so the test is written to fail on it.
        if not np.all(np.abs(squares - 1.0) <= 2 * UNIT_NORM_TOLERANCE):
            raise ModelOutputError("embeddings: expected finite unit vectors, found others")
        return queries

    def _graph_similarities(self, queries: np.ndarray, k: int) -> np.ndarray:
        graph = self._graph()
        if not len(queries):
            return np.empty((0, k), np.float32)
        graph.set_ef(max(self._ef, k))
        try:
            _, distances = graph.knn_query(queries, k)
        except RuntimeError:
            # A graph of few links can be in pieces, with fewer than k entries within reach.
            return nearest_similarities(queries, self._entries, k)
        similarities: np.ndarray = 1.0 - distances
        return similarities

    def _mixed(self, number: int) -> np.ndarray:
        generator = np.random.default_rng(_SEED)
        one, other = generator.integers(0, len(self._entries), (2, number))
        mixed = self._entries[one] + 0.5 * self._entries[other]
        return mixed / np.maximum(np.linalg.norm(mixed, axis=1, keepdims=True), 1e-6)
