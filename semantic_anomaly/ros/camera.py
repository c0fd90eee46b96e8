"""One camera of the node: outputs from configure on, inputs while active, counters.

Created and changed by the executor's thread; the worker publishes through it. `received` and
`replaced` are counted by the executor's thread, the other counters by the worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.lifecycle import LifecycleNode
from std_msgs.msg import Header

from semantic_anomaly.ros import messages
from semantic_anomaly.ros.inputs import CameraInputs
from semantic_anomaly.ros.logs import AlarmLog, ThrottledLog
from semantic_anomaly.ros.outputs import CameraOutputs
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame, PatchGrid

# Period of the status of a silent camera.
REPEAT_SILENCE_S = 1.0


@dataclass
class CameraCounts:
    """Images of a camera since activation, by what happened to them."""

    received: int = 0
    replaced: int = 0
    processed: int = 0
    dropped_stale: int = 0
    bad_images: int = 0
    failed: int = 0
    last_latency_ms: float | None = None


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
        self._start_counting()
        self._put: Callable[[str, Any], bool] | None = None

    def _start_counting(self) -> None:
        self.counts = CameraCounts()
        self._rate_in, self._rate_processed = RateMeter(), RateMeter()
        self._silent = False
        self._published_s = time.monotonic()
        self._waiting_since_s: float | None = None

    def activate(self, put: Callable[[str, Any], bool]) -> None:
        """Subscribe; `put` takes the name of the camera and a message for the worker."""
        self._start_counting()
        self._put = put
        self.inputs = CameraInputs(
            self._node,
            self.name,
            self._settings,
            self._receive,
            self._report_incompatible,
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

    def frame_counts(self) -> dict[str, int]:
        """Return the counters for the status."""
        counts = self.counts
        return {
            "frames_received": counts.received,
            "frames_processed": counts.processed,
            "frames_dropped_stale": counts.dropped_stale,
            "frames_replaced": counts.replaced,
            "frames_bad": counts.bad_images,
            "frames_failed": counts.failed,
        }

    def note_published(self) -> None:
        """Note that a status was published just now."""
        self._published_s = time.monotonic()
        self._waiting_since_s = None

    def publish_unknown(self, header: Header, level: bytes, kind: str, reason: str) -> None:
        """Publish the decision `unknown` with its reason; log it, throttled by kind.

        Args:
            header: of the image without a score, or the present time.
            level: STALE if there is no fresh image, else ERROR.
            kind: kind of the reason.
            reason: for users.
        """
        self.note_published()
        self.outputs.publish_unknown(header, level, reason, self.frame_counts())
        self._log.error(f"{self.name} {kind}", f"camera '{self.name}': unknown: {reason}")

    def check_silence(self) -> None:
        """Publish `unknown` if there were no images, or no results, for `silent_after_s`."""
        inputs = self.inputs
        if inputs is None:
            return
        now, limit_s = time.monotonic(), self._settings.silent_after_s
        was_silent, self._silent = self._silent, now - inputs.arrived_s > limit_s
        if was_silent and not self._silent:
            self._node.get_logger().info(f"camera '{self.name}': receives frames again")
        waiting_since_s = self._waiting_since_s
        if self._silent:
            self.alarms.end()
            if not was_silent or now - self._published_s > REPEAT_SILENCE_S:
                self._publish_unknown_now(DiagnosticStatus.STALE, "silent", inputs.silence())
        elif waiting_since_s is not None and now - waiting_since_s > limit_s:
            # The worker hangs, or is much too slow.
            reason = f"frames arrive, but there was no result for {now - waiting_since_s:.1f} s"
            self._publish_unknown_now(DiagnosticStatus.ERROR, "no result", reason)

    def diagnostics(self, values: dict[str, Any]) -> DiagnosticArray:
        """Return rates, counters and further values for /diagnostics."""
        counts = self.counts
        rates = {
            "rate_in_hz": self._rate_in.rate_hz(counts.received),
            "rate_processed_hz": self._rate_processed.rate_hz(counts.processed),
            "last_latency_ms": counts.last_latency_ms,
        }
        level, text = DiagnosticStatus.OK, "inactive"
        if self.inputs is not None:
            text = f"{rates['rate_processed_hz']:.1f} frames/s"
            if self._silent:
                level, text = DiagnosticStatus.ERROR, "no frames"
            elif rates["rate_in_hz"] and not rates["rate_processed_hz"]:
                level, text = DiagnosticStatus.WARN, "frames arrive, but none is processed"
            elif values.get("stale_calibration"):
                level, text = DiagnosticStatus.WARN, f"{text}; stale calibration"
        name = f"{self._node.get_name()}: {self.name} camera"
        values = {**rates, **self.frame_counts(), **values}
        return messages.status_message(Header(), name, level, text, values)

    def _publish_unknown_now(self, level: bytes, kind: str, reason: str) -> None:
        frame_id = self.inputs.frame_id if self.inputs is not None else ""
        header = Header(stamp=self._node.get_clock().now().to_msg(), frame_id=frame_id)
        self.publish_unknown(header, level, kind, reason)

    def _receive(self, message: Any) -> None:
        self.counts.received += 1
        if self._waiting_since_s is None:
            self._waiting_since_s = time.monotonic()
        if self._put is not None and self._put(self.name, message):
            self.counts.replaced += 1

    def _report_incompatible(self, text: str) -> None:
        self._publish_unknown_now(DiagnosticStatus.ERROR, "incompatible", text)
