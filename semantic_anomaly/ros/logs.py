"""Log lines of the node: throttled, forwarded from the package, and one for each alarm.

Any thread may log.
"""

from __future__ import annotations

import functools
import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from semantic_anomaly.stamps import jumps_back
from semantic_anomaly.structures import AnomalyResult, ComponentState, Decision

REPEAT_AFTER_S = 5.0


class ThrottledLog:
    """Logs at most one line about a subject within `REPEAT_AFTER_S` seconds."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._last: dict[str, float] = {}

    def error(self, subject: str, text: str) -> None:
        """Log an error unless the subject was logged just now."""
        if self._due(subject):
            self._logger.error(text)

    def warning(self, subject: str, text: str) -> None:
        """Log a warning unless the subject was logged just now."""
        if self._due(subject):
            self._logger.warning(text)

    def _due(self, subject: str) -> bool:
        now = time.monotonic()
        if now - self._last.get(subject, float("-inf")) < REPEAT_AFTER_S:
            return False
        self._last[subject] = now
        return True

    def guarded(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """Return a callback that logs exceptions instead of raising them, which would end spin."""

        @functools.wraps(callback)
        def guard(*args: Any) -> Any:
            try:
                return callback(*args)
            except Exception:
                name = getattr(callback, "__name__", "callback")
                self.error(f"callback {name}", f"{name} failed:\n{traceback.format_exc()}")
                return None

        return guard


class RosLogHandler(logging.Handler):
    """Forwards log records of the package to the logger of the node, and so to /rosout."""

    def __init__(self, logger: Any) -> None:
        super().__init__(logging.INFO)
        self._ros_logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record at its own severity."""
        text = record.getMessage()
        # rclpy allows one severity for each calling line.
        if record.levelno >= logging.ERROR:
            self._ros_logger.error(text)
        elif record.levelno >= logging.WARNING:
            self._ros_logger.warning(text)
        else:
            self._ros_logger.info(text)


@dataclass
class _Alarm:
    track: int
    begin_ns: int
    last_ns: int
    peak_score: float
    frames: int = 1


class AlarmLog:
    """Logs the start and the end of each alarm of a camera.

    An alarm starts with the decision `anomaly` and ends after `silence_s` seconds without it, by
    the stamps of the frames.
    """

    def __init__(self, logger: Any, camera: str) -> None:
        self._logger = logger
        self._camera = camera
        self._alarm: _Alarm | None = None

    def update(self, stamp_ns: int, result: AnomalyResult, silence_s: float) -> None:
        """Take stamp and result of the next frame, and the setting `silence_s` of the camera."""
        alarm = self._alarm
        if alarm is not None and (
            stamp_ns - alarm.last_ns > silence_s * 1e9 or jumps_back(stamp_ns, alarm.last_ns)
        ):
            self.end()
            alarm = None
        if result.decision is not Decision.ANOMALY:
            return
        if alarm is None:
            confirmed = (
                item for item in result.localizations if item.state is ComponentState.CONFIRMED
            )
            # The largest score comes first.
            worst = next(confirmed)
            left, top, right, bottom = worst.box_xyxy
            self._alarm = _Alarm(worst.track, stamp_ns, stamp_ns, result.score)
            self._logger.warning(
                f"camera '{self._camera}': alarm starts: track {worst.track}, score "
                f"{result.score:.4f} (threshold {result.threshold:.4f}), box x {left:.0f} to "
                f"{right:.0f}, y {top:.0f} to {bottom:.0f} px"
            )
        else:
            alarm.last_ns = max(alarm.last_ns, stamp_ns)
            alarm.peak_score = max(alarm.peak_score, result.score)
            alarm.frames += 1

    def end(self) -> None:
        """End the alarm, if there is one."""
        alarm, self._alarm = self._alarm, None
        if alarm is not None:
            self._logger.info(
                f"camera '{self._camera}': alarm ends: track {alarm.track}, duration "
                f"{(alarm.last_ns - alarm.begin_ns) / 1e9:.1f} s, {alarm.frames} frames, largest "
                f"score {alarm.peak_score:.4f}"
            )
