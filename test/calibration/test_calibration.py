"""P-values, thresholds, warnings, and the conditions under which a calibration holds."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from worlds.calibrations import RIGHT_HALF, fitted, index_of

from semantic_anomaly.calibration.conformal import Episodes
from semantic_anomaly.errors import CalibrationError, MismatchError, ModelOutputError
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.settings import Settings


def steps(count: int) -> np.ndarray:
    """Return count scores 1/1000, 2/1000, ..., shuffled."""
    return np.random.default_rng(1).permutation(np.arange(1, count + 1) / 1000)


def test_thresholds_of_other_rates_and_confidences() -> None:
    calibration = fitted(steps(100), 0.1)
    assert calibration.threshold == 0.090
    assert calibration.threshold_for(0.01) == 0.099
    assert calibration.threshold_for(0.001) == 0.1
    four = fitted(np.arange(40) / 40, 0.1, drives=4)
    assert four.threshold == four.threshold_for(0.1, 0.8) == 38 / 40
    assert four.threshold_for(0.1, 0.4) == 18 / 40
    with pytest.raises(CalibrationError, match=r"0\.9 needs at least 9 .* drives, found 4"):
        four.threshold_for(0.1, 0.9)


@pytest.mark.parametrize(
    ("score", "expected", "reason"),
    [
        (0.5, 0.0, "above all"),
        (0.0, 1.0, "below all"),
        (0.4, 3 / 10, "ties count as at least as high: three of 0.4"),
        (0.4000001, 0.0, "just above the ties"),
        (0.15, 5 / 10, "between scores: two of 0.2 and three of 0.4"),
    ],
)
def test_p_value_of_one_drive_is_a_share(score: float, expected: float, reason: str) -> None:
    calibration = fitted([0.4, 0.1, 0.2, 0.4, 0.1, 0.1, 0.4, 0.2, 0.1, 0.1])
    assert calibration.p_value(score) == pytest.approx(expected, abs=1e-12)


def test_p_value_of_several_drives_is_that_of_the_rank_of_the_threshold() -> None:
    # Shares of the drives at least as high as 0.25: 0, 1/2 and 1.
    calibration = fitted([0.1, 0.2, 0.2, 0.3, 0.3, 0.4], drives=3)
    assert calibration.p_value(0.25) == 1.0, "the highest of the default"
    assert calibration.p_value(0.25, 0.5) == 0.5
    assert calibration.p_value(0.25, 0.25) == 0.0
    assert fitted([0.1, 0.2, 0.2, 0.3, 0.3, 0.4], drives=3, confidence=0.5).p_value(0.25) == 0.5


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_p_value_refuses_scores_that_are_not_finite(score: float) -> None:
    with pytest.raises(ModelOutputError, match="finite number"):
        fitted(steps(20)).p_value(score)


def test_score_exceeds_the_threshold_exactly_when_its_p_value_is_at_most_the_rate(
    rng: np.random.Generator,
) -> None:
    for _ in range(40):
        rate = float(rng.choice([0.05, 0.07, 0.1, 0.29, 0.5]))
        drives = int(rng.integers(1, 7))
        confidence = float(rng.choice([0.0, 0.5])) if drives > 1 else 0.0
        # Few distinct values, so that ties are common.
        scores = rng.integers(1, 30, rng.integers(20, 120)) / 30
        calibration = fitted(scores, rate, drives=drives, confidence=confidence)
        for score in rng.integers(1, 31, 20) / 30:
            exceeds = score > calibration.threshold
            assert exceeds == (calibration.p_value(score) <= rate)


@pytest.mark.parametrize(
    ("count", "rate", "drives", "confidence", "expected"),
    [
        (500, 0.1, 3, 0.0, ["3 calibration drives: .* with probability 3/4; 9 drives give 0.9"]),
        (500, 0.1, 9, 0.0, []),
        (500, 0.1, 3, 0.5, []),
        (900, 0.01, 9, 0.0, []),
        (899, 0.01, 9, 0.0, ["1 of 9 calibration drives have fewer than the 100 frames .*drive_8"]),
        (
            9,
            0.1,
            1,
            0.0,
            ["nothing is promised beyond drive 'drive_0'", "fewer than the 10 frames"],
        ),
    ],
)
def test_warnings(
    count: int, rate: float, drives: int, confidence: float, expected: list[str]
) -> None:
    scores = np.linspace(0.1, 0.2, count)
    warnings = fitted(scores, rate, drives=drives, confidence=confidence).warnings
    assert len(warnings) == len(expected)
    for warning, pattern in zip(warnings, expected, strict=True):
        assert re.search(pattern, warning)


@pytest.mark.parametrize(
    ("drives", "confidence", "left_out", "expected"),
    [
        (
            7,
            0.0,
            [],
            "on a new drive like these 7, at most 1 % of the frames are above the threshold, with "
            "probability 7/8",
        ),
        (
            9,
            0.65,
            ["drive_3"],
            "estimated by leaving one drive out: on a new drive like these 9, at most 1 % of the "
            "frames are above the threshold, with probability 7/10",
        ),
        (
            1,
            0.0,
            ["drive_0"],
            "nothing is promised beyond drive 'drive_0': calibrate with at least 2 drives, with 9 "
            "for a probability of 0.9",
        ),
    ],
)
def test_the_promise_in_one_sentence(
    drives: int, confidence: float, left_out: list[str], expected: str
) -> None:
    calibration = fitted(
        steps(100 * drives), 0.01, drives=drives, confidence=confidence, left_out=left_out
    )
    assert calibration.promise == expected
    settings = calibration.resolve(Settings())
    assert calibration.promise_of(settings) == expected
    if drives > 1:
        other = calibration.promise_of(settings.replace(target_false_alarm_rate=0.2))
        assert "at most 20 % of the frames" in other
    assert [drive.name for drive in calibration.drives if drive.left_out] == left_out


@pytest.mark.parametrize(
    ("scores", "drives", "more", "message"),
    [
        ([], 1, {}, r"calibration drive 'drive_0': expected scores .* found \(0,\)"),
        ([0.1], 2, {}, r"calibration drive 'drive_1': .* found \(0,\)"),
        ([0.1] * 20 + [float("nan")], 1, {}, "finite"),
        ([0.1] * 20 + [float("-inf")], 1, {}, "finite"),
        ([0.1] * 20, 8, {"confidence": 0.9}, "needs at least 9 .* drives, found 8"),
        ([0.1] * 20, 1, {"heatmap_low": float("nan")}, "heatmap_low: expected a finite number"),
    ],
)
def test_impossible_scores_are_refused(
    scores: list[float], drives: int, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        fitted(scores, drives=drives, **more)


def test_drives_have_distinct_names() -> None:
    calibration = fitted(steps(20), drives=2)
    for drives in ((), calibration.drives[:1] * 2):
        with pytest.raises(CalibrationError, match="expected drives of distinct names"):
            replace(calibration, drives=drives)


def test_settings_take_rate_and_confidence_of_the_calibration_unless_set() -> None:
    calibration = fitted(np.arange(40) / 40, 0.25, drives=4, confidence=0.5)
    resolved = calibration.resolve(Settings())
    assert (resolved.target_false_alarm_rate, resolved.confidence) == (0.25, 0.5)
    assert calibration.threshold_of(resolved) == calibration.threshold == 27 / 40
    own = Settings(target_false_alarm_rate=0.1, confidence=0.75)
    assert calibration.resolve(own) == own
    assert calibration.threshold_of(own) == 38 / 40


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
    assert calibration.p_value(-0.5) == 0.0
    scale = calibration.scale(calibration.threshold)
    assert (scale.low, scale.high) == (-4.0, calibration.threshold)


def test_check_accepts_the_same_conditions_and_any_live_setting() -> None:
    fitted(steps(20)).check(index_of(), Settings(threshold=0.5, search="exact"), RIGHT_HALF)


@pytest.mark.parametrize(
    ("index", "changes", "roi", "named"),
    [
        (index_of("0" * 64), {}, RIGHT_HALF, "index fingerprint"),
        (index_of(stages=2), {}, RIGHT_HALF, "score normalisations: expected 1, found 2"),
        (index_of(), {"neighbours": 2}, RIGHT_HALF, "'neighbours': expected 1, found 2"),
        (index_of(), {}, RegionOfInterest(), "region of interest"),
    ],
)
def test_check_names_what_differs(
    index: Any, changes: dict[str, Any], roi: RegionOfInterest, named: str
) -> None:
    with pytest.raises(MismatchError, match=named):
        fitted(steps(20)).check(index, Settings(**changes), roi)


def test_scores_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        fitted(steps(20)).drives[0].scores[0] = 0.0


def test_the_larger_threshold_of_frames_and_episodes_is_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    episodes = Episodes((np.linspace(0.09, 0.89, 9),), 1.0, 1, 1.0, 1.0, 0.3)
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


def test_the_promise_names_drives_that_are_too_short() -> None:
    short = fitted(np.linspace(0.1, 0.2, 45), 0.05, drives=3)
    assert short.promise.endswith(
        "; 3 of these drives have fewer than 20 frames, too few to show it"
    )
    assert "fewer" not in fitted(np.linspace(0.1, 0.2, 60), 0.05, drives=3).promise
