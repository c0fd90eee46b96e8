"""Exact nearest neighbours of unit vectors: matrix products in pieces that stay in the cache.

The policy of neighbour search: exact, or a graph whose large distances are checked exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from semantic_anomaly.errors import IndexMismatchError, ModelOutputError
from semantic_anomaly.linalg import inner_products
from semantic_anomaly.structures import UNIT_NORM_TOLERANCE

# Pieces of 4096 x 512 products are 8 MB: the fastest of those tried on two cores.
_ENTRY_ROWS = 4096
_QUERY_ROWS = 512
# The k largest of many lie in the k groups with the largest maxima, and maxima are cheap.
_GROUP = 64


def nearest_similarities(queries: np.ndarray, entries: np.ndarray, k: int) -> np.ndarray:
    """Return (n, k) float32, the largest inner products of each query, in no order.

    Args:
        queries: (n, dim) float32.
        entries: (count, dim) float32, C order, count >= k.
        k: >= 1.
    """
    best = np.full((k, len(queries)), -np.inf, np.float32)
    buffer = np.empty(min(_ENTRY_ROWS, len(entries)) * min(_QUERY_ROWS, len(queries)), np.float32)
    for left in range(0, len(queries), _QUERY_ROWS):
        columns = queries[left : left + _QUERY_ROWS].T
        mine = best[:, left : left + _QUERY_ROWS]
        for top in range(0, len(entries), _ENTRY_ROWS):
            rows = entries[top : top + _ENTRY_ROWS]
            # Entries as rows: maxima then run along whole rows, which vectorises best.
            piece = buffer[: len(rows) * columns.shape[1]].reshape(len(rows), -1)
            inner_products(rows, columns, piece)
            if k == 1:
                np.maximum(mine[0], piece.max(axis=0), out=mine[0])
            else:
                _improve(mine, piece, k)
    return best.T


def nearest_entries(queries: np.ndarray, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (n,) int64 rows of the nearest entries, and (n,) float32 inner products with them.

    Args:
        queries: (n, dim) float32, few of them.
        entries: (count, dim) float32, count >= 1.
    """
    rows = np.zeros(len(queries), np.int64)
    best = np.full(len(queries), -np.inf, np.float32)
    for start in range(0, len(entries), _ENTRY_ROWS):
        products = inner_products(queries, entries[start : start + _ENTRY_ROWS].T)
        found = products.argmax(axis=1)
        values = products[np.arange(len(queries)), found]
        closer = values > best
        best[closer], rows[closer] = values[closer], found[closer] + start
    return rows, best


def mean_distances(queries: np.ndarray, entries: np.ndarray, k: int) -> np.ndarray:
    """Return (n,) float32 mean cosine distance in [0, 2] to the k nearest; arguments as above."""
    return to_distances(nearest_similarities(queries, entries, k))


def to_distances(similarities: np.ndarray) -> np.ndarray:
    """Return (n,) float32 mean distance in [0, 2] of (n, k) inner products of unit vectors."""
    # Rounding leaves products of unit vectors a little beyond 1.
    distances: np.ndarray = np.clip(1.0 - similarities, 0.0, 2.0).mean(axis=1, dtype=np.float32)
    return distances


def _improve(best: np.ndarray, piece: np.ndarray, k: int) -> None:
    """Put what is larger in the columns of (rows, n) products into the best (k, n) of them."""
    groups = len(piece) // _GROUP
    if groups <= k:
        best[:] = _largest(np.concatenate([best, piece]), k)
        return
    grouped = piece[: groups * _GROUP].reshape(groups, _GROUP, -1)
    maxima = grouped.max(axis=1)
    rest = piece[groups * _GROUP :]
    largest = np.maximum(maxima.max(axis=0), rest.max(axis=0, initial=-np.inf))
    columns = np.flatnonzero(largest > best.min(axis=0))
    order = np.argpartition(maxima[:, columns].T, groups - k, axis=1)
    picked = grouped[order[:, -k:], :, columns[:, None]].reshape(len(columns), k * _GROUP).T
    best[:, columns] = _largest(np.concatenate([best[:, columns], picked, rest[:, columns]]), k)


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    return np.partition(values.T, len(values) - k, axis=1)[:, -k:].T


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
