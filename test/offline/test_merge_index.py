"""Merging index folders: names, refusals, and calibration of what was merged."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import pytest
from worlds.colours import street
from worlds.nominal_drives import build, calibrated

from semantic_anomaly.errors import ArtefactError, IndexMismatchError, InputError, SourceError
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.offline.merge_index import merge_indexes


def write_drive(folder: Path, seed: int, count: int = 12) -> Path:
    folder.mkdir(parents=True)
    for frame in range(count):
        image = street(1000 * seed + frame).image[..., ::-1]
        cv2.imwrite(str(folder / f"{frame:03d}.png"), image)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with drives of equal names, and an index of each drive in `indexes`."""
    root = tmp_path_factory.mktemp("merge")
    for seed, day in enumerate(("monday", "tuesday", "friday")):
        build(write_drive(root / day / "bag", seed), out=root / "indexes" / day)
    build(f"{root / 'friday' / 'bag'}[0:6]", out=root / "indexes" / "friday_begin")
    build(f"{root / 'friday' / 'bag'}[6:]", out=root / "indexes" / "friday_end")
    return root


def parts(root: Path, *names: str) -> list[Path]:
    return [root / "indexes" / name for name in names]


def test_drives_of_equal_names_stay_apart(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    merge_indexes(parts(root, "monday", "tuesday", "friday"), out)
    index = NominalIndex.load(out)
    assert [source.name for source in index.content.sources] == ["bag", "bag (2)", "bag (3)"]
    assert set(index.recordings) == {"bag", "bag (2)", "bag (3)"}
    assert {frame.recording for frame in index.content.frames} <= set(index.recordings)
    assert len(index.content.parts) == 3


def test_parts_of_one_drive_are_one_recording(root: Path, tmp_path: Path) -> None:
    merge_indexes(parts(root, "friday_begin", "monday"), tmp_path / "one")
    merge_indexes([tmp_path / "one", *parts(root, "friday_end")], tmp_path / "two")
    index = NominalIndex.load(tmp_path / "two")
    by_source = {source.name: source.recordings for source in index.content.sources}
    assert by_source == {"bag[0:6]": {"": "bag"}, "bag": {"": "bag (2)"}, "bag[6:]": {"": "bag"}}


def test_leaving_one_drive_out_is_that_of_the_index_built_at_once(
    root: Path, tmp_path: Path
) -> None:
    days = ("monday", "tuesday", "friday")
    merge_indexes(parts(root, *days), tmp_path / "index")
    merged = calibrated(NominalIndex.load(tmp_path / "index"), None)
    at_once = calibrated(build([root / day / "bag" for day in days]), None)
    assert merged.frames_by_drive == at_once.frames_by_drive
    assert all(drive.left_out for drive in merged.drives)
    # These few frames of coloured streets differ more than drives do.
    assert merged.threshold == pytest.approx(at_once.threshold, rel=0.1)


def test_the_largest_dedup_distance_holds(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(root / "tuesday" / "bag", dedup_distance=0.002, out=tmp_path / "coarse")
    index = merge_indexes([*parts(root, "monday"), tmp_path / "coarse"], tmp_path / "index")
    assert index.content.limits["dedup_distance"] == 0.002
    assert "dedup_distance differs, 0.001 to 0.002" in caplog.text


def test_bad_input_is_refused_and_nothing_is_written(root: Path, tmp_path: Path) -> None:
    monday, tuesday = parts(root, "monday", "tuesday")
    out = tmp_path / "index"
    with pytest.raises(InputError, match="expected indexes, found none"):
        merge_indexes([], out)
    with pytest.raises(InputError, match="given twice"):
        merge_indexes([monday, tuesday, monday], out)
    with pytest.raises(ArtefactError, match="expected an index folder"):
        merge_indexes([monday, tmp_path / "nothing"], out)
    build(root / "tuesday" / "bag", stride=2, out=tmp_path / "strided")
    with pytest.raises(IndexMismatchError, match=r"strided', stage 0: stride: expected 1 as"):
        merge_indexes([monday, tmp_path / "strided"], out)
    build(root / "tuesday" / "bag", recording_pattern="(b)", out=tmp_path / "again")
    with pytest.raises(SourceError, match="source 'bag' is in both"):
        merge_indexes([tuesday, tmp_path / "again"], out)
    damaged = Path(shutil.copytree(tuesday, tmp_path / "damaged"))
    data = (damaged / "embeddings.npy").read_bytes()
    (damaged / "embeddings.npy").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtefactError, match=r"embeddings\.npy"):
        merge_indexes([monday, damaged], out)
    assert not out.exists() and not list(tmp_path.glob(".index*"))
    merge_indexes([monday, tuesday], out)
    with pytest.raises(ArtefactError, match="--force"):
        merge_indexes([monday, tuesday], out)
    with pytest.raises(InputError, match="another folder for the result"):
        merge_indexes([monday, out], out, force=True)
    merge_indexes([tuesday, monday], out, force=True)
