"""Geometry: from pixels to rays and boxes in a camera's optical frame (x right, y down, z forward).

Integer pixel coordinates are pixel centres, as in CameraInfo. Ranges are depths along z.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np

from semantic_anomaly.errors import ImageError
from semantic_anomaly.structures import Localization

GROUND_LIMIT_M = 100.0
# No sensor measures more; larger values mark what is not known, and their sums overflow.
DEPTH_LIMIT_M = 1000.0
MIN_DEPTH_SHARE = 0.05
MEASURED = "measured"
GROUND = "ground"
ASSUMED = "assumed"
# Numbers of distortion coefficients that OpenCV takes.
PINHOLE_COEFFICIENTS, FISHEYE_COEFFICIENTS = (4, 5, 8, 12, 14), (4,)


@dataclass(frozen=True)
class Intrinsics:
    """A camera's projection.

    Attributes:
        fx, fy, cx, cy: pinhole parameters in pixels.
        image_hw: (height, width) in pixels of the image they refer to.
        distortion: coefficients in OpenCV's order, empty for none.
        fisheye: whether the coefficients are those of the equidistant model.

    Raises:
        ImageError: not finite, a focal length or size that is not positive, or another number of
            coefficients than OpenCV takes.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    image_hw: tuple[int, int]
    distortion: tuple[float, ...] = ()
    fisheye: bool = False

    def __post_init__(self) -> None:
        numbers = (self.fx, self.fy, self.cx, self.cy, *self.distortion)
        if not all(map(math.isfinite, numbers)) or min(self.fx, self.fy, *self.image_hw) <= 0:
            raise ImageError(
                "camera info: expected finite numbers, positive focal lengths and size, found "
                f"fx {self.fx:g}, fy {self.fy:g}, cx {self.cx:g}, cy {self.cy:g}, "
                f"{self.image_hw[1]}x{self.image_hw[0]}"
            )
        counts = FISHEYE_COEFFICIENTS if self.fisheye else PINHOLE_COEFFICIENTS
        if any(self.distortion) and len(self.distortion) not in counts:
            raise ImageError(
                "camera info: expected distortion coefficients in number "
                f"{' or '.join(map(str, counts))}, found {len(self.distortion)}"
            )

    @classmethod
    def assumed(cls, image_hw: tuple[int, int]) -> Intrinsics:
        """Return an ideal lens with a horizontal field of view of 90 degrees."""
        height, width = image_hw
        return cls(width / 2, width / 2, (width - 1) / 2, (height - 1) / 2, image_hw)

    def scaled_to(self, image_hw: tuple[int, int]) -> Intrinsics:
        """Return the projection of the same view at another image size."""
        if image_hw == self.image_hw:
            return self
        y, x = image_hw[0] / self.image_hw[0], image_hw[1] / self.image_hw[1]
        # Pixel edges scale by the ratio, centres do not.
        cx, cy = (self.cx + 0.5) * x - 0.5, (self.cy + 0.5) * y - 0.5
        return replace(self, fx=self.fx * x, fy=self.fy * y, cx=cx, cy=cy, image_hw=image_hw)


def pixel_rays(pixels_xy: np.ndarray, intrinsics: Intrinsics) -> np.ndarray:
    """Return (n, 3) float64 undistorted directions with z = 1 of (n, 2) pixel coordinates."""
    points = np.asarray(pixels_xy, np.float64).reshape(-1, 2)
    if any(intrinsics.distortion):
        matrix = np.array(
            [[intrinsics.fx, 0, intrinsics.cx], [0, intrinsics.fy, intrinsics.cy], [0, 0, 1.0]]
        )
        undistort = cv2.fisheye.undistortPoints if intrinsics.fisheye else cv2.undistortPoints
        coefficients = np.array(intrinsics.distortion, np.float64)
        normalised = undistort(points[:, None], matrix, coefficients)[:, 0]
    else:
        normalised = (points - (intrinsics.cx, intrinsics.cy)) / (intrinsics.fx, intrinsics.fy)
    return np.column_stack([normalised, np.ones(len(points))])


def ground_range(ray: np.ndarray, camera_height_m: float) -> float | None:
    """Return the depth in metres at which a (3,) ray with z = 1 meets a flat ground.

    The camera is level. None above the horizon, beyond `GROUND_LIMIT_M`, or for a height of 0.
    """
    if camera_height_m <= 0 or ray[1] <= 0:
        return None
    depth_m = camera_height_m / float(ray[1])
    return depth_m if depth_m < GROUND_LIMIT_M else None


def measured_range(depth: np.ndarray, mask: np.ndarray) -> float | None:
    """Return the median depth in metres, None if less than `MIN_DEPTH_SHARE` of the mask has one.

    Args:
        depth: (h, w) float32 metres, none where it is 0 or above `DEPTH_LIMIT_M`; the view of the
            image at any size.
        mask: (height, width) bool at image size.
    """
    rows, cols = np.nonzero(mask)
    depths = depth[rows * depth.shape[0] // mask.shape[0], cols * depth.shape[1] // mask.shape[1]]
    depths = depths[(depths > 0) & (depths <= DEPTH_LIMIT_M)]
    if len(depths) < max(1.0, MIN_DEPTH_SHARE * len(rows)):
        return None
    return float(np.median(depths))


@dataclass(frozen=True, eq=False)
class PlacedBox:
    """A localization as an upright rectangle in the optical frame.

    Attributes:
        corners: (4, 3) float64 metres: left top, right top, right bottom, left bottom.
        range_m: their depth along z.
        range_source: `MEASURED`, `GROUND` or `ASSUMED`.
    """

    corners: np.ndarray
    range_m: float
    range_source: str


def place_box(
    localization: Localization,
    label_map: np.ndarray,
    intrinsics: Intrinsics,
    depth: np.ndarray | None,
    camera_height_m: float,
    marker_range_m: float,
) -> PlacedBox:
    """Place a localization at its measured depth, else on the ground, else at the assumed range.

    Args:
        localization: of the frame.
        label_map: (height, width) labels of the localizations.
        intrinsics: of an image of that size.
        depth: (h, w) float32 metres, 0 for none; None without a depth image.
        camera_height_m: of a level camera above a flat ground, 0 for unknown.
        marker_range_m: the assumed range.
    """
    # Boxes span pixel edges, which lie half a pixel before the centres.
    left, top, right, bottom = (edge - 0.5 for edge in localization.box_xyxy)
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    rays = pixel_rays(np.array([*corners, ((left + right) / 2, bottom)]), intrinsics)  # (5, 3)
    range_m = None
    if depth is not None:
        range_m, source = measured_range(depth, label_map == localization.label), MEASURED
    if range_m is None:
        range_m, source = ground_range(rays[4], camera_height_m), GROUND
    if range_m is None:
        range_m, source = marker_range_m, ASSUMED
    return PlacedBox(rays[:4] * range_m, range_m, source)
