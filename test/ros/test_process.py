"""The node as a process of its own, as it is started on a vehicle: DDS, signals, exit codes."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")

import rclpy
import yaml
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.executors import SingleThreadedExecutor
from sensor_msgs.msg import Image
from std_msgs.msg import Float32
from worlds.ros import (
    TIMEOUT_S,
    frame,
    odd_image,
    offline_detector,
    parameters,
    values_of,
)

from semantic_anomaly.ros.messages import image_message

_RUNS = itertools.count()
CAMERA_HW = (720, 1280)
# Loading torch alone takes seconds on a busy machine.
START_S = 90.0


class Process:
    """The node's process, and a helper node in this one."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        # A namespace of its own: nodes of earlier tests may linger in the graph.
        name = f"/run_{next(_RUNS)}"
        command = [sys.executable, "-m", "semantic_anomaly.ros.node", "--ros-args", *arguments]
        command += ["-r", f"__ns:={name}"]
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ)
        self.helper = rclpy.create_node("helper")
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.helper)
        self.statuses: list[DiagnosticArray] = []
        self.scores: list[float] = []
        base = f"{name}/semantic_anomaly/camera"
        self.helper.create_subscription(DiagnosticArray, f"{base}/status", self.statuses.append, 10)
        self.helper.create_subscription(
            Float32, f"{base}/score", lambda message: self.scores.append(message.data), 10
        )
        self.images = self.helper.create_publisher(Image, "/camera/image_raw", 1)
        self.change = self.helper.create_client(
            ChangeState, f"{name}/semantic_anomaly/change_state"
        )

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.executor.shutdown()
        self.helper.destroy_node()

    def spin_until(self, done: Any, timeout_s: float = TIMEOUT_S) -> None:
        end = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < end and self.process.poll() is None, self.log.read_text()
            self.executor.spin_once(timeout_sec=0.05)

    def transition(self, which: int) -> Any:
        self.spin_until(self.change.service_is_ready, START_S)
        request = ChangeState.Request(transition=Transition(id=which))
        return self.change.call_async(request)

    def bring_up(self) -> None:
        for which in (Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_ACTIVATE):
            done = self.transition(which)
            self.spin_until(done.done, START_S)
            assert done.result().success, self.log.read_text()
        self.spin_until(lambda: self.images.get_subscription_count() > 0)

    def send(self, image: Any) -> Image:
        message = image_message(image, "rgb8")
        message.header.stamp = self.helper.get_clock().now().to_msg()
        message.header.frame_id = "front_optical"
        self.images.publish(message)
        return message

    def answer(self, message: Image) -> dict[str, str]:
        def answers() -> list[DiagnosticArray]:
            return [status for status in self.statuses if status.header == message.header]

        self.spin_until(answers)
        return values_of(answers()[0].status[0])

    def send_until_answered(self, image: Any) -> tuple[Image, dict[str, str]]:
        """Send until there is a status: the first images may be lost before the connection."""
        sent: list[Image] = []
        next_s = 0.0

        def answered() -> list[DiagnosticArray]:
            nonlocal next_s
            if time.monotonic() >= next_s:
                sent.append(self.send(image))
                next_s = time.monotonic() + 0.5
            headers = [message.header for message in sent]
            return [status for status in self.statuses if status.header in headers]

        self.spin_until(answered)
        [first, *_] = answered()
        [message] = [m for m in sent if m.header == first.header]
        return message, values_of(first.status[0])

    def send_until_scored(self, image: Any) -> None:
        """Send until a score comes."""
        while not self.scores:
            self.send_until_answered(image)
            self.executor.spin_once(timeout_sec=0.2)

    def stop(self, number: int) -> int:
        self.process.send_signal(number)
        # A backbone that is being loaded is loaded to its end.
        return self.process.wait(START_S)


@pytest.fixture
def context() -> Iterator[None]:
    rclpy.init()
    yield
    rclpy.try_shutdown()


def parameter_file(path: Path, values: dict[str, Any]) -> list[str]:
    path.write_text(yaml.safe_dump({"/**": {"ros__parameters": values}}))
    return ["--params-file", str(path)]


def test_camera_size_images_cross_processes_and_sigint_during_inference_exits_cleanly(
    tmp_path: Path, index: Path, tiny_backbone: Path, context: None
) -> None:
    values = parameters(index, tiny_backbone)
    image = odd_image(3, CAMERA_HW)
    run = Process(parameter_file(tmp_path / "p.yaml", values), tmp_path / "log")
    try:
        run.bring_up()
        sent, status = run.send_until_answered(image)
        # The score may be connected later than the status.
        run.send_until_scored(image)
        # The signal arrives while the worker processes these images.
        for _ in range(3):
            run.send(image)
        code = run.stop(signal.SIGINT)
    finally:
        run.close()
    text = run.log.read_text()
    assert code == 0, text
    assert "Traceback" not in text and "terminate called" not in text
    expected = offline_detector(values).detect(frame(image, sent))
    assert abs(float(status["score"]) - expected.score) < 1e-6
    assert abs(run.scores[0] - expected.score) < 1e-6
    assert status["decision"] == expected.decision.value


def test_sigterm_while_configuring_exits_cleanly(
    tmp_path: Path, index: Path, tiny_backbone: Path, context: None
) -> None:
    values = parameters(index, tiny_backbone)
    run = Process(parameter_file(tmp_path / "p.yaml", values), tmp_path / "log")
    try:
        run.transition(Transition.TRANSITION_CONFIGURE)
        assert run.stop(signal.SIGTERM) == 0, run.log.read_text()
    finally:
        run.close()
    assert "Traceback" not in run.log.read_text()


def test_a_parameter_file_that_ros_cannot_read_is_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("/**:\n  ros__parameters:\n    mixed: [1, 0.5, x]\n")
    command = [sys.executable, "-m", "semantic_anomaly.ros.node"]
    command += ["--ros-args", "--params-file", str(tmp_path / "p.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "anomaly_node:" in done.stderr and "Traceback" not in done.stderr
