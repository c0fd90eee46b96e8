from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from worlds.drives import gray_image, gray_levels, make_folder, make_video

from semantic_anomaly.errors import ImageError, SourceError
from semantic_anomaly.io.images import write_image
from semantic_anomaly.io.open import open_source
from semantic_anomaly.io.sources import Arrays, ImageFiles, folder_images

REAL_DATA = Path(os.environ.get("SEMANTIC_ANOMALY_DATA", ""))


def test_a_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    source = open_source(make_folder(tmp_path / "drive", 12))
    assert source.count == 12
    frames = list(source)
    assert [frame.name for frame in frames] == [f"drive/{n}.png" for n in range(12)]
    assert [frame.stamp_ns for frame in frames] == [n * 100_000_000 for n in range(12)]
    assert all(frame.decode_ms > 0 for frame in frames)
    assert gray_levels(source) == list(range(12))
    assert gray_levels(source) == list(range(12)), "a source can be read again"


def test_an_images_subfolder_and_its_parent_are_the_same_drive(tmp_path: Path) -> None:
    make_folder(tmp_path / "drive" / "images", 3)
    make_folder(tmp_path / "drive" / "masks", 1)
    for path in (tmp_path / "drive", tmp_path / "drive" / "images"):
        names = [frame.name for frame in open_source(path)]
        assert names == ["drive/0.png", "drive/1.png", "drive/2.png"]


def test_every_format_of_image_is_read_and_other_files_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "drive"
    folder.mkdir()
    names = ["a.png", "b.jpg", "c.JPEG", "d.webp", "e.bmp", "f.tif", "g.TIFF"]
    for name in names:
        done, content = cv2.imencode(Path(name).suffix.lower(), gray_image(100))
        assert done
        (folder / name).write_bytes(content.tobytes())
    (folder / "notes.txt").write_text("no image")
    (folder / "._a.png").write_bytes(b"left by another file system")
    (folder / "folder.png").mkdir()
    source = open_source(folder)
    assert [frame.name for frame in source] == [f"drive/{name}" for name in names]
    assert all(abs(level - 100) <= 2 for level in gray_levels(source))


def test_images_of_other_formats_are_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder(tmp_path / "drive", 2)
    for name in ("a.HEIC", "b.heic", "c.gif", "notes.txt", ".d.gif"):
        (folder / name).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert open_source(folder).count == 2
    (record,) = caplog.records
    assert record.getMessage().endswith("drive': left out 3 images of other formats (.gif, .heic)")
    for name in ("0.png", "1.png"):
        (folder / name).unlink()
    with pytest.raises(SourceError, match=r"found 3 images of other formats \(\.gif, \.heic\)$"):
        open_source(folder)


def test_broken_links_are_refused_by_name(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "drive", 2)
    (folder / "2.png").symlink_to(folder / "1.png")
    assert open_source(folder).count == 3
    for number in range(3, 10):
        (folder / f"{number}.png").symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(SourceError, match=r"drive': .*links: 3\.png, 4\.png, .*7\.png and 2 more"):
        open_source(folder)


@pytest.mark.parametrize("beside", ["drive", "drive/images"])
def test_stamps_come_from_the_labels(tmp_path: Path, beside: str) -> None:
    make_folder(tmp_path / "drive" / "images", 3)
    rows = {f"{n}.png": {"anomaly": False, "stamp_s": 100.5 + n} for n in range(3)}
    (tmp_path / beside / "labels.json").write_text(json.dumps(rows))
    stamps = [100_500_000_000, 101_500_000_000, 102_500_000_000]
    assert [frame.stamp_ns for frame in open_source(tmp_path / "drive")] == stamps
    (frame,) = open_source(tmp_path / "drive" / "images" / "1.png")
    assert frame.stamp_ns == stamps[1]


@pytest.mark.parametrize("rows", [{"0.png": {"anomaly": True}}, ["0.png"]])
def test_labels_without_stamps_change_nothing(tmp_path: Path, rows: object) -> None:
    folder = make_folder(tmp_path / "drive", 2)
    (folder / "labels.json").write_text(json.dumps(rows))
    assert [frame.stamp_ns for frame in open_source(folder)] == [0, 100_000_000]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "labels .* cannot be read"),
        ('{"0.png": {"stamp_s": 1}}', r"stamp_s in seconds for '1\.png', found None"),
        ('{"0.png": {"stamp_s": 1}, "1.png": {"stamp_s": "2"}}', "found '2'"),
        ('{"0.png": {"stamp_s": 1}, "1.png": {"stamp_s": NaN}}', "found nan"),
        ('{"0.png": {"stamp_s": 1}, "1.png": {"stamp_s": true}}', "found True"),
        ('{"0.png": {"stamp_s": 1}, "1.png": {"stamp_s": 1e300}}', r"found 1e\+300"),
        ('{"0.png": {"stamp_s": 1}, "1.png": {"stamp_s": -1' + "0" * 400 + "}}", "found -10000"),
    ],
)
def test_labels_with_some_stamps_are_refused(tmp_path: Path, content: str, message: str) -> None:
    folder = make_folder(tmp_path / "drive", 2)
    (folder / "labels.json").write_text(content)
    with pytest.raises(SourceError, match=message):
        open_source(folder)


