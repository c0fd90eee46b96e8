"""The embedder of commands and node: a backbone, and a segmenter if the variant needs one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from semantic_anomaly.embedding.identity import SegmenterIdentity
from semantic_anomaly.errors import SettingsError, UnknownNameError
from semantic_anomaly.segmentation.masks import InstanceSegmenter, patch_shares
from semantic_anomaly.settings import SEGMENTER_FAMILIES, TOKENS
from semantic_anomaly.structures import PatchGrid

if TYPE_CHECKING:
    from semantic_anomaly.embedding.backbone import PatchEmbedder
    from semantic_anomaly.embedding.identity import EmbedderIdentity
    from semantic_anomaly.settings import Settings


def load_segmenter(
    family: str, model: str = "", device: str = "auto", dtype: str = "auto"
) -> InstanceSegmenter:
    """Load a segmenter; nothing is downloaded.

    Args:
        family: `tokens` groups patch embeddings; `universal`, `promptless` and `detector` are
            networks.
        model: local Hugging Face folder or hub id already downloaded; empty for `tokens`.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16.

    Raises:
        UnknownNameError: an unknown family.
        SettingsError: `tokens` with a model, or another family without one.
        BackboneError: the model cannot be loaded, or its architecture is not of the family.
    """
    if family not in SEGMENTER_FAMILIES:
        raise UnknownNameError("segmenter family", family, SEGMENTER_FAMILIES)
    if bool(model) == (family == TOKENS):
        expected = "no model" if family == TOKENS else "a model: a folder or a downloaded hub id"
        raise SettingsError(f"segmenter '{family}': expected {expected}, found '{model}'")
    if family == TOKENS:
        from semantic_anomaly.segmentation.tokens import TokenSegmenter

        return TokenSegmenter()
    from semantic_anomaly.segmentation.networks import NETWORK_SEGMENTERS

    return NETWORK_SEGMENTERS[family](model, device, dtype)


class RunningEmbedder:
    """A backbone and, unless the variant is grid, a segmenter; for one thread at a time.

    Args:
        backbone: computes the patch embeddings.
        segmenter: computes the instances; None: images are not segmented.
    """

    def __init__(self, backbone: PatchEmbedder, segmenter: InstanceSegmenter | None = None) -> None:
        self._backbone = backbone
        self._segmenter = segmenter

    @classmethod
    def from_settings(cls, settings: Settings) -> RunningEmbedder:
        """Load the backbone and the segmenter of the settings.

        Args:
            settings: unset ones have the defaults of a new index.

        Raises:
            SettingsError: a segmenter without its model, or a model for `tokens`.
            BackboneError: backbone or segmenter cannot be loaded.
        """
        from semantic_anomaly.embedding.backbone import PatchEmbedder

        settings = settings.with_build_defaults()
        segmenter = None
        if settings.segments:
            segmenter = load_segmenter(
                settings.segmenter, settings.segmenter_model, settings.device, settings.dtype
            )
        return cls(PatchEmbedder.from_settings(settings), segmenter)

    @property
    def identity(self) -> EmbedderIdentity:
        """Return the identity of the backbone."""
        return self._backbone.identity

    @property
    def segmenter(self) -> SegmenterIdentity | None:
        """Return the identity of the segmenter, None without one."""
        return None if self._segmenter is None else self._segmenter.identity

    @property
    def device(self) -> str:
        """Return the device of the backbone, for reports."""
        return self._backbone.device

    def grid_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (rows, cols) of the patch grid of an image of (height, width) pixels."""
        return self._backbone.grid_hw(image_hw)

    def embed(self, images: Sequence[np.ndarray]) -> list[PatchGrid]:
        """Return the patch grids of (height, width, 3) uint8 RGB images, with their instances.

        Raises:
            ImageError: wrong shape or dtype.
            ModelOutputError: a network failed, or its output is not finite.
        """
        grids = self._backbone.embed(images)
        if self._segmenter is None:
            return grids
        segment = self._segmenter.segment
        return [
            replace(grid, instances=patch_shares(segment(image, grid), grid.grid_hw))
            for image, grid in zip(images, grids, strict=True)
        ]

    def warm_up(self, image_hw: tuple[int, int]) -> None:
        """Run once on an image of (height, width) pixels, as the first run is slow."""
        self.embed([np.full((*image_hw, 3), 128, np.uint8)])

    def close(self) -> None:
        """Free backbone and segmenter; the embedder cannot be used any more."""
        self._backbone.close()
        if self._segmenter is not None:
            self._segmenter.close()
