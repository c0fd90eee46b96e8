"""Half-pixel geometry, and that every patch above the threshold is in a component."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from semantic_anomaly.detection.localization import (
    MAX_LOCALIZATIONS,
    heatmap,
    localize,
    patch_of_pixel,
    pixel_of_patch,
    upsample,
)
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.structures import Localization, NominalExample

# Whole multiples, fractions, more patches than pixels, and single rows or columns.
SIZES = [
    ((4, 6), (40, 60)),
    ((3, 3), (10, 10)),
    ((45, 80), (360, 640)),
    ((9, 13), (97, 131)),
    ((26, 45), (41, 71)),
    ((7, 9), (5, 6)),
    ((1, 1), (5, 8)),
    ((1, 8), (9, 64)),
]
WEDGE = RegionOfInterest(((0.1, 1.0), (0.45, 0.3), (0.6, 0.3), (0.9, 1.0)))


def localized(
    anomaly_map: np.ndarray,
    image_hw: tuple[int, int],
    threshold: float,
    roi: RegionOfInterest | None = None,
    min_area_px: int = 0,
) -> tuple[np.ndarray, tuple[Localization, ...]]:
    """Localize with examples that name the patch they were searched for."""
    roi = roi or RegionOfInterest()
    rows, cols = anomaly_map.shape
    inside = roi.patch_mask((rows, cols), image_hw)
    anomaly_map = np.where(inside, anomaly_map, 0).astype(np.float32)
    heat = heatmap(anomaly_map, roi, image_hw)
    return localize(
        anomaly_map, heat, threshold, min_area_px, inside, roi.pixel_mask(image_hw), examples_of
    )


def examples_of(patches: Sequence[tuple[int, int]]) -> list[NominalExample]:
    return [NominalExample("nominal/1.png", *patch, (1, 1), 0.1) for patch in patches]


@pytest.mark.parametrize(("grid_hw", "image_hw"), SIZES)
def test_pixel_and_patch_are_inverse(grid_hw: tuple[int, int], image_hw: tuple[int, int]) -> None:
    for row in range(grid_hw[0]):
        for col in range(grid_hw[1]):
            x, y = pixel_of_patch(row, col, grid_hw, image_hw)
            assert patch_of_pixel(x, y, grid_hw, image_hw) == (row, col)
    # Patches of 10 pixels: pixels 0 to 9 are centred at 4.5.
    assert pixel_of_patch(1, 2, (4, 6), (40, 60)) == (24.5, 14.5)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [(0, 0, (0, 0)), (9, 9, (0, 0)), (10, 9, (0, 1)), (59, 39, (3, 5)), (-3, 99, (3, 0))],
)
def test_pixels_belong_to_the_patch_that_covers_them(
    x: int, y: int, expected: tuple[int, int]
) -> None:
    assert patch_of_pixel(x, y, (4, 6), (40, 60)) == expected


@pytest.mark.parametrize(("grid_hw", "image_hw"), SIZES)
def test_upsampling_follows_half_pixel_centres(
    grid_hw: tuple[int, int], image_hw: tuple[int, int], rng: np.random.Generator
) -> None:
    values = rng.uniform(0, 1, grid_hw).astype(np.float32)
    pixels = upsample(values, image_hw)
    assert pixels.shape == image_hw and pixels.dtype == np.float32
    # The rule written out: the position of a pixel's centre in the grid, edges continued.
    rows = np.clip((np.arange(image_hw[0]) + 0.5) * grid_hw[0] / image_hw[0] - 0.5, 0, None)
    cols = np.clip((np.arange(image_hw[1]) + 0.5) * grid_hw[1] / image_hw[1] - 0.5, 0, None)
    rows, cols = rows.clip(max=grid_hw[0] - 1), cols.clip(max=grid_hw[1] - 1)
    by_col = np.stack([np.interp(cols, np.arange(grid_hw[1]), line) for line in values])
    expected = np.stack(
        [np.interp(rows, np.arange(grid_hw[0]), by_col[:, x]) for x in range(image_hw[1])], axis=1
    )
    np.testing.assert_allclose(pixels, expected, atol=2e-3)


def test_heatmap_is_zero_outside_and_undiluted_at_the_edge() -> None:
    image_hw, grid_hw = (90, 130), (9, 13)
    right = RegionOfInterest(((0.5, 0.0), (1.0, 0.0), (1.0, 1.0), (0.5, 1.0)))
    inside = right.patch_mask(grid_hw, image_hw)
    anomaly_map = np.where(inside, 0.6, 0).astype(np.float32)
    pixels = heatmap(anomaly_map, right, image_hw)
    mask = right.pixel_mask(image_hw)
    assert not pixels[~mask].any()
    np.testing.assert_allclose(pixels[mask], 0.6, rtol=1e-5)


def test_heatmap_of_the_whole_image_is_the_upsampled_map(rng: np.random.Generator) -> None:
    anomaly_map = rng.uniform(0, 1, (5, 7)).astype(np.float32)
    np.testing.assert_array_equal(
        heatmap(anomaly_map, RegionOfInterest(), (33, 52)), upsample(anomaly_map, (33, 52))
    )


def test_one_hot_block_by_hand() -> None:
    anomaly_map = np.full((4, 6), 0.1, np.float32)
    anomaly_map[1:3, 2:4] = 0.5
    anomaly_map[2, 3] = 0.7
    labels, components = localized(anomaly_map, (40, 60), 0.3)
    (component,) = components
    # 0.3 is halfway between 0.1 and 0.5: the component ends midway between patch centres.
    left, top, right, bottom = component.box_xyxy
    assert (left, top) == (20, 10)
    assert 40 <= right <= 43 and 30 <= bottom <= 33
    assert component.score == pytest.approx(0.7)
    assert (component.nearest.row, component.nearest.col) == (2, 3), "of the worst patch"
    assert component.area_px == int((labels == 1).sum()) == int((labels > 0).sum())
    ys, xs = np.nonzero(labels)
    assert component.centroid_xy == pytest.approx((xs.mean(), ys.mean()))
    assert (left, top, right, bottom) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    assert labels.dtype == np.uint16


def test_components_are_labelled_worst_first() -> None:
    anomaly_map = np.full((6, 12), 0.1, np.float32)
    anomaly_map[1, 1], anomaly_map[1, 6], anomaly_map[4, 10] = 0.5, 0.9, 0.7
    labels, components = localized(anomaly_map, (60, 120), 0.3)
    assert [component.score for component in components] == pytest.approx([0.9, 0.7, 0.5])
    assert [component.label for component in components] == [1, 2, 3]
    for component, (row, col) in zip(components, [(1, 6), (4, 10), (1, 1)], strict=True):
        x, y = pixel_of_patch(row, col, (6, 12), (60, 120))
        assert labels[int(y), int(x)] == component.label
        assert (component.nearest.row, component.nearest.col) == (row, col)


def test_nothing_above_the_threshold_gives_nothing() -> None:
    labels, components = localized(np.full((4, 6), 0.3, np.float32), (40, 60), 0.3000001)
    assert components == () and not labels.any()


@pytest.mark.parametrize(("min_area_px", "kept"), [(0, 2), (40, 2), (200, 1), (100000, 0)])
def test_minimum_area_removes_small_components(min_area_px: int, kept: int) -> None:
    anomaly_map = np.full((6, 12), 0.1, np.float32)
    anomaly_map[4, 10] = 0.9
    anomaly_map[0:3, 0:3] = 0.5
    labels, components = localized(anomaly_map, (60, 120), 0.3, min_area_px=min_area_px)
    assert len(components) == kept == len(np.unique(labels)) - 1
    assert all(component.area_px >= min_area_px for component in components)


@pytest.mark.parametrize(("grid_hw", "image_hw"), SIZES)
@pytest.mark.parametrize("roi", [RegionOfInterest(), WEDGE], ids=["whole", "wedge"])
def test_every_patch_above_the_threshold_is_in_a_component(
    grid_hw: tuple[int, int], image_hw: tuple[int, int], roi: RegionOfInterest
) -> None:
    inside = roi.patch_mask(grid_hw, image_hw)
    mask = roi.pixel_mask(image_hw)
    threshold = 0.3
    for row, col in np.argwhere(inside).tolist()[:: max(1, inside.sum() // 40)]:
        anomaly_map = np.zeros(grid_hw, np.float32)
        # The smallest excess there is: interpolation loses it almost everywhere.
        anomaly_map[row, col] = np.nextafter(np.float32(threshold), np.float32(1))
        labels, components = localized(anomaly_map, image_hw, threshold, roi)
        # Rounding can split off a sliver of pixels where the region of interest cuts a patch.
        assert components and all(c.score > threshold for c in components), (row, col)
        assert not labels[~mask].any(), "pixels outside the ROI are never marked"
        ys, xs = np.nonzero(labels)
        x, y = pixel_of_patch(row, col, grid_hw, image_hw)
        patch_px = max(image_hw[0] / grid_hw[0], image_hw[1] / grid_hw[1])
        assert np.hypot(xs - x, ys - y).min() <= patch_px + 1
    assert inside.any()


@pytest.mark.parametrize("roi", [RegionOfInterest(), WEDGE], ids=["whole", "wedge"])
def test_components_of_random_maps_are_consistent(roi: RegionOfInterest) -> None:
    rng = np.random.default_rng(3)
    for _ in range(40):
        grid_hw = tuple(rng.integers(1, 14, 2).tolist())
        image_hw = tuple(rng.integers(12, 90, 2).tolist())
        inside = roi.patch_mask(grid_hw, image_hw)
        anomaly_map = np.where(inside, rng.uniform(0, 1, grid_hw), 0).astype(np.float32)
        threshold = float(rng.uniform(0.4, 0.95))
        labels, components = localized(anomaly_map, image_hw, threshold, roi)
        hot = np.argwhere(anomaly_map > threshold)
        assert bool(len(hot)) == bool(components)
        if components:
            assert components[0].score == anomaly_map.max()
        assert not labels[~roi.pixel_mask(image_hw)].any()
        assert set(np.unique(labels)) - {0} == {component.label for component in components}
        assert [c.score for c in components] == sorted((c.score for c in components), reverse=True)
        for component in components:
            ys, xs = np.nonzero(labels == component.label)
            assert component.area_px == len(ys)
            assert component.box_xyxy == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert component.score == anomaly_map[component.nearest.row, component.nearest.col]


def test_rounding_of_the_threshold_loses_no_patch() -> None:
    # A double just below a float32: rounded to float32 it would equal the value of the patch.
    patch = np.float32(0.7)
    threshold = float(np.nextafter(float(patch), 0.0))
    assert np.float32(threshold) == patch
    anomaly_map = np.zeros((3, 3), np.float32)
    anomaly_map[1, 1] = patch
    _, components = localized(anomaly_map, (30, 30), threshold)
    assert len(components) == 1


def test_only_the_worst_components_of_an_image_are_kept() -> None:
    anomaly_map = np.zeros((40, 40), np.float32)
    # Two patches apart, so that no two of them touch.
    anomaly_map[::3, ::3] = np.linspace(0.5, 0.9, 196, dtype=np.float32).reshape(14, 14)
    labels, components = localized(anomaly_map, (320, 320), 0.3)
    assert len(components) == MAX_LOCALIZATIONS == labels.max()
    assert components[0].score == pytest.approx(0.9)
    dropped = np.sort(anomaly_map.ravel())[-MAX_LOCALIZATIONS - 1]
    assert min(component.score for component in components) > dropped
