"""What arrives for one camera: images, and for markers CameraInfo and depth.

Callbacks run in the executor's thread and only store; the worker reads what was stored.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_policy_name_from_kind
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

# Depth and image of one exposure differ by less; frames of a camera lie further apart.
DEPTH_TOLERANCE_NS = 50_000_000
LARGE_DATA_HINT = (
    "for images over 0.5 MB between processes set FASTDDS_BUILTIN_TRANSPORTS=LARGE_DATA"
)
_RELIABILITY = {
    "best_effort": ReliabilityPolicy.BEST_EFFORT,
    "reliable": ReliabilityPolicy.RELIABLE,
}


# Begins the reason of what is said of a silent camera, and of no image.
SILENCE = "no frames for"


class CameraInputs:
    """The subscriptions of one camera, from activate to deactivate.

    Args:
        node: owns the subscriptions.
        camera: the camera's name.
        settings: topics and quality of service.
        on_image: takes every image message.
        on_incompatible: takes a sentence when a publisher can never be heard.
        log: guards the callbacks.
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
        self._made: list[Any] = []
        self.arrived_s = time.monotonic()
        self.frame_id = ""
        self._images: Any = None

    def subscribe(self) -> None:
        """Make the subscriptions; `destroy` undoes as many as were made."""
        settings, own = self._settings, self._settings.camera_settings[self._camera]
        kind = CompressedImage if own.transport == "compressed" else Image
        qos = QoSProfile(
            depth=settings.qos_depth, reliability=_RELIABILITY[settings.qos_reliability]
        )
        self._images = self._subscribe(kind, own.image_topic, self._store_image, qos)
        best_effort = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
        if own.camera_info_topic:
            self._subscribe(CameraInfo, own.camera_info_topic, self._store_info, best_effort)
        if own.depth_topic:
            self._subscribe(Image, own.depth_topic, self._store_depth, best_effort)

    @property
    def topic(self) -> str:
        """Return the full name of the image topic, remappings applied."""
        return self._images.topic_name

    def destroy(self) -> None:
        """Destroy the subscriptions."""
        while self._made:
            self._node.destroy_subscription(self._made.pop())

    def intrinsics(self, image_hw: tuple[int, int]) -> Intrinsics:
        """Return the projection of images of a size: CameraInfo's, else an assumed lens."""
        with self._lock:
            info = self._info
        if info is not None:
            try:
                return messages.intrinsics_of(info).scaled_to(image_hw)
            except ImageError as error:
                self._log.warning(f"{self._camera} info", f"camera '{self._camera}': {error}")
        return Intrinsics.assumed(image_hw)

    def depth_at(self, stamp_ns: int) -> np.ndarray | None:
        """Return (h, w) float32 metres of the exposure at a stamp, None without one."""
        with self._lock:
            stored = list(self._depths)
        if not stored:
            return None
        nearest = min(stored, key=lambda m: abs(messages.stamp_ns(m.header) - stamp_ns))
        if abs(messages.stamp_ns(nearest.header) - stamp_ns) > DEPTH_TOLERANCE_NS:
            return None
        try:
            return messages.depth_of(nearest)
        except ImageError as error:
            self._log.warning(f"{self._camera} depth", f"camera '{self._camera}' depth: {error}")
            return None

    def silence(self) -> str:
        """Return a sentence on how long no image has come, and what may be the reason."""
        silent_s = time.monotonic() - self.arrived_s
        wanted = self._images.msg_type.__name__
        found = self._node.get_publishers_info_by_topic(self.topic)
        types = sorted({info.topic_type for info in found})
        other = [name for name in types if not name.endswith(f"/{wanted}")]
        hints = [f"publishers: {len(found)}"]
        if other:
            hints.append(f"expected {wanted}, found {', '.join(other)}")
        if found:
            hints += [
                f"incompatible QoS? this side: {self._settings.qos_reliability}",
                LARGE_DATA_HINT,
            ]
        return f"{SILENCE} {silent_s:.1f} s on topic {self.topic} ({'; '.join(hints)})"

    def _subscribe(self, kind: Any, topic: str, store: Any, qos: QoSProfile) -> Any:
        def incompatible(event: Any) -> None:
            self._report_incompatible(made, event)

        events = SubscriptionEventCallbacks(incompatible_qos=self._log.guarded(incompatible))
        made = self._node.create_subscription(
            kind, topic, self._log.guarded(store), qos, event_callbacks=events
        )
        self._made.append(made)
        return made

    def _report_incompatible(self, subscription: Any, event: Any) -> None:
        if not event.total_count_change:
            return
        policy = qos_policy_name_from_kind(event.last_policy_kind)
        publishers = self._node.get_publishers_info_by_topic(subscription.topic_name)
        names = sorted({f"{p.node_namespace.rstrip('/')}/{p.node_name}" for p in publishers})
        self._on_incompatible(
            f"topic {subscription.topic_name}: publisher with incompatible QoS ({policy}), no "
            f"messages come from it; publishers: {', '.join(names) or 'gone'}; "
            "see parameter 'qos_reliability'"
        )

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
