"""Ranks and p-values by hand, and the promised rate by simulation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.calibration.conformal import scores_needed
from semantic_anomaly.errors import CalibrationError, MismatchError, ModelOutputError
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.normalisation import CELLS_HW, ScoreNormalisation
from semantic_anomaly.settings import Settings

FINGERPRINT = "f" * 64
RIGHT_HALF = RegionOfInterest(((0.5, 0.0), (1.0, 0.0), (1.0, 1.0), (0.5, 1.0)))


def usual() -> ScoreNormalisation:
    mean = np.linspace(0.01, 0.2, CELLS_HW[0] * CELLS_HW[1], dtype=np.float32).reshape(CELLS_HW)
    return ScoreNormalisation(mean, mean / 3)


def fitted(
    scores: Any, rate: float = 0.1, *, drives: int = 1, roi: RegionOfInterest | None = None
) -> Calibration:
    scores = np.asarray(scores, np.float64)
    parts = np.array_split(scores, drives)
    return Calibration.fit(
        {f"drive_{number}": part.tolist() for number, part in enumerate(parts)},
        heatmap_low=0.05,
        index=SimpleNamespace(fingerprint=FINGERPRINT),
        settings=Settings(target_false_alarm_rate=rate),
        roi=roi or RegionOfInterest(),
        camera="camera",
        dtype="float32",
        normalisations={"grid": usual()},
    )


def steps(count: int) -> np.ndarray:
    """Return count scores 1/1000, 2/1000, ..., shuffled."""
    return np.random.default_rng(1).permutation(np.arange(1, count + 1) / 1000)


@pytest.mark.parametrize(
    ("count", "rate", "rank", "reason"),
    [
        (99, 0.01, 99, "exactly the minimum: the largest"),
        (100, 0.01, 100, "ceil(101 * 0.99) = ceil(99.99)"),
        (198, 0.01, 198, "ceil(199 * 0.99) = ceil(197.01)"),
        (199, 0.01, 198, "200 * 0.99 is whole"),
        (999, 0.001, 999, "exactly the minimum"),
        (19, 0.05, 19, "exactly the minimum"),
        (9, 0.1, 9, "exactly the minimum"),
        (39, 0.05, 38, "40 * 0.95 is whole"),
        (99, 0.07, 93, "100 * 0.93 is whole, though not in floating point"),
        (99, 0.29, 71, "100 * 0.71 is whole, though not in floating point"),
        (99, 0.5, 50, "the median"),
        (1, 0.5, 1, "a single score"),
    ],
)
def test_threshold_is_the_score_of_that_rank(
    count: int, rate: float, rank: int, reason: str
) -> None:
    assert fitted(steps(count), rate).threshold == pytest.approx(rank / 1000, abs=1e-12)


@pytest.mark.parametrize(
    ("rate", "needed"), [(0.01, 99), (0.001, 999), (0.05, 19), (0.1, 9), (0.3, 3), (0.07, 14)]
)
def test_one_score_too_few_is_refused_with_the_number_needed(rate: float, needed: int) -> None:
    assert scores_needed(rate) == needed
    assert fitted(steps(needed), rate).threshold == needed / 1000
    with pytest.raises(CalibrationError, match=f"at least {needed} .*found {needed - 1}$"):
        fitted(steps(needed - 1), rate)


def test_another_rate_is_served_as_far_as_the_scores_reach() -> None:
    calibration = fitted(steps(99), 0.1)
    assert calibration.threshold_for(0.01) == 0.099
    assert calibration.threshold_for(0.2) == 0.080
    with pytest.raises(CalibrationError, match="needs at least 999"):
        calibration.threshold_for(0.001)


@pytest.mark.parametrize(
    ("score", "expected", "reason"),
    [
        (0.5, 1 / 11, "above all: never zero"),
        (0.0, 11 / 11, "below all"),
        (0.4, 4 / 11, "ties count as at least so high: three of 0.4"),
        (0.4000001, 1 / 11, "just above the ties"),
        (0.2, 6 / 11, "two of 0.2 and three of 0.4"),
        (0.15, 6 / 11, "between scores"),
        (0.1, 11 / 11, "five of the lowest"),
    ],
)
def test_p_value_is_a_rank(score: float, expected: float, reason: str) -> None:
    calibration = fitted([0.4, 0.1, 0.2, 0.4, 0.1, 0.1, 0.4, 0.2, 0.1, 0.1])
    assert calibration.p_value(score) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), float("-inf")])
def test_p_value_refuses_what_is_no_score(score: float) -> None:
    with pytest.raises(ModelOutputError, match="finite number"):
        fitted(steps(20)).p_value(score)


def test_score_exceeds_the_threshold_exactly_when_its_p_value_is_at_most_the_rate(
    rng: np.random.Generator,
) -> None:
    for _ in range(100):
        rate = float(rng.choice([0.05, 0.07, 0.1, 0.29, 0.5]))
        # Few distinct values, so that ties are common.
        calibration = fitted(rng.integers(1, 30, rng.integers(20, 120)) / 30, rate)
        for score in rng.integers(1, 31, 20) / 30:
            exceeds = score > calibration.threshold
            assert exceeds == (calibration.p_value(score) <= rate)


@pytest.mark.parametrize(("count", "rate"), [(19, 0.05), (60, 0.05), (99, 0.1), (30, 0.25)])
def test_realised_rate_is_at_most_the_target_on_average(count: int, rate: float) -> None:
    # For continuous exchangeable scores the expected rate is floor((n + 1) alpha) / (n + 1).
    rng = np.random.default_rng(7)
    scores = rng.gamma(2.0, 0.05, (2000, count + 1))
    alarms = [row[-1] > fitted(row[:-1].clip(0, 2), rate).threshold for row in scores]
    expected = np.floor((count + 1) * rate) / (count + 1)
    assert expected <= rate
    # Four standard errors of 2000 draws.
    assert np.mean(alarms) == pytest.approx(expected, abs=4 * np.sqrt(rate / 2000))


def test_p_values_of_nominal_scores_are_not_too_small_too_often() -> None:
    rng = np.random.default_rng(8)
    values = []
    for row in rng.gamma(2.0, 0.05, (1000, 40)).clip(0, 2):
        values.append(fitted(row[:-1]).p_value(row[-1]))
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        assert np.mean(np.array(values) <= level) <= level + 4 * np.sqrt(level / 1000)


@pytest.mark.parametrize(
    ("count", "rate", "drives", "expected"),
    [
        (500, 0.1, 1, ["one drive"]),
        (500, 0.1, 3, ["only 3 drives"]),
        (500, 0.1, 5, []),
        (99, 0.01, 5, ["depends on the largest score"]),
        (250, 0.01, 5, ["depends on the two largest scores"]),
        (300, 0.01, 5, []),
        (9, 0.1, 1, ["one drive", "depends on the largest score"]),
    ],
)
def test_warnings(count: int, rate: float, drives: int, expected: list[str]) -> None:
    warnings = fitted(np.linspace(0.1, 0.2, count), rate, drives=drives).warnings
    assert len(warnings) == len(expected)
    for sentence, part in zip(warnings, expected, strict=True):
        assert part in sentence


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "frames of every drive"),
        ({"a": [0.1] * 20, "b": []}, "'b'"),
        ({"a": [0.1] * 20 + [float("nan")]}, "finite"),
        ({"a": [0.1] * 20 + [float("inf")]}, "finite"),
        ({"a": [0.1] * 20 + [-0.1]}, r"\[0, 2\]"),
        ({"a": [0.0] * 50}, "the index has seen these frames"),
    ],
)
def test_scores_that_cannot_be_are_refused(scores: dict[str, list[float]], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        Calibration.fit(
            scores,
            heatmap_low=0.05,
            index=SimpleNamespace(fingerprint=FINGERPRINT),
            settings=Settings(target_false_alarm_rate=0.1),
            roi=RegionOfInterest(),
            camera="camera",
        )


@pytest.mark.parametrize(
    ("threshold", "low", "high", "reason"),
    [
        (0.3, 0.05, 0.3, "typical to threshold"),
        (0.02, 0.0, 0.02, "a threshold set by hand below what is typical"),
        (0.05, 0.0, 0.05, "equal"),
    ],
)
def test_scale(threshold: float, low: float, high: float, reason: str) -> None:
    scale = fitted(steps(20)).scale(threshold)
    assert (scale.low, scale.high) == (low, high)


def test_check_accepts_what_it_was_made_with_and_any_live_setting() -> None:
    calibration = fitted(steps(20), roi=RIGHT_HALF)
    calibration.check(FINGERPRINT, Settings(threshold=0.5, search="exact"), RIGHT_HALF)


@pytest.mark.parametrize(
    ("fingerprint", "changes", "roi", "named"),
    [
        ("0" * 64, {}, RIGHT_HALF, "index fingerprint"),
        (FINGERPRINT, {"neighbours": 2}, RIGHT_HALF, "'neighbours': expected 1, found 2"),
        (FINGERPRINT, {"tail_percent": 2.0}, RIGHT_HALF, "'tail_percent'"),
        (FINGERPRINT, {}, RegionOfInterest(), "region of interest"),
    ],
)
def test_check_names_what_differs(
    fingerprint: str, changes: dict[str, Any], roi: RegionOfInterest, named: str
) -> None:
    with pytest.raises(MismatchError, match=named):
        fitted(steps(20), roi=RIGHT_HALF).check(fingerprint, Settings(**changes), roi)


def test_scores_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        fitted(steps(20)).scores[0] = 0.0


def test_a_threshold_that_nothing_can_exceed_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no anomaly could exceed"):
        fitted(np.append(np.linspace(0.1, 1.0, 30), [2.0] * 10))
