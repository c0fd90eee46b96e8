"""Instances of an image: what every segmenter gives, and how one is loaded.

Embeddings of instances, and of what surrounds them: the paper's second variant, and past it.

An instance is embedded by the mean of the patch embeddings under its mask, weighted by the area
that it covers of each patch (masked average pooling; arXiv 2505.07998). Its surroundings are a
ring as wide as half the side of a square of its area; what lies below, which it stands on, counts
twice. Instance and surroundings are one vector, a weighted concatenation: the cosine distance of
two such pairs is the weighted sum of both distances, so that one graph finds the nearest pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

from semantic_anomaly.embedding.identity import SegmenterIdentity
from semantic_anomaly.errors import (
    ModelOutputError,
)
from semantic_anomaly.linalg import inner_products
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.structures import PatchGrid


@dataclass(frozen=True, eq=False)
class InstanceMasks:
    """The instances of one image, at any resolution; they may overlap.

    Attributes:
        masks: (n, h, w) bool, covering the whole image by one ratio a side; n may be 0.
        scores: (n,) float32 in [0, 1].
        image_hw: (height, width) in pixels of the image.

    Raises:
        ModelOutputError: another shape or dtype, a mask without a pixel, or a score out of range.
    """

    masks: np.ndarray
    scores: np.ndarray
    image_hw: tuple[int, int]

    def __post_init__(self) -> None:
        shape, dtype = self.masks.shape, self.masks.dtype
        if len(shape) != 3 or 0 in shape[1:] or dtype != np.bool_:
            raise ModelOutputError(
                f"instance masks: expected (n, h, w) bool, found shape {shape}, {dtype}"
            )
        if self.scores.shape != shape[:1] or self.scores.dtype != np.float32:
            raise ModelOutputError(
                f"instance scores: expected ({shape[0]},) float32, found shape "
                f"{self.scores.shape}, {self.scores.dtype}"
            )
        # NaN fails both comparisons.
        if not np.all((self.scores >= 0.0) & (self.scores <= 1.0)):
            raise ModelOutputError(
                f"instance scores: expected numbers in [0, 1], found {self.scores.tolist()[:8]}"
            )
        filled = self.masks.reshape(shape[0], shape[1] * shape[2]).any(axis=1)
        if not filled.all():
            raise ModelOutputError(
                f"instance masks: expected pixels in each, found {int((~filled).sum())} without"
            )
        if min(self.image_hw) < 1:
            raise ModelOutputError(f"image size: expected positive, found {self.image_hw}")

    def __len__(self) -> int:
        return len(self.scores)


class InstanceSegmenter(Protocol):
    """What gives the instances of an image."""

    @property
    def identity(self) -> SegmenterIdentity:
        """Return what the masks depend on."""

    def segment(self, image: np.ndarray, grid: PatchGrid) -> InstanceMasks:
        """Return the instances of a (height, width, 3) uint8 RGB image with its embeddings."""

    def close(self) -> None:
        """Free what the segmenter holds; it cannot be used afterwards."""


RING_WIDTH = 0.5
BELOW_WEIGHT = 2.0
_LEAST = 1e-6


@dataclass(frozen=True, eq=False)
class Instances:
    """The instances of an image as far as they take part.

    Attributes:
        embeddings: (n, dim) float32, unit norm.
        shares: (n, rows, cols) float32 in [0, 1], the share of each patch that each covers, 0
            for patches that take no part; no instance is without any.
    """

    embeddings: np.ndarray
    shares: np.ndarray

    @property
    def covered(self) -> np.ndarray:
        """Return (rows, cols) bool: patches of which instances cover at least half."""
        return np.asarray(self.shares.sum(axis=0) >= 0.5)

    @property
    def places(self) -> np.ndarray:
        """Return (n, 2) int: of each, the patch that it covers most and that is nearest its middle.

        A ring's middle is no part of it, so the middle itself will not do.
        """
        count, rows, cols = self.shares.shape
        found = np.zeros((count, 2), np.int64)
        row_of, col_of = np.mgrid[:rows, :cols]
        for number, share in enumerate(self.shares):
            total = share.sum()
            middle = (share * row_of).sum() / total, (share * col_of).sum() / total
            away = (row_of - middle[0]) ** 2 + (col_of - middle[1]) ** 2
            best = np.where(share >= share.max() - _LEAST, away, np.inf).argmin()
            found[number] = np.divmod(best, cols)
        return found

    def paint(self, values: np.ndarray) -> np.ndarray:
        """Return (rows, cols) float32: the mean of the values of the instances on each patch.

        Args:
            values: (n,) one value an instance; those on a patch weigh by what they cover of it.
        """
        weight = self.shares.sum(axis=0)
        summed = np.tensordot(values.astype(np.float32), self.shares, axes=1)
        return np.asarray(summed / np.maximum(weight, _LEAST), np.float32)


def patch_shares(masks: InstanceMasks, grid_hw: tuple[int, int]) -> np.ndarray:
    """Return (n, rows, cols) float32: the share of each patch's area that each mask covers.

    Exact to float32 for masks of any size, so that what is smaller than a patch is not lost.

    Args:
        masks: instances, covering the whole image by one ratio a side.
        grid_hw: (rows, cols) of the patches.
    """
    count, height, width = masks.masks.shape
    rows, cols = grid_hw
    # Area interpolation shrinks exactly; where it enlarges, it is none.
    tall, wide = math.ceil(rows / height), math.ceil(cols / width)
    shares = np.zeros((count, rows, cols), np.float32)
    for share, mask in zip(shares, masks.masks, strict=True):
        enlarged = mask if tall == wide == 1 else mask.repeat(tall, axis=0).repeat(wide, axis=1)
        cv2.resize(
            enlarged.astype(np.float32), (cols, rows), dst=share, interpolation=cv2.INTER_AREA
        )
    # Sums of areas may end a little beside 1.
    return np.clip(shares, 0.0, 1.0)


def instances_of(grid: PatchGrid, region: ImageRegion) -> Instances:
    """Return the instances of an image, cut by the region of interest.

    Args:
        grid: patch embeddings and instances.
        region: patches outside take no part; instances wholly outside are left out.

    Raises:
        ModelOutputError: the image was not segmented.
    """
    if grid.instances is None:
        raise ModelOutputError(
            "instances: expected a segmented image, found patches alone; set 'variant' and "
            "'segmenter' as for the index"
        )
    shares = grid.instances
    if not region.is_whole_image:
        shares = shares * region.patch_mask(grid.grid_hw, grid.image_hw)
        shares = shares[shares.any(axis=(1, 2))]
    return Instances(_pooled(grid.features, shares), shares)


def pairs_of(
    grid: PatchGrid,
    instances: Instances,
    region: ImageRegion,
    weight: float,
    nominal: np.ndarray | None = None,
) -> Pairs:
    """Return instances paired with their surroundings.

    An instance that leaves nothing around it is its own surroundings.

    Args:
        grid: the patch embeddings.
        instances: of the same image.
        region: patches outside surround nothing.
        weight: of the surroundings in the distance of two pairs, in (0, 1).
        nominal: (rows, cols) bool, patches that may surround; None: all.
    """
    rings = _rings(instances.shares)
    rings *= region.patch_mask(grid.grid_hw, grid.image_hw)
    if nominal is not None:
        rings *= nominal
    alone = ~rings.any(axis=(1, 2))
    rings[alone] = instances.shares[alone]
    around = _pooled(grid.features, rings)
    own = instances.embeddings * np.float32(math.sqrt(1.0 - weight))
    joined = np.concatenate([own, around * np.float32(math.sqrt(weight))], axis=1)
    return Pairs(joined, around)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Instances with their surroundings.

    Attributes:
        embeddings: (n, 2 * dim) float32, unit norm: both, weighted.
        surroundings: (n, dim) float32, unit norm.
    """

    embeddings: np.ndarray
    surroundings: np.ndarray


