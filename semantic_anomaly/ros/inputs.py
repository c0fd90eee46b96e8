"""The subscriptions of one camera: images, and for markers CameraInfo and depth.

Callbacks run in the executor's thread and only store messages; the worker reads them.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_policy_name_from_kind
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CameraInfo, CompressedImage, Image

try:
    from rclpy.event_handler import SubscriptionEventCallbacks
except ImportError:  # Humble
    from rclpy.qos_event import SubscriptionEventCallbacks

from semantic_anomaly.detection.geometry import Intrinsics
from semantic_anomaly.errors import ImageError
from semantic_anomaly.ros import messages
from semantic_anomaly.ros.logs import ThrottledLog
from semantic_anomaly.settings import Settings
from semantic_anomaly.settings_schema import FOREIGN_PREFIXES

# Stamps of depth and image of one exposure differ by less, those of two frames by more.
DEPTH_TOLERANCE_NS = 50_000_000
LARGE_DATA_HINT = (
    "for images over 0.5 MB between processes set FASTDDS_BUILTIN_TRANSPORTS=LARGE_DATA"
)
_RELIABILITY = {
    "best_effort": ReliabilityPolicy.BEST_EFFORT,
    "reliable": ReliabilityPolicy.RELIABLE,
}
_RAW_TYPE = "sensor_msgs/msg/Image"
# Start of the reason in the status of a silent camera, and of no image.
SILENCE = "no frames for"


class CameraInputs:
    """The subscriptions of one camera, from activate to deactivate.

    Every image message goes to `on_image`, the description of a publisher with incompatible QoS to
    `on_incompatible`.
    """

    def __init__(
        self,
        node: Node,
        camera: str,
        settings: Settings,
        on_image: Callable[[Any], None],
        on_incompatible: Callable[[str], None],
        log: ThrottledLog,
    ) -> None:
        self._node = node
        self._settings = settings
        self._camera = camera
        self._log = log
        self._on_image = on_image
        self._on_incompatible = on_incompatible
        self._lock = threading.Lock()
        self._info: CameraInfo | None = None
        self._depths: deque[Image] = deque(maxlen=8)
        self._subscriptions: list[Any] = []
        self.arrived_s = time.monotonic()
        self.frame_id = ""
        self._images: Any = None

    def subscribe(self) -> None:
        """Create the subscriptions; `destroy` removes them, even if only some were created."""
        own = self._settings.camera_settings[self._camera]
        image_type = CompressedImage if own.transport == "compressed" else Image
        # Only the newest image is used.
        qos = QoSProfile(depth=1, reliability=_RELIABILITY[self._settings.qos_reliability])
        self._images = self._subscribe(image_type, own.image_topic, self._store_image, qos)
        best_effort = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
        if own.camera_info_topic:
            self._subscribe(CameraInfo, own.camera_info_topic, self._store_info, best_effort)
        if own.depth_topic:
            self._subscribe(Image, own.depth_topic, self._store_depth, best_effort)

    def destroy(self) -> None:
        """Destroy the subscriptions."""
        while self._subscriptions:
            self._node.destroy_subscription(self._subscriptions.pop())

    def intrinsics(self, image_hw: tuple[int, int]) -> Intrinsics:
        """Return the projection of images of a size: of the CameraInfo, or else an assumed lens."""
        with self._lock:
            info = self._info
        if info is not None:
            try:
                return messages.intrinsics_of(info).scaled_to(image_hw)
            except ImageError as error:
                self._log.warning(f"{self._camera} info", f"camera '{self._camera}': {error}")
        return Intrinsics.assumed(image_hw)

    def depth_at(self, stamp_ns: int) -> np.ndarray | None:
        """Return the depth image at a stamp as (h, w) float32 metres, None without one."""
        with self._lock:
            stored = list(self._depths)
        differences_ns = [abs(messages.stamp_ns(depth.header) - stamp_ns) for depth in stored]
        if min(differences_ns, default=math.inf) > DEPTH_TOLERANCE_NS:
            return None
        try:
            return messages.depth_of(stored[differences_ns.index(min(differences_ns))])
        except ImageError as error:
            self._log.warning(f"{self._camera} depth", f"camera '{self._camera}' depth: {error}")
            return None

    def silence(self) -> str:
        """Return how long there has been no image, with possible reasons."""
        silent_s = time.monotonic() - self.arrived_s
        # The full name after remapping.
        topic, expected = self._images.topic_name, self._images.msg_type.__name__
        publishers = self._node.get_publishers_info_by_topic(topic)
        types = sorted({info.topic_type for info in publishers})
        other = [name for name in types if not name.endswith(f"/{expected}")]
        hints = [f"publishers: {len(publishers)}"]
        if other:
            hints.append(f"expected {expected}, found {', '.join(other)}{self._way_out(other)}")
        elif publishers:
            hints += self._transport_hints()
        return f"{SILENCE} {silent_s:.1f} s on topic {topic} ({'; '.join(hints)})"

    def _way_out(self, types: Sequence[str]) -> str:
        """Return what to set when the topic has another type, empty if that is not known."""
        transport = self._settings.camera_settings[self._camera].transport
        if transport == "raw":
            compressed = any(name.endswith("/CompressedImage") for name in types)
            return f"; set {self._camera}.transport to compressed" if compressed else ""
        # image_transport is given the base topic, a subscription the full one.
        topic = f"{self._images.topic_name}/compressed"
        if self._node.get_publishers_info_by_topic(topic):
            return f"; {topic} exists: set {self._camera}.image_topic to it"
        return f"; set {self._camera}.transport to raw" if _RAW_TYPE in types else ""

    def _transport_hints(self) -> list[str]:
        """Return what may help when images of the right type do not arrive and is not in force."""
        reliability = self._settings.qos_reliability
        hints = [f"incompatible QoS? this side: {reliability}"]
        if reliability != "reliable":
            hints.append("qos_reliability: reliable helps if large images are lost")
        if os.environ.get("FASTDDS_BUILTIN_TRANSPORTS") != "LARGE_DATA":
            hints.append(LARGE_DATA_HINT)
        return hints

    def _subscribe(self, message_type: Any, topic: str, store: Any, qos: QoSProfile) -> Any:
        def report_incompatible(event: Any) -> None:
            if not event.total_count_change:
                return
            name = subscription.topic_name
            policy = qos_policy_name_from_kind(event.last_policy_kind)
            publishers = self._node.get_publishers_info_by_topic(name)
            names = sorted({f"{p.node_namespace.rstrip('/')}/{p.node_name}" for p in publishers})
            self._on_incompatible(
                f"topic {name}: a publisher has incompatible QoS ({policy}), its messages do not "
                f"arrive; publishers: {', '.join(names) or 'gone'}; see parameter 'qos_reliability'"
            )

        events = SubscriptionEventCallbacks(incompatible_qos=self._log.guarded(report_incompatible))
        given = self._node._parameter_overrides
        overridden = any(name.startswith(FOREIGN_PREFIXES) for name in given)
        subscription = self._node.create_subscription(
            message_type,
            topic,
            self._log.guarded(store),
            qos,
            event_callbacks=events,
            # Declares parameters that would outlast a change of qos_reliability.
            qos_overriding_options=(
                QoSOverridingOptions.with_default_policies() if overridden else None
            ),
        )
        self._subscriptions.append(subscription)
        return subscription

    def _store_image(self, message: Any) -> None:
        self.arrived_s = time.monotonic()
        self.frame_id = message.header.frame_id
        self._on_image(message)

    def _store_info(self, message: CameraInfo) -> None:
        with self._lock:
            self._info = message

    def _store_depth(self, message: Image) -> None:
        with self._lock:
            self._depths.append(message)
