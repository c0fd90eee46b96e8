"""The embedder of commands and node: backbones, and a segmenter if a stage needs one."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from semantic_anomaly.embedding.identity import StageIdentity
from semantic_anomaly.errors import SettingsError, UnknownNameError
from semantic_anomaly.segmentation.masks import InstanceSegmenter, patch_shares
from semantic_anomaly.settings import SEGMENTER_FAMILIES, TOKENS
from semantic_anomaly.stages import INSTANCES
from semantic_anomaly.structures import PatchGrid
from semantic_anomaly.timing import SEGMENT, timed

if TYPE_CHECKING:
    from semantic_anomaly.embedding.backbone import PatchEmbedder
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
    """The backbones and, for stages of instances, a segmenter; several threads take turns.

    Args:
        backbone: computes the patch embeddings of all stages.
        segmenter: computes the instances; None if no stage needs them.
    """

    def __init__(self, backbone: PatchEmbedder, segmenter: InstanceSegmenter | None = None) -> None:
        self._backbone = backbone
        self._segmenter = segmenter
        self._turn = threading.Lock()

    @classmethod
    def from_settings(cls, settings: Settings) -> RunningEmbedder:
        """Load the backbones and the segmenter of the settings.

        Args:
            settings: unset ones have the defaults of a new index.

        Raises:
            SettingsError: a segmenter without its model, or a model for `tokens`.
            BackboneError: a backbone or the segmenter cannot be loaded.
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
    def stages(self) -> tuple[StageIdentity, ...]:
        """Return the stages whose grids it makes."""
        segmenter = None if self._segmenter is None else self._segmenter.identity
        return tuple(
            StageIdentity(spec, identity, segmenter if spec.kind == INSTANCES else None)
            for spec, identity in zip(self._backbone.stages, self._backbone.identities, strict=True)
        )

    @property
    def device(self) -> str:
        """Return the device of the backbones, for reports."""
        return self._backbone.device

    def grids_hw(self, image_hw: tuple[int, int]) -> list[tuple[int, int]]:
        """Return (rows, cols) of the patch grid of each stage, of an image of (height, width)."""
        return self._backbone.grids_hw(image_hw)

    def embed(self, images: Sequence[np.ndarray]) -> list[PatchGrid]:
        """Return the patch grids of (height, width, 3) uint8 RGB images, with their instances.

        Raises:
            ImageError: wrong shape or dtype.
            ModelOutputError: a network failed, or its output is not finite.
        """
        segmented = []
        with self._turn:
            grids = self._backbone.embed(images)
            for image, grid in zip(images, grids, strict=True):
                first, *further = (
                    self._segmented(image, stage_grid) if stage.kind == INSTANCES else stage_grid
                    for stage, stage_grid in zip(self._backbone.stages, grid.stages, strict=True)
                )
                segmented.append(replace(first, further=tuple(further)) if further else first)
        return segmented

    def _segmented(self, image: np.ndarray, grid: PatchGrid) -> PatchGrid:
        """Return the grid of a stage with the instances of the image."""
        if self._segmenter is None:
            raise SettingsError("stages of instances: expected a segmenter, found none")
        with timed(SEGMENT):
            shares = patch_shares(self._segmenter.segment(image, grid), grid.grid_hw)
        return replace(grid, instances=shares, further=())

    def warm_up(self, image_hw: tuple[int, int]) -> None:
        """Run once on an image of (height, width) pixels, as the first run is slow."""
        self.embed([np.full((*image_hw, 3), 128, np.uint8)])

    def close(self) -> None:
        """Free backbone and segmenter; the embedder cannot be used any more."""
        self._backbone.close()
        if self._segmenter is not None:
            self._segmenter.close()
