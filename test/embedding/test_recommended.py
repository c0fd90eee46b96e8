"""Recommended stages: one entry for each architecture, and the same in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from semantic_anomaly.embedding.backbone import FAMILIES, Backbone
from semantic_anomaly.embedding.pretrained import shipped_backbones
from semantic_anomaly.embedding.recommended import RECOMMENDED
from semantic_anomaly.stages import StageSpec

PAGE = Path(__file__).resolve().parents[2] / "docs" / "backbones.md"


def test_every_architecture_has_stages() -> None:
    assert set(RECOMMENDED) == set(FAMILIES)
    for recommendation in RECOMMENDED.values():
        assert recommendation.stages
        for end in recommendation.stages:
            assert StageSpec.parse(f"name {end}").backbone == "name"


@pytest.mark.parametrize("name", shipped_backbones())
def test_shipped_backbones_are_recommended_at_their_default_hidden_state(name: str) -> None:
    backbone = Backbone(name, "cpu")
    specs = RECOMMENDED[backbone.folder.architecture].specs(name, is_complete=False)
    recommended = {number for number, _, _ in backbone.probe([spec.layer for spec in specs])}
    assert recommended == {number for number, _, _ in backbone.probe([None])}


def test_numbers_from_the_end_count_in_complete_networks_only() -> None:
    recommendation = RECOMMENDED["convnext"]
    assert [spec.layer for spec in recommendation.specs("a")] == [-2]
    assert [spec.layer for spec in recommendation.specs("a", is_complete=False)] == [None]
    assert [spec.layer for spec in RECOMMENDED["mobilenet_v1"].specs("a", is_complete=False)] == [
        21
    ]


def test_the_page_has_the_same_table() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## Recommended stages")[2]
    section = section.partition("\n## ")[0]
    found = {}
    for names, stages, measured in re.findall(r"^\| (`.*`) \| (`.*`) \| (.+) \|$", section, re.M):
        for name in re.findall(r"`(\w+)`", names):
            found[name] = tuple(re.findall(r"`([^`]+)`", stages)), measured
    expected = {
        name: (recommendation.stages, recommendation.measured or "not measured here")
        for name, recommendation in RECOMMENDED.items()
    }
    assert found == expected
