"""Stale calibrations: edits of an index since its calibration, and what they mean for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from semantic_anomaly.errors import CalibrationError

_TYPES = {"edit": int, "summary": str, "undone": bool, "distances_grow": bool}


@dataclass(frozen=True)
class StaleEdit:
    """An edit of the index that was made, or undone, after the calibration.

    Attributes:
        edit: number of the edit.
        summary: the edit in words: 'retract 14 entries'.
        undone: whether the edit was undone rather than made.
        distances_grow: whether distances can only have grown by it, rather than shrunk.
    """

    edit: int
    summary: str
    undone: bool
    distances_grow: bool

    @property
    def text(self) -> str:
        """Return the change in words."""
        return f"{'undo: ' * self.undone}{self.summary}"


def edits_since(before: Sequence[StaleEdit], changes: Iterable[StaleEdit]) -> tuple[StaleEdit, ...]:
    """Return the edits since calibration after further changes; undoing one removes it."""
    since = list(before)
    for change in changes:
        same_edit = [e for e in since if e.edit == change.edit]
        if change.undone and same_edit and not same_edit[-1].undone:
            since.reverse()
            since.remove(same_edit[-1])
            since.reverse()
        else:
            since.append(change)
    return tuple(since)


def staleness_warning(stale_edits: Sequence[StaleEdit]) -> str:
    """Return the warning that a calibration is stale, and what is wrong until it is renewed."""
    count = f"{len(stale_edits)} edit{'s' * (len(stale_edits) != 1)} of the index since calibration"
    directions = {edit.distances_grow for edit in stale_edits}
    if directions == {True}:
        meaning = (
            "distances can only have grown: no more anomalies are missed, but false alarms may "
            "exceed the target rate"
        )
    elif directions == {False}:
        meaning = (
            "distances can only have shrunk: false alarms stay below the target rate, but "
            "threshold and p-values are too high, and more anomalies may be missed"
        )
    else:
        meaning = (
            "some distances have grown and others shrunk: false alarms may exceed the target rate, "
            "and more anomalies may be missed"
        )
    texts = ", ".join(edit.text for edit in stale_edits)
    return f"stale calibration, {count}: {texts}; {meaning}; calibrate again"


def to_dicts(stale_edits: Iterable[StaleEdit]) -> list[dict[str, Any]]:
    """Return plain values for JSON."""
    return [asdict(edit) for edit in stale_edits]


def from_dicts(values: Any) -> tuple[StaleEdit, ...]:
    """Make edits from the values of `to_dicts`.

    Raises:
        CalibrationError: values of another structure.
    """
    for value in values if isinstance(values, list) else [values]:
        types = {k: type(v) for k, v in value.items()} if isinstance(value, dict) else {}
        if types != _TYPES:
            raise CalibrationError(f"'stale_edits': expected edits with {', '.join(_TYPES)}")
    return tuple(StaleEdit(**value) for value in values)
