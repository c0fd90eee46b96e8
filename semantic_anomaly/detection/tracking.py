"""Tracking: components followed from frame to frame, and confirmed when detected often enough.

Components are matched to tracks greedily by intersection over union (IoU) after a constant-velocity
prediction of the box, as SORT does with a Kalman filter (Bewley et al. 2016, arXiv 1602.00763).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from semantic_anomaly.stamps import jumps_back
from semantic_anomaly.structures import ComponentState, Decision, Localization

# Bounds the memory when stamps stand still or silence_s is long.
MAX_TRACKS = 256
# Components change shape between frames. On four synthetic drives with 8 anomalies, at three
# thresholds, 0.1 gave 2 track switches and SORT's 0.3 gave 22; further passes did not change them.
_MIN_IOU = 0.1
# Weight of the newest frame in the velocity: boxes are as coarse as patches.
_VELOCITY_GAIN = 0.3
# Stamps may jitter; velocity is not measured over less than this.
_MIN_STEP_S = 0.01


class TrackState(NamedTuple):
    """The track of a component.

    Attributes:
        track: number from 1, not used again before a reset.
        state: whether the track is confirmed.
    """

    track: int
    state: ComponentState


@dataclass(eq=False)
class _Track:
    number: int
    box: np.ndarray  # (4,) float64, xyxy in pixels
    last_ns: int
    # Stamps of the newest detections, as many as confirm.
    stamps_ns: deque[int]
    velocity: np.ndarray = field(default_factory=lambda: np.zeros(2))  # of the centre, px/s
    confirmed: bool = False

    def predict(self, stamp_ns: int) -> np.ndarray:
        shift = self.velocity * ((stamp_ns - self.last_ns) * 1e-9)
        return self.box + np.tile(shift, 2)

    def update(self, stamp_ns: int, box: np.ndarray) -> None:
        step_s = (stamp_ns - self.last_ns) * 1e-9
        if step_s > 0.0:
            low, high = np.split(box - self.predict(stamp_ns), 2)
            self.velocity += _VELOCITY_GAIN * (low + high) / 2 / max(step_s, _MIN_STEP_S)
        self.box, self.last_ns = box, stamp_ns


class ComponentTracker:
    """Confirms components that were detected in `count` frames within `window_s` seconds.

    A track stays confirmed until it was not detected for more than `silence_s` seconds. The state
    depends only on the stamps and boxes since the last reset: replaying them restores it.

    Args:
        count: frames in which a component must be detected, >= 1; 1 confirms at once.
        window_s: seconds within which these frames lie, by their stamps, > 0.
        silence_s: seconds without a detection after which a track is dropped, > 0.
    """

    def __init__(self, count: int, window_s: float, silence_s: float) -> None:
        self.count, self.window_s, self.silence_s = count, window_s, silence_s
        self.reset()

    def reset(self) -> None:
        """Drop all tracks; numbers start from 1 again."""
        self._tracks: list[_Track] = []
        self._next_number = 1
        self._last_ns: int | None = None

    def update(self, stamp_ns: int, boxes: np.ndarray) -> tuple[TrackState, ...]:
        """Return the track of each box of the next frame, in the order of the boxes.

        Args:
            stamp_ns: stamp of the frame; a jump back resets, a late or equal one is another frame,
                tracked as of the newest stamp (see `stamps`).
            boxes: (n, 4) float64 left, top, right, bottom in pixels; n may be 0.
        """
        if jumps_back(stamp_ns, self._last_ns):
            self.reset()
        own_ns, stamp_ns = stamp_ns, max(stamp_ns, self._last_ns or stamp_ns)
        self._last_ns = stamp_ns
        silence_ns, window_ns = round(self.silence_s * 1e9), round(self.window_s * 1e9)
        self._tracks = [t for t in self._tracks if stamp_ns - t.last_ns <= silence_ns]
        predicted = np.array([t.predict(stamp_ns) for t in self._tracks]).reshape(-1, 4)
        matches = _match(_iou(predicted, boxes))
        known, states = list(self._tracks), []
        for number, box in enumerate(boxes):
            if number in matches:
                track = known[matches[number]]
                track.update(stamp_ns, box)
            else:
                track = _Track(self._next_number, box, stamp_ns, deque(maxlen=self.count))
                self._tracks.append(track)
                self._next_number += 1
            track.stamps_ns.append(own_ns)
            in_window = max(track.stamps_ns) - min(track.stamps_ns) <= window_ns
            track.confirmed |= len(track.stamps_ns) == self.count and in_window
            state = ComponentState.CONFIRMED if track.confirmed else ComponentState.CANDIDATE
            states.append(TrackState(track.number, state))
        self._tracks.sort(key=lambda track: (track.confirmed, track.last_ns))
        del self._tracks[:-MAX_TRACKS]
        return tuple(states)


def _match(iou: np.ndarray) -> dict[int, int]:
    """Return the track (row) of each matched box (column): largest IoU first, each used once."""
    matches: dict[int, int] = {}
    for flat in np.argsort(-iou, axis=None, kind="stable").tolist():
        track, box = divmod(flat, iou.shape[1])
        if iou[track, box] < _MIN_IOU:
            break
        if box not in matches and track not in matches.values():
            matches[box] = track
    return matches


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return (n, m) intersection over union of (n, 4) and (m, 4) boxes."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.prod(np.maximum(high - low, 0.0), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (a, b)]
    return shared / (areas[0][:, None] + areas[1][None] - shared)


def follow(
    tracker: ComponentTracker, stamp_ns: int, localizations: Sequence[Localization]
) -> tuple[Localization, ...]:
    """Return the localizations of the next frame with their tracks and states.

    The tracker must have seen all earlier frames, those without localizations included.
    """
    boxes = np.array([item.box_xyxy for item in localizations], np.float64).reshape(-1, 4)
    tracks = tracker.update(stamp_ns, boxes)
    return tuple(
        replace(localization, state=state, track=track)
        for localization, (track, state) in zip(localizations, tracks, strict=True)
    )


def decide(localizations: Sequence[Localization], threshold: float | None) -> Decision:
    """Return `anomaly` if a localization is confirmed, `unknown` without a threshold."""
    if threshold is None:
        return Decision.UNKNOWN
    confirmed = any(item.state is ComponentState.CONFIRMED for item in localizations)
    return Decision.ANOMALY if confirmed else Decision.NOMINAL
