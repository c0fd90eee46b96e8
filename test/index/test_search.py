"""Exact search against the plain product, on both sides of every piece."""

from __future__ import annotations

import numpy as np
import pytest
from worlds.nominal_world import unit

from semantic_anomaly.index import search
from semantic_anomaly.index.search import nearest_rows, nearest_similarities, to_distances


@pytest.mark.parametrize(
    ("entries", "k"),
    [(1, 1), (3, 2), (63, 5), (64, 1), (256, 2), (257, 1), (1000, 1), (1000, 2), (1000, 70)],
)
@pytest.mark.parametrize("queries", [0, 33])
def test_is_the_sorted_product(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, entries: int, k: int, queries: int
) -> None:
    monkeypatch.setattr(search, "_ENTRY_ROWS", 256)
    monkeypatch.setattr(search, "_QUERY_ROWS", 32)
    stored, asked = (unit(rng.standard_normal((n, 8))) for n in (entries, queries))
    products = asked @ stored.T
    expected = np.sort(products, axis=1)[:, -k:]
    largest = nearest_similarities(asked, stored, k)
    np.testing.assert_allclose(np.sort(largest), expected, atol=1e-6)
    np.testing.assert_allclose(to_distances(largest), (1 - expected).mean(axis=1), atol=1e-6)
    rows, similarities = nearest_rows(asked, stored, k)
    np.testing.assert_allclose(similarities, expected[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(products, rows, 1), similarities, atol=1e-6)


def test_equal_entries_count_as_often_as_they_are_there(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = unit(rng.standard_normal((301, 8)))
    stored = np.concatenate([points, points[-1:], points[-1:]])
    np.testing.assert_allclose(nearest_similarities(points[-1:], stored, 3), 1.0, atol=1e-6)
    monkeypatch.setattr(search, "_ENTRY_ROWS", 302)
    assert nearest_rows(points[-1:], stored, 3)[0].tolist() == [[300, 301, 302]]


def test_distances_stay_in_their_range() -> None:
    products = np.array([[1.0000001, 1.0], [-1.0000001, -1.0]], np.float32)
    np.testing.assert_array_equal(to_distances(products), np.array([0.0, 2.0], np.float32))
