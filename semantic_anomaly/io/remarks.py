"""Warnings about values that decoding reinterprets: YUV of full range, and alpha.

Both are read by one fixed rule, so that index, calibration and camera agree. An image that shows
that the rule does not fit is worth a warning, once for a source or camera.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np

from semantic_anomaly.io.images import BytesLike

# Frames of a source that are looked at.
_FRAMES = 20
# Limited range is 16 to 235; sharpening of a camera goes beyond it in a few pixels.
_LOW, _HIGH, _SHARE = 12, 240, 0.01
# The first byte of luma in a row, and the step to the next.
_LUMA = {"uyvy": (1, 2), "yuv422": (1, 2), "yuyv": (0, 2), "yuv422_yuy2": (0, 2)}
_PLANAR = ("nv12", "nv21")
_ALPHA_BYTES = {"rgba8": 1, "bgra8": 1, "8UC4": 1, "rgba16": 2, "bgra16": 2, "16UC4": 2}
_ALPHA_SUFFIXES = (".png", ".webp", ".tif", ".tiff")
FULL_RANGE = (
    "YUV images seem to have the full range 0 to 255; they are read as limited range 16 to 235, so "
    "dark and bright parts lose their contrast. Set the driver to limited range or RGB, the same "
    "for index, calibration and camera"
)
ALPHA = (
    "images have transparent pixels; alpha is dropped, and the colours below it are scored. "
    "Convert the images to RGB if that is not meant, the same for index, calibration and camera"
)


class Remarks:
    """Looks at the first decoded images of a source or camera, and warns once of each problem.

    Args:
        warn: takes the text of a warning.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._left = _FRAMES
        self._said: set[str] = set()

    def on_raw(self, encoding: str, height: int, width: int, step: int, data: BytesLike) -> None:
        """Look at a raw image that was decoded; the fields are those of sensor_msgs/Image."""
        is_yuv = encoding in _LUMA or encoding in _PLANAR
        if not (is_yuv or encoding in _ALPHA_BYTES) or not self._is_due():
            return
        rows = np.frombuffer(data, np.uint8).reshape(-1, step)[:height]
        if is_yuv:
            first, every = _LUMA.get(encoding, (0, 1))
            luma = rows[:, first : width * every : every]
            if np.mean((luma < _LOW) | (luma > _HIGH)) > _SHARE:
                self._say(FULL_RANGE)
            return
        size = _ALPHA_BYTES[encoding]
        alpha = rows[:, : width * 4 * size].reshape(height, width, 4 * size)[..., 3 * size :]
        if (alpha != 255).any():
            self._say(ALPHA)

    def on_compressed(self, data: BytesLike) -> None:
        """Look at a compressed image that was decoded."""
        content = np.frombuffer(data, np.uint8)
        if not _may_have_alpha(content[:4096].tobytes()) or not self._is_due():
            return
        image = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
        if image is None or image.ndim != 3 or image.shape[2] != 4:
            return
        if (image[..., 3] != np.iinfo(image.dtype).max).any():
            self._say(ALPHA)

    def on_file(self, path: Path) -> None:
        """Look at an image file that was decoded."""
        if path.suffix.lower() in _ALPHA_SUFFIXES and self._left > 0:
            with suppress(OSError):
                self.on_compressed(path.read_bytes())

    def _is_due(self) -> bool:
        self._left -= 1
        return self._left >= 0

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._warn(text)


def _may_have_alpha(head: bytes) -> bool:
    """Return whether the first bytes of a whole image leave room for alpha.

    That of BMP is mostly unused bytes, and of other formats there is none.
    """
    if head[:4] == b"\x89PNG":
        return head[25] in (4, 6) or b"tRNS" in head
    if head[8:12] == b"WEBP":
        flags = {b"VP8X": head[20] & 0x10, b"VP8L": head[24] & 0x10}
        return bool(flags.get(head[12:16], 0))
    return head[:4] in (b"II*\0", b"MM\0*")
