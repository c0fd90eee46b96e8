"""Upper limits of inner products, from projections of the entries.

With the projection P onto the directions in which entries vary most, and what it leaves over, R,
the inequality of Cauchy and Schwarz gives

    q.x <= Pq.Px + |Rq||Rx|,

one product of a few dimensions. On processors with products of 8-bit integers (VNNI), a looser
limit comes first. There y is Px less the mean m of the entries, and p is Pq, both rounded to steps.
The same inequality limits what rounding leaves over:

    Pq.Px <= Pq.m + p.y + |Pq - p||y| + |Pq||Px - m - y|.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

# Share of the squared norms that the projection keeps, and of the dimensions that it may have.
_PROJECTED_SHARE = 0.97
_MAX_PROJECTED_DIMS = 0.5
_PROJECTION_SAMPLES = 20_000
# Limits are compared by the maxima of so many entries first; divides _BLOCK.
_GROUP = 64
_BLOCK = 8192
# Values of pairs that are compared at once: they stay in the cache.
_PAIR_VALUES = 262_144
_LARGEST = 127
# With fewer entries, limits in float32 take less time than those by integers.
_LEAST_INTEGERS = 32_768
_SEED = 100
# More than the rounding errors of float32 products and roots of unit vectors: limits stay limits.
ROUNDING = 2e-6

# (pairs,) rows of queries, and (pairs,) positions of entries.
Pairs = tuple[torch.Tensor, torch.Tensor]
# (m,) groups, (m,) rows of queries, and (m, entries of a group) bool: whose limits reach.
Reaching = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# First entry of a block, and (n,) bool of the queries that take part -> of that block.
Compare = Callable[[int, torch.Tensor], Reaching]


class EntryLimits:
    """Limits of the inner products with entries.

    Holds projections of the entries, 14 to 50 % of the size of the embeddings, and a quarter more
    if there are many entries and the processor multiplies integers.

    Args:
        entries: (count, dim) float32, unit norm.
        lists: (count,) int, of the entries.

    Attributes:
        order: (count,) int64, rows of the entries list by list. Positions in the methods are
            positions in this order.
    """

    def __init__(self, entries: torch.Tensor, lists: np.ndarray) -> None:
        self._projection = _projection(entries.numpy())
        self._count, dims = len(entries), self._projection.shape[1]
        pieces = torch.arange(self._count).split(_BLOCK)
        rest = torch.cat([self.factors(entries[rows])[:, -1] for rows in pieces])
        # Entries of a group then have similar limits.
        self.order = torch.from_numpy(np.lexsort((rest.numpy(), lists)))
        # Whole groups: of the last entry there are several, which only the limits know.
        self._factors = torch.empty(self._count + -self._count % _GROUP, dims + 1)
        for rows in pieces:
            self._factors[rows] = self.factors(entries[self.order[rows]])
        self._factors[self._count :] = self._factors[self._count - 1]
        integers = self._count >= _LEAST_INTEGERS and has_integer_products()
        self._coarse: _Integers | _Floats = (
            _Integers.of(self._factors) if integers else _Floats(self._factors)
        )

    def factors(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return (n, dims + 1): projections, and norms of what they leave over, rounded up."""
        projected = torch.mm(vectors, self._projection)
        rest = (vectors**2).sum(dim=1) - (projected**2).sum(dim=1)
        return torch.cat([projected, (rest.clamp(min=0.0) + ROUNDING).sqrt()[:, None]], dim=1)

    def of_range(self, factors: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Return (n, last - first) limits of queries with a range of positions."""
        return torch.mm(factors, self._factors[first:last].T)

    def of_pairs(self, factors: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """Return (pairs,) limits of pairs of query and position."""
        return pair_products(factors, self._factors, *pairs)

    def reaching(
        self, factors: torch.Tensor, least: torch.Tensor, most: int
    ) -> tuple[Pairs, torch.Tensor]:
        """Return the pairs whose limit may reach the least similarity that counts.

        Args:
            factors: (n, dims + 1), of the queries.
            least: (n,), of each query.
            most: pairs; with more of them, the queries with the most have none, or all queries if
                that is true for more than half of them.

        Returns:
            (pairs,) queries and (pairs,) positions; and (n,) bool, queries that have none because
            they had too many.
        """
        reaching = self._coarse.compared(factors, least)
        counts = torch.zeros(len(factors), dtype=torch.int64)
        is_open = torch.ones(len(factors), dtype=torch.bool)
        reached: list[Pairs] = []
        for start in range(0, len(self._factors), _BLOCK):
            groups, rows, reaches = reaching(start, is_open)
            pairs, members = torch.nonzero(reaches, as_tuple=True)
            rows = rows[pairs]
            counts += torch.bincount(rows, minlength=len(factors))
            reached.append((rows, start + _GROUP * groups[pairs] + members))
            if counts[is_open].sum() > most:
                order = torch.where(is_open, counts, most + 1).argsort(stable=True)
                is_open[order] &= counts[order].cumsum(0) <= most
                # One product with all entries costs less than to tell so many apart.
                if 2 * is_open.sum() < len(is_open):
                    is_open[:] = False
                    break
        rows, positions = (torch.cat(parts) for parts in zip(*reached, strict=True))
        kept = is_open[rows] & (positions < self._count)
        return (rows[kept], positions[kept]), ~is_open


@dataclass(frozen=True, eq=False)
class _Floats:
    """Limits in float32.

    Attributes:
        factors: (entries, dims + 1) float32, whole groups.
    """

    factors: torch.Tensor

    def compared(self, queries: torch.Tensor, least: torch.Tensor) -> Compare:
        """Return what compares the limits of (n, dims + 1) queries with the least that counts."""
        columns = queries.T.contiguous()

        def reaching(start: int, is_open: torch.Tensor) -> Reaching:
            limits = torch.mm(self.factors[start : start + _BLOCK], columns)
            limits = limits.view(-1, _GROUP, len(least))
            is_reaching = (limits.amax(dim=1) >= least) & is_open
            groups, rows = torch.nonzero(is_reaching, as_tuple=True)
            return groups, rows, limits[groups, :, rows] >= least[rows, None]

        return reaching


@dataclass(frozen=True, eq=False)
class _IntegerQueries:
    """Projections of queries in steps.

    Attributes:
        values: (dims, n) int8.
        steps: (n,).
        slack: (3, n), what the slack of an entry is multiplied by.
        base: (n,), products with the mean of the entries.
    """

    values: torch.Tensor
    steps: torch.Tensor
    slack: torch.Tensor
    base: torch.Tensor

    @classmethod
    def of(cls, factors: torch.Tensor, mean: torch.Tensor) -> _IntegerQueries:
        projected = factors[:, :-1]
        steps = _steps(projected)
        values = (projected / steps[:, None]).round()
        left_over = (projected - steps[:, None] * values).norm(dim=1) + ROUNDING
        norms = projected.norm(dim=1) + ROUNDING
        slack = torch.stack([left_over, norms, factors[:, -1]])
        return cls(values.to(torch.int8).T, steps, slack, projected @ mean)


@dataclass(frozen=True, eq=False)
class _Integers:
    """Projections of the entries less their mean, in steps of each group.

    Attributes:
        values: (entries, dims) int8.
        mean: (dims,) float32.
        steps: (groups,) float32.
        slack: (groups, 3) float32: largest norms of the projection in steps, of what the steps
            leave over, and of what the projection leaves over.
    """

    values: torch.Tensor
    mean: torch.Tensor
    steps: torch.Tensor
    slack: torch.Tensor

    @classmethod
    def of(cls, factors: torch.Tensor) -> _Integers:
        count, dims = len(factors), factors.shape[1] - 1
        mean = factors[:, :-1].mean(dim=0)
        values = torch.empty((count, dims), dtype=torch.int8)
        steps = torch.empty(count // _GROUP)
        slack = torch.empty(count // _GROUP, 3)
        for start in range(0, count, _BLOCK):
            some = factors[start : start + _BLOCK]
            groups = slice(start // _GROUP, (start + len(some)) // _GROUP)
            shifted = (some[:, :-1] - mean).view(-1, _GROUP, dims)
            steps[groups] = _steps(shifted.flatten(1))
            step = steps[groups, None, None]
            stepped = (shifted / step).round()
            values[start : start + _BLOCK] = stepped.view(-1, dims).to(torch.int8)
            norms = [(step * stepped).norm(dim=2), (shifted - step * stepped).norm(dim=2)]
            norms.append(some[:, -1].view(-1, _GROUP))
            slack[groups] = torch.stack(norms, dim=2).amax(dim=1) + ROUNDING
        return cls(values, mean, steps, slack)

    def compared(self, queries: torch.Tensor, least: torch.Tensor) -> Compare:
        """Return what compares the limits of (n, dims + 1) queries with the least that counts."""
        own = _IntegerQueries.of(queries, self.mean)

        def reaching(start: int, is_open: torch.Tensor) -> Reaching:
            products = torch._int_mm(self.values[start : start + _BLOCK], own.values)
            products = products.view(-1, _GROUP, len(least))
            of_block = slice(start // _GROUP, start // _GROUP + len(products))
            needed = (least - own.base - self.slack[of_block] @ own.slack) / (
                self.steps[of_block, None] * own.steps
            )
            is_reaching = (products.amax(dim=1) >= needed) & is_open
            groups, rows = torch.nonzero(is_reaching, as_tuple=True)
            return groups, rows, products[groups, :, rows] >= needed[groups, rows, None]

        return reaching


def pair_products(
    queries: torch.Tensor, entries: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Return (pairs,) inner products of rows of (n, dim) queries and (count, dim) entries."""
    products = torch.empty(len(rows))
    pairs = max(1, _PAIR_VALUES // queries.shape[1])
    for start in range(0, len(rows), pairs):
        piece = slice(start, start + pairs)
        factors = queries[rows[piece]] * entries[positions[piece]]
        torch.sum(factors, dim=1, out=products[piece])
    return products


@lru_cache
def has_integer_products() -> bool:
    """Return whether this processor multiplies matrices of 8-bit integers quickly and exactly."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    if not (capabilities.get("avx512_vnni") and hasattr(torch, "_int_mm")):
        return False
    # Without such instructions, sums of two products may be cut off at 16 bits.
    largest = torch.full((_GROUP, _GROUP), _LARGEST, dtype=torch.int8)
    products = torch._int_mm(largest, torch.cat([largest, -largest], dim=1))
    expected = _GROUP * _LARGEST**2
    return bool(
        (products[:, :_GROUP] == expected).all() and (products[:, _GROUP:] == -expected).all()
    )


def _steps(values: torch.Tensor) -> torch.Tensor:
    """Return (n,) steps in which (n, m) values are integers of 8 bits."""
    return values.abs().amax(dim=1).clamp(min=ROUNDING) / _LARGEST


def _projection(embeddings: np.ndarray) -> torch.Tensor:
    """Return (dim, dims) float32, orthonormal: directions that keep most of the squared norms."""
    sample = embeddings[:: max(1, len(embeddings) // _PROJECTION_SAMPLES)].astype(np.float64)
    rows = torch.from_numpy(sample)
    energies, directions = torch.linalg.eigh(torch.mm(rows.T, rows))
    kept = energies.flip(0).clamp(min=0.0).cumsum(0) / energies.clamp(min=0.0).sum()
    most = max(1, int(_MAX_PROJECTED_DIMS * len(kept)))
    dims = min(most, 1 + int((kept < _PROJECTED_SHARE).sum()))
    # Turned, so that no dimension is much larger than the others: steps are then small.
    generator = torch.Generator().manual_seed(_SEED)
    turned = torch.randn((dims, dims), generator=generator, dtype=torch.float64)
    turned = torch.linalg.qr(turned).Q
    return torch.mm(directions.flip(1)[:, :dims], turned).to(torch.float32).contiguous()
