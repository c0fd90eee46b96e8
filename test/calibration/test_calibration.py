"""P-values, thresholds, warnings, and the conditions under which a calibration holds."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from worlds.calibrations import FINGERPRINT, RIGHT_HALF, fitted

from semantic_anomaly.calibration.conformal import Episodes
from semantic_anomaly.errors import CalibrationError, MismatchError, ModelOutputError
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.settings import Settings


def steps(count: int) -> np.ndarray:
    """Return count scores 1/1000, 2/1000, ..., shuffled."""
    return np.random.default_rng(1).permutation(np.arange(1, count + 1) / 1000)


def test_thresholds_of_other_rates_as_far_as_the_scores_suffice() -> None:
    calibration = fitted(steps(99), 0.1)
    assert calibration.threshold == 0.090
    assert calibration.threshold_for(0.01) == 0.099
    with pytest.raises(CalibrationError, match="needs at least 999 nominal calibration frames"):
        calibration.threshold_for(0.001)


@pytest.mark.parametrize(
    ("score", "expected", "reason"),
    [
        (0.5, 1 / 11, "above all: never zero"),
        (0.0, 11 / 11, "below all"),
        (0.4, 4 / 11, "ties count as at least as high: three of 0.4"),
        (0.4000001, 1 / 11, "just above the ties"),
        (0.15, 6 / 11, "between scores: two of 0.2 and three of 0.4"),
    ],
)
def test_p_value_is_a_rank(score: float, expected: float, reason: str) -> None:
    calibration = fitted([0.4, 0.1, 0.2, 0.4, 0.1, 0.1, 0.4, 0.2, 0.1, 0.1])
    assert calibration.p_value(score) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_p_value_refuses_scores_that_are_not_finite(score: float) -> None:
    with pytest.raises(ModelOutputError, match="finite number"):
        fitted(steps(20)).p_value(score)


def test_score_exceeds_the_threshold_exactly_when_its_p_value_is_at_most_the_rate(
    rng: np.random.Generator,
) -> None:
    for _ in range(40):
        rate = float(rng.choice([0.05, 0.07, 0.1, 0.29, 0.5]))
        # Few distinct values, so that ties are common.
        calibration = fitted(rng.integers(1, 30, rng.integers(20, 120)) / 30, rate)
        for score in rng.integers(1, 31, 20) / 30:
            exceeds = score > calibration.threshold
            assert exceeds == (calibration.p_value(score) <= rate)


@pytest.mark.parametrize(
    ("count", "rate", "drives", "expected"),
    [
        (500, 0.1, 3, ["only 3 drives"]),
        (500, 0.1, 5, []),
        (250, 0.01, 5, ["depends on the two largest scores"]),
        (300, 0.01, 5, []),
        (9, 0.1, 1, ["one drive", "depends on the largest score"]),
    ],
)
def test_warnings(count: int, rate: float, drives: int, expected: list[str]) -> None:
    warnings = fitted(np.linspace(0.1, 0.2, count), rate, drives=drives).warnings
    assert len(warnings) == len(expected)
    for warning, part in zip(warnings, expected, strict=True):
        assert part in warning


@pytest.mark.parametrize(
    ("scores", "drives", "message"),
    [
        ([], 1, r"0 in all, found \[\('drive_0', 0\)\]"),
        ([0.1], 2, "'drive_1', 0"),
        ([0.1] * 20 + [float("nan")], 1, "finite"),
        ([0.1] * 20 + [float("-inf")], 1, "finite"),
        ([0.1] * 8, 1, "needs at least 9 nominal calibration frames, found 8"),
    ],
)
def test_impossible_scores_are_refused(scores: list[float], drives: int, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        fitted(scores, drives=drives)


@pytest.mark.parametrize(
    ("threshold", "low", "high", "reason"),
    [
        (0.3, 0.05, 0.3, "typical to threshold"),
        (0.02, -0.98, 0.02, "a threshold set by the user below the typical value"),
        (0.05, -0.95, 0.05, "equal"),
    ],
)
def test_scale(threshold: float, low: float, high: float, reason: str) -> None:
    scale = fitted(steps(20)).scale(threshold)
    assert (scale.low, scale.high) == (low, high)


def test_scores_below_zero_calibrate() -> None:
    calibration = fitted(np.linspace(-3.0, -1.0, 20), heatmap_low=-4.0)
    assert calibration.threshold < 0.0
    assert calibration.p_value(-3.5) == 1.0
    assert calibration.p_value(-0.5) == pytest.approx(1 / 21)
    scale = calibration.scale(calibration.threshold)
    assert (scale.low, scale.high) == (-4.0, calibration.threshold)


def test_check_accepts_the_same_conditions_and_any_live_setting() -> None:
    fitted(steps(20)).check(FINGERPRINT, Settings(threshold=0.5, search="exact"), RIGHT_HALF)


@pytest.mark.parametrize(
    ("fingerprint", "changes", "roi", "named"),
    [
        ("0" * 64, {}, RIGHT_HALF, "index fingerprint"),
        (FINGERPRINT, {"neighbours": 2}, RIGHT_HALF, "'neighbours': expected 1, found 2"),
        (FINGERPRINT, {}, RegionOfInterest(), "region of interest"),
    ],
)
def test_check_names_what_differs(
    fingerprint: str, changes: dict[str, Any], roi: RegionOfInterest, named: str
) -> None:
    with pytest.raises(MismatchError, match=named):
        fitted(steps(20)).check(fingerprint, Settings(**changes), roi)


def test_scores_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        fitted(steps(20)).scores[0] = 0.0


def test_the_larger_threshold_of_frames_and_episodes_is_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    episodes = Episodes(np.linspace(0.09, 0.89, 9), 1.0, 1, 1.0, 1.0, 0.3)
    frames = np.linspace(0.0, 0.89, 90)
    calibration = fitted(frames, 0.5, episodes=episodes)
    settings = Settings(target_false_alarm_rate=0.5, target_episode_rate=0.3, episode_s=1.0)
    assert calibration.threshold_of(settings) == pytest.approx(0.69)
    assert calibration.threshold_of(settings.replace(target_false_alarm_rate=0.02)) > 0.8
    with caplog.at_level(logging.WARNING):
        assert calibration.threshold_of(settings.replace(target_episode_rate=0.0)) < 0.5
    assert "the threshold is that of frames only" in caplog.text
    with pytest.raises(CalibrationError, match="expected a calibration with episodes"):
        fitted(frames, 0.5).threshold_of(settings)
