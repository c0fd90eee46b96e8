"""One camera of the node: outputs from configure on, inputs while active, counters.

Created and changed by the executor's thread; the worker publishes through it. Frames received and
replaced are counted by the executor's thread, the others by the worker.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.lifecycle import LifecycleNode
from std_msgs.msg import Header

from semantic_anomaly.io.remarks import Remarks
from semantic_anomaly.ros import messages
from semantic_anomaly.ros.inputs import CameraInputs
from semantic_anomaly.ros.logs import AlarmLog, ThrottledLog
from semantic_anomaly.ros.outputs import CameraOutputs
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Decision, Frame, PatchGrid

# Period of the status of a camera without images or results.
REPEAT_SILENCE_S = 1.0
# Period of `Camera.check`.
CHECK_PERIOD_S = 0.05
# Time from the stamp of an image to its status, beside the processing stages.
LATENCY = "latency"
# Diagnostics describe so many seconds, and so many frames of them.
_RECENT_S, _MOST_RECENT = 10.0, 1000


@dataclass
class CameraCounts:
    """Images of a camera since activation, by what happened to them; the names are published."""

    frames_received: int = 0
    frames_processed: int = 0
    frames_dropped_stale: int = 0
    frames_late: int = 0
    frames_replaced: int = 0
    frames_bad: int = 0
    frames_blind: int = 0
    frames_failed: int = 0


class RateMeter:
    """Frequency of a counter between two readings."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None

    def rate_hz(self, count: int) -> float:
        """Return the increments of the counter per second since the last call, 0 at first."""
        now = time.monotonic()
        last, self._last = self._last, (now, count)
        if last is None or now <= last[0] or count < last[1]:
            return 0.0
        return (count - last[1]) / (now - last[0])


