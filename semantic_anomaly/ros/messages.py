"""Messages to arrays and back, both directions; the only file that knows message fields.

Pure functions without state: any thread may call them.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from sensor_msgs.msg import CameraInfo, CompressedImage, Image
from std_msgs.msg import Float32, Header

from semantic_anomaly.detection.geometry import Intrinsics
from semantic_anomaly.errors import ImageError
from semantic_anomaly.io.images import (
    UnsupportedEncodingError,
    decode_compressed,
    decode_depth,
    decode_raw,
    encode_jpeg,
)
from semantic_anomaly.structures import Frame, Localization

# numpy's dtype and channels of the encodings that are published.
_PUBLISHED = {
    "rgb8": (np.uint8, 3),
    "mono8": (np.uint8, 1),
    "mono16": (np.uint16, 1),
    "32FC1": (np.float32, 1),
}


def stamp_ns(header: Header) -> int:
    """Return a header's stamp in nanoseconds; unlike rclpy's Time it takes negative seconds."""
    return int(header.stamp.sec) * 1_000_000_000 + int(header.stamp.nanosec)


def frame_of(message: Image | CompressedImage, name: str = "") -> Frame:
    """Return the frame that an image message holds.

    Raises:
        ImageError: the image is damaged, or its encoding is unknown here and to cv_bridge.
    """
    if isinstance(message, CompressedImage):
        image = decode_compressed(message.data, message.format)
    else:
        image = _decode(message)
    return Frame(image, stamp_ns(message.header), message.header.frame_id, name)


def depth_of(message: Image) -> np.ndarray:
    """Return (height, width) float32 metres, 0 where there is none.

    Raises:
        ImageError: another encoding than 32FC1 and 16UC1, or a damaged image.
    """
    size = (message.height, message.width, message.step)
    return decode_depth(message.encoding, *size, bool(message.is_bigendian), message.data)


def intrinsics_of(message: CameraInfo) -> Intrinsics:
    """Return the projection in a CameraInfo; matrix K and distortion D, not the rectified P.

    Raises:
        ImageError: not calibrated (K is zero) or not finite.
    """
    k, binning = message.k, (max(1, message.binning_y), max(1, message.binning_x))
    if message.roi.width or message.roi.height:
        raise ImageError("camera info: expected the full image, found a region of interest (roi)")
    made = Intrinsics(
        *(float(k[0]), float(k[4]), float(k[2]), float(k[5])),
        (int(message.height), int(message.width)),
        tuple(float(d) for d in message.d),
        message.distortion_model == "equidistant",
    )
    # K holds for the full sensor, the image is smaller by the binning.
    height, width = made.image_hw
    return made.scaled_to((height // binning[0], width // binning[1]))


def image_message(pixels: np.ndarray, encoding: str, header: Header | None = None) -> Image:
    """Return an Image message.

    Args:
        pixels: (height, width) or (height, width, 3) of the encoding's dtype.
        encoding: rgb8, mono8, mono16 or 32FC1.
        header: used verbatim.

    Raises:
        ImageError: shape or dtype do not fit the encoding.
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
    # What image_transport writes for JPEG of a colour image.
    message = CompressedImage(header=header, format="rgb8; jpeg compressed bgr8")
    message.data = array("B", encode_jpeg(rgb, quality))
    return message


def score_message(score: float) -> Float32:
    """Return a score; numpy scalars would arrive as 0."""
    return Float32(data=float(score))


def status_message(
    header: Header, name: str, level: bytes, text: str, values: Mapping[str, Any]
) -> DiagnosticArray:
    """Return one status with its values as text: floats in full precision, None left out."""
    status = DiagnosticStatus(level=level, name=name, message=text, hardware_id="")
    status.values = [
        KeyValue(key=key, value=_text(value)) for key, value in values.items() if value is not None
    ]
    return DiagnosticArray(header=header, status=[status])


def diagnostics_message(stamp: Any, statuses: Iterable[DiagnosticArray]) -> DiagnosticArray:
    """Return the statuses of several cameras as one message."""
    message = DiagnosticArray(status=[one for array in statuses for one in array.status])
    message.header.stamp = stamp
    return message


def localizations_json(localizations: Sequence[Localization]) -> str:
    """Return localizations as JSON: box, score, area, state, track, nearest example."""
    rows = [
        {
            "label": int(found.label),
            "box_xyxy": [round(float(edge), 2) for edge in found.box_xyxy],
            "centroid_xy": [round(float(place), 2) for place in found.centroid_xy],
            "area_px": int(found.area_px),
            "state": found.state.value,
            "track": int(found.track),
            "score": float(found.score),
            "nearest": {
                "frame": found.nearest.frame,
                "row": int(found.nearest.row),
                "col": int(found.nearest.col),
                "grid_hw": [int(side) for side in found.nearest.grid_hw],
                "distance": float(found.nearest.distance),
            },
        }
        for found in localizations
    ]
    return json.dumps(rows)


def _text(value: Any) -> str:
    return repr(float(value)) if isinstance(value, (float, np.floating)) else str(value)


def _decode(message: Image) -> np.ndarray:
    size = (message.height, message.width, message.step)
    try:
        return decode_raw(message.encoding, *size, bool(message.is_bigendian), message.data)
    except UnsupportedEncodingError as error:
        return _decode_by_cv_bridge(message, error)


def _decode_by_cv_bridge(message: Image, unsupported: UnsupportedEncodingError) -> np.ndarray:
    # Imported late: builds of cv_bridge for another NumPy fail at import, in many ways.
    try:
        from cv_bridge import CvBridge
    except Exception as error:
        raise ImageError(f"{unsupported}; cv_bridge cannot be used: {error}") from error
    try:
        return np.asarray(CvBridge().imgmsg_to_cv2(message, desired_encoding="rgb8"))
    except Exception as error:
        raise ImageError(f"{unsupported}; cv_bridge refused it: {error}") from error
