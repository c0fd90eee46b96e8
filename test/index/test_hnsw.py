"""Nothing that passes the check of a graph file crashes hnswlib or changes its answers."""

from __future__ import annotations

from pathlib import Path

import hnswlib
import numpy as np
import pytest

from semantic_anomaly.errors import IndexFormatError
from semantic_anomaly.index.hnsw import check_graph_file, predicted_graph_bytes

DIM, COUNT, M = 8, 400, 4
HEADER = 96


@pytest.fixture(scope="module")
def embeddings() -> np.ndarray:
    points = np.random.default_rng(0).standard_normal((COUNT, DIM)).astype(np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def good(embeddings: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    graph = hnswlib.Index("ip", DIM)
    graph.init_index(COUNT, M=M, ef_construction=50, random_seed=1)
    graph.add_items(embeddings, num_threads=1)
    path = tmp_path_factory.mktemp("graph") / "graph.hnsw"
    graph.save_index(str(path))
    return path


def answers(path: Path, queries: np.ndarray) -> np.ndarray:
    graph = hnswlib.Index("ip", DIM)
    graph.load_index(str(path), max_elements=COUNT)
    graph.set_ef(50)
    labels: np.ndarray = graph.knn_query(queries, 3)[0]
    return labels


def test_a_good_file_passes(good: Path, embeddings: np.ndarray) -> None:
    check_graph_file(good, embeddings, M)
    assert good.stat().st_size == pytest.approx(predicted_graph_bytes(COUNT, DIM, M), rel=0.05)


def test_one_entry_passes(tmp_path: Path, embeddings: np.ndarray) -> None:
    graph = hnswlib.Index("ip", DIM)
    graph.init_index(1, M=M)
    graph.add_items(embeddings[:1])
    graph.save_index(str(tmp_path / "one"))
    check_graph_file(tmp_path / "one", embeddings[:1], M)


def test_another_dimension_or_number_of_links_is_refused(
    good: Path, embeddings: np.ndarray
) -> None:
    with pytest.raises(IndexFormatError, match="header"):
        check_graph_file(good, embeddings[:, :-1], M)
    with pytest.raises(IndexFormatError, match="header"):
        check_graph_file(good, embeddings, M - 1)
    with pytest.raises(IndexFormatError, match="header"):
        check_graph_file(good, embeddings[:-1], M)
    with pytest.raises(IndexFormatError, match="vectors"):
        check_graph_file(good, -embeddings, M)


def test_deleted_entries_are_refused(tmp_path: Path, good: Path, embeddings: np.ndarray) -> None:
    graph = hnswlib.Index("ip", DIM)
    graph.load_index(str(good))
    graph.mark_deleted(3)
    graph.save_index(str(tmp_path / "deleted"))
    with pytest.raises(IndexFormatError, match="deleted"):
        check_graph_file(tmp_path / "deleted", embeddings, M)


@pytest.mark.parametrize("length", [0, 10, HEADER, 1000, -1, -4, 1, 4])
def test_other_lengths_are_refused(
    good: Path, embeddings: np.ndarray, tmp_path: Path, length: int
) -> None:
    data = good.read_bytes()
    # Small positive numbers append, the others cut.
    data = data + bytes(length) if 0 < length < 10 else data[:length]
    (tmp_path / "cut").write_bytes(data)
    with pytest.raises(IndexFormatError):
        check_graph_file(tmp_path / "cut", embeddings, M)


def test_damage_is_refused_or_harmless(good: Path, embeddings: np.ndarray, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data, path = good.read_bytes(), tmp_path / "damaged"
    element = 2 * M * 4 + 4 + DIM * 4 + 8
    tail = HEADER + COUNT * element
    queries = np.roll(embeddings, 1, axis=1)
    expected = answers(good, queries)
    passed = 0
    # Header, links of the lowest level, upper levels: what leads hnswlib somewhere.
    places = [
        *rng.integers(0, HEADER, 120),
        *(HEADER + rng.integers(0, COUNT, 200) * element + rng.integers(0, 2 * M * 4 + 4, 200)),
        *rng.integers(tail, len(data), 150),
    ]
    for number, place in enumerate(places):
        damaged = bytearray(data)
        damaged[place] = rng.integers(0, 256) if number % 2 else damaged[place] ^ 0x80
        path.write_bytes(damaged)
        try:
            check_graph_file(path, embeddings, M)
        except IndexFormatError:
            continue
        passed += 1
        labels = answers(path, queries)
        # A changed link may cost recall, but every answer is an entry.
        assert labels.max() < COUNT and (labels == expected).mean() > 0.9
    assert passed < len(places) / 2
