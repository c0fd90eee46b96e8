"""Messages to arrays and back; what is published survives the wire."""

from __future__ import annotations

import json
import sys
import types
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

from diagnostic_msgs.msg import DiagnosticStatus
from rclpy.serialization import deserialize_message, serialize_message
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Float32, Header

from semantic_anomaly.detection.geometry import Intrinsics
from semantic_anomaly.errors import ImageError
from semantic_anomaly.io.images import encode_png
from semantic_anomaly.ros import messages
from semantic_anomaly.structures import Localization, NominalExample


def over_the_wire(message: Any) -> Any:
    return deserialize_message(serialize_message(message), type(message))


@pytest.fixture
def rgb(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (6, 10, 3), dtype=np.uint8)


def header() -> Header:
    message_header = Header(frame_id="front_optical")
    message_header.stamp.sec, message_header.stamp.nanosec = -3, 250_000_000
    return message_header


@pytest.mark.parametrize("value", [0.93, np.float32(0.93), np.float64(0.93), np.array(0.93)])
def test_scores_of_any_number_type_arrive(value: Any) -> None:
    # Unconverted, rclpy serialises all but a float as 0.0.
    assert over_the_wire(messages.score_message(value)).data == pytest.approx(0.93)
    assert isinstance(messages.score_message(value), Float32)


def test_stamps_before_the_epoch_are_numbers() -> None:
    assert messages.stamp_ns(header()) == -2_750_000_000


@pytest.mark.parametrize(
    ("encoding", "dtype", "channels"),
    [("rgb8", "u1", 3), ("mono8", "u1", 1), ("mono16", "u2", 1), ("32FC1", "f4", 1)],
)
def test_published_images_hold_their_pixels(
    encoding: str, dtype: str, channels: int, rng: np.random.Generator
) -> None:
    shape = (6, 10, 3) if channels == 3 else (6, 10)
    pixels = (rng.random(shape) * 200).astype(dtype)
    # Not contiguous, as slices are.
    wide = np.repeat(pixels, 2, axis=1)[:, ::2]
    message = over_the_wire(messages.image_message(wide, encoding, header()))
    assert (message.height, message.width, message.encoding) == (6, 10, encoding)
    assert message.step == 10 * channels * np.dtype(dtype).itemsize
    assert message.header == header() and message.is_bigendian == (sys.byteorder == "big")
    np.testing.assert_array_equal(np.frombuffer(message.data, dtype).reshape(shape), pixels)


@pytest.mark.parametrize(
    ("pixels", "encoding"),
    [
        (np.zeros((4, 4), np.float64), "32FC1"),
        (np.zeros((4, 4), np.uint8), "rgb8"),
        (np.zeros((4, 4, 4), np.uint8), "rgb8"),
        (np.zeros((4, 4, 3), np.uint16), "mono16"),
    ],
)
def test_pixels_that_do_not_fit_the_encoding_are_refused(pixels: np.ndarray, encoding: str) -> None:
    with pytest.raises(ImageError, match="expected"):
        messages.image_message(pixels, encoding)


def test_frames_come_from_raw_and_compressed_messages(rgb: np.ndarray) -> None:
    raw = over_the_wire(messages.image_message(rgb, "rgb8", header()))
    packed = CompressedImage(header=header(), format="png", data=encode_png(rgb))
    for message in (raw, over_the_wire(packed)):
        frame = messages.frame_of(message, "front/1")
        np.testing.assert_array_equal(frame.image, rgb)
        assert (frame.stamp_ns, frame.frame_id) == (-2_750_000_000, "front_optical")
        assert frame.name == "front/1"


def test_rgb8_is_not_copied(rgb: np.ndarray) -> None:
    message = messages.image_message(rgb, "rgb8")
    image = messages.frame_of(message).image
    assert np.shares_memory(image, np.frombuffer(message.data, np.uint8))


def test_bgr8_and_padded_rows(rgb: np.ndarray) -> None:
    padded = np.zeros((6, 37), np.uint8)
    padded[:, :30] = rgb[..., ::-1].reshape(6, 30)
    message = Image(height=6, width=10, encoding="bgr8", step=37, data=padded.tobytes())
    np.testing.assert_array_equal(messages.frame_of(message).image, rgb)


def test_an_unknown_encoding_is_named() -> None:
    message = Image(height=2, width=2, encoding="rgb5", step=4, data=bytes(8))
    with pytest.raises(ImageError, match=r"'rgb5' is not supported.*cv_bridge cannot be used"):
        messages.frame_of(message)


