from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from semantic_anomaly.errors import ImageError, SourceError
from semantic_anomaly.io.images import write_image
from semantic_anomaly.io.open import open_source, split_selection

SHARED = Path(
    os.environ.get("SEMANTIC_ANOMALY_DATA", Path(__file__).parents[2] / "shared" / "data")
)


def picture(value: int, height: int = 24, width: int = 32) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def make_folder(folder: Path, count: int = 10) -> Path:
    """Make images named 0.png, 1.png, ... whose gray level is their number."""
    folder.mkdir(parents=True)
    for index in range(count):
        write_image(folder / f"{index}.png", picture(index))
    return folder


def make_video(path: Path, count: int = 12, rate: float = 25.0, fourcc: str = "MJPG") -> Path:
    """Make a video whose frames are gray levels 10 apart."""
    size = (64, 48)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), rate, size)
    assert writer.isOpened()
    for index in range(count):
        writer.write(picture(min(10 * index, 255), 48, 64))
    writer.release()
    return path


def numbers(source: object) -> list[int]:
    return [int(frame.image[0, 0, 0]) for frame in source]  # type: ignore[attr-defined]


def test_a_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    source = open_source(make_folder(tmp_path / "drive", 12))
    assert source.count == 12
    frames = list(source)
    assert [frame.name for frame in frames] == [f"drive/{n}.png" for n in range(12)]
    assert [frame.stamp_ns for frame in frames] == [n * 100_000_000 for n in range(12)]
    assert numbers(source) == list(range(12))
    assert numbers(source) == list(range(12)), "a source can be read again"


def test_an_images_subfolder_and_its_parent_are_the_same_drive(tmp_path: Path) -> None:
    make_folder(tmp_path / "drive" / "images", 3)
    make_folder(tmp_path / "drive" / "masks", 1)
    for path in (tmp_path / "drive", tmp_path / "drive" / "images"):
        names = [frame.name for frame in open_source(path)]
        assert names == ["drive/0.png", "drive/1.png", "drive/2.png"]


def test_every_kind_of_image_is_read_and_other_files_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "drive"
    folder.mkdir()
    for name in ("a.png", "b.jpg", "c.JPEG", "d.webp", "e.bmp"):
        done, content = cv2.imencode(Path(name).suffix.lower(), picture(100))
        assert done
        (folder / name).write_bytes(content.tobytes())
    (folder / "notes.txt").write_text("no image")
    (folder / "._a.png").write_bytes(b"left by another file system")
    (folder / "folder.png").mkdir()
    source = open_source(folder)
    assert [frame.name for frame in source] == [
        f"drive/{n}" for n in ("a.png", "b.jpg", "c.JPEG", "d.webp", "e.bmp")
    ]
    assert all(abs(n - 100) <= 2 for n in numbers(source))


@pytest.mark.parametrize("beside", ["drive", "drive/images"])
def test_stamps_come_from_the_labels(tmp_path: Path, beside: str) -> None:
    make_folder(tmp_path / "drive" / "images", 3)
    rows = {f"{n}.png": {"anomaly": False, "stamp_s": 100.5 + n} for n in range(3)}
    (tmp_path / beside / "labels.json").write_text(json.dumps(rows))
    stamps = [frame.stamp_ns for frame in open_source(tmp_path / "drive")]
    assert stamps == [100_500_000_000, 101_500_000_000, 102_500_000_000]


@pytest.mark.parametrize("rows", [{"0.png": {"anomaly": True}}, ["0.png"], {}])
def test_labels_without_stamps_change_nothing(tmp_path: Path, rows: object) -> None:
    folder = make_folder(tmp_path / "drive", 2)
    (folder / "labels.json").write_text(json.dumps(rows))
    assert [frame.stamp_ns for frame in open_source(folder)] == [0, 100_000_000]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("{", "labels .* cannot be read"),
        ('{"0.png": {"stamp_s": 1}}', r"stamp_s in seconds for '1\.png', found None"),
        ('{"0.png": {"stamp_s": 1}, "1.png": {"stamp_s": "2"}}', "found '2'"),
        ('{"0.png": {"stamp_s": 1}, "1.png": {"stamp_s": NaN}}', "found nan"),
        ('{"0.png": {"stamp_s": 1}, "1.png": {"stamp_s": true}}', "found True"),
    ],
)
def test_labels_with_some_stamps_are_refused(tmp_path: Path, content: str, found: str) -> None:
    folder = make_folder(tmp_path / "drive", 2)
    (folder / "labels.json").write_text(content)
    with pytest.raises(SourceError, match=found):
        open_source(folder)


@pytest.mark.parametrize(
    "selection",
    ["0:4", ":4", "4:", ":", "::3", "1:9:3", "-3:", ":-3", "-4:-2", "8:100", "-100:2", "2:8:"],
)
def test_selections_mean_what_python_slices_mean(tmp_path: Path, selection: str) -> None:
    folder = make_folder(tmp_path / "drive")
    video = make_video(tmp_path / "film.avi", 10)
    parts = [int(part) if part else None for part in selection.split(":")]
    expected = list(range(10))[slice(*parts)]
    source = open_source(f"{folder}[{selection}]")
    assert numbers(source) == expected
    assert source.count == len(expected)
    assert [frame.name for frame in source] == [f"drive/{n}.png" for n in expected]
    source = open_source(f"{video}[{selection}]")
    assert [round(n / 10) for n in numbers(source)] == expected
    assert source.count == len(expected)
    assert [frame.name for frame in source] == [f"film/{n:06d}" for n in expected]
    assert [frame.stamp_ns for frame in source] == [n * 40_000_000 for n in expected]


