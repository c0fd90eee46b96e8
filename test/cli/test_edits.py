"""explain, add-nominal, retract, undo-edit and what inspect-index says of edits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from worlds.cli import World, said, unchanged

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.cli import main
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.images import read_image


@pytest.fixture
def index(world: World, tmp_path: Path) -> Path:
    return world.copy("index", tmp_path / "index")


def test_from_a_miss_to_a_cure_and_back(
    world: World, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = NominalIndex.load(index)
    out = tmp_path / "why.jpg"
    image = f"{world.at('labelled')}[5:6]"
    box = ["--box", "40", "30", "80", "60"]
    argv = ["explain", str(index), image, *box, "--count", "4", "--out", str(out)]
    assert main([*argv, *world.detector]) == 0
    text = capsys.readouterr().out
    numbers = re.findall(r"^ +(\d+) +\S+/", text, re.M) or re.findall(r"^(\d+) ", text, re.M)
    assert len(numbers) == 4 and "without these 4 entries" in text
    assert read_image(out).shape[1] > 480
    listed = ",".join(numbers)
    assert main(["retract", str(index), "--entries", listed, "--note", "cow inside"]) == 0
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
    report = ["evaluate", f"{world.at('labelled')}[4:6]", "--index", str(index)]
    assert main([*report, "--out", str(tmp_path / "report"), *world.detector]) == 0
    for _ in range(2):
        assert main(["undo-edit", str(index)]) == 0
    assert NominalIndex.load(index).fingerprint == before.fingerprint
    assert not Calibration.load(index).stale_edits
    kept = Path(world.at("index"))
    assert (index / "calibration.json").read_bytes() == (kept / "calibration.json").read_bytes()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["retract", "INDEX"], "expected --entries, --frame or --near"),
        (["retract", "INDEX", "--entries", "9999999"], "entry 9999999: expected a number"),
        (["retract", "INDEX", "--entries", "0-999999"], "expected a number from 0"),
        (["retract", "INDEX", "--entries", "3-1"], "--entries: expected numbers as in"),
        (["retract", "INDEX", "--entries", "x"], "--entries: expected numbers as in"),
        (["retract", "INDEX", "--entries", "1", "--part", "p"], "unknown part 'p'"),
        (["retract", "INDEX", "--near", "1"], "expected both or neither"),
        (["retract", "INDEX", "--near", "1", "--within", "2"], "expected some entries to stay"),
        (["retract", "INDEX", "--frame", "none"], "unknown frame of the index 'none'"),
        (["undo-edit", "INDEX"], "expected an edit of the index, found none"),
    ],
)
def test_edits_that_cannot_be(
    index: Path, argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with unchanged(index):
        assert main([str(index) if a == "INDEX" else a for a in argv]) == 2
    assert sentence in said(capsys)


@pytest.mark.parametrize(
    ("source", "more", "sentence"),
    [
        ("index_1", [], "the index was built from it already"),
        ("calibration_11", ["--frames", "3,99"], "frame 99: there is no such frame"),
        ("calibration_11[0:2]", ["--frames", "1"], "without [START:STOP], found both"),
        ("calibration_11", ["--set", "input_size=70"], "'input_size': expected 140, found 70"),
    ],
)
def test_frames_that_cannot_be_added(
    world: World,
    index: Path,
    source: str,
    more: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["add-nominal", str(index), world.at(source), *world.detector, *more]
    with unchanged(index):
        assert main(argv) == 2
    assert sentence in said(capsys)


@pytest.mark.parametrize(
    ("image", "box", "sentence"),
    [
        ("labelled[5:6]", "0 0 0 5", "within the image of 128x72 pixels"),
        ("labelled[5:6]", "0 0 500 5", "within the image of 128x72 pixels"),
        ("labelled", "0 0 50 50", "expected one frame, found several"),
        ("none.png", "0 0 50 50", "none.png"),
    ],
)
def test_what_cannot_be_explained(
    world: World,
    index: Path,
    image: str,
    box: str,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["explain", str(index), world.at(image), "--box", *box.split(), *world.detector]
    with unchanged(index):
        assert main(argv) == 2
    assert sentence in said(capsys)
