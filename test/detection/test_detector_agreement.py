"""Live changes, and the refusal of what does not belong together."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from worlds.colours import LEFT_HALF, ColourEmbedder, make_detector, said, street

from semantic_anomaly.detection.detector import AnomalyDetector, load_detector
from semantic_anomaly.errors import (
    CalibrationError,
    IndexMismatchError,
    MismatchError,
    SettingsError,
    UnknownNameError,
)
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Decision


@pytest.fixture(scope="module")
def detector() -> AnomalyDetector:
    return make_detector()


def test_live_settings_take_effect_at_once() -> None:
    detector = make_detector()
    before = detector.threshold
    detector.update(detector.settings.replace(target_false_alarm_rate=0.3))
    assert before is not None and detector.threshold is not None
    assert detector.threshold < before
    detector.update(detector.settings.replace(threshold=1.5))
    assert detector.detect(street(1, odd=True)).decision is Decision.NOMINAL
    detector.update(detector.settings.replace(threshold=0.0, target_false_alarm_rate=0.05))
    assert detector.threshold == before
    assert detector.detect(street(1, odd=True)).decision is Decision.ANOMALY


def test_update_keeps_what_was_seen_unless_the_confirmation_itself_changes() -> None:
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
def test_update_refuses_what_is_fixed_and_takes_nothing_of_it(
    detector: AnomalyDetector, changes: dict[str, Any], named: str
) -> None:
    before = detector.settings, detector.threshold
    parameters = {k: v for k, v in before[0].to_parameters().items() if not k.startswith("camera")}
    with pytest.raises(SettingsError, match=named):
        detector.update(Settings.from_parameters({**parameters, **changes}))
    assert (detector.settings, detector.threshold) == before


def test_update_refuses_a_rate_that_needs_more_scores(detector: AnomalyDetector) -> None:
    before = detector.settings, detector.threshold
    with pytest.raises(CalibrationError, match=r"needs at least 99 .*found 40"):
        detector.update(detector.settings.replace(target_false_alarm_rate=0.01))
    assert (detector.settings, detector.threshold) == before


def test_a_rate_that_needs_more_scores_is_refused_at_the_start() -> None:
    with pytest.raises(CalibrationError, match="needs at least 99"):
        make_detector(target_false_alarm_rate=0.01)
    assert make_detector(target_false_alarm_rate=0.01, threshold=0.5).threshold == 0.5


def test_things_that_do_not_belong_together_are_refused(detector: AnomalyDetector) -> None:
    index, calibration, settings = detector.index, detector.calibration, detector.settings
    with pytest.raises(IndexMismatchError, match="weights"):
        AnomalyDetector(
            index, calibration, settings=settings, embedder=ColourEmbedder(weights="1" * 64)
        )
    other = make_detector(frames=5)
    with pytest.raises(MismatchError, match="fingerprint"):
        AnomalyDetector(other.index, calibration, settings=settings, embedder=ColourEmbedder())
    with pytest.raises(MismatchError, match="neighbours"):
        AnomalyDetector(
            index, calibration, settings=settings.replace(neighbours=2), embedder=ColourEmbedder()
        )
    with pytest.raises(IndexMismatchError, match="'input_size': expected 128, found 640"):
        AnomalyDetector(
            index, calibration, settings=Settings(input_size=640), embedder=ColourEmbedder()
        )


def test_the_region_of_interest_may_shrink_after_the_index_was_built(
    detector: AnomalyDetector,
) -> None:
    index, calibration = detector.index, detector.calibration
    left = Settings.from_parameters(
        {"smoothing": 0.0, "camera.region_of_interest": [0.0, 0.0, 0.5, 0.0, 0.5, 1.0, 0.0, 1.0]}
    )
    with pytest.raises(MismatchError, match=r"region of interest.*calibrate again"):
        AnomalyDetector(index, calibration, settings=left, embedder=ColourEmbedder())
    shrunk = AnomalyDetector(index, settings=left, embedder=ColourEmbedder())
    assert not shrunk.detect(street(1, odd=True)).heatmap[:, 65:].any()
    # An index of the left half knows nothing of the right half.
    half = make_detector(roi=LEFT_HALF).index
    whole = [0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    wide = Settings.from_parameters({"smoothing": 0.0, "camera.region_of_interest": whole})
    with pytest.raises(IndexMismatchError, match="region of interest"):
        AnomalyDetector(half, settings=wide, embedder=ColourEmbedder())
    # Without a polygon of its own, the camera has that of the index.
    inherited = AnomalyDetector(half, settings=Settings(), embedder=ColourEmbedder())
    assert inherited.roi.polygon_xy == LEFT_HALF.polygon_xy


def test_settings_of_one_camera_override_the_common_ones(detector: AnomalyDetector) -> None:
    settings = Settings.from_parameters(
        {
            **{"cameras": ["front", "rear"], "smoothing": 0.0},
            **{"front.threshold": 0.7, "rear.confirm_count": 3},
        }
    )
    front, rear = (
        AnomalyDetector(
            detector.index,
            detector.calibration,
            settings=settings,
            camera=camera,
            embedder=ColourEmbedder(),
        )
        for camera in settings.cameras
    )
    assert (front.threshold, front.settings.confirm_count) == (0.7, 1)
    assert (rear.threshold, rear.settings.confirm_count) == (detector.threshold, 3)
    front.update(Settings.from_parameters({**settings.to_parameters(), "front.threshold": 0.4}))
    assert front.threshold == 0.4


def test_another_precision_runs_with_a_warning(
    detector: AnomalyDetector, caplog: pytest.LogCaptureFixture
) -> None:
    index, calibration, settings = detector.index, detector.calibration, detector.settings
    with caplog.at_level(logging.WARNING):
        AnomalyDetector(index, calibration, settings=settings, embedder=ColourEmbedder())
        assert not caplog.records
        AnomalyDetector(
            index, calibration, settings=settings, embedder=ColourEmbedder(dtype="bfloat16")
        )
    assert "calibrated in float32, running in bfloat16" in caplog.text


@pytest.fixture
def folder(detector: AnomalyDetector, tmp_path: Path) -> Path:
    assert detector.calibration is not None
    detector.index.save(tmp_path / "index")
    detector.calibration.save(tmp_path / "index")
    return tmp_path / "index"


def test_loaded_detector_states_the_same(detector: AnomalyDetector, folder: Path) -> None:
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
            "target_false_alarm_rate": 0.05,
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


def test_load_refuses_a_damaged_calibration(detector: AnomalyDetector, folder: Path) -> None:
    (folder / "calibration.json").write_text("{}")
    settings = detector.settings.replace(index=str(folder))
    with pytest.raises(CalibrationError, match="expected format 1"):
        load_detector(settings, "camera", embedder=ColourEmbedder())
