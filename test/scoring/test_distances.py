"""Maps of one and several stages by hand; exactness of the refined search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from worlds.nominal_world import (
    COARSE,
    DIM,
    GRID,
    IMAGE_HW,
    LEFT_HALF,
    PATCHES,
    POOLED,
    STAGES,
    build,
    make_frames,
    unit,
    weighted,
)

from semantic_anomaly.embedding.identity import StageIdentity
from semantic_anomaly.errors import IndexMismatchError, ModelOutputError, SettingsError
from semantic_anomaly.index import partition
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring import distances as distances_module
from semantic_anomaly.scoring.anomaly_map import smoothed, tail_mean
from semantic_anomaly.scoring.distances import FrameScorer
from semantic_anomaly.scoring.normalisation import (
    CELLS_HW,
    ScoreNormalisation,
    constant_normalisation,
)
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame, PatchGrid

WHOLE = RegionOfInterest()
# Cuts coarse patches: of some, less than half is inside.
ODD_SHAPE = RegionOfInterest(((0.1, 0.0), (0.62, 0.0), (0.62, 0.4), (0.95, 0.85), (0.1, 0.85)))


def normalisations(count: int) -> list[ScoreNormalisation]:
    """Other means and deviations in each cell and for each stage."""
    rng = np.random.default_rng(3)
    return [
        ScoreNormalisation(
            rng.uniform(0.05, 0.2, CELLS_HW).astype(np.float32),
            rng.uniform(0.02, 0.1, CELLS_HW).astype(np.float32),
        )
        for _ in range(count)
    ]


def scorer(
    stages: Sequence[StageIdentity], roi: RegionOfInterest = WHOLE, **changes: Any
) -> FrameScorer:
    settings = Settings(**{"smoothing": 0.0, "dedup_distance": 0.1, **changes})
    index = build(stages=stages, dedup_distance=settings.dedup_distance)
    index.configure_search(settings.search, settings.search_ef)
    return FrameScorer(index, settings, roi)


def query(stages: Sequence[StageIdentity], seed: int = 40) -> PatchGrid:
    return next(make_frames(1, seed, stages))[1]


def distances_by_hand(index: NominalIndex, features: np.ndarray) -> np.ndarray:
    return 1.0 - (features @ index.content.embeddings.T).max(axis=-1)


def z_by_hand(
    distances: np.ndarray, normalisation: ScoreNormalisation, inside: np.ndarray
) -> np.ndarray:
    """Return (rows, cols) z, NaN outside."""
    z = np.full(inside.shape, np.nan)
    mean, deviation = normalisation.parameters(inside, np.zeros((int(inside.sum()), DIM), "f"))
    z[inside] = (distances[inside] - mean) / deviation
    return z


def interpolated(z: np.ndarray, grid_hw: tuple[int, int]) -> np.ndarray:
    """Return z on a finer grid: bilinear, of the patches inside; NaN where there is none."""
    result = np.full(grid_hw, np.nan)
    for row, col in np.ndindex(grid_hw):
        total = share = 0.0
        y, x = (
            min(max((n + 0.5) * coarse / fine - 0.5, 0.0), coarse - 1.0)
            for n, coarse, fine in zip((row, col), z.shape, grid_hw, strict=True)
        )
        for r, c in np.ndindex(z.shape):
            weight = max(0.0, 1.0 - abs(r - y)) * max(0.0, 1.0 - abs(c - x))
            if weight and not math.isnan(z[r, c]):
                total, share = total + weight * z[r, c], share + weight
        if share > 1e-3:
            result[row, col] = total / share
    return result


def test_one_stage_is_its_standardised_distances() -> None:
    stages, grid = (PATCHES,), query((PATCHES,))
    one = scorer(stages)
    [normalisation] = normalisations(1)
    found = one.score(grid, [normalisation], None)
    expected = z_by_hand(
        distances_by_hand(one._index, grid.features), normalisation, np.ones(GRID, bool)
    )
    np.testing.assert_allclose(found.anomaly_map, expected, atol=1e-4)
    assert found.score == pytest.approx(expected.max(), abs=1e-4)
    assert found.inside.all() and not found.stage_scores
    [distance_map] = one.distance_maps(grid)
    np.testing.assert_allclose(
        distance_map.values, distances_by_hand(one._index, grid.features), atol=1e-6
    )
    # Less than nominal everywhere: scores may be negative.
    assert one.score(grid, [constant_normalisation(2.0, 0.1)], None).score < -5


@pytest.mark.parametrize("roi", [WHOLE, LEFT_HALF, ODD_SHAPE], ids=["whole", "half", "polygon"])
def test_the_map_is_the_weighted_mean_of_the_resized_z_maps(roi: RegionOfInterest) -> None:
    stages, grid = (PATCHES, COARSE), query((PATCHES, COARSE))
    both, of_stages = scorer(stages, roi), normalisations(2)
    z_maps = []
    for index, stage_grid, normalisation in zip(
        both._index.stages, grid.stages, of_stages, strict=True
    ):
        inside = roi.patch_mask(stage_grid.grid_hw, IMAGE_HW)
        distances = distances_by_hand(index, stage_grid.features)
        z_maps.append(interpolated(z_by_hand(distances, normalisation, inside), GRID))
    inside = roi.patch_mask(GRID, IMAGE_HW)
    weights = [
        np.where(np.isnan(z), 0.0, stage.spec.weight)
        for z, stage in zip(z_maps, stages, strict=True)
    ]
    expected = sum(w * np.nan_to_num(z) for w, z in zip(weights, z_maps, strict=True))
    expected = np.where(inside, expected / np.maximum(sum(weights), 1e-9), 0.0)
    found = both.score(grid, of_stages, None)
    np.testing.assert_array_equal(found.inside, inside)
    np.testing.assert_allclose(found.anomaly_map, expected, atol=1e-3)
    assert found.score == pytest.approx(expected[inside].max(), abs=1e-3)
    np.testing.assert_allclose(
        sum(stage_map.values for stage_map in found.stage_maps), found.anomaly_map, atol=1e-5
    )
    for stage, z in zip(stages, z_maps, strict=True):
        of_stage = found.stage_scores[stage.name]
        assert of_stage == pytest.approx(np.nan_to_num(z)[inside].max(), abs=1e-3)


def test_patches_that_a_coarse_grid_does_not_cover_have_the_other_stages() -> None:
    # A stripe that covers most of the first fine column, and less than half of the coarse one.
    stripe = RegionOfInterest(((0.0, 0.0), (0.11, 0.0), (0.11, 1.0), (0.0, 1.0)))
    both, grid = scorer((PATCHES, COARSE), stripe), query((PATCHES, COARSE))
    with pytest.raises(SettingsError, match="region of interest"):
        both.score(grid, normalisations(2), None)
    # With the lower right, the coarse grid has patches, and none near the stripe.
    corner = ((0.11, 0.0), (0.11, 0.99), (1.0, 0.6), (1.0, 1.0), (0.0, 1.0), (0.0, 0.0))
    roi = RegionOfInterest(corner)
    alone = scorer((PATCHES,), roi).score(query((PATCHES,)), normalisations(1), None)
    found = scorer((PATCHES, COARSE), roi).score(grid, normalisations(2), None)
    np.testing.assert_allclose(found.anomaly_map[:2, 0], alone.anomaly_map[:2, 0], atol=1e-5)
    assert found.inside[:2, 0].all() and not roi.patch_mask((3, 4), IMAGE_HW)[:2, 0].any()


def test_the_order_of_stages_does_not_matter() -> None:
    stages, of_stages = STAGES, normalisations(3)
    forward = scorer(stages).score(query(stages), of_stages, None)
    turned = stages[::-1]
    backward = scorer(turned).score(query(turned), of_stages[::-1], None)
    np.testing.assert_allclose(forward.anomaly_map, backward.anomaly_map, atol=1e-4)
    assert forward.stage_scores == pytest.approx(backward.stage_scores, abs=1e-4)


def test_a_stage_of_weight_0_counts_nothing_and_has_its_score() -> None:
    of_stages = normalisations(2)
    alone = scorer((PATCHES,)).score(query((PATCHES,)), of_stages[:1], None)
    stages = (PATCHES, weighted(COARSE, 0.0))
    for search in ("exact", "graph"):
        found = scorer(stages, search=search).score(query(stages), of_stages, None)
        np.testing.assert_allclose(found.anomaly_map, alone.anomaly_map, atol=1e-5)
        assert found.score == pytest.approx(alone.score, abs=1e-5)
        assert set(found.stage_scores) == {PATCHES.name, COARSE.name}
        assert not found.stage_maps[1].values.any()


@pytest.mark.parametrize("factor", [1e-12, 1e6])
def test_only_the_ratio_of_weights_matters(factor: float) -> None:
    stages, of_stages = (PATCHES, COARSE), normalisations(2)
    scaled = [weighted(stage, stage.spec.weight * factor) for stage in stages]
    expected, found = (
        scorer(each).score(query(each), of_stages, None) for each in (stages, scaled)
    )
    np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, atol=1e-4)


def test_stages_of_one_name_keep_their_scores() -> None:
    embedder = replace(PATCHES.embedder, weights_sha256="a" * 64)
    stages = (PATCHES, replace(PATCHES, spec=replace(PATCHES.spec, weight=2.0), embedder=embedder))
    found = scorer(stages).score(query(stages), normalisations(2), None)
    assert len(found.stage_scores) == 2 == len({*found.stage_scores.values()})


def test_instances_of_one_patch_each_are_the_grid() -> None:
    count = GRID[0] * GRID[1]
    one_each = np.eye(count, dtype=np.float32).reshape(count, *GRID)
    frames = [(f, replace(g, instances=one_each)) for f, g in make_frames(8, stages=(POOLED,))]
    settings = Settings(dedup_distance=0.1, smoothing=0.0)
    index = NominalIndex.build(frames, stages=(POOLED,), roi=WHOLE, settings=settings)
    grid = query((PATCHES,))
    [normalisation] = normalisations(1)
    pooled = FrameScorer(index, settings, WHOLE).score(
        replace(grid, instances=one_each), [normalisation], None
    )
    expected = scorer((PATCHES,)).score(grid, [normalisation], None)
    np.testing.assert_allclose(pooled.anomaly_map, expected.anomaly_map, atol=1e-4)


def test_an_instance_has_one_distance_and_the_patches_beside_have_their_own() -> None:
    pooled, grid = scorer((POOLED,)), query((POOLED,))
    features = grid.features.copy()
    features[:3, 4:] = unit(-grid.features[:3, 4:].mean(axis=(0, 1)))
    odd = replace(grid, features=features)
    values = pooled.distance_maps(odd)[0].values
    # The instance of one patch lies on the first.
    assert np.ptp(values[:3, 5:]) < 1e-6 and np.ptp(values[3:, 4:]) < 1e-6
    assert values[0, 5] > 3 * values[3, 5]
    by_patch = distances_by_hand(pooled._index, features)
    np.testing.assert_allclose(values[:, :4], by_patch[:, :4], atol=1e-6)
    mean = unit(features[3:, 4:].reshape(-1, DIM).mean(axis=0))
    assert values[3, 5] == pytest.approx(distances_by_hand(pooled._index, mean), abs=1e-6)


def test_without_instances_all_patches_are_compared() -> None:
    pooled, grid = scorer((POOLED,)), query((POOLED,))
    bare = replace(grid, instances=np.zeros((0, *GRID), np.float32))
    expected = distances_by_hand(pooled._index, grid.features)
    np.testing.assert_allclose(pooled.distance_maps(bare)[0].values, expected, atol=1e-6)


def test_the_region_of_interest_holds_for_all_stages() -> None:
    grid = query(STAGES)
    first, *further = (
        replace(each, features=right_half_negated(each.features), further=())
        for each in grid.stages
    )
    changed = replace(first, further=tuple(further))
    half = scorer(STAGES, LEFT_HALF, smoothing=0.8)
    before, after = (half.score(each, normalisations(3), None) for each in (grid, changed))
    np.testing.assert_array_equal(before.anomaly_map, after.anomaly_map)
    assert not before.anomaly_map[:, 4:].any() and before.score == after.score
    for distance_map in half.distance_maps(changed):
        columns = distance_map.inside.shape[1] // 2
        assert distance_map.inside[:, :columns].all() and not distance_map.values[:, columns:].any()


def right_half_negated(features: np.ndarray) -> np.ndarray:
    signs = np.where(np.arange(features.shape[1]) < features.shape[1] // 2, 1.0, -1.0)
    return (features * signs[:, None]).astype(np.float32)


def test_grids_of_other_stages_are_refused() -> None:
    both = scorer((PATCHES, COARSE))
    for stages in ((PATCHES,), STAGES):
        for call in (both.distance_maps, lambda g: both.score(g, normalisations(2), None)):
            with pytest.raises(ModelOutputError, match=f"of 2 stages, found {len(stages)}"):
                call(query(stages))
    with pytest.raises(IndexMismatchError, match=r"embeddings: expected \(n, 16\)"):
        both.score(query((COARSE, PATCHES)), normalisations(2), None)


def overestimate(index: NominalIndex, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a stage answer as a poor graph does: some distances are far too large.

    Returns:
        How many embeddings each exact search is asked for, filled as they come.
    """
    noise, true_distances = np.random.default_rng(0), index.exact_distances
    searched: list[int] = []

    def overestimated(embeddings: np.ndarray, k: int) -> np.ndarray:
        errors = noise.exponential(0.05, len(embeddings)) * (noise.random(len(embeddings)) < 0.3)
        return np.minimum(true_distances(embeddings, k) + errors.astype(np.float32), 2.0)

    def counted(embeddings: np.ndarray, k: int, bounds: np.ndarray) -> np.ndarray:
        searched.append(len(embeddings))
        return true_distances(embeddings, k)

    monkeypatch.setattr(index, "distances", overestimated)
    monkeypatch.setattr(index, "exact_distances", counted)
    return searched


