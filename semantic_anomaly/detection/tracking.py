"""Confirmation over time of components: an object that is found again, not just a bad frame.

Boxes are associated with tracks by overlap after a constant-velocity prediction, best pairs first.
The prediction is a g-h filter on centre and logarithm of the size (Brookner 1998, "Tracking and
Kalman Filtering Made Easy"); the last pass compares enlarged boxes (Yang et al. 2023, arXiv
2211.14317), so that a small thing is found again before its velocity is known.

From the components of a frame to the decision: what is filtered out, what is found again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from semantic_anomaly.detection.filters import RegionFilters, apply, border_share
from semantic_anomaly.errors import ModelOutputError, SettingsError
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import ComponentState, Decision, Localization

# An image that is strange throughout must not fill the memory.
MAX_TRACKS = 256
# Hits are counted up to here (or `count`): stamps that stand still never leave the window.
MAX_HITS = 1024
_LEAST_IOU = 0.3
# Of the smaller box: reached by boxes of unlike size only, as like ones then have the IoU above.
_LEAST_PART = 0.6
_INSIDE = 0.7
_BUFFER = 0.5
_LEAST_BUFFERED_IOU = 0.2
# A part of an object says little of its size and nothing of its motion.
_PART_GAIN = 0.3
_LEAST_POSITION_GAIN, _LEAST_RATE_GAIN = 0.6, 0.27
# Boxes are as coarse as patches, so growth is believed later than motion, and within limits.
_RATE_TRUST = np.array([1.0, 1.0, 0.5, 0.5])
_MAX_GROWTH_RATE = 2.0
_MAX_GROWTH = math.log(2.0)
# Stamps may be equal or jitter; velocity is not measured over less than this.
_LEAST_STEP_S = 0.01
_MAX_COORDINATE_PX = 1e6


@dataclass(frozen=True)
class TrackState:
    """What is known of the track that a box belongs to.

    Attributes:
        track: number of the track, from 1; not used again before a reset.
        state: confirmed or not yet.
        hits: frames within the window in which it was found, this one included.
        first_ns: stamp of the frame in which it was found first.
    """

    track: int
    state: ComponentState
    hits: int
    first_ns: int


@dataclass(eq=False)
class _Track:
    # Place is (centre x, centre y, log width, log height), rate its change per second.
    number: int
    first_ns: int
    last_ns: int
    place: np.ndarray
    hits: deque[int]
    rate: np.ndarray = field(default_factory=lambda: np.zeros(4))
    measured: int = 1
    confirmed: bool = False

    def predict(self, stamp_ns: int) -> np.ndarray:
        change = self.rate * ((stamp_ns - self.last_ns) * 1e-9)
        change[2:] = np.clip(change[2:], -_MAX_GROWTH, _MAX_GROWTH)
        return self.place + change

    def correct(self, stamp_ns: int, box: np.ndarray, whole: bool) -> None:
        predicted = self.predict(stamp_ns)
        error = _places(box[None])[0] - predicted
        if not whole:
            self.place = predicted + _PART_GAIN * error
        else:
            self.measured = k = self.measured + 1
            # The least-squares line through the first k places, then a fading memory.
            gain = max(2 * (2 * k - 1) / (k * (k + 1)), _LEAST_POSITION_GAIN)
            rate_gain = max(6 / (k * (k + 1)), _LEAST_RATE_GAIN)
            self.place = predicted + gain * error
            step = (stamp_ns - self.last_ns) * 1e-9
            if step > 0.0:
                trust = rate_gain / max(step, _LEAST_STEP_S) * _RATE_TRUST
                self.rate = self.rate + trust * error
                self.rate[2:] = np.clip(self.rate[2:], -_MAX_GROWTH_RATE, _MAX_GROWTH_RATE)
        self.last_ns = stamp_ns


class ComponentTracker:
    """Confirms a component that was found in `count` frames within `window_s` seconds.

    A confirmed track stays so until nothing was found of it for more than `silence_s` seconds.
    Its answers depend on the stamps and boxes since the last reset alone, not on the order of the
    boxes within a frame, so that replaying stored boxes restores it.

    A box that lies mostly inside the box in which a found track was expected is a fragment of the
    same object and shares its state. So does a distinct thing in front of a large one that is
    found for the first time; things that have tracks of their own keep them. A candidate that
    covers a confirmed track of which nothing else is found is confirmed with it.

    Args:
        count: frames in which a component must be found, >= 1; 1 confirms at once.
        window_s: seconds in which they must lie, by the stamps, > 0.
        silence_s: seconds without a detection after which a track is dropped, > 0.

    Raises:
        SettingsError: an argument out of its bounds.
    """

    def __init__(self, count: int, window_s: float, silence_s: float) -> None:
        if count < 1:
            raise SettingsError(f"component confirmation: expected count >= 1, found {count}")
        for name, seconds in (("window_s", window_s), ("silence_s", silence_s)):
            if not (math.isfinite(seconds) and seconds > 0.0):
                raise SettingsError(
                    f"component confirmation: expected {name} > 0 and finite, found {seconds}"
                )
        self.count, self.window_s, self.silence_s = count, window_s, silence_s
        self._window_ns, self._silence_ns = round(window_s * 1e9), round(silence_s * 1e9)
        self.reset()

    def reset(self) -> None:
        """Forget all tracks; numbers start from 1 again."""
        self._tracks: list[_Track] = []
        self._next = 1
        self._last_ns: int | None = None

    def update(self, stamp_ns: int, boxes_xyxy: np.ndarray) -> tuple[TrackState, ...]:
        """Take the boxes of the next frame and return the state of each one's track, in order.

        Args:
            stamp_ns: stamp of the frame; one before the last frame's (a restarted bag or
                simulation) resets, an equal one is another frame.
            boxes_xyxy: (n, 4) float64, left, top, right, bottom in pixels; n may be 0, but a
                frame without boxes must be told too.

        Raises:
            ModelOutputError: boxes of another shape, not finite, empty or farther than a million
                pixels from the image; nothing is changed then.
        """
        _check_boxes(boxes_xyxy)
        if self._last_ns is not None and stamp_ns < self._last_ns:
            self.reset()
        self._last_ns = stamp_ns
        self._tracks = [t for t in self._tracks if stamp_ns - t.last_ns <= self._silence_ns]
        if not len(boxes_xyxy):
            return ()
        # In an order of their own, so that the order given cannot matter.
        boxes, inverse = np.unique(np.asarray(boxes_xyxy, np.float64), axis=0, return_inverse=True)
        owners = self._assign(stamp_ns, boxes)
        for track in dict.fromkeys(owners):
            track.hits.append(stamp_ns)
            while track.hits[0] < stamp_ns - self._window_ns:
                track.hits.popleft()
            track.confirmed |= len(track.hits) >= self.count
        states = [_state(track) for track in owners]
        if len(self._tracks) > MAX_TRACKS:
            self._tracks.sort(key=lambda t: (t.confirmed, t.last_ns, t.number))
            del self._tracks[: len(self._tracks) - MAX_TRACKS]
            # Older tracks come first wherever two fit equally well.
            self._tracks.sort(key=lambda t: t.number)
        return tuple(states[i] for i in inverse.reshape(-1).tolist())

    def _assign(self, stamp_ns: int, boxes: np.ndarray) -> list[_Track]:
        """Return the track of each box; tracks are corrected and born."""
        places = [track.predict(stamp_ns) for track in self._tracks]
        predicted = _boxes(np.array(places).reshape(-1, 4))
        shared = _intersections(predicted, boxes)
        sizes, areas = _areas(predicted)[:, None], _areas(boxes)[None]
        pairs: dict[int, int] = {}
        _match(_iou(predicted, boxes), _LEAST_IOU, pairs)
        _match(shared / np.minimum(sizes, areas), _LEAST_PART, pairs)
        parts = _held(shared / areas, set(pairs.values()), set(pairs))
        buffered = _iou(_enlarged(predicted), _enlarged(boxes))
        buffered[:, list(parts)] = 0.0
        near = dict(pairs)
        _match(buffered, _LEAST_BUFFERED_IOU, near)
        found_again = set(near.values())
        lost = [i for i, t in enumerate(self._tracks) if t.confirmed and i not in found_again]
        owner: dict[int, _Track] = {}
        for box, index in near.items():
            track, found = self._tracks[index], boxes[box]
            owner[box] = track
            for part in (p for p, holder in parts.items() if holder == index):
                owner[part] = track
                # Cut to what was expected: of two things that part, one would become a track
                # as large as the road.
                low, high = np.split(predicted[index], 2)
                cut = np.clip(boxes[part], np.tile(low, 2), np.tile(high, 2))
                found = np.append(np.minimum(found, cut)[:2], np.maximum(found, cut)[2:])
            like = _iou(found[None], predicted[[index]])[0, 0] >= _LEAST_IOU
            track.correct(stamp_ns, found, like or box not in pairs)
            track.confirmed |= bool(np.any((shared / sizes)[lost, box] >= _INSIDE))
        self._bear(stamp_ns, boxes, owner)
        return [owner[box] for box in range(len(boxes))]

    def _bear(self, stamp_ns: int, boxes: np.ndarray, owner: dict[int, _Track]) -> None:
        """Give each box without an owner one: that of the box around it, or a new track."""
        inside = _intersections(boxes, boxes) / _areas(boxes)[None]
        # Largest first: what holds others must be there before them.
        for box in np.argsort(-_areas(boxes), kind="stable").tolist():
            if box in owner:
                continue
            around = _held(inside[:, [box]], set(owner), ())
            if around:
                owner[box] = owner[around[0]]
                continue
            place = _places(boxes[[box]])[0]
            hits: deque[int] = deque(maxlen=max(self.count, MAX_HITS))
            owner[box] = _Track(self._next, stamp_ns, stamp_ns, place, hits)
            self._tracks.append(owner[box])
            self._next += 1


def _check_boxes(boxes: np.ndarray) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4 or boxes.dtype.kind not in "fiu":
        raise ModelOutputError(
            f"component boxes: expected (n, 4) float64, found shape {boxes.shape}, {boxes.dtype}"
        )
    # NaN fails both comparisons.
    sound = np.all(np.abs(boxes) <= _MAX_COORDINATE_PX, axis=1)
    sound &= np.all(boxes[:, :2] < boxes[:, 2:], axis=1)
    for row in np.flatnonzero(~sound)[:1].tolist():
        raise ModelOutputError(
            f"component box {row}: expected finite left < right and top < bottom in pixels, "
            f"found {boxes[row].tolist()}"
        )


def _state(track: _Track) -> TrackState:
    state = ComponentState.CONFIRMED if track.confirmed else ComponentState.CANDIDATE
    return TrackState(track.number, state, len(track.hits), track.first_ns)


def _match(scores: np.ndarray, least: float, pairs: dict[int, int]) -> None:
    """Add pairs box -> track, (tracks, boxes) scores, best first, each at most once."""
    used = set(pairs.values())
    for flat in np.argsort(-scores, axis=None, kind="stable").tolist():
        track, box = divmod(flat, scores.shape[1])
        if scores[track, box] < least:
            return
        if track not in used and box not in pairs:
            pairs[box] = track
            used.add(track)


def _held(shares: np.ndarray, holders: set[int], taken: Collection[int]) -> dict[int, int]:
    """Return the holder (row) of each box (column) that lies mostly inside one."""
    rows = sorted(holders)
    if not rows:
        return {}
    best = np.argmax(shares[rows], axis=0)
    inside = {b: rows[r] for b, r in enumerate(best.tolist()) if shares[rows[r], b] >= _INSIDE}
    return {box: row for box, row in inside.items() if box not in taken}


def _places(boxes: np.ndarray) -> np.ndarray:
    low, high = boxes[:, :2], boxes[:, 2:]
    return np.hstack([(low + high) / 2, np.log(high - low)])


def _boxes(places: np.ndarray) -> np.ndarray:
    half = np.exp(places[:, 2:]) / 2
    return np.hstack([places[:, :2] - half, places[:, :2] + half])


def _enlarged(boxes: np.ndarray) -> np.ndarray:
    margin = _BUFFER * (boxes[:, 2:] - boxes[:, :2])
    return np.hstack([boxes[:, :2] - margin, boxes[:, 2:] + margin])


def _areas(boxes: np.ndarray) -> np.ndarray:
    # Far from the image a thin box may vanish by rounding.
    return np.maximum(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), 1e-9)


def _intersections(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    return np.prod(np.maximum(high - low, 0.0), axis=2)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    shared = _intersections(a, b)
    return shared / (_areas(a)[:, None] + _areas(b)[None] - shared)


def reject(
    settings: Settings, labels: np.ndarray, places: tuple[Localization, ...], inside: np.ndarray
) -> tuple[np.ndarray, tuple[Localization, ...]]:
    """Return label map and components without those that size or shape speak against.

    Args:
        settings: `max_area`, `max_aspect` and `max_border_share`.
        labels: (height, width) uint16, 0 for none.
        places: components, labelled in the map.
        inside: (height, width) bool, pixels that take part.
    """
    filters = RegionFilters(
        max_area=settings.max_area,
        max_aspect=settings.max_aspect or math.inf,
        max_border_share=settings.max_border_share,
    )
    if not places or (filters.max_area == 1.0 and filters.max_aspect == math.inf):
        return labels, places
    numbers = [place.label - 1 for place in places]
    shares = border_share(labels.astype(np.int32) - 1, inside, max(numbers) + 1)[numbers]
    judged = apply(
        filters,
        (labels.shape[0], labels.shape[1]),
        np.array([place.box_xyxy for place in places], np.float64),
        np.array([place.area_px for place in places], np.float64),
        shares,
    )
    kept = tuple(place for place, keep in zip(places, judged.keep, strict=True) if keep)
    return np.where(np.isin(labels, [place.label for place in kept]), labels, 0), kept


def follow(
    tracker: ComponentTracker, stamp_ns: int, places: Sequence[Localization]
) -> tuple[Localization, ...]:
    """Return the components of the next frame with their tracks and states.

    Args:
        tracker: has been told all frames before; a frame without components must be told too.
        stamp_ns: of the frame.
        places: components, may be none.

    Raises:
        ModelOutputError: as `ComponentTracker.update`.
    """
    boxes = np.array([place.box_xyxy for place in places], np.float64).reshape(-1, 4)
    tracks = tracker.update(stamp_ns, boxes)
    return tuple(
        replace(place, state=track.state, track=track.track)
        for place, track in zip(places, tracks, strict=True)
    )


def decide(places: Sequence[Localization], threshold: float | None) -> Decision:
    """Return `anomaly` where a component is confirmed, `unknown` without a threshold."""
    if threshold is None:
        return Decision.UNKNOWN
    confirmed = any(place.state is ComponentState.CONFIRMED for place in places)
    return Decision.ANOMALY if confirmed else Decision.NOMINAL
