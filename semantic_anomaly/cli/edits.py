"""What the verbs that edit an index have in common."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from semantic_anomaly.errors import InputError

if TYPE_CHECKING:
    from semantic_anomaly.calibration import Calibration
    from semantic_anomaly.index import NominalIndex


def numbers(option: str, text: str) -> list[int]:
    """Return the numbers that a text such as '12,15-20' names.

    Args:
        option: name of the option, for the message.
        text: numbers and ranges, both ends included.

    Raises:
        InputError: something else.
    """
    found: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", item.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise InputError(f"{option}: expected numbers as in 12,15-20, found '{text}'")
        found.extend(range(first, last + 1))
    return found


def after_rows(edited: NominalIndex, calibration: Calibration | None) -> list[tuple[str, str]]:
    """Return what is to be said after every edit: entries, fingerprint, calibration."""
    told = [("entries", f"{edited.count}"), ("fingerprint", edited.fingerprint[:16])]
    if calibration is None:
        return [*told, ("calibration", "none")]
    if not calibration.renewal:
        return [*told, ("calibration", "in force")]
    return [*told, *(("warning", sentence) for sentence in calibration.warnings)]
