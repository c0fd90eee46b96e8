"""Functions shared by the commands that edit an index."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from semantic_anomaly.errors import InputError

if TYPE_CHECKING:
    from semantic_anomaly.calibration.calibration import Calibration
    from semantic_anomaly.index.nominal_index import NominalIndex


def numbers(option: str, text: str) -> list[int]:
    """Return the numbers that a text such as '12,15-20' names; ranges include both ends.

    Raises:
        InputError: another text; names the option.
    """
    listed: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", item.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise InputError(f"{option}: expected numbers as in 12,15-20, found '{text}'")
        listed.extend(range(first, last + 1))
    return listed


def entry_numbers(option: str, text: str) -> dict[int, list[int]]:
    """Return the numbers of entries by stage that a text such as '12,15-20,1:33' names.

    Args:
        option: name of the option, for the message.
        text: numbers and ranges, both ends included; 'STAGE:' before those of a further stage.

    Raises:
        InputError: something else.
    """
    entries: dict[int, list[int]] = {}
    for item in text.split(","):
        stage, colon, listed = item.strip().rpartition(":")
        if colon and not re.fullmatch(r"\d{1,2}", stage):
            raise InputError(f"{option}: expected entries as in 12,15-20,1:33, found '{text}'")
        entries.setdefault(int(stage or 0), []).extend(numbers(option, listed))
    return entries


def after_rows(edited: NominalIndex, calibration: Calibration | None) -> list[tuple[str, str]]:
    """Return the rows printed after every edit: entries, fingerprint, calibration."""
    counts = " + ".join(f"{stage.count}" for stage in edited.stages)
    rows = [("entries", counts), ("fingerprint", edited.fingerprint[:16])]
    if calibration is not None and calibration.stale_edits:
        return [*rows, *(("warning", sentence) for sentence in calibration.warnings)]
    return [*rows, ("calibration", "none" if calibration is None else "in force")]
