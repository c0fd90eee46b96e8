"""Half-pixel geometry, and that no anomalous patch is ever without a region."""

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
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.structures import Localization, NominalExample

# Whole multiples, fractions, more patches than pixels, and single rows or columns.
SIZES = [
    ((4, 6), (40, 60)),
    ((5, 7), (33, 52)),
    ((3, 3), (10, 10)),
    ((45, 80), (360, 640)),
    ((9, 13), (97, 131)),
    ((26, 45), (41, 71)),
    ((7, 9), (5, 6)),
    ((1, 1), (5, 8)),
    ((1, 8), (9, 64)),
]
WEDGE = ImageRegion(((0.1, 1.0), (0.45, 0.3), (0.6, 0.3), (0.9, 1.0)))


def examples(places: Sequence[tuple[int, int]]) -> list[NominalExample]:
    """Return an example a patch that names the patch it was asked for."""
    return [NominalExample("nominal/1.png", row, col, (1, 1), 0.1) for row, col in places]


def localized(
    distances: np.ndarray,
    image_hw: tuple[int, int],
    threshold: float,
    region: ImageRegion | None = None,
    min_area_px: int = 0,
) -> tuple[np.ndarray, tuple[Localization, ...]]:
    region = region or ImageRegion()
    inside = region.patch_mask(distances.shape, image_hw)  # type: ignore[arg-type]
    distances = np.where(inside, distances, 0).astype(np.float32)
    heat = heatmap(distances, region, image_hw)
    return localize(distances, heat, threshold, min_area_px, region.pixel_mask(image_hw), examples)


@pytest.mark.parametrize(
    ("row", "col", "x", "y"),
    [(0, 0, 4.5, 4.5), (3, 5, 54.5, 34.5), (1, 2, 24.5, 14.5)],
)
def test_patch_centres_by_hand(row: int, col: int, x: float, y: float) -> None:
    # Patches of 10 pixels: pixels 0 to 9 are centred at 4.5.
    assert pixel_of_patch(row, col, (4, 6), (40, 60)) == (x, y)


@pytest.mark.parametrize(("grid_hw", "image_hw"), SIZES)
def test_pixel_and_patch_are_inverse(grid_hw: tuple[int, int], image_hw: tuple[int, int]) -> None:
    for row in range(grid_hw[0]):
        for col in range(grid_hw[1]):
            x, y = pixel_of_patch(row, col, grid_hw, image_hw)
            assert patch_of_pixel(x, y, grid_hw, image_hw) == (row, col)


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
    # The rule written out: the place of a pixel's centre in the grid, edges continued.
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
    right = ImageRegion(((0.5, 0.0), (1.0, 0.0), (1.0, 1.0), (0.5, 1.0)))
    inside = right.patch_mask(grid_hw, image_hw)
    distances = np.where(inside, 0.6, 0).astype(np.float32)
    pixels = heatmap(distances, right, image_hw)
    mask = right.pixel_mask(image_hw)
    assert not pixels[~mask].any()
    np.testing.assert_allclose(pixels[mask], 0.6, rtol=1e-5)


def test_heatmap_of_the_whole_image_is_the_upsampled_map(rng: np.random.Generator) -> None:
    distances = rng.uniform(0, 1, (5, 7)).astype(np.float32)
    np.testing.assert_array_equal(
        heatmap(distances, ImageRegion(), (33, 52)), upsample(distances, (33, 52))
    )


def test_one_hot_block_by_hand() -> None:
    distances = np.full((4, 6), 0.1, np.float32)
    distances[1:3, 2:4] = 0.5
    distances[2, 3] = 0.7
    labels, places = localized(distances, (40, 60), 0.3)
    (place,) = places
    # Halfway between 0.1 and 0.5 lies 0.3: the region ends where the patches' centres are 5 away.
    left, top, right, bottom = place.box_xyxy
    assert (left, top) == (20, 10)
    assert 40 <= right <= 43 and 30 <= bottom <= 33
    assert place.score == pytest.approx(0.7)
    assert (place.nearest.row, place.nearest.col) == (2, 3), "the worst patch is explained"
    assert place.area_px == int((labels == 1).sum()) == int((labels > 0).sum())
    ys, xs = np.nonzero(labels)
    assert place.centroid_xy == pytest.approx((xs.mean(), ys.mean()))
    assert (left, top, right, bottom) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    assert labels.dtype == np.uint16


def test_regions_come_worst_first_and_are_labelled_in_that_order() -> None:
    distances = np.full((6, 12), 0.1, np.float32)
    distances[1, 1], distances[1, 6], distances[4, 10] = 0.5, 0.9, 0.7
    labels, places = localized(distances, (60, 120), 0.3)
    assert [place.score for place in places] == pytest.approx([0.9, 0.7, 0.5])
    assert [place.label for place in places] == [1, 2, 3]
    for place, (row, col) in zip(places, [(1, 6), (4, 10), (1, 1)], strict=True):
        x, y = pixel_of_patch(row, col, (6, 12), (60, 120))
        assert labels[int(y), int(x)] == place.label
        assert (place.nearest.row, place.nearest.col) == (row, col)


