"""Nearest neighbours of unit vectors: exact, or approximate by a graph.

Exact search is matrix products in pieces that stay in the cache. The graph (HNSW, Malkov and
Yashunin 2018) can only overestimate a distance: it never hides an anomaly, it raises false alarms.
Who needs exact decisions computes the large distances again with `exact_distances`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from semantic_anomaly.errors import IndexMismatchError, ModelOutputError
from semantic_anomaly.index.hnsw import HnswGraph
from semantic_anomaly.linalg import inner_products
from semantic_anomaly.structures import UNIT_NORM_TOLERANCE

# Entries times dimensions up to which a product with all of them is as quick as the graph with
# its exact checks (5200 entries of 192 dimensions): benchmarks/stages.py.
AUTO_EXACT_UP_TO = 1_000_000
# Pieces of 4096 x 512 products are 8 MB: the fastest of those tried on two cores.
_ENTRY_ROWS = 4096
_QUERY_ROWS = 512
# The k largest of many lie in the k groups with the largest maxima, and maxima are cheap.
_GROUP = 64
_SEED = 100


class NeighbourSearch:
    """k-nearest-neighbour distances to fixed unit vectors.

    Args:
        entries: (count, dim) float32, unit norm, C order.
        graph: returns the graph of the entries; called when it is first needed.
        name: of the index, for messages.
        ef: breadth of the graph search.
    """

    def __init__(
        self, entries: np.ndarray, graph: Callable[[], HnswGraph], name: str, ef: int
    ) -> None:
        self._entries = entries
        self._graph = graph
        self._name = name
        self._ef = ef
        self.is_exact = entries.size <= AUTO_EXACT_UP_TO

    def configure(self, search: str, ef: int) -> None:
        """Choose 'exact', 'graph' or 'auto' (exact while small) and the breadth."""
        small = self._entries.size <= AUTO_EXACT_UP_TO
        self.is_exact = search == "exact" or (search == "auto" and small)
        self._ef = ef
        if not self.is_exact:
            self._graph()

    def distances(self, embeddings: np.ndarray, k: int) -> np.ndarray:
        """Return (n,) float32; as `NominalIndex.distances`."""
        if self.is_exact:
            return self.exact_distances(embeddings, k)
        return to_distances(self._graph_similarities(self._checked(embeddings, k), k))

    def exact_distances(self, embeddings: np.ndarray, k: int) -> np.ndarray:
        """Return (n,) float32, by a product with every entry."""
        return mean_distances(self._checked(embeddings, k), self._entries, k)

    def nearest_rows(self, embeddings: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and similarities of the k nearest entries, as `nearest_rows`."""
        return nearest_rows(self._checked(embeddings, k), self._entries, k)

    def recall(self, queries: np.ndarray | int, k: int) -> dict[str, float]:
        """Compare the graph with the exact search; as `NominalIndex.recall`."""
        points = self._mixed_entries(queries) if isinstance(queries, int) else queries
        points = self._checked(points, k)
        exact = nearest_similarities(points, self._entries, k)
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
        if not are_unit_vectors(queries):
            raise ModelOutputError("embeddings: expected finite unit vectors, found others")
        return queries

    def _graph_similarities(self, queries: np.ndarray, k: int) -> np.ndarray:
        try:
            return self._graph().similarities(queries, k, self._ef)
        except RuntimeError:
            # The graph is in pieces, with fewer than k entries within reach.
            return nearest_similarities(queries, self._entries, k)

    def _mixed_entries(self, count: int) -> np.ndarray:
        """Return (count, dim) unit vectors, each an entry mixed with another one."""
        generator = np.random.default_rng(_SEED)
        first, second = generator.integers(0, len(self._entries), (2, count))
        mixed = self._entries[first] + 0.5 * self._entries[second]
        return mixed / np.maximum(np.linalg.norm(mixed, axis=1, keepdims=True), 1e-6)


def are_unit_vectors(vectors: np.ndarray) -> bool:
    """Return whether all (n, dim) float32 vectors are finite and of unit norm."""
    squares = np.einsum("nd,nd->n", vectors, vectors)
    # NaN compares false, so the test is written to fail on it.
    return bool(np.all(np.abs(squares - 1.0) <= 2 * UNIT_NORM_TOLERANCE))


def nearest_rows(queries: np.ndarray, entries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the k nearest entries of each query, and the inner products with them.

    Args:
        queries: (n, dim) float32, few of them: slower than `nearest_similarities`.
        entries: (count, dim) float32, count >= k.
        k: >= 1.

    Returns:
        (n, k) int64 and (n, k) float32, nearest first, equally near ones in row order.
    """
    rows = np.empty((len(queries), 0), np.int64)
    best = np.empty((len(queries), 0), np.float32)
    for start in range(0, len(entries), _ENTRY_ROWS):
        products = inner_products(queries, entries[start : start + _ENTRY_ROWS].T)
        if k == 1:
            columns = products.argmax(axis=1)[:, None]
        else:
            columns = np.argsort(-products, axis=1, kind="stable")[:, :k]
        best = np.hstack([best, np.take_along_axis(products, columns, 1)])
        rows = np.hstack([rows, columns + start])
        order = np.argsort(-best, axis=1, kind="stable")[:, :k]
        best, rows = np.take_along_axis(best, order, 1), np.take_along_axis(rows, order, 1)
    return rows, best


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
        best_here = best[:, left : left + _QUERY_ROWS]
        for top in range(0, len(entries), _ENTRY_ROWS):
            rows = entries[top : top + _ENTRY_ROWS]
            # Entries as rows: maxima then run along whole rows, which vectorises best.
            piece = buffer[: len(rows) * columns.shape[1]].reshape(len(rows), -1)
            inner_products(rows, columns, piece)
            if k == 1:
                np.maximum(best_here[0], piece.max(axis=0), out=best_here[0])
            else:
                _merge_largest(best_here, piece, k)
    return best.T


def mean_distances(queries: np.ndarray, entries: np.ndarray, k: int) -> np.ndarray:
    """Return (n,) float32 mean cosine distance in [0, 2] to the k nearest; arguments as above."""
    return to_distances(nearest_similarities(queries, entries, k))


def to_distances(similarities: np.ndarray) -> np.ndarray:
    """Return (n,) float32 mean distance in [0, 2] of (n, k) inner products of unit vectors."""
    # Rounding leaves products of unit vectors a little beyond 1.
    distances: np.ndarray = np.clip(1.0 - similarities, 0.0, 2.0).mean(axis=1, dtype=np.float32)
    return distances


def _merge_largest(best: np.ndarray, piece: np.ndarray, k: int) -> None:
    """Merge the columns of (rows, n) products into the k largest so far, (k, n), in place."""
    groups = len(piece) // _GROUP
    if groups <= k:
        best[:] = _largest(np.concatenate([best, piece]), k)
        return
    grouped = piece[: groups * _GROUP].reshape(groups, _GROUP, -1)
    maxima = grouped.max(axis=1)  # (groups, n)
    rest = piece[groups * _GROUP :]
    largest = np.maximum(maxima.max(axis=0), rest.max(axis=0, initial=-np.inf))
    columns = np.flatnonzero(largest > best.min(axis=0))
    order = np.argpartition(maxima[:, columns].T, groups - k, axis=1)
    picked = grouped[order[:, -k:], :, columns[:, None]].reshape(len(columns), k * _GROUP).T
    best[:, columns] = _largest(np.concatenate([best[:, columns], picked, rest[:, columns]]), k)


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    return np.partition(values.T, len(values) - k, axis=1)[:, -k:].T
