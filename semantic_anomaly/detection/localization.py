"""Localization: from the anomaly map of patches to components with box, mask and score.

Patch (row, col) of a (rows, cols) grid covers its own rectangle of the image, and its value is that
of the rectangle's centre, the pixel index (col + 0.5) * width / cols - 0.5.

A component is where the anomaly map exceeds the threshold of the frame score. Both have the same
unit, and the score is a mean of the largest patches: a frame above the threshold has at least one
patch above it, and therefore a component unless the minimum area removes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import cv2
import numpy as np

from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.structures import Localization, NominalExample

# An image that is unknown throughout has hundreds of components; only the worst are kept, because
# each needs a search for its nearest nominal example.
MAX_LOCALIZATIONS = 32


def upsample(values: np.ndarray, image_hw: tuple[int, int]) -> np.ndarray:
    """Return (height, width) float32: (rows, cols) values interpolated between patch centres."""
    return cv2.resize(values, (image_hw[1], image_hw[0]), interpolation=cv2.INTER_LINEAR)


def heatmap(
    anomaly_map: np.ndarray, roi: RegionOfInterest, image_hw: tuple[int, int]
) -> np.ndarray:
    """Return (height, width) float32: the anomaly map at every pixel, 0 outside the ROI.

    At the edge of the ROI only patches inside are averaged, so values do not fall off there.

    Args:
        anomaly_map: (rows, cols) float32, 0 for patches outside the ROI.
        roi: region of interest.
        image_hw: (height, width) in pixels.
    """
    pixels = upsample(anomaly_map, image_hw)
    if roi.is_whole_image:
        return pixels
    rows, cols = anomaly_map.shape
    return cv2.multiply(pixels, _edge_gain(roi, (rows, cols), image_hw))


@lru_cache(maxsize=8)
def _edge_gain(
    roi: RegionOfInterest, grid_hw: tuple[int, int], image_hw: tuple[int, int]
) -> np.ndarray:
    weight = upsample(roi.patch_mask(grid_hw, image_hw).astype(np.float32), image_hw)
    gain = np.zeros(image_hw, np.float32)
    np.divide(1.0, weight, out=gain, where=roi.pixel_mask(image_hw) & (weight > 0))
    gain.flags.writeable = False
    return gain


def pixel_of_patch(
    row: float, col: float, grid_hw: tuple[int, int], image_hw: tuple[int, int]
) -> tuple[float, float]:
    """Return (x, y) of a patch's centre as pixel indices; the centre of pixel 0 is 0."""
    x = (col + 0.5) * image_hw[1] / grid_hw[1] - 0.5
    y = (row + 0.5) * image_hw[0] / grid_hw[0] - 0.5
    return x, y


