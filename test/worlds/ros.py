"""A small index on disk, and a bench to run the node on."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# One domain for each process: tests that run side by side stay separate.
os.environ["ROS_DOMAIN_ID"] = str(1 + os.getpid() % 100)
os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"

import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rcl_interfaces.msg import Log
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Float32
from std_srvs.srv import Trigger
from visualization_msgs.msg import MarkerArray

from semantic_anomaly.detection.detector import AnomalyDetector, load_detector
from semantic_anomaly.io.images import write_image
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.offline.calibrate import calibrate
from semantic_anomaly.ros.messages import image_message
from semantic_anomaly.ros.node import AnomalyNode
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame

HW = (84, 140)
TIMEOUT_S = 240.0
TOPICS = {
    "score": Float32,
    "status": DiagnosticArray,
    "heatmap": Image,
    "mask": Image,
    "overlay": Image,
    "overlay/compressed": CompressedImage,
    "markers": MarkerArray,
}


def nominal_image(seed: int, hw: tuple[int, int] = HW) -> np.ndarray:
    """Return a smooth shaded image with a little noise: (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : hw[0], 0 : hw[1]]
    shade = np.stack([60 + y, 100 + x / 2, 150 - y / 2 + x / 4], axis=-1) * hw[0] / 84
    return np.clip(shade + rng.normal(0, 3, (*hw, 3)), 0, 255).astype(np.uint8)


