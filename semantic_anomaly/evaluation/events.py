"""Measures of alarms on a drive: delays, missed events and false alarms, by the stamps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.datasets import read_yaml
from semantic_anomaly.stamps import LATE_S, first_jump, order_of

# An alarm may outlast its event by this time: tracks last longer than the anomaly is visible.
TAIL_S = 1.0
# Time without an alarm that separates two false alarms.
QUIET_S = 0.5
_SECOND_NS = 1_000_000_000


@dataclass(frozen=True)
class Event:
    """A time span of a drive with an anomaly.

    Attributes:
        start_s, end_s: seconds after the first frame, 0 <= start_s < end_s.
        kind: kind of the anomaly, may be empty.
    """

    start_s: float
    end_s: float
    kind: str = ""

    def __post_init__(self) -> None:
        finite = math.isfinite(self.start_s) and math.isfinite(self.end_s)
        if not finite or not 0 <= self.start_s < self.end_s:
            raise InputError(
                f"event '{self.kind}': expected 0 <= start_s < end_s, found {self.start_s:g} to "
                f"{self.end_s:g}"
            )


@dataclass(frozen=True)
class DriveMetrics:
    """Measures of the alarms of a drive; None when there is nothing to divide by.

    Attributes:
        delays_s: seconds from the start of every event to its first frame in alarm, None where
            the event was missed; in the order of the events.
        false_alarms: runs of alarm in nominal time, separated by at least `QUIET_S`.
        nominal_s: seconds of nominal time, without that of unknown frames.
        false_per_hour: false alarms per hour of nominal time.
        false_share: share of the nominal frames in alarm, without unknown ones; it shows an alarm
            that never ends.
    """

    delays_s: tuple[float | None, ...]
    false_alarms: int
    nominal_s: float
    false_per_hour: float | None
    false_share: float | None

    @property
    def missed(self) -> int:
        """Return the number of events without an alarm."""
        return sum(delay is None for delay in self.delays_s)


def read_events(path: Path | str) -> list[Event]:
    """Return the events of a YAML file: a list `events` with `start_s`, `end_s` and `kind`.

    Raises:
        InputError: it cannot be read, or holds something else.
    """
    content = read_yaml(path, "events")
    entries = content.get("events") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise InputError(f"events '{path}': expected a list under 'events', found {entries!r:.60}")
    return [_event(path, number, entry) for number, entry in enumerate(entries)]


def _event(path: Path | str, number: int, entry: Any) -> Event:
    known = {"start_s", "end_s", "kind"}
    if not isinstance(entry, dict) or not {"start_s", "end_s"} <= set(entry) <= known:
        raise InputError(
            f"events '{path}': number {number}: expected start_s, end_s and optionally kind, found "
            f"{entry!r:.80}"
        )
    times = [entry["start_s"], entry["end_s"]]
    # An integer may be larger than any float.
    if any(type(t) not in (int, float) or (type(t) is int and abs(t) > 1e10) for t in times):
        raise InputError(f"events '{path}': number {number}: expected seconds, found {times!r:.60}")
    if not isinstance(entry.get("kind", ""), str):
        raise InputError(f"events '{path}': number {number}: kind: expected a text")
    return Event(float(times[0]), float(times[1]), entry.get("kind", ""))


def drive_metrics(
    stamps_ns: Sequence[int],
    alarms: Sequence[bool],
    events: Sequence[Event],
    unknown: Sequence[bool] | None = None,
) -> DriveMetrics:
    """Return the measures of the alarms of one drive.

    An event is detected by the first frame in alarm within it, whenever that alarm began. An alarm
    that continues after an event is not false for `TAIL_S`.

    Args:
        stamps_ns: (n,) nanoseconds; late and equal ones are put in order.
        alarms: (n,) bool.
        events: may overlap.
        unknown: (n,) bool, frames that were not assessed: they find no event, and their time is not
            nominal time without an alarm; None: all were.

    Raises:
        InputError: no frames, a jump back in the stamps, or an event without a frame in it.
    """
    stamps = np.asarray(stamps_ns, np.int64)
    alarm = np.asarray(alarms, bool)
    skipped = np.zeros(len(stamps), bool) if unknown is None else np.asarray(unknown, bool)
    if not len(stamps) or len(stamps) != len(alarm):
        raise InputError(
            f"drive: expected stamps with an alarm each, found {len(stamps)} stamps and "
            f"{len(alarm)} alarms"
        )
    refuse_jump(stamps)
    order = order_of(stamps)
    stamps, alarm, skipped = stamps[order], alarm[order], skipped[order]
    time_s = (stamps - stamps[0]) / _SECOND_NS
    inside = np.zeros(len(stamps), bool)
    delays = []
    for event in events:
        within = (time_s >= event.start_s) & (time_s <= event.end_s)
        if not within.any():
            raise InputError(
                f"event '{event.kind}' from {event.start_s:g} to {event.end_s:g} s: expected "
                f"frames in it, found frames from 0 to {time_s[-1]:g} s"
            )
        inside |= within
        first = np.flatnonzero(within & alarm)
        delays.append(float(time_s[first[0]] - event.start_s) if len(first) else None)
    false_alarms, false_frames = _false_alarms(time_s, alarm, inside)
    counted = ~(inside | skipped)
    nominal_s = float(np.diff(time_s)[counted[:-1] & counted[1:]].sum())
    nominal = int(counted.sum())
    return DriveMetrics(
        tuple(delays),
        false_alarms,
        nominal_s,
        false_alarms * 3600 / nominal_s if nominal_s else None,
        false_frames / nominal if nominal else None,
    )


def refuse_outside(events: Sequence[Event], stamps_ns: Sequence[int] | None) -> None:
    """Raise InputError for events that do not fit a drive, before it is assessed.

    Args:
        events: of the drive.
        stamps_ns: (n,) of its frames; None: not known yet, nothing is checked.
    """
    if stamps_ns:
        drive_metrics(stamps_ns, [False] * len(stamps_ns), events)


def refuse_jump(stamps_ns: Sequence[int] | np.ndarray) -> None:
    """Raise InputError for a jump back in the stamps of a drive: its events have no time then."""
    number = first_jump(stamps_ns)
    if number is not None:
        back_s = (max(stamps_ns[:number]) - stamps_ns[number]) / _SECOND_NS
        raise InputError(
            f"drive: expected stamps that go back by at most {LATE_S:g} s, found a step back of "
            f"{back_s:.3f} s at frame {number}; events need one drive: select it with [START:STOP]"
        )


def _false_alarms(time_s: np.ndarray, alarm: np.ndarray, inside: np.ndarray) -> tuple[int, int]:
    """Return the numbers of false alarms and of false frames."""
    alarms = frames = 0
    tail_until = last_false = -math.inf
    continued = before = False
    # Python numbers: sums of numpy integers cannot be written as JSON.
    columns = (array.tolist() for array in (time_s, alarm, inside))
    for now, on, event in zip(*columns, strict=True):
        if event:
            tail_until, continued, last_false, before = now + TAIL_S, on, -math.inf, False
            continue
        continued = continued and on and now <= tail_until
        if on and not continued:
            frames += 1
            alarms += not before and now - last_false > QUIET_S
            last_false = now
        before = on and not continued
    return alarms, frames
