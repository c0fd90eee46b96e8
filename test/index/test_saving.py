"""An index on disk: whole, the old one, or none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.files import file_size_limit
from worlds.nominal_world import DIM, build, patches

from semantic_anomaly.errors import (
    ArtefactError,
)
from semantic_anomaly.index import format as index_format
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import ImageRegion


@pytest.fixture(scope="module")
def index() -> NominalIndex:
    return build()


@pytest.fixture(scope="module")
def saved(index: NominalIndex, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "index"
    index.save(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_what_was_saved_is_what_is_loaded(index: NominalIndex, saved: Path) -> None:
    loaded = NominalIndex.load(saved)
    assert loaded.fingerprint == index.fingerprint
    assert (loaded.identity, loaded.report) == (index.identity, index.report)
    assert (loaded.count, loaded.dim, loaded.camera) == (index.count, DIM, "camera")
    assert loaded.frame_names == index.frame_names
    assert loaded.region_description == ImageRegion().describe()
    assert loaded.manifest["written"]["source"] == ["drive"]
    assert json.loads((saved / "manifest.json").read_text()) == loaded.manifest
    queries = patches(2, seed=3)
    np.testing.assert_array_equal(
        loaded.exact_distances(queries, 2), index.exact_distances(queries, 2)
    )


def test_a_loaded_index_can_be_saved_elsewhere(saved: Path, tmp_path: Path) -> None:
    loaded = NominalIndex.load(saved)
    loaded.save(tmp_path / "other")
    assert NominalIndex.load(tmp_path / "other").fingerprint == loaded.fingerprint


def test_size_is_predicted(tmp_path: Path) -> None:
    index = build(40, dedup_distance=0.0)
    index.save(tmp_path / "index")
    files = [tmp_path / "index" / n for n in ("graph.hnsw", "embeddings.npy", "entries.npy")]
    written = sum(file.stat().st_size for file in files)
    assert NominalIndex.predicted_bytes(index.count, DIM, 8) == pytest.approx(written, rel=0.02)


def test_saving_replaces_an_index_and_its_calibration(copy: Path) -> None:
    (copy / "calibration.json").write_text("{}")
    (copy / ".calibration.json.tmp").write_text("left by an interrupted write")
    NominalIndex.load(copy)
    build(3).save(copy)
    assert NominalIndex.load(copy).frame_names == ("drive/000", "drive/001", "drive/002")
    assert not (copy / "calibration.json").exists()
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


def test_saving_replaces_a_damaged_index(copy: Path, index: NominalIndex) -> None:
    (copy / "manifest.json").write_text("{")
    (copy / "graph.hnsw").unlink()
    index.save(copy)
    assert NominalIndex.load(copy).fingerprint == index.fingerprint


def test_saving_replaces_nothing_else(tmp_path: Path, index: NominalIndex) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "frames_only" / "frames").mkdir(parents=True)
    (tmp_path / "file").write_bytes(b"1")
    for name in ("photos", "frames_only", "file"):
        with pytest.raises(ArtefactError, match=name):
            index.save(tmp_path / name)
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"
    (tmp_path / "empty").mkdir()
    index.save(tmp_path / "empty")
    assert NominalIndex.load(tmp_path / "empty").count == index.count


@pytest.mark.parametrize("limit", [0, 1, 2000, 20_000, 40_000])
def test_full_disk_is_noticed_and_leaves_the_old_index(
    copy: Path, index: NominalIndex, limit: int
) -> None:
    before = NominalIndex.load(copy).fingerprint
    larger = build(20)
    with file_size_limit(limit), pytest.raises(ArtefactError, match="cannot write"):
        larger.save(copy)
    with file_size_limit(limit), pytest.raises(ArtefactError, match="cannot write"):
        larger.save(copy.parent / "new")
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]
    assert NominalIndex.load(copy).fingerprint == before


def test_graph_cut_short_is_noticed_even_if_everything_else_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build()
    size = index.count * 100
    written = index_format.write_content

    def cut(folder: Path, *rest: Any) -> None:
        # What hnswlib leaves on a full disk: less, and no exception.
        os.truncate(folder / "graph.hnsw", size)
        written(folder, *rest)

    monkeypatch.setattr("semantic_anomaly.index.nominal_index.write_content", cut)
    with pytest.raises(ArtefactError, match=r"cannot write.*graph\.hnsw"):
        index.save(tmp_path / "index")
    assert not list(tmp_path.iterdir())


_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
import semantic_anomaly.index.nominal_index as module
from worlds.nominal_world import build
def killed(folder, *rest):
    os.kill(os.getpid(), signal.SIGKILL)
module.write_content = killed
build(3).save(Path(sys.argv[1]))
"""


def test_killed_while_saving_the_old_index_stands(copy: Path) -> None:
    before = NominalIndex.load(copy).fingerprint
    here = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(copy), str(here.parent), str(here)], check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert NominalIndex.load(copy).fingerprint == before
