"""From an image to a decision; live changes; refusal of parts that do not match."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.colours import (
    IMAGE_HW,
    LEFT_HALF,
    ODD_BOX,
    PATCH,
    ColourEmbedder,
    make_detector,
    said,
    street,
)

from semantic_anomaly.calibration.calibration import Calibration, DriveScores
from semantic_anomaly.detection.detector import (
    AnomalyDetector,
    load_detector,
    load_embedder,
    probe_scores,
    resolve_settings,
)
from semantic_anomaly.errors import (
    CalibrationError,
    IndexMismatchError,
    MismatchError,
    ModelOutputError,
    SettingsError,
    UnknownNameError,
)
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Decision, Frame, PatchGrid
from semantic_anomaly.timing import DECODE, FORWARD, STAGES, TOTAL


@pytest.fixture(scope="module")
def detector() -> AnomalyDetector:
    return make_detector()


def variant(detector: AnomalyDetector, **changes: Any) -> AnomalyDetector:
    """Return a detector of the same index, calibration and settings but for some arguments."""
    arguments = {
        **{"calibration": detector.calibration, "settings": detector.settings},
        **{"index": detector.index, "embedder": ColourEmbedder(), **changes},
    }
    return AnomalyDetector(**arguments)


def test_an_odd_object_is_localized_and_explained(detector: AnomalyDetector) -> None:
    result = detector.detect(street(2000, odd=True))
    assert result.decision is Decision.ANOMALY and result.reason == ""
    assert result.threshold == detector.threshold is not None
    assert result.score > result.threshold and result.p_value == 0.0
    localization = result.localizations[0]
    assert np.abs(np.subtract(localization.box_xyxy, ODD_BOX)).max() <= PATCH / 2 + 1
    nearest = localization.nearest
    assert nearest.frame.startswith("drive/") and nearest.grid_hw == (9, 16)
    assert nearest.distance == pytest.approx(localization.score, abs=1e-5)
    assert result.label_map[44, 92] == localization.label == 1
    assert result.heatmap[44, 92] == pytest.approx(localization.score, rel=0.05)


def test_nearest_examples_of_several_patches_are_those_of_each_alone(
    detector: AnomalyDetector, rng: np.random.Generator
) -> None:
    grid = detector.embedder.embed([street(2000, odd=True).image])[0]
    rows, cols = rng.integers(0, 9, 12), rng.integers(0, 16, 12)
    together = detector.index.nearest_many(grid.features[rows, cols])
    alone = [detector.index.nearest(embedding) for embedding in grid.features[rows, cols]]
    assert [(e.frame, e.row, e.col) for e in together] == [(e.frame, e.row, e.col) for e in alone]
    distances = detector.index.exact_distances(grid.features[rows, cols], 1)
    np.testing.assert_allclose([example.distance for example in together], distances, atol=1e-6)


def test_nominal_frames_are_nominal_and_have_no_localizations(detector: AnomalyDetector) -> None:
    results = [detector.detect(street(seed)) for seed in range(3000, 3040)]
    alarms = [result for result in results if result.decision is Decision.ANOMALY]
    # The target is 5 %; seven of forty would happen once in 300 times.
    assert len(alarms) <= 7
    nominal = [result for result in results if result.decision is Decision.NOMINAL]
    assert all(not r.localizations and not r.label_map.any() for r in nominal)
    assert all(r.p_value is not None and r.p_value > 0.05 for r in nominal)


def test_shapes_types_and_stages(detector: AnomalyDetector) -> None:
    result = detector.detect(street(2000, odd=True))
    assert result.heatmap.shape == result.label_map.shape == IMAGE_HW
    assert result.heatmap.dtype == np.float32 and result.label_map.dtype == np.uint16
    assert set(result.stage_ms) == set(STAGES)
    parts_ms = [ms for stage, ms in result.stage_ms.items() if stage != TOTAL]
    assert result.stage_ms[TOTAL] == pytest.approx(sum(parts_ms))
    assert result.stage_ms[DECODE] == 0 < result.stage_ms[FORWARD]
    assert all(value >= 0 for value in result.stage_ms.values())


def test_scale_is_the_calibration_s(detector: AnomalyDetector) -> None:
    scales = [detector.detect(street(seed, odd)).scale for seed, odd in ((1, False), (2, True))]
    assert scales[0] == scales[1]
    assert (scales[0].low, scales[0].high) == (0.001, detector.threshold)


def test_a_frame_of_the_index_scores_about_zero(detector: AnomalyDetector) -> None:
    result = detector.detect(street(3))
    # dedup_distance bounds how far a stored embedding can be.
    assert result.score <= 0.001 + 1e-6 and result.p_value is not None and result.p_value > 0.9


def test_batch_of_several_sizes_equals_single_calls(detector: AnomalyDetector) -> None:
    frames = [
        street(1, odd=True),
        street(2, image_hw=(64, 96)),
        street(3),
        street(4, odd=True, image_hw=(80, 160)),
    ]
    grids = detector.embedder.embed([frame.image for frame in frames])
    together = [detector.assess(frame, grid) for frame, grid in zip(frames, grids, strict=True)]
    for frame, result in zip(frames, together, strict=True):
        single = detector.detect(frame)
        assert said(single) == said(result)
        np.testing.assert_array_equal(single.heatmap, result.heatmap)
    assert [r.decision.value for r in together] == ["anomaly", "nominal", "nominal", "anomaly"]


def test_uncalibrated_says_unknown_and_why() -> None:
    result = make_detector(calibrated=False).detect(street(2000, odd=True))
    assert result.decision is Decision.UNKNOWN and result.reason.startswith("uncalibrated")
    assert result.p_value is None and result.threshold is None and not result.localizations
    assert result.score > 0.1
    # The heatmap is scaled by distances inside the index: the odd patches stand out, others do not.
    assert result.scale.source == "distances inside the index"
    shown = result.scale.normalise(result.heatmap)
    assert shown[40:50, 86:98].min() > 1.0 > np.median(shown)


def test_threshold_set_by_hand_decides_with_and_without_calibration() -> None:
    bare = make_detector(calibrated=False, threshold=0.05)
    result = bare.detect(street(2000, odd=True))
    assert (result.decision, result.threshold, result.p_value) == (Decision.ANOMALY, 0.05, None)
    assert (result.scale.low, result.scale.high) == (0.0, 0.05) and result.localizations
    calibrated = make_detector(threshold=1.9).detect(street(2000, odd=True))
    assert calibrated.decision is Decision.NOMINAL and calibrated.threshold == 1.9
    assert calibrated.p_value == 0.0


def test_patches_outside_the_region_of_interest_are_ignored() -> None:
    detector = make_detector(roi=LEFT_HALF)
    result = detector.detect(street(2000, odd=True))
    assert result.decision is Decision.NOMINAL
    assert (result.heatmap[:, 65:] == np.float32(result.scale.low)).all()
    distances = detector.score(detector.embedder.embed([street(1).image])[0]).anomaly_map
    assert distances.shape == (9, 16) and not distances[:, 8:].any() and distances[:, :8].any()


@pytest.mark.parametrize(
    ("changes", "count"),
    [({}, 1), ({"max_area": 0.001}, 0), ({"max_aspect": 2.0}, 1), ({"min_area_px": 2000}, 0)],
)
def test_components_are_filtered_by_size_and_shape(changes: dict[str, float], count: int) -> None:
    # The largest calibration score: no other patch exceeds it.
    result = make_detector(target_false_alarm_rate=0.04, **changes).detect(street(2000, odd=True))
    assert len(result.localizations) == count == len(set(np.unique(result.label_map)) - {0})
    assert (result.decision is Decision.ANOMALY) == bool(count)
    assert result.threshold is not None and result.score > result.threshold


def test_confirmation_delays_the_decision_and_shows_the_excess() -> None:
    detector = make_detector(confirm_count=2, confirm_s=2.0)
    odd = [detector.detect(street(seed, odd=True)) for seed in (10, 11)]
    assert [result.decision.value for result in odd] == ["nominal", "anomaly"]
    assert odd[0].threshold is not None and odd[0].score > odd[0].threshold
    assert odd[0].p_value is not None and odd[0].p_value <= 0.05
    states = [[item.state.value for item in result.localizations] for result in odd]
    assert states[0] == ["candidate"] and "confirmed" in states[1]
    assert odd[0].localizations[0].track == odd[1].localizations[0].track == 1
    detector.reset()
    assert detector.detect(street(12, odd=True)).decision is Decision.NOMINAL


def test_not_a_number_anywhere_is_an_error_not_a_nominal_frame(
    detector: AnomalyDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = street(1)
    grid = detector.embedder.embed([frame.image])[0]
    with pytest.raises(ModelOutputError, match="patch features"):
        features = grid.features.copy()
        features[4, 7] = np.nan
        detector.assess(frame, PatchGrid(features, IMAGE_HW))
    monkeypatch.setattr(
        detector.index, "distances", lambda e, k, **_: np.full(len(e), np.nan, np.float32)
    )
    with pytest.raises(ModelOutputError, match="NaN"):
        detector.detect(frame)


def test_embeddings_of_another_image_are_refused(detector: AnomalyDetector) -> None:
    grid = detector.embedder.embed([street(1, image_hw=(64, 96)).image])[0]
    with pytest.raises(ModelOutputError, match="drive/1"):
        detector.assess(street(1), grid)


def test_graph_search_decides_as_exact_search_does() -> None:
    detector = make_detector(frames=40, dedup_distance=0.0)
    frames = [street(seed, odd=seed % 2 == 0) for seed in range(4000, 4010)]
    results = {}
    for search in ("exact", "graph"):
        detector.index.configure_search(search, 1)
        results[search] = [detector.detect(frame) for frame in frames]
    for exact, graph in zip(results["exact"], results["graph"], strict=True):
        assert (graph.decision, graph.p_value) == (exact.decision, exact.p_value)
        assert graph.score == pytest.approx(exact.score, abs=1e-6)


def test_live_settings_take_effect_at_once() -> None:
    detector = make_detector()
    before = detector.threshold
    detector.update(detector.settings.replace(target_false_alarm_rate=0.3))
    assert before is not None and detector.threshold is not None
    assert detector.threshold < before
    detector.update(detector.settings.replace(threshold=1.5))
    assert detector.promise == "the threshold is a setting: nothing is promised"
    assert detector.detect(street(1, odd=True)).decision is Decision.NOMINAL
    detector.update(detector.settings.replace(threshold=None, target_false_alarm_rate=0.05))
    assert detector.calibration is not None
    assert detector.promise == detector.calibration.promise_of(detector.settings)
    assert detector.threshold == before
    assert detector.detect(street(1, odd=True)).decision is Decision.ANOMALY


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_heatmap_has_the_value_1_at_a_threshold_that_changes(calibrated: bool) -> None:
    detector = make_detector(calibrated=calibrated)
    frame = street(1, odd=True)
    before = detector.detect(frame).scale
    typical = before.low
    for threshold, low in ((1.5, typical), (0.5, typical), (0.0, -1.0), (-2.0, -3.0)):
        detector.update(detector.settings.replace(threshold=threshold))
        scale = detector.detect(frame).scale
        assert (scale.low, scale.high, scale.source) == (low, threshold, before.source)
        at_threshold, at_low = scale.normalise(np.float32([threshold, low]))
        assert (at_threshold, at_low) == pytest.approx((1.0, 0.0))
    detector.update(detector.settings.replace(threshold=None))
    assert detector.detect(frame).scale == before


def test_a_blind_camera_is_unknown_and_leaves_the_tracks(detector: AnomalyDetector) -> None:
    odd = street(1, odd=True).image
    detector.reset()
    seen = detector.detect(Frame(odd, 0))
    black = detector.detect(Frame(np.zeros_like(odd), 100_000_000))
    assert black.blind and black.decision is Decision.UNKNOWN and black.threshold is not None
    assert black.reason.startswith("blind") and black.localizations == ()
    assert not black.label_map.any()
    results = [detector.detect(Frame(odd, n * 500_000_000)) for n in range(1, 8)]
    assert [result.blind for result in results] == [False] * 5 + [True] * 2
    assert results[0].localizations[0].track == seen.localizations[0].track
    detector.reset()
    assert not detector.detect(Frame(odd, 4_000_000_000)).blind
    settings = detector.settings.replace(least_contrast=0.0, frozen_after_s=0.0)
    unchecked = variant(detector, settings=settings)
    assert not unchecked.detect(Frame(np.zeros_like(odd))).blind


def test_update_keeps_the_tracks_unless_the_confirmation_changes() -> None:
    detector = make_detector(confirm_count=2, confirm_s=1.0)
    detector.detect(street(10, odd=True))
    detector.update(detector.settings.replace(overlay_alpha=0.1))
    assert detector.detect(street(11, odd=True)).decision is Decision.ANOMALY
    detector.update(detector.settings.replace(confirm_s=2.0))
    assert detector.detect(street(12, odd=True)).decision is Decision.NOMINAL


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"neighbours": 2}, "'neighbours' cannot change while running: expected 1, found 2"),
        ({"camera.ego_mask": "ego.png"}, "'camera.ego_mask'"),
        ({"search": "graph", "threshold": 0.5}, "'search'"),
    ],
)
def test_update_refuses_fixed_settings_and_changes_nothing(
    detector: AnomalyDetector, changes: dict[str, Any], named: str
) -> None:
    before = detector.settings, detector.threshold
    parameters = {k: v for k, v in before[0].to_parameters().items() if not k.startswith("camera")}
    with pytest.raises(SettingsError, match=named):
        detector.update(Settings.from_parameters({**parameters, **changes}))
    assert (detector.settings, detector.threshold) == before


def test_update_refuses_a_confidence_that_needs_more_drives(detector: AnomalyDetector) -> None:
    before = detector.settings, detector.threshold
    with pytest.raises(CalibrationError, match=r"0\.9 needs at least 9 .*found 2"):
        detector.update(detector.settings.replace(confidence=0.9))
    assert (detector.settings, detector.threshold) == before


def test_a_confidence_that_needs_more_drives_is_refused_at_the_start() -> None:
    with pytest.raises(CalibrationError, match="needs at least 9"):
        make_detector(confidence=0.9)


def test_confidence_is_live_and_shapes_threshold_and_p_value() -> None:
    detector = make_detector()
    calibration = detector.calibration
    assert calibration is not None
    quantiles = sorted(np.quantile(d.scores, 0.95, method="lower") for d in calibration.drives)
    assert detector.threshold == quantiles[1] and quantiles[0] < quantiles[1]
    frame = street(1010)
    before = detector.detect(frame)
    detector.update(detector.settings.replace(confidence=0.3))
    after = detector.detect(frame)
    assert after.threshold == quantiles[0] and after.score == before.score
    assert (before.p_value, after.p_value) == (
        calibration.p_value(after.score),
        calibration.p_value(after.score, 0.3),
    )
    assert after.p_value is not None and before.p_value is not None
    assert after.p_value < before.p_value


def test_parts_that_do_not_match_are_refused(detector: AnomalyDetector) -> None:
    with pytest.raises(IndexMismatchError, match="weights"):
        variant(detector, embedder=ColourEmbedder(weights="1" * 64))
    with pytest.raises(MismatchError, match="fingerprint"):
        variant(detector, index=make_detector(frames=5, calibrated=False).index)
    with pytest.raises(MismatchError, match="neighbours"):
        variant(detector, settings=detector.settings.replace(neighbours=2))
    with pytest.raises(IndexMismatchError, match="'input_size': expected 128, found 640"):
        variant(detector, settings=Settings(input_size=640))


def test_the_region_of_interest_may_shrink_after_the_index_was_built(
    detector: AnomalyDetector,
) -> None:
    left, whole = (
        Settings.from_parameters({"camera.region_of_interest": [0, 0, x, 0, x, 1, 0, 1]})
        for x in (0.5, 1.0)
    )
    with pytest.raises(MismatchError, match=r"region of interest.*calibrate again"):
        variant(detector, settings=left.replace(smoothing=0.0))
    shrunk = variant(detector, calibration=None, settings=left)
    result = shrunk.detect(street(1, odd=True))
    assert (result.heatmap[:, 65:] == np.float32(result.scale.low)).all()
    # An index of the left half has no entries of the right half.
    half = make_detector(roi=LEFT_HALF, calibrated=False)
    with pytest.raises(IndexMismatchError, match="region of interest"):
        variant(half, settings=whole)
    # Without a polygon of its own, the camera has that of the index.
    assert variant(half, settings=Settings()).roi.polygon_xy == LEFT_HALF.polygon_xy


def test_settings_of_one_camera_override_the_common_ones(detector: AnomalyDetector) -> None:
    settings = Settings.from_parameters(
        {
            **{"cameras": ["front", "rear"], "smoothing": 0.0},
            **{"front.threshold": 0.7, "rear.confirm_count": 3},
        }
    )
    front, rear = (
        variant(detector, settings=settings, camera=camera) for camera in settings.cameras
    )
    assert (front.threshold, front.settings.confirm_count) == (0.7, 1)
    assert (rear.threshold, rear.settings.confirm_count) == (detector.threshold, 3)
    front.update(Settings.from_parameters({**settings.to_parameters(), "front.threshold": 0.4}))
    assert front.threshold == 0.4


def test_another_precision_runs_with_a_warning(
    detector: AnomalyDetector, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        variant(detector)
        assert not caplog.records
        variant(detector, embedder=ColourEmbedder(dtype="bfloat16"))
    assert "calibrated in float32 by torch, running in bfloat16 by torch" in caplog.text


def test_the_self_test_repeats_the_scores_of_the_calibration(detector: AnomalyDetector) -> None:
    assert detector.calibration is not None
    parts = detector._scorer, detector.index, detector.embedder, detector.normalisations
    calibration = replace(
        detector.calibration,
        probe_scores=tuple(probe_scores(*parts)),
        pattern_scores=tuple(probe_scores(*parts, pattern=True)),
    )
    detector = variant(detector, calibration=calibration)
    before = detector.detect(street(1, odd=True))
    text = detector.self_test()
    assert text.startswith("self-test passed: ") and "with a test pattern score" in text
    assert detector.detect(street(1, odd=True)).score == before.score

    class Faulty(ColourEmbedder):
        """Sees no difference between colours, as a network whose weights were lost."""

        def embed(self, images: Sequence[np.ndarray]) -> list[PatchGrid]:
            return super().embed([np.full_like(image, 128) + image // 99 for image in images])

    with pytest.raises(MismatchError, match=r"self-test: scores of .* found differences up to"):
        variant(detector, embedder=Faulty()).self_test()
    shifted = replace(calibration, pattern_scores=tuple(np.add(calibration.pattern_scores, 9)))
    with pytest.raises(MismatchError, match="scores of frames with a test pattern"):
        variant(detector, calibration=shifted).self_test()
    fewer = replace(calibration, probe_scores=(0.0,), pattern_scores=(1.0,))
    with pytest.raises(MismatchError, match="the index was edited since"):
        variant(detector, calibration=fewer).self_test()
    for unknown in (None, replace(calibration, pattern_scores=())):
        with pytest.raises(CalibrationError, match="self-test: expected a calibration with"):
            variant(detector, calibration=unknown).self_test()


def test_another_precision_must_repeat_the_scores_of_stored_frames(
    detector: AnomalyDetector, caplog: pytest.LogCaptureFixture
) -> None:
    other, calibration = ColourEmbedder(dtype="bfloat16"), detector.calibration
    assert calibration is not None
    scores = probe_scores(detector._scorer, detector.index, other, detector.normalisations)
    assert 1 < len(scores) <= 8
    spread = float(np.subtract(*np.quantile(calibration.scores, (0.75, 0.25))))

    def shifted(by: float) -> Calibration:
        return replace(calibration, probe_scores=(scores[0] + by, *scores[1:]), execution="torch")

    with caplog.at_level(logging.WARNING):
        variant(detector, calibration=shifted(0.04 * spread), embedder=other)
    assert "scores of stored frames differ by up to" in caplog.text
    with pytest.raises(
        MismatchError, match=r"found bfloat16 by torch .*; calibrate on this device"
    ):
        variant(detector, calibration=shifted(0.06 * spread), embedder=other)
    # In its own precision nothing is compared.
    variant(detector, calibration=shifted(9.0))
    # A decision differs, however near the threshold.
    low, high = calibration.threshold - 1e-4 * spread, calibration.threshold + 1e-4 * spread
    before = replace(calibration, probe_scores=(low,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("semantic_anomaly.detection.detector.probe_scores", lambda *_: [high])
        with pytest.raises(MismatchError, match="calibrate on this device"):
            variant(detector, calibration=before, embedder=other)


def test_recorded_precision_and_execution_are_used_unless_set(detector: AnomalyDetector) -> None:
    index, calibration = detector.index, detector.calibration
    assert calibration is not None
    of_index = resolve_settings(Settings(), index)
    assert (of_index.dtype, of_index.execution) == ("float32", "torch")
    recorded = replace(calibration, dtype="bfloat16", execution="openvino")
    resolved = resolve_settings(Settings(), index, recorded)
    assert (resolved.dtype, resolved.execution) == ("bfloat16", "openvino")
    resolved = resolve_settings(Settings(dtype="float16", execution="torch"), index, recorded)
    assert (resolved.dtype, resolved.execution) == ("float16", "torch")


def test_what_a_device_lacks_is_replaced_unless_it_was_set(
    tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        "semantic_anomaly.embedding.execution.candidates", lambda device: [("float32", "torch")]
    )
    given = Settings(stages=(f"{tiny_backbone} size=56",), device="cpu")
    recorded = given.replace(dtype="bfloat16", execution="openvino")
    with caplog.at_level(logging.WARNING):
        [stage] = load_embedder(recorded, given).stages
    assert (stage.embedder.dtype, stage.embedder.execution) == ("float32", "torch")
    assert "no bfloat16 by openvino, as recorded; torch is tried" in caplog.text
    [stage] = load_embedder(given.replace(dtype="bfloat16", execution="torch"), recorded).stages
    assert (stage.embedder.dtype, stage.embedder.execution) == ("bfloat16", "torch")


@pytest.fixture
def folder(detector: AnomalyDetector, tmp_path: Path) -> Path:
    assert detector.calibration is not None
    detector.index.save(tmp_path / "index")
    detector.calibration.save(tmp_path / "index")
    return tmp_path / "index"


def test_loaded_detector_gives_the_same_results(detector: AnomalyDetector, folder: Path) -> None:
    settings = detector.settings.replace(index=str(folder))
    loaded = load_detector(settings, "camera", embedder=ColourEmbedder(), need_calibration=True)
    for seed in (1, 2):
        frame = street(seed, odd=seed == 2)
        assert said(loaded.detect(frame)) == said(detector.detect(frame))


def test_load_takes_a_loaded_index_and_each_camera_its_own(
    detector: AnomalyDetector, folder: Path
) -> None:
    settings = Settings.from_parameters(
        {
            "cameras": ["front", "rear"],
            "front.index": str(folder),
            "smoothing": 0.0,
        }
    )
    loaded = load_detector(settings, "front", embedder=ColourEmbedder(), index=detector.index)
    assert loaded.index is detector.index and loaded.threshold == detector.threshold
    with pytest.raises(SettingsError, match="'index'"):
        load_detector(settings, "rear", embedder=ColourEmbedder())
    with pytest.raises(UnknownNameError, match="unknown camera 'left'"):
        load_detector(settings, "left", embedder=ColourEmbedder())


def test_load_without_calibration_is_uncalibrated_unless_one_is_needed(
    detector: AnomalyDetector, folder: Path
) -> None:
    (folder / "calibration.json").unlink()
    settings = detector.settings.replace(index=str(folder))
    assert load_detector(settings, "camera", embedder=ColourEmbedder()).threshold is None
    with pytest.raises(CalibrationError, match="does not exist"):
        load_detector(settings, "camera", embedder=ColourEmbedder(), need_calibration=True)


def test_cameras_of_one_index_have_calibrations_of_their_own_or_share_the_first(
    detector: AnomalyDetector, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert detector.calibration is not None
    folder = tmp_path / "index"
    detector.index.save(folder)
    for camera, highest in (("front", 0.01), ("rear", 0.9)):
        drives = (DriveScores("a", np.linspace(0.001, highest, 40)),)
        replace(detector.calibration, camera=camera, drives=drives).save(folder)
    settings = Settings.from_parameters(
        {
            "cameras": ["front", "rear", "left"],
            "index": str(folder),
            "smoothing": 0.0,
        }
    )
    with caplog.at_level(logging.WARNING):
        decisions = [
            load_detector(settings, camera, embedder=ColourEmbedder(), index=detector.index)
            .detect(street(5, odd=True))
            .decision.value
            for camera in settings.cameras
        ]
    assert decisions == ["anomaly", "nominal", "anomaly"]
    assert [r.message for r in caplog.records] == [
        "camera 'left': using the calibration of 'front'"
    ]
