"""The publishers of one camera.

They are created and destroyed by the executor's thread. The worker publishes results, and the
executor's thread publishes that a camera is silent; both may publish at the same time.
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
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.ros import messages
from semantic_anomaly.structures import AnomalyResult, Decision, Frame

# Reliable publishers serve reliable and best-effort subscribers; with a queue of one they do not
# keep old pictures for slow subscribers.
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
        self._publishers: list[Any] = []
        self._score = self._publisher(Float32, "score", STATUS_QOS)
        self._status = self._publisher(DiagnosticArray, "status", STATUS_QOS)
        self._heatmap = self._publisher(Image, "heatmap", PICTURE_QOS)
        self._mask = self._publisher(Image, "mask", PICTURE_QOS)
        self._overlay = self._publisher(Image, "overlay", PICTURE_QOS)
        self._overlay_jpeg = self._publisher(CompressedImage, "overlay/compressed", PICTURE_QOS)
        self.markers = self._publisher(MarkerArray, "markers", PICTURE_QOS)
        detections = messages.detection_array_type()
        self._detections = (
            self._publisher(detections, "detections", STATUS_QOS) if detections else None
        )

    def _publisher(self, message_type: Any, topic: str, qos: QoSProfile) -> Any:
        name = f"~/{self.camera}/{topic}"
        self._publishers.append(self._node.create_lifecycle_publisher(message_type, name, qos))
        return self._publishers[-1]

    def destroy(self) -> None:
        """Destroy the publishers."""
        for publisher in self._publishers:
            if hasattr(self._node, "destroy_lifecycle_publisher"):
                self._node.destroy_lifecycle_publisher(publisher)
            else:
                # Older distributions keep a destroyed publisher among the managed entities.
                self._node._managed_entities.discard(publisher)
                self._node.destroy_publisher(publisher)

    @property
    def wants_markers(self) -> bool:
        """Return whether the markers have a subscriber."""
        return _has_subscriber(self.markers)

    def publish_result(
        self, header: Header, result: AnomalyResult, values: Mapping[str, Any]
    ) -> None:
        """Publish score, status with further values, and detections; the header is unchanged."""
        self._score.publish(messages.score_message(result.score))
        status = {
            "decision": result.decision.value,
            "score": result.score,
            "p_value": result.p_value,
            "threshold": result.threshold,
            "reason": result.reason,
            "coarse": result.coarse,
            "drift": result.drift,
            **{
                f"stage_{number}_deviation": value
                for number, value in enumerate(result.stage_scores.values())
            },
            **values,
            **{f"{stage}_ms": ms for stage, ms in result.stage_ms.items()},
            "localizations": messages.localizations_json(result.localizations),
        }
        text = result.reason or f"{result.decision.value}, score {result.score:.4f}"
        self._publish_status(header, _LEVELS[result.decision], text, status)
        if self._detections is not None:
            self._detections.publish(messages.detections_message(header, result.localizations))

    def publish_unknown(
        self, header: Header, level: bytes, reason: str, values: Mapping[str, Any]
    ) -> None:
        """Publish the decision `unknown` with its reason, without a score."""
        status = {"decision": Decision.UNKNOWN.value, "reason": reason, **values}
        self._publish_status(header, level, f"unknown: {reason}", status)
        if self.wants_markers:
            # Removes the markers of earlier frames.
            self.markers.publish(messages.marker_array(header, ()))

    def publish_pictures(
        self,
        header: Header,
        frame: Frame,
        result: AnomalyResult,
        roi: RegionOfInterest,
        overlay_alpha: float,
    ) -> None:
        """Publish the pictures that have a subscriber; the others are not drawn."""
        if _has_subscriber(self._heatmap):
            heat = result.scale.normalise(result.heatmap)
            self._heatmap.publish(messages.image_message(heat, "32FC1", header))
        if _has_subscriber(self._mask):
            labels = result.label_map.astype(np.uint16, copy=False)
            self._mask.publish(messages.image_message(labels, "mono16", header))
        raw, compressed = _has_subscriber(self._overlay), _has_subscriber(self._overlay_jpeg)
        if raw or compressed:
            overlay = draw_overlay(frame.image, result, roi, overlay_alpha)
        if raw:
            self._overlay.publish(messages.image_message(overlay, "rgb8", header))
        if compressed:
            self._overlay_jpeg.publish(messages.jpeg_message(overlay, header))

    def _publish_status(
        self, header: Header, level: bytes, text: str, values: Mapping[str, Any]
    ) -> None:
        name = f"{self._node.get_name()}: {self.camera}"
        status = messages.diagnostic_status(name, level, text, values)
        self._status.publish(DiagnosticArray(header=header, status=[status]))


def _has_subscriber(publisher: Any) -> bool:
    return publisher.get_subscription_count() > 0
