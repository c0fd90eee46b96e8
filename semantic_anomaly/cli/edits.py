"""Functions shared by the commands that edit an index."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from semantic_anomaly.errors import InputError, UnknownNameError

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


def part_of(index: NominalIndex, name: str | None) -> NominalIndex:
    """Return the part of an index that `--part` names, the index itself for None.

    Raises:
        UnknownNameError: the index has no such part.
    """
    if name is None:
        return index
    if name not in index.parts:
        raise UnknownNameError("part", name, index.parts)
    return index.parts[name]


def with_part(index: NominalIndex, name: str | None, edited: NominalIndex) -> NominalIndex:
    """Return the index with the part that `part_of` gave replaced by an edited one."""
    return edited if name is None else index.with_parts({**index.parts, name: edited})


def after_rows(edited: NominalIndex, calibration: Calibration | None) -> list[tuple[str, str]]:
    """Return the rows printed after every edit: entries, fingerprint, calibration."""
    rows = [("entries", f"{edited.count}"), ("fingerprint", edited.fingerprint[:16])]
    if calibration is not None and calibration.stale_edits:
        return [*rows, *(("warning", sentence) for sentence in calibration.warnings)]
    return [*rows, ("calibration", "none" if calibration is None else "in force")]