@pytest.mark.parametrize("tail", ["[5]", "[a:b]", "[1:2:0]", "[1:2:-1]", "[-:]", "[1:2:3:4]", "[]"])
def test_what_is_no_selection_is_refused(tmp_path: Path, tail: str) -> None:
    folder = make_folder(tmp_path / "drive", 2)
    with pytest.raises(SourceError, match=r"\[START:STOP:STEP\] with a positive step"):
        open_source(f"{folder}{tail}")


@pytest.mark.parametrize("tail", ["[50:]", "[3:3]", "[5:2]"])
def test_a_selection_of_nothing_is_refused(tmp_path: Path, tail: str) -> None:
    folder = make_folder(tmp_path / "drive")
    with pytest.raises(SourceError, match=r"drive': expected frames, found none in \[\d:?.* of 10"):
        open_source(f"{folder}{tail}")


def test_a_path_that_exists_is_taken_as_it_stands(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "drive[0:2]", 3)
    assert split_selection(folder) == (folder, slice(None))
    assert open_source(folder).count == 3
    assert open_source(f"{folder}[1:]").count == 2


def test_sizes_that_vary_are_refused_with_both_sizes_and_the_file(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "drive", 3)
    write_image(folder / "2.png", picture(2, 20, 30))
    frames = iter(open_source(folder))
    next(frames), next(frames)
    with pytest.raises(ImageError, match=r"32x24 as 'drive/0\.png', found 30x20 in 'drive/2\.png'"):
        next(frames)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "drive", 3)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:-10])
    with pytest.raises(ImageError, match=r"drive/1\.png': PNG image is truncated"):
        list(open_source(folder))


def test_sources_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere' does not exist"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"empty': expected images \(\.png, .*found none$"):
        open_source(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(SourceError, match=r"expected a folder of images, a video .* or a bag"):
        open_source(tmp_path / "notes.txt")
    with pytest.raises(SourceError, match="File name too long"):
        open_source(tmp_path / ("x" * 300))


def test_a_bag_folder_without_metadata_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "drive_0.mcap").write_bytes(b"")
    with pytest.raises(SourceError, match=r"found none; drive_0\.mcap lacks its metadata\.yaml"):
        open_source(tmp_path)


def test_a_topic_is_of_no_concern_to_other_sources(tmp_path: Path) -> None:
    assert open_source(make_folder(tmp_path / "drive", 2), topic="/camera").count == 2


@pytest.mark.parametrize(("name", "fourcc"), [("film.avi", "MJPG"), ("film.mp4", "mp4v")])
def test_videos_are_stamped_by_their_rate(tmp_path: Path, name: str, fourcc: str) -> None:
    source = open_source(make_video(tmp_path / name, 12, 20.0, fourcc))
    assert source.count == 12
    frames = list(source)
    assert [frame.stamp_ns for frame in frames] == [n * 50_000_000 for n in range(12)]
    assert [frame.name for frame in frames] == [f"film/{n:06d}" for n in range(12)]
    assert frames[0].image.shape == (48, 64, 3)
    assert [round(n / 10) for n in numbers(source)] == list(range(12))


def test_a_video_is_rgb(tmp_path: Path) -> None:
    path = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    writer.write(np.full((48, 64, 3), (200, 60, 20), np.uint8))
    writer.release()
    (frame,) = open_source(path)
    assert np.abs(frame.image[24, 32].astype(int) - (20, 60, 200)).max() <= 6


def test_a_video_cut_off_gives_the_frames_it_has(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "film.avi", 40).read_bytes()
    (tmp_path / "half.avi").write_bytes(whole[: len(whole) // 2])
    frames = list(open_source(tmp_path / "half.avi"))
    assert 5 < len(frames) < 40
    last = open_source(f"{tmp_path / 'half.avi'}[-1:]")
    assert [frame.name for frame in last] == [frames[-1].name]


@pytest.mark.parametrize("content", [b"", b"no video at all" * 100])
def test_a_file_that_is_no_video_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "film.mp4").write_bytes(content)
    with pytest.raises(SourceError, match=r"video '.*film\.mp4' cannot be opened"):
        open_source(tmp_path / "film.mp4")


def test_a_video_without_its_index_is_refused(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "film.mp4", 40, fourcc="mp4v").read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"half\.mp4"):
        open_source(tmp_path / "half.mp4")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the evaluation data is not there")
def test_real_drives_are_read() -> None:
    drive = open_source(f"{SHARED / 'carla_drives' / 'spawn_props'}[0:56]")
    assert drive.count == 56
    first = next(iter(drive))
    assert first.name == "spawn_props/00000.jpg"
    assert first.image_hw == (720, 1280)
    (last,) = open_source(f"{SHARED / 'carla_drives' / 'spawn_props'}[-1:]")
    assert (last.name, last.stamp_ns) == ("spawn_props/00139.jpg", 13_900_000_000)
    assert next(iter(open_source(SHARED / "road_obstacle21"))).image_hw == (1080, 1920)
