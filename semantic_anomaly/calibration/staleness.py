"""What was done to an index since its calibration, and what that means for the calibration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from semantic_anomaly.errors import CalibrationError

_TYPES = {"part": str, "edit": int, "what": str, "undone": bool, "grows": bool, "mixed": bool}


@dataclass(frozen=True)
class Change:
    """An edit of the index that was made, or undone, after the calibration.

    Attributes:
        part: part of the index that was edited, empty for the index itself.
        edit: number of the edit.
        what: what the edit does, in words: 'retract 14 entries'.
        undone: whether it is the edit's end rather than its begin.
        grows: whether distances can only have grown by it, rather than shrunk.
        mixed: whether some may have grown and others shrunk, whatever `grows` says.
    """

    part: str
    edit: int
    what: str
    undone: bool
    grows: bool
    mixed: bool = False

    @property
    def text(self) -> str:
        """Return what was done in words."""
        where = f" in part '{self.part}'" if self.part else ""
        return f"{'undo: ' * self.undone}{self.what}{where}"


def after(renewal: Sequence[Change], changes: Iterable[Change]) -> tuple[Change, ...]:
    """Return what was done since calibration once more is done; what is undone was not done."""
    since = list(renewal)
    for change in changes:
        of_edit = [each for each in since if (each.part, each.edit) == (change.part, change.edit)]
        if change.undone and of_edit and not of_edit[-1].undone:
            since.reverse()
            since.remove(of_edit[-1])
            since.reverse()
        else:
            since.append(change)
    return tuple(since)


def warning(renewal: Sequence[Change]) -> str:
    """Return the sentence that a calibration is due for renewal, and what is wrong until then."""
    count = f"{len(renewal)} edit{'s' * (len(renewal) != 1)} of the index since calibration"
    grows = {None if change.mixed else change.grows for change in renewal}
    if grows == {True}:
        meaning = (
            "distances can only have grown, so what was found still is, "
            "but false alarms may exceed the target rate"
        )
    elif grows == {False}:
        meaning = (
            "distances can only have shrunk, so false alarms stay below the target rate, "
            "but the threshold and p-values are too high: more may be missed"
        )
    else:
        meaning = (
            "some distances have grown and others shrunk, so false alarms may exceed the target "
            "rate, and more may be missed"
        )
    listed = ", ".join(change.text for change in renewal)
    return f"calibration is due for renewal, {count}: {listed}; {meaning}; calibrate again"


def describe(renewal: Iterable[Change]) -> list[dict[str, Any]]:
    """Return plain values for JSON."""
    return [asdict(change) for change in renewal]


def from_description(values: Any) -> tuple[Change, ...]:
    """Return what `describe` described.

    Raises:
        CalibrationError: it describes nothing of the kind.
    """
    for value in values if isinstance(values, list) else [values]:
        told = {k: type(v) for k, v in value.items()} if isinstance(value, dict) else {}
        # Earlier versions knew of no edit that goes either way.
        if {"mixed": bool, **told} != _TYPES:
            raise CalibrationError(f"'renewal': expected changes with {sorted(_TYPES)}")
    return tuple(Change(**value) for value in values)
