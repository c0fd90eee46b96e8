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
    DIM,
    GRID,
    IDENTITY,
    LEFT_HALF,
    SEGMENTER,
    build,
    make_frames,
    patches,
    unit,
)

from semantic_anomaly.errors import ArtefactError, IndexMismatchError, ModelOutputError
from semantic_anomaly.index import build as index_build
from semantic_anomaly.index.build import INSTANCES, NominalFrame, instance_embeddings
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame, PatchGrid


def build_of(frames: Iterable[NominalFrame], dedup_distance: float, **options: Any) -> NominalIndex:
    return NominalIndex.build(
        frames,
        identity=IDENTITY,
        settings=Settings(dedup_distance=dedup_distance),
        **{"roi": RegionOfInterest(), **options},
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


def test_building_holds_no_more_than_the_frame_at_hand() -> None:
    alive: list[weakref.ref[PatchGrid]] = []

    def watched() -> Iterator[tuple[Frame, PatchGrid]]:
        for frame, grid in make_frames(8):
            alive.append(weakref.ref(grid))
            yield frame, grid
            del frame, grid
            # The consumer's loop variable may hold the last one until the next arrives.
            assert sum(ref() is not None for ref in alive) <= 1

    build_of(watched(), 0.1)
    assert len(alive) == 8


def test_equal_builds_are_equal(tmp_path: Path) -> None:
    index, again = build(), build()
    assert again.fingerprint == index.fingerprint
    index.save(tmp_path / "index")
    again.save(tmp_path / "again")
    for name in ("graph.hnsw", "embeddings.npy", "entries.npy"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "index" / name).read_bytes()
    assert build(7).fingerprint != index.fingerprint
    assert build(roi=LEFT_HALF).fingerprint != index.fingerprint


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
        build_of([(frame, PatchGrid(wide, wide[0, 0], grid.image_hw))], 0.1)


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
    return PatchGrid(features, features.mean((0, 1)), (200, 300))


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
        measured([PatchGrid(features, features[0, 0], (30, 40))])


def test_instances_become_a_part_of_their_own() -> None:
    index = build(12, segmenter=SEGMENTER, dedup_distance=-1.0)
    part = index.parts[INSTANCES]
    assert part.content.segmenter == SEGMENTER and index.content.segmenter is None
    report = part.report
    assert (report.frames, report.seen) == (12, 36) and report.stored == part.count
    nearest = []
    for _, grid in make_frames(8):
        assert grid.instances is not None
        pooled = unit(np.einsum("nrc,rcd->nd", grid.instances, grid.features))
        products = pooled @ pooled.T - 2 * np.eye(3)
        nearest.append(1 - products.max(axis=1))
    assert part.content.limits["dedup_distance"] == pytest.approx(np.median(nearest) / 2)
    assert build(12, dedup_distance=-1.0).fingerprint != index.fingerprint


def test_frames_without_instances_give_none() -> None:
    empty = np.zeros((0, *GRID), np.float32)
    frames = [(f, dataclasses.replace(g, instances=empty)) for f, g in make_frames(12)]

    def built(frames: list[tuple[Frame, PatchGrid]]) -> NominalIndex:
        return build_of(frames, -1.0, segmenter=SEGMENTER)

    assert not built(frames).parts
    # They are not among the 8 frames that are measured.
    segmented = list(make_frames(9))
    parts = [built(f).parts[INSTANCES] for f in (segmented, [*frames, *segmented])]
    assert parts[0].content.limits == parts[1].content.limits
    alone = [(f, dataclasses.replace(g, instances=g.instances[:1])) for f, g in segmented]
    assert built(alone).parts[INSTANCES].count == 9, "nothing to measure: all are stored"
    bare = [(f, dataclasses.replace(g, instances=None)) for f, g in segmented]
    with pytest.raises(ModelOutputError, match="segmented"):
        built(bare)


def test_what_is_not_nominal_reaches_no_stage() -> None:
    frame, grid = next(make_frames(1))
    nominal = np.ones(GRID, bool)
    nominal[0, 1] = False
    spoilt = grid.features.copy()
    spoilt[0, 1] = unit(np.ones(DIM))
    for features in (grid.features, spoilt):
        instances = instance_embeddings(
            (frame, dataclasses.replace(grid, features=features), nominal), RegionOfInterest()
        )
        assert len(instances.embeddings) == 2, "the upper half is not nominal"
        assert instances.cells.tolist()[1] == [0, 0]
    index = build_of([(frame, grid, nominal)], 0.0, segmenter=SEGMENTER)
    assert (index.count, index.parts[INSTANCES].count) == (GRID[0] * GRID[1] - 1, 2)
    assert [0, 0, 1] not in index.content.entries.tolist()
