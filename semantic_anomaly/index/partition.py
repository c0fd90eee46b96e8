"""A coarse partition of the entries into lists, and what a search reads of them.

The nearest entry among some entries is never nearer than the nearest of all: a search of some lists
gives upper bounds of distances.

Both that search and the exact one compare limits (`limits.py`) first. Only entries whose limit
reaches the best similarity known are compared in full.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch

from semantic_anomaly.index.limits import ROUNDING, EntryLimits, Pairs, pair_products
from semantic_anomaly.index.search import largest_of_pairs, nearest_similarities
from semantic_anomaly.linalg import inner_products

# Lists of an index: one for so many entries, at most _MAX_LISTS. Each list is one step of a loop:
# many short lists take longer than few long ones.
_ENTRIES_PER_LIST, _MAX_LISTS = 300, 256
_SAMPLES_PER_LIST = 64
_ITERATIONS = 6
_SEED = 100
_BLOCK = 2048
# Lists that bounds come from.
_NEAREST_LISTS = 4
# Queries that are compared at once with the entries of a block.
_EXACT_QUERIES = 256
# Queries that many entries could be nearest to take part in one product with all of them, so that
# the others have at most so many pairs with entries as there are entries, times this.
_MAX_PAIRS_PER_ENTRY = 1.0


@dataclass(frozen=True, eq=False)
class Partition:
    """Which list each entry is in: that of the nearest centroid.

    Attributes:
        centroids: (lists, dim) float32, unit norm.
        lists: (count,) int32, the list of each entry; lists may be empty.
    """

    centroids: np.ndarray
    lists: np.ndarray

    @classmethod
    def of(cls, embeddings: np.ndarray) -> Partition:
        """Make a partition by spherical k-means on a sample; equal embeddings give equal ones.

        Args:
            embeddings: (count, dim) float32, unit norm, count >= 1.
        """
        generator = np.random.default_rng(_SEED)
        count = len(embeddings)
        lists = list_count(count)
        size = min(count, _SAMPLES_PER_LIST * lists)
        sample = embeddings[np.sort(generator.choice(count, size, replace=False))]
        centroids = sample[generator.choice(size, lists, replace=False)]
        for _ in range(_ITERATIONS):
            nearest = _nearest_centroids(sample, centroids, np.float32)
            order = np.argsort(nearest, kind="stable")
            used, first = np.unique(nearest[order], return_index=True)
            sums = np.add.reduceat(sample[order], first, axis=0)
            norms = np.linalg.norm(sums, axis=1, keepdims=True)
            # Opposite vectors may add up to nothing: such a centroid stays where it is.
            moved = norms[:, 0] > 1e-3
            centroids[used[moved]] = sums[moved] / norms[moved]
        return cls(np.unique(centroids, axis=0), np.empty(0, np.int32)).with_entries(embeddings)

    def with_entries(self, embeddings: np.ndarray) -> Partition:
        """Return the partition of other entries around the same centroids.

        Args:
            embeddings: (count, dim) float32, unit norm.
        """
        # In float64, so that the list of an entry depends neither on the machine nor on the others.
        lists = _nearest_centroids(embeddings, self.centroids, np.float64)
        return Partition(self.centroids, lists.astype(np.int32))


def nearest_in_lists(
    queries: np.ndarray, entries: np.ndarray, partition: Partition
) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest of the entries in the lists nearest to each query, for many queries.

    Args:
        queries: (n, dim) float32, unit norm.
        entries: (count, dim) float32, unit norm.
        partition: of the entries.

    Returns:
        (n,) int64 rows and (n,) float32 inner products, which may be smaller than the largest.
    """
    order = np.argsort(partition.lists, kind="stable")
    ends = np.cumsum(np.bincount(partition.lists, minlength=len(partition.centroids)))
    rows = np.zeros(len(queries), np.int64)
    best = np.full(len(queries), -1.0, np.float32)
    count = min(_NEAREST_LISTS, len(partition.centroids))
    nearest = np.empty((len(queries), count), np.int32)
    for start in range(0, len(queries), _BLOCK):
        products = inner_products(queries[start : start + _BLOCK], partition.centroids.T)
        nearest[start : start + _BLOCK] = np.argpartition(-products, count - 1, axis=1)[:, :count]
    for number, end in enumerate(ends.tolist()):
        of_list = order[ends[number - 1] if number else 0 : end]
        asked = np.flatnonzero((nearest == number).any(axis=1))
        if not (len(of_list) and len(asked)):
            continue
        members = entries[of_list]
        for start in range(0, len(asked), _BLOCK):
            some = asked[start : start + _BLOCK]
            products = inner_products(queries[some], members.T)
            column, largest = products.argmax(axis=1), products.max(axis=1)
            is_nearer = largest > best[some]
            best[some[is_nearer]] = largest[is_nearer]
            rows[some[is_nearer]] = of_list[column[is_nearer]]
    return rows, best


