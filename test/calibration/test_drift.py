"""Drift: three unusual windows in a row, whatever happens to clocks and tracks in between."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
from worlds.colours import make_detector, street

from semantic_anomaly.calibration.drift import DriftCheck
from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.structures import Frame

# The 90th percentile of all is 0.5; one drive has 2 of 10 frames above it, the other none.
DRIVES = (np.array([0.5] * 8 + [0.9] * 2), np.array([0.1] * 10))
WINDOW = 10


def window(above: int) -> list[float]:
    return [1.0] * above + [0.0] * (WINDOW - above)


def drifts(*shares: int) -> list[bool]:
    """Return whether there is drift after each window with so many frames above the level."""
    check = DriftCheck(DRIVES, WINDOW)
    states = []
    for above in shares:
        begins = [check.add(score) for score in window(above)]
        was = bool(states) and states[-1]
        assert any(begins) == (check.is_drift and not was), "it begins once"
        states.append(check.is_drift)
    return states


def test_level_and_share_come_from_the_drives() -> None:
    check = DriftCheck(DRIVES, WINDOW)
    assert check.level == pytest.approx(0.54) and check.largest_share == 0.2


def test_three_windows_in_a_row_with_more_than_any_drive_are_drift() -> None:
    assert drifts(3, 3, 3) == [False, False, True]
    assert drifts(2, 2, 2, 2) == [False] * 4, "as many as a calibration drive are usual"
    assert drifts(3, 3, 2, 3, 3, 3) == [False] * 5 + [True]
    assert drifts(9, 9, 9, 9, 0, 9) == [False, False, True, True, False, False]


def test_a_window_that_is_not_full_says_nothing() -> None:
    check = DriftCheck(DRIVES, WINDOW)
    for score in [1.0] * (3 * WINDOW - 1):
        check.add(score)
    assert not check.is_drift
    assert check.add(1.0) and check.is_drift
    check.clear()
    assert not check.is_drift


def test_the_detector_says_once_that_the_road_is_another_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    detector = make_detector(drift_window=10)
    results = []
    for number in range(31):
        if number == 17:
            detector.reset()  # a jump of the clock neither triggers nor hides it
        results.append(detector.detect(street(number, odd=True)))
    assert [result.drift for result in results] == [False] * 29 + [True] * 2
    assert caplog.text.count("recalibrate with drives like this") == 1
    detector.reset(drift=True)
    assert not detector.is_drift


def reset(detector: AnomalyDetector, stamp_ns: int) -> int:
    detector.reset()
    return stamp_ns


def cover(detector: AnomalyDetector, stamp_ns: int) -> int:
    for number in range(25):
        black = Frame(np.zeros((72, 128, 3), np.uint8), stamp_ns + number)
        assert detector.detect(black).blind
    return stamp_ns


def change_threshold(detector: AnomalyDetector, stamp_ns: int) -> int:
    detector.update(detector.settings.replace(threshold=2.0))
    return stamp_ns


FAULTS: dict[str, Callable[[AnomalyDetector, int], int]] = {
    "gap": lambda detector, stamp_ns: stamp_ns + 3600 * 10**9,
    "jump back": lambda detector, stamp_ns: stamp_ns - 3600 * 10**9,
    "late frame": lambda detector, stamp_ns: stamp_ns - 3 * 10**8,
    "equal stamp": lambda detector, stamp_ns: stamp_ns - 10**8,
    "reset of the tracks": reset,
    "covered camera": cover,
    "another threshold": change_threshold,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("odd", [True, False])
def test_faults_neither_trigger_nor_hide_drift(fault: str, odd: bool) -> None:
    detector, results, stamp_ns = make_detector(drift_window=10), [], 0
    for number in range(40):
        stamp_ns += 10**8
        # In the middle of a window, and while there is drift.
        if number in (7, 17, 34):
            stamp_ns = FAULTS[fault](detector, stamp_ns)
        image = street(2000 + number, odd=odd).image
        results.append(detector.detect(Frame(image, stamp_ns)).drift)
        assert detector.is_drift_known == (number >= 29)
    assert results == [odd and number >= 29 for number in range(40)]


def test_a_reload_goes_on_with_the_check_of_an_equal_calibration() -> None:
    before = make_detector(drift_window=10)
    for number in range(35):
        before.detect(street(number, odd=True))
    same, other = make_detector(drift_window=10), make_detector(drift_window=10, frames=29)
    for detector in (same, other, make_detector(calibrated=False), make_detector(drift_window=11)):
        detector.continue_drift(before)
        assert detector.is_drift == detector.is_drift_known == (detector is same)


def test_the_same_road_is_no_drift(caplog: pytest.LogCaptureFixture) -> None:
    detector = make_detector(drift_window=20)
    with caplog.at_level(logging.WARNING):
        assert not any(detector.detect(street(2000 + n)).drift for n in range(60))
    assert "recalibrate" not in caplog.text


def test_without_a_calibration_there_is_no_drift() -> None:
    detector = make_detector(calibrated=False, drift_window=10)
    assert not any(detector.detect(street(n, odd=True)).drift for n in range(31))
