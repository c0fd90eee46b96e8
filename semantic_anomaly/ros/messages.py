"""Conversion of messages to arrays and of results to messages; no other file knows message fields.

Functions without state: any thread may call them.
"""

from __future__ import annotations

import json
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from builtin_interfaces.msg import Duration
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from geometry_msgs.msg import Point, Pose, Quaternion, Vector3
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import ColorRGBA, Float32, Header
from visualization_msgs.msg import Marker, MarkerArray

from semantic_anomaly.detection.geometry import ASSUMED, Intrinsics, PlacedBox
from semantic_anomaly.errors import ImageError
from semantic_anomaly.io.images import (
    UnsupportedEncodingError,
    decode_compressed,
    decode_depth,
    decode_raw,
    encode_jpeg,
)
from semantic_anomaly.io.remarks import Remarks
from semantic_anomaly.structures import ComponentState, Frame, Localization
from semantic_anomaly.timing import elapsed_ms

# dtype and channels of the encodings that are published.
_PUBLISHED = {
    "rgb8": (np.uint8, 3),
    "mono8": (np.uint8, 1),
    "mono16": (np.uint16, 1),
    "32FC1": (np.float32, 1),
}
# Vermilion and yellow of Okabe and Ito's palette, distinguishable with any colour vision.
_COLOURS = {
    ComponentState.CONFIRMED: ColorRGBA(r=0.835, g=0.369, b=0.0, a=1.0),
    ComponentState.CANDIDATE: ColorRGBA(r=0.941, g=0.894, b=0.259, a=0.8),
}
_LINE_M, _TEXT_M = 0.05, 0.4
_EDGES = ((0, 1), (1, 2), (2, 3), (3, 0))


def stamp_ns(header: Header) -> int:
    """Return the stamp of a header in nanoseconds; unlike rclpy's Time it may be negative."""
    return int(header.stamp.sec) * 1_000_000_000 + int(header.stamp.nanosec)


def frame_of(message: Image | CompressedImage, name: str = "") -> Frame:
    """Return the frame of an image message.

    Raises:
        ImageError: a damaged image, or an encoding that neither this package nor cv_bridge knows.
    """
    begin_s = time.perf_counter()
    if isinstance(message, CompressedImage):
        image = decode_compressed(message.data, message.format)
    else:
        try:
            image = decode_raw(*_raw_image(message))
        except UnsupportedEncodingError as error:
            image = _decode_by_cv_bridge(message, error)
    frame_id, decode_ms = message.header.frame_id, elapsed_ms(begin_s)
    return Frame(image, stamp_ns(message.header), frame_id, name, decode_ms)


def remark(message: Image | CompressedImage, remarks: Remarks) -> None:
    """Look at a message that was decoded for values that decoding reinterprets."""
    if isinstance(message, CompressedImage):
        remarks.on_compressed(message.data)
    else:
        encoding, height, width, step, _, data = _raw_image(message)
        remarks.on_raw(encoding, height, width, step, data)


def depth_of(message: Image) -> np.ndarray:
    """Return (height, width) float32 metres, 0 without a measurement.

    Raises:
        ImageError: another encoding than 32FC1 and 16UC1, or a damaged image.
    """
    return decode_depth(*_raw_image(message))


