"""Realised false-alarm rates of a calibration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from worlds.colours import ColourEmbedder, make_detector
from worlds.labelled_drive import make_dataset

from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.errors import CalibrationError, InputError
from semantic_anomaly.evaluation.false_alarms import false_alarm_rates
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.offline.calibrate import calibrate


def test_rates_by_frame_episode_and_hour(tmp_path: Path) -> None:
    # 'o' stands for what should have been nominal and is not.
    one = make_dataset(tmp_path / "one", "." * 20 + "oo" + "." * 18)
    two = make_dataset(tmp_path / "two", "." * 20)
    rates = false_alarm_rates(make_detector(threshold=0.1), [one, two], episode_s=1.0)
    assert (rates["frames"], rates["drives"], rates["episodes"]) == (60, 2, 6)
    assert rates["frame_rate"] == rates["alarm_rate"] == pytest.approx(2 / 60)
    by_drive = [(row["frames"], row["frame_rate"]) for row in rates["by_drive"]]
    assert by_drive == [(40, pytest.approx(2 / 40)), (20, 0.0)]
    assert rates["episode_rate"] == pytest.approx(1 / 6)
    assert rates["false_alarms"] == 1
    assert rates["hours"] == pytest.approx((3.9 + 1.9) / 3600)
    assert rates["false_alarms_per_hour"] == pytest.approx(3600 / 5.8)
    low, high = rates["frame_rate_interval"]
    # Two drives say little, however many frames they have.
    assert low < 2 / 60 < high and high > 0.6
    assert rates["kept"] is True


def test_confirmation_counts(tmp_path: Path) -> None:
    drive = make_dataset(tmp_path / "drive", "." * 10 + "o" + "." * 9)
    detector = make_detector(threshold=0.1, confirm_count=2, confirm_s=0.5)
    rates = false_alarm_rates(detector, [drive])
    assert rates["frame_rate"] == pytest.approx(1 / 20)
    assert (rates["alarm_rate"], rates["false_alarms"], rates["episode_rate"]) == (0.0, 0, None)


def test_rates_above_the_target_are_reported(tmp_path: Path) -> None:
    sources = [make_dataset(tmp_path / f"d{n}", "oooooo") for n in range(4)]
    rates = false_alarm_rates(make_detector(threshold=0.1), sources)
    assert rates["frame_rate"] == 1.0 and rates["kept"] is False


def test_drives_are_those_that_labels_name(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "set", "......")
    path = root / "labels.json"
    labels = json.loads(path.read_text())
    for number, row in enumerate(labels.values()):
        row["drive"] = f"d{number // 2}"
    path.write_text(json.dumps(labels))
    assert false_alarm_rates(make_detector(), [root])["drives"] == 3


def test_bad_input_is_refused(tmp_path: Path) -> None:
    drive = make_dataset(tmp_path / "drive", "...")
    with pytest.raises(CalibrationError, match="found no calibration"):
        false_alarm_rates(make_detector(calibrated=False), [drive])
    with pytest.raises(InputError, match="expected sources and episode_s > 0"):
        false_alarm_rates(make_detector(), [])
    with pytest.raises(InputError, match="episode_s > 0"):
        false_alarm_rates(make_detector(), [drive], episode_s=0.0)


def test_seen_frames_are_refused(tmp_path: Path) -> None:
    root, embedder = make_dataset(tmp_path / "drive", "." * 30), ColourEmbedder()
    index = build_index(f"{root}[0:5]", embedder=embedder)
    calibration = calibrate(index, f"{root}[5:20]", embedder=embedder, target_false_alarm_rate=0.1)
    detector = AnomalyDetector(index, calibration, embedder=embedder)
    assert false_alarm_rates(detector, [f"{root}[20:30]"])["frames"] == 10
    with pytest.raises(CalibrationError, match=r"has seen frame 'drive/00004\.png'"):
        false_alarm_rates(detector, [f"{root}[4:30]"])
