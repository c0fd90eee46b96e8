"""What a calibration promised, and what came true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from worlds.colours import make_detector
from worlds.labelled_drive import make_dataset

from semantic_anomaly.errors import CalibrationError, InputError
from semantic_anomaly.evaluation.realised import realised_rates


def test_rates_are_counted_by_frame_stretch_and_hour(tmp_path: Path) -> None:
    # 'o' stands for what should have been nominal and is not.
    one = make_dataset(tmp_path / "one", "." * 20 + "oo" + "." * 18)
    two = make_dataset(tmp_path / "two", "." * 20)
    found = realised_rates(make_detector(threshold=0.1), [one, two], episode_s=1.0, progress=False)
    assert (found["frames"], found["drives"], found["stretches"]) == (60, 2, 6)
    assert found["frame_rate"] == found["alarm_rate"] == pytest.approx(2 / 60)
    assert found["stretch_rate"] == pytest.approx(1 / 6)
    assert found["episodes"] == 1
    assert found["hours"] == pytest.approx((3.9 + 1.9) / 3600)
    assert found["episodes_per_hour"] == pytest.approx(3600 / 5.8)
    low, high = found["frame_rate_interval"]
    # Two drives say little, however many frames they have.
    assert low < 2 / 60 < high and high > 0.6
    assert found["kept"] is True


def test_confirmation_counts(tmp_path: Path) -> None:
    drive = make_dataset(tmp_path / "drive", "." * 10 + "o" + "." * 9)
    detector = make_detector(threshold=0.1, confirm_count=2, confirm_s=0.5)
    found = realised_rates(detector, [drive], progress=False)
    assert found["frame_rate"] == pytest.approx(1 / 20)
    assert (found["alarm_rate"], found["episodes"], found["stretch_rate"]) == (0.0, 0, None)


def test_a_broken_promise_is_said(tmp_path: Path) -> None:
    sources = [make_dataset(tmp_path / f"d{n}", "oooooo") for n in range(4)]
    found = realised_rates(make_detector(threshold=0.1), sources, progress=False)
    assert found["frame_rate"] == 1.0 and found["kept"] is False


def test_drives_are_those_that_labels_name(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "set", "......")
    path = root / "labels.json"
    labels = json.loads(path.read_text())
    for number, row in enumerate(labels.values()):
        row["drive"] = f"d{number // 2}"
    path.write_text(json.dumps(labels))
    assert realised_rates(make_detector(), [root], progress=False)["drives"] == 3


def test_refuses(tmp_path: Path) -> None:
    drive = make_dataset(tmp_path / "drive", "...")
    with pytest.raises(CalibrationError, match="found no calibration"):
        realised_rates(make_detector(calibrated=False), [drive], progress=False)
    with pytest.raises(InputError, match="expected sources and episode_s > 0"):
        realised_rates(make_detector(), [], progress=False)
    with pytest.raises(InputError, match="episode_s > 0"):
        realised_rates(make_detector(), [drive], episode_s=0.0, progress=False)
