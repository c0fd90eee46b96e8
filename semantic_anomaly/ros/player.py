"""Play the frames of a folder, video or bag to a camera topic and record the results of the node.

It is a process of its own, so all messages cross DDS. One thread: callbacks only store messages,
`play` publishes and waits.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Float32
from tqdm import tqdm

from semantic_anomaly.errors import InputError, SemanticAnomalyError
from semantic_anomaly.io.images import encode_jpeg
from semantic_anomaly.io.open import open_source
from semantic_anomaly.ros.messages import image_message, stamp_ns
from semantic_anomaly.storage import atomic_write_bytes, forbid_writing_by_all, refuse_unwritable
from semantic_anomaly.structures import Frame

_RELIABLE = QoSProfile(depth=20, reliability=ReliabilityPolicy.RELIABLE)


class SourcePlayer(Node):
    """Publishes frames with present stamps, configures the node, and collects its outputs."""

    def __init__(
        self, node_name: str, camera: str, image_topic: str, compressed: bool, overlays: bool
    ) -> None:
        super().__init__("source_player")
        self.target = node_name
        image_type = CompressedImage if compressed else Image
        self._compressed = compressed
        self._images = self.create_publisher(image_type, image_topic, _RELIABLE)
        # Latency and status of each answered frame by its stamp.
        self.statuses: dict[int, dict[str, Any]] = {}
        self.scores = 0
        self.overlays: dict[int, bytes] = {}
        base = f"{node_name}/{camera}"
        self.create_subscription(DiagnosticArray, f"{base}/status", self._on_status, _RELIABLE)
        self.create_subscription(Float32, f"{base}/score", self._on_score, _RELIABLE)
        # The node draws it only for subscribers.
        if overlays:
            topic = f"{base}/overlay/compressed"
            self.create_subscription(CompressedImage, topic, self._on_overlay, _RELIABLE)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self)

    def _on_status(self, message: DiagnosticArray) -> None:
        now_ns = self.get_clock().now().nanoseconds
        if message.status:
            values = {pair.key: pair.value for pair in message.status[0].values}
            sent_ns = stamp_ns(message.header)
            answer = {"latency_ms": (now_ns - sent_ns) / 1e6, "status": values}
            self.statuses.setdefault(sent_ns, answer)

    def _on_score(self, message: Float32) -> None:
        self.scores += 1

    def _on_overlay(self, message: CompressedImage) -> None:
        self.overlays[stamp_ns(message.header)] = bytes(message.data)

    def spin_until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Spin until `done()` returns true; return whether it did within the time."""
        end = time.monotonic() + timeout_s
        while not done():
            left = end - time.monotonic()
            if left <= 0:
                return False
            self._executor.spin_once(timeout_sec=min(0.05, left))
        return True

    def call(self, service_type: Any, name: str, request: Any, timeout_s: float) -> Any:
        """Call a service of the node and return its response.

        Raises:
            SemanticAnomalyError: no such service, or no response in time.
        """
        client = self.create_client(service_type, f"{self.target}/{name}")
        try:
            if not client.wait_for_service(timeout_sec=timeout_s):
                raise SemanticAnomalyError(
                    f"node '{self.target}': expected service '{name}', found none"
                )
            future = client.call_async(request)
            if not self.spin_until(future.done, timeout_s):
                raise SemanticAnomalyError(
                    f"service '{self.target}/{name}': no response in {timeout_s:.0f} s"
                )
            return future.result()
        finally:
            self.destroy_client(client)

    def bring_up(self, timeout_s: float = 120.0) -> None:
        """Configure and activate the node, from any state.

        Raises:
            SemanticAnomalyError: the node does not become active.
        """
        for state, transition in (
            (State.PRIMARY_STATE_UNCONFIGURED, Transition.TRANSITION_CONFIGURE),
            (State.PRIMARY_STATE_INACTIVE, Transition.TRANSITION_ACTIVATE),
        ):
            response = self.call(GetState, "get_state", GetState.Request(), timeout_s)
            if response.current_state.id == state:
                request = ChangeState.Request(transition=Transition(id=transition))
                self.call(ChangeState, "change_state", request, timeout_s)
        response = self.call(GetState, "get_state", GetState.Request(), timeout_s)
        if response.current_state.id != State.PRIMARY_STATE_ACTIVE:
            raise SemanticAnomalyError(
                f"node '{self.target}': expected state 'active', found "
                f"'{response.current_state.label}'; see its log"
            )

    def publish(self, frame: Frame) -> int:
        """Publish a frame stamped now; return the stamp in nanoseconds."""
        stamp = self.get_clock().now()
        if self._compressed:
            message = CompressedImage(format="jpeg", data=encode_jpeg(frame.image, 95))
        else:
            message = image_message(frame.image, "rgb8")
        message.header.stamp = stamp.to_msg()
        message.header.frame_id = frame.frame_id or "camera_optical_frame"
        self._images.publish(message)
        return int(stamp.nanoseconds)

    def play(
        self, frames: Iterable[Frame], count: int | None, rate_hz: float
    ) -> list[dict[str, Any]]:
        """Publish frames at a rate and return one record for each, with the status of the node.

        The progress bar shows `count`, None if unknown.

        Raises:
            SemanticAnomalyError: the image topic has no subscriber.
        """
        if not self.spin_until(lambda: self._images.get_subscription_count() > 0, 20.0):
            raise SemanticAnomalyError(
                f"topic '{self._images.topic_name}': expected a subscriber, found none"
            )
        sent: list[tuple[int, str]] = []
        begin = time.monotonic()
        for number, frame in enumerate(tqdm(frames, total=count, desc="play", disable=None)):
            due = begin + number / rate_hz
            self.spin_until(lambda due=due: time.monotonic() >= due, 1.0 + 1.0 / rate_hz)  # type: ignore[misc]
            sent.append((self.publish(frame), frame.name))
        elapsed_s = time.monotonic() - begin
        self.spin_until(lambda: bool(sent) and sent[-1][0] in self.statuses, 3.0)
        self.get_logger().info(f"played {len(sent)} frames in {elapsed_s:.1f} s")
        return [
            {"name": name, "stamp_ns": sent_ns, **self.statuses.get(sent_ns, {})}
            for sent_ns, name in sent
        ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="folder of images, video or rosbag2 bag")
    parser.add_argument("--out", type=Path, help="folder for frames.json and overlays/")
    parser.add_argument("--topic", help="image topic inside a bag")
    parser.add_argument("--image-topic", default="/camera/image_raw", help="topic to publish to")
    parser.add_argument("--compressed", action="store_true", help="publish CompressedImage")
    parser.add_argument("--rate-hz", type=float, default=10.0)
    parser.add_argument("--repeat", type=int, default=1, help="how often the source is played")
    parser.add_argument("--node", default="/semantic_anomaly", help="full name of the node")
    parser.add_argument("--camera", default="camera", help="name of the camera in the node")
    parser.add_argument("--overlays", action="store_true", help="collect the overlay pictures")
    parser.add_argument("--bring-up", action="store_true", help="configure and activate first")
    return parser


