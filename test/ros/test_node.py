"""Every transition and what fails on the way; the node as a process, as on a vehicle."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")

import rclpy
import yaml
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.executors import SingleThreadedExecutor
from sensor_msgs.msg import Image
from std_msgs.msg import Float32
from worlds.ros import (
    ERROR,
    FAILURE,
    SUCCESS,
    TIMEOUT_S,
    Bench,
    bench,
    frame,
    nominal_image,
    odd_image,
    offline_detector,
    values_of,
)

from semantic_anomaly.ros import models, node
from semantic_anomaly.ros.messages import image_message

_RUNS = itertools.count()
CAMERA_HW = (720, 1280)
# Loading torch alone takes seconds on a busy machine.
START_S = 90.0


def state(b: Bench) -> str:
    return b.node._state_machine.current_state[1]


def entities(b: Bench) -> dict[str, int]:
    return {
        "publishers": len(list(b.node.publishers)),
        "subscriptions": len(list(b.node.subscriptions)),
        "services": len(list(b.node.services)),
        "timers": len(list(b.node.timers)),
        "managed": len(b.node._managed_entities),
        "threads": threading.active_count(),
        "files": open_files(),
    }


def open_files() -> int:
    """Count what is open on disk; sockets belong to the middleware, which keeps a pool."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(link.readlink())
            count += target.startswith("/") and not target.startswith("/dev/")
    return count


def assert_as_before(b: Bench, before: dict[str, int]) -> None:
    """Check that the entities are those of an earlier state; open files are loaded lazily."""
    after = entities(b)
    assert {**after, "files": 0} == {**before, "files": 0}


def test_each_transition_creates_or_destroys_its_entities(values: dict[str, Any]) -> None:
    with bench(values) as b:
        # The node never changes its own state.
        b.executor.spin_once(timeout_sec=0.1)
        assert state(b) == "unconfigured"
        bare = entities(b)
        assert b.node.trigger_configure() == SUCCESS and state(b) == "inactive"
        configured = entities(b)
        assert configured["managed"] == 7
        assert configured["subscriptions"] == bare["subscriptions"]
        assert b.node.trigger_activate() == SUCCESS and state(b) == "active"
        active = entities(b)
        assert active["subscriptions"] == bare["subscriptions"] + 1
        assert active["threads"] == bare["threads"] + 1
        assert b.node.trigger_deactivate() == SUCCESS and state(b) == "inactive"
        assert_as_before(b, configured)
        assert b.node.models is not None
        assert b.node.trigger_cleanup() == SUCCESS and state(b) == "unconfigured"
        assert b.node.models is None
        assert_as_before(b, bare)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_shutdown_from_any_state(values: dict[str, Any], steps: int) -> None:
    with bench(values) as b:
        for transition in (b.node.trigger_configure, b.node.trigger_activate)[:steps]:
            assert transition() == SUCCESS
        threads = threading.active_count()
        assert b.node.trigger_shutdown() == SUCCESS
        assert state(b) == "finalized"
        assert b.node.models is None and not b.node._managed_entities
        assert threading.active_count() == threads - (steps == 2)


def test_transitions_by_service(values: dict[str, Any]) -> None:
    with bench(values) as b:
        change = b.helper.create_client(ChangeState, "/semantic_anomaly/change_state")
        ask = b.helper.create_client(GetState, "/semantic_anomaly/get_state")
        b.spin_until(lambda: change.service_is_ready() and ask.service_is_ready())
        seen = []
        for label in ("configure", "activate", "deactivate", "cleanup", "shutdown"):
            request = ChangeState.Request()
            request.transition.label = label
            done = change.call_async(request)
            b.spin_until(done.done)
            assert done.result().success, label
            answer = ask.call_async(GetState.Request())
            b.spin_until(answer.done)
            seen.append(answer.result().current_state.id)
    assert seen == [
        State.PRIMARY_STATE_INACTIVE,
        State.PRIMARY_STATE_ACTIVE,
        State.PRIMARY_STATE_INACTIVE,
        State.PRIMARY_STATE_UNCONFIGURED,
        State.PRIMARY_STATE_FINALIZED,
    ]


def test_results_after_deactivation_and_cleanup(values: dict[str, Any]) -> None:
    with bench({**values, "confirm_count": 2, "confirm_s": 30.0, "silence_s": 30.0}) as b:
        b.start("status")
        first = [b.answer(b.send(odd_image(i)))["decision"] for i in range(2)]
        assert b.node.trigger_deactivate() == SUCCESS
        assert b.node.trigger_activate() == SUCCESS
        b.spin_until(b.connected)
        second = [b.answer(b.send(odd_image(i)))["decision"] for i in range(2)]
        for transition in (
            b.node.trigger_deactivate,
            b.node.trigger_cleanup,
            b.node.trigger_configure,
            b.node.trigger_activate,
        ):
            assert transition() == SUCCESS
        b.spin_until(b.connected)
        third = b.answer(b.send(odd_image(3)))
    # Deactivation forgets the frames that confirmation counts.
    assert first == second == ["nominal", "anomaly"]
    assert third["decision"] == "nominal" and third["frames_received"] == "1"


