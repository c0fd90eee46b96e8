from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.bags import RAW, raw, write_bag
from worlds.drives import gray_image, gray_levels, make_folder, make_video

from semantic_anomaly.errors import ImageError, SourceError
from semantic_anomaly.io.images import write_image
from semantic_anomaly.io.open import open_source, split_selection


def frame_names(source: Any) -> list[str]:
    return [frame.name for frame in open_source(source)]


@pytest.mark.parametrize(
    "selection", [":4", "4:", ":", "1:9:3", "-3:", ":-3", "-4:-2", "8:100", "-100:2", "2:8:"]
)
def test_selections_mean_what_python_slices_mean(tmp_path: Path, selection: str) -> None:
    folder = make_folder(tmp_path / "drive")
    video = make_video(tmp_path / "film.avi", 10)
    parts = [int(part) if part else None for part in selection.split(":")]
    expected = list(range(10))[slice(*parts)]
    source = open_source(f"{folder}[{selection}]")
    assert gray_levels(source) == expected
    assert source.count == len(expected)
    assert [frame.name for frame in source] == [f"drive/{n}.png" for n in expected]
    source = open_source(f"{video}[{selection}]")
    assert [round(n / 10) for n in gray_levels(source)] == expected
    assert source.count == len(expected)
    assert [frame.name for frame in source] == [f"film/{n:06d}" for n in expected]
    assert [frame.stamp_ns for frame in source] == [n * 40_000_000 for n in expected]


@pytest.mark.parametrize("tail", ["[5]", "[a:b]", "[1:2:0]", "[1:2:-1]", "[-:]", "[1:2:3:4]", "[]"])
def test_other_brackets_are_refused(tmp_path: Path, tail: str) -> None:
    folder = make_folder(tmp_path / "drive", 2)
    with pytest.raises(SourceError, match=r"\[START:STOP:STEP\] with a positive step"):
        open_source(f"{folder}{tail}")


@pytest.mark.parametrize("tail", ["[50:]", "[3:3]", "[5:2]"])
def test_an_empty_selection_is_refused(tmp_path: Path, tail: str) -> None:
    folder = make_folder(tmp_path / "drive")
    with pytest.raises(SourceError, match=r"drive': expected frames, found none in \[\d:?.* of 10"):
        open_source(f"{folder}{tail}")


def test_an_existing_path_is_used_as_it_is(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "drive[0:2]", 3)
    assert split_selection(folder) == (folder, slice(None))
    assert open_source(folder).count == 3
    assert open_source(f"{folder}[1:]").count == 2
    assert open_source(make_folder(tmp_path / "dri*", 4)).count == 4


def test_an_image_file_is_a_source_of_one_frame(tmp_path: Path) -> None:
    file = make_folder(tmp_path / "drive", 2) / "1.png"
    assert frame_names(file) == frame_names(f"{file}[0:]") == ["drive/1.png"]


def test_a_pattern_matches_images_in_natural_order(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "drive", 12)
    (folder / "labels.json").write_text("{}")
    (folder / "masks").mkdir()
    everything = [f"drive/{n}.png" for n in range(12)]
    assert frame_names(f"{folder}/*") == frame_names(f"{folder}/*.png") == everything
    assert frame_names(f"{tmp_path}/**/*.png[-2:]") == everything[-2:]
    assert frame_names(f"{folder}/1[01].png") == everything[10:]
    assert frame_names(f"{folder}/?.png") == everything[:10]


def test_a_pattern_matches_folders_where_it_matches_no_image(tmp_path: Path) -> None:
    for name in ("north", "south"):
        make_folder(tmp_path / "drives" / name / "images", 2)
    names = ["north/0.png", "north/1.png", "south/0.png", "south/1.png"]
    assert frame_names(f"{tmp_path}/drives/*") == names
    assert frame_names(f"{tmp_path}/drives/[ns]*th[1:3]") == names[1:3]
    assert frame_names(f"{tmp_path}/drives/[nm]ort[gh]") == names[:2]
    source = open_source(f"{tmp_path}/drives/*")
    assert (source.name, source.drives) == ("drives", ("north", "south"))


def test_several_files_and_folders_are_one_source(tmp_path: Path) -> None:
    north, south = (make_folder(tmp_path / name, 4) for name in ("north", "south"))
    assert frame_names([north, str(south)]) == [
        *(f"north/{n}.png" for n in range(4)),
        *(f"south/{n}.png" for n in range(4)),
    ]
    entries = [south / "2.png", f"{north}[1:3]", f"{south}/[01].png"]
    expected = ["south/2.png", "north/1.png", "north/2.png", "south/0.png", "south/1.png"]
    assert frame_names(entries) == expected
    stamps = [frame.stamp_ns for frame in open_source(entries)]
    assert stamps == [n * 100_000_000 for n in range(5)]
    assert frame_names([south / "2.png", south / "0.png"]) == ["south/2.png", "south/0.png"]


