"""Instance masks, and the pooling of patch embeddings over them.

The embedding of an instance is the mean of the patch embeddings under its mask, weighted by the
covered area of each patch (masked average pooling; instances of arXiv 2505.07998). A patch that no
instance covers to one half is compared by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

from semantic_anomaly.embedding.identity import SegmenterIdentity
from semantic_anomaly.linalg import inner_products
from semantic_anomaly.roi import RegionOfInterest, patches_inside
from semantic_anomaly.structures import PatchGrid

_EPSILON = 1e-6
# Share of a patch from which on its value is that of the instances on it.
_COVERED = 0.5


class InstanceSegmenter(Protocol):
    """Interface of a segmenter."""

    @property
    def identity(self) -> SegmenterIdentity:
        """Return the identity of the segmenter."""

    def segment(self, image: np.ndarray, grid: PatchGrid) -> np.ndarray:
        """Return the masks of the instances of an image, which may overlap.

        Args:
            image: (height, width, 3) uint8 RGB.
            grid: its patch grid.

        Returns:
            (n, h, w) bool over the whole image at any resolution, with one scale per axis; each
            mask has a pixel, and n may be 0.

        Raises:
            ModelOutputError: the network failed, or its output is not finite.
        """

    def close(self) -> None:
        """Free the memory of the segmenter; it cannot be used any more."""


@dataclass(frozen=True, eq=False)
class StageEmbeddings:
    """What a stage compares with its entries: instances, and the patches that none of them covers.

    Attributes:
        embeddings: (n, dim) float32, unit norm: m instances, then n - m patches.
        shares: (m, rows, cols) float32 in [0, 1], share of each patch covered by each instance; 0
            outside the region of interest. Each instance covers some patch.
        patches: (n - m, 2) int64, row and col of the patches.
        features: (rows, cols, dim) float32, patch embeddings.
        inside: (rows, cols) bool, the patches of the region of interest.
    """

    embeddings: np.ndarray
    shares: np.ndarray
    patches: np.ndarray
    features: np.ndarray
    inside: np.ndarray

    @property
    def cells(self) -> np.ndarray:
        """Return (n, 2) int64, row and col of the patch that represents each embedding.

        Of an instance it is the most covered patch nearest to the centroid; the centroid itself
        may lie outside of the instance.
        """
        count, rows, cols = self.shares.shape
        cells = np.zeros((count, 2), np.int64)
        row_of, col_of = np.mgrid[:rows, :cols]  # (rows, cols) each
        for number, share in enumerate(self.shares):
            total = share.sum()
            row, col = (share * row_of).sum() / total, (share * col_of).sum() / total
            squared_distances = (row_of - row) ** 2 + (col_of - col) ** 2
            nearest = np.where(share >= share.max() - _EPSILON, squared_distances, np.inf).argmin()
            cells[number] = np.divmod(nearest, cols)
        return np.concatenate([cells, self.patches])

    def paint(self, values: np.ndarray) -> np.ndarray:
        """Return (rows, cols) float32: values of instances, averaged by share, and of patches.

        Args:
            values: (n,) one value per embedding.
        """
        count = len(self.shares)
        painted = np.zeros(self.inside.shape, np.float32)
        if count:
            weights = self.shares.sum(axis=0)  # (rows, cols)
            sums = np.tensordot(values[:count].astype(np.float32), self.shares, axes=1)
            painted = np.where(self.inside, sums / np.maximum(weights, _EPSILON), 0)
            painted = painted.astype(np.float32)
        painted[tuple(self.patches.T)] = values[count:]
        return painted

    def painting(self, chosen: np.ndarray) -> np.ndarray:
        """Return (n,) bool: the embeddings on which painted values of (rows, cols) bool depend."""
        return np.concatenate([self.shares[:, chosen].any(axis=1), chosen[tuple(self.patches.T)]])

    def at(self, row: int, col: int) -> np.ndarray:
        """Return (dim,) float32, the embedding that counts most on a patch."""
        shares = self.shares[:, row, col]
        if shares.sum() >= _COVERED:
            return np.asarray(self.embeddings[int(shares.argmax())])
        return np.asarray(self.features[row, col])


def stage_embeddings(grid: PatchGrid, roi: RegionOfInterest) -> StageEmbeddings:
    """Return the embeddings of a stage inside the region of interest.

    Args:
        grid: patch embeddings of the stage; without instances all patches are compared.
        roi: region of interest; instances without a patch inside are left out.

    Raises:
        SettingsError: no patch lies in the region of interest.
    """
    inside = patches_inside(grid, roi)
    if grid.instances is None:
        shares = np.zeros((0, *grid.grid_hw), np.float32)
        return StageEmbeddings(
            grid.features[inside], shares, np.argwhere(inside), grid.features, inside
        )
    shares = grid.instances * inside
    shares = shares[shares.any(axis=(1, 2))]
    alone = inside & (shares.sum(axis=0) < _COVERED)
    embeddings = np.concatenate([_pooled(grid.features, shares), grid.features[alone]])
    return StageEmbeddings(embeddings, shares, np.argwhere(alone), grid.features, inside)


def patch_shares(masks: np.ndarray, grid_hw: tuple[int, int]) -> np.ndarray:
    """Return (n, rows, cols) float32 in [0, 1], share of the area of each patch under each mask.

    Shares are exact for masks of any resolution, so instances smaller than a patch are kept.

    Args:
        masks: (n, h, w) bool, instances of the image.
        grid_hw: (rows, cols) of its patch grid.
    """
    count, height, width = masks.shape
    rows, cols = grid_hw
    # INTER_AREA averages areas only where it shrinks, so coarse masks are repeated first.
    scale_y, scale_x = math.ceil(rows / height), math.ceil(cols / width)
    shares = np.zeros((count, rows, cols), np.float32)
    for share, mask in zip(shares, masks, strict=True):
        if scale_y > 1 or scale_x > 1:
            mask = mask.repeat(scale_y, axis=0).repeat(scale_x, axis=1)
        cv2.resize(mask.astype(np.float32), (cols, rows), dst=share, interpolation=cv2.INTER_AREA)
    # Rounding may exceed 1 slightly.
    return np.clip(shares, 0.0, 1.0)


def _pooled(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return (n, dim) float32 unit vectors, means of the features by (n, rows, cols) weights."""
    rows, cols, dim = features.shape
    flat = np.ascontiguousarray(features.reshape(rows * cols, dim))
    sums = inner_products(weights.reshape(len(weights), rows * cols), flat)  # (n, dim)
    norms = np.linalg.norm(sums, axis=1, keepdims=True)  # (n, 1)
    # Opposite embeddings cancel out; then the patch of the largest weight is used.
    for number in np.flatnonzero(norms[:, 0] < _EPSILON * weights.sum(axis=(1, 2))):
        sums[number] = flat[weights[number].argmax()]
        norms[number] = 1.0
    return np.asarray(sums / norms, np.float32)
