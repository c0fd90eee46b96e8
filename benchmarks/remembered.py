"""Embeddings and instances of images, made once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from semantic_anomaly.embedding.identity import EmbedderIdentity, SegmenterIdentity
from semantic_anomaly.segmentation.embedder import RunningEmbedder
from semantic_anomaly.structures import PatchGrid


@dataclass(frozen=True)
class _Packed:
    """A grid whose instances, nearly all zeros, take no room."""

    bare: PatchGrid
    shape: tuple[int, ...]
    covered: np.ndarray
    shares: np.ndarray

    @classmethod
    def of(cls, grid: PatchGrid) -> _Packed:
        instances = np.zeros((0, *grid.grid_hw), np.float32)
        if grid.instances is not None:
            instances = grid.instances
        covered = np.flatnonzero(instances)
        bare = dataclasses.replace(grid, instances=None)
        return cls(bare, instances.shape, covered, instances.flat[covered])

    def unpacked(self) -> PatchGrid:
        instances = np.zeros(self.shape, np.float32)
        instances.flat[self.covered] = self.shares
        return dataclasses.replace(self.bare, instances=instances)


class Remembered:
    """Embeds each image once.

    Attributes:
        identity, segmenter: of what it gives.
    """

    def __init__(self, running: RunningEmbedder) -> None:
        self._running = running
        self._known: dict[str, _Packed] = {}
        self.identity: EmbedderIdentity = running.identity
        self.segmenter: SegmenterIdentity | None = running.segmenter

    def grid_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (rows, cols) of the grid that an image of (height, width) gives."""
        return self._running.grid_hw(image_hw)

    def embed(self, images: Sequence[np.ndarray]) -> list[PatchGrid]:
        """Return the patch embeddings of images, in order, with their instances."""
        keys = [hashlib.sha1(image.tobytes()).hexdigest() for image in images]
        for key, image in zip(keys, images, strict=True):
            if key not in self._known:
                self._known[key] = _Packed.of(self._running.embed([image])[0])
        return [self._known[key].unpacked() for key in keys]
