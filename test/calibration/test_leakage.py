"""Frames that the index has seen are recognised by name and image."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds.colours import street
from worlds.nominal_drives import build, write_drives

from semantic_anomaly.calibration.leakage import check_sources, is_seen
from semantic_anomaly.errors import CalibrationError
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.images import write_image
from semantic_anomaly.offline.drives import open_drives
from semantic_anomaly.structures import Frame


@pytest.fixture(scope="module")
def drives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drives(tmp_path_factory.mktemp("drives"))


@pytest.fixture(scope="module")
def index(drives: Path) -> NominalIndex:
    return build(drives / "index")


def test_name_and_image_decide(index: NominalIndex) -> None:
    image = street(0).image
    assert is_seen(index, Frame(image, name="index/000.png"))
    assert not is_seen(index, Frame(image, name="other/000.png"))
    assert not is_seen(index, Frame(255 - image, name="index/000.png")), "another drive's frame"


def test_each_of_several_frames_of_one_name_is_known(tmp_path: Path) -> None:
    for number, name in enumerate("xy"):
        write_image(tmp_path / name / "a" / "0.png", street(number).image)
    index = build([tmp_path / name / "a" for name in "xy"])
    for number in (0, 1):
        assert is_seen(index, Frame(street(number).image, name="a/0.png"))
    assert not is_seen(index, Frame(255 - street(1).image, name="a/0.png"))
    assert len(list(index.thumbnails("a/0.png"))) == 2 and not list(index.thumbnails("a/1.png"))
    assert index.thumbnail("a/1.png") is None


def test_a_source_whose_first_frame_was_seen_is_refused(index: NominalIndex, drives: Path) -> None:
    with pytest.raises(CalibrationError, match=r"has seen frame 'index/000\.png'"):
        check_sources(index, open_drives([drives / "a", drives / "index"]))


@pytest.mark.parametrize(
    ("head", "tail", "warns"),
    [("[0:2]", "[2:7]", False), ("[4:7]", "[0:4]", False), ("", "[2:7]", True),
     ("[0:6]", "[-1:]", True), ("[0:3]", "[1::3]", True)],
)  # fmt: skip
def test_selections_of_one_drive_are_compared_by_frame(
    drives: Path, caplog: pytest.LogCaptureFixture, head: str, tail: str, warns: bool
) -> None:
    # Nearly all frames are suppressed as near-duplicates, so their images are not in the index.
    index = build([f"{drives / 'a'}{head}"], dedup_distance=2.0)
    check_sources(index, open_drives([f"{drives / 'a'}{tail}", drives / "b"]))
    assert ("has the name of a drive in the index" in caplog.text) == warns
    assert "'b' has the name" not in caplog.text
