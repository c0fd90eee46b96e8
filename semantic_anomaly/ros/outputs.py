"""What the node publishes for one camera.

Publishers are made and destroyed by the executor's thread. The worker publishes results, the
executor's thread publishes what only a clock can know (a silent camera); both may at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.lifecycle import LifecycleNode
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Float32, Header
from visualization_msgs.msg import MarkerArray

from semantic_anomaly.detection.rendering import draw_overlay
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.ros import messages
from semantic_anomaly.ros.detections import detection_array_type, detections_message
from semantic_anomaly.ros.markers import marker_array
from semantic_anomaly.structures import AnomalyResult, Decision, Frame

# Reliable publishers serve reliable and best-effort subscribers alike; with a queue of one they
# keep no old pictures for slow ones.
STATUS_QOS = QoSProfile(depth=10, reliability=ReliabilityPolicy.RELIABLE)
PICTURE_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)

_LEVELS = {
    Decision.NOMINAL: DiagnosticStatus.OK,
    Decision.ANOMALY: DiagnosticStatus.WARN,
    Decision.UNKNOWN: DiagnosticStatus.ERROR,
}


class CameraOutputs:
    """The publishers of one camera, under `~/<camera>/`."""

    def __init__(self, node: LifecycleNode, camera: str) -> None:
        self._node = node
        self.camera = camera
        self._made: list[Any] = []
        self._score = self._publisher(Float32, "score", STATUS_QOS)
        self._status = self._publisher(DiagnosticArray, "status", STATUS_QOS)
        self._heatmap = self._publisher(Image, "heatmap", PICTURE_QOS)
        self._mask = self._publisher(Image, "mask", PICTURE_QOS)
        self._overlay = self._publisher(Image, "overlay", PICTURE_QOS)
        self._overlay_jpeg = self._publisher(CompressedImage, "overlay/compressed", PICTURE_QOS)
        self._markers = self._publisher(MarkerArray, "markers", PICTURE_QOS)
        kind = detection_array_type()
        self._detections = self._publisher(kind, "detections", STATUS_QOS) if kind else None

    def _publisher(self, kind: Any, topic: str, qos: QoSProfile) -> Any:
        made = self._node.create_lifecycle_publisher(kind, f"~/{self.camera}/{topic}", qos)
        self._made.append(made)
        return made

    def destroy(self) -> None:
        """Destroy the publishers."""
        while self._made:
            made = self._made.pop()
            if hasattr(self._node, "destroy_lifecycle_publisher"):
                self._node.destroy_lifecycle_publisher(made)
            else:
                # Older distributions would keep the dead publisher among the managed entities.
                self._node._managed_entities.discard(made)
                self._node.destroy_publisher(made)

    @property
    def wants_markers(self) -> bool:
        """Return whether somebody listens to the markers."""
        return _heard(self._markers)

    def publish_markers(self, array: MarkerArray) -> None:
        """Publish markers."""
        self._markers.publish(array)

    def publish_result(
        self, header: Header, result: AnomalyResult, values: Mapping[str, Any]
    ) -> None:
        """Publish score, status and detections of a frame that was computed.

        Args:
            header: the input's, used verbatim.
            result: what the detector states.
            values: more for the status, such as latency and counters.
        """
        self._score.publish(messages.score_message(result.score))
        said = {
            "decision": result.decision.value,
            "score": result.score,
            "p_value": result.p_value,
            "threshold": result.threshold,
            "reason": result.reason,
            "note": result.note or None,
            **{f"{branch}_deviation": value for branch, value in result.parts.items()},
            **values,
            **{f"{stage}_ms": ms for stage, ms in result.stage_ms.items()},
            "localizations": messages.localizations_json(result.localizations),
        }
        text = result.reason or f"{result.decision.value}, score {result.score:.4f}"
        text += f"; {result.note}" if result.note else ""
        self._publish_status(header, _LEVELS[result.decision], text, said)
        if self._detections is not None:
            self._detections.publish(detections_message(header, result.localizations))

    def publish_unknown(
        self, header: Header, level: bytes, reason: str, values: Mapping[str, Any]
    ) -> None:
        """Publish that nothing is known, and why; no score goes with it."""
        said = {"decision": Decision.UNKNOWN.value, "reason": reason, **values}
        self._publish_status(header, level, f"unknown: {reason}", said)
        if self.wants_markers:
            # What was seen before does not hold any more.
            self._markers.publish(marker_array(header, ()))

    def publish_pictures(
        self,
        header: Header,
        frame: Frame,
        result: AnomalyResult,
        region: ImageRegion,
        overlay_alpha: float,
    ) -> None:
        """Publish the pictures that somebody listens to; the others are not even drawn."""
        if _heard(self._heatmap):
            heat = result.scale.normalise(result.heatmap)
            self._heatmap.publish(messages.image_message(heat, "32FC1", header))
        if _heard(self._mask):
            ids = result.label_map.astype(np.uint16, copy=False)
            self._mask.publish(messages.image_message(ids, "mono16", header))
        raw, compressed = _heard(self._overlay), _heard(self._overlay_jpeg)
        if not (raw or compressed):
            return
        overlay = draw_overlay(frame.image, result, region, overlay_alpha)
        if raw:
            self._overlay.publish(messages.image_message(overlay, "rgb8", header))
        if compressed:
            self._overlay_jpeg.publish(messages.jpeg_message(overlay, header))

    def _publish_status(
        self, header: Header, level: bytes, text: str, values: Mapping[str, Any]
    ) -> None:
        name = f"{self._node.get_name()}: {self.camera}"
        self._status.publish(messages.status_message(header, name, level, text, values))


def _heard(publisher: Any) -> bool:
    return publisher.get_subscription_count() > 0
