"""An edited index in the place of what it was made from, and what that means for calibrations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from semantic_anomaly.calibration import format as calibration_file
from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.calibration.staleness import Change
from semantic_anomaly.errors import MismatchError
from semantic_anomaly.index.build import PAIRS, SCENES
from semantic_anomaly.index.content import ADD, RETRACT
from semantic_anomaly.index.format import fingerprint_of
from semantic_anomaly.index.nominal_index import NominalIndex


def save_edited(folder: Path, before: NominalIndex, edited: NominalIndex) -> Calibration | None:
    """Put an edited index in the place of what it was made from, its calibrations carried over.

    Returns:
        the first calibration, due for renewal until all edits since are undone; None: none is.

    Raises:
        ArtefactError: the folder has changed since, or cannot be written.
        MismatchError: the calibration is of another index.
    """
    folder = Path(folder).expanduser()
    found = fingerprint_of(folder)
    if found != before.fingerprint:
        raise MismatchError(
            f"index '{folder}': fingerprint", before.fingerprint, found, "edited meanwhile; again"
        )
    carried = [
        each.carried(edited, _changes(before, edited, each.scoring))
        for each in calibrations_of(folder, before.fingerprint)
    ]
    edited.save(folder, lambda beside: [each.save(beside) for each in carried])
    return carried[0] if carried else None


def calibrations_of(folder: Path, fingerprint: str) -> list[Calibration]:
    """Return the calibrations of all cameras in an index folder, calibration.json first.

    Raises:
        CalibrationError: one is damaged or altered.
        MismatchError: one is of an index with another fingerprint.
    """
    found = [Calibration.of_file(path) for path in calibration_file.files(folder)]
    for calibration in found:
        if calibration.index_fingerprint != fingerprint:
            raise MismatchError(
                f"calibration of '{folder}': index fingerprint",
                fingerprint,
                calibration.index_fingerprint,
                "it is of another index; calibrate again",
            )
    return found


def _changes(
    before: NominalIndex, edited: NominalIndex, scoring: Mapping[str, Any]
) -> Iterator[Change]:
    pairs = {"": (before.edits, edited.edits)}
    for name, part in edited.parts.items():
        if name in before.parts:
            pairs[name] = (before.parts[name].edits, part.edits)
    for name, (old, new) in pairs.items():
        # More pairs shrink what surroundings explain, and another scene takes one's place: scores
        # go either way.
        mixed = name in (PAIRS, SCENES) or (not name and "scene_frames" in scoring)
        for edit in old:
            if edit not in new:
                yield Change(name, edit.number, edit.what, True, edit.kind == ADD, mixed)
        for edit in new:
            if edit not in old:
                yield Change(name, edit.number, edit.what, False, edit.kind == RETRACT, mixed)
