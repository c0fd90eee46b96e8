"""What an index stores of a stream of nominal frames."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.nominal_world import (
    COARSE,
    COARSE_DIM,
    COARSE_GRID,
    DIM,
    GRID,
    IMAGE_HW,
    LEFT_HALF,
    PATCHES,
    POOLED,
    SEGMENTER,
    STAGES,
    build,
    make_frames,
    patches,
    unit,
)

from semantic_anomaly.embedding.identity import StageIdentity
from semantic_anomaly.errors import ArtefactError, IndexMismatchError
from semantic_anomaly.index import build as index_build
from semantic_anomaly.index.build import NominalFrame
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame, PatchGrid


def build_of(frames: Iterable[NominalFrame], dedup_distance: float, **options: Any) -> NominalIndex:
    return NominalIndex.build(
        frames,
        settings=Settings(dedup_distance=dedup_distance),
        **{"roi": RegionOfInterest(), "stages": (PATCHES,), **options},
    )


@pytest.mark.parametrize(("exact_up_to", "dedup"), [(10**6, 0.1), (10**6, 0.6), (20, 0.2)])
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
    stored = index.content.embeddings
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
    index = build_of([*frames, *frames], 0.0)
    assert index.count == index.report.seen == 4 * GRID[0] * GRID[1]
    assert index.report.suppressed == 0


def test_no_more_than_max_entries_are_stored_and_the_rest_is_counted() -> None:
    index = build(max_entries=50)
    report = index.report
    assert index.count == report.stored == 50
    assert report.dropped > 0
    assert report.stored + report.suppressed + report.dropped == report.seen
    np.testing.assert_array_equal(index.content.embeddings, build().content.embeddings[:50])


def test_only_patches_of_the_region_take_part() -> None:
    index = build(roi=LEFT_HALF, dedup_distance=0.0)
    assert index.count == 8 * GRID[0] * GRID[1] // 2
    columns = index.content.entries[:, 2]
    assert columns.max() == GRID[1] // 2 - 1


@pytest.mark.parametrize("stages", [(PATCHES,), STAGES])
def test_building_holds_no_more_than_the_frame_at_hand(stages: tuple[StageIdentity, ...]) -> None:
    alive: list[weakref.ref[PatchGrid]] = []

    def watched() -> Iterator[tuple[Frame, PatchGrid]]:
        for frame, grid in make_frames(8, stages=stages):
            alive.append(weakref.ref(grid))
            yield frame, grid
            del frame, grid
            # The consumer's loop variable may hold the last one until the next arrives.
            assert sum(ref() is not None for ref in alive) <= 1

    build_of(watched(), 0.1, stages=stages)
    assert len(alive) == 8


def test_equal_builds_are_equal(tmp_path: Path) -> None:
    index, again = build(stages=STAGES), build(stages=STAGES)
    assert again.fingerprint == index.fingerprint
    index.save(tmp_path / "index")
    again.save(tmp_path / "again")
    files = ("graph.hnsw", "embeddings.npy", "entries.npy")
    for name in (*files, *(f"stage_2/{name}" for name in files)):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "index" / name).read_bytes()
    assert build(7, stages=STAGES).fingerprint != index.fingerprint
    assert build(roi=LEFT_HALF, stages=STAGES).fingerprint != index.fingerprint


def test_frames_that_gave_nothing_new_are_not_kept() -> None:
    frames = list(make_frames(2))
    again = [(dataclasses.replace(frame, name="again"), grid) for frame, grid in frames]
    index = build_of([*frames, *again], 0.01)
    assert index.frame_names == ("drive/000", "drive/001")
    assert index.report.frames == 4


def test_nothing_to_build_from_is_an_error() -> None:
    with pytest.raises(ArtefactError, match="none in 0 frames"):
        build(0)


def test_grids_of_another_dimension_are_refused() -> None:
    frame, grid = next(make_frames(1))
    wide = unit(np.ones((*GRID, DIM + 1)))
    with pytest.raises(IndexMismatchError, match=r"drive/000.*expected 16, found 17"):
        build_of([(frame, PatchGrid(wide, grid.image_hw))], 0.1)


def test_a_graph_that_grew_can_be_saved_and_searched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(index_build, "_EXACT_UP_TO", 0)
    monkeypatch.setattr(index_build, "_BLOCK", 10)
    build(12).save(tmp_path / "grown")
    index = NominalIndex.load(tmp_path / "grown")
    index.configure_search("graph", 300)
    queries = patches(2, seed=5)
    np.testing.assert_allclose(
        index.distances(queries, 1), index.exact_distances(queries, 1), atol=1e-5
    )


def similar_patches(step: float, seed: int = 0) -> PatchGrid:
    """A grid whose patches resemble their neighbours much, and patches far away by `step`."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(1, 1, DIM)) * 3
    coarse = np.kron(rng.normal(size=(4, 6, DIM)), np.ones((5, 5, 1)))
    features = unit(base + step * coarse + 1e-3 * rng.normal(size=(20, 30, DIM)))
    return PatchGrid(features, (200, 300))


