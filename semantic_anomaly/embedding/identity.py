"""Identity of an embedder and a segmenter: what must agree before embeddings are compared."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from semantic_anomaly.errors import IndexFormatError
from semantic_anomaly.settings import EXECUTIONS, SEGMENTER_FAMILIES, TORCH
from semantic_anomaly.stages import INSTANCES, StageSpec
from semantic_anomaly.structures import PatchGrid

_SHA256 = re.compile(r"[0-9a-f]{64}")
# Digests identify a model better than names; precision and execution move embeddings less than
# neighbouring patches differ.
_NOT_COMPARED = ("model_id", "revision", "dtype", "execution")
# By kind of field: what is expected, and its test.
_Rule = tuple[str, Callable[[Any], bool]]
_STRING: _Rule = ("a string", lambda value: isinstance(value, str))
_NAME: _Rule = ("a non-empty string", lambda value: isinstance(value, str) and value != "")
_COUNT: _Rule = ("a positive integer", lambda value: type(value) is int and value > 0)
_DIGEST: _Rule = (
    "64 hexadecimal digits",
    lambda value: isinstance(value, str) and _SHA256.fullmatch(value) is not None,
)
_LAYER: _Rule = ("an integer from 0", lambda value: type(value) is int and value >= 0)
_EXECUTION: _Rule = (
    f"one of {', '.join(EXECUTIONS)}",
    lambda value: value in EXECUTIONS,
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
        return asdict(self)

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
        return cls(**values)


@dataclass(frozen=True)
class EmbedderIdentity(_Identity):
    """A backbone and how a stage uses it: embeddings of equal identities lie in one space.

    Attributes:
        model_id: shipped name, folder name or hub id; never an absolute path.
        architecture: `model_type` of the configuration of the backbone.
        revision: commit of the hub snapshot, empty for a local folder.
        weights_sha256, config_sha256: 64 hexadecimal digits.
        layer: hidden state, counted from the front.
        input_size: long side in pixels to which images are resized.
        average: side of the square of patches over which embeddings are averaged; 1: none.
        patch_px: side of a patch in pixels of the resized image.
        dim: dimension of an embedding.
        dtype: precision of the computation.
        execution: what ran the network: torch or openvino.
        place_weight: weight of the position in the image in the distance, in [0, 1).
    """

    _what = "embedder"
    _rules: ClassVar[Mapping[str, _Rule]] = {
        **dict.fromkeys(("model_id", "architecture", "dtype"), _NAME),
        **dict.fromkeys(("weights_sha256", "config_sha256"), _DIGEST),
        **dict.fromkeys(("input_size", "average", "patch_px", "dim"), _COUNT),
        **{"revision": _STRING, "layer": _LAYER, "place_weight": _WEIGHT},
        "execution": _EXECUTION,
    }

    model_id: str
    architecture: str
    revision: str
    weights_sha256: str
    config_sha256: str
    layer: int
    input_size: int
    average: int
    patch_px: int
    dim: int
    dtype: str
    place_weight: float = 0.0
    execution: str = TORCH

    def difference(self, other: EmbedderIdentity) -> tuple[str, Any, Any] | None:
        """Return (field, own value, other value) of the first difference that matters, or None.

        Name, revision, precision and execution do not matter: embeddings of both can be compared.
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


@dataclass(frozen=True)
class StageIdentity:
    """A stage of an index, or of a running embedder.

    Attributes:
        spec: as in the settings.
        embedder: the backbone and how it is used.
        segmenter: of the instances; None for a stage of patches.

    Raises:
        IndexFormatError: a stage of instances without a segmenter, or of patches with one.
    """

    spec: StageSpec
    embedder: EmbedderIdentity
    segmenter: SegmenterIdentity | None = None

    def __post_init__(self) -> None:
        if (self.segmenter is not None) != (self.spec.kind == INSTANCES):
            raise IndexFormatError(f"stage '{self.name}': expected a segmenter for instances only")

    @property
    def name(self) -> str:
        """Return a short name, such as 'mobilenet_v1:21@800' or 'mobilenet_v1:21@800 instances'."""
        embedder = self.embedder
        average = f" average={embedder.average}" if embedder.average > 1 else ""
        suffix = f" {INSTANCES}" if self.spec.kind == INSTANCES else ""
        return f"{embedder.model_id}:{embedder.layer}@{embedder.input_size}{average}{suffix}"


class Embedder(Protocol):
    """Interface of an embedder; implemented by `segmentation.embedder.RunningEmbedder`."""

    @property
    def stages(self) -> tuple[StageIdentity, ...]:
        """Return the stages whose grids it makes, at least one."""

    @property
    def device(self) -> str:
        """Return the device of the backbones: cpu, or a GPU, which then searches the index too."""

    def grids_hw(self, image_hw: tuple[int, int]) -> list[tuple[int, int]]:
        """Return (rows, cols) of the patch grid of each stage, of an image of (height, width)."""

    def embed(self, images: Sequence[np.ndarray]) -> list[PatchGrid]:
        """Return the patch grids of (height, width, 3) uint8 RGB images, in order."""
