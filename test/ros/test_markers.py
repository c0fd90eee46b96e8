"""Markers: where boxes are placed, and that they say how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

from sensor_msgs.msg import CameraInfo
from worlds.ros import HW, bench, build_monitor, odd_image, parameters

from semantic_anomaly.ros.messages import image_message


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    return build_monitor(tmp_path_factory.mktemp("monitor"), tiny_backbone)


@pytest.fixture
def values(index: Path, tiny_backbone: Path) -> dict[str, Any]:
    return parameters(index, tiny_backbone)


def camera_info() -> CameraInfo:
    height, width = HW
    info = CameraInfo(height=height, width=width, distortion_model="plumb_bob")
    info.k = [100.0, 0.0, (width - 1) / 2, 0.0, 100.0, (height - 1) / 2, 0.0, 0.0, 1.0]
    return info


def test_markers_lie_at_the_measured_range(values: dict[str, Any]) -> None:
    topics = {"camera.depth_topic": "/depth", "camera.camera_info_topic": "/info"}
    with bench({**values, **topics}) as b:
        b.start("status", "markers")
        now_ns = b.helper.get_clock().now().nanoseconds
        depth = image_message(np.full(HW, 6.5, np.float32), "32FC1")
        b.publisher("/info", CameraInfo).publish(b.stamped(camera_info(), stamp_ns=now_ns))
        b.publisher("/depth").publish(b.stamped(depth, stamp_ns=now_ns))
        inputs = b.node._cameras["camera"].inputs
        b.spin_until(lambda: inputs._info is not None and inputs._depths)
        b.send(odd_image(), stamp_ns=now_ns)
        b.spin_until(lambda: b.got["camera"]["markers"])
        markers = b.got["camera"]["markers"][-1].markers
    boxes = [marker for marker in markers if marker.ns == "boxes"]
    labels = [marker for marker in markers if marker.ns == "labels"]
    assert boxes and all(point.z == 6.5 for marker in boxes for point in marker.points)
    assert all("6.5 m (measured)" in marker.text for marker in labels)
    # The right half of the image lies to the right of the optical axis.
    assert np.mean([point.x for point in boxes[0].points]) > 0


@pytest.mark.parametrize(
    ("changes", "how"),
    [({"camera.camera_height_m": 1.5}, "ground"), ({"marker_range_m": 12.0}, "12.0 m (assumed)")],
)
def test_markers_without_depth(values: dict[str, Any], changes: dict[str, Any], how: str) -> None:
    with bench({**values, **changes}) as b:
        b.start("status", "markers")
        b.send(odd_image())
        b.spin_until(lambda: b.got["camera"]["markers"])
        markers = b.got["camera"]["markers"][-1].markers
    assert any(how in marker.text for marker in markers if marker.ns == "labels")
