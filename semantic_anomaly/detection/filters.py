"""Filters that reject components by size and shape.

`max_area` rejects components that cover more than a share of the image, such as a change of light.
`max_aspect` rejects slivers along the edges of buildings and lane markings. A component that the
border of the image or of the region of interest cuts is exempt from `max_aspect`: the visible part
of an animal that enters the image is a sliver as well. Minimum area is applied in `localize`.
"""

from __future__ import annotations

import numpy as np

from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Localization

# A component is cut when more of its outline than this lies on a border. A rectangle along a border
# has at most half of its outline there.
MAX_BORDER_SHARE = 0.25
_OUTSIDE = -1


def reject(
    settings: Settings,
    label_map: np.ndarray,
    localizations: tuple[Localization, ...],
    roi_mask: np.ndarray,
) -> tuple[np.ndarray, tuple[Localization, ...]]:
    """Return label map and localizations without those that the filters reject.

    Args:
        settings: `max_area`, a share of the image, and `max_aspect`, longer to shorter side of the
            box, 0 for no limit. A component at the limit is kept.
        label_map: (height, width) uint16, 0 for none.
        localizations: components labelled in the map.
        roi_mask: (height, width) bool, pixels inside the region of interest.
    """
    max_aspect = settings.max_aspect or np.inf
    if not localizations or (settings.max_area == 1.0 and max_aspect == np.inf):
        return label_map, localizations
    shares = border_shares(label_map, roi_mask)
    kept = []
    for localization in localizations:
        left, top, right, bottom = localization.box_xyxy
        short, long = sorted((right - left, bottom - top))
        sliver = long > max_aspect * short and shares[localization.label] <= MAX_BORDER_SHARE
        if localization.area_px / label_map.size <= settings.max_area and not sliver:
            kept.append(localization)
    labels = [localization.label for localization in kept]
    return np.where(np.isin(label_map, labels), label_map, 0), tuple(kept)


def border_shares(label_map: np.ndarray, roi_mask: np.ndarray) -> np.ndarray:
    """Return (labels + 1,) float64: share of each component's outline that lies on a border.

    The outline consists of the pixel sides towards another component, the background, or a border;
    holes included. Borders are those of the image and of the region of interest.

    Args:
        label_map: (height, width) unsigned integers, labels from 1, 0 for none.
        roi_mask: (height, width) bool, pixels inside the region of interest.
    """
    count = int(label_map.max()) + 1
    inside = np.where(roi_mask, label_map.astype(np.int32), _OUTSIDE)
    framed = np.pad(inside, 1, constant_values=_OUTSIDE)
    outline, border = np.zeros(count), np.zeros(count)
    for beyond in (framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:]):
        side = (inside > 0) & (beyond != inside)
        outline += np.bincount(inside[side], minlength=count)
        border += np.bincount(inside[side & (beyond == _OUTSIDE)], minlength=count)
    return border / np.maximum(outline, 1.0)
