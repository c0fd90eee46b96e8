"""Several cameras with one index: each has a calibration of its own, or shares the first."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from worlds.colours import ColourEmbedder, make_detector, street

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.calibration.format import calibration_files
from semantic_anomaly.cli import main
from semantic_anomaly.detection.detector import load_detector
from semantic_anomaly.errors import ArtefactError, CalibrationError
from semantic_anomaly.index import edits as index_edits
from semantic_anomaly.index.format import refuse_existing
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.offline.edit_index import save_edited
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.settings import Settings


def calibration(camera: str, highest: float, fingerprint: str = "f" * 64) -> Calibration:
    return Calibration.fit(
        {"a": np.linspace(0.001, highest, 40).tolist()},
        heatmap_low=0.0005,
        index=SimpleNamespace(fingerprint=fingerprint),
        settings=Settings(target_false_alarm_rate=0.05, variant="grid"),
        roi=RegionOfInterest(),
        camera=camera,
    )


def test_each_camera_has_its_own_file(tmp_path: Path) -> None:
    names = [calibration(c, h).save(tmp_path).name for c, h in (("front", 0.1), ("rear", 0.2))]
    assert names == ["calibration.json", "calibration.rear.json"]
    calibration("front", 0.3).save(tmp_path)
    calibration("rear", 0.4).save(tmp_path)
    assert [path.name for path in calibration_files(tmp_path)] == names
    read = {c: Calibration.load(tmp_path, c) for c in ("front", "rear", "left")}
    assert read["front"].scores[-1] == 0.3 and read["rear"].scores[-1] == 0.4
    assert read["left"].camera == "front", "what has none of its own shares the first"


def test_a_damaged_first_file_is_replaced(tmp_path: Path) -> None:
    path = calibration("front", 0.1).save(tmp_path)
    path.write_text("{")
    assert calibration("rear", 0.2).save(tmp_path) == path
    assert Calibration.load(tmp_path, "rear").camera == "rear"


def test_cameras_of_one_index_decide_by_their_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = make_detector().index
    folder = tmp_path / "index"
    index.save(folder)
    for camera, highest in (("front", 0.01), ("rear", 0.9)):
        calibration(camera, highest, index.fingerprint).save(folder)
    settings = Settings.from_parameters(
        {
            **{"cameras": ["front", "rear", "left"], "index": str(folder)},
            **{"target_false_alarm_rate": 0.05, "smoothing": 0.8},
        }
    )
    with caplog.at_level(logging.WARNING):
        found = {c: load_detector(settings, c, embedder=ColourEmbedder()) for c in settings.cameras}
    odd = street(5, odd=True)
    said = {camera: one.detect(odd).decision.value for camera, one in found.items()}
    assert said == {"front": "anomaly", "rear": "nominal", "left": "anomaly"}
    assert [r.message for r in caplog.records] == [
        "camera 'left': using the calibration of 'front'"
    ]


def test_edits_carry_all_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = make_detector().index
    folder = tmp_path / "index"
    index.save(folder)
    for camera in ("front", "rear"):
        calibration(camera, 0.1, index.fingerprint).save(folder)
    before = NominalIndex.load(folder)
    save_edited(folder, before, index_edits.retract(before, [0]))
    for path in calibration_files(folder):
        carried = Calibration.of_file(path)
        assert carried.stale_edits and carried.index_fingerprint != index.fingerprint
    assert len(calibration_files(folder)) == 2
    assert main(["inspect-index", str(folder)]) == 0
    told = capsys.readouterr().out
    assert told.count("calibration of camera") == 2 and "rear" in told


def test_other_files_are_still_refused(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    make_detector().index.save(folder)
    (folder / "calibration.rear camera.json").write_text("{}")
    with pytest.raises(ArtefactError, match="not an index"):
        refuse_existing(folder, force=True)
    (folder / "calibration.rear camera.json").rename(folder / "calibration.rear.json")
    refuse_existing(folder, force=True)
    with pytest.raises(CalibrationError, match="format"):
        Calibration.load(folder, "rear")