def test_drives_come_from_the_labels_if_they_name_all(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "drive", 3)
    rows = {f"{n}.png": {"drive": "north" if n < 2 else "south"} for n in range(3)}
    (folder / "labels.json").write_text(json.dumps(rows))
    source = open_source(folder)
    assert source.drives == ("north", "south")
    assert [source.drive_of(frame) for frame in source] == ["north", "north", "south"]
    assert open_source(f"{folder}[2:]").drives == ("south",)
    del rows["1.png"]
    (folder / "labels.json").write_text(json.dumps(rows))
    assert open_source(folder).drives == ("",)


def test_files_of_several_folders_are_several_drives_with_unique_names(tmp_path: Path) -> None:
    north = make_folder(tmp_path / "north" / "camera" / "images", 2)
    south = make_folder(tmp_path / "south" / "camera", 1)
    rows = {"0.png": {"drive": "a", "stamp_s": 7}, "1.png": {"drive": "b", "stamp_s": 8}}
    (north.parent / "labels.json").write_text(json.dumps(rows))
    files = [*folder_images(north), *folder_images(south)]
    source = ImageFiles(files)
    frames = list(source)
    names = ["north/camera/0.png", "north/camera/1.png", "south/camera/0.png"]
    assert [frame.name for frame in frames] == names
    assert [frame.stamp_ns for frame in frames] == [7_000_000_000, 8_000_000_000, 200_000_000]
    assert source.drives == ("north/camera/a", "north/camera/b", "south/camera")
    assert source.drive_of(frames[2]) == "south/camera"
    assert (source.name, source.path) == (tmp_path.name, tmp_path)
    assert [frame.name for frame in ImageFiles(files, name="city")] == [f"city/{n}" for n in names]
    with pytest.raises(SourceError, match=r"image '.*south/camera/0\.png' is given twice"):
        ImageFiles([*files, files[2]])


def test_sources_of_the_same_files_are_recognised(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "drive" / "images", 3)
    (tmp_path / "link").symlink_to(folder)
    source = open_source(folder.parent)
    for same in (folder, tmp_path / "link", f"{folder}/*.png"):
        assert source.reads_same(open_source(same)), same
    for other in (f"{folder}[1:]", folder / "1.png", make_folder(tmp_path / "other", 3)):
        assert not source.reads_same(open_source(other)), other
    assert not Arrays([gray_image(1)]).reads_same(Arrays([gray_image(1)]))


def test_sizes_that_vary_are_refused_with_both_sizes_and_the_file(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "drive", 3)
    write_image(folder / "2.png", gray_image(2, 20, 30))
    frames = iter(open_source(folder))
    next(frames), next(frames)
    with pytest.raises(ImageError, match=r"32x24 as 'drive/0\.png', found 30x20 in 'drive/2\.png'"):
        next(frames)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "drive", 3)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:-10])
    with pytest.raises(ImageError, match=r"drive/1\.png': PNG image is truncated"):
        list(open_source(folder))


def test_a_bag_folder_without_metadata_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "drive_0.mcap").write_bytes(b"")
    with pytest.raises(SourceError, match=r"cannot be opened .*metadata file"):
        open_source(tmp_path)


@pytest.mark.parametrize(("name", "fourcc"), [("film.avi", "MJPG"), ("film.mp4", "mp4v")])
def test_videos_are_stamped_by_their_rate(tmp_path: Path, name: str, fourcc: str) -> None:
    source = open_source(make_video(tmp_path / name, 12, 20.0, fourcc))
    assert source.count == 12
    frames = list(source)
    assert [frame.stamp_ns for frame in frames] == [n * 50_000_000 for n in range(12)]
    assert [frame.name for frame in frames] == [f"film/{n:06d}" for n in range(12)]
    assert frames[0].image.shape == (48, 64, 3)
    assert [round(n / 10) for n in gray_levels(source)] == list(range(12))