def odd_image(seed: int = 0, hw: tuple[int, int] = HW) -> np.ndarray:
    """Return a nominal image with a block of loud noise on the right."""
    image = nominal_image(seed, hw)
    block = image[hw[0] // 3 : hw[0] * 5 // 6, hw[1] // 2 : hw[1] * 9 // 10]
    block[...] = np.random.default_rng(seed + 1).integers(0, 256, block.shape, dtype=np.uint8)
    return image


def build_monitor(folder: Path, backbone: Path, *, calibrated: bool = True, **changes: Any) -> Path:
    """Build an index, and a calibration at 10 %, from drives written into the folder."""
    drives = []
    for drive, seeds in enumerate((range(0, 4), range(10, 16), range(20, 26))):
        drives.append(folder / f"drive_{drive}")
        drives[-1].mkdir(parents=True)
        for seed in seeds:
            write_image(drives[-1] / f"{seed:03d}.png", nominal_image(seed))
    settings = Settings.from_parameters(parameters(folder / "index", backbone, **changes))
    index = build_index(drives[:1], settings=settings, out=folder / "index")
    if calibrated:
        calibrate(index, drives[1:], settings=settings, out=folder / "index")
    return folder / "index"


def parameters(index: Path, backbone: Path, **changes: Any) -> dict[str, Any]:
    """Return flat parameters of a node with an index of `build_monitor`.

    `stages` among the changes replaces the shorthand for one stage of the backbone.
    """
    shorthand = {} if "stages" in changes else {"backbone": str(backbone), "input_size": 140}
    return {
        **shorthand,
        "index": str(index),
        "dedup_distance": 0.0,
        "device": "cpu",
        "dtype": "float32",
        "target_false_alarm_rate": 0.1,
        "max_age_s": 10.0,
        "silent_after_s": 30.0,
        # Tests send one image again and again.
        "frozen_after_s": 0.0,
        **changes,
    }


def two_cameras(values: dict[str, Any], first: str, second: str) -> dict[str, Any]:
    """Return parameters of two cameras, with images on /<camera>/image."""
    topics = {f"{camera}.image_topic": f"/{camera}/image" for camera in (first, second)}
    return {**values, **topics, "cameras": [first, second]}


def offline_detector(values: dict[str, Any], camera: str = "camera") -> AnomalyDetector:
    """Return the detector that the commands load with the same parameters."""
    return load_detector(Settings.from_parameters(values), camera)


class Bench:
    """A node, a helper that publishes and listens, and the executor that spins both."""

    def __init__(self, values: dict[str, Any], cameras: Sequence[str] = ("camera",)) -> None:
        overrides = [Parameter(name, value=value) for name, value in values.items()]
        self.node = AnomalyNode(parameter_overrides=overrides)
        self.helper = rclpy.create_node("helper")
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.executor.add_node(self.helper)
        self.got: dict[str, dict[str, list[Any]]] = {name: {} for name in cameras}
        self.diagnostics: list[DiagnosticArray] = []
        self._publishers: dict[str, Any] = {}
        self.log: list[str] = []
        qos = QoSProfile(depth=1000, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self.helper.create_subscription(Log, "/rosout", lambda line: self.log.append(line.msg), qos)

    def close(self) -> None:
        self.node.close()
        self.executor.shutdown()
        self.node.destroy_node()
        self.helper.destroy_node()
        # rclpy's lifecycle services live on in the graph until their state machine is collected.
        del self.node
        gc.collect()

    def listen(self, *topics: str) -> None:
        """Subscribe to outputs of every camera, all of them if none is named."""
        for camera, got in self.got.items():
            for topic in topics or TOPICS:
                received = got.setdefault(topic, [])
                name = f"/semantic_anomaly/{camera}/{topic}"
                qos = QoSProfile(depth=20)
                self.helper.create_subscription(TOPICS[topic], name, received.append, qos)

    def listen_diagnostics(self) -> None:
        self.helper.create_subscription(
            DiagnosticArray, "/diagnostics", self.diagnostics.append, 10
        )

    def spin_until(self, done: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> None:
        """Spin until done() returns true; fail after a time-out."""
        end = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < end, "the expected event did not happen"
            self.executor.spin_once(timeout_sec=0.05)

    def spin_until_logged(self, text: str, act: Callable[[], Any] = lambda: None) -> list[str]:
        """Spin, and call act(), until a line of the node's log has a text; return all lines.

        The worker logs after it has published, so a message does not imply its log line. The lines
        come by /rosout: reading captured output would lose what is written meanwhile.
        """

        def logged() -> bool:
            act()
            return any(text in line for line in self.log)

        self.spin_until(logged)
        return list(self.log)

    def start(self, *topics: str) -> None:
        """Configure and activate the node, subscribe, and wait for the connections."""
        if topics:
            self.listen(*topics)
        assert self.node.trigger_configure() == SUCCESS
        assert self.node.trigger_activate() == SUCCESS
        self.spin_until(self.connected)

    def connected(self) -> bool:
        """Return whether all subscriptions are connected."""
        names = [f"/semantic_anomaly/{c}/{t}" for c, got in self.got.items() for t in got]
        publishers = {p.topic_name: p for p in self.node.publishers}
        return all(
            name in publishers and publishers[name].get_subscription_count() for name in names
        )

    def publisher(self, topic: str = "/camera/image_raw", kind: Any = Image, qos: Any = 10) -> Any:
        """Return a publisher that is connected to the node."""
        if topic not in self._publishers:
            self._publishers[topic] = self.helper.create_publisher(kind, topic, qos)
        self.spin_until(lambda: self._publishers[topic].get_subscription_count() > 0)
        return self._publishers[topic]

    def stamped(self, message: Any, ahead_s: float = 0.0, stamp_ns: int | None = None) -> Any:
        """Return the message stamped now, some time ahead, or with a given stamp."""
        now_ns = self.helper.get_clock().now().nanoseconds + round(ahead_s * 1e9)
        chosen = now_ns if stamp_ns is None else stamp_ns
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(chosen, 10**9)
        message.header.frame_id = "front_optical"
        return message

    def send(self, image: np.ndarray, topic: str = "/camera/image_raw", **stamp: Any) -> Image:
        """Publish an RGB image and return the message."""
        message = self.stamped(image_message(image, "rgb8"), **stamp)
        self.publisher(topic).publish(message)
        return message

    def answer(self, message: Any, camera: str = "camera") -> dict[str, str]:
        """Wait for the status that answers an image and return its values."""
        return values_of(self.answer_message(message, camera).status[0])

    def answer_message(self, message: Any, camera: str = "camera") -> DiagnosticArray:
        """Wait for the status that answers an image."""
        statuses = self.got[camera]["status"]

        def answers() -> list[DiagnosticArray]:
            return [status for status in statuses if status.header == message.header]

        self.spin_until(answers)
        return answers()[-1]

    def unknown(self, camera: str = "camera", having: str = "") -> dict[str, str]:
        """Wait for a status 'unknown' whose reason contains a text, and return its values."""

        def matching() -> list[dict[str, str]]:
            statuses = [values_of(array.status[0]) for array in self.got[camera]["status"]]
            return [v for v in statuses if v["decision"] == "unknown" and having in v["reason"]]

        self.spin_until(matching)
        return matching()[0]

    def call(self, service: str) -> Trigger.Response:
        """Call a service of the node and return its response."""
        client = self.helper.create_client(Trigger, f"/semantic_anomaly/{service}")
        self.spin_until(client.service_is_ready)
        future = client.call_async(Trigger.Request())
        self.spin_until(future.done)
        self.helper.destroy_client(client)
        return future.result()

    def set(self, **values: Any) -> Any:
        """Set parameters together and return the result; '__' stands for the dot."""
        changes = [Parameter(k.replace("__", "."), value=v) for k, v in values.items()]
        return self.node.set_parameters_atomically(changes)


class Gate:
    """Holds the worker inside the embedder until it is opened."""

    def __init__(self, b: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        assert b.node.models is not None
        self.entered, self.opened = threading.Event(), threading.Event()
        embed = b.node.models.embedder.embed

        def held(images: Any) -> Any:
            self.entered.set()
            assert self.opened.wait(20)
            return embed(images)

        monkeypatch.setattr(b.node.models.embedder, "embed", held)


SUCCESS = rclpy.lifecycle.TransitionCallbackReturn.SUCCESS
FAILURE = rclpy.lifecycle.TransitionCallbackReturn.FAILURE
ERROR = rclpy.lifecycle.TransitionCallbackReturn.ERROR


def values_of(status: DiagnosticStatus) -> dict[str, str]:
    """Return the values of a status by key."""
    return {pair.key: pair.value for pair in status.values}


@contextmanager
def bench(
    values: dict[str, Any], cameras: Sequence[str] = ("camera",), args: Sequence[str] = ()
) -> Iterator[Bench]:
    """Run a bench inside an initialised context of its own, with ROS arguments."""
    rclpy.init(args=["--ros-args", *args])
    try:
        running = Bench(values, cameras)
        try:
            yield running
        finally:
            running.close()
    finally:
        rclpy.try_shutdown()


def frame(image: np.ndarray, message: Any) -> Frame:
    """Return the frame of a message, for the offline detector."""
    stamp_ns = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
    return Frame(image, stamp_ns, message.header.frame_id)
