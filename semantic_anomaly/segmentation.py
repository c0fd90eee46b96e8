"""Instances of an image: what every segmenter gives, and how one is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import numpy as np

from semantic_anomaly.errors import (
    IndexFormatError,
    ModelOutputError,
    SettingsError,
    UnknownNameError,
)
from semantic_anomaly.structures import PatchGrid

FAMILIES = ("detector", "promptless", "tokens", "universal")
TOKENS = "tokens"
_SHA256 = re.compile(r"[0-9a-f]{64}")


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


@dataclass(frozen=True)
class SegmenterIdentity:
    """The segmenter and its use: masks of equal identities mean the same.

    Attributes:
        family: one of `FAMILIES`.
        model_id: folder name or hub id, empty without a model.
        digest: 64 hexadecimal digits, of weights, configuration and parameters.

    Raises:
        IndexFormatError: a field of the wrong type or out of range.
    """

    family: str
    model_id: str
    digest: str

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise _wrong("family", f"one of {', '.join(FAMILIES)}", self.family)
        if not isinstance(self.model_id, str):
            raise _wrong("model_id", "a string", self.model_id)
        if not isinstance(self.digest, str) or not _SHA256.fullmatch(self.digest):
            raise _wrong("digest", "64 hexadecimal digits", self.digest)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SegmenterIdentity:
        """Make an identity of what `to_dict` returned.

        Raises:
            IndexFormatError: a field missing, unknown, of the wrong type or out of range.
        """
        names = {f.name for f in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            raise _wrong("it", f"exactly {', '.join(sorted(names))}", values)
        return cls(**values)

    def matches(self, other: SegmenterIdentity) -> bool:
        """Return whether masks of both mean the same, whatever the model is called."""
        return (self.family, self.digest) == (other.family, other.digest)


def _wrong(name: str, expected: str, found: object) -> IndexFormatError:
    return IndexFormatError(f"segmenter identity: {name}: expected {expected}, found {found!r}")


class InstanceSegmenter(Protocol):
    """What gives the instances of an image."""

    @property
    def identity(self) -> SegmenterIdentity:
        """Return what the masks depend on."""

    def segment(self, image: np.ndarray, grid: PatchGrid) -> InstanceMasks:
        """Return the instances of a (height, width, 3) uint8 RGB image with its embeddings."""

    def close(self) -> None:
        """Free what the segmenter holds; it cannot be used afterwards."""


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
    if family not in FAMILIES:
        raise SettingsError(str(UnknownNameError("segmenter family", family, FAMILIES)))
    if bool(model) == (family == TOKENS):
        expected = "no model" if family == TOKENS else "a model: a folder or a downloaded hub id"
        raise SettingsError(f"segmenter '{family}': expected {expected}, found '{model}'")
    if family == TOKENS:
        from semantic_anomaly.segmentation_tokens import TokenSegmenter

        return TokenSegmenter()
    from semantic_anomaly.segmentation_models import load_network_segmenter

    return load_network_segmenter(family, model, device, dtype)