def test_nothing_above_the_threshold_gives_nothing() -> None:
    labels, places = localized(np.full((4, 6), 0.3, np.float32), (40, 60), 0.3000001)
    assert places == () and not labels.any()


@pytest.mark.parametrize(("least_px", "kept"), [(0, 2), (40, 2), (200, 1), (100000, 0)])
def test_minimum_area_removes_small_regions(least_px: int, kept: int) -> None:
    distances = np.full((6, 12), 0.1, np.float32)
    distances[4, 10] = 0.9
    distances[0:3, 0:3] = 0.5
    labels, places = localized(distances, (60, 120), 0.3, min_area_px=least_px)
    assert len(places) == kept == len(np.unique(labels)) - 1
    assert all(place.area_px >= least_px for place in places)


@pytest.mark.parametrize(("grid_hw", "image_hw"), SIZES)
@pytest.mark.parametrize("region", [ImageRegion(), WEDGE], ids=["whole", "wedge"])
def test_every_patch_above_the_threshold_is_in_a_region(
    grid_hw: tuple[int, int], image_hw: tuple[int, int], region: ImageRegion
) -> None:
    inside = region.patch_mask(grid_hw, image_hw)
    mask = region.pixel_mask(image_hw)
    threshold = 0.3
    for row, col in np.argwhere(inside).tolist()[:: max(1, inside.sum() // 150)]:
        distances = np.zeros(grid_hw, np.float32)
        # The smallest excess there is: interpolation loses it almost everywhere.
        distances[row, col] = np.nextafter(np.float32(threshold), np.float32(1))
        labels, places = localized(distances, image_hw, threshold, region)
        # Rounding can split off a sliver of pixels where the region of interest cuts a patch.
        assert places and all(place.score > threshold for place in places), (row, col)
        assert not labels[~mask].any(), "pixels that take no part are never marked"
        ys, xs = np.nonzero(labels)
        x, y = pixel_of_patch(row, col, grid_hw, image_hw)
        patch_px = max(image_hw[0] / grid_hw[0], image_hw[1] / grid_hw[1])
        assert np.hypot(xs - x, ys - y).min() <= patch_px + 1
    assert inside.any()


@pytest.mark.parametrize("region", [ImageRegion(), WEDGE], ids=["whole", "wedge"])
def test_regions_of_random_maps_are_consistent(region: ImageRegion) -> None:
    rng = np.random.default_rng(3)
    for _ in range(60):
        grid_hw = tuple(rng.integers(1, 14, 2).tolist())
        image_hw = tuple(rng.integers(12, 90, 2).tolist())
        inside = region.patch_mask(grid_hw, image_hw)
        distances = np.where(inside, rng.uniform(0, 1, grid_hw), 0).astype(np.float32)
        threshold = float(rng.uniform(0.4, 0.95))
        labels, places = localized(distances, image_hw, threshold, region)
        hot = np.argwhere(distances > threshold)
        assert bool(len(hot)) == bool(places)
        if places:
            assert places[0].score == distances.max()
        assert not labels[~region.pixel_mask(image_hw)].any()
        assert set(np.unique(labels)) - {0} == {place.label for place in places}
        assert [p.score for p in places] == sorted((p.score for p in places), reverse=True)
        for place in places:
            ys, xs = np.nonzero(labels == place.label)
            assert place.area_px == len(ys)
            assert place.box_xyxy == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert place.score == distances[place.nearest.row, place.nearest.col]


@pytest.mark.parametrize("scale", [0.1, 0.3, 0.7, 1.9])
def test_rounding_of_the_threshold_loses_no_patch(scale: float) -> None:
    # A double just below a float32: rounded to float32 it would equal the patch's distance.
    patch = np.float32(scale)
    threshold = float(np.nextafter(float(patch), 0.0))
    assert np.float32(threshold) == patch
    distances = np.zeros((3, 3), np.float32)
    distances[1, 1] = patch
    _, places = localized(distances, (30, 30), threshold)
    assert len(places) == 1


def test_an_image_strange_throughout_gives_its_worst_regions_only() -> None:
    distances = np.zeros((40, 40), np.float32)
    # Two patches apart, so that no two of them touch.
    distances[::3, ::3] = np.linspace(0.5, 0.9, 196, dtype=np.float32).reshape(14, 14)
    labels, places = localized(distances, (320, 320), 0.3)
    assert len(places) == MAX_LOCALIZATIONS == labels.max()
    assert places[0].score == pytest.approx(0.9)
    assert min(place.score for place in places) > np.sort(distances.ravel())[-MAX_LOCALIZATIONS - 1]
