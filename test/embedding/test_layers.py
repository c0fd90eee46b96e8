"""Which hidden states become features, and how several become one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from worlds.backbones import STAGES, VIT, images, save_backbone

from semantic_anomaly.embedding import backbone as embedding
from semantic_anomaly.embedding import pretrained as network
from semantic_anomaly.embedding.backbone import PatchEmbedder
from semantic_anomaly.errors import BackboneError


def backbone_maps(folder: Path, family: str, pixels: torch.Tensor, stages: list[str]) -> Any:
    """What the Backbone class of transformers makes of the same pixels."""
    import transformers

    name = family.replace("Model", "Backbone")
    model = getattr(transformers, name).from_pretrained(folder, out_features=stages)
    with torch.inference_mode():
        return model.eval()(pixels).feature_maps


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Dinov2Model", {}),
        ("Dinov2WithRegistersModel", {"num_register_tokens": 3}),
        ("DINOv3ViTModel", {**VIT, "num_register_tokens": 4}),
    ],
)
@pytest.mark.parametrize("layers", [(3,), (1,), (1, 2)])
def test_layers_are_those_of_the_backbone_classes(
    tmp_path: Path,
    rng: np.random.Generator,
    family: str,
    config: dict[str, Any],
    layers: tuple[int, ...],
) -> None:
    folder = save_backbone(tmp_path / "backbone", family, **config)
    embedder = PatchEmbedder(str(folder), layers=layers, input_size=112)
    (image,) = images(rng, (112, 112))
    pixels = embedder._prepare(image[None], (112, 112))
    maps = backbone_maps(folder, family, pixels, [f"stage{i}" for i in layers])
    parts = [nn.functional.normalize(m, dim=1) for m in maps]
    expected = nn.functional.normalize(torch.cat(parts, 1), dim=1)[0].permute(1, 2, 0)
    found = embedder.embed([image])[0]
    np.testing.assert_allclose(found.features, expected.numpy(), atol=1e-4)


def test_default_layers_are_those_the_folder_names(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "backbone")
    config = json.loads((folder / "config.json").read_text())
    for out_indices, expected in (([1, 2], (1, 2)), ([-1], (3,)), (None, (3,))):
        config.update(out_indices=out_indices, out_features=None)
        (folder / "config.json").write_text(json.dumps(config))
        assert PatchEmbedder(str(folder), input_size=56).identity.layers == expected


def test_coarser_layers_are_spread_over_the_finest_grid(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = save_backbone(tmp_path / "backbone", "ConvNextModel", **STAGES)
    (image,) = images(rng, (64, 96))
    fine, coarse, both = (
        PatchEmbedder(str(folder), layers=layers, input_size=96).embed([image])[0].features
        for layers in ((2,), (4,), (2, 4))
    )
    assert fine.shape == (8, 12, 16) and coarse.shape == (2, 3, 32) and both.shape == (8, 12, 48)
    # The borders of the coarse grid repeat, and each part has the same weight.
    np.testing.assert_allclose(both[:, :, :16], fine * both_norm(both)[..., None], atol=1e-5)
    corner = both[0, 0, 16:] / np.linalg.norm(both[0, 0, 16:])
    np.testing.assert_allclose(corner, coarse[0, 0], atol=1e-5)
    assert both_norm(both)[0, 0] == pytest.approx(np.sqrt(0.5), abs=1e-5)
    between = both[0, 3, 16:] / np.linalg.norm(both[0, 3, 16:])
    # Column 3 of 12 lies at 0.375 between the first two of three coarse columns.
    mixed = 0.625 * coarse[0, 0] + 0.375 * coarse[0, 1]
    np.testing.assert_allclose(between, mixed / np.linalg.norm(mixed), atol=1e-5)


def both_norm(features: np.ndarray) -> np.ndarray:
    return np.asarray(np.linalg.norm(features[..., :16], axis=-1))


@pytest.mark.parametrize("layer", [4, -5, 100])
def test_layers_that_are_not_there_are_named(tiny_backbone: Path, layer: int) -> None:
    with pytest.raises(BackboneError, match=rf"layer {layer}: expected .* 0 to 3"):
        PatchEmbedder(str(tiny_backbone), layers=(layer,))


def test_folding_batch_norms_changes_nothing(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**STAGES, "embedding_size": 8}
    folder = save_backbone(tmp_path / "backbone", "ResNetModel", **config)
    model = network.load_network(embedding.open_backbone(str(folder)))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    model.save_pretrained(folder)
    (image,) = images(rng, (64, 96))
    folded = PatchEmbedder(str(folder), layers=(1, 2, 3), input_size=96)
    kinds = [type(m) for m in folded._model.modules()]  # type: ignore[union-attr]
    assert nn.BatchNorm2d not in kinds
    monkeypatch.setattr(embedding, "fold_normalisations", lambda model: None)
    unfolded = PatchEmbedder(str(folder), layers=(1, 2, 3), input_size=96)
    np.testing.assert_allclose(
        folded.embed([image])[0].features, unfolded.embed([image])[0].features, atol=1e-4
    )
