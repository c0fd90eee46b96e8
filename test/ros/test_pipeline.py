"""The pipeline: failures of the model, frames that wait, ages of images, simulated time."""

from __future__ import annotations

import sys
import threading
from queue import SimpleQueue
from typing import Any

import pytest

pytest.importorskip("rclpy")

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rosgraph_msgs.msg import Clock
from worlds.ros import (
    ERROR,
    SUCCESS,
    TIMEOUT_S,
    Bench,
    Gate,
    bench,
    nominal_image,
    odd_image,
    two_cameras,
    values_of,
)

from semantic_anomaly.errors import ModelOutputError
from semantic_anomaly.ros import messages, pipeline
from semantic_anomaly.ros.pipeline import Worker, age_problem
from semantic_anomaly.segmentation.embedder import RunningEmbedder

SECOND_NS = 10**9


class CudaOutOfMemoryError(RuntimeError):
    """Named like torch's, whose class tests without a GPU cannot provoke."""


@pytest.mark.parametrize(
    ("error_class", "times", "decision"),
    [
        (ModelOutputError, 9, "unknown"),
        (RuntimeError, 9, "unknown"),
        (CudaOutOfMemoryError, 1, "nominal"),  # one retry
        (CudaOutOfMemoryError, 9, "unknown"),
    ],
)
def test_model_errors_give_unknown_and_out_of_memory_one_retry(
    values: dict[str, Any],
    error_class: type[Exception],
    times: int,
    decision: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with bench(values) as b:
        b.start("status")
        assert b.node.models is not None
        embedder, failures = b.node.models.embedder, iter(range(times))
        embed = embedder.embed

        def failing(images: Any) -> Any:
            for _ in failures:
                # Made here: its traceback would keep the node alive.
                raise error_class("not finite")
            return embed(images)

        monkeypatch.setattr(embedder, "embed", failing)
        status = b.answer(b.send(nominal_image(10)))
        assert status["decision"] == decision
        if decision == "unknown":
            assert "model error" in status["reason"] and "not finite" in status["reason"]
            assert "score" not in status and status["frames_failed"] == "1"
            # Tracebacks of unexpected exceptions are in the log.
            expected = error_class is ModelOutputError
            assert ("Traceback" in capfd.readouterr().err) != expected
        monkeypatch.setattr(embedder, "embed", embed)
        assert b.answer(b.send(nominal_image(10)))["decision"] == "nominal"


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_failure_of_one_camera_does_not_affect_the_other(
    values: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench(two_cameras(values, "left", "right"), ("left", "right")) as b:
        b.start("status")
        # Later than the start, so that the index is searched without a GPU.
        monkeypatch.setattr(RunningEmbedder, "device", device)
        assert b.node.models is not None
        embedder = b.node.models.embedder
        embed = embedder.embed

        def failing(images: Any) -> Any:
            batches.append(len(images))
            if any(image.shape[0] == 70 for image in images):
                raise ModelOutputError("patch features: not finite")
            return embed(images)

        batches: list[int] = []
        monkeypatch.setattr(embedder, "embed", failing)
        b.publisher("/left/image")
        b.publisher("/right/image")
        bad = b.send(nominal_image(10, (70, 140)), "/left/image")
        good = b.send(nominal_image(10), "/right/image")
        assert b.answer(bad, "left")["decision"] == "unknown"
        assert b.answer(good, "right")["decision"] == "nominal"
    assert max(batches) == 1 or device != "cpu"


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_an_unexpected_failure_to_decode_is_a_status_of_that_frame_alone(
    values: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench(two_cameras(values, "left", "right"), ("left", "right")) as b:
        b.start("status")
        monkeypatch.setattr(RunningEmbedder, "device", device)
        frame_of = messages.frame_of

        def failing(message: Any, name: str) -> Any:
            if message.height == 70:
                raise ZeroDivisionError("two\nlines")
            return frame_of(message, name)

        monkeypatch.setattr(messages, "frame_of", failing)
        gate = Gate(b, monkeypatch)
        first = b.send(nominal_image(10), "/left/image")
        b.spin_until(gate.entered.is_set)
        # Both wait, and are taken as one batch.
        bad = b.send(nominal_image(11, (70, 140)), "/left/image")
        good = b.send(nominal_image(12), "/right/image")
        b.spin_until(lambda: all(c.counts.frames_received for c in b.node._cameras.values()))
        counts = b.node._cameras["left"].counts
        b.spin_until(lambda: counts.frames_received == 2)
        gate.opened.set()
        status = b.answer(bad, "left")
        assert status["reason"] == "model error: ZeroDivisionError: two lines"
        assert status["frames_failed"] == "1"
        assert b.answer(first, "left")["decision"] == "nominal"
        assert b.answer(good, "right")["decision"] == "nominal"


def test_an_image_of_other_sides_than_the_index_is_a_bad_image(values: dict[str, Any]) -> None:
    with bench(values) as b:
        b.start("status")
        status = b.answer(b.send(nominal_image(10, (140, 84))))
        assert status["decision"] == "unknown" and status["frames_bad"] == "1"
        assert status["reason"].startswith("bad image: image, width by height: expected about 1.67")


def test_a_failure_to_draw_does_not_change_a_published_decision(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise RuntimeError("no picture")

    with bench(values) as b:
        b.start("status")
        monkeypatch.setattr(b.node._cameras["camera"].outputs, "publish_pictures", failing)
        bad = b.send(odd_image(3))
        b.spin_until_logged("no picture")
        after = b.answer(b.send(odd_image(4)))
        answers = [s for s in b.got["camera"]["status"] if s.header == bad.header]
        assert [values_of(s.status[0])["decision"] for s in answers] == ["anomaly"]
        assert (after["frames_processed"], after["frames_failed"]) == ("2", "0")


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_with_a_gpu_the_next_frame_is_embedded_while_one_is_assessed(
    values: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    with bench(values) as b:
        b.start("status")
        monkeypatch.setattr(RunningEmbedder, "device", device)
        assert b.node.models is not None
        embedder, detector = b.node.models.embedder, b.node.models.detectors["camera"]
        embed, assess = embedder.embed, detector.assess
        is_assessing, goes_on = threading.Event(), threading.Event()

        def recorded_embed(images: Any) -> Any:
            events.append("embed")
            return embed(images)

        def held_assess(*args: Any) -> Any:
            events.append("assess")
            is_assessing.set()
            assert goes_on.wait(20)
            events.append("assessed")
            return assess(*args)

        monkeypatch.setattr(embedder, "embed", recorded_embed)
        monkeypatch.setattr(detector, "assess", held_assess)
        first = b.send(nominal_image(10))
        b.spin_until(is_assessing.is_set)
        second = b.send(nominal_image(11))
        counts = b.node._cameras["camera"].counts
        b.spin_until(lambda: counts.frames_received == 2)
        if device != "cpu":
            b.spin_until(lambda: events.count("embed") == 2)
        goes_on.set()
        assert [b.answer(stamp)["decision"] for stamp in (first, second)] == ["nominal"] * 2
    order = ["embed", "assess", "assessed"] * 2
    if device != "cpu":
        order = ["embed", "assess", "embed", "assessed", "assess", "assessed"]
    assert events == order


def test_only_the_newest_frame_waits(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench(values) as b:
        b.start("status")
        gate = Gate(b, monkeypatch)
        first = b.send(nominal_image(10))
        b.spin_until(gate.entered.is_set)
        counts, later = b.node._cameras["camera"].counts, []
        for number, seed in enumerate((11, 12, 13), 2):
            later.append(b.send(nominal_image(seed)))
            b.spin_until(lambda number=number: counts.frames_received == number)
        gate.opened.set()
        b.answer(first)
        status = b.answer(later[-1])
        assert status["frames_replaced"] == "2" and status["frames_processed"] == "2"
        assert status["frames_received"] == "4"


def test_a_worker_reports_exceptions_and_continues() -> None:
    batches: SimpleQueue[dict[str, Any]] = SimpleQueue()
    reports: SimpleQueue[str] = SimpleQueue()

    def process(batch: dict[str, Any]) -> None:
        batches.put(batch)
        if "front" in batch:
            raise ValueError("first batch")

    worker = Worker(process, reports.put)
    worker.put("front", 1)
    assert "ValueError: first batch" in reports.get(timeout=20)
    worker.put("rear", 2)
    assert [batches.get(timeout=20) for _ in range(2)] == [{"front": 1}, {"rear": 2}]
    worker.stop()
    assert reports.empty()


def test_a_busy_worker_gets_the_newest_message_of_each_camera_next() -> None:
    begun: SimpleQueue[dict[str, Any]] = SimpleQueue()
    go_on = threading.Semaphore(0)

    def process(batch: dict[str, Any]) -> None:
        begun.put(batch)
        assert go_on.acquire(timeout=20)

    worker = Worker(process, pytest.fail)
    worker.put("front", 0)
    assert begun.get(timeout=20) == {"front": 0}
    assert not worker.put("front", 1) and not worker.put("rear", 2)
    assert worker.put("front", 3)
    go_on.release(2)
    assert begun.get(timeout=20) == {"front": 3, "rear": 2}
    worker.stop()


def hold(b: Bench, step: str, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Make a step of the worker hang until the event is set."""
    assert b.node.models is not None
    owner, name = {
        "decode": (messages, "frame_of"),
        "embed": (b.node.models.embedder, "embed"),
        "assess": (b.node.models.detectors["camera"], "assess"),
    }[step]
    function, goes_on = getattr(owner, name), threading.Event()

    def held(*args: Any) -> Any:
        assert goes_on.wait(TIMEOUT_S)
        return function(*args)

    monkeypatch.setattr(owner, name, held)
    return goes_on


def diagnosed(b: Bench, level: bytes, text: str) -> None:
    """Wait for a level and a text of the camera in /diagnostics and in the heartbeat."""
    heartbeats: list[DiagnosticArray] = []
    subscription = b.helper.create_subscription(
        DiagnosticArray, "/semantic_anomaly/heartbeat", heartbeats.append, 10
    )
    b.diagnostics.clear()
    for received in (b.diagnostics, heartbeats):
        b.spin_until(
            lambda received=received: any(
                status.level == level and text in status.message
                for array in received
                for status in array.status
            )
        )
    b.helper.destroy_subscription(subscription)


@pytest.mark.parametrize("step", ["decode", "embed", "assess"])
def test_a_worker_that_hangs_is_unknown_and_an_error_until_it_comes_back(
    values: dict[str, Any], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench({**values, "max_age_s": 0.3}) as b:
        b.listen_diagnostics()
        b.start("status")
        goes_on = hold(b, step, monkeypatch)
        # One frame is enough, and more of them change nothing.
        held = b.send(nominal_image(10))
        assert b.unknown(having="there was no result for")["frames_processed"] == "0"
        diagnosed(b, DiagnosticStatus.ERROR, "there was no result for")
        for seed in range(3):
            b.send(nominal_image(20 + seed))
            b.executor.spin_once(timeout_sec=0.05)
        goes_on.set()
        # Its result comes too late.
        late = b.answer(held)
        assert "stale: image is" in late["reason"] and "score" not in late
        assert b.set(max_age_s=10.0).successful
        assert b.answer(b.send(nominal_image(11)))["decision"] == "nominal"
        diagnosed(b, DiagnosticStatus.OK, "frames/s")


@pytest.mark.parametrize("error_class", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_worker_that_ends_is_started_again(
    values: dict[str, Any], error_class: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench(values) as b:
        b.listen_diagnostics()
        b.start("status")
        assert b.node.models is not None

        def ending(images: Any) -> Any:
            raise error_class("by a library")

        with monkeypatch.context() as patch:
            patch.setattr(b.node.models.embedder, "embed", ending)
            for seed in (10, 11):
                status = b.answer(b.send(nominal_image(seed)))
                assert status["decision"] == "unknown" and "score" not in status
                ended = f"the worker ended unexpectedly ({error_class.__name__}: by a library)"
                assert status["reason"].startswith(ended)
            diagnosed(b, DiagnosticStatus.ERROR, "the worker ended unexpectedly")
        status = b.answer(b.send(nominal_image(12)))
        assert status["decision"] == "nominal" and status["frames_failed"] == "2"
        diagnosed(b, DiagnosticStatus.OK, "frames/s")


@pytest.mark.parametrize("step", ["embed", "assess"])
def test_a_worker_that_hangs_does_not_keep_the_node_from_ending(
    values: dict[str, Any], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "STOP_S", 0.1)
    with bench(values) as b:
        b.start("status", "score")
        with monkeypatch.context() as patch:
            goes_on = hold(b, step, patch)
            b.send(nominal_image(10))
            counts = b.node._cameras["camera"].counts
            b.spin_until(lambda: counts.frames_received)
            [hanging] = [t for t in threading.enumerate() if t.name == "anomaly_worker"]
            while not hanging_in(hanging, "held"):
                b.executor.spin_once(timeout_sec=0.05)
            assert b.node.trigger_deactivate() == ERROR
            assert b.node.models is None and b.node.abandoned_threads == 1
            goes_on.set()
            hanging.join(TIMEOUT_S)
        assert not hanging.is_alive()
        b.spin_until_logged("a thread hangs")
        # What it computed afterwards was not published, and the node works again.
        assert b.got["camera"]["score"] == []
        for transition in (b.node.trigger_configure, b.node.trigger_activate):
            assert transition() == SUCCESS
        b.spin_until(b.connected)
        assert b.answer(b.send(nominal_image(11)))["decision"] == "nominal"
        assert b.node.trigger_deactivate() == SUCCESS


def hanging_in(thread: threading.Thread, function: str) -> bool:
    frame = sys._current_frames()[thread.ident or 0]
    names = []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return function in names


@pytest.mark.parametrize(
    ("now_ns", "stamp_ns", "problem"),
    [
        (100 * SECOND_NS, 100 * SECOND_NS, ""),
        (100 * SECOND_NS, 99 * SECOND_NS, ""),  # as old as allowed
        (100 * SECOND_NS, 101 * SECOND_NS, ""),  # as far ahead as allowed
        (100 * SECOND_NS, 99 * SECOND_NS - 1, "stale: image is 1.000 s old"),
        (100 * SECOND_NS, 101 * SECOND_NS + 1, "clock mismatch"),
        (100 * SECOND_NS, 0, "does the driver stamp its images"),
        (100 * SECOND_NS, -5 * SECOND_NS, "stale"),
        (0, 50 * SECOND_NS, ""),  # simulated time has not started: no age is known
    ],
)
def test_ages(now_ns: int, stamp_ns: int, problem: str) -> None:
    text = age_problem(now_ns, stamp_ns, 1.0)
    assert problem in text and bool(problem) == bool(text)


@pytest.fixture
def simulated(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "use_sim_time": True, "max_age_s": 1.0}


def set_time(b: Bench, seconds: int) -> None:
    """Publish the time and wait until the node has it."""
    b.publisher("/clock", Clock, 1).publish(Clock(clock=Time(sec=seconds)))
    b.spin_until(lambda: b.node.get_clock().now().nanoseconds == seconds * SECOND_NS)


def test_before_the_first_clock_no_age_is_known(simulated: dict[str, Any]) -> None:
    with bench(simulated) as b:
        b.start("status")
        status = b.answer(b.send(nominal_image(10), stamp_ns=70 * SECOND_NS))
    assert status["decision"] == "nominal" and "latency_ms" not in status


def test_ages_go_by_simulated_time(simulated: dict[str, Any]) -> None:
    with bench(simulated) as b:
        b.start("status")
        set_time(b, 100)
        status = b.answer(b.send(nominal_image(10), stamp_ns=100 * SECOND_NS - SECOND_NS // 4))
        assert status["decision"] == "nominal" and float(status["latency_ms"]) == 250.0
        status = b.answer(b.send(nominal_image(10), stamp_ns=80 * SECOND_NS))
        assert "stale: image is 20.000 s old" in status["reason"]
        status = b.answer(b.send(nominal_image(10)))
        assert "clock mismatch" in status["reason"]


def test_time_that_goes_back_clears_the_tracks(
    simulated: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with bench({**simulated, "confirm_count": 2, "confirm_s": 30.0, "silence_s": 30.0}) as b:
        b.start("status")
        set_time(b, 100)
        assert b.answer(b.send(odd_image(1), stamp_ns=100 * SECOND_NS))["decision"] == "nominal"
        set_time(b, 5)
        assert "the clock changed or went back" in capfd.readouterr().err
        # Later than the last stamp, so that only the clock can have cleared the tracks.
        set_time(b, 101)
        assert b.answer(b.send(odd_image(2), stamp_ns=101 * SECOND_NS))["decision"] == "nominal"
        assert b.answer(b.send(odd_image(3), stamp_ns=101 * SECOND_NS + 1))["decision"] == "anomaly"


def test_silence_is_noticed_while_time_stands_still(simulated: dict[str, Any]) -> None:
    with bench({**simulated, "silent_after_s": 0.2}) as b:
        b.start("status")
        assert "/camera/image_raw" in b.unknown(having="no frames for")["reason"]
