"""Pictures of assessed frames: image, heatmap and overlay side by side, with a caption."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from semantic_anomaly.images import encode_jpeg
from semantic_anomaly.regions import ImageRegion
from semantic_anomaly.rendering import contact_sheet, draw_heatmap, draw_overlay
from semantic_anomaly.structures import AnomalyResult, Frame

if TYPE_CHECKING:
    from semantic_anomaly.detector import AnomalyDetector

PANEL_WIDTH_PX = 640
SHEET_WIDTH_PX = 480
SHEET_COLUMNS = 4
WORST = 4
_TRUTH, _NEAREST = (0, 220, 90), (255, 220, 0)
_GOOD, _BAD = (200, 240, 205), (255, 214, 190)
_TINTS = {"FOUND": _GOOD, "MISSED": _BAD, "FALSE ALARM": _BAD, "SOMETHING ELSE": _BAD}
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def side_by_side(
    image: np.ndarray,
    heat: np.ndarray,
    overlay: np.ndarray,
    mask: np.ndarray | None,
    caption: str,
    nearest: np.ndarray | None = None,
) -> np.ndarray:
    """Return image, heatmap and overlay in a row under a caption, (height, width, 3) uint8 RGB.

    Args:
        image, heat, overlay: (height, width, 3) uint8 RGB of one size.
        mask: (height, width) uint8 ground truth, outlined on the image where it is 1.
        caption: one line.
        nearest: a fourth picture, of any size.
    """
    height, width = image.shape[:2]
    shown = [_with_truth(image, mask), heat, overlay]
    if nearest is not None:
        shown.append(cv2.resize(nearest, (width, height), interpolation=cv2.INTER_LINEAR))
    panels = [at_width(panel, PANEL_WIDTH_PX) for panel in shown]
    row = contact_sheet(panels, columns=len(panels))
    return np.concatenate([_strip(caption, row.shape[1], 30), row])


def nearest_nominal(detector: AnomalyDetector, frame: Frame) -> np.ndarray | None:
    """Return the nominal frame that the oddest patch of a frame is nearest to, its place marked.

    Returns:
        (h, w, 3) uint8 RGB, 320 pixels at most; None when the index has no picture of it.
    """
    grid = detector.embedder.embed([frame.image])[0]
    distances = detector.score(grid)[1]
    row, col = np.unravel_index(int(np.nanargmax(distances)), distances.shape)
    example = detector.index.nearest(grid.features[row, col])
    picture = detector.index.thumbnail(example.frame)
    if picture is None:
        return None
    picture = picture.copy()
    (rows, cols), (height, width) = example.grid_hw, picture.shape[:2]
    corners = [
        (round((example.col + i) * width / cols), round((example.row + i) * height / rows))
        for i in (-1, 2)
    ]
    cv2.rectangle(picture, corners[0], corners[1], _NEAREST, 1)
    return picture


@dataclass
class Album:
    """Collects the pictures of a run in bounded memory; most are written as they come.

    Attributes:
        folder: `overlays/`, `panels/`, `worst/` and `contact_sheet.jpg` are written here.
        region: the part of the image that takes part.
        alpha: strength of the heatmap in overlays.
        every: pictures of every so manieth frame, 0 for none.
        sheet: numbers of the frames on the contact sheet.
    """

    folder: Path
    region: ImageRegion
    alpha: float
    every: int
    sheet: Collection[int] = ()
    _thumbnails: list[np.ndarray] = field(default_factory=list)
    _worst: dict[str, list[tuple[float, int, str, bytes]]] = field(default_factory=dict)

    def add(
        self,
        number: int,
        frame: Frame,
        result: AnomalyResult,
        *,
        stem: str,
        caption: str,
        mask: np.ndarray | None = None,
        ranks: Sequence[tuple[str, float]] = (),
        nearest: Callable[[], np.ndarray | None] = lambda: None,
        always: bool = False,
    ) -> None:
        """Take the pictures of a frame that are wanted.

        Args:
            number: of the frame in the run.
            frame, result: what was assessed, and what was stated.
            stem: name of the pictures.
            caption: one line.
            mask: ground truth.
            ranks: group and how extreme it is there; the `WORST` of each group are kept.
            nearest: makes the fourth picture of a frame that is kept so.
            always: write this frame whatever its number.
        """
        regular = always or (self.every > 0 and number % self.every == 0)
        kept = {group: self._worst.setdefault(group, []) for group, _ in ranks}
        extreme = [
            (group, value)
            for group, value in ranks
            if len(kept[group]) < WORST or value > kept[group][0][0]
        ]
        if not (regular or extreme or number in self.sheet):
            return
        overlay = draw_overlay(frame.image, result, self.region, self.alpha)
        if number in self.sheet:
            small = at_width(_with_truth(overlay, mask), SHEET_WIDTH_PX)
            self._thumbnails.append(np.concatenate([_strip(caption, small.shape[1], 18), small]))
        if not (regular or extreme):
            return
        heat = draw_heatmap(result, self.region)
        if regular:
            panel = side_by_side(frame.image, heat, overlay, mask, caption)
            self._write(f"overlays/{stem}.jpg", encode_jpeg(overlay))
            self._write(f"panels/{stem}.jpg", encode_jpeg(panel, 88))
        if extreme:
            panel = side_by_side(frame.image, heat, overlay, mask, caption, nearest())
            content = encode_jpeg(panel, 88)
            for group, value in extreme:
                push = heapq.heappush if len(kept[group]) < WORST else heapq.heappushpop
                push(kept[group], (value, number, stem, content))

    def finish(self) -> None:
        """Write what could only be chosen at the end: the worst frames and the contact sheet."""
        for group, kept in self._worst.items():
            for place, (_, _, stem, panel) in enumerate(sorted(kept, reverse=True), start=1):
                self._write(f"worst/{group}_{place}_{stem}.jpg", panel)
        if self._thumbnails:
            sheet = contact_sheet(self._thumbnails, SHEET_COLUMNS)
            self._write("contact_sheet.jpg", encode_jpeg(sheet, 88))

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def evenly(numbers: list[int], count: int) -> list[int]:
    """Return at most `count` of the numbers, evenly spread, first and last among them."""
    if len(numbers) <= count:
        return list(numbers)
    return [numbers[round(i * (len(numbers) - 1) / max(count - 1, 1))] for i in range(count)]


def at_width(image: np.ndarray, width: int) -> np.ndarray:
    """Return the image resized to a width in pixels, aspect kept."""
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    shrinks = width < image.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=method)


def _with_truth(image: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Return a copy with the ground truth outlined in green."""
    shown = image.copy()
    if mask is not None:
        marked = (mask == 1).astype(np.uint8)
        contours, _ = cv2.findContours(marked, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(shown, contours, -1, _TRUTH, max(1, round(image.shape[0] / 300)))
    return shown


def _strip(text: str, width: int, height: int) -> np.ndarray:
    """Return a strip with dark text that fits into it, tinted by the verdict that ends the text."""
    strip = np.empty((height, width, 3), np.uint8)
    strip[:] = next((tint for word, tint in _TINTS.items() if text.endswith(word)), 255)
    (wide, high), _ = cv2.getTextSize(text, _FONT, 1.0, 1)
    scale = min(0.55 * height / max(high, 1), (width - 12) / max(wide, 1))
    baseline = round((height + high * scale) / 2) - 1
    cv2.putText(strip, text, (6, baseline), _FONT, scale, (20, 20, 20), 1, cv2.LINE_AA)
    return strip
