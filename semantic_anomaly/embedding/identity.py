"""What an embedder is, as far as its embeddings may be compared with another's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import numpy as np

from semantic_anomaly.errors import (
    IndexFormatError,
)
from semantic_anomaly.settings import SEGMENTER_FAMILIES
from semantic_anomaly.structures import PatchGrid

_SHA256 = re.compile(r"[0-9a-f]{64}")
_PLACE = "place_weight"
_NOT_COMPARED = ("model_id", "revision", "dtype")


@dataclass(frozen=True)
class EmbedderIdentity:
    """The backbone and its use: embeddings of equal identities lie in one space.

    Attributes:
        model_id: shipped name, folder name or hub id; never an absolute path.
        architecture: `model_type` of the backbone's configuration.
        revision: commit of the hub snapshot, empty for a local folder.
        weights_sha256, config_sha256: 64 hexadecimal digits.
        layers: hidden states used, counted from the front; empty: the network's last output,
            where it is none of them.
        input_size: long side in pixels to which images are resized.
        patch_px: side of a grid place in pixels of the resized image.
        dim: length of an embedding.
        dtype: precision that the backbone computed in.
        place_weight: of the place in the image in the distance, in [0, 1).

    Raises:
        IndexFormatError: a field of the wrong type or out of range.
    """

    model_id: str
    architecture: str
    revision: str
    weights_sha256: str
    config_sha256: str
    layers: tuple[int, ...]
    input_size: int
    patch_px: int
    dim: int
    dtype: str
    place_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("model_id", "architecture", "dtype", "revision"):
            value = getattr(self, name)
            if not isinstance(value, str) or (name != "revision" and not value):
                raise _wrong("embedder", name, "a string", value)
        for name in ("weights_sha256", "config_sha256"):
            value = getattr(self, name)
            if not isinstance(value, str) or not _SHA256.fullmatch(value):
                raise _wrong("embedder", name, "64 hexadecimal digits", value)
        for name in ("input_size", "patch_px", "dim"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise _wrong("embedder", name, "a positive integer", value)
        if type(self.place_weight) is not float or not 0.0 <= self.place_weight < 1.0:
            raise _wrong("embedder", "place_weight", "a number in [0, 1)", self.place_weight)
        if not isinstance(self.layers, tuple) or any(type(i) is not int for i in self.layers):
            raise _wrong("embedder", "layers", "integers", self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = {**asdict(self), "layers": list(self.layers)}
        # Left out where there is none, as indexes of earlier versions do.
        return values if self.place_weight else {k: values[k] for k in values if k != _PLACE}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EmbedderIdentity:
        """Make an identity of what `to_dict` returned.

        Raises:
            IndexFormatError: a field missing, unknown, of the wrong type or out of range.
        """
        if not isinstance(values, Mapping):
            raise _wrong("embedder", "it", "a mapping", values)
        names = {f.name for f in fields(cls)}
        values = {_PLACE: 0.0, **values}
        if set(values) != names:
            odd = ", ".join(sorted(map(str, names.symmetric_difference(values))))
            raise IndexFormatError(f"embedder identity: missing or unknown fields: {odd}")
        layers = values["layers"]
        return cls(**{**values, "layers": tuple(layers) if isinstance(layers, list) else layers})

    def difference(self, other: EmbedderIdentity) -> tuple[str, Any, Any] | None:
        """Return (field, own value, the other's) of the first difference that matters, or None.

        Names and revisions do not matter, for digests say more; nor does the precision, which
        moves embeddings by less than neighbours differ and is recorded only.
        """
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name not in _NOT_COMPARED and mine != theirs:
                return field.name, mine, theirs
        return None

    def matches(self, other: EmbedderIdentity) -> bool:
        """Return whether embeddings of both may be compared."""
        return self.difference(other) is None


@dataclass(frozen=True)
class SegmenterIdentity:
    """The segmenter and its use: masks of equal identities mean the same.

    Attributes:
        family: one of `SEGMENTER_FAMILIES`.
        model_id: folder name or hub id, empty without a model.
        digest: 64 hexadecimal digits, of weights, configuration and parameters.

    Raises:
        IndexFormatError: a field of the wrong type or out of range.
    """

    family: str
    model_id: str
    digest: str

    def __post_init__(self) -> None:
        if self.family not in SEGMENTER_FAMILIES:
            raise _wrong(
                "segmenter", "family", f"one of {', '.join(SEGMENTER_FAMILIES)}", self.family
            )
        if not isinstance(self.model_id, str):
            raise _wrong("segmenter", "model_id", "a string", self.model_id)
        if not isinstance(self.digest, str) or not _SHA256.fullmatch(self.digest):
            raise _wrong("segmenter", "digest", "64 hexadecimal digits", self.digest)

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
            raise _wrong("segmenter", "it", f"exactly {', '.join(sorted(names))}", values)
        return cls(**values)

    def matches(self, other: SegmenterIdentity) -> bool:
        """Return whether masks of both mean the same, whatever the model is called."""
        return (self.family, self.digest) == (other.family, other.digest)


class Embedder(Protocol):
    """What the detector needs of a backbone; `segmentation.embedder.RunningEmbedder` in earnest."""

    @property
    def identity(self) -> EmbedderIdentity:
        """Return what the embeddings depend on."""

    @property
    def segmenter(self) -> SegmenterIdentity | None:
        """Return what the instances of the grids depend on, None where they have none."""

    def grid_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (rows, cols) of the grid that an image of (height, width) gives."""

    def embed(self, images: Sequence[np.ndarray]) -> list[PatchGrid]:
        """Return the patch embeddings of (height, width, 3) uint8 RGB images, in order."""


def _wrong(what: str, name: str, expected: str, found: object) -> IndexFormatError:
    return IndexFormatError(f"{what} identity: {name}: expected {expected}, found {found!r}")
