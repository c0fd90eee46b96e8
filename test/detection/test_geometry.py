"""From pixels to rays and boxes, computed by hand."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from semantic_anomaly.detection.geometry import (
    ASSUMED,
    GROUND,
    MEASURED,
    Intrinsics,
    ground_range,
    measured_range,
    pixel_rays,
    place_box,
)
from semantic_anomaly.errors import ImageError
from semantic_anomaly.structures import Localization, NominalExample

HW = (100, 200)
CAMERA = Intrinsics(80.0, 90.0, 99.5, 49.5, HW)
NEAREST = NominalExample("n/0.png", 0, 0, (5, 10), 0.5)


def place(*box: float) -> tuple[Localization, np.ndarray]:
    x0, y0, x1, y1 = (int(edge) for edge in box)
    labels = np.zeros(HW, np.uint16)
    labels[y0:y1, x0:x1] = 1
    area = (x1 - x0) * (y1 - y0)
    return Localization((x0, y0, x1, y1), (x0, y0), area, 0.5, NEAREST, 1), labels


def test_the_principal_point_looks_straight_ahead() -> None:
    rays = pixel_rays(np.array([(99.5, 49.5), (99.5 + 80.0, 49.5), (99.5, 49.5 + 90.0)]), CAMERA)
    np.testing.assert_allclose(rays, [(0, 0, 1), (1, 0, 1), (0, 1, 1)], atol=1e-12)


def test_an_assumed_lens_sees_ninety_degrees_from_edge_to_edge() -> None:
    lens = Intrinsics.assumed(HW)
    rays = pixel_rays(np.array([(-0.5, 49.5), (199.5, 49.5)]), lens)
    np.testing.assert_allclose(rays[:, 0], [-1.0, 1.0])


@pytest.mark.parametrize("fisheye", [False, True])
def test_rays_invert_opencvs_distorted_projection(fisheye: bool) -> None:
    coefficients = (-0.05, 0.01, 0.002, -0.001) if fisheye else (-0.2, 0.05, 0.001, -0.002, 0.01)
    camera = Intrinsics(80.0, 90.0, 99.5, 49.5, HW, coefficients, fisheye)
    points = np.array([(0.3, -0.2, 1.0), (-0.5, 0.25, 1.0), (0.0, 0.0, 1.0)])
    matrix = np.array([(80.0, 0, 99.5), (0, 90.0, 49.5), (0, 0, 1)])
    project = cv2.fisheye.projectPoints if fisheye else cv2.projectPoints
    zero = np.zeros((3, 1))
    pixels, _ = project(points[:, None], zero, zero, matrix, np.array(coefficients))
    np.testing.assert_allclose(pixel_rays(pixels.reshape(-1, 2), camera), points, atol=1e-3)


def test_scaling_keeps_every_direction() -> None:
    large = CAMERA.scaled_to((200, 400))
    edge = np.array([(-0.5, -0.5)])
    np.testing.assert_allclose(pixel_rays(edge, CAMERA), pixel_rays(edge, large))
    # A small pixel's centre lies between the centres of the four it becomes.
    centre = pixel_rays(np.array([(30.0, 40.0)]), CAMERA)
    np.testing.assert_allclose(pixel_rays(np.array([(60.5, 80.5)]), large), centre)
    assert CAMERA.scaled_to(HW) is CAMERA


@pytest.mark.parametrize(
    "numbers",
    [(0.0, 90.0, 1.0, 1.0), (80.0, -1.0, 1.0, 1.0), (float("nan"), 90.0, 1.0, 1.0)],
)
def test_impossible_cameras_are_refused(numbers: tuple[float, ...]) -> None:
    with pytest.raises(ImageError, match="camera info: expected"):
        Intrinsics(*numbers, HW)


@pytest.mark.parametrize(("count", "fisheye"), [(3, False), (6, False), (100, False), (5, True)])
def test_a_number_of_coefficients_that_opencv_does_not_take_is_refused(
    count: int, fisheye: bool
) -> None:
    with pytest.raises(ImageError, match=f"coefficients in number .*found {count}"):
        Intrinsics(80.0, 90.0, 99.5, 49.5, HW, (0.1,) * count, fisheye)
    # Zeros are no distortion, whatever the model.
    pixel_rays(np.zeros((1, 2)), Intrinsics(80.0, 90.0, 99.5, 49.5, HW, (0.0,) * count, fisheye))


@pytest.mark.parametrize(
    ("ray_y", "height_m", "expected"),
    [
        (0.15, 1.5, 10.0),
        (0.0, 1.5, None),  # the horizon
        (-0.2, 1.5, None),  # above it
        (0.0149, 1.5, None),  # beyond 100 m
        (0.15, 0.0, None),  # height unknown
    ],
)
def test_ground_ranges(ray_y: float, height_m: float, expected: float | None) -> None:
    assert ground_range(np.array([0.3, ray_y, 1.0]), height_m) == pytest.approx(expected)


def test_measured_range_is_the_median_of_what_there_is() -> None:
    depth = np.zeros((50, 100), np.float32)
    inside = np.zeros(HW, bool)
    inside[20:40, 60:100] = True
    assert measured_range(depth, inside) is None
    depth[10:20, 30:50] = 8.0
    depth[10:12, 30:50] = 30.0
    # Half the size of the image: each depth covers two by two pixels.
    assert measured_range(depth, inside) == 8.0
    depth[:] = 0
    depth[10, 30] = 4.0
    assert measured_range(depth, inside) is None, "one depth in two hundred is no measurement"
    assert measured_range(depth, np.zeros(HW, bool)) is None
    # Their mean would be infinite.
    depth[:] = np.finfo(np.float32).max
    assert measured_range(depth, inside) is None


def test_boxes_are_placed_by_depth_then_ground_then_assumption() -> None:
    localization, labels = place(90, 60, 110, 80)
    depth = np.full(HW, 5.0, np.float32)
    box = place_box(localization, labels, CAMERA, depth, 1.5, 12.0)
    assert (box.range_source, box.range_m) == (MEASURED, 5.0)
    # Edges lie half a pixel outside the centres.
    left_top = [(89.5 - 99.5) / 80 * 5, (59.5 - 49.5) / 90 * 5, 5.0]
    right_bottom = [(109.5 - 99.5) / 80 * 5, (79.5 - 49.5) / 90 * 5, 5.0]
    np.testing.assert_allclose(box.corners[0], left_top, atol=1e-9)
    np.testing.assert_allclose(box.corners[2], right_bottom, atol=1e-9)

    box = place_box(localization, labels, CAMERA, np.zeros(HW, np.float32), 1.5, 12.0)
    assert box.range_source == GROUND and box.range_m == pytest.approx(1.5 * 90 / 30)
    np.testing.assert_allclose(box.corners[2:, 1], 1.5)

    above, above_labels = place(90, 10, 110, 30)
    box = place_box(above, above_labels, CAMERA, None, 1.5, 12.0)
    assert (box.range_source, box.range_m) == (ASSUMED, 12.0)
    assert box.corners[:, 2].tolist() == [12.0] * 4
