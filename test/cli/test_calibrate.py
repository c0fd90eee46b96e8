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
    assert printed.err.count("warning: all calibration frames come from one drive") == 1


@pytest.mark.parametrize(
    ("source", "options", "pattern"),
    [
        ("calibration_11", ["0.01"], r"rate.* needs at least 99 nominal .*frames, found 10"),
        ("calibration_11", ["0.9"], r"target_false_alarm_rate': expected at most 0\.5, found 0\.9"),
        ("calibration_11", ["0.2", "--check"], r"--check: the target rates are those of the cal"),
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
