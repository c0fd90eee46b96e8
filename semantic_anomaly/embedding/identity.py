"""Identity of an embedder and a segmenter: what must agree before embeddings are compared."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from semantic_anomaly.errors import IndexFormatError
from semantic_anomaly.settings import SEGMENTER_FAMILIES
from semantic_anomaly.structures import PatchGrid

_SHA256 = re.compile(r"[0-9a-f]{64}")
# Digests identify a model better than names; the precision moves embeddings less than neighbouring
# patches differ.
_NOT_COMPARED = ("model_id", "revision", "dtype")
# By kind of field: what is expected, and its test.
_Rule = tuple[str, Callable[[Any], bool]]
_STRING: _Rule = ("a string", lambda value: isinstance(value, str))
_NAME: _Rule = ("a non-empty string", lambda value: isinstance(value, str) and value != "")
_COUNT: _Rule = ("a positive integer", lambda value: type(value) is int and value > 0)
_DIGEST: _Rule = (
    "64 hexadecimal digits",
    lambda value: isinstance(value, str) and _SHA256.fullmatch(value) is not None,
)
_LAYERS: _Rule = (
    "integers",
    lambda value: isinstance(value, tuple) and all(type(layer) is int for layer in value),
)
_WEIGHT: _Rule = (
    "a number in [0, 1)",
    lambda value: type(value) is float and 0.0 <= value < 1.0,
)
_FAMILY: _Rule = (
    f"one of {', '.join(SEGMENTER_FAMILIES)}",
    lambda value: value in SEGMENTER_FAMILIES,
)


_IdentityT = TypeVar("_IdentityT", bound="_Identity")


@dataclass(frozen=True)
class _Identity:
    """Fields with one rule each.

    Raises:
        IndexFormatError: a field of the wrong type or out of range.
    """

    _what: ClassVar[str]
    _rules: ClassVar[Mapping[str, _Rule]]

    def __post_init__(self) -> None:
        for name, (expected, is_valid) in self._rules.items():
            value = getattr(self, name)
            if not is_valid(value):
                raise IndexFormatError(
                    f"{self._what} identity: {name}: expected {expected}, found {value!r}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = asdict(self).items()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values}

    @classmethod
    def from_dict(cls: type[_IdentityT], values: Mapping[str, Any]) -> _IdentityT:
        """Make an identity from the values of `to_dict`.

        Raises:
            IndexFormatError: a field missing, unknown, of the wrong type or out of range.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            raise IndexFormatError(
                f"{cls._what} identity: expected exactly the fields {', '.join(sorted(names))}, "
                f"found {sorted(map(str, values)) if isinstance(values, Mapping) else values!r}"
            )
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True)
class EmbedderIdentity(_Identity):
    """A backbone and how it is used: embeddings of equal identities lie in one space.

    Attributes:
        model_id: shipped name, folder name or hub id; never an absolute path.
        architecture: `model_type` of the configuration of the backbone.
        revision: commit of the hub snapshot, empty for a local folder.
        weights_sha256, config_sha256: 64 hexadecimal digits.
        layers: hidden states used, counted from the front; empty: the last output of the network,
            where that is none of the hidden states.
        input_size: long side in pixels to which images are resized.
        patch_px: side of a patch in pixels of the resized image.
        dim: dimension of an embedding.
        dtype: precision of the computation.
        place_weight: weight of the position in the image in the distance, in [0, 1).
    """

    _what = "embedder"
    _rules: ClassVar[Mapping[str, _Rule]] = {
        **dict.fromkeys(("model_id", "architecture", "dtype"), _NAME),
        **dict.fromkeys(("weights_sha256", "config_sha256"), _DIGEST),
        **dict.fromkeys(("input_size", "patch_px", "dim"), _COUNT),
        **{"revision": _STRING, "layers": _LAYERS, "place_weight": _WEIGHT},
    }

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

    def difference(self, other: EmbedderIdentity) -> tuple[str, Any, Any] | None:
        """Return (field, own value, other value) of the first difference that matters, or None.

        Name, revision and precision do not matter: embeddings of both can be compared.
        """
        for field in fields(self):
            values = getattr(self, field.name), getattr(other, field.name)
            if field.name not in _NOT_COMPARED and values[0] != values[1]:
                return field.name, *values
        return None


@dataclass(frozen=True)
class SegmenterIdentity(_Identity):
    """A segmenter and how it is used.

    Attributes:
        family: one of `SEGMENTER_FAMILIES`.
        model_id: folder name or hub id, empty without a model.
        digest: sha256 of weights, configuration and parameters, 64 hexadecimal digits.
    """

    _what = "segmenter"
    _rules: ClassVar[Mapping[str, _Rule]] = dict(family=_FAMILY, model_id=_STRING, digest=_DIGEST)

    family: str
    model_id: str
    digest: str

    def matches(self, other: SegmenterIdentity) -> bool:
        """Return whether both give the same masks; the name of the model does not matter."""
        return (self.family, self.digest) == (other.family, other.digest)


class Embedder(Protocol):
    """Interface of an embedder; implemented by `segmentation.embedder.RunningEmbedder`."""

    @property
    def identity(self) -> EmbedderIdentity:
        """Return the identity of the backbone."""

    @property
    def segmenter(self) -> SegmenterIdentity | None:
        """Return the identity of the segmenter, None without one."""

    def grid_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (rows, cols) of the patch grid of an image of (height, width) pixels."""

    def embed(self, images: Sequence[np.ndarray]) -> list[PatchGrid]:
        """Return the patch grids of (height, width, 3) uint8 RGB images, in order."""
