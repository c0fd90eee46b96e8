"""Exact nearest neighbours of unit vectors: matrix products in pieces that stay in the cache."""

from __future__ import annotations

import numpy as np
import torch

# Pieces of 4096 x 512 products are 8 MB: the fastest of those tried on two cores.
_ENTRY_ROWS = 4096
_QUERY_ROWS = 512
# The k largest of many lie in the k groups with the largest maxima, and maxima are cheap.
_GROUP = 64


def inner_products(
    left: np.ndarray, right: np.ndarray, out: np.ndarray | None = None
) -> np.ndarray:
    """Return (n, m) float32, the matrix product of (n, dim) and (dim, m) float32.

    Threads of numpy's own library keep the cores busy for a tenth of a second after every product,
    and the backbone's next image waits for them; torch computes both with the same threads.

    Args:
        left, right: the factors.
        out: (n, m) float32, C order, to write to; None: a new array.

    Raises:
        RuntimeError: shapes or dtypes that do not fit each other; torch's message names both.
    """
    # Torch warns of arrays that it could write to but may not.
    factors = [torch.from_numpy(np.require(each, requirements="W")) for each in (left, right)]
    into = None if out is None else torch.from_numpy(out)
    product: np.ndarray = torch.mm(*factors, out=into).numpy()
    return product


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