@pytest.mark.parametrize(
    ("times_ms", "stamps_ms"),
    [
        ([0, 1000, 2000, 2050, 2100], [0, 1000, 2000, 2050, 2100]),
        # Containers that do not begin at 0, have no times, or repeat one.
        ([500, 540, 640, 740, 840], [0, 40, 140, 240, 340]),
        ([0, 0, 0, 0, 0], [0, 100, 200, 300, 400]),
        ([0, 80, 80, 300, 400], [0, 80, 180, 300, 400]),
    ],
)
def test_videos_of_variable_rate_are_stamped_by_their_container(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    times_ms: list[float],
    stamps_ms: list[int],
) -> None:
    film = make_video(tmp_path / "film.avi", 5, 10.0)

    class Capture:
        def __init__(self, path: str) -> None:
            self._capture, self._number = real(path), -1

        def get(self, key: int) -> float:
            position = key == cv2.CAP_PROP_POS_MSEC
            return times_ms[self._number] if position else self._capture.get(key)

        def grab(self) -> bool:
            self._number += 1
            return self._capture.grab()

        def __getattr__(self, name: str) -> object:
            return getattr(self._capture, name)

    real = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    source = open_source(film)
    assert [frame.stamp_ns for frame in source] == [ms * 1_000_000 for ms in stamps_ms]
    part = open_source(f"{film}[2:4]")
    assert [frame.stamp_ns for frame in part] == [ms * 1_000_000 for ms in stamps_ms[2:4]]


def test_a_video_is_rgb(tmp_path: Path) -> None:
    path = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    writer.write(np.full((48, 64, 3), (200, 60, 20), np.uint8))
    writer.release()
    (frame,) = open_source(path)
    assert np.abs(frame.image[24, 32].astype(int) - (20, 60, 200)).max() <= 6


def test_a_truncated_video_gives_the_frames_it_has_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = make_video(tmp_path / "film.avi", 40).read_bytes()
    (tmp_path / "half.avi").write_bytes(whole[: len(whole) // 2])
    frames = list(open_source(tmp_path / "half.avi"))
    assert 5 < len(frames) < 40
    source = open_source(tmp_path / "half.avi")
    caplog.clear()
    with caplog.at_level("WARNING"):
        assert source.losses == "" and len(list(source)) == len(list(source)) == len(frames)
    assert source.shortfall == 40 - len(frames)
    assert f"{40 - len(frames)} frames fewer than announced" in source.losses
    warnings = [text for text in caplog.messages if f"{len(frames)} of about 40 frames" in text]
    assert len(warnings) == 1, "said once, not at every reading"
    part = open_source(f"{tmp_path / 'half.avi'}[0:5]")
    assert len(list(part)) == 5 and not part.losses
    last = open_source(f"{tmp_path / 'half.avi'}[-1:]")
    assert [frame.name for frame in last] == [frames[-1].name]


def test_bad_frames_are_left_out_up_to_a_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(20):
        write_image(tmp_path / f"drive/{number:02d}.png", np.full((24, 32, 3), number, np.uint8))
    for number in (0, 7):
        (tmp_path / f"drive/{number:02d}.png").write_bytes(b"\x89PNG")
    source = open_source(tmp_path / "drive")
    source.max_bad_share = 0.1
    with caplog.at_level("WARNING"):
        frames = [list(source) for _ in range(2)][-1]
    assert len(frames) == 18 and frames[0].name == "drive/01.png"
    assert [bad.name for bad in source.bad_frames] == ["drive/00.png", "drive/07.png"]
    assert source.losses.endswith("2 bad frames (drive/00.png, ...)")
    assert len(caplog.messages) == 2, "each is said once"
    assert frames[6].stamp_ns - frames[5].stamp_ns == 200_000_000, "the rest keeps its stamps"
    (tmp_path / "drive/12.png").write_bytes(b"")
    with pytest.raises(SourceError, match=r"at most 2 bad frames \(10%\), found more.*12\.png"):
        list(source)
    with pytest.raises(ImageError, match=r"00\.png"):
        list(open_source(tmp_path / "drive"))


def test_a_source_of_bad_frames_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "drive").mkdir()
    (tmp_path / "drive/0.png").write_bytes(b"\x89PNG")
    source = open_source(tmp_path / "drive")
    source.max_bad_share = 0.1
    with pytest.raises(ImageError, match=r"0\.png"):
        list(source)


def test_files_that_are_no_video_or_lack_its_index_are_named(tmp_path: Path) -> None:
    whole = make_video(tmp_path / "film.mp4", 10, fourcc="mp4v").read_bytes()
    for content in (b"", b"no video at all" * 100, whole[: len(whole) // 2]):
        (tmp_path / "film.mp4").write_bytes(content)
        with pytest.raises(SourceError, match=r"video '.*film\.mp4' cannot be opened"):
            open_source(tmp_path / "film.mp4")


@pytest.mark.skipif(
    not (REAL_DATA / "carla_drives").is_dir(), reason="SEMANTIC_ANOMALY_DATA has no such drives"
)
def test_real_drives_are_read() -> None:
    path = REAL_DATA / "carla_drives" / "spawn_props"
    drive = open_source(f"{path}[0:56]")
    assert drive.count == 56
    first = next(iter(drive))
    assert first.name == "spawn_props/00000.jpg"
    assert first.image_hw == (720, 1280)
    (last,) = open_source(f"{path}[-1:]")
    assert (last.name, last.stamp_ns) == ("spawn_props/00139.jpg", 13_900_000_000)
    assert next(iter(open_source(REAL_DATA / "road_obstacle21"))).image_hw == (1080, 1920)
