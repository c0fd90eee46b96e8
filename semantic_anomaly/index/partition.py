"""A coarse partition of the entries: lists around centroids, and bounds of distances from them.

The nearest entry among some entries is never nearer than the nearest of all: a search of some lists
gives upper bounds of distances. The angles between a query, a centroid and the farthest entry of
its list give lower bounds (triangle inequality on the sphere).

An exact search projects onto the directions in which entries vary most. With the projection P and
what it leaves over, R, the inequality of Cauchy and Schwarz gives q.x <= Pq.Px + |Rq||Rx|: one
product of a few dimensions. Only entries whose limit reaches the best one known are compared in
full.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from semantic_anomaly.index.search import nearest_similarities

# Lists of an index: _LISTS_PER_ROOT * sqrt(count), at most _MAX_LISTS. Bounds of 421 and of 1024
# lists of 178 000 entries take the same time; smaller lists give higher lower bounds.
_LISTS_PER_ROOT = 3.0
_MAX_LISTS = 1024
_SAMPLES_PER_LIST = 64
_ITERATIONS = 6
_SEED = 100
_BLOCK = 4096
# Lists of the bounds that precede an exact search.
_TIGHT_LISTS = 8
# Share of the squared norms that the projection keeps, and of the dimensions that it may have.
_PROJECTED_SHARE = 0.97
_MAX_PROJECTED_DIMS = 0.5
_PROJECTION_SAMPLES = 20_000
# Limits are compared by the maxima of so many entries first; divides _BLOCK.
_GROUP = 64
# Queries that are compared at once with the entries of a block.
_EXACT_QUERIES = 128
# A query that more of the entries could be nearest to takes part in one product with all of them.
_MAX_SURVIVORS = 0.05
# More than the rounding errors of float32 products and roots of unit vectors: bounds stay bounds.
_ROUNDING = 2e-6


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


class PartitionedEntries:
    """The entries in the order of their lists, and searches that read some lists.

    Holds a second copy of the embeddings, so that a list is one contiguous factor of a product.

    Args:
        embeddings: (count, dim) float32, unit norm.
        partition: of these entries.
    """

    def __init__(self, embeddings: np.ndarray, partition: Partition) -> None:
        order = np.argsort(partition.lists, kind="stable")
        ordered = embeddings[order]
        lists = len(partition.centroids)
        self._ordered = ordered
        self._entries = torch.from_numpy(ordered)
        self._centroids = torch.from_numpy(np.ascontiguousarray(partition.centroids.T))
        sizes = np.bincount(partition.lists, minlength=lists)
        self._sizes = torch.from_numpy(sizes)
        self._starts = [0, *np.cumsum(sizes).tolist()]
        self._projection = _projection(ordered)
        factors = [
            self._limit_factors(self._entries[start : start + _BLOCK])
            for start in range(0, len(ordered), _BLOCK)
        ]
        # Whole groups: of the last entry there are several, which only the limits know.
        missing = -len(ordered) % _GROUP
        self._projected = torch.cat([*factors, factors[-1][-1:].expand(missing, -1)])
        norms = np.linalg.norm(ordered, axis=1)
        self._largest_norm = float(norms.max()) + _ROUNDING
        cosines = np.empty(len(ordered), np.float32)
        for start in range(0, len(ordered), _BLOCK):
            rows = slice(start, start + _BLOCK)
            own = partition.centroids[partition.lists[order[rows]]]
            cosines[rows] = np.einsum("nd,nd->n", ordered[rows], own) / norms[rows]
        least = np.ones(lists, np.float32)
        np.minimum.at(least, partition.lists[order], cosines)
        # Cosine and sine of the radius of each list, rounded to a larger radius.
        cos_radius = np.clip(least - _ROUNDING, -1.0, 1.0)
        self._cos_radius = torch.from_numpy(cos_radius)
        self._sin_radius = torch.from_numpy(np.sqrt(1.0 - cos_radius**2))

    def similarities(self, queries: np.ndarray, k: int, tight: bool = False) -> np.ndarray:
        """Return (n, k) float32: the largest inner products within the lists nearest to a query.

        They are those of k entries, so none exceeds the true one of its rank. Lists are added
        until they have k entries.

        Args:
            queries: (n, dim) float32, unit norm.
            k: 1 to count.
            tight: search the nearest 8 lists instead of the nearest one.
        """
        vectors = torch.from_numpy(np.require(queries, requirements="W"))
        best = torch.full((len(queries), k), -1.0)
        products = torch.mm(vectors, self._centroids)
        self._search(vectors, *self._nearest_lists(products, k, tight), best)
        return best.numpy()

    def exact_similarities(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Return (n, k) float32: the largest inner products with all entries.

        Args:
            queries: (n, dim) float32, unit norm.
            k: 1 to count.
        """
        best = torch.from_numpy(self.similarities(queries, k, tight=True))
        vectors = torch.from_numpy(np.require(queries, requirements="W"))
        is_wide = torch.zeros(len(queries), dtype=torch.bool)
        for start in range(0, len(queries), _EXACT_QUERIES):
            rows = slice(start, start + _EXACT_QUERIES)
            pairs, is_wide[rows] = self._survivors(vectors[rows], best[rows].amin(dim=1))
            self._compare(vectors[rows], *pairs, best[rows])
        if is_wide.any():
            product = nearest_similarities(queries[is_wide.numpy()], self._ordered, k)
            best[is_wide] = torch.from_numpy(product)
        return best.numpy()

    def similarity_limits(self, queries: np.ndarray) -> np.ndarray:
        """Return (n,) float32: no entry has a larger inner product with the query.

        Args:
            queries: (n, dim) float32, unit norm.
        """
        vectors = torch.from_numpy(np.require(queries, requirements="W"))
        norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        # The limit grows with the cosine: rounded up, it stays a limit.
        cosines = (torch.mm(vectors, self._centroids) / norms + _ROUNDING).clamp_(-1.0, 1.0)
        sines = (1.0 - cosines**2).clamp_(min=0.0).sqrt_()
        # cos(a - r) for the angle a to the centroid and the radius r; 1 inside the radius.
        limits = cosines * self._cos_radius + sines * self._sin_radius
        limits.masked_fill_(cosines >= self._cos_radius, 1.0)
        limits[:, self._sizes == 0] = 0.0
        # Norms are 1 only nearly; below 0 they would lower the limit.
        largest = limits.amax(dim=1).clamp_(min=0.0) * norms[:, 0] * self._largest_norm
        result: np.ndarray = (largest + _ROUNDING).numpy()
        return result

    def _nearest_lists(
        self, products: torch.Tensor, k: int, tight: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return pairs of query and list: the nearest lists, and more until they have k entries.

        Args:
            products: (n, lists), of queries and centroids.
        """
        products = torch.where(self._sizes > 0, products, -2.0)
        count = min(_TIGHT_LISTS if tight else 1, products.shape[1])
        if count == 1:
            lists = products.argmax(dim=1, keepdim=True)
        else:
            lists = products.topk(count, dim=1).indices
        rows = torch.arange(len(products))[:, None].expand(-1, count)
        short = self._sizes[lists].sum(dim=1) < k
        if not short.any():
            return rows.reshape(-1), lists.reshape(-1)
        order = products[short].argsort(dim=1, descending=True, stable=True)
        sizes = self._sizes[order]
        needed = (sizes.cumsum(dim=1) - sizes < k) & (sizes > 0)
        short_rows, ranks = torch.nonzero(needed, as_tuple=True)
        return (
            torch.cat([rows[~short].reshape(-1), torch.nonzero(short)[:, 0][short_rows]]),
            torch.cat([lists[~short].reshape(-1), order[short_rows, ranks]]),
        )

    def _limit_factors(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return (n, dims + 1): projections, and norms of what they leave over, rounded up."""
        projected = torch.mm(vectors, self._projection)
        rest = (vectors**2).sum(dim=1) - (projected**2).sum(dim=1)
        return torch.cat([projected, (rest.clamp(min=0.0) + _ROUNDING).sqrt()[:, None]], dim=1)

    def _survivors(
        self, queries: torch.Tensor, least: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Return pairs of query and entry whose similarity may reach the least that counts.

        Args:
            queries: (n, dim).
            least: (n,), k-th largest similarity known so far.

        Returns:
            (pairs,) rows of queries, (pairs,) rows of entries; and (n,) bool, queries with too many
            of them, which have no pairs.
        """
        factors = self._limit_factors(queries).T.contiguous()
        least = least - _ROUNDING
        counts = torch.zeros(len(queries), dtype=torch.int64)
        most = max(_MAX_SURVIVORS * len(self._entries), 1.0)
        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        for start in range(0, len(self._projected), _BLOCK):
            limits = torch.mm(self._projected[start : start + _BLOCK], factors)
            limits = limits.view(-1, _GROUP, len(queries))  # (groups, entries, n)
            maxima = torch.from_numpy(limits.numpy().max(axis=1))
            groups, rows = torch.nonzero((maxima >= least) & (counts <= most), as_tuple=True)
            reaches = limits[groups, :, rows] >= least[rows, None]
            pairs, entries = torch.nonzero(reaches, as_tuple=True)
            rows = rows[pairs]
            counts += torch.bincount(rows, minlength=len(queries))
            found.append((rows, start + _GROUP * groups[pairs] + entries))
            if (counts > most).all():
                break
        rows, entries = (torch.cat(parts) for parts in zip(*found, strict=True))
        kept = (counts <= most)[rows] & (entries < len(self._entries))
        return (rows[kept], entries[kept]), counts > most

    def _compare(
        self, queries: torch.Tensor, rows: torch.Tensor, entries: torch.Tensor, best: torch.Tensor
    ) -> None:
        """Replace `best` (n, k) by the largest similarities of pairs that have all of them."""
        similarities = torch.empty(len(rows))
        for start in range(0, len(rows), _BLOCK):
            piece = slice(start, start + _BLOCK)
            products = queries[rows[piece]] * self._entries[entries[piece]]
            torch.sum(products, dim=1, out=similarities[piece])
        k = best.shape[1]
        if k == 1:
            best[:, 0].scatter_reduce_(0, rows, similarities, "amax")
            return
        order = torch.argsort(rows, stable=True)
        numbers, counts = torch.unique_consecutive(rows[order], return_counts=True)
        of_rows = similarities[order].split(counts.tolist())
        for number, of_row in zip(numbers.tolist(), of_rows, strict=True):
            best[number] = of_row.topk(k).values

    def _search(
        self, queries: torch.Tensor, rows: torch.Tensor, lists: torch.Tensor, best: torch.Tensor
    ) -> None:
        """Merge the similarities of pairs of query and list into (n, k) `best`, in place."""
        order = torch.argsort(lists, stable=True)
        rows = rows[order]
        numbers, counts = torch.unique_consecutive(lists[order], return_counts=True)
        k = best.shape[1]
        largest = torch.empty(len(rows) if k == 1 else 0)
        end = 0
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            begin, end = end, end + count
            entries = self._entries[self._starts[number] : self._starts[number + 1]]
            products = torch.mm(queries[rows[begin:end]], entries.T)  # (count, size)
            if k == 1:
                torch.amax(products, 1, out=largest[begin:end])
            else:
                own = rows[begin:end]
                best[own] = torch.cat([best[own], products], dim=1).topk(k, dim=1).values
        if k == 1:
            best[:, 0].scatter_reduce_(0, rows, largest, "amax")


def _projection(embeddings: np.ndarray) -> torch.Tensor:
    """Return (dim, dims) float32, orthonormal: directions that keep most of the squared norms."""
    sample = embeddings[:: max(1, len(embeddings) // _PROJECTION_SAMPLES)].astype(np.float64)
    rows = torch.from_numpy(sample)
    energies, directions = torch.linalg.eigh(torch.mm(rows.T, rows))
    kept = energies.flip(0).clamp(min=0.0).cumsum(0) / energies.clamp(min=0.0).sum()
    most = max(1, int(_MAX_PROJECTED_DIMS * len(kept)))
    dims = min(most, 1 + int((kept < _PROJECTED_SHARE).sum()))
    return directions.flip(1)[:, :dims].to(torch.float32).contiguous()


def list_count(count: int) -> int:
    """Return the number of lists that a number of entries, at least 1, is divided into."""
    return min(count, _MAX_LISTS, round(_LISTS_PER_ROOT * count**0.5))


def _nearest_centroids(vectors: np.ndarray, centroids: np.ndarray, dtype: type) -> np.ndarray:
    """Return (n,) int64, the nearest centroid of each vector by products in a precision."""
    factor = torch.from_numpy(centroids.astype(dtype)).T
    nearest = [
        torch.mm(torch.from_numpy(vectors[start : start + _BLOCK].astype(dtype)), factor).argmax(1)
        for start in range(0, len(vectors), _BLOCK)
    ]
    numbers: np.ndarray = torch.cat(nearest).numpy()
    return numbers
