"""One camera of the node: its outputs from configure on, its inputs while active, its counters.

Made and changed by the executor's thread; the worker publishes through it and counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.lifecycle import LifecycleNode
from std_msgs.msg import Header

from semantic_anomaly.ros import messages
from semantic_anomaly.ros.inputs import CameraInputs
from semantic_anomaly.ros.logs import ThrottledLog
from semantic_anomaly.ros.outputs import CameraOutputs
from semantic_anomaly.ros.worker import CameraCounts, RateMeter
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame, PatchGrid

# A camera that stays silent is reported so often.
REPEAT_SILENCE_S = 1.0


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
        # Set by the worker: the last frame above the threshold, for people to call nominal.
        self.exceeding: tuple[Frame, PatchGrid] | None = None
        self.counts = CameraCounts()
        self._rate_in, self._rate_done = RateMeter(), RateMeter()
        self._put: Callable[[str, Any], bool] | None = None
        self._silent = False
        self._spoke_s = time.monotonic()
        self._waiting_since_s: float | None = None

    def activate(self, put: Callable[[str, Any], bool]) -> None:
        """Subscribe; `put` takes the camera's name and a message for the worker."""
        self.counts = CameraCounts()
        self._rate_in, self._rate_done = RateMeter(), RateMeter()
        self._put = put
        self._silent = False
        self._spoke_s = time.monotonic()
        self._waiting_since_s = None
        self.inputs = CameraInputs(
            self._node, self.name, self._settings, self._take, self._incompatible, self._log
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

    def answered(self) -> None:
        """Note that a status was published just now."""
        self._spoke_s = time.monotonic()
        self._waiting_since_s = None

    def unknown(self, header: Header, level: bytes, kind: str, reason: str) -> None:
        """Publish the status `unknown` with its reason; log the first of a kind, then now and then.

        Args:
            header: of the image that is not answered by a score, or the time now.
            level: STALE when there is nothing fresh, else ERROR.
            kind: names the reason's sort.
            reason: a sentence for people.
        """
        self.answered()
        self.outputs.publish_unknown(header, level, reason, self.frame_counts())
        self._log.error(f"{self.name} {kind}", f"camera '{self.name}': unknown: {reason}")

    def check_silence(self) -> None:
        """Publish `unknown` when nothing has been said for too long."""
        inputs = self.inputs
        if inputs is None:
            return
        now, limit_s = time.monotonic(), self._settings.silent_after_s
        was_silent, self._silent = self._silent, now - inputs.arrived_s > limit_s
        if was_silent and not self._silent:
            self._node.get_logger().info(f"camera '{self.name}': frames come again")
        waiting_since_s = self._waiting_since_s
        if self._silent:
            if not was_silent or now - self._spoke_s > REPEAT_SILENCE_S:
                self._report_now(DiagnosticStatus.STALE, "silent", inputs.silence())
        elif waiting_since_s is not None and now - waiting_since_s > limit_s:
            # The worker is stuck, or far too slow.
            reason = f"frames come, but none was answered for {now - waiting_since_s:.1f} s"
            self._report_now(DiagnosticStatus.ERROR, "unanswered", reason)

    def diagnostics(self, values: dict[str, Any]) -> DiagnosticArray:
        """Return rates, counters and what the node knows of the camera, for /diagnostics."""
        counts = self.counts
        rates = {
            "rate_in_hz": self._rate_in.rate_hz(counts.received),
            "rate_processed_hz": self._rate_done.rate_hz(counts.processed),
            "last_latency_ms": counts.last_latency_ms,
        }
        level, text = DiagnosticStatus.OK, "inactive"
        if self.inputs is not None:
            text = f"{rates['rate_processed_hz']:.1f} frames/s"
            if self._silent:
                level, text = DiagnosticStatus.ERROR, "no frames"
            elif rates["rate_in_hz"] and not rates["rate_processed_hz"]:
                level, text = DiagnosticStatus.WARN, "frames come, none is processed"
            elif values.get("calibration_renewal"):
                level, text = DiagnosticStatus.WARN, f"{text}; calibration due for renewal"
        name = f"{self._node.get_name()}: {self.name} camera"
        said = {**rates, **self.frame_counts(), **values}
        return messages.status_message(Header(), name, level, text, said)

    def _report_now(self, level: bytes, kind: str, reason: str) -> None:
        frame_id = self.inputs.frame_id if self.inputs is not None else ""
        header = Header(stamp=self._node.get_clock().now().to_msg(), frame_id=frame_id)
        self.unknown(header, level, kind, reason)

    def _take(self, message: Any) -> None:
        self.counts.received += 1
        if self._waiting_since_s is None:
            self._waiting_since_s = time.monotonic()
        if self._put is not None and self._put(self.name, message):
            self.counts.replaced += 1

    def _incompatible(self, sentence: str) -> None:
        self._report_now(DiagnosticStatus.ERROR, "incompatible", sentence)