class RecentTimes:
    """Milliseconds by stage of the frames of the last seconds; written and read by two threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._frames: deque[tuple[float, dict[str, float]]] = deque(maxlen=_MOST_RECENT)

    def add(self, times_ms: Mapping[str, float | None]) -> None:
        """Add the times of a frame; None: not known."""
        known = {stage: ms for stage, ms in times_ms.items() if ms is not None}
        with self._lock:
            self._frames.append((time.monotonic(), known))

    def summary(self) -> dict[str, float]:
        """Return median and 95th percentile by stage, as `<stage>_p50_ms` and `<stage>_p95_ms`."""
        since_s = time.monotonic() - _RECENT_S
        with self._lock:
            frames = [times_ms for added_s, times_ms in self._frames if added_s >= since_s]
        summary = {}
        for stage in dict.fromkeys(stage for times_ms in frames for stage in times_ms):
            of_stage = [times_ms[stage] for times_ms in frames if stage in times_ms]
            for percent in (50, 95):
                summary[f"{stage}_p{percent}_ms"] = float(np.percentile(of_stage, percent))
        return summary


class Camera:
    """Publishers, subscriptions and counters of one camera."""

    def __init__(
        self, node: LifecycleNode, name: str, settings: Settings, log: ThrottledLog
    ) -> None:
        self._node = node
        self._settings = settings
        self._log = log
        self.name = name
        self.outputs = CameraOutputs(node, name)
        self.inputs: CameraInputs | None = None
        self.alarms = AlarmLog(node.get_logger(), name)
        # Set by the worker: the last frame above the threshold, for the service ~/add_nominal.
        self.exceeding: tuple[Frame, PatchGrid] | None = None
        # Of what both threads change.
        self._lock = threading.Lock()
        self._start_counting()
        self._put: Callable[[str, Any], bool] | None = None

    def _start_counting(self) -> None:
        logger = self._node.get_logger()
        self.remarks = Remarks(lambda text: logger.warning(f"camera '{self.name}': {text}"))
        self.counts = CameraCounts()
        self.times = RecentTimes()
        self._rate_in, self._rate_processed = RateMeter(), RateMeter()
        self._silent = False
        self._published_s = time.monotonic()
        self._last_decision, self._last_reason = "", ""
        # Frames without a status, and since when the worker has made none for them.
        self._pending = 0
        self._waiting_since_s = 0.0
        self._worker_problem = ""

    def activate(self, put: Callable[[str, Any], bool]) -> None:
        """Subscribe; `put` takes the name of the camera and a message for the worker."""
        self._start_counting()
        self._put = put
        self.inputs = CameraInputs(
            self._node,
            self.name,
            self._settings,
            self._receive,
            partial(self._publish_unknown_now, DiagnosticStatus.ERROR, "incompatible"),
            self._log,
        )
        self.inputs.subscribe()

    def deactivate(self) -> None:
        """Unsubscribe."""
        if self.inputs is not None:
            self.inputs.destroy()
        self.inputs = None
        self.exceeding = None

    def destroy(self) -> None:
        """Unsubscribe and destroy the publishers."""
        self.deactivate()
        self.outputs.destroy()

    def note_published(self, decision: Decision, reason: str) -> None:
        """Note that the status of a frame was published just now."""
        with self._lock:
            self._note(decision, reason)
            self._pending = max(0, self._pending - 1)
            self._waiting_since_s = self._published_s
            self._worker_problem = ""

    def _note(self, decision: Decision, reason: str) -> None:
        self._published_s = time.monotonic()
        self._last_decision, self._last_reason = decision.value, reason

    def publish_unknown(self, header: Header, level: bytes, kind: str, reason: str) -> None:
        """Publish the decision `unknown` for a frame with its reason; log it, throttled by kind.

        The level is STALE if there is no fresh image, else ERROR.
        """
        self.note_published(Decision.UNKNOWN, reason)
        self._publish_unknown(header, level, kind, reason)

    def _publish_unknown(self, header: Header, level: bytes, kind: str, reason: str) -> None:
        self.outputs.publish_unknown(header, level, reason, asdict(self.counts))
        self._log.error(f"{self.name} {kind}", f"camera '{self.name}': unknown: {reason}")

    def report_lost(self, header: Header, reason: str) -> None:
        """Publish `unknown` for a frame that the worker had when it ended."""
        self.counts.frames_failed += 1
        self.publish_unknown(header, DiagnosticStatus.ERROR, "worker", reason)
        with self._lock:
            self._worker_problem = reason

    def check(self, max_age_s: float) -> None:
        """Publish `unknown` if there are no images or no results; repeat it every second.

        By the steady clock. Images are missed after `silent_after_s`, results after `max_age_s`.
        Simulated time may be slower than the worker: then results too after `silent_after_s`.

        Args:
            max_age_s: setting of the camera in force.
        """
        inputs = self.inputs
        if inputs is None:
            return
        now, silent_after_s = time.monotonic(), self._settings.silent_after_s
        was_silent, self._silent = self._silent, now - inputs.arrived_s > silent_after_s
        if was_silent and not self._silent:
            self._node.get_logger().info(f"camera '{self.name}': receives frames again")
        if self._silent:
            self.alarms.end()
            if not was_silent or now - self._published_s > REPEAT_SILENCE_S:
                self._publish_unknown_now(DiagnosticStatus.STALE, "silent", inputs.silence())
            return
        if self._node.get_parameter("use_sim_time").value:
            max_age_s = max(max_age_s, silent_after_s)
        # Earlier by the time until the next check.
        limit_s = max(max_age_s - CHECK_PERIOD_S, max_age_s / 2)
        with self._lock:
            waited_s = now - self._waiting_since_s
            if not self._pending or waited_s <= limit_s:
                return
            was_late = bool(self._worker_problem)
            reason = (
                f"frames arrive, but there was no result for {waited_s:.1f} s: the worker hangs or "
                "is too slow"
            )
            self._worker_problem = reason
        if not was_late or now - self._published_s > REPEAT_SILENCE_S:
            self._publish_unknown_now(DiagnosticStatus.ERROR, "no result", reason)

    def diagnostics(self, values: dict[str, Any]) -> DiagnosticStatus:
        """Return rates, counters and further values for /diagnostics."""
        rates = {
            "rate_in_hz": self._rate_in.rate_hz(self.counts.frames_received),
            "rate_processed_hz": self._rate_processed.rate_hz(self.counts.frames_processed),
        }
        level, text = DiagnosticStatus.OK, "inactive"
        if self.inputs is not None:
            text = f"{rates['rate_processed_hz']:.1f} frames/s"
            if self._silent:
                level, text = DiagnosticStatus.ERROR, "no frames"
            elif self._worker_problem:
                level, text = DiagnosticStatus.ERROR, f"unknown: {self._worker_problem}"
            elif self._last_decision == Decision.UNKNOWN.value:
                level, text = DiagnosticStatus.WARN, f"unknown: {self._last_reason}"
            elif rates["rate_in_hz"] and not rates["rate_processed_hz"]:
                level, text = DiagnosticStatus.WARN, "frames arrive, but none is processed"
            elif values.get("drift"):
                level, text = DiagnosticStatus.WARN, f"{text}; drift: recalibrate"
            elif values.get("stale_calibration"):
                level, text = DiagnosticStatus.WARN, f"{text}; stale calibration"
        name = f"{self._node.get_name()}: {self.name} camera"
        last: dict[str, Any] = {}
        if self._last_decision:
            last = {
                "last_decision": self._last_decision,
                "last_reason": self._last_reason or None,
                "last_status_age_s": time.monotonic() - self._published_s,
            }
        values = {**rates, **last, **self.times.summary(), **asdict(self.counts), **values}
        return messages.diagnostic_status(name, level, text, values)

    def _publish_unknown_now(self, level: bytes, kind: str, reason: str) -> None:
        frame_id = self.inputs.frame_id if self.inputs is not None else ""
        header = Header(stamp=self._node.get_clock().now().to_msg(), frame_id=frame_id)
        # It answers no frame.
        self._note(Decision.UNKNOWN, reason)
        self._publish_unknown(header, level, kind, reason)

    def _receive(self, message: Any) -> None:
        self.counts.frames_received += 1
        with self._lock:
            if not self._pending:
                self._waiting_since_s = time.monotonic()
            self._pending += 1
        if self._put is not None and self._put(self.name, message):
            self.counts.frames_replaced += 1
            with self._lock:
                self._pending = max(0, self._pending - 1)
