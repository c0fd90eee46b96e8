"""What of an image takes part: masks of pixels and patches."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from semantic_anomaly.errors import ImageError, SettingsError
from semantic_anomaly.roi import RegionOfInterest, patches_inside
from semantic_anomaly.settings import CameraSettings
from semantic_anomaly.structures import PatchGrid

RIGHT_HALF = ((0.5, 0.0), (1.0, 0.0), (1.0, 1.0), (0.5, 1.0))


def png(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def bottom_half(dtype: type = np.uint8, value: int = 255) -> np.ndarray:
    pixels = np.zeros((36, 64), dtype)
    pixels[18:] = value
    return pixels


FEATURES = np.ones((2, 4, 1), np.float32)
GRID = PatchGrid(FEATURES, (200, 400))


@pytest.mark.parametrize("width", [640, 639, 7])
def test_polygon_covers_the_pixels_whose_centres_it_holds(width: int) -> None:
    mask = RegionOfInterest(RIGHT_HALF).pixel_mask((4, width))
    centres = (np.arange(width) + 0.5) / width
    # A centre on the very edge, and the pixel next to it, may fall either way.
    clear = np.abs(centres - 0.5) > 0.75 / width
    np.testing.assert_array_equal(mask[2, clear], (centres > 0.5)[clear])


def test_whole_image_has_every_pixel_and_patch() -> None:
    roi = RegionOfInterest()
    assert roi.is_whole_image
    assert roi.pixel_mask((7, 9)).all() and roi.patch_mask((3, 4), (7, 9)).all()


@pytest.mark.parametrize(
    ("left", "expected"),
    [
        (0.5, [[False, False, True, True]] * 2),
        (0.6, [[False, False, True, True]] * 2),
        (0.65, [[False, False, False, True]] * 2),
    ],
)
def test_patches_at_least_half_inside_take_part(left: float, expected: list[list[bool]]) -> None:
    roi = RegionOfInterest(((left, 0.0), (1.0, 0.0), (1.0, 1.0), (left, 1.0)))
    np.testing.assert_array_equal(roi.patch_mask((2, 4), (200, 400)), expected)
    np.testing.assert_array_equal(patches_inside(GRID, roi), expected)


def test_region_too_small_for_any_patch_is_refused() -> None:
    speck = RegionOfInterest(((0.45, 0.45), (0.55, 0.45), (0.5, 0.55)))
    with pytest.raises(SettingsError, match="leave no patch"):
        patches_inside(GRID, speck)


def test_masks_cannot_be_written_to_by_those_who_share_them() -> None:
    roi = RegionOfInterest(RIGHT_HALF)
    with pytest.raises(ValueError, match="read-only"):
        roi.pixel_mask((4, 6))[0, 0] = True
    with pytest.raises(ValueError, match="read-only"):
        roi.patch_mask((2, 3), (4, 6))[0, 0] = True


@pytest.mark.parametrize(
    "pixels",
    [
        bottom_half(value=1),
        bottom_half(np.uint16, 3),
        np.dstack([bottom_half(value=1), bottom_half(value=0), bottom_half(value=0)]),
    ],
    ids=["labels of 1", "16-bit labels, 0 when cut to 8 bits", "dark blue"],
)
def test_ego_mask_takes_its_non_zero_pixels_away(tmp_path: Path, pixels: np.ndarray) -> None:
    path = tmp_path / "ego.png"
    path.write_bytes(png(pixels))
    roi = RegionOfInterest.from_settings(CameraSettings(ego_mask=str(path)))
    mask = roi.pixel_mask((72, 128))
    assert mask[:36].all() and not mask[36:].any()
    assert not roi.is_whole_image


def test_polygon_and_ego_mask_together() -> None:
    mask = RegionOfInterest(RIGHT_HALF, png(bottom_half())).pixel_mask((36, 64))
    assert mask[:18, 33:].all() and not mask[18:].any() and not mask[:, :31].any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"no image", "whole PNG image"),
        (cv2.imencode(".jpg", bottom_half())[1].tobytes(), "whole PNG image"),
        (png(bottom_half())[:-20], "whole PNG image"),
        (png(bottom_half())[:8] + b"\0" * 40 + b"IEND\xaeB`\x82", "whole PNG image"),
    ],
)
def test_ego_mask_that_is_no_png_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "ego.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=message):
        RegionOfInterest.from_settings(CameraSettings(ego_mask=str(path)))


def test_missing_ego_mask_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"missing.png.*No such file"):
        RegionOfInterest.from_settings(CameraSettings(ego_mask=str(tmp_path / "missing.png")))


@pytest.mark.parametrize(
    ("polygon", "message"),
    [
        (((0.5, -0.1), (1.0, 0.0), (1.0, 1.0)), r"\[0, 1\]"),
        (((0.5, float("nan")), (1.0, 0.0), (1.0, 1.0)), r"\[0, 1\]"),
        (((0.5, 0.0), (1.2, 0.0), (1.0, 1.0)), r"\[0, 1\]"),
        (((0.0, 0.0), (1.0, 1.0)), "some area"),
    ],
)
def test_polygons_partly_outside_or_without_area_are_refused(
    polygon: tuple[tuple[float, float], ...], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        RegionOfInterest(polygon)


def test_nothing_left_of_the_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ego.png"
    path.write_bytes(png(np.full((36, 64), 255, np.uint8)))
    with pytest.raises(SettingsError, match="leave no pixel"):
        RegionOfInterest.from_settings(CameraSettings(ego_mask=str(path)))


def test_description_tells_regions_apart() -> None:
    regions = [
        RegionOfInterest(),
        RegionOfInterest(RIGHT_HALF),
        RegionOfInterest(RIGHT_HALF, png(bottom_half())),
        RegionOfInterest(RIGHT_HALF, png(bottom_half(value=1))),
    ]
    described = [str(roi.describe()) for roi in regions]
    assert len(set(described)) == len(regions)
    assert RegionOfInterest(RIGHT_HALF).describe() == regions[1].describe()
