"""Ranks and confirmed maxima computed by hand, and the realised rates by simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.colours import make_detector, street

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.calibration.conformal import Episodes, conformal_threshold, scores_needed
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
        (99, 0.01, 99, "exactly the minimum: the largest"),
        (198, 0.01, 198, "ceil(199 * 0.99) = ceil(197.01)"),
        (199, 0.01, 198, "200 * 0.99 is whole"),
        (99, 0.07, 93, "100 * 0.93 is whole, though not in floating point"),
        (99, 0.29, 71, "100 * 0.71 is whole, though not in floating point"),
        (99, 0.5, 50, "the median"),
        (1, 0.5, 1, "a single score"),
    ],
)
def test_threshold_is_the_score_of_that_rank(
    count: int, rate: float, rank: int, reason: str
) -> None:
    assert conformal_threshold(np.arange(1.0, count + 1), rate, "frames") == rank


@pytest.mark.parametrize(("rate", "needed"), [(0.01, 99), (0.3, 3), (0.07, 14)])
def test_one_score_too_few_is_refused_with_the_number_needed(rate: float, needed: int) -> None:
    assert scores_needed(rate) == needed
    assert conformal_threshold(np.arange(1.0, needed + 1), rate, "frames") == needed
    with pytest.raises(CalibrationError, match=f"at least {needed} .*frames, found {needed - 1}$"):
        conformal_threshold(np.arange(1.0, needed), rate, "frames")


@pytest.mark.parametrize(("count", "rate"), [(19, 0.05), (60, 0.05), (30, 0.25)])
def test_realised_rate_is_at_most_the_target_on_average(count: int, rate: float) -> None:
    # For continuous exchangeable scores the expected rate is floor((n + 1) alpha) / (n + 1).
    scores = np.random.default_rng(7).gamma(2.0, 0.05, (2000, count + 1))
    alarms = [row[-1] > conformal_threshold(np.sort(row[:-1]), rate, "frames") for row in scores]
    expected = np.floor((count + 1) * rate) / (count + 1)
    assert expected <= rate
    # Four standard errors of 2000 draws.
    assert np.mean(alarms) == pytest.approx(expected, abs=4 * np.sqrt(rate / 2000))


def settings(**changes: Any) -> Settings:
    return Settings(**{"target_episode_rate": 0.25, "episode_s": 1.0, **changes})


def episodes(scores: list[float], periods: list[int] | None = None, **changes: Any) -> Episodes:
    """Return the episodes of a drive with a frame every 0.1 s, or at these multiples of it."""
    stamps = [number * PERIOD_NS for number in periods or range(len(scores))]
    return Episodes.of_drives({"a": scores}, {"a": stamps}, settings(**changes))


def test_an_episode_has_its_largest_score() -> None:
    # The rest at the end is no episode, nor is a drive that is shorter than one.
    scores = [0.1] * 9 + [0.3] + [0.2] * 10 + [0.4] + [0.1] * 9 + [0.9] * 8
    assert episodes(scores).scores.tolist() == [0.2, 0.3, 0.4]
    assert len(episodes([*scores, 0.9]).scores) == 4, "nine tenths count as complete"
    with pytest.raises(CalibrationError, match=r"at least 3 .* episodes of 1 s, found 0"):
        episodes([0.1] * 8)


def test_a_confirmed_score_is_reached_by_enough_frames() -> None:
    # The spike of one frame is never confirmed, the two of 0.3 are, 0.2 s apart.
    scores = [0.1, 0.9, 0.1, 0.3, 0.1, 0.3, 0.1, 0.1, 0.1, 0.1] * 3
    assert episodes(scores, confirm_count=2, confirm_s=0.2).scores.tolist() == [0.3] * 3
    assert episodes(scores, confirm_count=2, confirm_s=0.1).scores.tolist() == [0.1] * 3


def test_frames_with_gaps_are_judged_by_their_stamps() -> None:
    periods = [0, 1, 20, 21, 22, 40, 41, 58, 59]
    scores = [0.1, 0.2, 0.3, 0.4, 0.1, 0.5, 0.2, 0.1, 0.6]
    assert episodes(scores, periods).scores.tolist() == [0.2, 0.4, 0.5, 0.6]
    assert episodes(scores, periods, confirm_count=2).scores.tolist() == [0.1, 0.1, 0.2, 0.3]


def test_a_confirmed_score_lasts_while_it_is_detected_again() -> None:
    # Detected three times, then once a second: confirmed throughout, as by the tracker.
    scores = [0.1] * 60
    for number in (10, 11, 12, 22, 32, 42):
        scores[number] = 0.9
    three = {"confirm_count": 3, "confirm_s": 1.0, "episode_s": 1.0}
    assert episodes(scores, silence_s=1.0, **three).scores.tolist() == [0.1, 0.1, *[0.9] * 4]
    assert episodes(scores, silence_s=0.5, **three).scores.tolist() == [*[0.1] * 5, 0.9]
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


def test_late_and_equal_stamps_give_the_same_episodes() -> None:
    scores = [number / 100 for number in range(40)]
    swapped = [number ^ 1 for number in range(40)]
    expected = episodes(scores, confirm_count=2).scores
    late = episodes([scores[number] for number in swapped], swapped, confirm_count=2).scores
    np.testing.assert_array_equal(late, expected)
    assert len(episodes(scores, [number // 2 * 2 for number in range(40)]).scores) == 4


def test_threshold_of_episodes() -> None:
    calibrated = episodes([number / 100 for number in range(90)], target_episode_rate=0.3)
    running = settings(target_episode_rate=0.3)
    # Of 9 maxima .09, .19, ... .89, 3 of 10 exchangeable ones may exceed.
    assert calibrated.threshold(running) == pytest.approx(0.69)
    for name in ("confirm_count", "silence_s", "episode_s"):
        with pytest.raises(MismatchError, match=name):
            calibrated.threshold(running.replace(**{name: 2}))
    with pytest.raises(CalibrationError, match="needs at least 99 nominal calibration episodes"):
        calibrated.threshold(running.replace(target_episode_rate=0.01))


def test_the_rate_holds_on_new_episodes() -> None:
    rng = np.random.default_rng(3)
    changes = {"target_episode_rate": 0.1, "episode_s": 0.2}
    exceeded = []
    for _ in range(200):
        calibrated, new = (episodes(scores.tolist(), **changes) for scores in rng.random((2, 78)))
        exceeded += (new.scores > calibrated.threshold(settings(**changes))).tolist()
    assert 0.05 < np.mean(exceeded) < 0.115


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": np.zeros(0)}, "needs at least 9"),
        ({"scores": np.array([0.2, 0.1])}, "ascending"),
        ({"scores": np.array([0.1, np.nan])}, "ascending"),
        ({"episode_s": 0.0}, "lengths"),
        ({"confirm_s": float("nan")}, "lengths"),
        ({"silence_s": float("inf")}, "lengths"),
        ({"confirm_count": 0}, "confirm_count"),
        ({"target_episode_rate": 0.0}, "a rate"),
    ],
)
def test_impossible_episodes_are_refused(changes: dict[str, Any], message: str) -> None:
    values = {
        **{"scores": np.linspace(0, 1, 20), "episode_s": 10.0, "confirm_count": 1},
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
    assert calibrated is not None and len(calibrated.scores) == 4
    assert main(["calibrate", index, c, "--check", *options]) == 0
    output = capsys.readouterr().out
    assert "2 complete episodes of 0.5 s" in output and "target 0.2" in output
    assert main(["calibrate", index, a, "--check", *rates, *options]) == 2
    assert "the target rates are those of the calibration" in capsys.readouterr().err


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
    assert (confirmed.scores > detector.threshold).tolist() == [False, False, True]
