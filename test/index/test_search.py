"""Exact search against the plain product, on both sides of every piece; graph search against it."""

from __future__ import annotations

import numpy as np
import pytest
from worlds.nominal_world import DIM, build, patches

from semantic_anomaly.errors import IndexMismatchError, ModelOutputError
from semantic_anomaly.index import hnsw, search
from semantic_anomaly.index.hnsw import HnswGraph
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.index.search import (
    NeighbourSearch,
    mean_distances,
    nearest_rows,
    nearest_similarities,
    to_distances,
)


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
    monkeypatch.setattr(search, "_ENTRY_ROWS", 256)
    monkeypatch.setattr(search, "_QUERY_ROWS", 32)
    stored, asked = unit(rng, entries), unit(rng, queries)
    products = asked @ stored.T
    expected = np.sort(products, axis=1)[:, -k:]
    np.testing.assert_allclose(np.sort(nearest_similarities(asked, stored, k)), expected, atol=1e-6)
    np.testing.assert_allclose(
        mean_distances(asked, stored, k), (1 - expected).mean(axis=1), atol=1e-6
    )
    rows, similarities = nearest_rows(asked, stored, k)
    np.testing.assert_allclose(similarities, expected[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(products, rows, 1), similarities, atol=1e-6)


def test_equal_entries_count_as_often_as_they_are_there(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = unit(rng, 1)
    stored = np.concatenate([unit(rng, 300), np.repeat(query, 3, axis=0)])
    np.testing.assert_allclose(nearest_similarities(query, stored, 3), 1.0, atol=1e-6)
    monkeypatch.setattr(search, "_ENTRY_ROWS", 302)
    assert nearest_rows(query, stored, 3)[0].tolist() == [[300, 301, 302]]


def test_distances_stay_in_their_range() -> None:
    products = np.array([[1.0000001, 1.0], [-1.0000001, -1.0]], np.float32)
    np.testing.assert_array_equal(to_distances(products), np.array([0.0, 2.0], np.float32))


@pytest.fixture(scope="module")
def index() -> NominalIndex:
    return build()


@pytest.mark.parametrize("mode", ["auto", "exact", "graph"])
@pytest.mark.parametrize("k", [1, 4])
def test_distances_are_those_of_the_plain_product(index: NominalIndex, mode: str, k: int) -> None:
    index.configure_search(mode, 200)
    assert index.search_is_exact == (mode != "graph")
    queries = patches(2, seed=5)
    products = np.sort(queries @ index.content.embeddings.T, axis=1)[:, -k:]
    distances = index.distances(queries, k)
    assert distances.dtype == np.float32 and distances.shape == (len(queries),)
    np.testing.assert_allclose(distances, 1 - products.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(index.exact_distances(queries, k), distances, atol=1e-5)


@pytest.fixture
def thin_graph(monkeypatch: pytest.MonkeyPatch) -> NominalIndex:
    """An index whose graph is so thin that its search misses much."""
    monkeypatch.setattr(hnsw, "M", 2)
    monkeypatch.setattr(hnsw, "EF_CONSTRUCTION", 8)
    index = build(dedup_distance=0.0)
    index.configure_search("graph", 1)
    return index


def test_a_graph_search_gives_upper_bounds(thin_graph: NominalIndex) -> None:
    queries = patches(4, seed=5)
    exact, bounds = thin_graph.exact_distances(queries, 1), thin_graph.distances(queries, 1)
    assert (bounds >= exact - 1e-5).all()
    assert (bounds > exact + 0.01).sum() > 50, "the graph must be thin for this to show anything"


def test_recall_tells_a_thin_graph_from_a_good_one(
    thin_graph: NominalIndex, index: NominalIndex
) -> None:
    queries = patches(2, seed=5)
    index.configure_search("auto", 200)
    good, thin = index.recall(queries, 3), thin_graph.recall(queries, 3)
    assert good["recall"] > 0.99 and abs(good["mean_error"]) < 1e-4
    assert thin["recall"] < 0.9 and thin["max_error"] > 0.1
    assert (good["queries"], good["k"], good["ef"]) == (len(queries), 3, 200)
    assert index.recall(50, 1)["queries"] == 50


def test_large_indexes_use_the_graph_by_themselves(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries, read = unit(rng, 40), []

    def graph() -> HnswGraph:
        read.append(True)
        return HnswGraph.build(entries)

    neighbours = NeighbourSearch(entries, graph, "index", 10)
    neighbours.configure("auto", 10)
    assert neighbours.is_exact and not read, "the graph of a small index need not be read"
    monkeypatch.setattr(search, "AUTO_EXACT_UP_TO", entries.size - 1)
    assert not NeighbourSearch(entries, graph, "index", 10).is_exact
    neighbours.configure("auto", 10)
    assert not neighbours.is_exact and read


def test_a_graph_in_pieces_is_replaced_by_the_product(rng: np.random.Generator) -> None:
    class InPieces(HnswGraph):
        def similarities(self, queries: np.ndarray, k: int, ef: int = 1) -> np.ndarray:
            raise RuntimeError("fewer than k")

    entries = unit(rng, 40)
    neighbours = NeighbourSearch(entries, lambda: InPieces.build(entries), "index", 10)
    neighbours.configure("graph", 10)
    queries = unit(rng, 5)
    exact = neighbours.exact_distances(queries, 3)
    np.testing.assert_array_equal(neighbours.distances(queries, 3), exact)


@pytest.mark.parametrize(
    ("queries", "k", "error"),
    [
        (np.eye(3, DIM - 1, dtype=np.float32), 1, IndexMismatchError),
        (np.eye(3, DIM + 1, dtype=np.float32), 1, IndexMismatchError),
        (np.eye(1, DIM, dtype=np.float32)[0], 1, IndexMismatchError),
        (np.eye(3, DIM, dtype=np.float32), 0, IndexMismatchError),
        (np.eye(3, DIM, dtype=np.float32), 100_000, IndexMismatchError),
        (np.full((2, DIM), np.nan, np.float32), 1, ModelOutputError),
        (np.full((2, DIM), np.inf, np.float32), 1, ModelOutputError),
        (np.zeros((2, DIM), np.float32), 1, ModelOutputError),
    ],
)
def test_queries_that_hnswlib_would_take_are_refused(
    index: NominalIndex, queries: np.ndarray, k: int, error: type[Exception]
) -> None:
    index.configure_search("graph", 10)
    for search_distances in (index.distances, index.exact_distances):
        with pytest.raises(error):
            search_distances(queries, k)
