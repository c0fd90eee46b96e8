"""Explain a part of an image: the nominal entries nearest to it, as a list and as a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from semantic_anomaly.detection.rendering import contact_sheet
from semantic_anomaly.errors import InputError
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.index.search import nearest_rows
from semantic_anomaly.io.images import decode_compressed
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.segmentation.masks import instances_of
from semantic_anomaly.structures import PatchGrid

_MAX_FRAMES = 5
_TILE_WIDTH, _TITLE_HEIGHT = 480, 26
_BOX_COLOUR, _PATCH_COLOUR = (230, 120, 0), (255, 220, 0)
_FONT = cv2.FONT_HERSHEY_SIMPLEX


@dataclass(frozen=True)
class Explanation:
    """A nominal entry among the nearest of the patches of a box.

    Attributes:
        number: of the entry.
        frame_number: position of its frame among the frames of the index.
        frame: name of that frame.
        row, col: its patch in the grid of the frame.
        distance: the least to one of the patches, in the unit that `explain` was asked for.
        patches: number of patches that have it among their nearest.
    """

    number: int
    frame_number: int
    frame: str
    row: int
    col: int
    distance: float
    patches: int


def patches_of_box(
    grid: PatchGrid, roi: RegionOfInterest, box_xyxy: tuple[float, float, float, float]
) -> np.ndarray:
    """Return (rows, cols) bool: patches inside the ROI of which at least half lies in a box.

    A box smaller than a patch selects the patch that its centre lies in. Boxes are in pixels.

    Raises:
        InputError: a box that is empty, outside the image, or outside the ROI.
    """
    left, top, right, bottom = box_xyxy
    height, width = grid.image_hw
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise InputError(
            f"box {' '.join(f'{v:g}' for v in box_xyxy)}: expected X0 < X1 and Y0 < Y1 within the "
            f"image of {width}x{height} pixels"
        )
    rows, cols = grid.grid_hw

    def covered(start: float, stop: float, side: float, count: int) -> np.ndarray:
        edges = np.arange(count) * side
        overlap: np.ndarray = np.minimum(edges + side, stop) - np.maximum(edges, start)
        centre = min(int((start + stop) / 2 / side), count - 1)
        return (overlap >= side / 2) | (np.arange(count) == centre)

    mask = np.outer(
        covered(top, bottom, height / rows, rows), covered(left, right, width / cols, cols)
    )
    mask &= roi.patch_mask(grid.grid_hw, grid.image_hw)
    if not mask.any():
        raise InputError("box: expected patches of the region of interest, found none inside it")
    return mask


def instances_of_box(grid: PatchGrid, roi: RegionOfInterest, inside: np.ndarray) -> np.ndarray:
    """Return (n, dim) float32: the instances of which at least half lies in (rows, cols) patches.

    Raises:
        InputError: no instance is inside the box.
        ModelOutputError: the image was not segmented.
    """
    instances = instances_of(grid, roi)
    shares = instances.shares  # (n, rows, cols)
    selected = shares[:, inside].sum(axis=1) >= 0.5 * shares.sum(axis=(1, 2))
    if not selected.any():
        raise InputError("box: expected an instance at least half inside it, found none")
    return instances.embeddings[selected]


def explain(
    index: NominalIndex,
    embeddings: np.ndarray,
    nearest: int,
    *,
    gain: np.ndarray | float = 1.0,
    offset: np.ndarray | float = 0.0,
) -> list[Explanation]:
    """Return the entries nearest to some patches: by number of patches, then by distance.

    Distances are cosine distances in [0, 2] by default. With gain and offset of the score
    normalisation they have the unit of the threshold: offset + gain * distance.

    Args:
        index: has the entries.
        embeddings: (n, dim) float32, unit norm.
        nearest: entries searched for every patch, >= 1.
        gain, offset: (n,) or a number.
    """
    content = index.content
    rows, similarities = nearest_rows(embeddings, content.embeddings, min(nearest, index.count))
    distances = np.clip(1.0 - similarities, 0.0, 2.0)  # (n, k)
    distances = (np.asarray(offset) + np.asarray(gain) * distances.T).T
    unique_rows, positions, counts = np.unique(rows, return_inverse=True, return_counts=True)
    least = np.full(len(unique_rows), np.inf)
    np.minimum.at(least, positions.ravel(), distances.ravel())
    explanations = []
    for row, distance, patches in zip(unique_rows, least.tolist(), counts.tolist(), strict=True):
        frame, grid_row, grid_col = content.entries[row].tolist()
        number, name = int(content.numbers[row]), content.frames[frame].name
        explanations.append(Explanation(number, frame, name, grid_row, grid_col, distance, patches))
    return sorted(explanations, key=lambda entry: (-entry.patches, entry.distance))


def mark_patch(image: np.ndarray, grid_hw: tuple[int, int], row: int, col: int) -> tuple[int, int]:
    """Outline a patch with a margin of one patch on an RGB image; return the top left pixel."""
    (rows, cols), (height, width) = grid_hw, image.shape[:2]
    top_left, bottom_right = (
        (round((col + i) * width / cols), round((row + i) * height / rows)) for i in (-1, 2)
    )
    cv2.rectangle(image, top_left, bottom_right, _PATCH_COLOUR, 1)
    return top_left


def draw_explanations(
    image: np.ndarray,
    box_xyxy: tuple[float, float, float, float],
    index: NominalIndex,
    explanations: Sequence[Explanation],
    threshold: float | None = None,
) -> np.ndarray:
    """Return (h, w, 3) uint8 RGB: the image with the box, and the frames of the nearest entries.

    Args:
        image: (height, width, 3) uint8 RGB.
        box_xyxy: left, top, right, bottom in its pixels.
        index: has the thumbnails.
        explanations: entries of the index; their first 5 frames are drawn.
        threshold: written beside the distances; has their unit.
    """
    tile_height = round(_TILE_WIDTH * image.shape[0] / image.shape[1])
    query = cv2.resize(image, (_TILE_WIDTH, tile_height), interpolation=cv2.INTER_AREA)
    scale = _TILE_WIDTH / image.shape[1]
    left, top, right, bottom = (round(v * scale) for v in box_xyxy)
    cv2.rectangle(query, (left, top), (right, bottom), _BOX_COLOUR, 2)
    limit = "" if threshold is None else f", threshold {threshold:.4f}"
    tiles = [_titled(query, f"image and box{limit}")]
    by_frame: dict[int, list[Explanation]] = defaultdict(list)
    for explanation in explanations:
        by_frame[explanation.frame_number].append(explanation)
    for number, entries in list(by_frame.items())[:_MAX_FRAMES]:
        record = index.content.frames[number]
        thumbnail = decode_compressed(record.thumbnail, "jpeg")
        tile = cv2.resize(thumbnail, (_TILE_WIDTH, tile_height), interpolation=cv2.INTER_LINEAR)
        for entry in entries:
            corner = mark_patch(tile, (record.rows, record.cols), entry.row, entry.col)
            cv2.putText(tile, str(entry.number), corner, _FONT, 0.4, _PATCH_COLOUR, 1, cv2.LINE_AA)
        least = min(entry.distance for entry in entries)
        tiles.append(_titled(tile, f"{least:.4f} {record.name}: {len(entries)} entries"))
    return contact_sheet(tiles, columns=min(3, len(tiles)))


def _titled(tile: np.ndarray, text: str) -> np.ndarray:
    strip = np.full((_TITLE_HEIGHT, tile.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, text, (6, 18), _FONT, 0.45, (20, 20, 20), 1, cv2.LINE_AA)
    return np.concatenate([strip, tile])