def _pooled(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return (n, dim) float32 unit vectors: the mean of the features by (n, rows, cols) weights."""
    rows, cols, dim = features.shape
    flat = np.ascontiguousarray(features.reshape(rows * cols, dim))
    sums = inner_products(weights.reshape(len(weights), rows * cols), flat)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    # Opposite embeddings may cancel out; the heaviest patch speaks for them then.
    gone = np.flatnonzero(lengths[:, 0] < _LEAST * weights.sum(axis=(1, 2)))
    for number in gone:
        sums[number] = flat[weights[number].argmax()]
        lengths[number] = 1.0
    return np.asarray(sums / lengths, np.float32)


def _rings(shares: np.ndarray) -> np.ndarray:
    """Return (n, rows, cols) float32 weights of what surrounds each instance."""
    rings = np.zeros_like(shares)
    for ring, share in zip(rings, shares, strict=True):
        width = max(1, round(RING_WIDTH * math.sqrt(float(share.sum()))))
        side = 2 * width + 1
        near = cv2.dilate(share, np.ones((side, side), np.uint8))
        # Moved down by the ring's width, the instance covers what it stands on.
        below = np.zeros_like(share)
        below[width:] = share[:-width]
        weights = np.maximum(near, BELOW_WEIGHT * below)
        np.multiply(weights, 1.0 - share, out=ring)
    return rings
