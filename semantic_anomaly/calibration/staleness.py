"""Stale calibrations: edits of an index since its calibration, and what they mean for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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
        earlier = [n for n, edit in enumerate(since) if edit.edit == change.edit]
        if change.undone and earlier and not since[earlier[-1]].undone:
            del since[earlier[-1]]
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