def patch_of_pixel(
    x: float, y: float, grid_hw: tuple[int, int], image_hw: tuple[int, int]
) -> tuple[int, int]:
    """Return (row, col) of the patch that covers a pixel, the nearest for a pixel outside."""
    row = int((y + 0.5) * grid_hw[0] // image_hw[0])
    col = int((x + 0.5) * grid_hw[1] // image_hw[1])
    return min(max(row, 0), grid_hw[0] - 1), min(max(col, 0), grid_hw[1] - 1)


def localize(
    anomaly_map: np.ndarray,
    heatmap: np.ndarray,
    threshold: float,
    min_area_px: int,
    inside: np.ndarray,
    roi_mask: np.ndarray,
    nearest: Callable[[Sequence[tuple[int, int]]], list[NominalExample]],
) -> tuple[np.ndarray, tuple[Localization, ...]]:
    """Return the connected components above the threshold, largest score first.

    Components are 8-connected pixels of the heatmap above the threshold. Every patch above it is in
    a component: where interpolation leaves none of its pixels above, the pixel nearest to its
    centre is added.

    Args:
        anomaly_map: (rows, cols) float32, 0 for patches outside the ROI.
        heatmap: (height, width) float32, its upsampling.
        threshold: of the frame score.
        min_area_px: components with fewer pixels are left out.
        inside: (rows, cols) bool, patches inside the ROI.
        roi_mask: (height, width) bool, pixels inside the ROI.
        nearest: returns the nominal example nearest to each patch (row, col), called with the worst
            patch of each component.

    Returns:
        Label map (height, width) uint16 with 0 for none, and at most `MAX_LOCALIZATIONS`
        components, labelled from 1 in order.
    """
    limit = _float32_at_most(threshold)
    above = ((heatmap > limit) & roi_mask).view(np.uint8)
    # Values outside are no values: a threshold may be below 0.
    anomaly_map = np.where(inside, anomaly_map, -np.inf)
    patch_pixels = _mark_patches(anomaly_map, limit, above, roi_mask)
    labels = np.zeros(above.shape, np.uint16)
    x0, y0, width, height = cv2.boundingRect(above)
    if not width:
        return labels, ()
    window = above[y0 : y0 + height, x0 : x0 + width]
    count, components, stats, centroids = cv2.connectedComponentsWithStats(
        window, connectivity=8, ltype=cv2.CV_32S
    )
    # Score, row and col of the worst patch by component.
    worst: dict[int, tuple[float, int, int]] = {}
    for (row, col), (x, y) in patch_pixels.items():
        number = int(components[y - y0, x - x0])
        patch = float(anomaly_map[row, col]), row, col
        worst[number] = max(worst.get(number, patch), patch)
    kept = []
    for number in range(1, count):
        area = int(stats[number, cv2.CC_STAT_AREA])
        if area >= min_area_px:
            if number not in worst:
                worst[number] = _worst_at_peak(
                    number, components, stats, (x0, y0), heatmap, anomaly_map
                )
            kept.append((*worst[number], area, number))
    kept.sort(key=lambda entry: (-entry[0], -entry[3], entry[4]))
    del kept[MAX_LOCALIZATIONS:]
    if not kept:
        return labels, ()
    examples = nearest([(row, col) for _, row, col, _, _ in kept])
    label_of = np.zeros(count, np.uint16)
    localizations = []
    for label, (score, _, _, area, number) in enumerate(kept, start=1):
        label_of[number] = label
        left, top, box_width, box_height = (float(v) for v in stats[number, :4])
        box = (x0 + left, y0 + top, x0 + left + box_width, y0 + top + box_height)
        centroid = (x0 + float(centroids[number, 0]), y0 + float(centroids[number, 1]))
        example = examples[label - 1]
        localizations.append(Localization(box, centroid, area, score, example, label))
    labels[y0 : y0 + height, x0 : x0 + width] = np.take(label_of, components, mode="clip")
    return labels, tuple(localizations)


def _float32_at_most(threshold: float) -> np.float32:
    # Rounding the threshold up could hide the one patch that lifted the frame above it.
    rounded = np.float32(threshold)
    return np.nextafter(rounded, np.float32(-np.inf)) if float(rounded) > threshold else rounded


def _mark_patches(
    anomaly_map: np.ndarray, limit: np.float32, above: np.ndarray, roi_mask: np.ndarray
) -> dict[tuple[int, int], tuple[int, int]]:
    """Mark one pixel of each patch above the limit in `above`; return (x, y) by (row, col)."""
    grid_hw = (anomaly_map.shape[0], anomaly_map.shape[1])
    height, width = above.shape
    patch_pixels = {}
    for row, col in np.argwhere(anomaly_map > limit).tolist():
        centre_x, centre_y = pixel_of_patch(row, col, grid_hw, (height, width))
        x = min(max(round(centre_x), 0), width - 1)
        y = min(max(round(centre_y), 0), height - 1)
        if not roi_mask[y, x]:
            top, bottom = _pixel_span(row, grid_hw[0], height)
            left, right = _pixel_span(col, grid_hw[1], width)
            ys, xs = np.nonzero(roi_mask[top:bottom, left:right])
            if not len(ys):
                continue
            nearest = np.argmin((ys + top - centre_y) ** 2 + (xs + left - centre_x) ** 2)
            x, y = int(xs[nearest]) + left, int(ys[nearest]) + top
        above[y, x] = 1
        patch_pixels[row, col] = (x, y)
    return patch_pixels


def _pixel_span(index: int, count: int, pixels: int) -> tuple[int, int]:
    """Return the first pixel that a patch row or column touches, and one after its last."""
    return index * pixels // count, -(-(index + 1) * pixels // count)


def _worst_at_peak(
    number: int,
    components: np.ndarray,
    stats: np.ndarray,
    origin_xy: tuple[int, int],
    heatmap: np.ndarray,
    anomaly_map: np.ndarray,
) -> tuple[float, int, int]:
    """Return the worst patch around the peak of a component without a pixel of `_mark_patches`."""
    left, top, width, height = (int(v) for v in stats[number, :4])
    mask = components[top : top + height, left : left + width] == number
    x, y = origin_xy[0] + left, origin_xy[1] + top
    peak = np.where(mask, heatmap[y : y + height, x : x + width], -np.inf)
    offset_y, offset_x = np.unravel_index(int(peak.argmax()), peak.shape)
    grid_hw = (anomaly_map.shape[0], anomaly_map.shape[1])
    row, col = patch_of_pixel(x + int(offset_x), y + int(offset_y), grid_hw, heatmap.shape)
    rows = range(max(row - 1, 0), min(row + 2, grid_hw[0]))
    cols = range(max(col - 1, 0), min(col + 2, grid_hw[1]))
    return max((float(anomaly_map[r, c]), r, c) for r in rows for c in cols)
