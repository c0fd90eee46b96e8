"""Which regions of an image are no anomaly by their evidence, their size or their shape.

`agreement` is judged before there is a score: an embedding pooled over an instance may be far from
everything nominal although hardly any patch of it is; it counts when the patches agree, or when
the instance is anomalous together with its surroundings. The other filters judge the components
above the threshold, in this order, and the first one that rejects a component is named:

1. `size`: of few pixels, or of nearly all. Cut regions are judged too: few pixels are little
   evidence wherever they lie, and what enters the image grows.
2. `aspect`: slivers along the edges of buildings and lane markings. Cut regions are not judged:
   the visible part of an animal that enters the image is a sliver as well.
3. `border`: rejects nothing, but says which regions are cut. Where an object meets the border of
   the image is where it enters the road.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from semantic_anomaly.errors import ModelOutputError, SettingsError

SIZE, ASPECT = "size", "aspect"
_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class RegionFilters:
    """The limits of the filters; each default switches its filter off.

    Attributes:
        min_area, max_area: shares of the image's pixels, 0 <= min_area <= max_area <= 1.
        max_aspect: longer to shorter side of the box, >= 1.
        max_border_share: share of its outline in [0, 1] above which a region is cut.

    Raises:
        SettingsError: a limit out of its bounds.
    """

    min_area: float = 0.0
    max_area: float = 1.0
    max_aspect: float = float("inf")
    max_border_share: float = 1.0

    def __post_init__(self) -> None:
        for name in ("min_area", "max_area", "max_border_share"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise SettingsError(
                    f"region filter '{name}': expected a share in [0, 1], found {value}"
                )
        if self.min_area > self.max_area:
            raise SettingsError(
                "region filter 'size': expected min_area <= max_area, "
                f"found {self.min_area} and {self.max_area}"
            )
        if not self.max_aspect >= 1.0:
            raise SettingsError(
                f"region filter 'max_aspect': expected at least 1, found {self.max_aspect}"
            )


@dataclass(frozen=True, eq=False)
class FilteredRegions:
    """What the filters say of each region.

    Attributes:
        keep: (n,) bool.
        rejected_by: name of the first filter that rejects it, n of them; empty for kept ones.
        cut: (n,) bool, regions that the border of the image or of the region of interest cuts.
    """

    keep: np.ndarray
    rejected_by: tuple[str, ...]
    cut: np.ndarray


def apply(
    filters: RegionFilters,
    image_hw: tuple[int, int],
    boxes_xyxy: np.ndarray,
    areas_px: np.ndarray,
    border_shares: np.ndarray,
) -> FilteredRegions:
    """Judge regions by all filters; every limit is itself still allowed.

    Args:
        filters: the limits.
        image_hw: (height, width) in pixels.
        boxes_xyxy: (n, 4) pixels, not empty.
        areas_px: (n,) pixels, from 0 to all of the image.
        border_shares: (n,) in [0, 1], of `border_share`.

    Raises:
        ModelOutputError: arrays of other shapes, or values out of their ranges.
    """
    if boxes_xyxy.ndim != 2 or boxes_xyxy.shape[1] != 4:
        raise ModelOutputError(f"region boxes: expected (n, 4), found shape {boxes_xyxy.shape}")
    count, pixels = len(boxes_xyxy), image_hw[0] * image_hw[1]
    _check("region areas", areas_px, count, float(pixels))
    _check("border shares", border_shares, count, 1.0)
    sides = np.asarray(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], np.float64)
    # NaN and infinity fail.
    if not np.all((sides > 0.0) & (sides < np.inf)):
        raise ModelOutputError("region boxes: expected finite boxes that are not empty")
    shares = areas_px / pixels
    cut = border_shares > filters.max_border_share
    slender = sides.max(axis=1) > filters.max_aspect * sides.min(axis=1)
    rejections = (
        (SIZE, (shares < filters.min_area) | (shares > filters.max_area)),
        (ASPECT, slender & ~cut),
    )
    named = tuple(
        next((name for name, rejected in rejections if rejected[row]), "") for row in range(count)
    )
    return FilteredRegions(np.array([not name for name in named], bool), named, cut)


def border_share(
    labels: np.ndarray, region_mask: np.ndarray, count: int | None = None
) -> np.ndarray:
    """Return (n,) float64: share of a region's outline on the border of what takes part.

    The outline is made of the sides of pixels beyond which another region, none, or nothing that
    takes part lies, holes included. A rectangle along a border has at most half of it there.

    Args:
        labels: (height, width) signed integers, number of the region from 0, -1 for none, as in
            `Regions.label_map`.
        region_mask: (height, width) bool, pixels that take part; regions end at its edge.
        count: number of regions n; None: the largest label + 1. A region without any pixel
            has share 0.

    Raises:
        ModelOutputError: other shapes or dtypes, or labels from outside the range.
    """
    if labels.ndim != 2 or labels.dtype.kind != "i":
        raise ModelOutputError(
            "region labels: expected (height, width) signed integers with -1 for none, "
            f"found shape {labels.shape}, {labels.dtype}"
        )
    if region_mask.shape != labels.shape or region_mask.dtype != np.bool_:
        raise ModelOutputError(
            f"region mask: expected {labels.shape} bool, "
            f"found shape {region_mask.shape}, {region_mask.dtype}"
        )
    low, high = int(labels.min(initial=0)), int(labels.max(initial=-1))
    total = high + 1 if count is None else count
    if low < -1 or high >= total:
        raise ModelOutputError(
            f"region labels: expected from -1 to {total - 1}, found {low} to {high}"
        )
    # -2 is everything that takes no part, the frame around the image included.
    framed = np.pad(np.where(region_mask, labels, -2), 1, constant_values=-2)
    inner = framed[1:-1, 1:-1]
    outline, border = np.zeros(total), np.zeros(total)
    for beyond in (framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:]):
        side = (inner >= 0) & (beyond != inner)
        outline += np.bincount(inner[side], minlength=total)
        border += np.bincount(inner[side & (beyond == -2)], minlength=total)
    return border / np.maximum(outline, 1.0)


def patch_agreement(weights: np.ndarray, exceeds: np.ndarray) -> np.ndarray:
    """Return (n,) float64 in [0, 1]: share of each instance's patches above the threshold.

    Args:
        weights: (n, patches) float32, what part of an instance lies on each patch; rows sum to 1.
        exceeds: (patches,) bool, patches whose own distance exceeds the patch threshold.

    Raises:
        ModelOutputError: other shapes, negative weights, or rows that do not sum to 1.
    """
    if weights.ndim != 2 or exceeds.shape != weights.shape[1:] or exceeds.dtype != np.bool_:
        raise ModelOutputError(
            "patch agreement: expected weights (n, patches) and bool (patches,), "
            f"found shapes {weights.shape} and {exceeds.shape}, {exceeds.dtype}"
        )
    sums = weights.sum(axis=1, dtype=np.float64)
    # NaN fails both comparisons.
    if not (np.all(weights >= 0.0) and np.all(np.abs(sums - 1.0) <= _SUM_TOLERANCE)):
        raise ModelOutputError(
            "patch agreement: expected weights >= 0 with rows that sum to 1, found sums from "
            f"{sums.min(initial=np.inf):.4g} to {sums.max(initial=-np.inf):.4g}"
        )
    # Summed alike above and below the line, so that full agreement is exactly 1.
    return np.where(exceeds, weights, 0.0).sum(axis=1, dtype=np.float64) / sums


def _check(what: str, values: np.ndarray, count: int, most: float) -> None:
    # NaN fails both comparisons.
    if values.shape != (count,) or not np.all((values >= 0.0) & (values <= most)):
        raise ModelOutputError(
            f"{what}: expected ({count},) numbers from 0 to {most:g}, "
            f"found shape {values.shape}: {values.tolist()[:5]}"
        )
