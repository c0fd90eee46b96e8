"""A graph of hnswlib that grows while an index is built."""

from __future__ import annotations

import hnswlib
import numpy as np

from semantic_anomaly.index_build import GRAPH_SEED

_BUILD_EF = 64


class GrowingGraph:
    """A graph in space 'ip' that takes unit vectors in order; one thread, so always the same.

    Args:
        dim: length of a vector.
        m, ef_construction: links an entry, and breadth of the search while it grows.
    """

    def __init__(self, dim: int, m: int, ef_construction: int) -> None:
        self.index = hnswlib.Index("ip", dim)
        self.index.init_index(0, M=m, ef_construction=ef_construction, random_seed=GRAPH_SEED)
        self.index.set_ef(_BUILD_EF)

    def add(self, embeddings: np.ndarray) -> None:
        """Add (n, dim) float32 under the next labels."""
        count = self.index.get_current_count()
        labels = np.arange(count, count + len(embeddings))
        if count + len(embeddings) > self.index.get_max_elements():
            self.index.resize_index(max(count + len(embeddings), 2 * count))
        self.index.add_items(embeddings, labels, num_threads=1)

    def similarities(self, embeddings: np.ndarray) -> np.ndarray:
        """Return (n,) float32: inner product with the nearest that the graph finds."""
        _, distances = self.index.knn_query(embeddings, 1)
        return np.asarray(1.0 - distances[:, 0])

    def finished(self) -> hnswlib.Index:
        """Return the graph without room for more."""
        # A saved file says how many entries there is room for, and readers insist on none more.
        self.index.resize_index(self.index.get_current_count())
        return self.index
