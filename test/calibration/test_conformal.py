"""Ranks and confirmed maxima computed by hand, and the realised rates by simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.colours import make_detector, street

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.calibration.conformal import (
    Episodes,
    conformal_threshold,
    drive_rank,
    drives_needed,
    frames_needed,
    p_value,
)
from semantic_anomaly.cli import main
from semantic_anomaly.detection.tracking import ComponentTracker
from semantic_anomaly.errors import CalibrationError, MismatchError
from semantic_anomaly.io.images import write_image
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import ComponentState, Decision

PERIOD_NS = 100_000_000


@pytest.mark.parametrize(
    ("count", "rate", "rank", "reason"),
    [
        (100, 0.01, 99, "one of a hundred may exceed"),
        (99, 0.01, 99, "no whole frame: the largest"),
        (199, 0.01, 198, "ceil(199 * 0.99) = ceil(197.01)"),
        (100, 0.07, 93, "100 * 0.93 is whole, though not in floating point"),
        (100, 0.29, 71, "100 * 0.71 is whole, though not in floating point"),
        (99, 0.5, 50, "the median"),
        (1, 0.5, 1, "a single score"),
    ],
)
def test_the_quantile_of_a_drive_is_the_score_of_that_rank(
    count: int, rate: float, rank: int, reason: str
) -> None:
    assert conformal_threshold([np.arange(1.0, count + 1)], rate, 0.0) == rank


@pytest.mark.parametrize(
    ("drives", "confidence", "rank"),
    [
        (1, 0.0, 1),
        (7, 0.0, 7),
        (9, 0.0, 9),
        (19, 0.0, 18),
        (1, 0.5, 1),
        (3, 0.5, 2),
        (4, 0.8, 4),
        (9, 0.9, 9),
        (9, 0.7, 7),
        (99, 0.93, 93),
    ],
)
def test_the_threshold_is_the_quantile_of_the_drive_of_that_rank(
    drives: int, confidence: float, rank: int
) -> None:
    assert drive_rank(drives, confidence) == rank
    # Drive n has the quantile n, and they are given in another order.
    scores = [np.array([0.0, number, 1000.0]) for number in range(drives, 0, -1)]
    assert conformal_threshold(scores, 0.4, confidence) == rank


@pytest.mark.parametrize(
    ("confidence", "needed"), [(0.9, 9), (0.5, 1), (0.8, 4), (0.75, 3), (0.99, 99), (0.93, 14)]
)
def test_one_drive_too_few_is_refused_with_the_number_needed(
    confidence: float, needed: int
) -> None:
    assert drives_needed(confidence) == needed
    assert drive_rank(needed, confidence) == needed
    message = f"at least {needed} nominal calibration drives, found {needed - 1}$"
    with pytest.raises(CalibrationError, match=message):
        conformal_threshold([np.zeros(5)] * (needed - 1), 0.1, confidence)


@pytest.mark.parametrize(("rate", "needed"), [(0.01, 100), (0.3, 4), (0.07, 15), (0.5, 2)])
def test_a_rate_needs_so_many_frames_to_be_seen(rate: float, needed: int) -> None:
    assert frames_needed(rate) == needed
    scores = np.arange(float(needed))
    assert conformal_threshold([scores], rate, 0.0) < scores[-1]
    assert conformal_threshold([scores[1:]], rate, 0.0) == scores[-1]


@pytest.mark.parametrize(
    ("drives", "confidence", "promised"),
    [(3, 0.0, 3 / 4), (7, 0.0, 7 / 8), (9, 0.9, 9 / 10), (9, 0.6, 6 / 10), (4, 0.5, 3 / 5)],
)
def test_new_drives_keep_the_rate_with_the_stated_probability(
    drives: int, confidence: float, promised: float
) -> None:
    # Frames of a drive share an offset and a spread: pooled frames would promise far too much.
    rng, draws, frames, rate = np.random.default_rng(7), 3000, 40, 0.1
    offsets, spreads = rng.normal(0.0, 1.0, (2, draws, drives + 1, 1))
    noise = rng.standard_normal((draws, drives + 1, frames))
    scores = np.sort(offsets + np.exp(spreads) * noise, axis=-1)
    thresholds = [conformal_threshold(list(draw[:-1]), rate, confidence) for draw in scores]
    realised = (scores[:, -1] > np.array(thresholds)[:, None]).mean(axis=1)
    # For continuous exchangeable quantiles the probability is exact. Four standard errors.
    error = np.sqrt(promised * (1 - promised) / draws)
    assert np.mean(realised <= rate) == pytest.approx(promised, abs=4 * error)


@pytest.mark.parametrize("confidence", [0.0, 0.4, 0.5, 0.66])
def test_a_score_exceeds_a_threshold_exactly_when_its_p_value_is_at_most_the_rate(
    rng: np.random.Generator, confidence: float
) -> None:
    for _ in range(60):
        rate = float(rng.choice([0.01, 0.05, 0.07, 0.1, 0.29, 0.5, 0.93]))
        # Few distinct values, so that ties are common; drives of unequal length.
        drives = [
            np.sort(rng.integers(1, 30, rng.integers(1, 120)) / 30)
            for _ in range(rng.integers(2, 8))
        ]
        threshold = conformal_threshold(drives, rate, confidence)
        for score in rng.integers(0, 32, 20) / 30:
            of_score = p_value(drives, score, confidence)
            assert 0.0 <= of_score <= 1.0
            assert (score > threshold) == (of_score <= rate)


def settings(**changes: Any) -> Settings:
    return Settings(**{"target_episode_rate": 0.25, "episode_s": 1.0, **changes})


def episodes(scores: list[float], periods: list[int] | None = None, **changes: Any) -> Episodes:
    """Return the episodes of a drive with a frame every 0.1 s, or at these multiples of it."""
    stamps = [number * PERIOD_NS for number in periods or range(len(scores))]
    return Episodes.of_drives({"a": {"a": (scores, stamps)}}, settings(**changes))


def maxima(episodes: Episodes) -> list[float]:
    """Return the scores of the episodes of the only drive."""
    [scores] = episodes.scores_by_drive
    return scores.tolist()


def test_an_episode_has_its_largest_score() -> None:
    # The rest at the end is no episode, nor is a drive that is shorter than one.
    scores = [0.1] * 9 + [0.3] + [0.2] * 10 + [0.4] + [0.1] * 9 + [0.9] * 8
    assert maxima(episodes(scores)) == [0.2, 0.3, 0.4]
    assert episodes([*scores, 0.9]).count == 4, "nine tenths count as complete"
    with pytest.raises(CalibrationError, match="expected complete episodes of a drive, found none"):
        episodes([0.1] * 8)


def test_a_confirmed_score_is_reached_by_enough_frames() -> None:
    # The spike of one frame is never confirmed, the two of 0.3 are, 0.2 s apart.
    scores = [0.1, 0.9, 0.1, 0.3, 0.1, 0.3, 0.1, 0.1, 0.1, 0.1] * 3
    assert maxima(episodes(scores, confirm_count=2, confirm_s=0.2)) == [0.3] * 3
    assert maxima(episodes(scores, confirm_count=2, confirm_s=0.1)) == [0.1] * 3


def test_frames_with_gaps_are_judged_by_their_stamps() -> None:
    periods = [0, 1, 20, 21, 22, 40, 41, 58, 59]
    scores = [0.1, 0.2, 0.3, 0.4, 0.1, 0.5, 0.2, 0.1, 0.6]
    assert maxima(episodes(scores, periods)) == [0.2, 0.4, 0.5, 0.6]
    assert maxima(episodes(scores, periods, confirm_count=2)) == [0.1, 0.1, 0.2, 0.3]


def test_a_confirmed_score_lasts_while_it_is_detected_again() -> None:
    # Detected three times, then once a second: confirmed throughout, as by the tracker.
    scores = [0.1] * 60
    for number in (10, 11, 12, 22, 32, 42):
        scores[number] = 0.9
    three = {"confirm_count": 3, "confirm_s": 1.0, "episode_s": 1.0}
    assert maxima(episodes(scores, silence_s=1.0, **three)) == [0.1, 0.1, *[0.9] * 4]
    assert maxima(episodes(scores, silence_s=0.5, **three)) == [*[0.1] * 5, 0.9]
    tracker = ComponentTracker(3, 1.0, 1.0)
    box = np.array([[0.0, 0.0, 9.0, 9.0]])
    for number, score in enumerate(scores):
        tracks = tracker.update(number * PERIOD_NS, box if score > 0.5 else box[:0])
        confirmed = any(track.state is ComponentState.CONFIRMED for track in tracks)
        assert confirmed == (number in (12, 22, 32, 42)), number


@pytest.mark.parametrize(
    ("scores", "periods", "changes", "message"),
    [
        ([0.1] * 3, [0, 20, 9], {}, "drive 'a': expected stamps that go back by at most 1 s"),
        (
            [0.1] * 40,
            list(range(0, 400, 10)),
            {"confirm_count": 3, "episode_s": 4.0},
            "drive 'a': expected frames so close that 3",
        ),
    ],
)
def test_drives_with_unsuitable_stamps_are_refused(
    scores: list[float], periods: list[int], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        episodes(scores, periods, **changes)


def test_parts_of_a_drive_are_one_drive_and_have_times_of_their_own() -> None:
    parts = {
        # Equal stamps: parts of different files begin anew.
        "run[0:15]": ([0.1] * 9 + [0.5] + [0.9] * 5, [n * PERIOD_NS for n in range(15)]),
        "run[15:]": ([0.9, 0.1] * 5, [n * PERIOD_NS for n in range(10)]),
    }
    other = {"other": ([0.2] * 20, [n * PERIOD_NS for n in range(20)])}
    short = {"short": ([0.3] * 5, [n * PERIOD_NS for n in range(5)])}
    running = settings(confirm_count=2, confirm_s=0.1)
    calibrated = Episodes.of_drives({"run": parts, "other": other, "short": short}, running)
    # The rest of a part is no episode, nor confirms the next part; a drive without any is none.
    assert [scores.tolist() for scores in calibrated.scores_by_drive] == [[0.1, 0.1], [0.2, 0.2]]
    assert calibrated.count == 4
    bad = {**parts, "run[15:]": ([0.1, 0.2], [5 * 10**9, 0])}
    with pytest.raises(CalibrationError, match=r"drive 'run\[15:\]': .* a jump back at frame 1"):
        Episodes.of_drives({"run": bad}, running)


def test_late_and_equal_stamps_give_the_same_episodes() -> None:
    scores = [number / 100 for number in range(40)]
    swapped = [number ^ 1 for number in range(40)]
    expected = episodes(scores, confirm_count=2).scores_by_drive[0]
    late = episodes(
        [scores[number] for number in swapped], swapped, confirm_count=2
    ).scores_by_drive[0]
    np.testing.assert_array_equal(late, expected)
    assert len(episodes(scores, [number // 2 * 2 for number in range(40)]).scores_by_drive[0]) == 4


def test_threshold_of_episodes() -> None:
    calibrated = episodes([number / 100 for number in range(90)], target_episode_rate=0.3)
    running = settings(target_episode_rate=0.3)
    # Of the 9 maxima .09, .19, ... .89, two may exceed.
    assert calibrated.threshold(running) == pytest.approx(0.69)
    assert calibrated.threshold_for(0.4, 0.0) == pytest.approx(0.59)
    for name in ("confirm_count", "silence_s", "episode_s"):
        with pytest.raises(MismatchError, match=name):
            calibrated.threshold(running.replace(**{name: 2}))
    with pytest.raises(CalibrationError, match="needs at least 9 nominal calibration drives"):
        calibrated.threshold(running.replace(confidence=0.9))


def test_new_drives_keep_the_rate_of_episodes() -> None:
    rng = np.random.default_rng(3)
    running = settings(target_episode_rate=0.2, episode_s=0.2)
    stamps = [number * PERIOD_NS for number in range(40)]
    kept = []
    for _ in range(150):
        drives = rng.normal(0.0, 1.0, (5, 1)) + rng.random((5, 40))
        parts = [{"a": (scores.tolist(), stamps)} for scores in drives]
        calibrated = Episodes.of_drives(dict(zip("abcd", parts[:4], strict=True)), running)
        [new] = Episodes.of_drives({"new": parts[4]}, running).scores_by_drive
        kept.append(np.mean(new > calibrated.threshold(running)) <= 0.2)
    # Four of five drives. Four standard errors.
    assert np.mean(kept) == pytest.approx(0.8, abs=4 * 0.4 / np.sqrt(150))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores_by_drive": ()}, "found none"),
        ({"scores_by_drive": (np.zeros(0),)}, r"found \(0,\) float64"),
        ({"scores_by_drive": (np.zeros(3, np.float32),)}, r"found \(3,\) float32"),
        ({"scores_by_drive": (np.zeros(3), np.array([0.2, 0.1]))}, "ascending"),
        ({"scores_by_drive": (np.array([0.1, np.nan]),)}, "ascending"),
        ({"episode_s": 0.0}, "lengths"),
        ({"confirm_s": float("nan")}, "lengths"),
        ({"silence_s": float("inf")}, "lengths"),
        ({"confirm_count": 0}, "confirm_count"),
        ({"target_episode_rate": 0.0}, "a rate"),
    ],
)
def test_impossible_episodes_are_refused(changes: dict[str, Any], message: str) -> None:
    values = {
        **{"scores_by_drive": (np.linspace(0, 1, 20),), "episode_s": 10.0, "confirm_count": 1},
        **{"confirm_s": 1.0, "silence_s": 1.0, "target_episode_rate": 0.1, **changes},
    }
    with pytest.raises(CalibrationError, match=message):
        Episodes(**values)


def test_the_command_calibrates_episodes_and_checks_them(
    tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for name, first in {"index": 0, "a": 100, "b": 200, "c": 300}.items():
        for number in range(10):
            noise = rng.integers(-40, 40, (72, 128, 3))
            image = np.clip(street(first + number).image + noise, 0, 255).astype(np.uint8)
            write_image(tmp_path / name / f"{number:03d}.png", image)
    index, a, b, c = (str(tmp_path / name) for name in ("built", "a", "b", "c"))
    options = ["--set", "input_size=128", "--backbone", str(tiny_backbone)]
    assert main(["build-index", str(tmp_path / "index"), "--out", index, *options]) == 0
    rates = ["--target-false-alarm-rate", "0.1", "--target-episode-rate", "0.2"]
    assert main(["calibrate", index, a, b, *rates, "--episode-s", "0.5", *options]) == 0
    output = capsys.readouterr().out
    assert "0.2 of episodes of 0.5 s" in output and "nominal episodes" in output
    calibrated = Calibration.load(Path(index)).episodes
    assert calibrated is not None and calibrated.count == 4
    assert main(["calibrate", index, c, "--check", *options]) == 0
    output = capsys.readouterr().out
    assert "2 complete episodes of 0.5 s" in output and "target 0.2" in output
    for refused, message in (
        ([a, *rates], "those of the calibration"),
        ([a, "--confidence", "0.5"], "those of the calibration"),
        ([a, "--leave-one-drive-out"], "no drives of the index"),
        ([a, "--source", "/old=/new"], "no drives of the index"),
        ([], "expected further nominal drives as SOURCE, found none"),
    ):
        assert main(["calibrate", index, *refused, "--check", *options]) == 2
        assert message in capsys.readouterr().err


def test_confirmed_scores_agree_with_the_detector() -> None:
    # Spikes of one frame raise no alarm where two are needed, whatever their scores.
    detector = make_detector(confirm_count=2, confirm_s=0.15)
    frames = [street(seed, odd=seed in (3, 7, 8)) for seed in range(15)]
    results = [detector.detect(frame) for frame in frames]
    alarms = [n for n, result in enumerate(results) if result.decision is Decision.ANOMALY]
    confirmed = episodes(
        [result.score for result in results],
        **{"episode_s": 0.5, "confirm_count": 2, "confirm_s": 0.15, "target_episode_rate": 0.4},
    )
    assert alarms == [8]
    assert [score > detector.threshold for score in maxima(confirmed)] == [False, False, True]
