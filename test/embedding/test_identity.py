"""When embeddings may be compared, and when not."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from typing import Any

import pytest

from semantic_anomaly.embedding.identity import EmbedderIdentity
from semantic_anomaly.errors import IndexFormatError

IDENTITY = EmbedderIdentity(
    model_id="tiny",
    architecture="dinov2",
    revision="",
    weights_sha256="0" * 64,
    config_sha256="a" * 64,
    layers=(2, 3),
    input_size=640,
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
    "layers": (3,),
    "input_size": 644,
    "patch_px": 16,
    "dim": 32,
    "dtype": "bfloat16",
    "place_weight": 0.5,
}


def test_survives_json() -> None:
    assert EmbedderIdentity.from_dict(json.loads(json.dumps(IDENTITY.to_dict()))) == IDENTITY


@pytest.mark.parametrize("name", sorted(OTHER))
def test_only_names_and_precision_may_differ(name: str) -> None:
    other = dataclasses.replace(IDENTITY, **{name: OTHER[name]})
    compared = name not in ("model_id", "revision", "dtype")
    assert IDENTITY.matches(other) is not compared
    expected = (name, getattr(IDENTITY, name), OTHER[name]) if compared else None
    assert IDENTITY.difference(other) == expected


def test_every_field_is_covered_above() -> None:
    assert {f.name for f in dataclasses.fields(EmbedderIdentity)} == set(OTHER)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_id", ""),
        ("model_id", None),
        ("architecture", 3),
        ("revision", None),
        ("weights_sha256", "0" * 63),
        ("config_sha256", "G" * 64),
        ("layers", "12"),
        ("layers", [1.0]),
        ("layers", [True]),
        ("input_size", 0),
        ("patch_px", -1),
        ("dim", "64"),
        ("dim", True),
        ("dtype", ""),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(IndexFormatError, match=name):
        EmbedderIdentity.from_dict({**IDENTITY.to_dict(), name: value})


def test_missing_and_unknown_fields_are_named() -> None:
    values = IDENTITY.to_dict()
    with pytest.raises(IndexFormatError, match="surplus"):
        EmbedderIdentity.from_dict({**values, "surplus": 1})
    del values["dim"]
    with pytest.raises(IndexFormatError, match="dim"):
        EmbedderIdentity.from_dict(values)
    with pytest.raises(IndexFormatError, match="mapping"):
        EmbedderIdentity.from_dict([])  # type: ignore[arg-type]


def test_the_weight_of_the_place_is_part_of_the_space() -> None:
    placed = replace(IDENTITY, place_weight=0.2)
    assert IDENTITY.difference(placed) == ("place_weight", 0.0, 0.2)
    assert "place_weight" not in IDENTITY.to_dict()
    assert EmbedderIdentity.from_dict(placed.to_dict()) == placed
    for weight in (1.0, -0.1, float("nan"), 1):
        with pytest.raises(IndexFormatError, match="place_weight"):
            replace(IDENTITY, place_weight=weight)
