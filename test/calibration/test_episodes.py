"""The rate of episodes: confirmed maxima by hand, and the realised rate."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from worlds.colours import make_detector, street

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.calibration.conformal import Episodes
from semantic_anomaly.calibration.format import FILE_NAME
from semantic_anomaly.cli import main
from semantic_anomaly.detection.tracking import ComponentTracker
from semantic_anomaly.errors import CalibrationError, MismatchError
from semantic_anomaly.io.images import write_image
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import ComponentState, Decision

TENTH = 100_000_000


def settings(**changes: Any) -> Settings:
    return Settings(**{"target_episode_rate": 0.25, "episode_s": 1.0, **changes})


def episodes(scores: list[float], **changes: Any) -> Episodes:
    stamps = [number * TENTH for number in range(len(scores))]
    return Episodes.of_drives({"a": scores}, {"a": stamps}, settings(**changes))


def test_an_episode_has_its_largest_score() -> None:
    # What is left over at the end is no whole stretch, nor is a drive of less.
    scores = [0.1] * 9 + [0.3] + [0.2] * 10 + [0.4] + [0.1] * 9 + [0.9] * 8
    assert episodes(scores).scores.tolist() == [0.2, 0.3, 0.4]
    assert len(episodes([*scores, 0.9]).scores) == 4, "nine tenths are a whole one"
    with pytest.raises(
        CalibrationError, match=r"needs at least 3 nominal .* found 0 complete ones"
    ):
        episodes([0.1] * 8)


def test_a_confirmed_score_is_what_enough_frames_reach() -> None:
    # The spike of one frame is never confirmed, the two of 0.3 are, 0.2 s apart.
    scores = [0.1, 0.9, 0.1, 0.3, 0.1, 0.3, 0.1, 0.1, 0.1, 0.1] * 3
    kept = episodes(scores, confirm_count=2, confirm_s=0.2)
    assert kept.scores.tolist() == [0.3] * 3
    assert episodes(scores, confirm_count=2, confirm_s=0.1).scores.tolist() == [0.1] * 3


def test_frames_with_gaps_are_judged_by_their_stamps() -> None:
    stamps = [n * TENTH for n in (0, 1, 20, 21, 22, 40, 41, 58, 59)]
    scores = [0.1, 0.2, 0.3, 0.4, 0.1, 0.5, 0.2, 0.1, 0.6]
    made = Episodes.of_drives({"a": scores}, {"a": stamps}, settings())
    assert made.scores.tolist() == [0.2, 0.4, 0.5, 0.6]
    two = Episodes.of_drives({"a": scores}, {"a": stamps}, settings(confirm_count=2))
    assert two.scores.tolist() == [0.1, 0.1, 0.2, 0.3]


def test_what_was_confirmed_stays_so_while_it_is_found_again() -> None:
    # Found three times, then once a second: confirmed throughout, as the tracker has it.
    scores = [0.1] * 60
    for number in (10, 11, 12, 22, 32, 42):
        scores[number] = 0.9
    three = {"confirm_count": 3, "confirm_s": 1.0, "episode_s": 1.0}
    assert episodes(scores, silence_s=1.0, **three).scores.tolist() == [0.1, 0.1, *[0.9] * 4]
    assert episodes(scores, silence_s=0.5, **three).scores.tolist() == [*[0.1] * 5, 0.9]
    tracker = ComponentTracker(3, 1.0, 1.0)
    box = np.array([[0.0, 0.0, 9.0, 9.0]])
    for number, score in enumerate(scores):
        tracks = tracker.update(number * TENTH, box if score > 0.5 else box[:0])
        confirmed = any(track.state is ComponentState.CONFIRMED for track in tracks)
        assert confirmed == (number in (12, 22, 32, 42)), number


def test_frames_too_far_apart_to_be_confirmed_are_refused() -> None:
    stamps = [n * 10 * TENTH for n in range(40)]
    sparse = settings(confirm_count=3, confirm_s=1.0, episode_s=4.0)
    with pytest.raises(CalibrationError, match="drive 'a': expected frames so close that 3"):
        Episodes.of_drives({"a": [0.1] * 40}, {"a": stamps}, sparse)


def test_the_threshold_is_the_conformal_one_and_the_stricter_of_both() -> None:
    made = episodes([number / 100 for number in range(90)], target_episode_rate=0.3)
    # Of 9 maxima .09, .19, ... .89, 3 of 10 exchangeable ones may exceed.
    assert made.threshold(settings(target_episode_rate=0.3)) == pytest.approx(0.69)
    frames = np.linspace(0.0, 0.89, 90)
    calibration = Calibration.fit(
        {"a": frames.tolist()},
        heatmap_low=0.05,
        index=SimpleNamespace(fingerprint="f" * 64),
        settings=Settings(target_false_alarm_rate=0.5),
        roi=RegionOfInterest(),
        camera="camera",
        episodes=made,
    )
    asked = settings(target_false_alarm_rate=0.5, target_episode_rate=0.3)
    assert calibration.threshold_of(asked) == pytest.approx(0.69)
    assert calibration.threshold_of(asked.replace(target_episode_rate=0.0)) < 0.5
    assert calibration.threshold_of(asked.replace(target_false_alarm_rate=0.02)) > 0.8
    with pytest.raises(MismatchError, match="confirm_count"):
        calibration.threshold_of(asked.replace(confirm_count=2))
    with pytest.raises(MismatchError, match="silence_s"):
        calibration.threshold_of(asked.replace(silence_s=2.0))
    with pytest.raises(MismatchError, match="episode_s"):
        calibration.threshold_of(asked.replace(episode_s=2.0))
    with pytest.raises(CalibrationError, match="needs at least 99 nominal calibration episodes"):
        calibration.threshold_of(asked.replace(target_episode_rate=0.01))


def test_the_rate_holds_on_new_episodes() -> None:
    rng = np.random.default_rng(3)
    exceeded = []
    for _ in range(200):
        drawn = rng.random((2, 390)).tolist()
        made = episodes(drawn[0], target_episode_rate=0.1)
        limit = made.threshold(settings(target_episode_rate=0.1))
        exceeded += (episodes(drawn[1], target_episode_rate=0.1).scores > limit).tolist()
    assert 0.05 < np.mean(exceeded) < 0.115


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": np.zeros(0)}, "ascending"),
        ({"scores": np.array([0.2, 0.1])}, "ascending"),
        ({"scores": np.array([0.1, np.nan])}, "ascending"),
        ({"episode_s": 0.0}, "lengths"),
        ({"confirm_s": float("nan")}, "lengths"),
        ({"silence_s": float("inf")}, "lengths"),
        ({"confirm_count": 0}, "confirm_count"),
        ({"target_episode_rate": 0.0}, "a rate"),
        ({"target_episode_rate": 0.01}, "needs at least 99"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    values = {
        **{"scores": np.linspace(0, 1, 20), "episode_s": 10.0, "confirm_count": 1},
        **{"confirm_s": 1.0, "silence_s": 1.0, "target_episode_rate": 0.1, **changes},
    }
    with pytest.raises(CalibrationError, match=message):
        Episodes(**values)


def test_stamps_must_rise() -> None:
    with pytest.raises(CalibrationError, match="drive 'a': expected stamps that rise"):
        Episodes.of_drives({"a": [0.1] * 3}, {"a": [0, 2, 1]}, settings())


def test_a_calibration_keeps_its_episodes(tmp_path: Path) -> None:
    made = episodes([number / 100 for number in range(90)])
    index = SimpleNamespace(fingerprint="f" * 64)
    calibration = Calibration.fit(
        {"a": np.linspace(0, 1, 90).tolist()},
        heatmap_low=0.05,
        index=index,
        settings=Settings(target_false_alarm_rate=0.1),
        roi=RegionOfInterest(),
        camera="camera",
        episodes=made,
    )
    path = calibration.save(tmp_path)
    assert json.loads(path.read_text())["format"] == 1
    read = Calibration.load(tmp_path)
    assert read.episodes is not None and read.sha256 == calibration.sha256
    np.testing.assert_array_equal(read.episodes.scores, made.scores)
    path.write_text(path.read_text().replace('"confirm_count":1', '"confirm_count":2'))
    with pytest.raises(CalibrationError, match="altered"):
        Calibration.load(tmp_path)


def test_a_promise_that_was_not_calibrated_is_refused() -> None:
    with pytest.raises(CalibrationError, match="expected a calibration with episodes"):
        make_detector(target_episode_rate=0.1)


def test_the_command_calibrates_episodes_and_the_others_use_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for name, first, count in (("index", 0, 12), ("a", 100, 60), ("b", 200, 60), ("c", 300, 30)):
        (tmp_path / name).mkdir()
        for number in range(count):
            noise = rng.integers(-40, 40, (72, 128, 3))
            image = np.clip(street(first + number).image + noise, 0, 255).astype(np.uint8)
            write_image(tmp_path / name / f"{number:03d}.png", image)
    index, size = str(tmp_path / "xi"), ["--set", "input_size=128"]
    assert main(["build-index", str(tmp_path / "index"), "--out", index, *size]) == 0
    drives = [str(tmp_path / "a"), str(tmp_path / "b")]
    asked = ["--target-false-alarm-rate", "0.1", "--target-episode-rate", "0.2", "--episode-s", "1"]
    assert main(["calibrate", index, *drives, *asked, *size]) == 0
    told = capsys.readouterr().out
    assert "0.2 of episodes of 1 s" in told and "nominal episodes" in told
    kept = Calibration.load(Path(index)).episodes
    assert kept is not None and len(kept.scores) == 12
    assert (Path(index) / FILE_NAME).is_file()
    assert main(["calibrate", index, str(tmp_path / "c"), "--check", *size]) == 0
    told = capsys.readouterr().out
    assert "3 complete episodes of 1 s" in told and "target 0.2" in told
    assert main(["calibrate", index, drives[0], "--check", *asked[2:4], *size]) == 2
    assert "the target rates are those of the calibration" in capsys.readouterr().err
    assert main(["calibrate", index, *drives, *asked[:3], "0.01", *size]) == 2
    assert "needs at least 99 nominal calibration episodes" in capsys.readouterr().err


def test_what_is_confirmed_in_an_episode_is_what_the_detector_confirms() -> None:
    # Spikes of one frame raise no alarm where two are needed, whatever their scores.
    found = make_detector(confirm_count=2, confirm_s=0.15)
    frames = [street(seed, odd=seed in (3, 7, 8)) for seed in range(15)]
    results = [found.detect(frame) for frame in frames]
    alarms = [n for n, result in enumerate(results) if result.decision is Decision.ANOMALY]
    made = Episodes.of_drives(
        {"a": [result.score for result in results]},
        {"a": [frame.stamp_ns for frame in frames]},
        settings(episode_s=0.5, confirm_count=2, confirm_s=0.15, target_episode_rate=0.4),
    )
    assert alarms == [8]
    assert found.threshold is not None
    assert (made.scores > found.threshold).tolist() == [False, False, True]
