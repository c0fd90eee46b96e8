"""Anomaly maps of patches, of instances and of both; exactness of the refined search."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.colours import IMAGE_HW, LEFT_HALF, ODD_BOX, PATCH, ColourEmbedder, said, street
from worlds.segmented_streets import ByRule, SegmentedColours, build, every_patch, halves, nothing

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.detection.detector import AnomalyDetector, load_detector
from semantic_anomaly.errors import (
    IndexMismatchError,
    MismatchError,
    ModelOutputError,
    SettingsError,
)
from semantic_anomaly.index.build import INSTANCES
from semantic_anomaly.io.images import write_image
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.offline.calibrate import calibrate
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.distances import NO_INSTANCES, FrameScorer
from semantic_anomaly.scoring.normalisation import CELLS_HW, ScoreNormalisation
from semantic_anomaly.segmentation.tokens import TokenSegmenter
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Decision, PatchGrid

BASE = {"target_false_alarm_rate": 0.05, "dedup_distance": 0.0005, "smoothing": 0.0}
WHOLE = RegionOfInterest()
ODD = (
    slice(ODD_BOX[1] // PATCH, ODD_BOX[3] // PATCH),
    slice(ODD_BOX[0] // PATCH, ODD_BOX[2] // PATCH),
)


def made(**changes: Any) -> Settings:
    return Settings.from_parameters({**BASE, "variant": "grid", **changes})


def flat(mean: float, deviation: float) -> ScoreNormalisation:
    return ScoreNormalisation(
        np.full(CELLS_HW, mean, np.float32), np.full(CELLS_HW, deviation, np.float32)
    )


def detector(
    settings: Settings,
    embedder: SegmentedColours | None = None,
    usual: Mapping[str, ScoreNormalisation] | None = None,
    roi: RegionOfInterest = WHOLE,
) -> AnomalyDetector:
    embedder = embedder or SegmentedColours()
    if roi.polygon_xy:
        corners = [value for corner in roi.polygon_xy for value in corner]
        settings = Settings.from_parameters(
            {**settings.to_parameters(), "camera.region_of_interest": corners}
        )
    index = build(embedder, settings, roi=roi)
    return AnomalyDetector(index, settings=settings, embedder=embedder, normalisations=usual)


@pytest.fixture(scope="module")
def drives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drives")
    for number, name in enumerate(("index", "a", "b", "c")):
        (folder / name).mkdir()
        for seed in range(14):
            image = street(1000 * number + seed).image
            write_image(folder / name / f"{seed:03d}.png", image)
    return folder


def test_instances_of_one_patch_each_are_the_grid() -> None:
    embedder = SegmentedColours(ByRule(every_patch))
    instances = detector(made(variant="instance"), embedder)
    patches = detector(made(), embedder)
    for _, grid in embedder.frames([40, 41], odd=True):
        of_instances, of_patches = instances.score(grid), patches.score(grid)
        assert of_instances.score == pytest.approx(of_patches.score, abs=1e-6)
        np.testing.assert_allclose(of_instances.anomaly_map, of_patches.anomaly_map, atol=1e-6)


def test_an_odd_instance_stands_out_as_a_whole() -> None:
    found = detector(made(variant="instance"),
                     SegmentedColours(ByRule(halves)))  # fmt: skip
    (_, odd), (_, nominal) = (found.embedder.frames([50], odd=o)[0] for o in (True, False))
    distances = found.score(odd).anomaly_map
    assert found.score(odd).score > 10 * found.score(nominal).score
    inside = distances[ODD]
    assert np.ptp(inside) < 1e-6 and inside.min() == distances.max()
    outside = distances.copy()
    outside[ODD] = 0.0
    assert outside.max() < 0.1 * inside.min()


def test_no_instances_falls_to_the_grid_and_says_so() -> None:
    settings = made(variant="instance")
    index = build(SegmentedColours(), settings)
    silent = SegmentedColours(ByRule(nothing, TokenSegmenter().identity.digest))
    there = AnomalyDetector(index, settings=settings, embedder=silent)
    grid = detector(made(), silent)
    frame = street(60, odd=True)
    result = there.detect(frame)
    assert result.note == NO_INSTANCES
    assert result.score == grid.detect(frame).score
    assert not grid.detect(frame).note


def test_uncovered_places_are_scored_by_the_grid() -> None:
    def sky_alone(image: np.ndarray, grid_hw: tuple[int, int]) -> np.ndarray:
        return halves(image, grid_hw)[:1]

    embedder = SegmentedColours(ByRule(sky_alone))
    settings = made(variant="instance")
    found = detector(settings, embedder)
    grid = detector(made(), embedder)
    frame, one = embedder.frames([61], odd=True)[0]
    mixed, plain = found.score(one).anomaly_map, grid.score(one).anomaly_map
    middle = IMAGE_HW[0] // PATCH // 2
    np.testing.assert_allclose(mixed[middle:], plain[middle:], atol=1e-6)
    assert np.ptp(mixed[:middle]) < 1e-6 < np.ptp(plain[:middle])
    assert not found.detect(frame).note


def test_stages_are_averaged_in_deviations() -> None:
    usual = {"grid": flat(0.1, 0.02), INSTANCES: flat(0.05, 0.01)}
    settings = made(variant="combined")
    embedder = SegmentedColours(ByRule(halves))
    found = detector(settings, embedder, usual)
    _, one = embedder.frames([62], odd=True)[0]
    plain = FrameScorer(found.index, found.settings, found.roi).distance_maps(one)
    assert set(plain) == set(usual)
    mean = np.mean([(plain[b].values - u.unit[0]) / u.unit[1] for b, u in usual.items()], 0)
    wanted = np.clip(0.1 + 0.02 * mean, 0, 2)
    frame_score = found.score(one)
    np.testing.assert_allclose(frame_score.anomaly_map, wanted, atol=1e-5)
    assert frame_score.score == pytest.approx(wanted.max(), abs=1e-5)
    result = found.detect(street(62, odd=True))
    for branch, value in result.parts.items():
        top = ((plain[branch].values - usual[branch].unit[0]) / usual[branch].unit[1]).max()
        assert value == pytest.approx(top, rel=1e-3)


@pytest.mark.parametrize(
    ("built", "wanted", "message"),
    [
        ({}, {"variant": "instance"}, "'variant': expected grid, found instance"),
        ({"variant": "instance"}, {"variant": "combined"}, "expected instance, found combined"),
        ({}, {"input_size": 640}, "'input_size': expected 128, found 640"),
        ({}, {"place_weight": 0.5}, "'place_weight': expected 0.0, found 0.5"),
    ],
)  # fmt: skip
def test_an_index_without_what_is_needed_is_refused(
    built: dict[str, Any], wanted: dict[str, Any], message: str
) -> None:
    embedder = SegmentedColours()
    index = build(embedder, made(**built))
    with pytest.raises(IndexMismatchError, match=message):
        AnomalyDetector(index, settings=made(**wanted), embedder=embedder)


def test_another_segmenter_or_none_is_refused() -> None:
    settings = made(variant="instance")
    index = build(SegmentedColours(), settings)
    with pytest.raises(IndexMismatchError, match="segmenter: expected tokens"):
        AnomalyDetector(index, settings=settings, embedder=SegmentedColours(ByRule(halves)))
    with pytest.raises(SettingsError, match="needs a segmenter"):
        AnomalyDetector(index, settings=settings, embedder=ColourEmbedder())


def test_grids_without_instances_are_refused() -> None:
    found = detector(made(variant="instance"))
    _, one = found.embedder.frames([80])[0]
    bare = PatchGrid(one.features, one.global_feature, one.image_hw)
    with pytest.raises(ModelOutputError, match="segmented"):
        found.score(bare)


def test_the_region_of_interest_holds_for_all_branches() -> None:
    settings = made(variant="combined")
    usual = {"grid": flat(0.1, 0.02), INSTANCES: flat(0.05, 0.01)}
    found = detector(settings, SegmentedColours(), usual, LEFT_HALF)
    # The odd thing lies to the right.
    _, one = found.embedder.frames([81], odd=True)[0]
    assert not found.score(one).anomaly_map[:, 8:].any()
    assert found.score(one).score < 0.2


def test_built_calibrated_and_read_back_it_says_the_same(drives: Path, tmp_path: Path) -> None:
    settings = made(variant="combined")
    embedder = SegmentedColours()
    index = build_index([drives / "index"], settings=settings, embedder=embedder)
    assert set(index.parts) == {INSTANCES}
    sources = [drives / name for name in "abc"]
    calibration = calibrate(index, sources, settings=settings, embedder=embedder)
    assert set(calibration.normalisations) == {"grid", INSTANCES}
    assert calibration.scoring == settings.scoring
    index.save(tmp_path / "index")
    calibration.save(tmp_path / "index")
    running = Settings(index=str(tmp_path / "index"), smoothing=0.0)
    loaded = load_detector(running, "camera", embedder=embedder)
    direct = AnomalyDetector(index, calibration, settings=settings, embedder=embedder)
    for frame in (street(90), street(91, odd=True)):
        assert said(loaded.detect(frame)) == said(direct.detect(frame))
    assert loaded.detect(street(92, odd=True)).decision is Decision.ANOMALY
    assert loaded.detect(street(93)).decision is Decision.NOMINAL
    assert Calibration.load(tmp_path / "index").sha256 == calibration.sha256
    with pytest.raises(MismatchError, match=r"setting 'smoothing': expected 0\.0, found 0\.5"):
        load_detector(running.replace(smoothing=0.5), "camera", embedder=embedder)


@pytest.mark.parametrize("smoothing", [0.0, 0.8])
@pytest.mark.parametrize("variant", ["grid", "combined"])
def test_scores_and_values_above_the_threshold_are_those_of_an_exact_search(
    monkeypatch: pytest.MonkeyPatch, smoothing: float, variant: str
) -> None:
    embedder = SegmentedColours(ByRule(halves))
    settings = made(variant=variant, smoothing=smoothing, dedup_distance=0.0)
    approximate = detector(settings.replace(search="graph"), embedder)
    exact = detector(settings.replace(search="exact"), embedder)
    true_distances = approximate.index.exact_distances
    noise = np.random.default_rng(0)

    def overestimated(embeddings: np.ndarray, k: int) -> np.ndarray:
        """Return upper bounds as a poor graph gives them: some far too large."""
        errors = noise.exponential(0.02, len(embeddings)) * (noise.random(len(embeddings)) < 0.3)
        return np.minimum(true_distances(embeddings, k) + errors.astype(np.float32), 2.0)

    searched: list[int] = []

    def counted(embeddings: np.ndarray, k: int) -> np.ndarray:
        searched.append(len(embeddings))
        return true_distances(embeddings, k)

    monkeypatch.setattr(approximate.index, "distances", overestimated)
    monkeypatch.setattr(approximate.index, "exact_distances", counted)
    for seed in range(100, 106):
        _, grid = embedder.frames([seed], odd=seed % 2 == 0)[0]
        expected = exact.score(grid)
        for threshold in (None, float(np.quantile(expected.anomaly_map, 0.8))):
            searched.clear()
            found = approximate._scorer.score(grid, {}, threshold)
            assert found.score == pytest.approx(expected.score, abs=1e-6)
            assert len(searched) <= 2
            if threshold is not None:
                above = expected.anomaly_map > threshold
                np.testing.assert_array_equal(found.anomaly_map > threshold, above)
                np.testing.assert_allclose(
                    found.anomaly_map[above], expected.anomaly_map[above], atol=1e-6
                )