def measured(grids: list[PatchGrid], **options: Any) -> float:
    """Return the `dedup_distance` that is measured on grids."""
    frame, _ = next(make_frames(1))
    index = build_of([(frame, grid) for grid in grids], -1.0, **options)
    return index.content.limits["dedup_distance"]


def test_a_suitable_distance_follows_the_scale_of_the_backbone() -> None:
    fine, coarse = (measured([similar_patches(step, s) for s in (1, 2)]) for step in (0.1, 1))
    assert 0 < 20 * fine < coarse < 1
    grid = similar_patches(1.0)
    flat = grid.features.reshape(-1, DIM)
    cells = np.argwhere(np.ones((20, 30)))
    far = np.abs(cells[:, None] - cells).max(axis=2) > 4
    nearest = 1 - np.where(far, flat @ flat.T, -1).max(axis=1)
    assert measured([grid]) == pytest.approx(np.median(nearest), rel=0.05)
    assert measured([grid], roi=LEFT_HALF) == measured([grid])
    first = [similar_patches(1.0, seed) for seed in range(8)]
    assert measured([*first, similar_patches(0.1)]) == measured(first), "8 frames are measured"


def test_measured_frames_are_stored_in_order() -> None:
    index = build(20, dedup_distance=-1.0)
    distance = index.content.limits["dedup_distance"]
    assert 0 < distance < 2
    again = build(20, dedup_distance=distance)
    assert again.fingerprint == index.fingerprint


def test_grids_too_small_to_measure_need_a_distance() -> None:
    features = unit(np.ones((3, 4, DIM)))
    with pytest.raises(ArtefactError, match="set the distance"):
        measured([PatchGrid(features, (30, 40))])


def test_each_stage_has_entries_of_its_own() -> None:
    index = build(stages=STAGES)
    for stage, of_stage in zip(STAGES, index.stages, strict=True):
        alone = build(stages=(stage,))
        np.testing.assert_array_equal(of_stage.content.embeddings, alone.content.embeddings)
        np.testing.assert_array_equal(of_stage.content.entries, alone.content.entries)
        assert of_stage.report == alone.report and of_stage.stage == stage
    assert [stage.dim for stage in index.stages] == [DIM, COARSE_DIM, DIM]
    frames = index.stages[1].content.frames
    assert {(frame.rows, frame.cols) for frame in frames} == {COARSE_GRID}


def test_no_more_than_max_entries_are_stored_in_each_stage() -> None:
    index = build(stages=STAGES, max_entries=30)
    assert [stage.count for stage in index.stages] == [30, 30, 30]
    for stage in index.stages:
        assert stage.report.dropped > 0
        assert stage.content.limits["max_entries"] == 30


def test_instances_and_the_patches_beside_them_are_entries() -> None:
    index = build(12, stages=(POOLED,), dedup_distance=0.0)
    beside = GRID[0] * 4
    assert (index.report.frames, index.count) == (12, 12 * (3 + beside))
    assert index.stage.segmenter == SEGMENTER
    _, grid = next(make_frames(1, stages=(POOLED,)))
    assert grid.instances is not None
    pooled = unit(np.einsum("nrc,rcd->nd", grid.instances, grid.features))
    np.testing.assert_allclose(index.content.embeddings[:3], pooled, atol=1e-6)
    left = grid.features[:, :4].reshape(-1, DIM)
    np.testing.assert_array_equal(index.content.embeddings[3 : 3 + beside], left)
    cells = index.content.entries[: 3 + beside, 1:]
    # The most covered patches nearest to the middle of the instances.
    assert cells[:3].tolist() == [[1, 5], [4, 5], [0, 4]]
    assert (cells[3:] == np.argwhere(np.ones((GRID[0], 4)))).all()


