"""Opened drives: their names, and their frames with embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.bags import RAW, data_file, raw, write_bag
from worlds.drives import gray_image, gray_levels, make_folder
from worlds.nominal_drives import CountingEmbedder

from semantic_anomaly.errors import SourceError
from semantic_anomaly.index.content import RecordedSource
from semantic_anomaly.io.open import open_source
from semantic_anomaly.io.sources import Arrays
from semantic_anomaly.offline.drives import (
    embedded_frames,
    open_drives,
    recorded_sources,
    recordings_of,
    reopened,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "a", 6)


def test_drives_are_named_by_source_and_selection(folder: Path, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other" / "a", 2)
    drives = open_drives([f"{folder}[0:2]", f"{folder}[1:6:2]", f"{folder}[-1:]", folder, other])
    assert list(drives) == ["a[0:2]", "a[1:6:2]", "a[-1:]", "a", "a (2)"]


def test_a_folder_has_the_drives_that_its_labels_name(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", 6)
    labels = {f"{n}.png": {"drive": "first" if n < 4 else "second"} for n in range(6)}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    drives = open_drives(tmp_path)
    names = [f"{tmp_path.name}/first", f"{tmp_path.name}/second"]
    recordings = recordings_of(drives)
    assert recordings == dict(zip(names, names, strict=True))
    frames = list(embedded_frames(drives, CountingEmbedder(), recordings=recordings))
    assert [drive for drive, *_ in frames] == [names[0]] * 4 + [names[1]] * 2
    assert [frame.recording for _, _, frame, _ in frames] == [names[0]] * 4 + [names[1]] * 2
    # A single one of them is a drive like any other.
    selected = open_drives(f"{tmp_path}[0:4]")
    assert list(recordings_of(selected)) == list(selected) == [f"{tmp_path.name}[0:4]"]
    # Two parts of it, of which one has both drives.
    parts = recordings_of(open_drives([f"{tmp_path}[0:3]", f"{tmp_path}[3:6]"]))
    assert list(parts.values()) == [tmp_path.name, tmp_path.name, names[1]]


def test_frames_are_embedded_in_batches_of_four(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    drives = open_drives([folder, make_folder(tmp_path / "b", 5)])
    embedder = CountingEmbedder()
    frames = list(embedded_frames(drives, embedder, progress=True))
    assert embedder.batches == [4, 2, 4, 1]
    assert [frame.name for _, _, frame, _ in frames][5:7] == ["a/5.png", "b/0.png"]
    assert all(source is drives[drive] for drive, source, _, _ in frames)
    assert capfd.readouterr() == ("", ""), "progress is shown on a terminal only"


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (lambda folder: [], "at least one drive"),
        (lambda folder: [folder / "missing"], "does not exist"),
        (lambda folder: [folder, folder.parent / "." / "a"], "given twice"),
    ],
)
def test_refuses_sources(folder: Path, sources: Callable[[Path], list[Any]], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_drives(sources(folder))


def test_frames_that_show_nothing_are_named(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 20, 30, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    assert len(list(embedded_frames({"day": Arrays(images, "day")}, CountingEmbedder()))) == 6
    assert not caplog.records
    images[:2] = 3
    assert len(list(embedded_frames({"day": Arrays(images, "day")}, CountingEmbedder()))) == 6
    [record] = caplog.records
    assert "source 'day': 2 of 6 frames are taken as nominal although they show" in record.message
    assert "image without contrast" in record.message and "'day[START:STOP]'" in record.message


def test_selections_of_one_folder_are_one_recording(folder: Path, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other" / "a", 2)
    drives = open_drives(
        [f"{folder}[0:2]", f"{folder}[2:6:2]", other, tmp_path / "a", f"{other}[1:]"]
    )
    assert recordings_of(drives) == {
        **{"a[0:2]": "a", "a[2:6:2]": "a", "a (2)": "a"},
        **{"a": "a (2)", "a[1:]": "a (2)"},
    }


def test_files_of_a_split_bag_are_one_recording(tmp_path: Path) -> None:
    paths = {}
    for folder, name in (("x", "run_0"), ("x", "run_1"), ("y", "run_0"), ("x", "run_20_0")):
        bag = write_bag(tmp_path / "made" / folder / name, {RAW: [raw(1), raw(2)]})
        paths[folder, name] = tmp_path / folder / f"{name}.mcap"
        paths[folder, name].parent.mkdir(exist_ok=True)
        data_file(bag).rename(paths[folder, name])
    drives = open_drives([*paths.values(), f"{paths['x', 'run_1']}[1:]"])
    assert list(recordings_of(drives).values()) == ["run", "run", "run (2)", "run_20", "run"]
    # A folder of a bag has a name of its own.
    bags = [write_bag(tmp_path / name, {RAW: [raw(1)]}) for name in ("drive_0", "drive_1")]
    assert list(recordings_of(open_drives(bags)).values()) == ["drive_0", "drive_1"]


def test_a_pattern_names_recordings(tmp_path: Path) -> None:
    names = ("run_part1", "run_part2", "walk_part1", "other", "walk")
    drives = open_drives([*(make_folder(tmp_path / name, 3) for name in names)])
    found = recordings_of(drives, "(.+)_part")
    assert list(found.values()) == ["run", "run", "walk", "other", "walk (2)"]
    assert list(recordings_of(drives).values()) == list(names)
    # A group without a match names nothing.
    assert list(recordings_of(drives, "(none)?").values()) == list(names)


def test_arrays_are_recordings_of_their_own() -> None:
    drives = open_drives([Arrays([gray_image(n)] * 2, name="same") for n in range(2)])
    assert list(recordings_of(drives).values()) == ["same", "same (2)"]


def test_parts_of_recordings_of_an_index_have_their_names(folder: Path, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other" / "a", 4)
    opened = open_drives([f"{other}[0:2]", f"{folder}[0:2]"])
    recorded = recorded_sources(opened, recordings_of(opened))
    assert [list(source.recordings.values()) for source in recorded] == [["a"], ["a (2)"]]
    third = make_folder(tmp_path / "third" / "a", 2)
    further = open_drives([third, f"{folder}[2:4]", f"{other}[2:]"])
    assert list(recordings_of(further, "", recorded).values()) == ["a (3)", "a (2)", "a"]


def test_other_files_of_a_split_bag_of_an_index_have_its_name(tmp_path: Path) -> None:
    for name in ("run_0", "run_1"):
        bag = write_bag(tmp_path / "made" / name, {RAW: [raw(1), raw(2)]})
        data_file(bag).rename(tmp_path / f"{name}.mcap")
    opened = open_drives([tmp_path / "run_0.mcap"])
    recorded = recorded_sources(opened, recordings_of(opened))
    further = open_drives([tmp_path / "run_1.mcap"])
    assert recordings_of(further, "", recorded) == {next(iter(further)): "run"}


def recorded_of(*sources: Any) -> list[RecordedSource]:
    opened = open_drives([*sources])
    return recorded_sources(opened, recordings_of(opened))


def test_sources_are_opened_again_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    make_folder(Path("a"), 6)
    make_folder(Path("b") / "images", 2)
    Path("list.txt").write_text("a/1.png\na/3.png\n")
    write_bag(Path("bag"), {RAW: [raw(1), raw(2)], "/other": [raw(3)]})
    bag = open_source("bag", topic=RAW)
    sources = ["a[1:3]", Path("b"), "@list.txt", "a/*.png", bag]
    recorded = recorded_of(*sources)
    listed = recorded_of("a/2.png", Path("a/0.png"))
    expected = [gray_levels(source) for source in open_drives(sources).values()]
    monkeypatch.chdir(tmp_path)
    drives, recordings = reopened(recorded, {})
    assert [gray_levels(source) for source in drives.values()] == expected
    assert list(drives) == [source.name for source in recorded] == list(recordings)
    assert drives[recorded[-1].name].topic == RAW
    [source] = reopened(listed, {})[0].values()
    assert gray_levels(source) == [2, 0]


def test_drives_of_labels_are_opened_again(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", 6)
    labels = {f"{n}.png": {"drive": "first" if n < 4 else "second"} for n in range(6)}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    recorded = recorded_of(tmp_path)
    name = tmp_path.name
    assert recorded[0].recordings == {"first": f"{name}/first", "second": f"{name}/second"}
    assert list(reopened(recorded, {})[1]) == [f"{name}/first", f"{name}/second"]
    labels["0.png"]["drive"] = "third"
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(SourceError, match=r"expected the drives \['first', 'second'\], found"):
        reopened(recorded, {})


def test_moved_sources_are_found_by_their_new_beginning(folder: Path, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "ab", 2)
    (folder / "list.txt").write_text("4.png\n5.png\n")
    image = open_source([folder / "2.png"])
    recorded = recorded_of(f"{folder}[0:2]", other, f"@{folder}/list.txt", image)
    levels = [gray_levels(source) for source in reopened(recorded, {})[0].values()]
    folder.rename(tmp_path / "moved")
    with pytest.raises(SourceError, match=rf"source 'a\[0:2\]' of the index: .*{folder}.*OLD=NEW"):
        reopened(recorded, {})
    for moved in (
        {f"{folder}": f"{tmp_path / 'moved'}"},
        {f"{folder}/": f"{tmp_path / 'moved'}"},
        {f"{folder}": f"{tmp_path / 'moved'}/"},
    ):
        drives, _ = reopened(recorded, moved)
        assert [gray_levels(source) for source in drives.values()] == levels
        assert list(drives) == [source.name for source in recorded]
    with pytest.raises(SourceError, match="moved source '/none': expected the beginning of a path"):
        reopened(recorded, {**moved, "/none": "/other"})


def test_sources_in_memory_are_not_opened_again() -> None:
    recorded = recorded_of(Arrays([gray_image(1)] * 2))
    with pytest.raises(SourceError, match="source 'array' of the index was in memory"):
        reopened(recorded, {})
