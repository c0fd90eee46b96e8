"""Pictures of assessed frames: image, heatmap and overlay side by side, with a caption."""

from __future__ import annotations

import heapq
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from semantic_anomaly.detection.explain import mark_place
from semantic_anomaly.detection.rendering import contact_sheet, draw_heatmap, draw_overlay
from semantic_anomaly.io.images import encode_jpeg, encode_png, read_image
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.structures import AnomalyResult, Frame

if TYPE_CHECKING:
    from semantic_anomaly.detection.detector import AnomalyDetector

PANEL_WIDTH_PX = 640
SHEET_WIDTH_PX = 480
SHEET_COLUMNS = 4
WORST = 4
_SHEET = "sheet"
_TRUTH = (0, 220, 90)
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
    mark_place(picture, example.grid_hw, example.row, example.col)
    return picture


class Album:
    """Writes the pictures of a run as they come, so that a later run can go on with them.

    Args:
        folder: `overlays/`, `panels/`, `worst/` and `contact_sheet.jpg` are written here.
        region: the part of the image that takes part.
        alpha: strength of the heatmap in overlays.
        every: pictures of every so manieth frame, 0 for none.
        sheet: numbers of the frames on the contact sheet.
    """

    def __init__(
        self,
        folder: Path,
        region: ImageRegion,
        alpha: float,
        every: int,
        sheet: Collection[int] = (),
    ) -> None:
        self._folder, self._region, self._alpha = folder, region, alpha
        self._every, self._sheet = every, sheet
        self._worst: dict[str, list[tuple[float, int, str]]] = {}

    def passed(self, number: int, stem: str, ranks: Sequence[tuple[str, float]]) -> None:
        """Take a frame whose pictures an earlier run has written."""
        self._extremes(number, stem, ranks)

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
        """Write the pictures of a frame that are wanted.

        Args:
            number: of the frame in the run.
            frame, result: what was assessed, and what was stated.
            stem: name of the pictures.
            caption: one line.
            mask: ground truth.
            ranks: group and how extreme it is there; the `WORST` of each group are kept.
            nearest: makes the fourth picture, of a frame that is kept so or written always.
            always: write this frame whatever its number.
        """
        regular = always or (self._every > 0 and number % self._every == 0)
        extreme = self._extremes(number, stem, ranks)
        if not (regular or extreme or number in self._sheet):
            return
        overlay = draw_overlay(frame.image, result, self._region, self._alpha)
        if number in self._sheet:
            small = at_width(_with_truth(overlay, mask), SHEET_WIDTH_PX)
            small = np.concatenate([_strip(caption, small.shape[1], 18), small])
            self._write(f"{_SHEET}/{number:09d}.png", encode_png(small))
        if not (regular or extreme):
            return
        heat = draw_heatmap(result, self._region)
        like = nearest() if extreme or always else None
        if regular:
            panel = side_by_side(
                frame.image, heat, overlay, mask, caption, like if always else None
            )
            self._write(f"overlays/{stem}.jpg", encode_jpeg(overlay))
            self._write(f"panels/{stem}.jpg", encode_jpeg(panel, 88))
        if extreme:
            panel = side_by_side(frame.image, heat, overlay, mask, caption, like)
            content = encode_jpeg(panel, 88)
            for group in extreme:
                self._write(_kept(group, number), content)

    def finish(self) -> None:
        """Make what could only be chosen at the end: names of the worst, and the contact sheet."""
        for group, kept in self._worst.items():
            for place, (_, number, stem) in enumerate(sorted(kept, reverse=True), start=1):
                file = self._folder / _kept(group, number)
                # An earlier run may have been stopped after this.
                if file.exists():
                    file.rename(file.with_name(f"{group}_{place}_{stem}.jpg"))
        thumbnails = [read_image(file) for file in sorted((self._folder / _SHEET).glob("*.png"))]
        if thumbnails:
            sheet = contact_sheet(thumbnails, SHEET_COLUMNS)
            self._write("contact_sheet.jpg", encode_jpeg(sheet, 88))
            shutil.rmtree(self._folder / _SHEET)

    def _extremes(self, number: int, stem: str, ranks: Sequence[tuple[str, float]]) -> list[str]:
        """Return the groups in which a frame is among the worst so far."""
        groups = []
        for group, value in ranks:
            kept = self._worst.setdefault(group, [])
            if len(kept) < WORST:
                heapq.heappush(kept, (value, number, stem))
            elif value > kept[0][0]:
                _, dropped, _ = heapq.heapreplace(kept, (value, number, stem))
                (self._folder / _kept(group, dropped)).unlink(missing_ok=True)
            else:
                continue
            groups.append(group)
        return groups

    def _write(self, name: str, content: bytes) -> None:
        path = self._folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def _kept(group: str, number: int) -> str:
    return f"worst/{group}@{number}.jpg"


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
