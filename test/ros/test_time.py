"""Simulated time: not begun, running, and going back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")

from worlds.ros import Bench, bench, build_monitor, nominal_image, odd_image, parameters

rosgraph = pytest.importorskip("rosgraph_msgs.msg")

S = 10**9


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    return build_monitor(tmp_path_factory.mktemp("monitor"), tiny_backbone)


@pytest.fixture
def values(index: Path, tiny_backbone: Path) -> dict[str, Any]:
    return parameters(index, tiny_backbone, use_sim_time=True, max_age_s=1.0)


def set_time(b: Bench, seconds: int) -> None:
    """Publish the time and wait until the node has it."""
    message = rosgraph.Clock()
    message.clock.sec = seconds
    publisher = b.publisher("/clock", rosgraph.Clock, 1)
    publisher.publish(message)
    b.spin_until(lambda: b.node.get_clock().now().nanoseconds == seconds * S)


def test_before_the_first_clock_no_age_is_known(values: dict[str, Any]) -> None:
    with bench(values) as b:
        b.start("status")
        told = b.answer(b.send(nominal_image(10), stamp_ns=70 * S))
    assert told["decision"] == "nominal" and "latency_ms" not in told


def test_ages_go_by_simulated_time(values: dict[str, Any]) -> None:
    with bench(values) as b:
        b.start("status")
        set_time(b, 100)
        told = b.answer(b.send(nominal_image(10), stamp_ns=100 * S - S // 4))
        assert told["decision"] == "nominal" and float(told["latency_ms"]) == 250.0
        told = b.answer(b.send(nominal_image(10), stamp_ns=80 * S))
        assert "stale: image is 20.000 s old" in told["reason"]
        told = b.answer(b.send(nominal_image(10)))
        assert "clock mismatch" in told["reason"]


def test_time_that_goes_back_clears_what_was_remembered(
    values: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with bench({**values, "confirm_count": 2, "confirm_s": 30.0, "silence_s": 30.0}) as b:
        b.start("status")
        set_time(b, 100)
        assert b.answer(b.send(odd_image(1), stamp_ns=100 * S))["decision"] == "nominal"
        set_time(b, 5)
        assert "clock changed or went back" in capfd.readouterr().err
        # Later than the last stamp, so that only the clock can have cleared the count.
        set_time(b, 101)
        assert b.answer(b.send(odd_image(2), stamp_ns=101 * S))["decision"] == "nominal"
        assert b.answer(b.send(odd_image(3), stamp_ns=101 * S + 1))["decision"] == "anomaly"


def test_silence_is_noticed_while_time_stands_still(values: dict[str, Any]) -> None:
    with bench({**values, "silent_after_s": 0.2}) as b:
        b.start("status")
        assert "/camera/image_raw" in b.unknown(having="no frames for")["reason"]