def test_an_unusable_setting_fails_in_one_line_and_configure_may_be_tried_again(
    values: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    unusable: list[tuple[str, Any, str]] = [
        ("index", "", "setting 'index'"),
        ("index", "/nowhere/index", "/nowhere/index"),
        ("backbone", "/nowhere/backbone", "/nowhere/backbone"),
        ("input_size", 280, "input_size"),
        ("tail_percent", 7.0, "tail_percent"),
        ("confidence", 0.9, "at least 9 nominal"),
        ("camera.region_of_interest", [0.0, 0.0, 1.0, 0.0, 1.0, 0.5], "polygon_xy"),
        ("camera.ego_mask", "/nowhere/mask.png", "/nowhere/mask.png"),
        ("device", "abacus", "abacus"),
    ]
    with bench(values) as b:
        bare = entities(b)
        for name, value, text in unusable:
            usable = b.node.get_parameter(name)
            assert b.set(**{name: value}).successful
            capfd.readouterr()
            assert b.node.trigger_configure() == FAILURE
            assert state(b) == "unconfigured" and b.node.models is None
            lines = [line for line in capfd.readouterr().err.splitlines() if "[ERROR]" in line]
            assert len(lines) == 1 and "cannot configure" in lines[0] and text in lines[0]
            assert_as_before(b, bare)
            assert b.node.set_parameters([usable])[0].successful
        assert b.node.trigger_configure() == SUCCESS
        assert b.node.trigger_activate() == SUCCESS


def test_an_unexpected_exception_is_logged_and_undone(
    values: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("unexpected")

    with bench(values) as b:
        bare = entities(b)
        # After models and outputs were created, all of which must be undone.
        monkeypatch.setattr(node.AnomalyNode, "_announce", broken)
        assert b.node.trigger_configure() == ERROR
        assert state(b) == "unconfigured" and b.node.models is None
        err = capfd.readouterr().err
        assert "Traceback" in err and "unexpected" in err
        assert_as_before(b, bare)
        monkeypatch.undo()
        assert b.node.trigger_configure() == SUCCESS

        monkeypatch.setattr(node, "Pipeline", broken)
        assert b.node.trigger_activate() == ERROR
        assert state(b) == "unconfigured" and b.node.models is None
        assert "unexpected" in capfd.readouterr().err
        monkeypatch.undo()
        b.start("status")
        assert b.answer(b.send(nominal_image(10)))["decision"] == "nominal"

        b.node._undo_activate.callback(broken)
        assert b.node.trigger_deactivate() == ERROR
        assert state(b) == "unconfigured" and not b.node._managed_entities


def test_a_self_test_that_fails_fails_to_configure(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    with bench(values) as b:

        def refuse(self: Any) -> None:
            embedder = self.embedder
            monkeypatch.setattr(embedder, "close", lambda: closed.append(embedder))
            raise models.ModelOutputError("self-test: expected a finite number, found nan")

        monkeypatch.setattr(models.Models, "self_test", refuse)
        assert b.node.trigger_configure() == FAILURE
        assert len(closed) == 1 and b.node.models is None


def test_repeated_cycles_leave_nothing_behind(values: dict[str, Any]) -> None:
    with bench(values) as b:
        counts = []
        for _ in range(8):
            for transition in (
                b.node.trigger_configure,
                b.node.trigger_activate,
                b.node.trigger_deactivate,
                b.node.trigger_cleanup,
            ):
                assert transition() == SUCCESS
            # Entities are destroyed when the executor has let go of them.
            b.executor.spin_once(timeout_sec=0.01)
            counts.append(entities(b))
    # The first cycles load libraries and fill pools.
    assert counts[-1] == counts[3]


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
    tmp_path: Path, values: dict[str, Any], context: None
) -> None:
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
    # The message has float32.
    assert run.scores[0] == pytest.approx(expected.score, rel=1e-6)
    assert status["decision"] == expected.decision.value


def test_sigterm_while_configuring_exits_cleanly(
    tmp_path: Path, values: dict[str, Any], context: None
) -> None:
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


def test_a_thread_that_hangs_does_not_keep_the_process_from_ending() -> None:
    code = """
import os, signal, sys, threading
from semantic_anomaly.ros import node

def close(self):
    threading.Thread(target=threading.Event().wait).start()
    self._note_end(False)

node.AnomalyNode.close = close
interrupt = lambda self, timeout_sec: os.kill(os.getpid(), signal.SIGINT)
node.SingleThreadedExecutor.spin_once = interrupt
sys.exit(node.main())
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    assert done.returncode == 1 and "a thread hangs" in done.stderr
    assert "Traceback" not in done.stderr and "terminate called" not in done.stderr
