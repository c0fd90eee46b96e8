"""An edited index is saved with its calibration, which becomes stale."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from worlds.colours import ColourEmbedder, make_detector, street

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.calibration.format import calibration_files
from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.errors import MismatchError
from semantic_anomaly.index import edits as index_edits
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.offline.edit_index import save_edited
from semantic_anomaly.roi import RegionOfInterest

WHOLE = RegionOfInterest()


@pytest.fixture
def calibrated(tmp_path: Path) -> tuple[Path, AnomalyDetector]:
    detector = make_detector()
    folder = tmp_path / "index"
    detector.index.save(folder)
    assert detector.calibration is not None
    detector.calibration.save(folder)
    return folder, detector


def edit(folder: Path, *numbers: int) -> tuple[NominalIndex, Calibration]:
    before = NominalIndex.load(folder)
    edited = index_edits.retract(before, {0: numbers}) if numbers else index_edits.undo(before)[0]
    calibration = save_edited(folder, before, edited)
    assert calibration is not None
    return edited, calibration


def test_a_calibration_goes_along_and_becomes_stale(
    calibrated: tuple[Path, AnomalyDetector],
) -> None:
    folder, detector = calibrated
    before = (folder / "calibration.json").read_bytes()
    edited, calibration = edit(folder, 0, 1)
    loaded = Calibration.load(folder)
    assert loaded.index_fingerprint == edited.fingerprint
    assert loaded.stale_edits == calibration.stale_edits
    assert loaded.threshold == detector.threshold
    assert "1 edit of the index since calibration: retract 2 entries" in loaded.warnings[-1]
    assert "false alarms may exceed" in loaded.warnings[-1]
    AnomalyDetector(
        NominalIndex.load(folder), loaded, settings=detector.settings, embedder=detector.embedder
    )
    retracted = NominalIndex.load(folder)
    frame = street(5000, odd=True)
    grid = ColourEmbedder().embed([frame.image])[0]
    added, _ = index_edits.add_nominal(retracted, [(frame, grid)], roi=WHOLE, source="s")
    save_edited(folder, retracted, added)
    assert "retract 2 entries, add 1 frame;" in Calibration.load(folder).warnings[-1]
    edit(folder)
    edit(folder)
    assert (folder / "calibration.json").read_bytes() == before
    assert Calibration.load(folder).sha256 == detector.calibration.sha256  # type: ignore[union-attr]


def test_calibrations_of_all_cameras_go_along(calibrated: tuple[Path, AnomalyDetector]) -> None:
    folder, detector = calibrated
    assert detector.calibration is not None
    dataclasses.replace(detector.calibration, camera="rear").save(folder)
    edited, _ = edit(folder, 0)
    calibrations = [Calibration.of_file(path) for path in calibration_files(folder)]
    assert [calibration.camera for calibration in calibrations] == ["camera", "rear"]
    for calibration in calibrations:
        assert calibration.stale_edits and calibration.index_fingerprint == edited.fingerprint


def test_undoing_an_edit_before_the_calibration_makes_it_stale(
    calibrated: tuple[Path, AnomalyDetector],
) -> None:
    folder, _ = calibrated
    edited, calibration = edit(folder, 0, 1)
    dataclasses.replace(calibration, stale_edits=()).save(folder)
    _, undone = edit(folder)
    assert "undo: retract 2 entries" in undone.warnings[-1] and "shrunk" in undone.warnings[-1]
    _, repeated = edit(folder, 0, 1)
    assert repeated.index_fingerprint == edited.fingerprint and len(repeated.stale_edits) == 2


def test_nothing_is_saved_over_another_state(calibrated: tuple[Path, AnomalyDetector]) -> None:
    folder, _ = calibrated
    before = NominalIndex.load(folder)
    edit(folder, 3)
    with pytest.raises(MismatchError, match="edited meanwhile"):
        save_edited(folder, before, index_edits.retract(before, {0: [4]}))
    dataclasses.replace(Calibration.load(folder), index_fingerprint="0" * 64).save(folder)
    with pytest.raises(MismatchError, match="calibrate again"):
        edit(folder, 5)
