"""Backbone and segmenter together: loading, instances of the grids, and closing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.colours import ColourEmbedder, street
from worlds.segmented_streets import ByRule, halves, nothing

from semantic_anomaly.embedding.backbone import PatchEmbedder
from semantic_anomaly.errors import InputError, SettingsError
from semantic_anomaly.segmentation.embedder import RunningEmbedder, load_segmenter
from semantic_anomaly.segmentation.masks import patch_shares
from semantic_anomaly.settings import Settings


class Closing(ColourEmbedder):
    closed = False

    def close(self) -> None:
        self.closed = True


class ClosingRule(ByRule):
    closed = False

    def close(self) -> None:
        self.closed = True


def running(segmenter: Any = None) -> RunningEmbedder:
    backbone: Any = Closing()
    return RunningEmbedder(backbone, segmenter)


def test_without_a_segmenter_grids_have_no_instances() -> None:
    embedder = running()
    grid = embedder.embed([street(1).image])[0]
    assert grid.instances is None and embedder.segmenter is None
    assert embedder.identity == ColourEmbedder().identity


def test_instances_come_with_the_grid() -> None:
    rule = ByRule(halves)
    embedder = running(rule)
    frames = [street(seed, odd=seed == 2).image for seed in (1, 2)]
    for image, grid in zip(frames, embedder.embed(frames), strict=True):
        shares = patch_shares(rule.segment(image, grid), grid.grid_hw)
        np.testing.assert_array_equal(grid.instances, shares)
    assert embedder.segmenter == rule.identity
    assert [len(g.instances) for g in embedder.embed(frames) if g.instances is not None] == [2, 3]


def test_no_instances_differ_from_no_segmentation() -> None:
    grid = running(ByRule(nothing)).embed([street(1).image])[0]
    assert grid.instances is not None and grid.instances.shape == (0, *grid.grid_hw)


def test_closing_closes_both() -> None:
    segmenter = ClosingRule(halves)
    embedder: Any = running(segmenter)
    embedder.close()
    assert embedder._backbone.closed and segmenter.closed


def test_settings_name_backbone_and_segmenter(tiny_backbone: Path) -> None:
    base = Settings(backbone=str(tiny_backbone), input_size=112, device="cpu", dtype="float32")
    assert RunningEmbedder.from_settings(base).segmenter is None
    embedder = RunningEmbedder.from_settings(base.replace(variant="instance"))
    assert embedder.segmenter is not None and embedder.segmenter.family == "tokens"
    assert embedder.identity == PatchEmbedder.from_settings(base).identity
    embedder.warm_up((56, 112))
    image = np.random.default_rng(0).integers(0, 256, (56, 112, 3), dtype=np.uint8)
    assert embedder.embed([image])[0].instances is not None
    with pytest.raises(SettingsError, match="expected a model"):
        RunningEmbedder.from_settings(base.replace(variant="instance", segmenter="promptless"))


@pytest.mark.parametrize(
    ("family", "model", "message"),
    [
        ("token", "", "did you mean 'tokens'"),
        ("tokens", "somewhere", "expected no model, found 'somewhere'"),
        ("universal", "", "expected a model"),
    ],
)
def test_unknown_families_and_missing_models_are_refused(
    family: str, model: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_segmenter(family, model)
