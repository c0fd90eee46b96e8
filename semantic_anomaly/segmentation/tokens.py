"""Instances without a second network: patches of alike embeddings, with borders by colour."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch

from semantic_anomaly.embedding.identity import SegmenterIdentity
from semantic_anomaly.errors import ModelOutputError
from semantic_anomaly.segmentation.masks import InstanceMasks
from semantic_anomaly.settings import TOKENS
from semantic_anomaly.storage import canonical_json, sha256_bytes
from semantic_anomaly.structures import PatchGrid

_PIXELS_A_PATCH = 2
# Multiples of the image's median distance between neighbours, which differs between backbones.
_THRESHOLDS = (1.0, 1.4, 2.0, 2.8, 4.0, 5.7, 8.0)
# Where each level stops: at this threshold, or before its regions are of more patches than that on
# average. Distances of some backbones hardly differ, and all would be one region soon.
_LEVELS = ((4, 64), (6, 256))
# Uniform images have distances of rounding alone.
_LEAST_MEDIAN = 1e-6
# Summed difference of three channels that weighs as much as the side of a patch.
_COLOUR_A_PATCH = 90.0


class TokenSegmenter:
    """Instances as connected patches of alike embeddings, in two levels, refined by colour.

    Sub-cluster components (Monath et al., KDD 2021) on the graph of neighbouring patches: by
    growing thresholds, every region joins its nearest one if their mean cosine distance is lower.
    Borders follow colours as in joint bilateral upsampling (Kopf et al. 2007), of which the
    strongest patch decides. A score is the length of a region's mean unit vector.

    Attributes:
        identity: of the parameters, for there are no weights.
    """

    def __init__(self) -> None:
        parameters = {
            "version": 2,
            "thresholds": list(_THRESHOLDS),
            "levels": _LEVELS,
            "colour": _COLOUR_A_PATCH,
            "pixels": _PIXELS_A_PATCH,
        }
        digest = sha256_bytes(canonical_json(parameters).encode())
        self.identity = SegmenterIdentity(TOKENS, "", digest)

    def segment(self, image: np.ndarray, grid: PatchGrid) -> InstanceMasks:
        """Return the fine regions, then those coarse ones that join several.

        Args:
            image: (height, width, 3) uint8 RGB, the image of the grid.
            grid: its patch embeddings.

        Raises:
            ModelOutputError: image and grid are not of one size.
        """
        if image.shape != (*grid.image_hw, 3) or image.dtype != np.uint8:
            raise ModelOutputError(
                f"image: expected {(*grid.image_hw, 3)} uint8 as its grid says, "
                f"found {image.shape}, {image.dtype}"
            )
        nearest = _patch_of_pixels(image, grid.grid_hw)
        (fine, fine_scores), (coarse, coarse_scores) = token_regions(grid.features)
        parts = np.bincount(coarse[np.unique(fine, return_index=True)[1]])
        maps = [fine.astype(np.int16)[nearest], coarse.astype(np.int16)[nearest]]
        # Colours may leave a lone patch no pixel.
        pixels = [
            np.bincount(m.ravel(), minlength=n)
            for m, n in zip(maps, (parts.sum(), len(parts)), strict=True)
        ]
        wanted = [np.flatnonzero(pixels[0]), np.flatnonzero((parts > 1) & (pixels[1] > 0))]
        masks = np.empty((len(wanted[0]) + len(wanted[1]), *nearest.shape), bool)
        cut = len(wanted[0])
        for labels, rows, part in zip(maps, wanted, (masks[:cut], masks[cut:]), strict=True):
            np.equal(labels, rows.astype(np.int16)[:, None, None], out=part)
        scores = np.concatenate([fine_scores[wanted[0]], coarse_scores[wanted[1]]])
        return InstanceMasks(masks, np.minimum(scores, 1.0), grid.image_hw)

    def close(self) -> None:
        """Free nothing, for nothing is held."""


def token_regions(features: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Group neighbouring patches (Monath et al. 2021), into fine and then coarser regions.

    Args:
        features: (rows, cols, dim) float32, unit norm.

    Returns:
        For both levels (rows * cols,) labels from 0, and the (n,) float32 mean vectors' lengths.
    """
    rows, cols, dim = features.shape
    one, other, distances = _neighbours(features)
    unit = max(float(np.median(distances)) if len(distances) else 0.0, _LEAST_MEDIAN)
    labels = np.arange(rows * cols)
    sums = np.ascontiguousarray(features).reshape(-1, dim)
    sizes = np.ones(rows * cols, np.float32)
    found = []
    for threshold in _THRESHOLDS:
        new = _join_nearest(one, other, distances, len(sizes), threshold * unit)
        if new.max() + 1 < len(sizes):
            # NumPy's own sums over groups of rows take ten times as long.
            groups = torch.from_numpy(new)
            shape = (int(new.max()) + 1, dim)
            sums = torch.zeros(shape).index_add_(0, groups, torch.from_numpy(sums)).numpy()
            sizes = np.bincount(new, sizes).astype(np.float32)
            labels, one, other = new[labels], new[one], new[other]
            low, high = np.minimum(one, other), np.maximum(one, other)
            keys = np.unique((low * len(sizes) + high)[low < high])
            one, other = keys // len(sizes), keys % len(sizes)
            # The mean cosine of all pairs of two regions is the product of their mean vectors.
            means = sums / sizes[:, None]
            distances = 1.0 - np.einsum("ed,ed->e", means[one], means[other])
        lengths = np.sqrt(np.einsum("nd,nd->n", sums, sums)) / sizes
        found.append((labels, lengths.astype(np.float32)))
    levels = []
    for last, patches in _LEVELS:
        enough = [n for n in range(last + 1) if patches * len(found[n][1]) >= rows * cols]
        levels.append(found[max(enough, default=0)])
    return levels


