"""`retract`, `undo-edit`, `add-nominal`, and what `inspect-index` says of edits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from worlds.cli import World, refused, row

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.cli import main
from semantic_anomaly.index.nominal_index import NominalIndex


def test_edits_are_listed_and_undone(
    world: World, index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, calibration = NominalIndex.load(index), (index / "calibration.json").read_bytes()
    assert main(["retract", str(index), "--entries", "1,3-5", "--note", "cow inside"]) == 0
    edited = NominalIndex.load(index)
    assert edited.count == before.count - 4 and edited.edits[0].note == "cow inside"
    text = capsys.readouterr().out
    assert "stale calibration" in text and f"undo-edit {index} 1" in text
    more = ["add-nominal", str(index), world.at("calibration_11"), "--frames", "1,3-4"]
    assert main([*more, "--note", "bridge", *world.detector]) == 0
    edited = NominalIndex.load(index)
    assert edited.edits[1].frames <= 3 and edited.edits[1].source.endswith("calibration_11")
    assert set(edited.frame_names) - set(before.frame_names)
    capsys.readouterr()
    assert main(["inspect-index", str(index)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"1 +retract +\d{4}-\d\d-\d\dT[\d:]+ +4 +0 +cow inside", text)
    assert re.search(r"2 +add .*calibration_11 +bridge", text)
    assert "2 edits of the index since calibration" in text
    for _ in range(2):
        assert main(["undo-edit", str(index)]) == 0
    assert NominalIndex.load(index).fingerprint == before.fingerprint
    assert not Calibration.load(index).stale_edits
    assert (index / "calibration.json").read_bytes() == calibration


def test_edits_of_several_stages(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = world.copy("index_with_instances", tmp_path / "index")
    before = NominalIndex.load(index)
    counts = [stage.count for stage in before.stages]
    assert main(["retract", str(index), "--entries", "7,1:0-2"]) == 0
    edited = NominalIndex.load(index)
    assert [stage.count for stage in edited.stages] == [counts[0] - 1, counts[1] - 3]
    assert row(capsys.readouterr().out, "entries") == f"{counts[0] - 1} + {counts[1] - 3}"
    assert main(["undo-edit", str(index)]) == 0
    assert NominalIndex.load(index).fingerprint == before.fingerprint
    add = ["add-nominal", str(index), world.at("calibration_12"), "--frames", "2,5"]
    assert main(add) == 0
    grown = NominalIndex.load(index)
    assert all(stage.count > count for stage, count in zip(grown.stages, counts, strict=True))
    assert main(["undo-edit", str(index)]) == 0
    assert NominalIndex.load(index).fingerprint == before.fingerprint


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        (["retract", "INDEX"], "expected --entries, --frame or --near"),
        (["retract", "INDEX", "--entries", "9999999"], "entry 9999999: expected a number"),
        (["retract", "INDEX", "--entries", "3-1"], "--entries: expected numbers as in"),
        (["retract", "INDEX", "--entries", "x"], "--entries: expected numbers as in"),
        (["retract", "INDEX", "--entries", "1:0"], "stage 1"),
        (["retract", "INDEX", "--entries", "p:0"], "expected entries as in 12,15-20,1:33"),
        (["retract", "INDEX", "--near", "1"], "expected both or neither"),
        (
            ["retract", "INDEX", "--near", "1", "--within", "2"],
            "expected some entries of stage 0 to stay",
        ),
        (["retract", "INDEX", "--frame", "none"], "unknown frame of the index 'none'"),
        (["undo-edit", "INDEX"], "expected an edit of the index, found none"),
    ],
)
def test_edits_that_cannot_be(
    index: Path, argv: list[str], pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused([str(index) if a == "INDEX" else a for a in argv], pattern, capsys, index)


def test_frames_of_a_recording_of_the_index_are_a_part_of_it(world: World, tmp_path: Path) -> None:
    index = str(tmp_path / "index")
    drives = [f"{world.at('index_1')}[0:2]", world.at("index_2")]
    assert main(["build-index", *drives, "--out", index, *world.detector]) == 0
    before = NominalIndex.load(index)
    for source, recording in (
        ("index_1", "index_1"),
        ("calibration_11", world.at("calibration_11")),
    ):
        more = [world.at(source), "--frames", "3,4", *world.detector]
        assert main(["add-nominal", index, *more]) == 0
        assert NominalIndex.load(index).content.frames[-1].recording == recording
    assert before.recordings == ("index_1", "index_2")
    edited = NominalIndex.load(index)
    assert edited.recordings == ("index_1", "index_2", world.at("calibration_11"))
    assert edited.without("index_1").count < edited.count


@pytest.mark.parametrize(
    ("source", "more", "pattern"),
    [
        ("index_1", [], "the index was built from it already"),
        ("calibration_11", ["--frames", "3,99"], "frame 99: there is no such frame"),
        ("calibration_11[0:2]", ["--frames", "1"], r"without \[START:STOP\], found both"),
        ("calibration_11", ["--set", "input_size=70"], "'input_size': expected 140, found 70"),
    ],
)
def test_frames_that_cannot_be_added(
    world: World,
    index: Path,
    source: str,
    more: list[str],
    pattern: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["add-nominal", str(index), world.at(source), *world.detector, *more]
    refused(argv, pattern, capsys, index)


@pytest.mark.parametrize(
    ("frames", "code", "found"),
    [
        ([], 3, "1 bad frames (drive/"),
        (["--frames", "2-4"], 3, "1 bad frames (drive/"),
        (["--frames", "4"], 0, ""),
        (["--frames", "3"], 2, ""),
    ],
)
def test_a_bad_frame_is_not_added(
    world: World,
    index: Path,
    tmp_path: Path,
    frames: list[str],
    code: int,
    found: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drive, before = world.copy("calibration_11", tmp_path / "drive"), NominalIndex.load(index)
    bad = sorted((drive / "images").iterdir())[3]
    bad.write_bytes(bad.read_bytes()[:-30])
    assert main(["add-nominal", str(index), str(drive), *frames, *world.detector]) == code
    output = capsys.readouterr()
    assert found in output.out
    added = set(NominalIndex.load(index).frame_names) - set(before.frame_names)
    assert not any(bad.name in name for name in added)
    # The frames after it keep their numbers.
    names = sorted(file.name for file in (drive / "images").iterdir())
    if frames == ["--frames", "2-4"]:
        assert added <= {f"drive/{names[2]}", f"drive/{names[4]}"} and added
    if code == 2:
        assert bad.name in output.err and not added
