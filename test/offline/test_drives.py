"""Which drives a calibration takes, by what names, and which it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from worlds.colours import ColourEmbedder, street
from worlds.nominal_drives import SETTINGS, Countdown, calibrated, write_drives

from semantic_anomaly.errors import CalibrationError
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.offline.calibrate import calibrate


@pytest.fixture(scope="module")
def drives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drives(tmp_path_factory.mktemp("drives"))


@pytest.fixture(scope="module")
def index(drives: Path) -> NominalIndex:
    return build_index([drives / "index"], settings=SETTINGS, embedder=ColourEmbedder())


def test_a_folder_has_the_drives_that_its_labels_name(
    index: NominalIndex, drives: Path, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    labels = {}
    for drive in ("a", "b"):
        for file in sorted((drives / drive).iterdir()):
            name = f"{drive}_{file.name}"
            (tmp_path / "images" / name).write_bytes(file.read_bytes())
            labels[name] = {"drive": f"drive {drive}"}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    made = calibrated(index, [tmp_path])
    apart = calibrated(index, [drives / "a", drives / "b"])
    name = tmp_path.name
    assert [n for n, _ in made.drives] == [f"{name}/drive a", f"{name}/drive b"]
    assert [count for _, count in made.drives] == [count for _, count in apart.drives]
    np.testing.assert_array_equal(made.scores, apart.scores)
    # A single one of them is a drive like any other.
    single = calibrated(index, [f"{tmp_path}[0:7]"], target_false_alarm_rate=0.2)
    assert [n for n, _ in single.drives] == [f"{name}[0:7]"]


def test_frames_that_the_index_has_seen_are_refused_by_name(
    index: NominalIndex, drives: Path
) -> None:
    with pytest.raises(CalibrationError, match=r"has seen frame 'index/000\.png'"):
        calibrated(index, [drives / "a", drives / "index"])


def test_frames_seen_are_refused_wherever_they_come(index: NominalIndex, drives: Path) -> None:
    with pytest.raises(CalibrationError, match="has seen frame 'index/"):
        calibrated(index, [drives / "a", f"{drives / 'index'}[9:]", drives / "b"])


def test_another_drive_in_a_folder_of_the_same_name_is_taken(
    index: NominalIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "index").mkdir()
    for number in range(10):
        other = 255 - street(number).image
        cv2.imwrite(str(tmp_path / "index" / f"{number:03d}.png"), other)
    assert calibrated(index, [tmp_path / "index"]).count == 10
    assert "has the name of a drive in the index" in caplog.text


def test_frames_given_twice_by_overlapping_selections_are_refused(
    index: NominalIndex, drives: Path
) -> None:
    sources = [f"{drives / 'a'}[0:5]", f"{drives / 'a'}[4:7]", drives / "b"]
    with pytest.raises(CalibrationError, match=r"'a/004\.png' is given twice"):
        calibrated(index, sources)


def test_too_few_frames_are_refused_before_any_is_embedded(
    index: NominalIndex, drives: Path
) -> None:
    embedder = Countdown()
    settings = SETTINGS.replace(target_false_alarm_rate=0.01)
    with pytest.raises(CalibrationError, match=r"needs at least 99 .*found 13"):
        calibrate(index, [drives / "a", drives / "b"], settings=settings, embedder=embedder)
    assert embedder.batches == []


@pytest.mark.parametrize(
    ("head", "tail", "warns"),
    [("[0:2]", "[2:7]", False), ("[4:7]", "[0:4]", False), ("", "[2:7]", True),
     ("[0:6]", "[-1:]", True), ("[0:3]", "[1::3]", True)],
)  # fmt: skip
def test_selections_of_one_drive_are_compared_by_frame(
    drives: Path, caplog: pytest.LogCaptureFixture, head: str, tail: str, warns: bool
) -> None:
    built = build_index(
        [f"{drives / 'a'}{head}"], settings=SETTINGS, embedder=ColourEmbedder(), dedup_distance=2.0
    )
    # Nearly all frames are suppressed as near-duplicates, so their images are not in the index.
    made = calibrated(built, [f"{drives / 'a'}{tail}", drives / "b", drives / "c"])
    assert made.drives[0][0] == f"a{tail}"
    assert ("has the name of a drive in the index" in caplog.text) == warns
    assert "'b' has the name" not in caplog.text


def test_warnings_of_the_calibration_are_logged(
    index: NominalIndex, drives: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calibrated(index, [drives / "a", drives / "b"])
    assert "only 2 drives" in caplog.text and "depends on the largest score" in caplog.text


def test_too_few_frames_say_how_many_are_needed(index: NominalIndex, drives: Path) -> None:
    with pytest.raises(CalibrationError, match=r"needs at least 9 .*found 7"):
        calibrated(index, [drives / "a"])


def test_drives_of_the_same_name_are_told_apart(
    index: NominalIndex, drives: Path, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    for number in range(5):
        cv2.imwrite(str(tmp_path / "a" / f"{number}.png"), street(900 + number).image[..., ::-1])
    made = calibrated(index, [drives / "a", tmp_path / "a"])
    assert made.drives == (("a", 7), ("a (2)", 5))