def large_query(seed: int, grids_hw: Sequence[tuple[int, int]]) -> PatchGrid:
    """Return a frame of STAGES with grids of these sizes; a part of each is odd."""
    rng, grids = np.random.default_rng(seed), []
    for stage, (rows, cols) in zip(STAGES, grids_hw, strict=True):
        known = query((stage,), seed).features
        features = known[rng.integers(0, known.shape[0], (rows, cols)), 0]
        features = features + 0.1 * rng.standard_normal(features.shape)
        features[: rows // 4, : cols // 4] += rng.standard_normal(features.shape[2])
        instances = None
        if stage is POOLED:
            instances = np.zeros((4, rows, cols), np.float32)
            for number in range(4):
                top, left = rng.integers(0, rows - 4), rng.integers(0, cols - 4)
                instances[number, top : top + 4, left : left + 4] = rng.uniform(0.3, 1)
        grids.append(PatchGrid(unit(features), IMAGE_HW, instances))
    return replace(grids[0], further=tuple(grids[1:]))


@pytest.mark.parametrize(
    "grids_hw",
    [
        ((18, 24), (9, 12), (18, 24)),
        ((7, 9), (18, 24), (12, 16)),
        # Neither of two grids is finer in both directions.
        ((16, 27), (17, 25), (6, 9)),
    ],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.8])
