"""One camera of the node: rates, reports without a result, diagnostics, log lines of alarms."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from worlds.ros import Gate, bench, nominal_image, odd_image, values_of

from semantic_anomaly.ros import camera
from semantic_anomaly.ros.camera import LATENCY, RateMeter, RecentTimes
from semantic_anomaly.ros.messages import image_message
from semantic_anomaly.timing import PUBLISH, STAGES


def test_a_rate_is_measured_between_two_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((10.0, 12.0, 12.0, 13.0))
    monkeypatch.setattr(camera.time, "monotonic", lambda: next(times))
    meter = RateMeter()
    assert [meter.rate_hz(count) for count in (0, 10, 11)] == [0.0, 5.0, 0.0]
    # A smaller count: the counter was reset.
    assert meter.rate_hz(2) == 0.0


@pytest.mark.parametrize(
    ("max_age_s", "use_sim_time", "waited_s", "is_reported"),
    [
        (2.0, False, 1.9, False),
        (2.0, False, 2.0, True),
        (0.04, False, 0.04, True),
        # Simulated time may be slower than the worker.
        (2.0, True, 29.0, False),
        (2.0, True, 30.0, True),
    ],
)
def test_a_missing_result_is_reported_within_the_largest_age(
    values: dict[str, Any],
    max_age_s: float,
    use_sim_time: bool,
    waited_s: float,
    is_reported: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with bench({**values, "max_age_s": 60.0, "use_sim_time": use_sim_time}) as b:
        b.start("status")
        gate = Gate(b, monkeypatch)
        b.send(nominal_image(10))
        b.spin_until(gate.entered.is_set)
        watched = b.node._cameras["camera"]
        watched.outputs.publish_unknown = lambda *args: published.append(args[2])
        published: list[str] = []
        now_s = watched._waiting_since_s + waited_s
        with monkeypatch.context() as patch:
            patch.setattr(camera.time, "monotonic", lambda: now_s)
            watched.inputs.arrived_s = now_s
            for _ in range(2):
                watched.check(max_age_s)
        assert len(published) == is_reported
        assert all("there was no result for" in reason for reason in published)
        gate.opened.set()


def test_diagnostics_are_published_every_second(values: dict[str, Any]) -> None:
    with bench(values) as b:
        b.listen_diagnostics()
        b.start("status")
        answer = b.answer(b.send(nominal_image(1)))
        heartbeats: list[DiagnosticArray] = []
        b.helper.create_subscription(
            DiagnosticArray, "/semantic_anomaly/heartbeat", heartbeats.append, 10
        )
        b.diagnostics.clear()
        # The same message arrives on both topics, in any order.
        b.spin_until(lambda: any(message in b.diagnostics for message in heartbeats))
        status = values_of(b.diagnostics[0].status[0])
        # Not by stamps: on a busy machine one message is late and the next is not.
        assert 10**9 in [timer.timer_period_ns for timer in b.node.timers]
        stale = b.node._cameras["camera"].diagnostics({"stale_calibration": "1 edit"})
        assert status["last_decision"] == "nominal" and "last_reason" not in status
        assert float(status["last_status_age_s"]) >= 0
        b.answer(b.send(np.zeros_like(nominal_image(1))))
        unknown = b.node._cameras["camera"].diagnostics({})
    assert unknown.level == DiagnosticStatus.WARN
    assert unknown.message.startswith("unknown: blind: image without contrast")
    assert status["state"] == "active" and status["device"] == "cpu"
    assert status["frames_received"] == "1" and status["frames_processed"] == "1"
    assert len(status["index_fingerprint"]) == 64
    assert 0 <= float(answer["calibration_age_days"]) <= float(status["calibration_age_days"]) < 1
    assert status["calibration_created"].endswith("Z")
    assert "stale_calibration" not in status
    assert "rate_in_hz" in status and "rate_processed_hz" in status
    for stage in (*STAGES, PUBLISH, LATENCY):
        assert 0 <= float(status[f"{stage}_p50_ms"]) <= float(status[f"{stage}_p95_ms"])
    assert stale.level == DiagnosticStatus.WARN and "stale calibration" in stale.message
    assert values_of(stale)["stale_calibration"] == "1 edit"


def test_times_are_summarised_for_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(camera.time, "monotonic", lambda: now_s)
    times = RecentTimes()
    assert times.summary() == {}
    for ms in range(101):
        times.add({"forward": float(ms), LATENCY: None})
    assert times.summary() == {"forward_p50_ms": 50.0, "forward_p95_ms": 95.0}
    now_s += 11.0
    times.add({"forward": 7.0, LATENCY: 9.0})
    assert set(times.summary().values()) == {7.0, 9.0}


def test_start_and_end_of_an_alarm_are_logged_once(
    values: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with bench({**values, "silence_s": 0.5}) as b:
        b.start("status")
        now_ns = b.helper.get_clock().now().nanoseconds
        for offset_ms, image in ((0, odd_image(1)), (200, odd_image(2)), (900, nominal_image(10))):
            b.answer(b.send(image, stamp_ns=now_ns + offset_ms * 1_000_000))
        lines = b.spin_until_logged("alarm ends")
        b.answer(b.send(odd_image(3), stamp_ns=now_ns + 2_000_000_000))
        assert b.node.trigger_deactivate().name == "SUCCESS"
    [start] = [line for line in lines if "alarm starts" in line]
    [end] = [line for line in lines if "alarm ends" in line]
    assert "camera 'camera': alarm starts: track 1, score" in start and "box x" in start
    assert "track 1, duration 0.2 s, 2 frames" in end
    # An alarm also ends with the node.
    assert capfd.readouterr().err.count("alarm ends") == 2


def test_a_frozen_or_covered_camera_is_unknown(values: dict[str, Any]) -> None:
    with bench({**values, "frozen_after_s": 0.5}) as b:
        b.start("status", "score")
        now_ns = b.helper.get_clock().now().nanoseconds
        images = [nominal_image(10)] * 5 + [np.zeros_like(nominal_image(10)), nominal_image(11)]
        statuses = [
            b.answer(b.send(image, stamp_ns=now_ns + number * 200_000_000))
            for number, image in enumerate(images)
        ]
        decisions = [status["decision"] for status in statuses]
        assert decisions == ["nominal"] * 3 + ["unknown"] * 3 + ["nominal"]
        assert "frozen image" in statuses[3]["reason"]
        assert "without contrast" in statuses[5]["reason"]
        assert not any("score" in status for status in statuses[3:6])
        assert statuses[-1]["frames_blind"] == "3"
        b.spin_until(lambda: len(b.got["camera"]["score"]) == 4)
        # Simulations stand still.
        assert b.set(frozen_after_s=0.0, least_contrast=0.0).successful
        again = [b.answer(b.send(images[-1], stamp_ns=now_ns + n * 10**9)) for n in (2, 3, 4)]
        assert [status["decision"] for status in again] == ["nominal"] * 3


def test_yuv_of_full_range_is_warned_of_once(values: dict[str, Any]) -> None:
    with bench(values) as b:
        b.start("status")
        for seed in range(2):
            message = image_message(nominal_image(seed), "rgb8")
            message.encoding, message.step = "uyvy", 2 * message.width
            pixels = np.full((message.height, message.width, 2), 128, np.uint8)
            pixels[..., 1] = np.linspace(0, 255, message.width) + seed / 9
            message.data = array("B", pixels.tobytes())
            b.stamped(message)
            b.publisher().publish(message)
            assert b.answer(message)["decision"] in ("nominal", "anomaly")
        lines = b.spin_until_logged("seem to have the full range")
    assert len([line for line in lines if "seem to have the full range" in line]) == 1