def test_cv_bridge_decodes_other_encodings(
    monkeypatch: pytest.MonkeyPatch, rgb: np.ndarray
) -> None:
    asked = []

    def convert(_: Any, message: Image, desired_encoding: str) -> np.ndarray:
        asked.append((message.encoding, desired_encoding))
        if message.encoding == "rgb4":
            raise RuntimeError("no conversion")
        return rgb

    module: Any = types.ModuleType("cv_bridge")
    module.CvBridge = type("CvBridge", (), {"imgmsg_to_cv2": convert})
    monkeypatch.setitem(sys.modules, "cv_bridge", module)
    message = Image(height=6, width=10, encoding="rgb5", step=20, data=bytes(120))
    np.testing.assert_array_equal(messages.frame_of(message).image, rgb)
    assert asked == [("rgb5", "rgb8")]
    # What is known here never goes there.
    messages.frame_of(messages.image_message(rgb, "rgb8"))
    assert len(asked) == 1
    message.encoding = "rgb4"
    with pytest.raises(ImageError, match=r"'rgb4'.*no conversion"):
        messages.frame_of(message)


def camera_info(**changes: Any) -> CameraInfo:
    info = CameraInfo(height=480, width=640, distortion_model="plumb_bob")
    info.k = [500.0, 0.0, 320.0, 0.0, 510.0, 240.0, 0.0, 0.0, 1.0]
    for name, value in changes.items():
        setattr(info, name, value)
    return info


def test_intrinsics_come_from_k_and_d() -> None:
    distortion = (0.1, 0.01, 0.0, 0.0, 0.0)
    expected = Intrinsics(500.0, 510.0, 320.0, 240.0, (480, 640), distortion, fisheye=False)
    assert messages.intrinsics_of(camera_info(d=list(distortion))) == expected
    assert messages.intrinsics_of(camera_info(distortion_model="equidistant")).fisheye


def test_binned_images_have_smaller_intrinsics() -> None:
    intrinsics = messages.intrinsics_of(camera_info(binning_x=2, binning_y=2))
    assert intrinsics.image_hw == (240, 320) and intrinsics.fx == 250.0 and intrinsics.cx == 159.75


def test_uncalibrated_camera_info_is_refused() -> None:
    with pytest.raises(ImageError, match="focal"):
        messages.intrinsics_of(camera_info(k=[0.0] * 9))
    with pytest.raises(ImageError, match="roi"):
        info = camera_info()
        info.roi.width = 100
        messages.intrinsics_of(info)


def test_depth_messages_are_metres() -> None:
    millimetres = np.array([[0, 1500], [250, 65535]], "<u2")
    message = Image(height=2, width=2, encoding="16UC1", step=4, data=millimetres.tobytes())
    expected = [[0.0, 1.5], [0.25, 65.535]]
    np.testing.assert_allclose(messages.depth_of(message), expected, rtol=1e-6)


def test_a_status_holds_text_in_full_precision_and_no_empty_values() -> None:
    values = {"score": np.float32(0.1), "p_value": None, "frames": np.int64(3), "reason": ""}
    sent = messages.diagnostic_status("n: c", DiagnosticStatus.WARN, "anomaly", values)
    received = over_the_wire(sent)
    assert received.level == DiagnosticStatus.WARN
    values_by_key = {pair.key: pair.value for pair in received.values}
    assert np.float32(values_by_key["score"]) == np.float32(0.1)
    assert values_by_key["frames"] == "3" and values_by_key["reason"] == ""
    assert "p_value" not in values_by_key


def test_localizations_are_json_of_plain_numbers() -> None:
    nearest = NominalExample("drive/3.png", np.int64(2), 5, (6, 10), np.float32(0.25), stage=1)  # type: ignore[arg-type]
    localization = Localization((1.0, 2.0, 5.5, 7.0), (3.0, 4.0), np.int64(12), 0.75, nearest, 1)  # type: ignore[arg-type]
    [row] = json.loads(messages.localizations_json([localization]))
    assert row["box_xyxy"] == [1.0, 2.0, 5.5, 7.0] and row["area_px"] == 12
    expected = {"frame": "drive/3.png", "row": 2, "col": 5, "grid_hw": [6, 10], "distance": 0.25}
    assert row["nearest"] == {**expected, "stage": 1}
