"""Images of a result: heatmap, overlay and contact sheets.

The colour scale is fixed by the calibration, so nominal frames stay dark. The lightness of the
colour map (inferno) rises monotonically, so it is legible without colour vision and in print.
Everything shown by colour is also written as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from semantic_anomaly.errors import ImageError
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.structures import (
    AnomalyResult,
    ComponentState,
    Decision,
    Frame,
    Localization,
)

# The scale ends at twice the threshold; step 255 is reserved for pixels outside the ROI.
SATURATION = 2.0
MAX_LABELS = 12
_STEPS = 254
_OUTSIDE = 255
_OUTSIDE_BRIGHTNESS = 0.45
_STRIP_ROWS = 48
_GAP_PX = 4
# Okabe and Ito's palette, distinguishable with any colour vision.
_BLUE, _ORANGE, _YELLOW, _GREEN = (86, 180, 233), (230, 120, 0), (240, 228, 66), (0, 158, 115)
_WHITE = (255, 255, 255)
_DECISION_COLOURS = {
    Decision.NOMINAL: _BLUE,
    Decision.ANOMALY: _ORANGE,
    Decision.UNKNOWN: _YELLOW,
}
_STATE_COLOURS = {ComponentState.CONFIRMED: _ORANGE, ComponentState.CANDIDATE: _YELLOW}
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def draw_heatmap(result: AnomalyResult, roi: RegionOfInterest | None = None) -> np.ndarray:
    """Return (height, width, 3) uint8 RGB: dark is typical, bright from the threshold on.

    Pixels outside the ROI are black; None: the whole image.
    """
    steps = _steps(result, roi or RegionOfInterest(), slice(None))
    return cv2.applyColorMap(steps, _tables(1.0).colours)


def draw_overlay(
    image: np.ndarray | Frame,
    result: AnomalyResult,
    roi: RegionOfInterest | None = None,
    alpha: float = 0.5,
) -> np.ndarray:
    """Return (height, width, 3) uint8 RGB: the image with heatmap, localizations and a banner.

    The heatmap is transparent where the image is typical. Each box has its own score and the
    p-value of the frame. Pixels outside the ROI are dimmed. The banner has decision, score and
    threshold; a frame above the threshold without a confirmed component reads CANDIDATE.

    Example:
        >>> result = detector.detect(image)
        >>> overlay = draw_overlay(image, result)

    Args:
        image: (height, width, 3) uint8 RGB or the frame, as given to the detector.
        result: of that image.
        roi: region of interest, as `AnomalyDetector.roi`; None: the whole image.
        alpha: opacity of the heatmap from the threshold on, in [0, 1].

    Raises:
        ImageError: image and result differ in size, or the image is not RGB uint8.
    """
    canvas = (image if isinstance(image, Frame) else Frame(np.asarray(image))).image.copy()
    if canvas.shape[:2] != result.heatmap.shape:
        raise ImageError(
            f"overlay: expected an image of the result's size {result.heatmap.shape}, "
            f"found {canvas.shape[:2]}"
        )
    roi = roi or RegionOfInterest()
    _blend_heatmap(canvas, result, roi, _tables(float(alpha)))
    if not roi.is_whole_image:
        cv2.drawContours(canvas, _outline(roi, result.heatmap.shape), -1, _GREEN, 2)
    _draw_localizations(canvas, result)
    _draw_banner(canvas, result)
    return canvas


def contact_sheet(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Return (height, width, 3) uint8 RGB images of equal size in a grid on white, row by row.

    Raises:
        ImageError: no images, images of several sizes, or fewer than one column.
    """
    shapes = {image.shape for image in images}
    if len(shapes) != 1 or columns < 1:
        raise ImageError(
            f"contact sheet: expected images of one size and a column, found sizes "
            f"{sorted(shapes)} and {columns} columns"
        )
    height, width = images[0].shape[:2]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    tiles = np.full((rows * columns, height + _GAP_PX, width + _GAP_PX, 3), 255, np.uint8)
    tiles[: len(images), :height, :width] = images
    rows_of_tiles = tiles.reshape(rows, columns, *tiles.shape[1:]).swapaxes(1, 2)
    return rows_of_tiles.reshape(rows * tiles.shape[1], -1, 3)[:-_GAP_PX, :-_GAP_PX]


def _steps(result: AnomalyResult, roi: RegionOfInterest, rows: slice) -> np.ndarray:
    """Return (rows, width) uint8 indices into the colour tables."""
    low, high = result.scale.low, result.scale.high
    gain = _STEPS / (SATURATION * (high - low))
    # OpenCV takes the absolute value: values below the scale would be drawn as ones above.
    above_low = cv2.max(result.heatmap[rows], low)
    steps = cv2.convertScaleAbs(above_low, alpha=gain, beta=-gain * low)
    cv2.min(steps, _STEPS, dst=steps)
    if not roi.is_whole_image:
        cv2.bitwise_or(steps, _outside(roi, result.heatmap.shape)[rows], dst=steps)
    return steps


def _blend_heatmap(
    canvas: np.ndarray, result: AnomalyResult, roi: RegionOfInterest, tables: _Tables
) -> None:
    # Strips stay in the cache and avoid allocating large buffers, which would dominate the time.
    for top in range(0, len(canvas), _STRIP_ROWS):
        rows = slice(top, top + _STRIP_ROWS)
        steps = _steps(result, roi, rows)
        if steps.max() >= tables.first_visible:
            weight = cv2.cvtColor(cv2.LUT(steps, tables.image_weight), cv2.COLOR_GRAY2RGB)
            cv2.multiply(canvas[rows], weight, dst=weight, scale=1 / 255)
            cv2.add(weight, cv2.applyColorMap(steps, tables.weighted_colours), dst=canvas[rows])