@pytest.mark.parametrize("roi", [WHOLE, ODD_SHAPE], ids=["whole", "polygon"])
def test_scores_and_values_above_the_threshold_are_those_of_an_exact_search(
    monkeypatch: pytest.MonkeyPatch,
    grids_hw: Sequence[tuple[int, int]],
    smoothing: float,
    roi: RegionOfInterest,
) -> None:
    changes = {"smoothing": smoothing, "tail_percent": 2.0, "neighbours": 2}
    exact, approximate = (
        scorer(STAGES, roi, search=search, **changes) for search in ("exact", "graph")
    )
    searched = [overestimate(index, monkeypatch) for index in approximate._index.stages]
    of_stages = normalisations(3)
    for seed in range(100, 104):
        grid = large_query(seed, grids_hw)
        expected = exact.score(grid, of_stages, None)
        values = expected.anomaly_map[expected.inside]
        for threshold in (None, float(np.quantile(values, 0.96)), float(values.max()) + 9):
            for counts in searched:
                counts.clear()
            found = approximate.score(grid, of_stages, threshold)
            assert found.score == pytest.approx(expected.score, abs=1e-4)
            assert all(len(counts) <= 3 for counts in searched)
            embeddings = sum(rows * cols for rows, cols in grids_hw)
            assert 0 < sum(map(sum, searched)) < embeddings
            if threshold is not None:
                above = expected.anomaly_map > threshold
                np.testing.assert_array_equal(found.anomaly_map > threshold, above)
                np.testing.assert_allclose(
                    found.anomaly_map[above], expected.anomaly_map[above], atol=1e-4
                )