def _run(args: argparse.Namespace) -> None:
    source = open_source(args.source, topic=args.topic)
    if args.out:
        refuse_unwritable(args.out / "frames.json")
    player = SourcePlayer(args.node, args.camera, args.image_topic, args.compressed, args.overlays)
    try:
        if args.bring_up:
            player.bring_up()
        frames = (frame for _ in range(args.repeat) for frame in source)
        count = None if source.count is None else source.count * args.repeat
        records = player.play(frames, count, args.rate_hz)
        if args.out:
            (args.out / "overlays").mkdir(parents=True, exist_ok=True)
            for number, record in enumerate(records):
                if overlay := player.overlays.get(record["stamp_ns"]):
                    atomic_write_bytes(args.out / f"overlays/{number:06d}.jpg", overlay)
            summary = {"frames": records, "scores_received": player.scores}
            atomic_write_bytes(args.out / "frames.json", json.dumps(summary, indent=1).encode())
        scored = sum("score" in record.get("status", {}) for record in records)
        answered = sum("status" in record for record in records)
        print(f"frames sent {len(records)}, with a status {answered}, scored {scored}")
    finally:
        player.destroy_node()


def main(argv: list[str] | None = None) -> int:
    """Play a source to the node.

    Returns:
        0, or with one line on stderr 2 for bad input, 1 for any other failure, 130 if interrupted.
    """
    forbid_writing_by_all()
    args = _parser().parse_args(argv)
    rclpy.init(args=[])
    try:
        _run(args)
        return 0
    except SemanticAnomalyError as error:
        print(f"source_player: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except (KeyboardInterrupt, ExternalShutdownException):
        return 130
    finally:
        rclpy.try_shutdown()


if __name__ == "__main__":
    sys.exit(main())