class _Tables(NamedTuple):
    """Lookup tables of the 256 steps."""

    colours: np.ndarray  # (256, 1, 3) uint8 RGB
    image_weight: np.ndarray  # (256,) uint8, weight of the image in the overlay, of 255
    weighted_colours: np.ndarray  # (256, 1, 3) uint8, colours times the remaining weight
    first_visible: int  # first step that changes the image


@lru_cache(maxsize=32)
def _tables(alpha: float) -> _Tables:
    heat = np.arange(256, dtype=np.float32) * np.float32(SATURATION / _STEPS)
    ramp = np.round(np.minimum(heat / SATURATION, 1.0) * 255.0).astype(np.uint8).reshape(256, 1)
    colours = cv2.cvtColor(cv2.applyColorMap(ramp, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    colours[_OUTSIDE] = 0
    # Transparent below half the threshold, full opacity from the threshold on.
    opacity = alpha * np.clip((heat - 0.5) / 0.5, 0.0, 1.0)
    image_weight = 1.0 - opacity
    image_weight[_OUTSIDE] = _OUTSIDE_BRIGHTNESS
    return _Tables(
        colours,
        np.round(255.0 * image_weight).astype(np.uint8),
        np.round(colours * opacity[:, None, None]).astype(np.uint8),
        int(np.argmax(image_weight < 1.0)),
    )


@lru_cache(maxsize=8)
def _outside(roi: RegionOfInterest, image_hw: tuple[int, int]) -> np.ndarray:
    return np.where(roi.pixel_mask(image_hw), 0, _OUTSIDE).astype(np.uint8)


@lru_cache(maxsize=8)
def _outline(roi: RegionOfInterest, image_hw: tuple[int, int]) -> tuple[np.ndarray, ...]:
    mask = roi.pixel_mask(image_hw).astype(np.uint8)
    return tuple(cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)[0])


def _draw_localizations(canvas: np.ndarray, result: AnomalyResult) -> None:
    thickness = max(1, round(canvas.shape[0] / 360))
    for localization in result.localizations:
        left, top, right, bottom = (int(v) for v in localization.box_xyxy)
        mask = result.label_map[top:bottom, left:right] == localization.label
        contours, _ = cv2.findContours(
            mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=(left, top)
        )
        cv2.drawContours(canvas, contours, -1, _WHITE, thickness)
        # A box of a single pixel would not be visible.
        pad_x, pad_y = (max(0, 5 * thickness - size) for size in (right - left, bottom - top))
        corners = (left - pad_x, top - pad_y), (right - 1 + pad_x, bottom - 1 + pad_y)
        cv2.rectangle(canvas, *corners, _STATE_COLOURS[localization.state], thickness + 1)
    # Worst last, so that its label lies above the others.
    for localization in reversed(result.localizations[:MAX_LABELS]):
        _draw_label(canvas, localization, result)


def _draw_label(canvas: np.ndarray, localization: Localization, result: AnomalyResult) -> None:
    text = f"{localization.score:.2f}"
    if result.p_value is not None:
        text += f" p={result.p_value:.2g}"
    scale = max(0.4, canvas.shape[0] / 1100)
    width, height = _text_size(text, scale)
    left, top, _, bottom = (int(v) for v in localization.box_xyxy)
    x = max(min(left, canvas.shape[1] - width - 4), 0)
    y = top - height - 6
    if y < _banner_height(canvas):
        y = max(min(bottom + 2, canvas.shape[0] - height - 4), 0)
    cv2.rectangle(canvas, (x, y), (x + width + 4, y + height + 4), (0, 0, 0), cv2.FILLED)
    cv2.putText(canvas, text, (x + 2, y + height + 2), _FONT, scale, _WHITE, 1, cv2.LINE_AA)


def _banner_height(canvas: np.ndarray) -> int:
    return max(12, round(canvas.shape[0] / 15))


def _draw_banner(canvas: np.ndarray, result: AnomalyResult) -> None:
    height = _banner_height(canvas)
    banner = canvas[:height]
    cv2.convertScaleAbs(banner, dst=banner, alpha=0.25)
    title, colour = result.decision.value, _DECISION_COLOURS[result.decision]
    # Localizations exist above the threshold only.
    if result.decision is Decision.NOMINAL and result.localizations:
        title, colour = ComponentState.CANDIDATE.value, _STATE_COLOURS[ComponentState.CANDIDATE]
    parts = [title.upper(), f"score {result.score:.3f}"]
    if result.threshold is not None:
        parts.append(f"threshold {result.threshold:.3f}")
    if result.p_value is not None:
        parts.append(f"p {result.p_value:.2g}")
    if result.reason:
        parts.append(result.reason)
    if result.threshold is None:
        parts.append(f"heatmap scaled by {result.scale.source}")
    text = "   ".join(parts)
    text_width, text_height = _text_size(text, 1.0)
    scale = min(height * 0.5 / text_height, (canvas.shape[1] - 8) / text_width)
    origin = (4, round((height + _text_size(text, scale)[1]) / 2))
    thickness = 1 if scale < 0.8 else 2
    cv2.putText(canvas, text, origin, _FONT, scale, colour, thickness, cv2.LINE_AA)


def _text_size(text: str, scale: float) -> tuple[int, int]:
    (width, height), _ = cv2.getTextSize(text, _FONT, scale, 1)
    return max(width, 1), max(height, 1)
