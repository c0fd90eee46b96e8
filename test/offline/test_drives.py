"""Opened drives: their names, and their frames with embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from worlds.drives import make_folder
from worlds.nominal_drives import CountingEmbedder

from semantic_anomaly.errors import SourceError
from semantic_anomaly.offline.drives import drive_names, embedded_frames, open_drives


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "a", 6)


def test_drives_are_named_by_source_and_selection(folder: Path, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other" / "a", 2)
    drives = open_drives([f"{folder}[0:2]", f"{folder}[1:6:2]", f"{folder}[-1:]", folder, other])
    assert list(drives) == ["a[0:2]", "a[1:6:2]", "a[-1:]", "a", "a (2)"]
    assert drive_names(drives) == list(drives)


def test_a_folder_has_the_drives_that_its_labels_name(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", 6)
    labels = {f"{n}.png": {"drive": "first" if n < 4 else "second"} for n in range(6)}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    drives = open_drives(tmp_path)
    names = [f"{tmp_path.name}/first", f"{tmp_path.name}/second"]
    assert drive_names(drives) == names
    frames = embedded_frames(drives, CountingEmbedder())
    assert [drive for drive, *_ in frames] == [names[0]] * 4 + [names[1]] * 2
    # A single one of them is a drive like any other.
    selected = open_drives(f"{tmp_path}[0:4]")
    assert drive_names(selected) == list(selected) == [f"{tmp_path.name}[0:4]"]


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
