"""What an index stores of a stream of nominal frames."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from worlds.nominal_world import DIM, GRID, IDENTITY, LEFT_HALF, build, make_frames, patches

from semantic_anomaly.errors import (
    ArtefactError,
    IndexMismatchError,
)
from semantic_anomaly.index import build as index_build
from semantic_anomaly.index.build import suitable_distance
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame, PatchGrid


@pytest.fixture(scope="module")
def index() -> NominalIndex:
    return build()


@pytest.fixture(scope="module")
def saved(index: NominalIndex, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "index"
    index.save(folder)
    return folder


@pytest.mark.parametrize("exact_up_to", [10**6, 20], ids=["exact", "graph"])
@pytest.mark.parametrize("dedup", [0.1, 0.2, 0.6])
def test_every_patch_lies_near_a_stored_one(
    monkeypatch: pytest.MonkeyPatch, exact_up_to: int, dedup: float
) -> None:
    monkeypatch.setattr(index_build, "_EXACT_UP_TO", exact_up_to)
    monkeypatch.setattr(index_build, "_BLOCK", 17)
    index = build(dedup_distance=dedup)
    seen = patches(8)
    distances = index.exact_distances(seen, 1)
    assert distances.max() <= dedup + 1e-5
    # The first is always new, so it is stored itself.
    assert distances[0] < 1e-5
    report = index.report
    assert (report.frames, report.seen, report.dropped) == (8, len(seen), 0)
    assert report.stored == index.count and report.suppressed == len(seen) - index.count
    assert 0 < report.suppressed < len(seen)


def test_stored_patches_keep_their_distance_and_their_place() -> None:
    index = build(dedup_distance=0.2)
    grids = {frame.name: grid for frame, grid in make_frames(8)}
    stored = index._content.embeddings
    products = stored @ stored.T
    np.fill_diagonal(products, -1.0)
    assert products.max() <= 0.8 + 1e-5
    for embedding in stored:
        example = index.nearest(embedding)
        features = grids[example.frame].features[example.row, example.col]
        np.testing.assert_array_equal(features, embedding)
        assert example.grid_hw == GRID and example.distance < 1e-5


def test_the_graph_suppresses_nearly_what_the_product_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = build(dedup_distance=0.2).count
    monkeypatch.setattr(index_build, "_EXACT_UP_TO", 20)
    assert exact <= build(dedup_distance=0.2).count <= 1.1 * exact


def test_without_suppression_everything_is_stored() -> None:
    frames = list(make_frames(2))
    index = NominalIndex.build(
        [*frames, *frames],
        identity=IDENTITY,
        region=ImageRegion(),
        settings=Settings(dedup_distance=0.0),
    )
    assert index.count == index.report.seen == 4 * GRID[0] * GRID[1]
    assert index.report.suppressed == 0


def test_no_more_than_max_entries_are_stored_and_the_rest_is_counted() -> None:
    index = build(max_entries=50)
    report = index.report
    assert index.count == report.stored == 50
    assert report.dropped > 0
    assert report.stored + report.suppressed + report.dropped == report.seen
    np.testing.assert_array_equal(index._content.embeddings, build()._content.embeddings[:50])


def test_only_patches_of_the_region_take_part() -> None:
    index = build(region=LEFT_HALF, dedup_distance=0.0)
    assert index.count == 8 * GRID[0] * GRID[1] // 2
    columns = index._content.entries[:, 2]
    assert columns.max() == GRID[1] // 2 - 1


def test_building_holds_no_more_than_the_frame_at_hand() -> None:
    alive: list[weakref.ref[PatchGrid]] = []

    def watched() -> Iterator[tuple[Frame, PatchGrid]]:
        for frame, grid in make_frames(8):
            alive.append(weakref.ref(grid))
            yield frame, grid
            del frame, grid
            # The consumer's loop variable may hold the last one until the next arrives.
            assert sum(ref() is not None for ref in alive) <= 1

    settings = Settings(dedup_distance=0.1)
    NominalIndex.build(watched(), identity=IDENTITY, region=ImageRegion(), settings=settings)
    assert len(alive) == 8


def test_equal_builds_are_equal(index: NominalIndex, saved: Path, tmp_path: Path) -> None:
    again = build()
    assert again.fingerprint == index.fingerprint
    again.save(tmp_path / "again")
    for name in ("graph.hnsw", "embeddings.npy", "entries.npy"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()
    assert build(7).fingerprint != index.fingerprint
    assert build(region=LEFT_HALF).fingerprint != index.fingerprint


def test_frames_that_gave_nothing_new_are_not_kept() -> None:
    frames = list(make_frames(2))
    index = NominalIndex.build(
        [*frames, *((dataclasses.replace(f, name="again"), g) for f, g in frames)],
        identity=IDENTITY,
        region=ImageRegion(),
        settings=Settings(dedup_distance=0.01),
    )
    assert index.frame_names == ("drive/000", "drive/001")
    assert index.report.frames == 4


def test_nothing_to_build_from_is_an_error() -> None:
    with pytest.raises(ArtefactError, match="none in 0 frames"):
        build(0)


def test_grids_of_another_dimension_are_refused() -> None:
    identity = dataclasses.replace(IDENTITY, dim=DIM + 1)
    with pytest.raises(IndexMismatchError, match=r"drive/000.*expected 17, found 16"):
        NominalIndex.build(
            make_frames(1), identity=identity, region=ImageRegion(), settings=Settings()
        )


def test_a_graph_that_grew_can_be_saved_and_searched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(index_build, "_EXACT_UP_TO", 0)
    monkeypatch.setattr(index_build, "_BLOCK", 10)
    build(40).save(tmp_path / "grown")
    index = NominalIndex.load(tmp_path / "grown")
    index.configure_search("graph", 300)
    queries = patches(2, seed=5)
    np.testing.assert_allclose(
        index.distances(queries, 1), index.exact_distances(queries, 1), atol=1e-5
    )


def similar_places(step: float, seed: int = 0) -> PatchGrid:
    """A grid whose places resemble their neighbours much, and places far away by `step`."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(1, 1, 24)) * 3
    coarse = np.kron(rng.normal(size=(4, 6, 24)), np.ones((5, 5, 1)))
    features = (base + step * coarse + 1e-3 * rng.normal(size=(20, 30, 24))).astype(np.float32)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    return PatchGrid(features, features.mean((0, 1)), (200, 300))