def test_a_list_file_names_one_path_per_line(tmp_path: Path) -> None:
    make_folder(tmp_path / "data" / "drive", 6)
    other = make_folder(tmp_path / "other", 1)
    listed = tmp_path / "data" / "list.txt"
    listed.write_text(
        "\ufeff# nominal frames\n\n drive/5.png \ndrive/0.png\t# the first\n"
        f"drive/[12].png\n{other}\n"
    )
    expected = ["drive/5.png", "drive/0.png", "drive/1.png", "drive/2.png", "other/0.png"]
    assert frame_names(f"@{listed}") == expected
    assert frame_names(f"@{listed}[1:3]") == expected[1:3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("drive/0.png\n\ndrive/9.png\n", r"line 3: source '.*drive/9\.png' does not exist"),
        ("drive/*.jpg", r"line 1: source '.*drive/\*\.jpg': no file matches the pattern"),
        ("drive/notes.txt", r"line 1: source '.*notes\.txt': expected .*an image \(\.png, "),
        ("film.avi", r"line 1: source '.*film\.avi': expected images, found a video or bag"),
        ("bag", r"line 1: source '.*bag': expected images, found a video or bag"),
        ("empty", r"line 1: folder '.*empty': expected images"),
        ("drive\ndrive/1.png", r"image '.*drive/1\.png' is given twice"),
        ("# nothing\n", r"list '.*list\.txt': expected one path per line, found none"),
        (b"\xff\xfe\x00", r"list '.*list\.txt': expected UTF-8 text"),
        (None, r"list '.*list\.txt': No such file"),
    ],
)
def test_list_files_that_cannot_be_used_are_refused_with_the_line(
    tmp_path: Path, content: str | bytes | None, message: str
) -> None:
    (make_folder(tmp_path / "drive", 2) / "notes.txt").write_text("text")
    make_video(tmp_path / "film.avi", 1)
    write_bag(tmp_path / "bag", {RAW: [raw(0)]})
    (tmp_path / "empty").mkdir()
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(SourceError, match=message):
        open_source(f"@{tmp_path / 'list.txt'}")


def test_arrays_are_read_as_frames(rng: np.random.Generator) -> None:
    images = rng.integers(0, 256, (3, 24, 32, 3), dtype=np.uint8)
    for arrays in (images, list(images), tuple(images)):
        source = open_source(arrays)
        assert source.count == 3
        frames = list(source)
        assert [frame.name for frame in frames] == [f"array/{n:06d}" for n in range(3)]
        assert [frame.stamp_ns for frame in frames] == [0, 100_000_000, 200_000_000]
        for frame, image in zip(frames, images, strict=True):
            np.testing.assert_array_equal(frame.image, image)
    # BGR to RGB by a negative stride, which torch does not take.
    (frame,) = open_source(images[0][..., ::-1])
    assert frame.image.flags.c_contiguous
    np.testing.assert_array_equal(frame.image, images[0][..., ::-1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (np.zeros((4, 5), np.uint8), r"array/000000'.*found shape \(4, 5\), uint8"),
        (np.zeros((4, 5, 4), np.uint8), r"found shape \(4, 5, 4\)"),
        (np.zeros((2, 4, 5, 3), np.float32), "found shape .* float32"),
        ([gray_image(1), np.zeros((1, 4, 5, 3), np.uint8)], r"array/000001'.*found shape \(1, 4"),
        ([gray_image(1), "drive/0.png"], r"array/000001'.*found shape \(1,\)"),
        ([gray_image(1), gray_image(1, 4, 5)], r"of one size, 32x24 as 'array/000000', found 5x4"),
        (np.zeros((0, 4, 5, 3), np.uint8), "source 'array': expected frames, found none"),
        ([], "source 'images': expected frames, found none"),
        ([1, 2], "expected a path or an array, found int"),
    ],
)
def test_other_arrays_are_refused(arrays: Any, message: str) -> None:
    with pytest.raises((ImageError, SourceError), match=message):
        list(open_source(arrays))


def test_a_name_replaces_that_of_the_source(tmp_path: Path) -> None:
    sources: list[Any] = [
        make_folder(tmp_path / "drive", 1),
        make_video(tmp_path / "film.avi", 1),
        write_bag(tmp_path / "bag", {RAW: [raw(0)]}),
        gray_image(1),
    ]
    for path, tail in zip(sources, ("0.png", "000000", "000000", "000000"), strict=True):
        # A topic is ignored by sources that have none.
        topic = RAW if str(path).endswith("bag") else "/other"
        source = open_source(path, name="front", topic=topic)
        assert source.name == "front"
        assert [frame.name for frame in source] == [f"front/{tail}"]


def test_paths_that_are_no_source_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    write_image(tmp_path / "drive" / "0.png", gray_image(0))
    cases = {
        "nowhere": "nowhere' does not exist",
        "@nowhere.txt": "@nowhere.txt' does not exist",
        "empty": r"empty': expected images \(\.png, .*found none$",
        "notes.txt": r"expected a folder of images, an image .*, a video .* or a bag .*'@.*notes",
        "a.gif": r"a\.gif': expected a folder of images, an image \(\.png, .*\.tiff\)",
        "drive/*.jpg": r"drive/\*\.jpg': no file matches the pattern",
        "*.[tg]*": r"expected a pattern that matches images .*, found 2 other files",
        "x" * 300: "File name too long",
    }
    for path, message in cases.items():
        with pytest.raises(SourceError, match=message):
            open_source(tmp_path / path)
