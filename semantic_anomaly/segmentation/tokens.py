"""Segmentation without a network: connected patches of similar embeddings, refined by colour.

Sub-cluster components (Monath et al., KDD 2021) on the graph of neighbouring patches: for growing
thresholds, every region joins the nearest one if their mean cosine distance is below the threshold.
Borders follow colours as in joint bilateral upsampling (Kopf et al. 2007), reduced to the patch of
the lowest cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import torch

from semantic_anomaly.embedding.identity import SegmenterIdentity
from semantic_anomaly.settings import TOKENS
from semantic_anomaly.storage import canonical_json, sha256_bytes
from semantic_anomaly.structures import PatchGrid

_PIXELS_PER_PATCH = 2
# Multiples of the median distance between neighbours in the image, which depends on the backbone.
_THRESHOLDS = (1.0, 1.4, 2.0, 2.8, 4.0, 5.7, 8.0)
# Last threshold of each level, and the largest mean number of patches of its regions. For some
# backbones distances hardly differ, and without the limit all patches would join.
_LEVELS = ((4, 64), (6, 256))
# Distances in uniform images are rounding errors.
_MIN_MEDIAN = 1e-6
# Summed difference of three channels with the same cost as the side of a patch.
_COLOUR_PER_PATCH = 90.0


class TokenSegmenter:
    """Instances as connected patches of similar embeddings, in two levels.

    Attributes:
        identity: digest of the parameters.
    """

    def __init__(self) -> None:
        parameters = {
            "version": 2,
            "thresholds": list(_THRESHOLDS),
            "levels": _LEVELS,
            "colour": _COLOUR_PER_PATCH,
            "pixels": _PIXELS_PER_PATCH,
        }
        digest = sha256_bytes(canonical_json(parameters).encode())
        self.identity = SegmenterIdentity(TOKENS, "", digest)

    def segment(self, image: np.ndarray, grid: PatchGrid) -> np.ndarray:
        """Return (n, h, w) bool, fine regions, then the coarse ones of several fine ones.

        Args:
            image: (height, width, 3) uint8 RGB.
            grid: its patch grid.
        """
        patch_of_pixel = _patch_of_pixel(image, grid.grid_hw)  # (h, w)
        fine, coarse = token_regions(grid.features)
        # Number of fine regions in each coarse one.
        parts = np.bincount(coarse[np.unique(fine, return_index=True)[1]])
        fine_map = fine.astype(np.int16)[patch_of_pixel]
        coarse_map = coarse.astype(np.int16)[patch_of_pixel]
        # A single patch may lose all of its pixels to its neighbours.
        fine_labels = np.flatnonzero(np.bincount(fine_map.ravel()))
        coarse_pixels = np.bincount(coarse_map.ravel(), minlength=len(parts))
        coarse_labels = np.flatnonzero((parts > 1) & (coarse_pixels > 0))
        count = len(fine_labels)
        masks = np.empty((count + len(coarse_labels), *patch_of_pixel.shape), bool)
        np.equal(fine_map, fine_labels.astype(np.int16)[:, None, None], out=masks[:count])
        np.equal(coarse_map, coarse_labels.astype(np.int16)[:, None, None], out=masks[count:])
        return masks

    def close(self) -> None:
        """Do nothing: there is no network."""


def token_regions(features: np.ndarray) -> list[np.ndarray]:
    """Group neighbouring patches of similar embeddings (Monath et al. 2021).

    Args:
        features: (rows, cols, dim) float32, unit norm.

    Returns:
        (rows * cols,) labels from 0 of the fine and of the coarse regions.
    """
    rows, cols, dim = features.shape
    # Edges (one, other, distances) between regions, at first single patches.
    one, other, distances = _neighbours(features)
    unit = max(float(np.median(distances)) if len(distances) else 0.0, _MIN_MEDIAN)
    labels = np.arange(rows * cols)
    sums = np.ascontiguousarray(features).reshape(-1, dim)  # (regions, dim)
    sizes = np.ones(rows * cols, np.float32)  # (regions,)
    steps = []
    for threshold in _THRESHOLDS:
        new = _join_nearest(one, other, distances, len(sizes), threshold * unit)
        if new.max() + 1 < len(sizes):
            # Grouped sums of numpy are ten times slower.
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
            distances = 1.0 - np.einsum("ed,ed->e", means[one], means[other])  # (edges,)
        steps.append((labels, len(sizes)))
    levels = []
    for last, max_patches in _LEVELS:
        allowed = [labels for labels, n in steps[: last + 1] if max_patches * n >= rows * cols]
        levels.append(allowed[-1] if allowed else steps[0][0])
    return levels


def _neighbours(features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (n,) numbers of both patches and (n,) cosine distances of all 8-neighbours."""
    numbers = np.arange(features.shape[0] * features.shape[1]).reshape(features.shape[:2])
    every, ahead, behind = slice(None), slice(1, None), slice(None, -1)
    pairs: Sequence[tuple[Any, Any]] = (
        ((every, ahead), (every, behind)),
        ((ahead, every), (behind, every)),
        ((ahead, ahead), (behind, behind)),
        ((ahead, behind), (behind, ahead)),
    )
    cosines = [np.einsum("rcd,rcd->rc", features[a], features[b]).ravel() for a, b in pairs]
    one = np.concatenate([numbers[a].ravel() for a, _ in pairs])
    other = np.concatenate([numbers[b].ravel() for _, b in pairs])
    return one, other, 1.0 - np.concatenate(cosines)


