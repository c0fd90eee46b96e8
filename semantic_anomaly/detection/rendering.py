"""Pictures of a result, on a scale that is fixed by the calibration: nominal frames stay dark.

The colour map is inferno: its lightness rises throughout, so it reads without colour vision and
in print. Text says in words what colour says.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from semantic_anomaly.errors import ImageError
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.structures import (
    AnomalyResult,
    ComponentState,
    Decision,
    HeatmapScale,
    Localization,
)

# The scale runs to twice the threshold; index 255 is kept for pixels that take no part.
SATURATION = 2.0
_STEPS = 254
_OUTSIDE = 255
_OUTSIDE_BRIGHTNESS = 0.45
_STRIP_ROWS = 48
# Okabe and Ito's palette, told apart with any colour vision.
_COLOURS = {
    Decision.NOMINAL: (86, 180, 233),
    Decision.ANOMALY: (230, 120, 0),
    Decision.UNKNOWN: (240, 228, 66),
}
_PLACES = {ComponentState.CONFIRMED: (230, 120, 0), ComponentState.CANDIDATE: (240, 228, 66)}
_CONTOUR = (255, 255, 255)
_ROI_OUTLINE = (0, 158, 115)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
MAX_LABELS = 12


def draw_heatmap(result: AnomalyResult, region: ImageRegion | None = None) -> np.ndarray:
    """Return (height, width, 3) uint8 RGB: dark is typical, bright from the threshold on.

    Args:
        result: its heatmap and scale are drawn.
        region: pixels outside it are drawn black; None: the whole image takes part.
    """
    steps = _steps(result, region, slice(None))
    return cv2.applyColorMap(steps, _tables(result.scale, 1.0).colours)


def draw_overlay(
    image: np.ndarray, result: AnomalyResult, region: ImageRegion, alpha: float
) -> np.ndarray:
    """Return (height, width, 3) uint8 RGB: the image, and over it what the detector states.

    The heatmap covers the image the more, the further a pixel is from typical, so nominal places
    show the plain image. Boxes carry their own score and the frame's p-value; what takes no part
    is dimmed and outlined; a banner gives decision, score and threshold.

    Args:
        image: (height, width, 3) uint8 RGB, the frame that was assessed.
        result: what is drawn.
        region: the part of the image that takes part.
        alpha: strength of the heatmap from the threshold on, in [0, 1].

    Raises:
        ImageError: image and result differ in size.
    """
    if image.shape[:2] != result.heatmap.shape:
        raise ImageError(
            f"overlay: expected an image of the result's size {result.heatmap.shape}, "
            f"found {image.shape[:2]}"
        )
    canvas = image.copy()
    _cover(canvas, result, region, _tables(result.scale, float(alpha)))
    if not region.is_whole_image:
        cv2.drawContours(canvas, _outline(region, result.heatmap.shape), -1, _ROI_OUTLINE, 2)
    _draw_places(canvas, result)
    _draw_banner(canvas, result)
    return canvas


def contact_sheet(images: Sequence[np.ndarray], columns: int, gap_px: int = 4) -> np.ndarray:
    """Return pictures of equal size side by side, row by row, on white.

    Args:
        images: (height, width, 3) uint8 RGB each.
        columns: pictures a row.
        gap_px: white pixels between them.

    Raises:
        ImageError: no pictures, pictures of several sizes, or fewer than one column.
    """
    shapes = {image.shape for image in images}
    if len(shapes) != 1 or columns < 1:
        raise ImageError(
            f"contact sheet: expected pictures of one size and a column, found sizes "
            f"{sorted(shapes)} and {columns} columns"
        )
    height, width = images[0].shape[:2]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet_hw = rows * (height + gap_px) - gap_px, columns * (width + gap_px) - gap_px
    sheet = np.full((*sheet_hw, 3), 255, np.uint8)
    for number, image in enumerate(images):
        top = number // columns * (height + gap_px)
        left = number % columns * (width + gap_px)
        sheet[top : top + height, left : left + width] = image
    return sheet


def _steps(result: AnomalyResult, region: ImageRegion | None, rows: slice) -> np.ndarray:
    """Return (rows, width) uint8 indices into the colour tables."""
    steps = cv2.convertScaleAbs(result.heatmap[rows], alpha=_steps_per_distance(result.scale))
    cv2.min(steps, _STEPS, dst=steps)
    if region is not None and not region.is_whole_image:
        cv2.bitwise_or(steps, _outside(region, result.heatmap.shape)[rows], dst=steps)
    return steps


def _steps_per_distance(scale: HeatmapScale) -> float:
    return _STEPS / (scale.low + SATURATION * (scale.high - scale.low))


def _cover(canvas: np.ndarray, result: AnomalyResult, region: ImageRegion, tables: _Tables) -> None:
    """Blend the colours of the heatmap into the canvas."""
    # Strips stay in the cache, and need no large buffers: fresh pages would cost most of the time.
    for top in range(0, len(canvas), _STRIP_ROWS):
        rows = slice(top, top + _STRIP_ROWS)
        steps = _steps(result, region, rows)
        if steps.max() >= tables.first:
            share = cv2.cvtColor(cv2.LUT(steps, tables.image_share), cv2.COLOR_GRAY2RGB)
            cv2.multiply(canvas[rows], share, dst=share, scale=1 / 255)
            cv2.add(share, cv2.applyColorMap(steps, tables.covering), dst=canvas[rows])


class _Tables(NamedTuple):
    """What each of the 256 steps means.

    Attributes:
        colours: (256, 1, 3) uint8 RGB.
        image_share: (256,) uint8, share of the image below, of 255.
        covering: (256, 1, 3) uint8, colours by the share that is left to them.
        first: the first step that covers anything of the image.
    """

    colours: np.ndarray
    image_share: np.ndarray
    covering: np.ndarray
    first: int


@lru_cache(maxsize=32)
def _tables(scale: HeatmapScale, alpha: float) -> _Tables:
    distances = np.arange(256, dtype=np.float32) / np.float32(_steps_per_distance(scale))
    heat = scale.normalise(distances)
    ramp = np.round(np.minimum(heat / SATURATION, 1.0) * 255.0).astype(np.uint8).reshape(256, 1)
    colours = cv2.cvtColor(cv2.applyColorMap(ramp, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    colours[_OUTSIDE] = 0
    # Quiet below half the threshold, in full from the threshold on.
    cover = alpha * np.clip((heat - 0.5) / 0.5, 0.0, 1.0)
    image_share = 1.0 - cover
    image_share[_OUTSIDE] = _OUTSIDE_BRIGHTNESS
    return _Tables(
        colours,
        np.round(255.0 * image_share).astype(np.uint8),
        np.round(colours * cover[:, None, None]).astype(np.uint8),
        int(np.argmax(image_share < 1.0)),
    )


@lru_cache(maxsize=8)
def _outside(region: ImageRegion, image_hw: tuple[int, int]) -> np.ndarray:
    return np.where(region.pixel_mask(image_hw), 0, _OUTSIDE).astype(np.uint8)


@lru_cache(maxsize=8)
def _outline(region: ImageRegion, image_hw: tuple[int, int]) -> tuple[np.ndarray, ...]:
    inside = region.pixel_mask(image_hw).astype(np.uint8)
    return tuple(cv2.findContours(inside, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)[0])


def _draw_places(canvas: np.ndarray, result: AnomalyResult) -> None:
    thickness = max(1, round(canvas.shape[0] / 360))
    for place in result.localizations:
        colour = _PLACES[place.state]
        left, top, right, bottom = (int(v) for v in place.box_xyxy)
        window = (result.label_map[top:bottom, left:right] == place.label).astype(np.uint8)
        contours, _ = cv2.findContours(
            window, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=(left, top)
        )
        cv2.drawContours(canvas, contours, -1, _CONTOUR, thickness)
        # A place of a single pixel would not be seen.
        apart_x, apart_y = (max(0, 5 * thickness - size) for size in (right - left, bottom - top))
        corners = (left - apart_x, top - apart_y), (right - 1 + apart_x, bottom - 1 + apart_y)
        cv2.rectangle(canvas, *corners, colour, thickness + 1)
    # Worst last, so that its label lies above the others.
    for place in reversed(result.localizations[:MAX_LABELS]):
        _draw_label(canvas, place, result)


def _draw_label(canvas: np.ndarray, place: Localization, result: AnomalyResult) -> None:
    text = f"{place.score:.2f}"
    if result.p_value is not None:
        text += f" p={result.p_value:.2g}"
    scale = max(0.4, canvas.shape[0] / 1100)
    left, top, _, bottom = (int(v) for v in place.box_xyxy)
    _, high = _text_size(text, scale)
    above_box = top - high - 6
    y = above_box if above_box >= _banner_height(canvas) else bottom + 2
    _draw_text(canvas, text, (left, min(y, canvas.shape[0] - high - 4)), scale, (255, 255, 255))


def _banner_height(canvas: np.ndarray) -> int:
    return max(12, round(canvas.shape[0] / 15))


def _draw_banner(canvas: np.ndarray, result: AnomalyResult) -> None:
    height = _banner_height(canvas)
    banner = canvas[:height]
    cv2.convertScaleAbs(banner, dst=banner, alpha=0.25)
    parts = [result.decision.value.upper(), f"score {result.score:.3f}"]
    if result.threshold is not None:
        parts.append(f"threshold {result.threshold:.3f}")
    if result.p_value is not None:
        parts.append(f"p {result.p_value:.2g}")
    if result.reason:
        parts.append(result.reason)
    text = "   ".join(parts)
    wide, high = _text_size(text, 1.0)
    scale = min(height * 0.5 / high, (canvas.shape[1] - 8) / wide)
    _, drawn = _text_size(text, scale)
    origin = (4, round((height + drawn) / 2))
    thickness = 1 if scale < 0.8 else 2
    colour = _COLOURS[result.decision]
    cv2.putText(canvas, text, origin, _FONT, scale, colour, thickness, cv2.LINE_AA)


def _text_size(text: str, scale: float) -> tuple[int, int]:
    (wide, high), _ = cv2.getTextSize(text, _FONT, scale, 1)
    return max(wide, 1), max(high, 1)


def _draw_text(
    canvas: np.ndarray, text: str, top_left: tuple[int, int], scale: float, colour: tuple[int, ...]
) -> None:
    wide, high = _text_size(text, scale)
    x = min(max(top_left[0], 0), max(canvas.shape[1] - wide - 4, 0))
    y = max(top_left[1], 0)
    cv2.rectangle(canvas, (x, y), (x + wide + 4, y + high + 4), (0, 0, 0), cv2.FILLED)
    cv2.putText(canvas, text, (x + 2, y + high + 2), _FONT, scale, colour, 1, cv2.LINE_AA)
