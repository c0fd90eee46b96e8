"""Write an edited index in place of the index it was made from, with its calibrations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.calibration.format import calibration_files
from semantic_anomaly.calibration.staleness import StaleEdit
from semantic_anomaly.errors import MismatchError
from semantic_anomaly.index.content import ADD, RETRACT
from semantic_anomaly.index.format import fingerprint_of
from semantic_anomaly.index.nominal_index import NominalIndex


def save_edited(folder: Path, before: NominalIndex, edited: NominalIndex) -> Calibration | None:
    """Write an edited index in place of the index it was made from; its calibrations become stale.

    Returns:
        The first calibration, None if there is none.

    Raises:
        ArtefactError: the folder has changed since, or cannot be written.
        MismatchError: a calibration belongs to another index.
    """
    folder = Path(folder).expanduser()
    fingerprint = fingerprint_of(folder)
    if fingerprint != before.fingerprint:
        raise MismatchError(
            f"index '{folder}': fingerprint",
            before.fingerprint,
            fingerprint,
            "it was edited meanwhile; try again",
        )
    changes = list(_changes(before, edited))
    carried = [
        calibration.carried(edited, changes)
        for calibration in calibrations_of(folder, before.fingerprint)
    ]

    def write_calibrations(temporary: Path) -> None:
        for calibration in carried:
            calibration.save(temporary)

    edited.save(folder, write_calibrations, force=True)
    return carried[0] if carried else None


def calibrations_of(folder: Path, fingerprint: str) -> list[Calibration]:
    """Return the calibrations of all cameras in an index folder, calibration.json first.

    Raises:
        CalibrationError: one is damaged or altered.
        MismatchError: one belongs to an index with another fingerprint.
    """
    calibrations = [Calibration.of_file(path) for path in calibration_files(folder)]
    for calibration in calibrations:
        if calibration.index_fingerprint != fingerprint:
            raise MismatchError(
                f"calibration of '{folder}': index fingerprint",
                fingerprint,
                calibration.index_fingerprint,
                "it belongs to another index; calibrate again",
            )
    return calibrations


def _changes(before: NominalIndex, edited: NominalIndex) -> Iterator[StaleEdit]:
    for edit in before.edits:
        if edit not in edited.edits:
            yield StaleEdit(edit.number, edit.what, True, edit.kind == ADD)
    for edit in edited.edits:
        if edit not in before.edits:
            yield StaleEdit(edit.number, edit.what, False, edit.kind == RETRACT)
