"""Which nominal entries explain a part of an image away, as a list and as a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from semantic_anomaly.detection.rendering import contact_sheet
from semantic_anomaly.errors import InputError
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.images import decode_compressed
from semantic_anomaly.linalg import inner_products
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.segmentation.masks import instances_of, pairs_of
from semantic_anomaly.structures import PatchGrid

_PIECE = 4096
_TILE_WIDTH, _STRIP_HEIGHT = 480, 26
_PICTURES = 5
_BOX, _MARK = (230, 120, 0), (255, 220, 0)
_FONT = cv2.FONT_HERSHEY_SIMPLEX


@dataclass(frozen=True)
class Explaining:
    """A nominal entry that patches of an image are near to.

    Attributes:
        number: of the entry.
        frame_number: position of its frame among the frames of the index.
        frame: name of that frame.
        row, col: its place in the frame's grid.
        distance: least cosine distance to one of the patches, in [0, 2].
        patches: how many patches have it among their nearest.
    """

    number: int
    frame_number: int
    frame: str
    row: int
    col: int
    distance: float
    patches: int


def patches_of_box(
    grid: PatchGrid, region: ImageRegion, box_xyxy: tuple[float, float, float, float]
) -> np.ndarray:
    """Return (rows, cols) bool, the patches of a box that take part: at least half inside it.

    A box smaller than a patch has the patch that its centre lies in.

    Args:
        grid: the patches.
        region: what takes part.
        box_xyxy: left, top, right, bottom in pixels of the image.

    Raises:
        InputError: an empty box, one outside the image, or one outside the region.
    """
    left, top, right, bottom = box_xyxy
    height, width = grid.image_hw
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise InputError(
            f"box {' '.join(f'{v:g}' for v in box_xyxy)}: expected X0 < X1 and Y0 < Y1 within the "
            f"image of {width}x{height} pixels"
        )
    rows, cols = grid.grid_hw
    down, along = height / rows, width / cols

    def covered(start: float, stop: float, side: float, count: int) -> np.ndarray:
        edges = np.arange(count) * side
        share: np.ndarray = np.minimum(edges + side, stop) - np.maximum(edges, start)
        centre = min(int((start + stop) / 2 / side), count - 1)
        return (share >= side / 2) | (np.arange(count) == centre)

    mask = np.outer(covered(top, bottom, down, rows), covered(left, right, along, cols))
    mask &= region.patch_mask(grid.grid_hw, grid.image_hw)
    if not mask.any():
        raise InputError("box: expected patches of the region of interest, found none inside it")
    return mask


def instances_of_box(
    part: NominalIndex, grid: PatchGrid, region: ImageRegion, inside: np.ndarray
) -> np.ndarray:
    """Return (n, dim) float32: instances at least half inside a box, as a part embeds them.

    Args:
        part: of instances or of pairs.
        grid: the patches, segmented.
        region: what takes part.
        inside: (rows, cols) bool, patches of the box.

    Raises:
        InputError: no instance lies there, or the part holds something else.
        ModelOutputError: the image was not segmented.
    """
    made = part.content.made
    if "segmenter" not in made:
        raise InputError("explain: expected a part of instances or pairs, found another")
    found = instances_of(grid, region)
    shares = found.shares.sum(axis=(1, 2))
    there = found.shares[:, inside].sum(axis=1) >= 0.5 * shares
    if not there.any():
        raise InputError("box: expected an instance at least half inside it, found none")
    weight = made.get("surroundings_weight")
    if weight is None:
        return found.embeddings[there]
    return pairs_of(grid, found, region, weight).embeddings[there]


def explain(index: NominalIndex, embeddings: np.ndarray, nearest: int) -> list[Explaining]:
    """Return the entries near to some patches: how often first, then how near.

    Args:
        index: has the entries.
        embeddings: (n, dim) float32, unit norm.
        nearest: entries looked at for every patch, >= 1.
    """
    content = index.content
    rows, similarities = _nearest(embeddings, content.embeddings, min(nearest, index.count))
    counts: dict[int, int] = defaultdict(int)
    best: dict[int, float] = {}
    for row, similarity in zip(rows.ravel().tolist(), similarities.ravel().tolist(), strict=True):
        counts[row] += 1
        best[row] = max(best.get(row, -1.0), similarity)
    numbers, found = content.numbers, []
    for row in sorted(counts, key=lambda row: (-counts[row], -best[row], row)):
        frame, place_row, place_col = (int(v) for v in content.entries[row])
        distance = min(max(1.0 - best[row], 0.0), 2.0)
        name = content.frames[frame].name
        found.append(
            Explaining(int(numbers[row]), frame, name, place_row, place_col, distance, counts[row])
        )
    return found


def mark_place(
    picture: np.ndarray, grid_hw: tuple[int, int], row: int, col: int, thickness: int = 1
) -> tuple[int, int]:
    """Outline a place of a grid, one place around it, on a picture, and return its top left pixel.

    Args:
        picture: (height, width, 3) uint8 RGB, drawn on.
        grid_hw: (rows, cols) of the grid that covers it.
        row, col: the place.
        thickness: of the line in pixels.
    """
    (rows, cols), (height, width) = grid_hw, picture.shape[:2]
    corners = [(round((col + i) * width / cols), round((row + i) * height / rows)) for i in (-1, 2)]
    cv2.rectangle(picture, corners[0], corners[1], _MARK, thickness)
    return corners[0]


def picture(
    image: np.ndarray,
    box_xyxy: tuple[float, float, float, float],
    index: NominalIndex,
    found: Sequence[Explaining],
) -> np.ndarray:
    """Return the image with the box, and the nominal frames with the places that explain it.

    Args:
        image: (height, width, 3) uint8 RGB.
        box_xyxy: left, top, right, bottom in its pixels.
        index: has the thumbnails.
        found: entries of the index; frames come in their order, 5 at most.

    Returns:
        (h, w, 3) uint8 RGB.
    """
    tile_height = round(_TILE_WIDTH * image.shape[0] / image.shape[1])
    first = cv2.resize(image, (_TILE_WIDTH, tile_height), interpolation=cv2.INTER_AREA)
    scale = _TILE_WIDTH / image.shape[1]
    left, top, right, bottom = (round(v * scale) for v in box_xyxy)
    cv2.rectangle(first, (left, top), (right, bottom), _BOX, 2)
    tiles = [_titled(first, "the image and the box")]
    frames: dict[int, list[Explaining]] = {}
    for each in found:
        frames.setdefault(each.frame_number, []).append(each)
    for number, members in list(frames.items())[:_PICTURES]:
        record = index.content.frames[number]
        small = decode_compressed(record.thumbnail, "jpeg")
        tile = cv2.resize(small, (_TILE_WIDTH, tile_height), interpolation=cv2.INTER_LINEAR)
        for each in members:
            at = mark_place(tile, (record.rows, record.cols), each.row, each.col)
            cv2.putText(tile, str(each.number), at, _FONT, 0.4, _MARK, 1, cv2.LINE_AA)
        tiles.append(_titled(tile, f"{record.name}: entries {len(members)}"))
    return contact_sheet(tiles, columns=min(3, len(tiles)))


def _titled(tile: np.ndarray, text: str) -> np.ndarray:
    strip = np.full((_STRIP_HEIGHT, tile.shape[1], 3), 255, np.uint8)
    cv2.putText(strip, text, (6, 18), _FONT, 0.45, (20, 20, 20), 1, cv2.LINE_AA)
    return np.concatenate([strip, tile])


def _nearest(queries: np.ndarray, entries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (n, k) rows of the nearest entries and their inner products, pieces at a time."""
    rows = np.zeros((len(queries), 0), np.int64)
    best = np.zeros((len(queries), 0), np.float32)
    for start in range(0, len(entries), _PIECE):
        products = inner_products(queries, entries[start : start + _PIECE].T)
        here = np.broadcast_to(np.arange(start, start + products.shape[1]), products.shape)
        best, rows = np.hstack([best, products]), np.hstack([rows, here])
        order = np.argsort(-best, axis=1, kind="stable")[:, :k]
        best, rows = np.take_along_axis(best, order, 1), np.take_along_axis(rows, order, 1)
    return rows, best
