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


def test_the_delay_is_from_the_start_of_the_event_to_its_first_alarm() -> None:
    result = measured("." * 10 + "...!!" + "." * 10, Event(1.0, 1.45, "cow"))
    assert result.delays_s == (pytest.approx(0.3),)
    assert result.missed == result.false_alarms == 0
    assert result.false_share == 0.0


def test_missed_events_are_counted_apart() -> None:
    result = measured("." * 10 + "!" + "." * 19, Event(1.0, 1.45), Event(2.0, 2.5))
    assert result.delays_s == (pytest.approx(0.0), None)
    assert result.missed == 1


def test_an_alarm_that_began_before_finds_the_event_and_is_false_before_it() -> None:
    result = measured("........!!!!" + "." * 8, Event(1.0, 1.45))
    assert result.delays_s == (pytest.approx(0.0),)
    assert result.false_alarms == 1
    assert result.false_share == pytest.approx(2 / 15)


def test_an_alarm_may_outlast_its_event_for_a_second() -> None:
    event = Event(1.0, 1.45)
    assert measured("." * 10 + "!" * 15 + "." * 20, event).false_alarms == 0
    late = measured("." * 10 + "!" * 20 + "." * 15, event)
    assert late.false_alarms == 1
    # One that begins after the event is false at once.
    assert measured("." * 10 + "!!!!..!!" + "." * 10, event).false_alarms == 1


def test_episodes_are_parted_by_half_a_second_of_quiet() -> None:
    assert measured("..!!..!!....").false_alarms == 1
    parted = measured("..!!......!!", Event(0.0, 0.05))
    assert parted.false_alarms == 2
    # Reports write them, and numpy's numbers are no JSON.
    assert json.loads(json.dumps(dataclasses.asdict(parted)))["false_alarms"] == 2


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
    assert result.false_share == pytest.approx(1 / 20)


def test_a_drive_that_is_one_event_has_no_false_rate() -> None:
    result = measured("....!", Event(0.0, 1.0))
    assert result.false_per_hour is None and result.false_share is None


def test_an_alarm_that_never_ends_shows() -> None:
    assert measured("!" * 40, Event(1.0, 2.0)).false_share == pytest.approx(19 / 29)


@pytest.mark.parametrize("event", [Event(9.0, 10.0, "late"), Event(0.31, 0.39, "between frames")])
def test_events_outside_the_drive_are_refused(event: Event) -> None:
    with pytest.raises(InputError, match=f"'{event.kind}'.*expected frames in it.*0 to 1.9 s"):
        measured("." * 20, event)


def test_stamps_that_do_not_rise_are_refused() -> None:
    with pytest.raises(InputError, match="rising stamps"):
        drive_metrics([1, 1], [False, False], [])
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


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("- 1\n", "a list under 'events', found None"),
        ("events: 3\n", "found 3"),
        ("events: [5]\n", "number 0.*found 5"),
        ("events: [{start_s: 1}]\n", "expected start_s, end_s"),
        ("events: [{start_s: 1, end_s: 2, color: red}]\n", "expected start_s, end_s"),
        ("events: [{start_s: one, end_s: 2}]\n", "expected seconds"),
        ("events: [{start_s: true, end_s: 2}]\n", "expected seconds"),
        ("events: [{start_s: 2, end_s: 1}]\n", "0 <= start_s < end_s"),
        ("events: [{start_s: .nan, end_s: 1}]\n", "0 <= start_s < end_s"),
        ("events: [{start_s: 1, end_s: 2, kind: 3}]\n", "kind: expected a text"),
        ("events: [\n", "cannot be read"),
    ],
)
def test_bad_events_are_refused(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "events.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=found):
        read_events(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_events(tmp_path / "absent.yaml")
