"""Live changes, and the refusal of what does not belong together."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from worlds.colours import LEFT_HALF, PLAIN, ColourEmbedder, make_detector, said, street

from semantic_anomaly.detection.detector import AnomalyDetector
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
        ({"cameras": ["front"]}, "'camera"),
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
    whole, embedder = detector.region, detector.embedder
    with pytest.raises(IndexMismatchError, match="weights"):
        AnomalyDetector(ColourEmbedder(weights="1" * 64), index, calibration, settings, whole)
    with pytest.raises(IndexMismatchError, match="polygon"):
        AnomalyDetector(embedder, index, calibration, settings, LEFT_HALF)
    other = make_detector(frames=5)
    with pytest.raises(MismatchError, match="fingerprint"):
        AnomalyDetector(embedder, other.index, calibration, settings, whole)
    with pytest.raises(MismatchError, match="neighbours"):
        AnomalyDetector(embedder, index, calibration, settings.replace(neighbours=2), whole)


def test_another_precision_runs_with_a_warning(
    detector: AnomalyDetector, caplog: pytest.LogCaptureFixture
) -> None:
    args = detector.index, detector.calibration, detector.settings, detector.region
    with caplog.at_level(logging.WARNING):
        AnomalyDetector(ColourEmbedder(), *args)
        assert not caplog.records
        AnomalyDetector(ColourEmbedder(dtype="bfloat16"), *args)
    assert "calibrated in float32, running in bfloat16" in caplog.text


@pytest.fixture
def folder(detector: AnomalyDetector, tmp_path: Path) -> Path:
    assert detector.calibration is not None
    detector.index.save(tmp_path / "index")
    detector.calibration.save(tmp_path / "index")
    return tmp_path / "index"


def test_loaded_detector_states_the_same(detector: AnomalyDetector, folder: Path) -> None:
    settings = detector.settings.replace(index=str(folder))
    loaded = AnomalyDetector.load(
        settings, "camera", embedder=ColourEmbedder(), need_calibration=True
    )
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
            **PLAIN,
        }
    )
    loaded = AnomalyDetector.load(
        settings, "front", embedder=ColourEmbedder(), index=detector.index
    )
    assert loaded.index is detector.index and loaded.threshold == detector.threshold
    with pytest.raises(SettingsError, match="'index'"):
        AnomalyDetector.load(settings, "rear", embedder=ColourEmbedder())
    with pytest.raises(UnknownNameError, match="unknown camera 'left'"):
        AnomalyDetector.load(settings, "left", embedder=ColourEmbedder())


def test_load_without_calibration_is_uncalibrated_unless_one_is_needed(
    detector: AnomalyDetector, folder: Path
) -> None:
    (folder / "calibration.json").unlink()
    settings = detector.settings.replace(index=str(folder))
    assert AnomalyDetector.load(settings, "camera", embedder=ColourEmbedder()).threshold is None
    with pytest.raises(CalibrationError, match="does not exist"):
        AnomalyDetector.load(settings, "camera", embedder=ColourEmbedder(), need_calibration=True)


def test_load_refuses_a_damaged_calibration(detector: AnomalyDetector, folder: Path) -> None:
    (folder / "calibration.json").write_text("{}")
    settings = detector.settings.replace(index=str(folder))
    with pytest.raises(CalibrationError, match="expected format 2"):
        AnomalyDetector.load(settings, "camera", embedder=ColourEmbedder())
