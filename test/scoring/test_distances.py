"""Anomaly maps of patches, of instances and of both; exactness of the refined search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.colours import IMAGE_HW, LEFT_HALF, ODD_BOX, PATCH, ColourEmbedder, said, street
from worlds.segmented_streets import ByRule, SegmentedColours, build, every_patch, halves, nothing

from semantic_anomaly.detection.detector import AnomalyDetector, load_detector
from semantic_anomaly.errors import IndexMismatchError, ModelOutputError, SettingsError
from semantic_anomaly.index.build import INSTANCES
from semantic_anomaly.offline.calibrate import calibrate
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.distances import NO_INSTANCES, NOT_CALIBRATED, FrameScorer
from semantic_anomaly.scoring.normalisation import CELLS_HW, ScoreNormalisation
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Decision, PatchGrid

WHOLE = RegionOfInterest()
ODD = (
    slice(ODD_BOX[1] // PATCH, ODD_BOX[3] // PATCH),
    slice(ODD_BOX[0] // PATCH, ODD_BOX[2] // PATCH),
)


def settings_of(variant: str, **changes: Any) -> Settings:
    parameters = {"target_false_alarm_rate": 0.05, "dedup_distance": 0.0005, "smoothing": 0.0}
    return Settings.from_parameters({**parameters, "variant": variant, **changes})


def scorer(
    variant: str, embedder: SegmentedColours, roi: RegionOfInterest = WHOLE, **changes: Any
) -> FrameScorer:
    settings = settings_of(variant, **changes)
    index = build(embedder, settings, roi=roi)
    index.configure_search(settings.search, settings.search_ef)
    return FrameScorer(index, settings, roi)


def uniform(mean: float, deviation: float) -> ScoreNormalisation:
    return ScoreNormalisation(
        np.full(CELLS_HW, mean, np.float32), np.full(CELLS_HW, deviation, np.float32)
    )


NORMALISATIONS = {"grid": uniform(0.1, 0.02), INSTANCES: uniform(0.05, 0.01)}


def grid_of(embedder: SegmentedColours, seed: int, odd: bool = True) -> PatchGrid:
    return embedder.frames([seed], odd)[0][1]


def test_instances_of_one_patch_each_are_the_grid() -> None:
    embedder = SegmentedColours(ByRule(every_patch))
    grid = grid_of(embedder, 40)
    of_instances, of_patches = (
        scorer(variant, embedder).score(grid, {}, None) for variant in ("instance", "grid")
    )
    assert of_instances.score == pytest.approx(of_patches.score, abs=1e-6)
    np.testing.assert_allclose(of_instances.anomaly_map, of_patches.anomaly_map, atol=1e-6)


def test_an_odd_instance_stands_out_as_a_whole() -> None:
    embedder = SegmentedColours(ByRule(halves))
    instances = scorer("instance", embedder)
    odd, nominal = (instances.score(grid_of(embedder, 50, odd), {}, None) for odd in (True, False))
    assert odd.score > 10 * nominal.score
    inside, outside = odd.anomaly_map[ODD], odd.anomaly_map.copy()
    outside[ODD] = 0.0
    assert np.ptp(inside) < 1e-6 and outside.max() < 0.1 * inside.min()


def test_without_instances_the_grid_is_scored_and_a_note_says_so() -> None:
    embedder, silent = SegmentedColours(), SegmentedColours(ByRule(nothing))
    grid, bare = grid_of(embedder, 60), grid_of(silent, 60)
    patches, instances = scorer("grid", embedder), scorer("instance", embedder)
    assert not patches.score(grid, {}, None).note and not instances.score(grid, {}, None).note
    of_grid = {"grid": NORMALISATIONS["grid"]}
    for patch_grid, normalisations, note in (
        (bare, {}, NO_INSTANCES),
        (bare, NORMALISATIONS, NO_INSTANCES),
        (grid, of_grid, NOT_CALIBRATED),
    ):
        frame_score = instances.score(patch_grid, normalisations, None)
        assert frame_score.note == note
        assert frame_score.score == patches.score(grid, normalisations and of_grid, None).score
    with pytest.raises(ModelOutputError, match="segmented"):
        instances.score(PatchGrid(grid.features, grid.global_feature, grid.image_hw), {}, None)


def test_patches_without_an_instance_are_scored_by_the_grid() -> None:
    def sky_alone(image: np.ndarray, grid_hw: tuple[int, int]) -> np.ndarray:
        return halves(image, grid_hw)[:1]

    embedder = SegmentedColours(ByRule(sky_alone))
    grid = grid_of(embedder, 61)
    mixed, of_grid = (
        scorer(variant, embedder).score(grid, {}, None) for variant in ("instance", "grid")
    )
    middle = IMAGE_HW[0] // PATCH // 2
    np.testing.assert_allclose(mixed.anomaly_map[middle:], of_grid.anomaly_map[middle:], atol=1e-6)
    assert np.ptp(mixed.anomaly_map[:middle]) < 1e-6 < np.ptp(of_grid.anomaly_map[:middle])
    assert not mixed.note


def test_stages_are_averaged_in_deviations() -> None:
    embedder = SegmentedColours(ByRule(halves))
    combined, grid = scorer("combined", embedder), grid_of(embedder, 62)
    maps = combined.distance_maps(grid)
    assert set(maps) == set(NORMALISATIONS)
    z_maps = {
        stage: (maps[stage].values - normalisation.unit[0]) / normalisation.unit[1]
        for stage, normalisation in NORMALISATIONS.items()
    }
    expected = np.clip(0.1 + 0.02 * np.mean([*z_maps.values()], axis=0), 0, 2)
    frame_score = combined.score(grid, NORMALISATIONS, None)
    np.testing.assert_allclose(frame_score.anomaly_map, expected, atol=1e-5)
    assert frame_score.score == pytest.approx(expected.max(), abs=1e-5)
    assert set(frame_score.parts) == set(z_maps)
    for stage, score in frame_score.parts.items():
        assert score == pytest.approx(z_maps[stage].max(), rel=1e-3)


def test_the_region_of_interest_holds_for_all_stages() -> None:
    embedder = SegmentedColours()
    # The odd object lies to the right.
    frame_score = scorer("combined", embedder, LEFT_HALF).score(
        grid_of(embedder, 81), NORMALISATIONS, None
    )
    assert not frame_score.anomaly_map[:, 8:].any() and frame_score.score < 0.2


def test_another_segmenter_or_none_is_refused() -> None:
    settings = settings_of("instance")
    index = build(SegmentedColours(), settings)
    with pytest.raises(IndexMismatchError, match="segmenter: expected tokens"):
        AnomalyDetector(index, settings=settings, embedder=SegmentedColours(ByRule(halves)))
    with pytest.raises(SettingsError, match="needs a segmenter"):
        AnomalyDetector(index, settings=settings, embedder=ColourEmbedder())


def test_built_calibrated_and_read_back_it_says_the_same(tmp_path: Path) -> None:
    settings, embedder = settings_of("combined"), SegmentedColours()
    index = build(embedder, settings)
    grids = {
        drive: [grid for _, grid in embedder.frames(range(first, first + 14))]
        for drive, first in (("a", 1000), ("b", 2000))
    }
    calibration = calibrate(index, grids, settings=settings)
    assert set(calibration.normalisations) == {"grid", INSTANCES}
    index.save(tmp_path / "index")
    calibration.save(tmp_path / "index")
    running = Settings(index=str(tmp_path / "index"), smoothing=0.0)
    loaded = load_detector(running, "camera", embedder=embedder)
    direct = AnomalyDetector(index, calibration, settings=settings, embedder=embedder)
    for odd, decision in ((False, Decision.NOMINAL), (True, Decision.ANOMALY)):
        result = loaded.detect(street(90, odd))
        assert said(result) == said(direct.detect(street(90, odd)))
        assert result.decision is decision


@pytest.mark.parametrize(("variant", "smoothing"), [("grid", 0.0), ("combined", 0.8)])
def test_scores_and_values_above_the_threshold_are_those_of_an_exact_search(
    monkeypatch: pytest.MonkeyPatch, variant: str, smoothing: float
) -> None:
    embedder = SegmentedColours(ByRule(halves))
    exact, approximate = (
        scorer(variant, embedder, smoothing=smoothing, dedup_distance=0.0, search=search)
        for search in ("exact", "graph")
    )
    index, noise = approximate._index, np.random.default_rng(0)
    true_distances = index.exact_distances
    searched: list[int] = []

    def overestimated(embeddings: np.ndarray, k: int) -> np.ndarray:
        """Return upper bounds as a poor graph gives them: some far too large."""
        errors = noise.exponential(0.02, len(embeddings)) * (noise.random(len(embeddings)) < 0.3)
        return np.minimum(true_distances(embeddings, k) + errors.astype(np.float32), 2.0)

    def counted(embeddings: np.ndarray, k: int) -> np.ndarray:
        searched.append(len(embeddings))
        return true_distances(embeddings, k)

    monkeypatch.setattr(index, "distances", overestimated)
    monkeypatch.setattr(index, "exact_distances", counted)
    for seed in range(100, 104):
        grid = grid_of(embedder, seed, odd=seed % 2 == 0)
        expected = exact.score(grid, {}, None)
        for threshold in (None, float(np.quantile(expected.anomaly_map, 0.8))):
            searched.clear()
            refined = approximate.score(grid, {}, threshold)
            assert refined.score == pytest.approx(expected.score, abs=1e-6)
            assert len(searched) <= 2
            if threshold is not None:
                above = expected.anomaly_map > threshold
                np.testing.assert_array_equal(refined.anomaly_map > threshold, above)
                np.testing.assert_allclose(
                    refined.anomaly_map[above], expected.anomaly_map[above], atol=1e-6
                )
