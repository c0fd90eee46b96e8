"""Stages: their text, and refusal of invalid values."""

from __future__ import annotations

from typing import Any

import pytest

from semantic_anomaly.errors import SettingsError
from semantic_anomaly.stages import StageSpec


@pytest.mark.parametrize(
    ("text", "stage"),
    [
        ("mobilenet_v1", StageSpec("mobilenet_v1")),
        ("facebook/dinov2-small layer=-1", StageSpec("facebook/dinov2-small", -1)),
        ("net layer=21 size=800 average=3", StageSpec("net", 21, 800, 3)),
        ("net kind=instances weight=0.5", StageSpec("net", kind="instances", weight=0.5)),
        ("net layer=0 weight=0", StageSpec("net", 0, weight=0.0)),
        ("my folder/a=b net size=640", StageSpec("my folder/a=b net", size=640)),
    ],
)
def test_a_stage_is_its_text(text: str, stage: StageSpec) -> None:
    assert StageSpec.parse(text) == stage and str(stage) == text
    assert StageSpec.parse(f"  {text} ") == stage


def test_the_order_of_keys_does_not_matter_and_defaults_are_left_out() -> None:
    stage = StageSpec.parse("net  weight=1 average=1\tsize=960 kind=grid layer=3")
    assert stage == StageSpec("net", 3) and str(stage) == "net layer=3"


def test_weights_survive_the_text() -> None:
    stage = StageSpec("net", weight=1 / 3)
    assert StageSpec.parse(str(stage)) == stage


@pytest.mark.parametrize("key", ["", "layer=", "color=", "kind=", "net weight="])
def test_errors_of_long_texts_are_short(key: str) -> None:
    with pytest.raises(SettingsError) as caught:
        StageSpec.parse(f"{key}{'9' * 4000}=")
    assert "stage" in str(caught.value) and len(str(caught.value)) < 800


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"backbone: expected a name or folder, found ''"),
        ("layer=3", "backbone: expected a name or folder"),
        ("net layer=", "layer: expected int, found ''"),
        ("net layer=1.5", "layer: expected int, found '1.5'"),
        ("net size=big", "size: expected int, found 'big'"),
        ("net size=0", "size: expected 1 to 8192 pixels, found 0"),
        ("net size=8193", "size: expected 1 to 8192 pixels"),
        ("net average=2", "average: expected an odd number from 1 to 15, found 2"),
        ("net average=17", "average: expected an odd number"),
        ("net kind=patches", "kind: expected grid or instances, found 'patches'"),
        ("net weight=-1", "weight: expected a number >= 0, found -1.0"),
        ("net weight=nan", "weight: expected a number >= 0, found nan"),
        ("net weight=inf", "weight: expected a number >= 0, found inf"),
        ("net layers=3", "at most once as 'key=value', found 'layers=3'"),
        ("net size=640 size=960", "at most once as 'key=value', found 'size=640'"),
    ],
)
def test_invalid_texts_are_refused_with_the_text(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        StageSpec.parse(text)
    assert str(caught.value).startswith(f"stage '{text}': ")


@pytest.mark.parametrize("text", ["net layer=" + "9" * 5000, "x" * 5000 + " size=0", "a=" * 900])
def test_long_texts_are_refused_in_a_short_message(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        StageSpec.parse(f"{text} kind=none")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "values", [{"layer": True}, {"layer": "3"}, {"size": 96.0}, {"average": True}, {"weight": "1"}]
)
def test_values_of_another_type_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=f"stage: {next(iter(values))}: expected"):
        StageSpec("net", **values)
