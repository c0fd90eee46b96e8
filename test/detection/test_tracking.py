"""Tracking: which component keeps its track, and when it is confirmed."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_anomaly.detection.tracking import (
    MAX_TRACKS,
    ComponentTracker,
    TrackState,
    decide,
    follow,
)
from semantic_anomaly.structures import ComponentState, Decision, Localization, NominalExample

PERIOD_NS = 100_000_000  # 10 Hz
CONFIRMED, CANDIDATE = ComponentState.CONFIRMED, ComponentState.CANDIDATE
Box = tuple[float, float, float, float]
BOX: Box = (275.0, 275.0, 325.0, 325.0)


def around(x: float, y: float, width: float, height: float) -> Box:
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def update(tracker: ComponentTracker, frame: float, *boxes: Box) -> tuple[TrackState, ...]:
    return tracker.update(round(frame * PERIOD_NS), np.array(boxes, np.float64).reshape(-1, 4))


def tracks(states: tuple[TrackState, ...]) -> list[int]:
    return [state.track for state in states]


def approaching(frame: int, width: float = 60.0) -> Box:
    """Return a box that moves 20 px and grows by 5 % each frame."""
    size = width * 1.05**frame
    return around(100 + 20 * frame, 200 + 4 * frame, size, 0.7 * size)


@pytest.mark.parametrize("width", [40.0, 60.0, 200.0])
def test_a_moving_and_growing_component_keeps_its_track(width: float) -> None:
    tracker = ComponentTracker(3, 1.0, 1.0)
    states = [update(tracker, frame, approaching(frame, width))[0] for frame in range(30)]
    assert {state.track for state in states} == {1}
    assert [state.state for state in states] == [CANDIDATE] * 2 + [CONFIRMED] * 28


def test_dropped_frames_are_bridged_by_the_velocity() -> None:
    tracker = ComponentTracker(3, 1.0, 1.0)
    boxes = {frame: around(100 + 20 * frame, 200, 60, 60) for frame in range(40)}
    seen = [frame for frame in boxes if frame < 10 or frame % 5 == 0]
    assert {update(tracker, frame, boxes[frame])[0].track for frame in seen} == {1}


@pytest.mark.parametrize("apart", [0.0, 12.0], ids=["through each other", "passing"])
def test_crossing_components_keep_their_tracks(apart: float) -> None:
    tracker = ComponentTracker(2, 1.0, 1.0)
    for frame in range(31):
        right = around(100 + 20 * frame, 200, 60, 60)
        left = around(707 - 20 * frame, 200 + apart, 60, 60)
        assert tracks(update(tracker, frame, right, left)) == [1, 2], frame


@pytest.mark.parametrize("seed", range(2))
def test_coarse_boxes_with_gaps_keep_their_track(seed: int) -> None:
    random = np.random.default_rng(seed)
    tracker = ComponentTracker(3, 1.0, 1.0)
    numbers = set()
    for frame in range(40):
        noisy = np.array(around(100 + 6 * frame, 300, 84, 56)) + random.uniform(-7, 7, 4)
        if frame < 2 or random.random() < 0.6:
            numbers.add(update(tracker, frame, tuple(noisy.tolist()))[0].track)
    assert numbers == {1}


def test_flicker_is_confirmed_and_an_isolated_false_alarm_is_not() -> None:
    tracker = ComponentTracker(3, 0.5, 0.5)
    isolated = around(700, 100, 40, 40)
    assert update(tracker, 0, BOX)[0].state is CANDIDATE
    assert update(tracker, 1) == ()
    assert [s.state for s in update(tracker, 2, BOX, isolated)] == [CANDIDATE, CANDIDATE]
    update(tracker, 3)
    assert update(tracker, 4, BOX)[0] == (1, CONFIRMED)
    # Once a second at the same position: a new track each time.
    alarms = [update(tracker, frame, isolated)[0] for frame in (12, 22, 32)]
    assert [alarm.state for alarm in alarms] == [CANDIDATE] * 3
    assert len(set(tracks(tuple(alarms)))) == 3


def test_detections_outside_the_window_do_not_count() -> None:
    tracker = ComponentTracker(3, 0.5, 2.0)
    states = [update(tracker, frame, BOX)[0] for frame in (0, 3, 6, 9)]
    assert states == [(1, CANDIDATE)] * 4
    assert update(tracker, 10, BOX)[0] == (1, CONFIRMED), "6, 9 and 10 lie within 0.4 s"


def test_a_confirmed_track_stays_confirmed_until_silent_for_too_long() -> None:
    tracker = ComponentTracker(3, 0.3, 1.0)
    for frame in range(3):
        update(tracker, frame, BOX)
    assert update(tracker, 12, BOX)[0] == (1, CONFIRMED), "silent for exactly silence_s"
    assert update(tracker, 22.001, BOX)[0] == (2, CANDIDATE)


def test_a_count_of_one_confirms_at_once() -> None:
    assert update(ComponentTracker(1, 0.1, 0.1), 0, BOX)[0] == (1, CONFIRMED)


def test_only_a_jump_back_resets() -> None:
    tracker = ComponentTracker(2, 2.0, 2.0)
    update(tracker, 20, BOX)
    assert update(tracker, 10, BOX)[0] == (1, CONFIRMED), "1 s late"
    assert update(tracker, 9, BOX)[0] == (1, CANDIDATE), "11 frames before the newest"
    assert update(tracker, 9, BOX)[0] == (1, CONFIRMED), "an equal stamp is another frame"
    tracker.reset()
    assert update(tracker, 9, BOX)[0] == (1, CANDIDATE)


@pytest.mark.parametrize(
    "order",
    [
        (1, 0, 3, 2, 5, 4, 7, 6),
        (0, 2, 1, 3, 5, 4, 6, 7),
        (0, 0, 1, 1, 2, 2, 3, 3),
        (0, 3, 1, 4, 2, 5, 3, 6),
        (0,) * 8,
    ],
    ids=["swapped", "one late", "repeated", "two publishers", "equal"],
)
def test_disorder_does_not_delay_the_confirmation(order: tuple[int, ...]) -> None:
    tracker = ComponentTracker(3, 1.0, 1.0)
    states = [update(tracker, frame, BOX)[0] for frame in order]
    assert states == [(1, CANDIDATE)] * 2 + [(1, CONFIRMED)] * 6


def test_a_late_frame_counts_by_its_own_stamp() -> None:
    tracker = ComponentTracker(2, 0.3, 2.0)
    update(tracker, 9, BOX)
    assert update(tracker, 4, BOX)[0] == (1, CANDIDATE), "0.5 s apart"
    tracker = ComponentTracker(2, 0.3, 2.0)
    update(tracker, 9)
    update(tracker, 4, BOX)
    assert update(tracker, 10, BOX)[0] == (1, CANDIDATE), "0.6 s apart"


def test_a_frame_in_the_far_future_does_not_stop_the_confirmation_of_later_ones() -> None:
    tracker = ComponentTracker(2, 1.0, 1.0)
    update(tracker, 0, BOX)
    update(tracker, 10_000, BOX)
    assert [update(tracker, frame, BOX)[0].state for frame in (1, 2)] == [CANDIDATE, CONFIRMED]


def test_of_two_boxes_the_one_with_the_larger_iou_keeps_the_track() -> None:
    tracker = ComponentTracker(2, 1.0, 1.0)
    update(tracker, 0, (100, 100, 200, 150))
    assert tracks(update(tracker, 1, (100, 100, 130, 150), (135, 100, 200, 150))) == [2, 1]


def test_replaying_the_boxes_since_the_reset_restores_the_state() -> None:
    random = np.random.default_rng(3)
    corners = [random.uniform(0, 200, (4, 2)) for _ in range(30)]
    frames = [np.hstack([low, low + random.uniform(20, 60, (4, 2))]) for low in corners]
    first = ComponentTracker(2, 0.5, 0.5)
    expected = [first.update(i * PERIOD_NS, boxes) for i, boxes in enumerate(frames)]
    used = ComponentTracker(2, 0.5, 0.5)
    update(used, 5, BOX)
    used.reset()
    assert [used.update(i * PERIOD_NS, boxes) for i, boxes in enumerate(frames)] == expected


def test_distant_components_never_share_a_track() -> None:
    random = np.random.default_rng(0)
    tracker = ComponentTracker(2, 0.6, 0.6)
    # Each moves inside its own cell of 400 px.
    cells = np.array([(x, y) for x in range(200, 2000, 400) for y in (200, 600)], np.float64)
    sizes = random.uniform(30, 110, cells.shape)
    offsets = np.zeros_like(cells)
    owners: dict[int, int] = {}
    stamp = 0
    for _ in range(80):
        stamp += int(random.integers(1, 3)) * PERIOD_NS
        offsets = np.clip(offsets + random.uniform(-8, 8, cells.shape), -40, 40)
        half = sizes * random.uniform(0.9, 1.1, cells.shape) / 2
        boxes = np.hstack([cells + offsets - half, cells + offsets + half])
        visible = random.permutation(np.flatnonzero(random.random(len(cells)) < 0.7))
        states = tracker.update(stamp, boxes[visible])
        assert len(set(tracks(states))) == len(states)
        for cell, state in zip(visible.tolist(), states, strict=True):
            assert owners.setdefault(state.track, cell) == cell


def test_memory_is_bounded_and_confirmed_tracks_outlive_candidates() -> None:
    tracker = ComponentTracker(2, 10.0, 100.0)
    update(tracker, 0, BOX)
    update(tracker, 1, BOX)
    for frame in range(2, 12):
        boxes = [around(1000 + 100 * i, 100 * frame, 20, 20) for i in range(60)]
        assert len(update(tracker, frame, *boxes)) == 60
        assert len(tracker._tracks) <= MAX_TRACKS
    newest, oldest = around(1000, 1100, 20, 20), around(1000, 200, 20, 20)
    assert tracks(update(tracker, 12, BOX, newest, oldest)) == [1, 542, 602]


def test_localizations_get_track_and_state_and_a_confirmed_one_decides() -> None:
    nearest = NominalExample("d/0.png", 0, 0, (1, 1), 0.1)
    localizations = (Localization(BOX, (300.0, 300.0), 2500, 0.5, nearest, 1),)
    tracker = ComponentTracker(2, 1.0, 1.0)
    first, second = (follow(tracker, stamp, localizations) for stamp in (0, PERIOD_NS))
    assert (first[0].track, first[0].state) == (1, CANDIDATE)
    assert (second[0].track, second[0].state) == (1, CONFIRMED)
    assert decide(first, 0.3) is Decision.NOMINAL and decide(second, 0.3) is Decision.ANOMALY
    assert decide((), 0.3) is Decision.NOMINAL and decide(second, None) is Decision.UNKNOWN
