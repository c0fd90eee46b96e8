"""What an index answers, and to whom."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.nominal_world import DIM, IDENTITY, LEFT_HALF, build, make_frames, patches, unit

from semantic_anomaly.errors import (
    IndexMismatchError,
    ModelOutputError,
)
from semantic_anomaly.index import search as neighbour_search
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.images import encode_png
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame


@pytest.fixture(scope="module")
def index() -> NominalIndex:
    return build()


@pytest.fixture(scope="module")
def saved(index: NominalIndex, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "index"
    index.save(folder)
    return folder


@pytest.mark.parametrize("search", ["auto", "exact", "graph"])
@pytest.mark.parametrize("k", [1, 4])
def test_distances_are_those_of_the_plain_product(saved: Path, search: str, k: int) -> None:
    index = NominalIndex.load(saved)
    index.configure_search(search, 200)
    queries = patches(2, seed=5)
    products = np.sort(queries @ index._content.embeddings.T, axis=1)[:, -k:]
    found = index.distances(queries, k)
    assert found.dtype == np.float32 and found.shape == (len(queries),)
    np.testing.assert_allclose(found, 1 - products.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(index.exact_distances(queries, k), found, atol=1e-5)


@pytest.fixture
def poor_graph() -> NominalIndex:
    """An index whose graph is so thin that its search misses much."""
    index = build(dedup_distance=0.0, graph_m=2, graph_ef_construction=8)
    index.configure_search("graph", 1)
    return index


def test_graph_overestimates_and_the_largest_are_made_exact(poor_graph: NominalIndex) -> None:
    queries = patches(4, seed=5)
    exact = poor_graph.exact_distances(queries, 1)
    raw = poor_graph.distances(queries, 1)
    assert (raw >= exact - 1e-5).all()
    assert (raw > exact + 0.01).sum() > 50, "the graph must be poor for this to show anything"
    for top in (1, 5, len(queries), len(queries) + 7):
        checked = poor_graph.distances(queries, 1, exact_top=top)
        np.testing.assert_allclose(np.sort(checked)[-top:], np.sort(exact)[-top:], atol=1e-5)
    threshold = float(np.quantile(exact, 0.9))
    checked = poor_graph.distances(queries, 1, exact_above=threshold)
    away = np.abs(exact - threshold) > 1e-5
    np.testing.assert_array_equal((checked > threshold)[away], (exact > threshold)[away])
    np.testing.assert_allclose(checked[exact > threshold], exact[exact > threshold], atol=1e-5)


def test_recall_tells_a_poor_graph_from_a_good_one(
    poor_graph: NominalIndex, index: NominalIndex
) -> None:
    queries = patches(2, seed=5)
    index.configure_search("auto", 200)
    good, poor = index.recall(queries, 3), poor_graph.recall(queries, 3)
    assert good["recall"] > 0.99 and abs(good["mean_error"]) < 1e-4
    assert poor["recall"] < 0.9 and poor["max_error"] > 0.1
    assert (good["queries"], good["k"], good["ef"]) == (len(queries), 3, 200)
    assert index.recall(50, 1)["queries"] == 50


def test_large_indexes_use_the_graph_by_themselves(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = NominalIndex.load(saved)
    index.configure_search("auto", 10)
    assert index._graph is None, "the graph of a small index need not be read"
    monkeypatch.setattr(neighbour_search, "AUTO_EXACT_UP_TO", index.count * DIM - 1)
    index.configure_search("auto", 10)
    assert index._graph is not None
    index.distances(patches(1), 1)
    assert index._graph.ef == 10
    index.distances(patches(1), 12)
    assert index._graph.ef == 12


def test_nearest_names_frame_and_place(index: NominalIndex) -> None:
    frame, grid = next(make_frames(1))
    example = index.nearest(grid.features[0, 0])
    assert (example.frame, example.row, example.col) == (frame.name, 0, 0)
    far = index.nearest(unit(-grid.features[0, 0]))
    assert far.distance == pytest.approx(index.exact_distances(-grid.features[0, :1], 1)[0])


def test_thumbnails_show_the_frames(saved: Path) -> None:
    index = NominalIndex.load(saved)
    frame, _ = next(make_frames(1))
    small = index.thumbnail(frame.name)
    assert small is not None and small.shape == (60, 80, 3)
    # Noise survives JPEG roughly; another frame's noise would be uncorrelated.
    assert np.corrcoef(small.ravel(), frame.image.ravel())[0, 1] > 0.5
    assert index.thumbnail("drive/999") is None


def test_thumbnails_are_small() -> None:
    image = np.zeros((900, 1600, 3), np.uint8)
    _, grid = next(make_frames(1))
    index = NominalIndex.build(
        [(Frame(image, name="large"), dataclasses.replace(grid, image_hw=(900, 1600)))],
        identity=IDENTITY,
        region=ImageRegion(),
        settings=Settings(),
    )
    thumbnail = index.thumbnail("large")
    assert thumbnail is not None and thumbnail.shape == (180, 320, 3)


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
    for ask in (index.distances, index.exact_distances):
        with pytest.raises(error):
            ask(queries, k)


def test_the_builder_itself_is_accepted(saved: Path) -> None:
    index = NominalIndex.load(saved)
    index.check_embedder(dataclasses.replace(IDENTITY, model_id="moved", dtype="bfloat16"))
    index.check_region(ImageRegion())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights_sha256", "2" * 64),
        ("config_sha256", "2" * 64),
        ("layers", (2,)),
        ("input_size", 640),
        ("architecture", "vit"),
    ],
)
def test_another_embedder_is_refused(saved: Path, field: str, value: Any) -> None:
    running = dataclasses.replace(IDENTITY, **{field: value})
    with pytest.raises(IndexMismatchError, match=field) as caught:
        NominalIndex.load(saved).check_embedder(running)
    assert caught.value.expected == getattr(IDENTITY, field)
    assert caught.value.found == value


def test_another_region_is_refused(saved: Path) -> None:
    with pytest.raises(IndexMismatchError, match="polygon_xy"):
        NominalIndex.load(saved).check_region(LEFT_HALF)
    index = build(region=LEFT_HALF)
    index.check_region(LEFT_HALF)
    bonnet = encode_png(np.full((4, 4, 3), (255, 0, 0), np.uint8))
    with pytest.raises(IndexMismatchError, match="ego_mask"):
        index.check_region(dataclasses.replace(LEFT_HALF, ego_mask_png=bonnet))
