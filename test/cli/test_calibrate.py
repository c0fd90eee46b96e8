"""`calibrate`: what it prints and writes, and drives and rates that it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds.cli import World, refused, row

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.cli import main


def test_calibrate(world: World, index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["calibrate", str(index), world.at("calibration_11"), *world.detector]
    assert main([*argv, "--target-false-alarm-rate", "0.2"]) == 0
    printed = capsys.readouterr()
    assert row(printed.out, "threshold") == f"{Calibration.load(index).threshold:.4f}"
    assert row(printed.out, "nominal frames") == "10"
    assert row(printed.out, "target false-alarm rate") == "0.2"
    assert row(printed.out, "drives") == "calibration_11 (10)"
    promise = "othing is promised beyond drive 'calibration_11'"
    assert f"N{promise}" in printed.out and printed.err.count(f"warning: n{promise}") == 1


def test_without_sources_one_drive_of_the_index_is_left_out_at_a_time(
    world: World, index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["calibrate", str(index), *world.detector, "--target-false-alarm-rate", "0.2"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert row(printed, "drives") == "index_1 (5), index_2 (5)"
    assert (
        "Estimated by leaving one drive out: on a new drive like these 2, at most 20 %" in printed
    )
    calibration = Calibration.load(index)
    assert all(drive.left_out for drive in calibration.drives)
    # Sources may stand behind options.
    further = [world.at("calibration_11"), "--leave-one-drive-out", "--confidence", "0.5"]
    assert main([*argv, *further]) == 0
    printed = capsys.readouterr().out
    assert row(printed, "drives") == "index_1 (5), index_2 (5), calibration_11 (10)"
    assert "probability 2/4" in printed
    calibration = Calibration.load(index)
    assert [drive.left_out for drive in calibration.drives] == [True, True, False]
    assert calibration.confidence == 0.5


def test_drives_of_the_index_that_have_moved(
    world: World, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "now").mkdir()
    drives = [world.copy(name, tmp_path / "now" / name) for name in ("index_1", "index_2")]
    built = str(tmp_path / "built")
    assert main(["build-index", *map(str, drives), "--out", built, *world.detector]) == 0
    (tmp_path / "now").rename(tmp_path / "later")
    argv = ["calibrate", built, *world.detector, "--target-false-alarm-rate", "0.2"]
    kept = Path(built)
    refused(argv, r"source 'index_1' of the index: .*now/index_1' does not exist; if it has moved, "
            r"pass --source OLD=NEW", capsys, kept)  # fmt: skip
    moved = f"--source={tmp_path}/now=", f"--source={tmp_path}/no={tmp_path}/later"
    refused([*argv, moved[0]], r"--source: expected OLD=NEW, found", capsys, kept)
    refused([*argv, moved[1]], r"moved source .*/no': expected the beginning", capsys, kept)
    assert main([*argv, f"--source={tmp_path}/now={tmp_path}/later"]) == 0
    assert row(capsys.readouterr().out, "drives") == "index_1 (5), index_2 (5)"


@pytest.mark.parametrize(
    ("source", "options", "pattern"),
    [
        ("calibration_11", ["0.1", "--confidence", "0.8"], r"0\.8 needs at least 4 .*, found 1"),
        ("calibration_11", ["0.1", "--confidence", "1"], r"'confidence': expected at most 0\.999"),
        (
            "calibration_11[0:1]",
            ["0.2"],
            r"drive 'calibration_11': expected at least 2 frames, found 1",
        ),
        ("calibration_11", ["0.2", "--source", "/a=/b"], r"moved sources: expected leave_one_dri"),
        ("calibration_11", ["0.9"], r"target_false_alarm_rate': expected at most 0\.5, found 0\.9"),
        ("calibration_11", ["0.2", "--check"], r"--check: the target rates and the confidence a"),
        ("index_1", ["0.2"], r"the index has seen frame 'index_1/"),
        ("none", ["0.2"], r"none' does not exist"),
        ("bag", ["0.2", "--topic", "/camera/camera_info"], r"of type sensor_msgs/msg/CameraInfo"),
    ],
)
def test_refusals(
    source: str,
    options: list[str],
    pattern: str,
    world: World,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["calibrate", world.at("index"), world.at(source), *world.detector]
    refused([*argv, "--target-false-alarm-rate", *options], pattern, capsys, world.root)


def test_unknown_options_are_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["--unknown"], ["--episode-s", "1", "drive", "--unknown"]):
        assert main(["calibrate", world.at("index"), *more]) == 2
        assert "unrecognized arguments" in capsys.readouterr().err