def _join_nearest(
    one: np.ndarray, other: np.ndarray, distances: np.ndarray, count: int, threshold: float
) -> np.ndarray:
    """Return (count,) new labels from 0, after each region joined its nearest one in reach.

    Args:
        one, other: (n,) regions at both ends of each edge.
        distances: (n,) of the edges.
        count: number of regions.
        threshold: longer edges are ignored.
    """
    near = np.flatnonzero(distances <= threshold)
    near = near[np.argsort(distances[near])]
    one, other, own = one[near], other[near], np.arange(count)
    # The shortest edge of each region: of repeated indices the last assignment counts.
    first = np.full((2, count), len(near))
    backwards = np.arange(len(near))[::-1]
    first[0, one[::-1]] = backwards
    first[1, other[::-1]] = backwards
    edge = first.min(axis=0)
    joining = np.flatnonzero(edge < len(near))
    parent = own.copy()
    parent[joining] = one[edge[joining]] + other[edge[joining]] - joining
    # Edges have a strict order, so the only cycles are mutual pairs.
    mutual = (parent[parent] == own) & (own < parent)
    parent[mutual] = own[mutual]
    while not np.array_equal(grandparent := parent[parent], parent):
        parent = grandparent
    return (np.cumsum(parent == own) - 1)[parent]


@lru_cache(maxsize=8)
def _offsets(grid_hw: tuple[int, int]) -> tuple[list[tuple[int, int]], list[np.ndarray]]:
    """Return steps to a patch and its 4-neighbours, and (h, w) squared distances to them."""
    steps = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]
    inside = (np.arange(_PIXELS_PER_PATCH, dtype=np.float32) + 0.5) / _PIXELS_PER_PATCH - 0.5
    squares = [(inside - r)[:, None] ** 2 + (inside - c)[None] ** 2 for r, c in steps]
    return steps, [np.tile(square, grid_hw) for square in squares]


def _patch_of_pixel(image: np.ndarray, grid_hw: tuple[int, int]) -> np.ndarray:
    """Return (h, w) int32, for each pixel the nearest patch in position and colour.

    Candidates are the patch of the pixel and its 4-neighbours. A patch has `_PIXELS_PER_PATCH`
    pixels per side.
    """
    rows, cols = grid_hw
    size = (cols * _PIXELS_PER_PATCH, rows * _PIXELS_PER_PATCH)
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.float32)
    colours = cv2.resize(small, (cols, rows), interpolation=cv2.INTER_AREA)
    numbers = np.arange(rows * cols, dtype=np.float32).reshape(rows, cols)
    colours = cv2.copyMakeBorder(colours, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    numbers = cv2.copyMakeBorder(numbers, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    min_costs = np.full(size[::-1], np.inf, np.float32)
    nearest = np.zeros(size[::-1], np.float32)
    weights = np.full((1, 3), 1.0 / _COLOUR_PER_PATCH, np.float32)
    for (row, col), squared_distances in zip(*_offsets(grid_hw), strict=True):
        shifted = np.s_[row + 1 : row + 1 + rows, col + 1 : col + 1 + cols]
        colour = cv2.resize(colours[shifted], size, interpolation=cv2.INTER_NEAREST)
        number = cv2.resize(numbers[shifted], size, interpolation=cv2.INTER_NEAREST)
        costs = cv2.add(cv2.transform(cv2.absdiff(small, colour), weights), squared_distances)
        cv2.copyTo(number, cv2.compare(costs, min_costs, cv2.CMP_LT), nearest)
        cv2.min(costs, min_costs, min_costs)
    return nearest.astype(np.int32)
