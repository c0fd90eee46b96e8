"""Alarms of a drive against its events."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.events import Event, drive_metrics, read_events

PERIOD_NS = 100_000_000


def measured(alarms: str, *events: Event):
    """Alarms as a drawing at 10 Hz: '!' alarm, '.' none."""
    stamps = [5_000_000_000 + i * PERIOD_NS for i in range(len(alarms))]
    return drive_metrics(stamps, [letter == "!" for letter in alarms], events)


EVENT = Event(1.0, 1.45, "cow")


@pytest.mark.parametrize(
    ("alarms", "events", "delays_s", "false_alarms", "false_share"),
    [
        # The delay is from the start of the event to its first alarm.
        ("." * 10 + "...!!" + "." * 10, [EVENT], [0.3], 0, 0.0),
        ("." * 10 + "!" + "." * 19, [EVENT, Event(2.0, 2.5)], [0.0, None], 0, 0.0),
        # An alarm that began before finds the event, and is false before it.
        ("........!!!!" + "." * 8, [EVENT], [0.0], 1, 2 / 15),
        # An alarm may outlast its event for a second, but not begin in this time.
        ("." * 10 + "!" * 15 + "." * 20, [EVENT], [0.0], 0, 0.0),
        ("." * 10 + "!" * 20 + "." * 15, [EVENT], [0.0], 1, 5 / 40),
        ("." * 10 + "!!!!..!!" + "." * 10, [EVENT], [0.0], 1, 2 / 23),
        # Half a second of quiet separates false alarms.
        ("..!!..!!....", [], [], 1, 4 / 12),
        ("..!!......!!", [Event(0.0, 0.05)], [None], 2, 4 / 11),
        # One that never ends shows in the share.
        ("!" * 40, [Event(1.0, 2.0)], [0.0], 2, 19 / 29),
        ("....!", [Event(0.0, 1.0)], [0.4], 0, None),
    ],
)
def test_alarms_by_hand(
    alarms: str,
    events: list[Event],
    delays_s: list[float | None],
    false_alarms: int,
    false_share: float | None,
) -> None:
    result = measured(alarms, *events)
    assert list(result.delays_s) == pytest.approx(delays_s)
    assert result.missed == delays_s.count(None)
    assert (result.false_alarms, result.false_share) == pytest.approx((false_alarms, false_share))
    # Reports write them, and numpy's numbers are no JSON.
    json.dumps(dataclasses.asdict(result))


def test_frames_in_alarm_one_after_another_are_one_episode_at_any_rate() -> None:
    stamps = [i * 2_000_000_000 for i in range(6)]
    result = drive_metrics(stamps, [False, True, True, True, False, True], [])
    assert result.false_alarms == 2
    assert result.nominal_s == 10
    assert result.false_per_hour == pytest.approx(720)


def test_rates_are_by_the_hour_of_nominal_time() -> None:
    result = measured("!" + "." * 30, Event(1.0, 2.0))
    # 31 frames, 11 within: 9 steps before the event and 9 after it.
    assert result.nominal_s == pytest.approx(1.8)
    assert result.false_per_hour == pytest.approx(3600 / 1.8)
    assert measured("....!", Event(0.0, 1.0)).false_per_hour is None


@pytest.mark.parametrize("event", [Event(9.0, 10.0, "late"), Event(0.31, 0.39, "between frames")])
def test_events_outside_the_drive_are_refused(event: Event) -> None:
    with pytest.raises(InputError, match=f"'{event.kind}'.*expected frames in it.*0 to 1.9 s"):
        measured("." * 20, event)


def test_late_and_equal_stamps_are_put_in_order() -> None:
    second = 10**9
    stamps, alarms = [0, 2, 1, 3, 3, 5, 4], [False, True, False, True, True, False, False]
    event = [Event(1.5, 3.5)]
    found = drive_metrics([stamp * second // 2 for stamp in stamps], alarms, [Event(0.75, 1.75)])
    assert found.delays_s == (0.25,) and found.false_alarms == 0
    assert drive_metrics([s * second for s in (0, 1, 2, 3)], [False] * 4, event).missed == 1


def test_a_jump_back_is_refused() -> None:
    with pytest.raises(InputError, match=r"step back of 2\.000 s at frame 2"):
        drive_metrics([0, 5 * 10**9, 3 * 10**9], [False] * 3, [])
    with pytest.raises(InputError, match="0 stamps"):
        drive_metrics([], [], [])


def test_events_are_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "events.yaml"
    path.write_text(
        "events:\n  - {start_s: 1, end_s: 2.5, kind: cow}\n  - {start_s: 3, end_s: 4}\n"
    )
    assert read_events(path) == [Event(1.0, 2.5, "cow"), Event(3.0, 4.0)]
    path.write_text("events: []\n")
    assert read_events(path) == []
    with pytest.raises(InputError, match="cannot be read"):
        read_events(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "a list under 'events', found None"),
        ("events: 3\n", "found 3"),
        ("events: [5]\n", "number 0.*found 5"),
        ("events: [{start_s: 1}]\n", "expected start_s, end_s"),
        ("events: [{start_s: 1, end_s: 2, color: red}]\n", "expected start_s, end_s"),
        ("events: [{start_s: one, end_s: 2}]\n", "expected seconds"),
        ("events: [{start_s: true, end_s: 2}]\n", "expected seconds"),
        (f"events: [{{start_s: 1, end_s: {10**400}}}]\n", "expected seconds"),
        ("events: [{start_s: 2, end_s: 1}]\n", "0 <= start_s < end_s"),
        ("events: [{start_s: .nan, end_s: 1}]\n", "0 <= start_s < end_s"),
        ("events: [{start_s: 1, end_s: 2, kind: 3}]\n", "kind: expected a text"),
        ("events: [\n", "cannot be read"),
    ],
)
def test_bad_events_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "events.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_events(path)


def test_unknown_time_is_not_nominal_time() -> None:
    stamps_ns = [n * 10**9 for n in range(11)]
    alarms, unknown = [False] * 11, [n in (4, 5, 6) for n in range(11)]
    alarms[2] = True
    known = drive_metrics(stamps_ns, alarms, [])
    metrics = drive_metrics(stamps_ns, alarms, [], unknown)
    assert (known.nominal_s, metrics.nominal_s) == (10.0, 6.0)
    assert (known.false_share, metrics.false_share) == (1 / 11, 1 / 8)
    assert metrics.false_per_hour == 600.0
    # An event that was not assessed was not found.
    assert drive_metrics(stamps_ns, alarms, [Event(4.0, 6.0)], unknown).missed == 1
    nothing = drive_metrics(stamps_ns, [False] * 11, [], [True] * 11)
    assert nothing.false_per_hour is nothing.false_share is None
