"""Confirmation over time: single anomalous frames are not yet an anomaly."""

from __future__ import annotations

from collections import deque

from semantic_anomaly.errors import SettingsError


class FrameConfirmation:
    """Confirms an anomalous frame when `count` of the last `window` frames were anomalous.

    A frame that is not anomalous by itself is never confirmed, so confirmation only ever lowers
    the false-alarm rate that was calibrated for single frames.

    Raises:
        SettingsError: not 1 <= count <= window.
    """

    def __init__(self, count: int, window: int) -> None:
        if not 1 <= count <= window:
            raise SettingsError(
                f"confirmation: expected 1 <= count <= window, found {count} of {window}"
            )
        self.count = count
        self.window = window
        self._recent: deque[bool] = deque(maxlen=window)
        self._last_ns: int | None = None

    def update(self, stamp_ns: int, anomalous: bool) -> bool:
        """Take the next frame and return whether it is anomalous and confirmed.

        Args:
            stamp_ns: its stamp; one before the last frame's (a restarted bag or simulation)
                clears what was remembered.
            anomalous: whether its score exceeds the threshold.
        """
        if self._last_ns is not None and stamp_ns < self._last_ns:
            self.reset()
        self._last_ns = stamp_ns
        self._recent.append(anomalous)
        return anomalous and sum(self._recent) >= self.count

    def reset(self) -> None:
        """Forget all frames."""
        self._recent.clear()
        self._last_ns = None