def test_a_suitable_distance_follows_the_scale_of_the_backbone() -> None:
    fine, coarse = (
        suitable_distance([similar_places(step, s) for s in (1, 2)]) for step in (0.1, 1)
    )
    assert 0 < 20 * fine < coarse < 1
    grid = similar_places(1.0)
    flat = grid.features.reshape(-1, 24)
    nearest = []
    for number, (row, col) in enumerate(np.ndindex(20, 30)):
        rows, cols = np.divmod(np.arange(600), 30)
        far = np.maximum(abs(rows - row), abs(cols - col)) > 4
        nearest.append(1 - (flat[far] @ flat[number]).max())
    assert suitable_distance([grid]) == pytest.approx(np.median(nearest), rel=0.05)


def test_the_distance_that_was_chosen_is_in_the_manifest() -> None:
    given, chosen = build(dedup_distance=0.07), build(dedup_distance=-1.0)
    assert given._content.limits["dedup_distance"] == 0.07
    assert 0 < chosen._content.limits["dedup_distance"] < 2


def test_grids_too_small_to_measure_need_a_distance() -> None:
    features = np.ones((3, 4, 2), np.float32) / np.sqrt(2).astype(np.float32)
    with pytest.raises(ArtefactError, match="set the distance"):
        suitable_distance([PatchGrid(features, features[0, 0], (30, 40))])