def intrinsics_of(message: CameraInfo) -> Intrinsics:
    """Return the projection of a CameraInfo: matrix K and distortion D, not the rectified P.

    Raises:
        ImageError: not calibrated (K is zero), not finite, or of a part of the image.
    """
    k, binning = message.k, (max(1, message.binning_y), max(1, message.binning_x))
    if message.roi.width or message.roi.height:
        raise ImageError("camera info: expected the full image, found a region of interest (roi)")
    full = Intrinsics(
        *(float(k[0]), float(k[4]), float(k[2]), float(k[5])),
        (int(message.height), int(message.width)),
        tuple(float(d) for d in message.d),
        message.distortion_model == "equidistant",
    )
    # K holds for the full sensor, the image is smaller by the binning.
    height, width = full.image_hw
    return full.scaled_to((height // binning[0], width // binning[1]))


def image_message(pixels: np.ndarray, encoding: str, header: Header | None = None) -> Image:
    """Return an Image message.

    Args:
        pixels: (height, width) or (height, width, 3) of the encoding's dtype.
        encoding: rgb8, mono8, mono16 or 32FC1.
        header: used unchanged.

    Raises:
        ImageError: the shape or dtype does not fit the encoding.
    """
    dtype, channels = _PUBLISHED[encoding]
    shape = pixels.shape if channels > 1 else (*pixels.shape, 1)
    if pixels.dtype != dtype or len(shape) != 3 or shape[2] != channels:
        raise ImageError(
            f"image to publish: expected {channels} x {np.dtype(dtype)} for {encoding}, "
            f"found shape {pixels.shape}, {pixels.dtype}"
        )
    height, width = int(shape[0]), int(shape[1])
    message = Image(height=height, width=width, encoding=encoding)
    message.header = header or message.header
    message.is_bigendian = int(sys.byteorder == "big")
    message.step = width * channels * np.dtype(dtype).itemsize
    # Lists and bytes are checked item by item on older distributions.
    message.data = array("B", np.ascontiguousarray(pixels).tobytes())
    return message


def jpeg_message(rgb: np.ndarray, header: Header, quality: int = 85) -> CompressedImage:
    """Return (height, width, 3) uint8 RGB as a CompressedImage message."""
    # The format that image_transport writes for a colour image.
    message = CompressedImage(header=header, format="rgb8; jpeg compressed bgr8")
    message.data = array("B", encode_jpeg(rgb, quality))
    return message


def score_message(score: float) -> Float32:
    """Return a score as a message."""
    # numpy scalars would arrive as 0.
    return Float32(data=float(score))


def diagnostic_status(
    name: str, level: bytes, text: str, values: Mapping[str, Any]
) -> DiagnosticStatus:
    """Return a status; values as text, floats in full precision, without those that are None."""
    status = DiagnosticStatus(level=level, name=name, message=text)
    status.values = [
        KeyValue(key=key, value=_text(value)) for key, value in values.items() if value is not None
    ]
    return status


def localizations_json(localizations: Sequence[Localization]) -> str:
    """Return localizations as JSON: box, score, area, state, track and nearest nominal patch."""
    rows = [
        {
            "label": localization.label,
            "box_xyxy": [round(float(edge), 2) for edge in localization.box_xyxy],
            "centroid_xy": [round(float(value), 2) for value in localization.centroid_xy],
            "area_px": localization.area_px,
            "state": localization.state.value,
            "track": localization.track,
            "score": localization.score,
            "nearest": asdict(localization.nearest),
        }
        for localization in localizations
    ]
    # JSON has no numpy scalars.
    return json.dumps(rows, default=np.generic.item)


def detection_array_type() -> Any | None:
    """Return vision_msgs/Detection2DArray, None if vision_msgs is not installed."""
    try:
        from vision_msgs.msg import Detection2DArray
    except ImportError:
        return None
    return Detection2DArray


def detections_message(header: Header, localizations: Sequence[Localization]) -> Any:
    """Return a Detection2DArray: class 'anomaly', with score and label of each localization."""
    from vision_msgs import msg

    array = msg.Detection2DArray(header=header)
    for localization in localizations:
        x0, y0, x1, y1 = (float(edge) for edge in localization.box_xyxy)
        box = msg.BoundingBox2D(size_x=x1 - x0, size_y=y1 - y0)
        # Boxes span pixel edges; ROS counts from pixel centres.
        box.center.position.x = (x0 + x1) / 2 - 0.5
        box.center.position.y = (y0 + y1) / 2 - 0.5
        hypothesis = msg.ObjectHypothesisWithPose()
        hypothesis.hypothesis.class_id = "anomaly"
        hypothesis.hypothesis.score = float(localization.score)
        detection = msg.Detection2D(header=header, bbox=box, id=str(localization.label))
        detection.results = [hypothesis]
        array.detections.append(detection)
    return array


def marker_array(header: Header, boxes: Sequence[tuple[Localization, PlacedBox]]) -> MarkerArray:
    """Return rviz markers: DELETEALL, then a box and a label for each localization.

    A box at an assumed range is joined to the camera by rays: only its direction is known.
    """
    markers = [Marker(header=header, action=Marker.DELETEALL)]
    for localization, box in boxes:
        outline = _marker(header, "boxes", localization.label, Marker.LINE_LIST)
        outline.scale = Vector3(x=_LINE_M)
        outline.color = _COLOURS[localization.state]
        corners = [_point(corner) for corner in box.corners]
        outline.points = [corners[end] for edge in _EDGES for end in edge]
        if box.range_source == ASSUMED:
            outline.points += [end for corner in corners for end in (Point(), corner)]
        label = _marker(header, "labels", localization.label, Marker.TEXT_VIEW_FACING)
        label.scale = Vector3(z=_TEXT_M)
        label.color = ColorRGBA(r=1.0, g=1.0, b=1.0, a=1.0)
        x, y, z = box.corners[:2].mean(axis=0)
        # y points down in the optical frame.
        label.pose.position = _point((x, y - _TEXT_M, z))
        label.text = f"{localization.score:.2f}  {box.range_m:.1f} m ({box.range_source})"
        if localization.state is ComponentState.CANDIDATE:
            label.text += "  candidate"
        markers += [outline, label]
    return MarkerArray(markers=markers)


def _marker(header: Header, namespace: str, label: int, marker_type: int) -> Marker:
    return Marker(
        header=header,
        ns=namespace,
        id=int(label),
        type=marker_type,
        action=Marker.ADD,
        pose=Pose(orientation=Quaternion(w=1.0)),
        lifetime=Duration(sec=1),
    )


def _point(xyz: Sequence[float]) -> Point:
    return Point(x=float(xyz[0]), y=float(xyz[1]), z=float(xyz[2]))


def _text(value: Any) -> str:
    return repr(float(value)) if isinstance(value, (float, np.floating)) else str(value)


def _raw_image(message: Image) -> tuple[str, int, int, int, bool, Any]:
    """Return the arguments of `decode_raw` and `decode_depth`."""
    size = (message.height, message.width, message.step)
    return message.encoding, *size, bool(message.is_bigendian), message.data


def _decode_by_cv_bridge(message: Image, unsupported: UnsupportedEncodingError) -> np.ndarray:
    # Builds of cv_bridge for another NumPy fail at import, in several ways.
    try:
        from cv_bridge import CvBridge
    except Exception as error:
        raise ImageError(f"{unsupported}; cv_bridge cannot be used: {error}") from error
    try:
        return np.asarray(CvBridge().imgmsg_to_cv2(message, desired_encoding="rgb8"))
    except Exception as error:
        raise ImageError(f"{unsupported}; cv_bridge refused it: {error}") from error
