"""The index of nominal drives."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from worlds.colours import ColourEmbedder
from worlds.nominal_drives import SETTINGS, CountingEmbedder, build, calibrated, write_drives

from semantic_anomaly.detection.detector import load_detector
from semantic_anomaly.embedding import execution, precision
from semantic_anomaly.embedding.execution import REFERENCE
from semantic_anomaly.errors import ArtefactError, SourceError, UnknownNameError
from semantic_anomaly.index.content import RecordedSource
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.open import open_source
from semantic_anomaly.offline.build_index import build_index, median_distances
from semantic_anomaly.offline.calibrate import calibrate
from semantic_anomaly.offline.drives import open_drives, sample_images
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import PatchGrid


@pytest.fixture(scope="module")
def drives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drives(tmp_path_factory.mktemp("drives"))


@pytest.fixture(scope="module")
def index(drives: Path) -> NominalIndex:
    return build(drives / "index")


def test_index_holds_the_drive_and_names_it(index: NominalIndex, drives: Path) -> None:
    assert index.report.frames == 10 and index.report.seen == 10 * 9 * 16
    assert index.frame_names[0] == "index/000.png"
    source = RecordedSource("index", str(drives / "index"), "", {"": "index"})
    assert index.content.sources == (source,) and index.content.stride == 1
    assert index.recordings == ("index",)
    assert str(drives) not in str(index.manifest["content"]), "no path of this machine"
    embedder = ColourEmbedder()
    direct = NominalIndex.build(
        (
            (replace(frame, recording="index"), embedder.embed([frame.image])[0])
            for frame in open_source(drives / "index")
        ),
        stages=embedder.stages,
        roi=RegionOfInterest(),
        settings=SETTINGS,
    )
    assert direct.fingerprint == index.fingerprint


@pytest.mark.parametrize(("stride", "frames"), [(3, 4), (10, 1)])
def test_stride_uses_every_nth_frame(drives: Path, stride: int, frames: int) -> None:
    assert build(drives / "index", stride=stride).report.frames == frames


def test_files_and_arrays_give_the_same_index(index: NominalIndex, drives: Path) -> None:
    of_files = build(sorted((drives / "index").iterdir()))
    assert of_files.fingerprint == index.fingerprint
    of_arrays = build([frame.image for frame in open_source(drives / "index")])
    np.testing.assert_array_equal(of_arrays.content.embeddings, index.content.embeddings)


def test_predicted_size_is_logged_beforehand(
    drives: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="semantic_anomaly.offline"):
        build(drives / "index", max_entries=1000000, stride=2)
    (record,) = caplog.records
    most = NominalIndex.predicted_bytes(1000000, 4) / 1e6
    assert f"at most {most:.0f} MB (1000000 entries)" in record.message
    assert "all patches of the 5 frames were stored (144 per frame)" in record.message


def test_precision_is_measured_recorded_and_used_again(
    drives: Path,
    tiny_backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    half = "bfloat16", "torch"
    monkeypatch.setattr(precision, "_FAST_MS", 5.0)
    ms = {"float32": 30.0, "bfloat16": 20.0}
    monkeypatch.setattr(precision, "candidates", lambda device: [REFERENCE, half])
    monkeypatch.setattr(
        precision, "_timed_ms", lambda embedder, image: ms[embedder.identities[0].dtype]
    )
    # Random weights in bfloat16 shift more than trained ones.
    monkeypatch.setattr(precision, "_ALLOWED_SHARE", 1e6)
    settings = Settings(
        stages=(f"{tiny_backbone} size=112",),
        target_false_alarm_rate=0.2,
        device="cpu",
        index=str(tmp_path / "index"),
    )
    with caplog.at_level(logging.INFO):
        index = build_index(drives / "index", settings=settings, out=tmp_path / "index")
    assert "backbones run in bfloat16 by torch, of float32 by torch 30.0 ms" in caplog.text
    recorded = NominalIndex.load(tmp_path / "index").stage.embedder
    assert (recorded.dtype, recorded.execution) == half
    # Nothing is faster by 10 %: the calibration keeps what the index has.
    ms["float32"] = 19.0
    sources = [drives / "a", drives / "b"]
    calibration = calibrate(index, sources, settings=settings, out=tmp_path / "index")
    assert (calibration.dtype, calibration.execution) == half
    assert len(calibration.probe_scores) == 8
    monkeypatch.setattr(execution, "candidates", lambda device: [REFERENCE, half])
    caplog.clear()
    detector = load_detector(settings, "camera", need_calibration=True)
    running = detector.embedder.stages[0].embedder
    assert (running.dtype, running.execution) == half and "running in" not in caplog.text
    # A setting overrides it, for the index as well.
    other = build_index(drives / "index", settings=settings, dtype="float32")
    assert other.stage.embedder.dtype == "float32"


def test_a_few_images_of_every_drive_are_measured(drives: Path) -> None:
    opened = open_drives([drives / name for name in ("index", "a", "b")])
    assert len(sample_images(opened)) == 9, "three of each"
    assert len(sample_images(open_drives(drives / "index"))) == 8
    grids = [PatchGrid(ColourEmbedder().embed([image])[0].features, image.shape[:2])
             for image in sample_images(opened)]  # fmt: skip
    [median] = median_distances(grids)
    assert 0 < median < 1 and median_distances(grids[:1]) == [0.0]


def test_an_existing_index_is_replaced_only_with_force(drives: Path, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    index = build(drives / "index", out=folder)
    calibrated(index, [drives / "a", drives / "b"], out=folder)
    embedder = CountingEmbedder()
    with pytest.raises(ArtefactError, match=r"entries.*1 calibration.*force"):
        build(drives / "b", out=folder, embedder=embedder)
    assert embedder.batches == [], "refused before the work"
    assert (folder / "calibration.json").is_file()
    build(drives / "b", out=folder, force=True)
    assert not (folder / "calibration.json").exists()


def test_refuses_strides_and_unknown_cameras(drives: Path) -> None:
    with pytest.raises(SourceError, match="stride: expected at least 1"):
        build(drives / "a", stride=0)
    with pytest.raises(UnknownNameError, match="unknown camera 'rear'"):
        build(drives / "a", camera="rear")
