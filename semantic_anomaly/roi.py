"""Region of interest and ego mask: the pixels and patches of an image that take part."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from reprlib import repr as short
from typing import Any

import cv2
import numpy as np

from semantic_anomaly.errors import ImageError, SettingsError
from semantic_anomaly.settings import CameraSettings
from semantic_anomaly.storage import read_file, sha256_bytes
from semantic_anomaly.structures import PatchGrid

# Polygons are compared on a grid of so many rows and columns.
_COMPARED_HW = (500, 500)
_CORNER_TYPES = [float, float], [int, int], [int, float], [float, int]


@dataclass(frozen=True)
class RegionOfInterest:
    """The part of a camera's image that takes part in index, score, calibration and localization.

    Attributes:
        polygon_xy: corners in relative image coordinates [0, 1]; empty for the whole image.
        ego_mask_png: content of a PNG whose non-zero pixels show the vehicle itself; empty: none.

    Raises:
        SettingsError: a polygon of no area, or partly outside the image.
        ImageError: the ego mask is not a whole PNG image.
    """

    polygon_xy: tuple[tuple[float, float], ...] = ()
    ego_mask_png: bytes = b""

    def __post_init__(self) -> None:
        # NaN fails both comparisons; integers of any size pass them before they are converted.
        expected = ""
        inside = all(0.0 <= number <= 1.0 for corner in self.polygon_xy for number in corner)
        corners = np.array(self.polygon_xy if inside else (), np.float64).reshape(-1, 2)
        if not inside:
            expected = "corners in relative image coordinates [0, 1]"
        elif len(corners) and cv2.contourArea(corners.astype(np.float32)) <= 0.0:
            expected = "at least 3 corners around some area"
        if expected:
            found = [list(corner) for corner in self.polygon_xy]
            raise SettingsError(f"region of interest: expected {expected}, found {short(found)}")
        if self.ego_mask_png:
            _ego_pixels(self.ego_mask_png)

    @classmethod
    def from_settings(cls, camera: CameraSettings) -> RegionOfInterest:
        """Make the region of a camera, reading its ego mask.

        Raises:
            ImageError: the ego mask cannot be read.
            SettingsError: nothing of the image is left.
        """
        numbers = camera.region_of_interest
        polygon = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        content = b""
        if camera.ego_mask:
            try:
                content = read_file(Path(camera.ego_mask).expanduser())
            except OSError as error:
                raise ImageError(f"ego mask '{camera.ego_mask}': {error.strerror}") from error
            if not content:
                raise ImageError(f"ego mask '{camera.ego_mask}' is empty")
        roi = cls(polygon, content)
        if not roi.pixel_mask((360, 640)).any():
            raise SettingsError("region of interest and ego mask leave no pixel of the image")
        return roi

    @property
    def is_whole_image(self) -> bool:
        """Return whether every pixel takes part."""
        return not self.polygon_xy and not self.ego_mask_png

    def pixel_mask(self, image_hw: tuple[int, int]) -> np.ndarray:
        """Return (height, width) bool, true where a pixel takes part."""
        return _pixel_mask(self, image_hw)

    def patch_mask(self, grid_hw: tuple[int, int], image_hw: tuple[int, int]) -> np.ndarray:
        """Return (rows, cols) bool, true where at least half of a patch takes part."""
        return _patch_mask(self, grid_hw, image_hw)

    def is_within(self, description: Mapping[str, Any]) -> bool:
        """Return whether the polygon lies inside that of a description; ego masks do not matter.

        Args:
            description: what `describe` returned.
        """
        outer = RegionOfInterest(tuple((x, y) for x, y in description["polygon_xy"]))
        inside = outer.pixel_mask(_COMPARED_HW)
        return bool(inside[RegionOfInterest(self.polygon_xy).pixel_mask(_COMPARED_HW)].all())

    @classmethod
    def checked_description(cls, values: Any) -> dict[str, Any]:
        """Return what `describe` returned and a file has stored.

        Raises:
            SettingsError: other keys or types, or a polygon as refused by the class.
        """
        if not isinstance(values, dict) or set(values) != {"polygon_xy", "ego_mask_sha256"}:
            raise SettingsError(
                "region of interest: expected polygon_xy and ego_mask_sha256, found "
                f"{short(values)}"
            )
        corners, digest = values["polygon_xy"], values["ego_mask_sha256"]
        pairs = isinstance(corners, list) and all(
            isinstance(corner, list) and [type(number) for number in corner] in _CORNER_TYPES
            for corner in corners
        )
        if not pairs or not isinstance(digest, str):
            raise SettingsError(
                "region of interest: expected corners of two numbers and a digest, found "
                f"{short(corners)} and {short(digest)}"
            )
        cls(tuple((x, y) for x, y in corners))
        return values

    def describe(self) -> dict[str, object]:
        """Return what manifests store and compare: the polygon and the ego mask's sha256."""
        digest = sha256_bytes(self.ego_mask_png) if self.ego_mask_png else ""
        return {"polygon_xy": [list(p) for p in self.polygon_xy], "ego_mask_sha256": digest}


# The size of a camera's images hardly ever changes.
@lru_cache(maxsize=32)
def _pixel_mask(roi: RegionOfInterest, image_hw: tuple[int, int]) -> np.ndarray:
    height, width = image_hw
    mask = np.full((height, width), not roi.polygon_xy, np.uint8)
    if roi.polygon_xy:
        # Relative coordinates span pixel edges; fillPoly counts from pixel centres.
        corners = np.array(roi.polygon_xy) * (width, height) - 0.5
        cv2.fillPoly(mask, [np.round(corners * 256).astype(np.int32)], 1, shift=8)
    if roi.ego_mask_png:
        ego = _ego_pixels(roi.ego_mask_png)
        mask[cv2.resize(ego, (width, height), interpolation=cv2.INTER_NEAREST) > 0] = 0
    result = mask.astype(bool)
    result.flags.writeable = False
    return result


def _ego_pixels(content: bytes) -> np.ndarray:
    """Return (height, width) uint8, 1 where the PNG is not black."""
    pixels = None
    # Lossy formats are never exactly black, and readers may fill up a PNG that is cut off.
    if content.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in content[-12:]:
        # In grey or 8 bits, dark blue and 16-bit labels would round to black.
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
        with suppress(cv2.error):
            pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    if pixels is None:
        raise ImageError(f"ego mask: expected a whole PNG image, found {content[:8]!r}...")
    return (pixels > 0).any(axis=2).astype(np.uint8)


@lru_cache(maxsize=32)
def _patch_mask(
    roi: RegionOfInterest, grid_hw: tuple[int, int], image_hw: tuple[int, int]
) -> np.ndarray:
    mask = _pixel_mask(roi, image_hw).astype(np.float32)
    share = cv2.resize(mask, (grid_hw[1], grid_hw[0]), interpolation=cv2.INTER_AREA)
    result = share >= 0.5
    result.flags.writeable = False
    return result


def patches_inside(grid: PatchGrid, roi: RegionOfInterest) -> np.ndarray:
    """Return (rows, cols) bool, the patches of an image at least half inside.

    Raises:
        SettingsError: no patch takes part.
    """
    inside = roi.patch_mask(grid.grid_hw, grid.image_hw)
    if not inside.any():
        raise SettingsError("region of interest and ego mask leave no patch of the image")
    return inside