def test_the_largest_distances_of_every_stage_are_exact_for_the_calibration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stages = (PATCHES, weighted(COARSE, 0.0))
    approximate, exact = (
        scorer(stages, search=search, tail_percent=5.0) for search in ("graph", "exact")
    )
    for index in approximate._index.stages:
        overestimate(index, monkeypatch)
    grid = query(stages)
    for found, expected in zip(
        approximate.distance_maps(grid), exact.distance_maps(grid), strict=True
    ):
        largest = expected.values >= np.quantile(expected.values, 0.95)
        np.testing.assert_allclose(found.values[largest], expected.values[largest], atol=1e-6)
        assert (found.values >= expected.values - 1e-6).all()


@pytest.mark.parametrize(("fine", "coarse"), [(8, 4), (9, 4), (7, 7), (8, 9), (27, 25), (5, 1)])
def test_what_interpolated_values_depend_on(fine: int, coarse: int) -> None:
    for number in range(fine):
        chosen = np.zeros((1, fine), bool)
        chosen[0, number] = True
        support = distances_module._coarse_support(chosen, (1, coarse))[0]
        for source in range(coarse):
            z = np.zeros((1, coarse))
            z[0, source] = 1.0
            if interpolated(z, (1, fine))[0, number] > 1e-6:
                assert support[source], (number, source)
        assert support.sum() <= 2


