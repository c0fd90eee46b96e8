"""Confirmation over time of components: what keeps its track, and what is confirmed when."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_anomaly.detection.tracking import (
    MAX_TRACKS,
    ComponentState,
    ComponentTracker,
    TrackState,
)
from semantic_anomaly.errors import ModelOutputError, SettingsError

PERIOD_NS = 100_000_000  # 10 Hz
Box = tuple[float, float, float, float]


def around(x: float, y: float, width: float, height: float) -> Box:
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def tell(tracker: ComponentTracker, frame: float, *boxes: Box) -> tuple[TrackState, ...]:
    return tracker.update(round(frame * PERIOD_NS), np.array(boxes, np.float64).reshape(-1, 4))


def confirmed(state: TrackState) -> bool:
    return state.state is ComponentState.CONFIRMED


def moving(frame: int, width: float = 60.0) -> Box:
    """Return a box that moves 30 px and grows by 5 % each frame."""
    size = width * 1.05**frame
    return around(100 + 30 * frame, 200 + 4 * frame, size, 0.7 * size)


@pytest.mark.parametrize("width", [24.0, 40.0, 60.0, 200.0])
def test_what_moves_and_grows_keeps_its_track(width: float) -> None:
    tracker = ComponentTracker(3, 1.0, 1.0)
    states = [tell(tracker, frame, moving(frame, width))[0] for frame in range(30)]
    assert {state.track for state in states} == {1}
    assert [confirmed(state) for state in states] == [False, False] + [True] * 28
    assert [state.hits for state in states[:4]] == [1, 2, 3, 4]
    assert states[-1].hits == 11, "frames at both ends of the second count"
    assert {state.first_ns for state in states} == {0}


def test_dropped_frames_do_not_matter_because_stamps_tell() -> None:
    tracker = ComponentTracker(3, 1.0, 1.0)
    seen = [f for f in range(40) if f < 5 or f % 5 == 0]
    assert {tell(tracker, f, moving(f))[0].track for f in seen} == {1}


@pytest.mark.parametrize("apart", [0.0, 12.0], ids=["through each other", "passing"])
def test_objects_that_cross_keep_their_tracks(apart: float) -> None:
    tracker = ComponentTracker(2, 1.0, 1.0)
    for frame in range(31):
        right = around(100 + 20 * frame, 200, 60, 60)
        left = around(707 - 20 * frame, 200 + apart, 60, 60)
        states = tell(tracker, frame, right, left)
        assert [state.track for state in states] == [1, 2], frame


@pytest.mark.parametrize("seed", range(5))
def test_coarse_boxes_keep_their_track(seed: int) -> None:
    random = np.random.default_rng(seed)
    tracker = ComponentTracker(3, 1.0, 1.0)
    tracks = set()
    for frame in range(40):
        noisy = np.array(around(100 + 10 * frame, 300, 84, 56)) + random.uniform(-7, 7, 4)
        if frame < 2 or random.random() < 0.6:
            tracks.add(tell(tracker, frame, tuple(noisy.tolist()))[0].track)
    assert tracks == {1}


def test_flicker_is_confirmed_and_an_isolated_false_alarm_is_not() -> None:
    tracker = ComponentTracker(3, 0.5, 0.5)
    flickering, isolated = around(300, 300, 50, 50), around(700, 100, 40, 40)
    assert not confirmed(tell(tracker, 0, flickering)[0])
    tell(tracker, 1)
    first, alarm = tell(tracker, 2, flickering, isolated)
    assert not confirmed(first) and not confirmed(alarm)
    tell(tracker, 3)
    state = tell(tracker, 4, flickering)[0]
    assert confirmed(state) and state.hits == 3
    # Once a second at the same place: each time another false alarm.
    alarms = [tell(tracker, frame, isolated)[0] for frame in (12, 22, 32)]
    assert not any(confirmed(state) for state in alarms)
    assert len({state.track for state in alarms}) == 3


def test_hits_outside_the_window_do_not_count() -> None:
    tracker = ComponentTracker(3, 0.5, 2.0)
    box = around(300, 300, 50, 50)
    states = [tell(tracker, frame, box)[0] for frame in (0, 3, 6, 9)]
    assert [state.hits for state in states] == [1, 2, 2, 2]
    assert {state.track for state in states} == {1} and not any(map(confirmed, states))
    assert confirmed(tell(tracker, 10, box)[0])


def test_a_confirmed_track_stays_so_until_it_is_silent_for_too_long() -> None:
    tracker = ComponentTracker(3, 0.3, 1.0)
    box = around(300, 300, 50, 50)
    for frame in range(3):
        tell(tracker, frame, box)
    late = tell(tracker, 12, box)[0]
    assert confirmed(late) and (late.track, late.hits) == (1, 1), "exactly the silence allowed"
    new = tell(tracker, 22.001, box)[0]
    assert not confirmed(new)
    assert (new.track, new.hits, new.first_ns) == (2, 1, 2_200_100_000)


def test_one_detection_confirms_when_one_is_asked_for() -> None:
    assert confirmed(tell(ComponentTracker(1, 0.1, 0.1), 0, around(9, 9, 4, 4))[0])


def test_a_stamp_going_backwards_clears_and_an_equal_one_does_not() -> None:
    tracker = ComponentTracker(2, 1.0, 1.0)
    box = around(300, 300, 50, 50)
    tell(tracker, 10, box)
    assert tell(tracker, 10, box)[0] == TrackState(1, ComponentState.CONFIRMED, 2, 10 * PERIOD_NS)
    again = TrackState(1, ComponentState.CANDIDATE, 1, 9 * PERIOD_NS)
    assert tell(tracker, 9, box)[0] == again
    tell(tracker, 20)
    tell(tracker, 19)
    tracker.reset()
    assert tell(tracker, 9, box)[0] == again


def test_fragments_share_one_track_that_counts_a_frame_once() -> None:
    tracker = ComponentTracker(3, 1.0, 1.0)
    tell(tracker, 0, (100, 100, 220, 180))
    for frame in range(1, 25):
        # Other fragments in each frame, never quite within the whole.
        edge = 130 + 10 * (frame % 5)
        parts = [(100, 102, edge, 180), (edge + 4, 98, 200, 150), (edge + 10, 155, 222, 181)]
        states = tell(tracker, frame, *parts)
        assert {state.track for state in states} == {1}, frame
        assert {state.hits for state in states} == {min(frame + 1, 11)}
        assert {confirmed(state) for state in states} == {frame >= 2}
    assert [s.track for s in tell(tracker, 25, (100, 100, 220, 180), (600, 1, 650, 40))] == [1, 2]


def test_an_object_found_in_part_keeps_its_track() -> None:
    tracker = ComponentTracker(2, 1.0, 1.0)
    whole, part = (100.0, 100.0, 220.0, 180.0), (150.0, 110.0, 180.0, 140.0)
    tracks = [tell(tracker, f, part if f % 3 else whole)[0].track for f in range(20)]
    assert set(tracks) == {1}


def test_a_part_says_nothing_of_motion() -> None:
    tracker = ComponentTracker(2, 2.0, 2.0)
    for frame in range(5):
        tell(tracker, frame, (100, 100, 220, 180))
    tell(tracker, 5, (195, 160, 220, 180))
    assert tell(tracker, 14, (150, 120, 175, 140))[0].track == 1


def test_a_piece_within_a_thing_that_is_new_belongs_to_it() -> None:
    states = tell(ComponentTracker(1, 1.0, 1.0), 0, (120, 120, 140, 140), (100, 100, 220, 180))
    assert [state.track for state in states] == [1, 1]


def test_things_that_part_do_not_stay_one() -> None:
    tracker = ComponentTracker(2, 1.0, 1.0)
    tell(tracker, 0, (100, 100, 200, 150))
    for frame in range(1, 40):
        shift = 5 * frame
        pair = (100 - shift, 100, 148 - shift, 150), (152 + shift, 100, 200 + shift, 150)
        states = tell(tracker, frame, *pair)
        assert frame > 1 or len({state.track for state in states}) == 1
    assert len({state.track for state in states}) == 2
    # The road between them belongs to neither.
    assert tell(tracker, 40, *pair, (130, 110, 170, 140))[2].track == 3


def test_a_candidate_that_covers_a_lost_confirmed_track_is_confirmed() -> None:
    tracker = ComponentTracker(3, 1.0, 1.0)
    small, large = (100.0, 100.0, 140.0, 150.0), (142.0, 100.0, 240.0, 150.0)
    tell(tracker, 0, small)
    tell(tracker, 1, small)
    small_state, large_state = tell(tracker, 2, small, large)
    assert confirmed(small_state) and not confirmed(large_state)
    merged = tell(tracker, 3, (100, 100, 240, 150))[0]
    assert merged.track == large_state.track and merged.hits == 2 and confirmed(merged)


def test_order_of_boxes_does_not_matter() -> None:
    random = np.random.default_rng(7)
    tracker, shuffled = ComponentTracker(2, 0.5, 0.4), ComponentTracker(2, 0.5, 0.4)
    for frame in range(60):
        # Multiples of 10 make many ties; all crowd into a small image.
        low = random.integers(0, 20, (random.integers(0, 12), 2)) * 10.0
        boxes = np.hstack([low, low + random.integers(1, 8, low.shape) * 10.0])
        order = random.permutation(len(boxes))
        straight = tracker.update(frame * PERIOD_NS, boxes)
        permuted = shuffled.update(frame * PERIOD_NS, boxes[order])
        assert permuted == tuple(straight[i] for i in order.tolist())


def test_replaying_the_boxes_since_the_reset_continues_it() -> None:
    random = np.random.default_rng(3)
    frames = [random.uniform(0, 200, (4, 2)) for _ in range(30)]
    boxes = [np.hstack([low, low + random.uniform(20, 60, (4, 2))]) for low in frames]
    one = ComponentTracker(2, 0.5, 0.5)
    said = [one.update(i * PERIOD_NS, each) for i, each in enumerate(boxes)]
    used = ComponentTracker(2, 0.5, 0.5)
    tell(used, 5, around(5, 5, 5, 5))
    used.reset()
    assert [used.update(i * PERIOD_NS, each) for i, each in enumerate(boxes)] == said


@pytest.mark.parametrize("seed", range(8))
def test_disjoint_objects_never_share_a_track(seed: int) -> None:
    random = np.random.default_rng(seed)
    tracker = ComponentTracker(2, 0.6, 0.6)
    # Each wanders in a cell of its own, 400 px wide, so that none is ever within reach of two.
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
        assert len({state.track for state in states}) == len(states)
        for cell, state in zip(visible.tolist(), states, strict=True):
            assert owners.setdefault(state.track, cell) == cell


def test_memory_stays_bounded_and_confirmed_tracks_outlive_candidates() -> None:
    tracker = ComponentTracker(2, 10.0, 100.0)
    box = around(-500, -500, 40, 40)
    tell(tracker, 0, box)
    tell(tracker, 1, box)
    for frame in range(2, 12):
        places = [around(100 * i, 100 * frame, 20, 20) for i in range(60)]
        assert len(tell(tracker, frame, *places)) == 60
        assert len(tracker._tracks) <= MAX_TRACKS
    assert tell(tracker, 12, box)[0].track == 1
    assert tell(tracker, 12, around(0, 1100, 20, 20))[0].track == 542, "the newest are kept"
    assert tell(tracker, 12, around(0, 200, 20, 20))[0].track == 602, "the oldest went first"


def test_stamps_that_stand_still_do_not_fill_the_memory() -> None:
    tracker = ComponentTracker(3, 1.0, 1.0)
    for _ in range(1100):
        state = tell(tracker, 0, around(50, 50, 20, 20))[0]
    assert state.hits == 1024 and state.track == 1


@pytest.mark.parametrize(
    ("boxes", "match"),
    [
        (np.zeros((0,)), r"expected \(n, 4\)"),
        (np.zeros((2, 5)), r"expected \(n, 4\)"),
        (np.array([["a", "b", "c", "d"]]), "found shape"),
        (np.array([[0, 0, 5, 5], [np.nan, 0, 5, 5]]), "box 1: expected finite"),
        (np.array([[0, 0, np.inf, 5]]), "box 0: expected finite"),
        (np.array([[5.0, 0, 5, 5]]), "left < right"),
        (np.array([[0.0, 9, 5, 5]]), "top < bottom"),
    ],
)
def test_refuses_boxes_and_changes_nothing(boxes: np.ndarray, match: str) -> None:
    tracker = ComponentTracker(2, 1.0, 1.0)
    tell(tracker, 1, around(50, 50, 20, 20))
    with pytest.raises(ModelOutputError, match=match):
        tracker.update(0, boxes)
    assert confirmed(tell(tracker, 1, around(50, 50, 20, 20))[0])


@pytest.mark.parametrize(
    ("count", "window_s", "silence_s", "match"),
    [
        (0, 1.0, 1.0, "count >= 1, found 0"),
        (1, 0.0, 1.0, "window_s > 0 and finite, found 0"),
        (1, 1.0, -1.0, "silence_s > 0 and finite, found -1"),
        (1, float("nan"), 1.0, "window_s"),
        (1, 1.0, float("inf"), "silence_s"),
    ],
)
def test_refuses_arguments(count: int, window_s: float, silence_s: float, match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        ComponentTracker(count, window_s, silence_s)
