"""Exact search against the plain product, on both sides of every piece."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from semantic_anomaly.index import search as exact_search
from semantic_anomaly.index.search import mean_distances, nearest_similarities, to_distances
from semantic_anomaly.linalg import inner_products


def unit(rng: np.random.Generator, count: int, dim: int = 8) -> np.ndarray:
    points = rng.standard_normal((count, dim)).astype(np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("entries", "k"),
    [
        (entries, k)
        for entries in (1, 3, 63, 64, 65, 200, 256, 257, 1000)
        for k in (1, 2, 5, 70)
        if k <= entries
    ],
)
@pytest.mark.parametrize("queries", [0, 1, 32, 33])
def test_is_the_sorted_product(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, entries: int, k: int, queries: int
) -> None:
    monkeypatch.setattr(exact_search, "_ENTRY_ROWS", 256)
    monkeypatch.setattr(exact_search, "_QUERY_ROWS", 32)
    stored, asked = unit(rng, entries), unit(rng, queries)
    expected = np.sort(asked @ stored.T, axis=1)[:, -k:]
    found = nearest_similarities(asked, stored, k)
    np.testing.assert_allclose(np.sort(found, axis=1), expected, atol=1e-6)
    np.testing.assert_allclose(
        mean_distances(asked, stored, k), (1 - expected).mean(axis=1), atol=1e-6
    )


def test_equal_entries_count_as_often_as_they_are_there(rng: np.random.Generator) -> None:
    one = unit(rng, 1)
    stored = np.concatenate([np.repeat(one, 3, axis=0), unit(rng, 300)])
    np.testing.assert_allclose(nearest_similarities(one, stored, 3), 1.0, atol=1e-6)


def test_distances_stay_in_their_range() -> None:
    products = np.array([[1.0000001, 1.0], [-1.0000001, -1.0]], np.float32)
    np.testing.assert_array_equal(to_distances(products), np.array([0.0, 2.0], np.float32))


@pytest.mark.parametrize("writeable", [True, False])
def test_inner_products_are_those_of_numpy(writeable: bool) -> None:
    rng = np.random.default_rng(4)
    left = rng.standard_normal((7, 12)).astype(np.float32)
    right = rng.standard_normal((5, 12)).astype(np.float32).T
    left.flags.writeable = right.flags.writeable = writeable
    expected = left.astype(np.float64) @ right.astype(np.float64)
    out = np.empty((7, 5), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(inner_products(left, right), expected, rtol=0, atol=1e-5)
        inner_products(left, right, out)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
