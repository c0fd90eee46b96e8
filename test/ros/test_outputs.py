"""Outputs of the node for an image: values, headers, pictures, markers, detections."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pytest

pytest.importorskip("rclpy")

from diagnostic_msgs.msg import DiagnosticStatus
from sensor_msgs.msg import CameraInfo
from std_msgs.msg import Header, String
from visualization_msgs.msg import Marker
from worlds.ros import (
    HW,
    SUCCESS,
    TOPICS,
    bench,
    build_monitor,
    frame,
    nominal_image,
    odd_image,
    offline_detector,
    parameters,
    two_cameras,
    values_of,
)

from semantic_anomaly.io.images import decode_compressed
from semantic_anomaly.ros import messages, outputs
from semantic_anomaly.ros.messages import image_message
from semantic_anomaly.structures import Localization, NominalExample


def pixels(message: Any, dtype: Any) -> np.ndarray:
    assert message.step == message.width * np.dtype(dtype).itemsize
    return np.frombuffer(message.data, dtype).reshape(message.height, message.width)


def test_an_anomalous_image_gives_the_results_of_the_detector(values: dict[str, Any]) -> None:
    image = odd_image()
    with bench(values) as b:
        b.start(*TOPICS)
        sent = b.send(image)
        status = b.answer_message(sent)
        b.spin_until(lambda: all(b.got["camera"].values()))
        got = {topic: received[-1] for topic, received in b.got["camera"].items()}
    detector = offline_detector(values)
    expected = detector.detect(frame(image, sent))
    reported = values_of(status.status[0])

    # What the commands evaluate is what the node runs.
    assert abs(float(reported["score"]) - expected.score) < 1e-6
    # The message has float32.
    assert got["score"].data == pytest.approx(expected.score, rel=1e-6)
    assert expected.threshold is not None and expected.p_value is not None
    assert abs(float(reported["threshold"]) - expected.threshold) < 1e-9
    assert abs(float(reported["p_value"]) - expected.p_value) < 1e-9
    assert reported["decision"] == expected.decision.value == "anomaly"
    assert status.status[0].level == DiagnosticStatus.WARN
    for stage in ("latency", "decode", "prepare", "forward", "search", "score", "localize"):
        assert float(reported[f"{stage}_ms"]) > 0
    assert reported["coarse"] == str(expected.coarse)

    heat = expected.scale.normalise(expected.heatmap)
    np.testing.assert_allclose(pixels(got["heatmap"], np.float32), heat, atol=1e-4)
    np.testing.assert_array_equal(pixels(got["mask"], np.uint16), expected.label_map)
    assert got["mask"].encoding == "mono16" and got["heatmap"].encoding == "32FC1"
    assert got["overlay"].encoding == "rgb8"
    drawn = np.frombuffer(got["overlay"].data, np.uint8).reshape(*HW, 3)
    jpeg = decode_compressed(got["overlay/compressed"].data, got["overlay/compressed"].format)
    assert np.abs(drawn.astype(int) - jpeg).mean() < 12

    localizations = json.loads(reported["localizations"])
    assert len(localizations) == len(expected.localizations) >= 1
    assert localizations[0]["box_xyxy"] == pytest.approx(
        expected.localizations[0].box_xyxy, abs=0.01
    )
    assert localizations[0]["nearest"]["frame"] == expected.localizations[0].nearest.frame
    markers = got["markers"].markers
    assert markers[0].action == Marker.DELETEALL
    assert len(markers) == 1 + 2 * len(localizations)

    for topic, message in got.items():
        if topic == "markers":
            assert all(marker.header == sent.header for marker in message.markers)
        elif topic != "score":
            assert message.header == sent.header, topic


def test_a_nominal_image_is_quiet(values: dict[str, Any]) -> None:
    with bench(values) as b:
        b.start("status", "mask", "markers")
        status = b.answer_message(b.send(nominal_image(10)))
        b.spin_until(lambda: b.got["camera"]["markers"] and b.got["camera"]["mask"])
        [mask], [array] = b.got["camera"]["mask"], b.got["camera"]["markers"]
    reported = values_of(status.status[0])
    assert status.status[0].level == DiagnosticStatus.OK
    assert reported["decision"] == "nominal" and reported["localizations"] == "[]"
    assert [marker.action for marker in array.markers] == [Marker.DELETEALL]
    assert not pixels(mask, np.uint16).any()


def test_an_uncalibrated_index_gives_scores_but_no_decision(
    tmp_path: Path, tiny_backbone: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    index = build_monitor(tmp_path, tiny_backbone, calibrated=False)
    with bench(parameters(index, tiny_backbone)) as b:
        b.start("status", "score")
        status = b.answer_message(b.send(odd_image()))
        b.spin_until(lambda: b.got["camera"]["score"])
    reported = values_of(status.status[0])
    assert reported["decision"] == "unknown" and "uncalibrated" in reported["reason"]
    assert status.status[0].level == DiagnosticStatus.ERROR
    assert float(reported["score"]) > 0
    assert "threshold" not in reported and "p_value" not in reported
    assert "not calibrated" in capfd.readouterr().err


def test_pictures_without_a_subscriber_are_not_drawn(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def draw(*args: Any) -> Any:
        drawn.append(args)
        return original(*args)

    original = outputs.draw_overlay
    monkeypatch.setattr(outputs, "draw_overlay", draw)
    with bench(values) as b:
        b.start("status")
        b.answer(b.send(odd_image()))
        # Pictures come after the status; deactivation waits for them.
        assert b.node.trigger_deactivate() == SUCCESS
        assert not drawn
        b.listen("overlay")
        assert b.node.trigger_activate() == SUCCESS
        b.spin_until(b.connected)
        b.send(odd_image(3))
        b.spin_until(lambda: b.got["camera"]["overlay"])
    assert len(drawn) == 1


def test_two_cameras_of_different_sizes_get_their_own_results(values: dict[str, Any]) -> None:
    both = two_cameras(values, "left", "right")
    small, large = odd_image(5), cv2.resize(nominal_image(6), (280, 168))
    with bench(both, ("left", "right")) as b:
        b.start("status")
        b.publisher("/left/image")
        b.publisher("/right/image")
        sent = {"left": b.send(small, "/left/image"), "right": b.send(large, "/right/image")}
        reported = {camera: b.answer(message, camera) for camera, message in sent.items()}
    for camera, image in (("left", small), ("right", large)):
        expected = offline_detector(both, camera).detect(frame(image, sent[camera]))
        assert abs(float(reported[camera]["score"]) - expected.score) < 1e-6
        assert reported[camera]["decision"] == expected.decision.value


class VisionMessage:
    """Stands in for a class of vision_msgs, with the fields of its .msg file and no others."""

    FIELDS: ClassVar[dict[str, Any]] = {}

    def __init__(self, **values: Any) -> None:
        for name, default in self.FIELDS.items():
            object.__setattr__(self, name, values.pop(name, default() if default else None))
        assert not values

    def __setattr__(self, name: str, value: Any) -> None:
        assert name in self.FIELDS, name
        object.__setattr__(self, name, value)


def fake_vision_msgs(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("vision_msgs.msg")

    def kind(name: str, **fields: Any) -> Any:
        message_class = type(name, (VisionMessage,), {"FIELDS": fields})
        setattr(module, name, message_class)
        return message_class

    point = kind("Point2D", x=float, y=float)
    pose = kind("Pose2D", position=point, theta=float)
    box = kind("BoundingBox2D", center=pose, size_x=float, size_y=float)
    hypothesis = kind("ObjectHypothesis", class_id=str, score=float)
    kind("ObjectHypothesisWithPose", hypothesis=hypothesis, pose=None)
    kind("Detection2D", header=None, results=list, bbox=box, id=str)
    kind("Detection2DArray", header=None, detections=list)
    package: Any = types.ModuleType("vision_msgs")
    package.msg = module
    monkeypatch.setitem(sys.modules, "vision_msgs", package)
    monkeypatch.setitem(sys.modules, "vision_msgs.msg", module)


def test_detections_have_their_boxes_around_pixel_centres(monkeypatch: pytest.MonkeyPatch) -> None:
    assert messages.detection_array_type() is None, "vision_msgs is not among the wheels"
    fake_vision_msgs(monkeypatch)
    assert messages.detection_array_type() is sys.modules["vision_msgs.msg"].Detection2DArray
    nearest = NominalExample("n/0.png", 0, 0, (6, 10), 0.5)
    localization = Localization((10, 20, 14, 30), (12, 25), 40, 0.75, nearest, 3)
    header = Header(frame_id="front_optical")
    array = messages.detections_message(header, [localization])
    [detection] = array.detections
    assert array.header == detection.header == header and detection.id == "3"
    # Pixels 10 to 13 and 20 to 29.
    assert (detection.bbox.center.position.x, detection.bbox.center.position.y) == (11.5, 24.5)
    assert (detection.bbox.size_x, detection.bbox.size_y) == (4.0, 10.0)
    [result] = detection.results
    assert (result.hypothesis.class_id, result.hypothesis.score) == ("anomaly", 0.75)


def test_detections_are_published_where_vision_msgs_is_installed(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Any message does for the topic; the fields are the test above.
    def message(header: Header, localizations: Any) -> String:
        return String(data=f"{header.frame_id} {len(localizations)}")

    monkeypatch.setattr(messages, "detection_array_type", lambda: String)
    monkeypatch.setattr(messages, "detections_message", message)
    received: list[String] = []
    with bench(values) as b:
        b.helper.create_subscription(
            String, "/semantic_anomaly/camera/detections", received.append, 10
        )
        b.start("status")
        b.answer(b.send(nominal_image(10)))
        b.spin_until(lambda: received)
    assert received[0].data == "front_optical 0"


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
