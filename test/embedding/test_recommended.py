"""Recommended stages: one entry for each architecture, and the same in the documentation."""

from __future__ import annotations

import re
from pathlib import Path

from semantic_anomaly.embedding.backbone import FAMILIES
from semantic_anomaly.embedding.recommended import RECOMMENDED
from semantic_anomaly.stages import StageSpec

PAGE = Path(__file__).resolve().parents[2] / "docs" / "backbones.md"


def test_every_architecture_has_stages() -> None:
    assert set(RECOMMENDED) == set(FAMILIES)
    for recommendation in RECOMMENDED.values():
        assert recommendation.stages
        for end in recommendation.stages:
            assert StageSpec.parse(f"name {end}").backbone == "name"


def test_the_page_has_the_same_table() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## Recommended stages")[2]
    found = {}
    for names, stages, measured in re.findall(r"^\| (`.*`) \| (`.*`) \| (.+) \|$", section, re.M):
        for name in re.findall(r"`(\w+)`", names):
            found[name] = tuple(re.findall(r"`([^`]+)`", stages)), measured
    expected = {
        name: (recommendation.stages, recommendation.measured or "not measured here")
        for name, recommendation in RECOMMENDED.items()
    }
    assert found == expected
