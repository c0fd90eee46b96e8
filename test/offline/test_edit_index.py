"""An edited index is saved with its calibration, which becomes stale."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from worlds.colours import ColourEmbedder, make_detector, street

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.errors import CalibrationError, MismatchError
from semantic_anomaly.index import edits as index_edits
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.offline.edit_index import save_edited
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.storage import canonical_json, sha256_bytes

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
    edited = index_edits.retract(before, numbers) if numbers else index_edits.undo(before)[0]
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
    assert (
        loaded.index_fingerprint == edited.fingerprint
        and loaded.stale_edits == calibration.stale_edits
    )
    assert loaded.threshold == detector.threshold
    assert "1 edit of the index since calibration: retract 2 entries" in loaded.warnings[-1]
    assert "false alarms may exceed" in loaded.warnings[-1]
    AnomalyDetector(
        NominalIndex.load(folder), loaded, settings=detector.settings, embedder=detector.embedder
    )
    both = NominalIndex.load(folder)
    frame = street(5000, odd=True)
    grid = ColourEmbedder().embed([frame.image])[0]
    more, _ = index_edits.add_nominal(both, [(frame, grid)], roi=WHOLE, source="s")
    save_edited(folder, both, more)
    last = Calibration.load(folder).warnings[-1]
    assert (
        "2 edits" in last and "retract 2 entries, add 1 frame;" in last and "others shrunk" in last
    )
    edit(folder)
    edit(folder)
    assert (folder / "calibration.json").read_bytes() == before
    assert Calibration.load(folder).sha256 == detector.calibration.sha256  # type: ignore[union-attr]


def test_undoing_what_was_calibrated_is_a_change_too(
    calibrated: tuple[Path, AnomalyDetector],
) -> None:
    folder, _ = calibrated
    edited, calibration = edit(folder, 0, 1)
    dataclasses.replace(calibration, stale_edits=()).save(folder)
    _, undone = edit(folder)
    assert "undo: retract 2 entries" in undone.warnings[-1] and "shrunk" in undone.warnings[-1]
    _, again = edit(folder, 0, 1)
    assert again.index_fingerprint == edited.fingerprint and len(again.stale_edits) == 2


def test_nothing_is_saved_over_another_state(calibrated: tuple[Path, AnomalyDetector]) -> None:
    folder, _ = calibrated
    before = NominalIndex.load(folder)
    edit(folder, 3)
    with pytest.raises(MismatchError, match="edited meanwhile"):
        save_edited(folder, before, index_edits.retract(before, [4]))
    strange = dataclasses.replace(Calibration.load(folder), index_fingerprint="0" * 64)
    strange.save(folder)
    with pytest.raises(MismatchError, match="calibrate again"):
        edit(folder, 5)


def test_stale_edits_of_another_form_is_refused(calibrated: tuple[Path, AnomalyDetector]) -> None:
    folder, _ = calibrated
    edit(folder, 3)
    path = folder / "calibration.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    for forged in ([{"edit": 1}], "text", [1]):
        body["stale_edits"] = forged
        sealed = {**body, "sha256": sha256_bytes(canonical_json(body).encode())}
        path.write_text(canonical_json(sealed))
        with pytest.raises(CalibrationError, match="stale_edits"):
            Calibration.load(folder)
