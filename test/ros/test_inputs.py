"""Images that arrive at the node, good and bad: which are scored, and what the status says."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("rclpy")

import rclpy
from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image
from worlds.ros import bench, nominal_image, odd_image, values_of

from semantic_anomaly.io.images import encode_jpeg
from semantic_anomaly.ros import logs
from semantic_anomaly.ros.messages import image_message


@pytest.mark.parametrize(("ahead_s", "problem"), [(-20.0, "stale"), (20.0, "clock mismatch")])
def test_images_of_another_time_are_dropped_and_counted(
    values: dict[str, Any], ahead_s: float, problem: str
) -> None:
    with bench(values) as b:
        b.start("status", "score")
        array = b.answer_message(b.send(nominal_image(10), ahead_s=ahead_s))
        assert array.status[0].level == DiagnosticStatus.STALE
        status = values_of(array.status[0])
        assert status["decision"] == "unknown" and problem in status["reason"]
        assert "score" not in status
        assert status["frames_dropped_stale"] == "1" and status["frames_processed"] == "0"
        # The next good one is scored, and it alone.
        assert b.answer(b.send(nominal_image(10)))["decision"] == "nominal"
        b.spin_until(lambda: b.got["camera"]["score"])
        assert len(b.got["camera"]["score"]) == 1


def test_bad_images_give_unknown_and_the_next_good_one_a_score(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logs, "REPEAT_AFTER_S", math.inf)
    cut, swapped, nameless = (image_message(nominal_image(0), "rgb8") for _ in range(3))
    cut.data = cut.data[:-10]
    swapped.width, swapped.height = swapped.height, swapped.width
    nameless.encoding = "bayer_of_mars"
    bad = [(cut, "bytes"), (swapped, "140 rows"), (nameless, "'bayer_of_mars' is not supported")]
    with bench(values) as b:
        b.start("status")
        for number, (message, problem) in enumerate(bad, 1):
            b.publisher().publish(b.stamped(message))
            array = b.answer_message(message)
            assert array.status[0].level == DiagnosticStatus.ERROR
            status = values_of(array.status[0])
            assert status["decision"] == "unknown" and problem in status["reason"]
            assert status["frames_bad"] == str(number)
        assert b.answer(b.send(nominal_image(10)))["decision"] == "nominal"
    # Throttled: three bad images, one line.
    assert capfd.readouterr().err.count("unknown: bad image") == 1


def test_compressed_images_and_truncated_ones(values: dict[str, Any]) -> None:
    topic = "/camera/image_raw/compressed"
    chosen = {**values, "camera.transport": "compressed", "camera.image_topic": topic}
    jpeg = encode_jpeg(nominal_image(10), 98)
    with bench(chosen) as b:
        b.start("status")
        publisher = b.publisher(topic, CompressedImage)
        whole = b.stamped(CompressedImage(format="jpeg", data=jpeg))
        publisher.publish(whole)
        assert float(b.answer(whole)["score"]) > 0
        half = b.stamped(CompressedImage(format="jpeg", data=jpeg[: len(jpeg) // 2]))
        publisher.publish(half)
        assert "bad image" in b.answer(half)["reason"]


def test_a_silent_camera_and_its_return_are_reported(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTDDS_BUILTIN_TRANSPORTS", raising=False)
    with bench({**values, "silent_after_s": 0.2}) as b:
        b.start("status")
        status = b.unknown(having="no frames for")
        assert "/camera/image_raw" in status["reason"] and "publishers: 0" in status["reason"]
        assert "score" not in status
        b.publisher()
        status = b.unknown(having="publishers: 1")
        assert "FASTDDS_BUILTIN_TRANSPORTS=LARGE_DATA" in status["reason"]
        assert "qos_reliability: reliable helps" in status["reason"]
        # Sent until it is seen: on a busy machine the camera may be silent again at the next check.
        b.spin_until_logged("receives frames again", lambda: b.send(nominal_image(10)))


def test_what_is_in_force_is_not_advised(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDDS_BUILTIN_TRANSPORTS", "LARGE_DATA")
    with bench({**values, "silent_after_s": 0.2, "qos_reliability": "reliable"}) as b:
        b.start("status")
        b.publisher()
        reason = b.unknown(having="publishers: 1")["reason"]
    assert "LARGE_DATA" not in reason and "helps" not in reason and "this side: reliable" in reason


def test_the_compressed_topic_beside_a_base_topic_is_named(values: dict[str, Any]) -> None:
    chosen = {**values, "silent_after_s": 0.2, "camera.transport": "compressed"}
    with bench(chosen) as b:
        b.start("status")
        other = rclpy.Context()
        other.init()
        driver = rclpy.create_node("driver", context=other)
        try:
            driver.create_publisher(Image, "/camera/image_raw", 1)
            reason = b.unknown(having="found sensor_msgs/msg/Image")["reason"]
            assert "camera.transport to raw" in reason
            driver.create_publisher(CompressedImage, "/camera/image_raw/compressed", 1)
            b.unknown(having="/camera/image_raw/compressed exists: set camera.image_topic to it")
        finally:
            driver.destroy_node()
            other.try_shutdown()


def test_qos_overrides_are_honoured(values: dict[str, Any]) -> None:
    name = "qos_overrides./camera/image_raw.subscription.reliability"
    with bench({**values, name: "reliable"}) as b:
        b.start("status")
        (found,) = b.node.get_subscriptions_info_by_topic("/camera/image_raw")
        assert found.qos_profile.reliability is ReliabilityPolicy.RELIABLE
        # Its parameters remain when the node is activated again.
        assert b.answer(b.send(nominal_image(10)))["decision"] == "nominal"


def test_a_publisher_with_incompatible_qos_is_named(values: dict[str, Any]) -> None:
    best_effort = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    with bench({**values, "qos_reliability": "reliable"}) as b:
        b.start("status")
        b.helper.create_publisher(Image, "/camera/image_raw", best_effort)
        reason = b.unknown(having="incompatible QoS")["reason"]
    assert "RELIABILITY" in reason and "/helper" in reason and "qos_reliability" in reason


def test_a_topic_of_another_type_is_named(values: dict[str, Any]) -> None:
    with bench({**values, "silent_after_s": 0.2}) as b:
        b.start("status")
        # A context of its own: one participant cannot have a topic in two types.
        other = rclpy.Context()
        other.init()
        stranger = rclpy.create_node("stranger", context=other)
        try:
            stranger.create_publisher(CompressedImage, "/camera/image_raw", 1)
            reason = b.unknown(having="expected Image")["reason"]
            assert "set camera.transport to compressed" in reason
        finally:
            stranger.destroy_node()
            other.try_shutdown()
    assert "sensor_msgs/msg/CompressedImage" in reason


def test_late_frames_are_counted_and_keep_the_confirmation(
    values: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with bench({**values, "confirm_count": 2, "confirm_s": 30.0, "silence_s": 30.0}) as b:
        b.start("status")
        # By their own stamps: from an offset of more than the time between two sendings.
        statuses = [
            b.answer(b.send(odd_image(seed), ahead_s=ahead_s))
            for seed, ahead_s in enumerate((0.0, 0.4, -0.2, 0.4, -0.2))
        ]
    assert [status["decision"] for status in statuses] == ["nominal", *["anomaly"] * 4]
    assert int(statuses[-1]["frames_late"]) >= 1
    log = capfd.readouterr().err
    assert "older than one before it" in log and "tracks are cleared" not in log


def test_a_backward_stamp_clears_the_confirmation(
    values: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with bench({**values, "confirm_count": 2, "confirm_s": 30.0, "silence_s": 30.0}) as b:
        b.start("status")
        decisions = [
            b.answer(b.send(odd_image(seed), ahead_s=ahead_s))["decision"]
            for seed, ahead_s in enumerate((0.0, 0.0, -5.0, 0.0))
        ]
    # One is not enough, two are; after the jump the count begins anew.
    assert decisions == ["nominal", "anomaly", "nominal", "anomaly"]
    assert "stamps went back by" in capfd.readouterr().err


def test_an_exception_in_a_callback_is_logged_and_spinning_continues(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with bench(values) as b:
        b.start("status")

        def broken(*_: Any) -> bool:
            raise ValueError("broken slot")

        camera = b.node._cameras["camera"]
        monkeypatch.setattr(camera, "_put", broken)
        b.send(nominal_image(10))
        b.spin_until_logged("ValueError: broken slot")
        monkeypatch.undo()
        assert b.answer(b.send(nominal_image(10)))["decision"] == "nominal"