def hard_index(kind: str, rng: np.random.Generator, settings: Settings) -> NominalIndex:
    """Return an index of one stage whose entries make bounds loose or lists useless."""
    points = {
        "clustered": unit(
            np.repeat(rng.standard_normal((9, DIM)), 60, axis=0)
            + 0.1 * rng.standard_normal((540, DIM))
        ),
        "duplicated": np.repeat(unit(rng.standard_normal((30, DIM))), 18, axis=0),
        "scattered": unit(rng.standard_normal((540, DIM))),
    }[kind]
    image = np.zeros((18, 30, 3), np.uint8)
    frame = Frame(image, name="0"), PatchGrid(points.reshape(18, 30, DIM), (18, 30))
    return NominalIndex.build([frame], stages=(PATCHES,), roi=WHOLE, settings=settings)


@pytest.mark.parametrize("kind", ["clustered", "duplicated", "scattered"])
@pytest.mark.parametrize("search", ["lists", "graph", "lists of one entry"])
@pytest.mark.parametrize("odd_share", [0.0, 0.03, 0.3, 1.0])
@pytest.mark.parametrize("neighbours", [1, 3])
def test_bounds_decide_as_an_exact_search_on_hard_entries(
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    search: str,
    odd_share: float,
    neighbours: int,
) -> None:
    monkeypatch.setattr(partition, "_ENTRIES_PER_LIST", 1 if search == "lists of one entry" else 20)
    monkeypatch.setattr(partition, "_MAX_LISTS", 10_000)
    settings = Settings(dedup_distance=0.0, smoothing=0.8, tail_percent=1.0, neighbours=neighbours)
    index = hard_index(kind, rng, settings)
    known = index.content.embeddings[rng.integers(0, index.count, (12, 16))]
    features = known + 0.05 * rng.standard_normal(known.shape)
    odd = np.zeros(12 * 16, bool)
    odd[: round(odd_share * 12 * 16)] = True
    features[odd.reshape(12, 16)] = rng.standard_normal((odd.sum(), DIM))
    grid = PatchGrid(unit(features), (12, 16))
    of_stage = [constant_normalisation(0.02, 0.02)]
    scorer_of_index = FrameScorer(index, settings, WHOLE)
    index.configure_search("lists" if "lists" in search else search, 1)
    found = scorer_of_index.score(grid, of_stage, None)
    rows, cols = found.anomaly_map.shape
    exact = index.content.embeddings @ grid.features.reshape(-1, DIM).T
    distances = 1 - np.sort(exact, axis=0)[-neighbours:].mean(axis=0)
    z = ((distances - 0.02) / 0.02).reshape(rows, cols).astype("f")
    exact_map = smoothed(z, found.inside, 0.8)
    score = tail_mean(exact_map.ravel(), 1.0)
    # 1e-5 in cosine distance are 5e-4 deviations here.
    assert found.score == pytest.approx(score, abs=5e-4) and not found.coarse
    for share in (0.01, 0.04, 0.06, 0.5, 1.0):
        threshold = float(np.quantile(exact_map, 1 - share)) - 1e-3
        found = scorer_of_index.score(grid, of_stage, threshold)
        assert found.score == pytest.approx(score, abs=5e-4)
        above = exact_map > threshold
        if above.mean() <= 0.05:
            assert not found.coarse
            np.testing.assert_array_equal(found.anomaly_map > threshold, above)
            np.testing.assert_allclose(found.anomaly_map[above], exact_map[above], atol=5e-4)
        elif above.mean() > 0.055:
            is_exact = np.allclose(found.anomaly_map, exact_map, atol=5e-4)
            assert found.coarse or is_exact, "all patches may be near the largest ones"
        assert (found.anomaly_map >= exact_map - 5e-4).all()
