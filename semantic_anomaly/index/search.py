"""Exact nearest neighbours of unit vectors: matrix products in pieces that stay in the cache."""

from __future__ import annotations

import numpy as np
import torch

from semantic_anomaly.linalg import inner_products
from semantic_anomaly.structures import UNIT_NORM_TOLERANCE

# Pieces of 4096 x 512 products are 8 MB: the fastest of those tried on two cores.
_ENTRY_ROWS = 4096
_QUERY_ROWS = 512
# The k largest of many lie in the k groups with the largest maxima, and maxima are cheap.
_GROUP = 64


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


def nearest_entries(queries: np.ndarray, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the row of the nearest entry of each query, and the inner product with it.

    Args:
        queries: (n, dim) float32.
        entries: (count, dim) float32, C order, count >= 1.

    Returns:
        (n,) int64, of equally near entries the first, and (n,) float32.
    """
    best = torch.full((len(queries),), -torch.inf)
    rows = torch.zeros(len(queries), dtype=torch.int64)
    for left in range(0, len(queries), _QUERY_ROWS):
        columns = queries[left : left + _QUERY_ROWS].T
        piece = slice(left, left + _QUERY_ROWS)
        for top in range(0, len(entries), _ENTRY_ROWS):
            products = torch.from_numpy(inner_products(entries[top : top + _ENTRY_ROWS], columns))
            largest, row = products.max(dim=0)
            is_nearer = largest > best[piece]
            best[piece][is_nearer] = largest[is_nearer]
            rows[piece][is_nearer] = row[is_nearer] + top
    return rows.numpy(), best.numpy()


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


def largest_of_pairs(
    rows: torch.Tensor, similarities: torch.Tensor, count: int, k: int
) -> torch.Tensor:
    """Return (count, k) float32: the largest similarities of each row, -inf where it has fewer.

    Args:
        rows: (pairs,) int64, 0 to count - 1, in any order.
        similarities: (pairs,) float32.
        count: number of rows.
        k: >= 1.
    """
    if k == 1:
        best = torch.full((count,), -torch.inf, device=rows.device)
        return best.scatter_reduce_(0, rows, similarities, "amax")[:, None]
    order = torch.argsort(rows, stable=True)
    rows, similarities = rows[order], similarities[order]
    counts = torch.bincount(rows, minlength=count)
    first = counts.cumsum(0) - counts
    columns = torch.arange(len(rows), device=rows.device) - first[rows]
    width = max(k, int(counts.max()) if len(rows) else 0)
    padded = torch.full((count, width), -torch.inf, device=rows.device)
    padded[rows, columns] = similarities
    return padded.topk(k, dim=1).values


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
