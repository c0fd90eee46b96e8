"""Identities of embedders, segmenters and stages: JSON, validation, what is compared."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest

from semantic_anomaly.embedding.identity import EmbedderIdentity, SegmenterIdentity, StageIdentity
from semantic_anomaly.errors import IndexFormatError
from semantic_anomaly.stages import StageSpec

IDENTITY = EmbedderIdentity(
    model_id="tiny",
    architecture="dinov2",
    revision="",
    weights_sha256="0" * 64,
    config_sha256="a" * 64,
    layer=2,
    input_size=640,
    average=1,
    patch_px=14,
    dim=64,
    dtype="float32",
)
OTHER: dict[str, Any] = {
    "model_id": "elsewhere/tiny",
    "architecture": "vit",
    "revision": "0123abc",
    "weights_sha256": "1" * 64,
    "config_sha256": "b" * 64,
    "layer": 3,
    "input_size": 644,
    "average": 3,
    "patch_px": 16,
    "dim": 32,
    "dtype": "bfloat16",
    "place_weight": 0.5,
    "execution": "openvino",
}


def test_survives_json() -> None:
    assert EmbedderIdentity.from_dict(json.loads(json.dumps(IDENTITY.to_dict()))) == IDENTITY


@pytest.mark.parametrize("name", sorted(OTHER))
def test_only_names_precision_and_execution_may_differ(name: str) -> None:
    other = replace(IDENTITY, **{name: OTHER[name]})
    is_compared = name not in ("model_id", "revision", "dtype", "execution")
    expected = (name, getattr(IDENTITY, name), OTHER[name]) if is_compared else None
    assert IDENTITY.difference(other) == expected


def test_every_field_is_covered_above() -> None:
    assert {field.name for field in fields(EmbedderIdentity)} == set(OTHER)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_id", ""),
        ("architecture", 3),
        ("revision", None),
        ("weights_sha256", "0" * 63),
        ("config_sha256", "G" * 64),
        ("layer", "12"),
        ("layer", True),
        ("layer", -1),
        ("input_size", 0),
        ("average", 0),
        ("patch_px", "14"),
        ("dim", True),
        ("dtype", ""),
        ("execution", "auto"),
        ("place_weight", 1.0),
        ("place_weight", float("nan")),
    ],
)
def test_invalid_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(IndexFormatError, match=name):
        EmbedderIdentity.from_dict({**IDENTITY.to_dict(), name: value})


def test_missing_and_unknown_fields_are_named() -> None:
    values = IDENTITY.to_dict()
    with pytest.raises(IndexFormatError, match="surplus"):
        EmbedderIdentity.from_dict({**values, "surplus": 1})
    del values["dim"]
    with pytest.raises(IndexFormatError, match="dim"):
        EmbedderIdentity.from_dict(values)
    with pytest.raises(IndexFormatError, match=r"embedder identity: expected .* found \[\]"):
        EmbedderIdentity.from_dict([])  # type: ignore[arg-type]


SEGMENTER = SegmenterIdentity("tokens", "", "a" * 64)


def test_segmenters_are_compared_by_family_and_digest() -> None:
    assert SegmenterIdentity.from_dict(json.loads(json.dumps(SEGMENTER.to_dict()))) == SEGMENTER
    assert SEGMENTER.matches(replace(SEGMENTER, model_id="other"))
    assert not SEGMENTER.matches(replace(SEGMENTER, digest="0" * 64))
    assert not SEGMENTER.matches(replace(SEGMENTER, family="detector"))


@pytest.mark.parametrize(
    "change", [{"family": "sam"}, {"model_id": 3}, {"digest": "abc"}, {"more": 1}]
)
def test_invalid_segmenter_identities_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(IndexFormatError, match=f"segmenter identity.*{next(iter(change))}"):
        SegmenterIdentity.from_dict(SEGMENTER.to_dict() | change)


def test_stages_have_a_segmenter_for_instances_only() -> None:
    patches, pooled = StageSpec("tiny"), StageSpec("tiny", kind="instances")
    assert StageIdentity(patches, IDENTITY).name == "tiny:2@640"
    assert StageIdentity(pooled, IDENTITY, SEGMENTER).name == "tiny:2@640 instances"
    for spec, segmenter in ((patches, SEGMENTER), (pooled, None)):
        with pytest.raises(IndexFormatError, match=r"stage 'tiny:2@640.*segmenter for instances"):
            StageIdentity(spec, IDENTITY, segmenter)