def test_the_distance_of_instances_is_half_of_that_to_the_nearest_other() -> None:
    index = build(12, stages=(PATCHES, POOLED), dedup_distance=-1.0)
    nearest = []
    for _, grid in make_frames(8, stages=(POOLED,)):
        assert grid.instances is not None
        pooled = unit(np.einsum("nrc,rcd->nd", grid.instances, grid.features))
        all_of_frame = np.concatenate([pooled, grid.features[:, :4].reshape(-1, DIM)])
        products = all_of_frame @ all_of_frame.T - 2 * np.eye(len(all_of_frame))
        nearest.append(1 - products.max(axis=1))
    limits = [stage.content.limits["dedup_distance"] for stage in index.stages]
    assert limits[1] == pytest.approx(np.median(np.concatenate(nearest)) / 2)
    assert limits[0] == build(12, dedup_distance=-1.0).content.limits["dedup_distance"]


def test_frames_without_instances_have_their_patches() -> None:
    def built(instances: np.ndarray | None) -> NominalIndex:
        frames = [(f, dataclasses.replace(g, instances=instances)) for f, g in make_frames(9)]
        return build_of(frames, 0.0, stages=(POOLED,))

    for empty in (np.zeros((0, *GRID), np.float32), None):
        assert built(empty).count == 9 * GRID[0] * GRID[1]
    # One instance on everything leaves nothing to measure a distance with: all are stored.
    whole = np.ones((1, *GRID), np.float32)
    frames = [(f, dataclasses.replace(g, instances=whole)) for f, g in make_frames(9)]
    assert build_of(frames, -1.0, stages=(POOLED,)).count == 9


def test_what_is_not_nominal_reaches_no_stage() -> None:
    height, width = IMAGE_HW
    frame, grid = next(make_frames(1, stages=STAGES))
    nominal = np.ones(IMAGE_HW, bool)
    # A pixel in the patch (0, 1) of six rows and eight columns, beside all instances.
    nominal[3, 13] = False
    index = build_of([(frame, grid, nominal)], 0.0, stages=STAGES)
    counts = [stage.count for stage in index.stages]
    assert counts == [GRID[0] * GRID[1] - 1, COARSE_GRID[0] * COARSE_GRID[1] - 1, 3 + 24 - 1]
    for stage, cell in zip(index.stages, ([0, 0, 1], [0, 0, 0], [0, 0, 1]), strict=True):
        assert cell not in stage.content.entries.tolist()
    # In an instance, all of the instance is left out.
    nominal = np.ones(IMAGE_HW, bool)
    nominal[height - 1, width - 1] = False
    pooled = build_of([(frame, grid, nominal)], 0.0, stages=STAGES).stages[2]
    assert pooled.count == 2 + 24 and [0, 4, 5] not in pooled.content.entries.tolist()
    with pytest.raises(ArtefactError, match="stage 'tiny:3@112': expected nominal patches"):
        build_of([(frame, grid, np.zeros(IMAGE_HW, bool))], 0.0, stages=STAGES)


@pytest.mark.parametrize("given", [(PATCHES,), STAGES])
def test_grids_of_another_number_of_stages_are_refused(given: tuple[StageIdentity, ...]) -> None:
    message = f"drive/000': stages: expected 2, found {len(given)}"
    with pytest.raises(IndexMismatchError, match=message):
        build_of(make_frames(1, stages=given), 0.1, stages=(PATCHES, COARSE))


def test_a_stage_of_another_dimension_is_refused() -> None:
    with pytest.raises(IndexMismatchError, match=r"drive/000.*dimension: expected 12, found 16"):
        build_of(make_frames(1, stages=(PATCHES, PATCHES)), 0.1, stages=(PATCHES, COARSE))