def _neighbours(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return both ends and the cosine distance of every pair of patches that touch."""
    places = np.arange(features.shape[0] * features.shape[1]).reshape(features.shape[:2])
    every, ahead, behind = slice(None), slice(1, None), slice(None, -1)
    sides: Sequence[tuple[Any, Any]] = (
        ((every, ahead), (every, behind)),
        ((ahead, every), (behind, every)),
        ((ahead, ahead), (behind, behind)),
        ((ahead, behind), (behind, ahead)),
    )
    cosines = [np.einsum("rcd,rcd->rc", features[a], features[b]).ravel() for a, b in sides]
    one = np.concatenate([places[a].ravel() for a, _ in sides])
    other = np.concatenate([places[b].ravel() for _, b in sides])
    return one, other, 1.0 - np.concatenate(cosines)


def _join_nearest(
    one: np.ndarray, other: np.ndarray, distances: np.ndarray, count: int, threshold: float
) -> np.ndarray:
    """Return (count,) new labels from 0: every region with its nearest, if below the threshold."""
    near = np.flatnonzero(distances <= threshold)
    near = near[np.argsort(distances[near])]
    one, other, own = one[near], other[near], np.arange(count)
    # Of repeated places the last assignment holds, so backwards the nearest one does.
    first = np.full((2, count), len(near))
    backwards = np.arange(len(near))[::-1]
    first[0, one[::-1]] = backwards
    first[1, other[::-1]] = backwards
    edge = first.min(axis=0)
    joining = np.flatnonzero(edge < len(near))
    parent = own.copy()
    parent[joining] = one[edge[joining]] + other[edge[joining]] - joining
    # Edges are in one strict order, so that only mutual pairs are cycles.
    mutual = (parent[parent] == own) & (own < parent)
    parent[mutual] = own[mutual]
    while not np.array_equal(further := parent[parent], parent):
        parent = further
    return (np.cumsum(parent == own) - 1)[parent]


@lru_cache(maxsize=8)
def _offsets(grid_hw: tuple[int, int]) -> tuple[list[tuple[int, int]], list[np.ndarray]]:
    """Return the steps to five patches, and pixels' (h, w) squared distances to their centres."""
    steps = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]
    inside = (np.arange(_PIXELS_A_PATCH, dtype=np.float32) + 0.5) / _PIXELS_A_PATCH - 0.5
    squares = [(inside - r)[:, None] ** 2 + (inside - c)[None] ** 2 for r, c in steps]
    return steps, [np.tile(square, grid_hw) for square in squares]


def _patch_of_pixels(image: np.ndarray, grid_hw: tuple[int, int]) -> np.ndarray:
    """Return (h, w) the patch, its own or one beside it, that is each pixel's in place and colour.

    There are `_PIXELS_A_PATCH` pixels along the side of a patch.
    """
    rows, cols = grid_hw
    size = (cols * _PIXELS_A_PATCH, rows * _PIXELS_A_PATCH)
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    colours = cv2.resize(small, (cols, rows), interpolation=cv2.INTER_AREA)
    places = np.arange(rows * cols, dtype=np.float32).reshape(rows, cols)
    beside = cv2.copyMakeBorder(colours, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    numbers = cv2.copyMakeBorder(places, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    best = chosen = None
    weights = np.full((1, 3), 1.0 / _COLOUR_A_PATCH, np.float32)
    for (row, col), away in zip(*_offsets(grid_hw), strict=True):
        part = np.s_[row + 1 : row + 1 + rows, col + 1 : col + 1 + cols]
        colour = cv2.resize(beside[part], size, interpolation=cv2.INTER_NEAREST)
        number = cv2.resize(numbers[part], size, interpolation=cv2.INTER_NEAREST)
        costs = cv2.add(cv2.transform(cv2.absdiff(small, colour), weights), away)
        if best is None or chosen is None:
            best, chosen = costs, number
            continue
        nearer = cv2.compare(costs, best, cv2.CMP_LT)
        cv2.copyTo(number, nearer, chosen)
        cv2.min(costs, best, best)
    assert chosen is not None
    return chosen.astype(np.int32)
