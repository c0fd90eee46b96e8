"""From patch distances to places in the image: heatmap, regions and their boxes.

Patch (row, col) of a (rows, cols) grid covers the pixels of its own rectangle of the image, and
its value is that of the rectangle's centre: pixel index (col + 0.5) * width / cols - 0.5.

A region is where patch distances exceed the threshold of the *frame* score. Both are cosine
distances, and a frame whose tail mean exceeds the threshold has a patch that exceeds it, so an
anomalous frame has at least one region unless a minimum area takes it away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import cv2
import numpy as np

from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.structures import Localization, NominalExample

# An image that is strange throughout shatters into hundreds of regions, each with a search for
# its nearest example; nobody looks at more than the worst of them.
MAX_LOCALIZATIONS = 32


def upsample(values: np.ndarray, image_hw: tuple[int, int]) -> np.ndarray:
    """Return (height, width) float32: patch values interpolated bilinearly between centres.

    Args:
        values: (rows, cols) float32.
        image_hw: (height, width) in pixels.
    """
    return cv2.resize(values, (image_hw[1], image_hw[0]), interpolation=cv2.INTER_LINEAR)


def heatmap(distance_map: np.ndarray, region: ImageRegion, image_hw: tuple[int, int]) -> np.ndarray:
    """Return (height, width) float32 patch distances at every pixel, 0 where none takes part.

    Patches outside the region do not pull their neighbours' values down: at the region's edge
    only patches inside are averaged.

    Args:
        distance_map: (rows, cols) float32, 0 for patches outside the region.
        region: the part of the image that takes part.
        image_hw: (height, width) in pixels.
    """
    pixels = upsample(distance_map, image_hw)
    if region.is_whole_image:
        return pixels
    rows, cols = distance_map.shape
    return cv2.multiply(pixels, _edge_gain(region, (rows, cols), image_hw))


@lru_cache(maxsize=8)
def _edge_gain(
    region: ImageRegion, grid_hw: tuple[int, int], image_hw: tuple[int, int]
) -> np.ndarray:
    inside = upsample(region.patch_mask(grid_hw, image_hw).astype(np.float32), image_hw)
    gain = np.zeros(image_hw, np.float32)
    np.divide(1.0, inside, out=gain, where=region.pixel_mask(image_hw) & (inside > 0))
    gain.flags.writeable = False
    return gain


def pixel_of_patch(
    row: float, col: float, grid_hw: tuple[int, int], image_hw: tuple[int, int]
) -> tuple[float, float]:
    """Return (x, y) of a patch's centre as pixel indices; pixel 0's centre is 0."""
    x = (col + 0.5) * image_hw[1] / grid_hw[1] - 0.5
    y = (row + 0.5) * image_hw[0] / grid_hw[0] - 0.5
    return x, y


def patch_of_pixel(
    x: float, y: float, grid_hw: tuple[int, int], image_hw: tuple[int, int]
) -> tuple[int, int]:
    """Return (row, col) of the patch that covers a pixel; pixels outside give the nearest."""
    row = int((y + 0.5) * grid_hw[0] // image_hw[0])
    col = int((x + 0.5) * grid_hw[1] // image_hw[1])
    return min(max(row, 0), grid_hw[0] - 1), min(max(col, 0), grid_hw[1] - 1)


def localize(
    distance_map: np.ndarray,
    heatmap: np.ndarray,
    threshold: float,
    min_area_px: int,
    pixel_mask: np.ndarray | None,
    nearest: Callable[[Sequence[tuple[int, int]]], Sequence[NominalExample]],
) -> tuple[np.ndarray, tuple[Localization, ...]]:
    """Find the connected regions whose distances exceed the threshold, largest score first.

    Regions are 8-connected pixels above the threshold. Every patch above it is in a region, even
    where interpolation leaves none of its pixels above: then the one nearest to its centre is.

    Args:
        distance_map: (rows, cols) float32 patch distances, 0 for patches that take no part.
        heatmap: (height, width) float32, its upsampling.
        threshold: of the frame score, the same unit.
        min_area_px: regions with fewer pixels are left out.
        pixel_mask: (height, width) bool, pixels that take part; None: all.
        nearest: gives the nominal example nearest to each of several patches (row, col).

    Returns:
        label map (height, width) uint16 with 0 for none, and the regions, at most
        `MAX_LOCALIZATIONS`, labelled from 1 in order.
    """
    limit = _float32_at_most(threshold)
    hot = heatmap > limit
    if pixel_mask is not None:
        hot &= pixel_mask
    above = hot.view(np.uint8)
    patches = _marked_patches(distance_map, limit, above, pixel_mask)
    labels = np.zeros(above.shape, np.uint16)
    x0, y0, width, height = cv2.boundingRect(above)
    if not width:
        return labels, ()
    window = above[y0 : y0 + height, x0 : x0 + width]
    count, parts, stats, centres = cv2.connectedComponentsWithStats(
        window, connectivity=8, ltype=cv2.CV_32S
    )
    worst: dict[int, tuple[float, int, int]] = {}
    for (row, col), (x, y) in patches.items():
        part = int(parts[y - y0, x - x0])
        worst[part] = max(worst.get(part, (-1.0, 0, 0)), (float(distance_map[row, col]), row, col))
    kept = []
    for part in range(1, count):
        area = int(stats[part, cv2.CC_STAT_AREA])
        if area >= min_area_px:
            if part not in worst:
                worst[part] = _worst_near(part, parts, stats, (x0, y0), heatmap, distance_map)
            kept.append((*worst[part], area, part))
    kept.sort(key=lambda entry: (-entry[0], -entry[3], entry[4]))
    del kept[MAX_LOCALIZATIONS:]
    if not kept:
        return labels, ()
    examples = nearest([(row, col) for _, row, col, _, _ in kept])
    table = np.zeros(count, np.uint16)
    found = []
    for label, (score, _, _, area, part) in enumerate(kept, start=1):
        table[part] = label
        left, top, wide, high = (float(v) for v in stats[part, :4])
        box = (x0 + left, y0 + top, x0 + left + wide, y0 + top + high)
        centre = (x0 + float(centres[part, 0]), y0 + float(centres[part, 1]))
        found.append(Localization(box, centre, area, score, examples[label - 1], label))
    labels[y0 : y0 + height, x0 : x0 + width] = np.take(table, parts, mode="clip")
    return labels, tuple(found)


def _float32_at_most(threshold: float) -> np.float32:
    # Rounding the threshold up could hide the one patch that lifted the frame above it.
    rounded = np.float32(threshold)
    return np.nextafter(rounded, np.float32(-1)) if float(rounded) > threshold else rounded


def _marked_patches(
    distance_map: np.ndarray,
    limit: np.float32,
    above: np.ndarray,
    pixel_mask: np.ndarray | None,
) -> dict[tuple[int, int], tuple[int, int]]:
    """Return one pixel (x, y) of each patch (row, col) above the limit, marking it in `above`."""
    grid_hw = (distance_map.shape[0], distance_map.shape[1])
    height, width = above.shape
    marked = {}
    for row, col in np.argwhere(distance_map > limit).tolist():
        centre_x, centre_y = pixel_of_patch(row, col, grid_hw, (height, width))
        x = min(max(round(centre_x), 0), width - 1)
        y = min(max(round(centre_y), 0), height - 1)
        if pixel_mask is not None and not pixel_mask[y, x]:
            top, bottom = _span(row, grid_hw[0], height)
            left, right = _span(col, grid_hw[1], width)
            ys, xs = np.nonzero(pixel_mask[top:bottom, left:right])
            if not len(ys):
                continue
            nearest = np.argmin((ys + top - centre_y) ** 2 + (xs + left - centre_x) ** 2)
            x, y = int(xs[nearest]) + left, int(ys[nearest]) + top
        above[y, x] = 1
        marked[row, col] = (x, y)
    return marked


def _span(index: int, count: int, pixels: int) -> tuple[int, int]:
    """Return the first pixel that a patch row or column touches, and one after its last."""
    return index * pixels // count, -(-(index + 1) * pixels // count)


def _worst_near(
    part: int,
    parts: np.ndarray,
    stats: np.ndarray,
    origin_xy: tuple[int, int],
    heatmap: np.ndarray,
    distance_map: np.ndarray,
) -> tuple[float, int, int]:
    """Return the worst patch around the peak of a region that holds no patch's own pixel."""
    left, top, wide, high = (int(v) for v in stats[part, :4])
    own = parts[top : top + high, left : left + wide] == part
    x, y = origin_xy[0] + left, origin_xy[1] + top
    peak = np.where(own, heatmap[y : y + high, x : x + wide], -1.0)
    offset_y, offset_x = np.unravel_index(int(peak.argmax()), peak.shape)
    grid_hw = (distance_map.shape[0], distance_map.shape[1])
    row, col = patch_of_pixel(x + int(offset_x), y + int(offset_y), grid_hw, heatmap.shape)
    rows = range(max(row - 1, 0), min(row + 2, grid_hw[0]))
    cols = range(max(col - 1, 0), min(col + 2, grid_hw[1]))
    return max((float(distance_map[r, c]), r, c) for r in rows for c in cols)
