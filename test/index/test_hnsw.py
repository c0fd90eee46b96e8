"""Nothing that passes the check of a graph file crashes hnswlib or changes its answers."""

from __future__ import annotations

from pathlib import Path

import hnswlib
import numpy as np
import pytest

from semantic_anomaly.errors import IndexFormatError
from semantic_anomaly.index.hnsw import HnswGraph, M, check_graph_file, predicted_graph_bytes

DIM, COUNT = 8, 250
HEADER = 96


@pytest.fixture(scope="module")
def embeddings() -> np.ndarray:
    points = np.random.default_rng(0).standard_normal((COUNT, DIM)).astype(np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def good(embeddings: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "graph.hnsw"
    HnswGraph.build(embeddings).save(path)
    return path


def test_a_saved_graph_is_read_again(good: Path, embeddings: np.ndarray, tmp_path: Path) -> None:
    queries = np.roll(embeddings, 1, axis=1)
    expected = np.sort(queries @ embeddings.T, axis=1)[:, :-4:-1]
    graph = HnswGraph.load(good, embeddings)
    np.testing.assert_allclose(graph.similarities(queries, 3, 400), expected, atol=1e-5)
    assert graph.similarities(queries[:0], 3).shape == (0, 3)
    assert good.stat().st_size == pytest.approx(predicted_graph_bytes(COUNT, DIM), rel=0.05)
    HnswGraph.build(embeddings[:1]).save(tmp_path / "one")
    HnswGraph.load(tmp_path / "one", embeddings[:1])


def test_a_graph_grows_to_the_same_file(good: Path, embeddings: np.ndarray, tmp_path: Path) -> None:
    graph = HnswGraph.empty(DIM)
    for piece in np.split(embeddings, [7, 200]):
        graph.add(piece)
    graph.trim()
    graph.save(tmp_path / "grown")
    assert (tmp_path / "grown").read_bytes() == good.read_bytes()


def test_another_dimension_or_number_of_links_is_refused(
    good: Path, embeddings: np.ndarray, tmp_path: Path
) -> None:
    with pytest.raises(IndexFormatError, match="header"):
        check_graph_file(good, embeddings[:, :-1])
    with pytest.raises(IndexFormatError, match="header"):
        check_graph_file(good, embeddings[:-1])
    with pytest.raises(IndexFormatError, match="vectors"):
        check_graph_file(good, -embeddings)
    graph = hnswlib.Index("ip", DIM)
    graph.init_index(COUNT, M=M + 1)
    graph.add_items(embeddings)
    graph.save_index(str(tmp_path / "more_links"))
    with pytest.raises(IndexFormatError, match="header"):
        check_graph_file(tmp_path / "more_links", embeddings)


def test_deleted_entries_are_refused(tmp_path: Path, good: Path, embeddings: np.ndarray) -> None:
    graph = hnswlib.Index("ip", DIM)
    graph.load_index(str(good))
    graph.mark_deleted(3)
    graph.save_index(str(tmp_path / "deleted"))
    with pytest.raises(IndexFormatError, match="deleted"):
        check_graph_file(tmp_path / "deleted", embeddings)


@pytest.mark.parametrize("length", [0, 10, HEADER, 1000, -1, -4, 1, 4])
def test_other_lengths_are_refused(
    good: Path, embeddings: np.ndarray, tmp_path: Path, length: int
) -> None:
    data = good.read_bytes()
    # Small positive numbers append, the others cut.
    data = data + bytes(length) if 0 < length < 10 else data[:length]
    (tmp_path / "cut").write_bytes(data)
    with pytest.raises(IndexFormatError):
        check_graph_file(tmp_path / "cut", embeddings)


def test_damage_is_refused_or_harmless(good: Path, embeddings: np.ndarray, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data, path = good.read_bytes(), tmp_path / "damaged"
    links = 2 * M * 4 + 4
    element = links + DIM * 4 + 8
    tail = HEADER + COUNT * element
    queries = np.roll(embeddings, 1, axis=1)[:50]
    expected = HnswGraph.load(good, embeddings).similarities(queries, 3, 50)
    passed = 0
    # Header, links of the lowest level, upper levels: what leads hnswlib somewhere.
    offsets = [
        *rng.integers(0, HEADER, 50),
        *(HEADER + rng.integers(0, COUNT, 80) * element + rng.integers(0, links, 80)),
        *rng.integers(tail, len(data), 60),
    ]
    for number, offset in enumerate(offsets):
        damaged = bytearray(data)
        damaged[offset] = rng.integers(0, 256) if number % 2 else damaged[offset] ^ 0x80
        path.write_bytes(damaged)
        try:
            graph = HnswGraph.load(path, embeddings)
        except IndexFormatError:
            continue
        passed += 1
        # A changed link may cost recall, but every answer is an entry.
        similarities = graph.similarities(queries, 3, 50)
        assert (similarities <= 1 + 1e-5).all()
        assert (np.abs(similarities - expected) < 1e-5).mean() > 0.9
    assert passed < len(offsets) / 2
