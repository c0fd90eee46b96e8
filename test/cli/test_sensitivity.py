"""`sensitivity`: what it prints, and what it refuses before the work."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from worlds.cli import World, refused, row

from semantic_anomaly.cli import main
from semantic_anomaly.synthetic import StreetDrive
from semantic_anomaly.synthetic.export import write_folder


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("drives") / "held_out"
    write_folder([StreetDrive(41, 60, image_hw=(72, 128))], folder, stride=5, progress=False)
    return str(folder)


def test_sensitivity_prints_a_table_for_each_index(
    world: World, drive: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "seen"
    argv = ["sensitivity", world.at("index"), drive, "--out", str(out), *world.detector]
    options = ["--kinds", "cow,bin", "--sizes", "10,40", "--composites", "8", "--frames", "10"]
    assert main([*argv, *options, "--places", "0", ".6", "1", "1"]) == 0
    text = capsys.readouterr().out
    for size, composites in (("10", 4), ("40", 4), ("all", 8)):
        assert re.search(rf"^ *{size} +{composites} +[\d.]+ % +[\d.]+ % +[\d.]+ %$", text, re.M)
    assert "of 10 untouched frames raise an alarm" in text and f"wrote {out}" in text
    assert row(text, "cow") and row(text, "bin")
    assert (out / "blind_map.png").stat().st_size > 1000


def test_a_bad_frame_is_reported(
    world: World, drive: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(drive, tmp_path / "held_out")
    last = max((copy / "images").iterdir())
    last.write_bytes(b"")
    argv = ["sensitivity", world.at("index"), str(copy), "--out", str(tmp_path / "seen")]
    options = ["--kinds", "bin", "--sizes", "40", "--composites", "4", "--frames", "12"]
    assert main([*argv, *world.detector, *options]) == 3
    assert f"warning: left out: source '{copy}': 1 bad frames (held_out/{last.name}" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (["--sizes", "10,100"], r"sizes: expected at most 72 px.*128x72, found 100"),
        (["--kinds", "cows"], r"unknown kind 'cows' \(did you mean 'cow'\?\)"),
        (["--distances", "10,20"], r"focal length in px and the setting 'camera_height_m'"),
        (
            ["--distances", "1.2", "--focal-px", "90", "--set", "camera.camera_height_m=1.4"],
            r"ground at 1\.2 m",
        ),
        (["--frames", "5"], r"frames: expected at least 10"),
        (["--composites", "3"], r"composites: expected at least 32"),
        (["--cutouts", "absent"], r"absent"),
        (["--compare", "no_such_index"], r"no_such_index"),
    ],
)
def test_bad_options(
    options: list[str],
    pattern: str,
    world: World,
    drive: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["sensitivity", world.at("index"), drive, "--out", str(tmp_path / "out")]
    refused([*argv, *world.detector, *options], pattern, capsys, tmp_path)


def test_indexes_and_drives_that_cannot_be_used(
    world: World, drive: str, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out"), *world.detector]
    seen = r"calibration has seen a drive 'calibration_12'.*--allow-seen"
    refused(["sensitivity", str(index), world.at("calibration_12"), *out], seen, capsys, tmp_path)
    few = r"bag.*expected at least 10 frames, found 6"
    refused(["sensitivity", str(index), world.at("bag"), *out], few, capsys, tmp_path)
    (index / "calibration.json").unlink()
    refused(["sensitivity", str(index), drive, *out], r"calibrat", capsys, tmp_path)
