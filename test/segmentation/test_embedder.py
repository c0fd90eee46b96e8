"""Backbone and segmenter together: loading, stages, instances of the grids, and closing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.backbones import images

from semantic_anomaly.embedding.backbone import PatchEmbedder
from semantic_anomaly.embedding.identity import SegmenterIdentity, StageIdentity
from semantic_anomaly.errors import InputError, ModelOutputError, SettingsError
from semantic_anomaly.segmentation.embedder import RunningEmbedder, load_segmenter
from semantic_anomaly.segmentation.masks import patch_shares
from semantic_anomaly.settings import Settings
from semantic_anomaly.stages import StageSpec
from semantic_anomaly.structures import PatchGrid

IMAGE_HW = (84, 112)


def bright_and_dark(image: np.ndarray) -> np.ndarray:
    bright = image.mean(axis=2) > 128
    return np.stack([bright, ~bright])


def nothing(image: np.ndarray) -> np.ndarray:
    return np.zeros((0, *image.shape[:2]), bool)


class ByRule:
    """Segments by a rule, and counts the images."""

    identity = SegmenterIdentity("tokens", "", "a" * 64)
    is_closed = False

    def __init__(self, rule: Callable[[np.ndarray], np.ndarray]) -> None:
        self._rule = rule

    def segment(self, image: np.ndarray, grid: PatchGrid) -> np.ndarray:
        return self._rule(image)

    def close(self) -> None:
        self.is_closed = True


def stages(backbone: Path, *kinds: str) -> list[StageSpec]:
    """Return stages of these kinds, the second one coarser."""
    return [
        StageSpec(str(backbone), size=size, kind=kind)
        for kind, size in zip(kinds, (112, 56, 112), strict=False)
    ]


@pytest.fixture(scope="module")
def embedder(tiny_backbone: Path) -> PatchEmbedder:
    return PatchEmbedder(stages(tiny_backbone, "grid", "instances", "instances"), device="cpu")


def test_stages_of_patches_need_no_segmenter(tiny_backbone: Path, rng: np.random.Generator) -> None:
    backbone = PatchEmbedder(stages(tiny_backbone, "grid", "grid"), device="cpu")
    embedder = RunningEmbedder(backbone)
    [grid] = embedder.embed(images(rng, IMAGE_HW))
    assert [stage.instances for stage in grid.stages] == [None, None]
    expected = zip(backbone.stages, backbone.identities, strict=True)
    assert embedder.stages == tuple(StageIdentity(*pair) for pair in expected)


def test_stages_of_instances_have_those_of_their_grid(
    embedder: PatchEmbedder, rng: np.random.Generator
) -> None:
    rule = ByRule(bright_and_dark)
    running = RunningEmbedder(embedder, rule)
    assert [stage.segmenter for stage in running.stages] == [None, rule.identity, rule.identity]
    batch = images(rng, IMAGE_HW, IMAGE_HW)
    assert running.grids_hw(IMAGE_HW) == [(6, 8), (3, 4), (6, 8)]
    for image, grid, plain in zip(batch, running.embed(batch), embedder.embed(batch), strict=True):
        patches, *pooled = grid.stages
        assert patches.instances is None
        for stage, before, grid_hw in zip(
            grid.stages, plain.stages, running.grids_hw(IMAGE_HW), strict=True
        ):
            np.testing.assert_array_equal(stage.features, before.features)
            assert stage.grid_hw == grid_hw
        for stage in pooled:
            shares = patch_shares(bright_and_dark(image), stage.grid_hw)
            np.testing.assert_array_equal(stage.instances, shares)


def test_the_first_stage_may_have_instances(tiny_backbone: Path, rng: np.random.Generator) -> None:
    backbone = PatchEmbedder(stages(tiny_backbone, "instances", "grid"), device="cpu")
    [grid] = RunningEmbedder(backbone, ByRule(bright_and_dark)).embed(images(rng, IMAGE_HW))
    first, second = grid.stages
    assert first.instances is not None and second.instances is None
    assert (first.grid_hw, second.grid_hw) == ((6, 8), (3, 4))


def test_no_instances_differ_from_no_segmentation(
    embedder: PatchEmbedder, rng: np.random.Generator
) -> None:
    [grid] = RunningEmbedder(embedder, ByRule(nothing)).embed(images(rng, IMAGE_HW))
    shapes = [None if g.instances is None else g.instances.shape for g in grid.stages]
    assert shapes == [None, (0, 3, 4), (0, 6, 8)]


def test_stages_of_instances_without_a_segmenter_are_refused(
    embedder: PatchEmbedder, rng: np.random.Generator
) -> None:
    with pytest.raises(SettingsError, match="expected a segmenter"):
        RunningEmbedder(embedder).embed(images(rng, IMAGE_HW))


def test_closing_closes_both(tiny_backbone: Path, rng: np.random.Generator) -> None:
    segmenter = ByRule(nothing)
    running = RunningEmbedder(PatchEmbedder(stages(tiny_backbone, "instances")), segmenter)
    running.close()
    assert segmenter.is_closed
    with pytest.raises(ModelOutputError, match="closed"):
        running.embed(images(rng, IMAGE_HW))


def test_settings_name_backbones_and_segmenter(
    tiny_backbone: Path, rng: np.random.Generator
) -> None:
    base = Settings(backbone=str(tiny_backbone), input_size=112, device="cpu", dtype="float32")
    assert [s.segmenter for s in RunningEmbedder.from_settings(base).stages] == [None]
    embedder = RunningEmbedder.from_settings(base.replace(variant="combined", layers=(2, 3)))
    assert [(s.spec.kind, s.embedder.layer) for s in embedder.stages] == [
        *(("grid", 2), ("grid", 3)),
        ("instances", 2),
    ]
    assert [getattr(s.segmenter, "family", None) for s in embedder.stages] == [None, None, "tokens"]
    assert embedder.device == "cpu"
    embedder.warm_up((56, 112))
    [grid] = embedder.embed(images(rng, (56, 112)))
    assert [g.instances is None for g in grid.stages] == [True, True, False]
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


def test_stages_of_patches_have_no_segmenter(tiny_backbone: Path) -> None:
    settings: dict[str, Any] = {"backbone": str(tiny_backbone), "segmenter": "universal"}
    assert RunningEmbedder.from_settings(Settings(**settings)).stages[0].segmenter is None
