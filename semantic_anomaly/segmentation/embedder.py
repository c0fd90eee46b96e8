"""A backbone with a segmenter behind it: patch embeddings that know their instances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from semantic_anomaly.embedding.identity import SegmenterIdentity
from semantic_anomaly.errors import (
    ModelOutputError,
    SettingsError,
    UnknownNameError,
)
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
            networks of their own.
        model: a local Hugging Face folder or a hub id already downloaded; empty for `tokens`.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16.

    Raises:
        SettingsError: an unknown family, or a model where none or one is needed.
        BackboneError: the model cannot be had whole, or its architecture is not of the family.
    """
    if family not in SEGMENTER_FAMILIES:
        raise SettingsError(str(UnknownNameError("segmenter family", family, SEGMENTER_FAMILIES)))
    if bool(model) == (family == TOKENS):
        expected = "no model" if family == TOKENS else "a model: a folder or a downloaded hub id"
        raise SettingsError(f"segmenter '{family}': expected {expected}, found '{model}'")
    if family == TOKENS:
        from semantic_anomaly.segmentation.tokens import TokenSegmenter

        return TokenSegmenter()
    from semantic_anomaly.segmentation.networks import load_network_segmenter

    return load_network_segmenter(family, model, device, dtype)


class RunningEmbedder:
    """What commands and node embed with: the backbone and, unless the variant is grid, a segmenter.

    Used by one thread at a time.

    Args:
        backbone: gives the patch embeddings.
        segmenter: gives the instances; None: they are not asked for.
    """

    def __init__(self, backbone: PatchEmbedder, segmenter: InstanceSegmenter | None = None) -> None:
        self._backbone = backbone
        self._segmenter = segmenter

    @classmethod
    def from_settings(cls, settings: Settings) -> RunningEmbedder:
        """Load what the settings describe.

        Raises:
            SettingsError: a segmenter without its model, or a model for one that has none.
            BackboneError: backbone or segmenter cannot be had whole.
        """
        from semantic_anomaly.embedding.backbone import PatchEmbedder

        segmenter = None
        if settings.segments:
            given = settings.segmenter, settings.segmenter_model, settings.device, settings.dtype
            segmenter = load_segmenter(*given)
        try:
            return cls(PatchEmbedder.from_settings(settings), segmenter)
        except BaseException:
            if segmenter is not None:
                segmenter.close()
            raise

    @property
    def identity(self) -> EmbedderIdentity:
        """Return what the embeddings depend on."""
        return self._backbone.identity

    @property
    def segmenter(self) -> SegmenterIdentity | None:
        """Return what the instances depend on, None without."""
        return None if self._segmenter is None else self._segmenter.identity

    @property
    def device(self) -> str:
        """Return where the backbone runs."""
        return self._backbone.device

    def grid_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (rows, cols) of the grid that an image of (height, width) gives."""
        return self._backbone.grid_hw(image_hw)

    def embed(self, images: Sequence[np.ndarray]) -> list[PatchGrid]:
        """Return the patch embeddings of images, in order, with their instances.

        Raises:
            ModelOutputError: something not finite, or masks that are not of the image.
        """
        grids = self._backbone.embed(images)
        if self._segmenter is None:
            return grids
        return [self._with_instances(*pair) for pair in zip(images, grids, strict=True)]

    def warm_up(self, image_hw: tuple[int, int]) -> None:
        """Run everything once on an image of (height, width)."""
        self._backbone.warm_up(image_hw)
        if self._segmenter is not None:
            self.embed([np.full((*image_hw, 3), 128, np.uint8)])

    def close(self) -> None:
        """Free what is held; nothing can be embedded afterwards."""
        self._backbone.close()
        if self._segmenter is not None:
            self._segmenter.close()

    def _with_instances(self, image: np.ndarray, grid: PatchGrid) -> PatchGrid:
        assert self._segmenter is not None
        found = self._segmenter.segment(image, grid)
        if found.image_hw != grid.image_hw:
            raise ModelOutputError(
                f"instance masks: expected those of an image of {grid.image_hw}, "
                f"found {found.image_hw}"
            )
        return replace(grid, instances=patch_shares(found, grid.grid_hw))
