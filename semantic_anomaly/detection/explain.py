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
from semantic_anomaly.scoring.normalisation import ScoreNormalisation
from semantic_anomaly.segmentation.masks import StageEmbeddings, stage_embeddings
from semantic_anomaly.structures import PatchGrid

_MAX_FRAMES = 5
_TILE_WIDTH, _TITLE_HEIGHT = 480, 26
_BOX_COLOUR, _PATCH_COLOUR = (230, 120, 0), (255, 220, 0)
_FONT = cv2.FONT_HERSHEY_SIMPLEX


@dataclass(frozen=True)
class Explanation:
    """A nominal entry among the nearest of the embeddings of a box.

    Attributes:
        stage: number of the stage.
        number: of the entry in its stage.
        frame_number: position of its frame among the frames of the index.
        frame: name of that frame.
        row, col: its patch in the grid of the frame.
        distance: the least to one of the embeddings, in deviations of nominal distances.
        embeddings: number of embeddings that have it among their nearest.
    """

    stage: int
    number: int
    frame_number: int
    frame: str
    row: int
    col: int
    distance: float
    embeddings: int

    @property
    def entry(self) -> str:
        """Return 'STAGE:NUMBER', the number alone in the first stage."""
        return f"{self.stage}:{self.number}" if self.stage else f"{self.number}"


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


def explain(
    index: NominalIndex,
    grid: PatchGrid,
    roi: RegionOfInterest,
    normalisations: Sequence[ScoreNormalisation],
    box_xyxy: tuple[float, float, float, float],
    nearest: int,
) -> list[list[Explanation]]:
    """Return by stage the entries nearest to the embeddings of a box.

    Those that are nearest to most embeddings come first, then those of the least distance.

    Args:
        index: has the entries.
        grid: embeddings of the image.
        roi: region of interest.
        normalisations: of each stage.
        box_xyxy: left, top, right, bottom in pixels.
        nearest: entries searched for every embedding, >= 1.

    Raises:
        InputError: a box that is empty, outside the image, or outside the ROI.
    """
    return [
        _explained(number, stage, stage_embeddings(stage_grid, roi), normalisation, inside, nearest)
        for number, (stage, stage_grid, normalisation) in enumerate(
            zip(index.stages, grid.stages, normalisations, strict=True)
        )
        for inside in [patches_of_box(stage_grid, roi, box_xyxy)]
    ]


def _explained(
    number: int,
    index: NominalIndex,
    embeddings: StageEmbeddings,
    normalisation: ScoreNormalisation,
    inside: np.ndarray,
    nearest: int,
) -> list[Explanation]:
    content = index.content
    chosen = embeddings.painting(inside)  # (n,)
    rows, similarities = nearest_rows(
        embeddings.embeddings[chosen], content.embeddings, min(nearest, index.count)
    )
    parameters = np.zeros((2, *inside.shape), np.float32)
    parameters[:, embeddings.inside] = normalisation.parameters(
        embeddings.inside, embeddings.features[embeddings.inside]
    )
    row, col = embeddings.cells[chosen].T
    mean, deviation = parameters[:, row, col]  # (n,) each
    distances = (np.clip(1.0 - similarities, 0.0, 2.0).T - mean).T / deviation[:, None]  # (n, k)
    unique_rows, positions, counts = np.unique(rows, return_inverse=True, return_counts=True)
    least = np.full(len(unique_rows), np.inf)
    np.minimum.at(least, positions.ravel(), distances.ravel())
    explanations = []
    for row, distance, count in zip(unique_rows, least.tolist(), counts.tolist(), strict=True):
        frame, grid_row, grid_col = content.entries[row].tolist()
        entry, name = int(content.numbers[row]), content.frames[frame].name
        explanations.append(
            Explanation(number, entry, frame, name, grid_row, grid_col, distance, count)
        )
    return sorted(explanations, key=lambda e: (-e.embeddings, e.distance))


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
) -> np.ndarray:
    """Return (h, w, 3) uint8 RGB: the image with the box, and the frames of the nearest entries.

    Args:
        image: (height, width, 3) uint8 RGB.
        box_xyxy: left, top, right, bottom in its pixels.
        index: has the thumbnails.
        explanations: entries of the index; the first 5 frames of each stage are drawn.
    """
    tile_height = round(_TILE_WIDTH * image.shape[0] / image.shape[1])
    query = cv2.resize(image, (_TILE_WIDTH, tile_height), interpolation=cv2.INTER_AREA)
    scale = _TILE_WIDTH / image.shape[1]
    left, top, right, bottom = (round(v * scale) for v in box_xyxy)
    cv2.rectangle(query, (left, top), (right, bottom), _BOX_COLOUR, 2)
    tiles = [_titled(query, "image and box")]
    by_frame: dict[tuple[int, int], list[Explanation]] = defaultdict(list)
    for explanation in explanations:
        key = explanation.stage, explanation.frame_number
        if key in by_frame or sum(stage == key[0] for stage, _ in by_frame) < _MAX_FRAMES:
            by_frame[key].append(explanation)
    for (stage, number), entries in by_frame.items():
        record = index.stages[stage].content.frames[number]
        thumbnail = decode_compressed(record.thumbnail, "jpeg")
        tile = cv2.resize(thumbnail, (_TILE_WIDTH, tile_height), interpolation=cv2.INTER_LINEAR)
        for entry in entries:
            corner = mark_patch(tile, (record.rows, record.cols), entry.row, entry.col)
            cv2.putText(tile, entry.entry, corner, _FONT, 0.4, _PATCH_COLOUR, 1, cv2.LINE_AA)
        least = min(entry.distance for entry in entries)
        title = f"{least:.2f} {record.name}: {len(entries)} entries of stage {stage}"
        tiles.append(_titled(tile, title))
    return contact_sheet(tiles, columns=min(3, len(tiles)))


def _titled(tile: np.ndarray, text: str) -> np.ndarray:
    strip = np.full((_TITLE_HEIGHT, tile.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, text, (6, 18), _FONT, 0.45, (20, 20, 20), 1, cv2.LINE_AA)
    return np.concatenate([strip, tile])