class PartitionedEntries:
    """The entries in the order of their lists, and searches that read some of them.

    Args:
        embeddings: (count, dim) float32, unit norm; not copied.
        partition: of these entries.
    """

    def __init__(self, embeddings: np.ndarray, partition: Partition) -> None:
        self._embeddings = embeddings
        with warnings.catch_warnings():
            # Nothing here writes into it.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self._entries = torch.from_numpy(embeddings)
        lists = len(partition.centroids)
        sizes = np.bincount(partition.lists, minlength=lists)
        self._starts = [0, *np.cumsum(sizes).tolist()]
        self._is_empty = torch.from_numpy(sizes == 0)
        self._limits = EntryLimits(self._entries, partition.lists)
        self._order = self._limits.order
        centroids = torch.from_numpy(np.require(partition.centroids, requirements="W"))
        self._centroids = self._limits.factors(centroids).T.contiguous()

    def similarities(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Return (n, k) float32: large inner products within the lists nearest to a query.

        They are those of k entries, so none exceeds the true one of its rank.

        Args:
            queries: (n, dim) float32, unit norm.
            k: 1 to count.
        """
        vectors = torch.from_numpy(np.require(queries, requirements="W"))
        entries, is_found = self._likely(self._limits.factors(vectors), k)
        similarities = torch.empty(len(vectors), k)
        for start in range(0, len(vectors), _BLOCK):
            piece = slice(start, start + _BLOCK)
            candidates = self._entries[self._order[entries[piece]]]  # (n, k, dim)
            torch.sum(candidates * vectors[piece, None], dim=2, out=similarities[piece])
        if not is_found.all():
            product = nearest_similarities(queries[~is_found.numpy()], self._embeddings, k)
            similarities[~is_found] = torch.from_numpy(product)
        return similarities.numpy()

    def exact_similarities(
        self, queries: np.ndarray, k: int, known: np.ndarray | None = None
    ) -> np.ndarray:
        """Return (n, k) float32: the largest inner products with all entries.

        Args:
            queries: (n, dim) float32, unit norm.
            k: 1 to count.
            known: (n, k) float32, what `similarities` returned; None: not computed yet.
        """
        best = torch.from_numpy(self.similarities(queries, k) if known is None else known.copy())
        vectors = torch.from_numpy(np.require(queries, requirements="W"))
        is_wide = torch.zeros(len(queries), dtype=torch.bool)
        most = max(int(_MAX_PAIRS_PER_ENTRY * len(self._entries)), len(queries))
        # Pieces of equal size: each reads the projections of all entries.
        pieces = max(1, -(-len(queries) // _EXACT_QUERIES))
        for rows in torch.arange(len(queries)).tensor_split(pieces):
            factors = self._limits.factors(vectors[rows])
            least = best[rows].amin(dim=1) - ROUNDING
            pairs, is_wide[rows] = self._limits.reaching(factors, least, most)
            best[rows] = self._compared(vectors[rows], factors, pairs, best[rows])
        if is_wide.any():
            product = nearest_similarities(queries[is_wide.numpy()], self._embeddings, k)
            best[is_wide] = torch.from_numpy(product)
        return best.numpy()

    def _likely(self, factors: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the entries with the largest limits within the lists nearest to queries.

        Args:
            factors: (n, dims + 1), limit factors of the queries.
            k: entries of each.

        Returns:
            (n, k) positions in the order of the lists; and (n,) bool, queries whose lists have k
            entries, the positions of others mean nothing.
        """
        products = torch.mm(factors, self._centroids)
        products[:, self._is_empty] = -torch.inf
        count = min(_NEAREST_LISTS, products.shape[1])
        nearest = products.topk(count, dim=1).indices.reshape(-1)
        order = torch.argsort(nearest, stable=True)
        numbers, counts = torch.unique_consecutive(nearest[order], return_counts=True)
        rows = order // count
        values = torch.full((len(nearest), k), -torch.inf)
        positions = torch.zeros((len(nearest), k), dtype=torch.int64)
        end = 0
        for number, of_list in zip(numbers.tolist(), counts.tolist(), strict=True):
            begin, end = end, end + of_list
            first, last = self._starts[number : number + 2]
            if first == last:
                continue
            # Near entries have similar remainders too: limits come near to their similarities.
            limits = self._limits.of_range(factors[rows[begin:end]], first, last)
            own, size = order[begin:end], min(k, last - first)
            if k == 1:
                largest, columns = limits.max(dim=1, keepdim=True)
            else:
                largest, columns = limits.topk(size, dim=1)
            values[own, :size] = largest
            positions[own, :size] = columns + first
        values, columns = values.view(len(factors), -1).topk(k, dim=1)
        entries = positions.view(len(factors), -1).gather(1, columns)
        return entries, values.isfinite().all(dim=1)

    def _compared(
        self, queries: torch.Tensor, factors: torch.Tensor, pairs: Pairs, best: torch.Tensor
    ) -> torch.Tensor:
        """Return (n, k): largest similarities of pairs; `best` where a query has fewer than k.

        Args:
            queries, factors: (n, dim) and (n, dims + 1).
            pairs: of query and position.
            best: (n, k), known so far.
        """
        rows, limits = pairs[0], self._limits.of_pairs(factors, pairs)
        # The k likeliest entries of each query first: few others then remain.
        likeliest = largest_of_pairs(rows, limits, *best.shape)[:, -1]
        first = self._largest(queries, pairs, limits >= likeliest[rows], best.shape[1])
        least = torch.maximum(best.amin(dim=1), first[:, -1]) - ROUNDING
        largest = self._largest(queries, pairs, limits >= least[rows], best.shape[1])
        return torch.where(largest[:, -1:] > -torch.inf, largest, best)

    def _largest(
        self, queries: torch.Tensor, pairs: Pairs, kept: torch.Tensor, k: int
    ) -> torch.Tensor:
        """Return (n, k): largest similarities of the kept pairs, -inf where there are fewer."""
        rows, positions = pairs[0][kept], pairs[1][kept]
        similarities = pair_products(queries, self._entries, rows, self._order[positions])
        return largest_of_pairs(rows, similarities, len(queries), k)


def list_count(count: int) -> int:
    """Return the number of lists that a number of entries, at least 1, is divided into."""
    return min(_MAX_LISTS, -(-count // _ENTRIES_PER_LIST))


def _nearest_centroids(vectors: np.ndarray, centroids: np.ndarray, dtype: type) -> np.ndarray:
    """Return (n,) int64, the nearest centroid of each vector by products in a precision."""
    factor = torch.from_numpy(centroids.astype(dtype)).T
    nearest = [
        torch.mm(torch.from_numpy(vectors[start : start + _BLOCK].astype(dtype)), factor).argmax(1)
        for start in range(0, len(vectors), _BLOCK)
    ]
    numbers: np.ndarray = torch.cat(nearest).numpy()
    return numbers
