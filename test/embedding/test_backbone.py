"""Patch embeddings: position and order, layers, devices, failures, for every backbone family."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from worlds.backbones import FAMILIES, IDS, STAGES, VIT, Averages, images, save_backbone
from worlds.nominal_world import unit

from semantic_anomaly.embedding import backbone
from semantic_anomaly.embedding.backbone import (
    POSITION_DIM,
    PatchEmbedder,
    open_backbone,
    with_positions,
)
from semantic_anomaly.embedding.pretrained import load_network
from semantic_anomaly.errors import BackboneError, ImageError, ModelOutputError
from semantic_anomaly.settings import Settings


@pytest.fixture(scope="module")
def embedder(tiny_backbone: Path) -> PatchEmbedder:
    return PatchEmbedder(str(tiny_backbone), input_size=112)


@pytest.mark.parametrize(("family", "config", "layers", "stride", "dim"), FAMILIES, ids=IDS)
def test_every_family_gives_patches_at_their_position(
    tmp_path: Path,
    rng: np.random.Generator,
    family: str,
    config: dict[str, Any],
    layers: tuple[int, ...],
    stride: int,
    dim: int,
) -> None:
    folder = save_backbone(tmp_path / family, family, **config)
    embedder = PatchEmbedder(str(folder), layers=layers, input_size=320)
    identity = embedder.identity
    assert (identity.patch_px, identity.dim, identity.model_id) == (stride, dim, family)
    (noise,) = images(rng, (200, 320))
    # A change in one corner of the image is largest in that corner of the grid.
    corners = ((20, 250), (150, 40))
    changed = [noise.copy() for _ in corners]
    for image, (top, left) in zip(changed, corners, strict=True):
        image[top : top + 32, left : left + 32] //= 8
    before, *grids = embedder.embed([noise, *changed])
    assert before.grid_hw == embedder.grid_hw((200, 320)) and before.dim == dim
    rows, cols = before.grid_hw
    for after, (top, left) in zip(grids, corners, strict=True):
        change = 1 - np.einsum("rcd,rcd->rc", before.features, after.features)
        # Attention and group norms spread a little over the whole image.
        change = np.maximum(change - np.quantile(change, 0.9), 0)
        row = np.average(np.arange(rows), weights=change.sum(1))
        col = np.average(np.arange(cols), weights=change.sum(0))
        assert abs((row + 0.5) * 200 / rows - (top + 16)) <= 16 + 200 / rows
        assert abs((col + 0.5) * 320 / cols - (left + 16)) <= 16 + 320 / cols


@pytest.mark.parametrize(("family", "layers"), [("Dinov2Model", ()), ("ConvNextModel", (2, 4))])
def test_a_batch_is_its_images_one_by_one(
    tmp_path: Path, rng: np.random.Generator, family: str, layers: tuple[int, ...]
) -> None:
    folder = save_backbone(tmp_path / "backbone", family, **STAGES if layers else {})
    embedder = PatchEmbedder(str(folder), layers=layers, input_size=96)
    batch = images(rng, (60, 80), (90, 50), (60, 80), (60, 80), (33, 200), (90, 50))
    together = embedder.embed(batch)
    for image, grid in zip(batch, together, strict=True):
        alone = embedder.embed([image])[0]
        assert grid.image_hw == image.shape[:2]
        assert grid.grid_hw == alone.grid_hw == embedder.grid_hw(grid.image_hw)
        np.testing.assert_allclose(grid.features, alone.features, atol=1e-5)
        np.testing.assert_allclose(grid.global_feature, alone.global_feature, atol=1e-5)


@pytest.mark.parametrize(
    ("image_hw", "input_hw"),
    [
        ((760, 1280), (70, 112)),
        ((1280, 760), (112, 70)),
        ((64, 64), (112, 112)),
        ((10, 5000), (14, 112)),
    ],
)
def test_both_sides_are_rounded_to_the_patch(
    embedder: PatchEmbedder, image_hw: tuple[int, int], input_hw: tuple[int, int]
) -> None:
    assert embedder.input_hw(image_hw) == input_hw
    assert embedder.grid_hw(image_hw) == (input_hw[0] // 14, input_hw[1] // 14)


def test_both_sides_are_rounded_to_the_coarsest_grid_used(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = save_backbone(tmp_path / "backbone", "ConvNextModel", **STAGES)
    (image,) = images(rng, (90, 150))
    for layers, grid_hw in (((2,), (11, 19)), ((2, 4), (12, 20)), ((4,), (3, 5))):
        embedder = PatchEmbedder(str(folder), layers=layers, input_size=150)
        assert embedder.embed([image])[0].grid_hw == embedder.grid_hw((90, 150)) == grid_hw


def test_patch_and_pixel_differ_by_one_ratio(tmp_path: Path) -> None:
    path = save_backbone(tmp_path / "plain_colours")
    preprocessor = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(
        json.dumps(preprocessor | {"do_normalize": False})
    )
    embedder = PatchEmbedder(str(path), input_size=280)
    embedder._model = Averages()
    for height, width in ((112, 112), (90, 160), (233, 77)):
        # Red is the row, green the column, blue the scale.
        image = np.full((height, width, 3), 255, np.uint8)
        image[..., 0] = np.round(np.linspace(0, 255, height))[:, None]
        image[..., 1] = np.round(np.linspace(0, 255, width))[None, :]
        grid = embedder.embed([image])[0]
        rows, cols = grid.grid_hw
        y = grid.features[..., 0] / grid.features[..., 2] * (height - 1)
        x = grid.features[..., 1] / grid.features[..., 2] * (width - 1)
        # Colours are rounded twice, and at the border the resize can only look inwards.
        expected_y = (np.arange(rows) + 0.5) * height / rows - 0.5
        expected_x = (np.arange(cols) + 0.5) * width / cols - 0.5
        np.testing.assert_allclose(y, np.tile(expected_y[:, None], (1, cols)), atol=height / 255)
        np.testing.assert_allclose(x, np.tile(expected_x[None], (rows, 1)), atol=width / 255)


def test_preparation_is_resize_and_the_folders_own_normalisation(
    embedder: PatchEmbedder, rng: np.random.Generator
) -> None:
    (image,) = images(rng, (112, 84))
    pixels = embedder._prepare(image[None], (112, 84)).numpy()[0].transpose(1, 2, 0)
    expected = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(pixels, expected, atol=1e-5)
    # A smooth image keeps its values where it is enlarged or reduced.
    ramp = np.linspace(0, 255, 84).astype(np.uint8)
    smooth = np.broadcast_to(ramp[None, :, None], (112, 84, 3))
    half = embedder._prepare(smooth[None].copy(), (56, 42)).numpy()[0, 0, 10]
    expected_half = (smooth[0, :, 0].reshape(42, 2).mean(1) / 255 - 0.485) / 0.229
    np.testing.assert_allclose(half[1:-1], expected_half[1:-1], atol=0.02)


def test_features_are_fresh_float32_unit_vectors(
    embedder: PatchEmbedder, rng: np.random.Generator
) -> None:
    (image,) = images(rng, (60, 80))
    grid = embedder.embed([image])[0]
    assert grid.features.dtype == np.float32 and grid.features.flags.c_contiguous
    np.testing.assert_allclose(np.linalg.norm(grid.features, axis=-1), 1, atol=1e-5)
    assert np.linalg.norm(grid.global_feature) == pytest.approx(1, abs=1e-5)
    before = grid.features.copy()
    embedder.embed(images(rng, (60, 80)))
    np.testing.assert_array_equal(grid.features, before)
    assert embedder.embed([]) == []


def test_views_and_read_only_images_are_accepted_without_a_warning(
    embedder: PatchEmbedder, rng: np.random.Generator
) -> None:
    (image,) = images(rng, (60, 80))
    locked = image.copy()
    locked.flags.writeable = False
    mirrored = image[:, ::-1].copy()[:, ::-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grids = [embedder.embed([i])[0] for i in (image, locked, mirrored)]
    for grid in grids[1:]:
        np.testing.assert_array_equal(grid.features, grids[0].features)


def test_images_that_are_not_rgb_are_refused(embedder: PatchEmbedder) -> None:
    with pytest.raises(ImageError):
        embedder.embed([np.zeros((60, 80, 3), np.float32)])


# Layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "config", "layers"),
    [
        ("Dinov2Model", {}, (1, 2)),
        ("Dinov2WithRegistersModel", {"num_register_tokens": 3}, (3,)),
        ("DINOv3ViTModel", {**VIT, "num_register_tokens": 4}, (1, 3)),
    ],
)
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
    stages = [f"stage{i}" for i in layers]
    backbone_class = getattr(transformers, family.replace("Model", "Backbone"))
    model = backbone_class.from_pretrained(folder, out_features=stages).eval()
    with torch.inference_mode():
        parts = [nn.functional.normalize(m, dim=1) for m in model(pixels).feature_maps]
    expected = nn.functional.normalize(torch.cat(parts, 1), dim=1)[0].permute(1, 2, 0)
    np.testing.assert_allclose(embedder.embed([image])[0].features, expected.numpy(), atol=1e-4)


def test_default_layers_are_those_of_the_folder(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "backbone")
    config = json.loads((folder / "config.json").read_text())
    for out_indices, expected in (([1, -1], (1, 3)), (None, (3,))):
        config.update(out_indices=out_indices, out_features=None)
        (folder / "config.json").write_text(json.dumps(config))
        assert PatchEmbedder(str(folder), input_size=56).identity.layers == expected


def test_coarser_layers_are_interpolated_to_the_finest_grid(
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
    norms = np.linalg.norm(both[..., :16], axis=-1)
    np.testing.assert_allclose(both[:, :, :16], fine * norms[..., None], atol=1e-5)
    corner = both[0, 0, 16:] / np.linalg.norm(both[0, 0, 16:])
    np.testing.assert_allclose(corner, coarse[0, 0], atol=1e-5)
    assert norms[0, 0] == pytest.approx(np.sqrt(0.5), abs=1e-5)
    between = both[0, 3, 16:] / np.linalg.norm(both[0, 3, 16:])
    # Column 3 of 12 lies at 0.375 between the first two of three coarse columns.
    mixed = 0.625 * coarse[0, 0] + 0.375 * coarse[0, 1]
    np.testing.assert_allclose(between, mixed / np.linalg.norm(mixed), atol=1e-5)


@pytest.mark.parametrize("layer", [4, -5])
def test_missing_layers_are_named(tiny_backbone: Path, layer: int) -> None:
    with pytest.raises(BackboneError, match=rf"layer {layer}: expected .* 0 to 3"):
        PatchEmbedder(str(tiny_backbone), layers=(layer,))


def test_folding_batch_norms_changes_nothing(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**STAGES, "embedding_size": 8}
    folder = save_backbone(tmp_path / "backbone", "ResNetModel", **config)
    model = load_network(open_backbone(str(folder)), transformers.AutoModel)
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
    monkeypatch.setattr(backbone, "fold_batch_norms", lambda model: None)
    unfolded = PatchEmbedder(str(folder), layers=(1, 2, 3), input_size=96)
    np.testing.assert_allclose(
        folded.embed([image])[0].features, unfolded.embed([image])[0].features, atol=1e-4
    )


# Position ---------------------------------------------------------------------------------------


def test_distances_are_weighted_sums(rng: np.random.Generator) -> None:
    weight, features = 0.3, unit(rng.normal(size=(6, 10, 8)))
    assert with_positions(features, 0.0) is features
    positioned = with_positions(features, weight)
    assert positioned.shape == (6, 10, 8 + POSITION_DIM) and positioned.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(positioned, axis=-1), 1.0, atol=1e-6)
    for (r0, c0), (r1, c1) in [((0, 0), (5, 9)), ((2, 3), (2, 4)), ((1, 7), (4, 7))]:
        dy, dx = (r1 - r0) / 6, (c1 - c0) / 10
        own = 1 - features[r0, c0] @ features[r1, c1]
        position = (2 - np.cos(np.pi * dy) - np.cos(0.2 * np.pi * dx)) / 2
        distance = 1 - positioned[r0, c0] @ positioned[r1, c1]
        assert distance == pytest.approx((1 - weight) * own + weight * position, abs=1e-6)


def test_the_embedder_appends_positions(
    embedder: PatchEmbedder, tiny_backbone: Path, rng: np.random.Generator
) -> None:
    batch = images(rng, (90, 160))
    positioned = PatchEmbedder(str(tiny_backbone), input_size=112, place_weight=0.3)
    plain_grid, grid = (e.embed(batch)[0] for e in (embedder, positioned))
    assert positioned.identity.dim == embedder.identity.dim + POSITION_DIM == grid.dim
    np.testing.assert_array_equal(grid.features, with_positions(plain_grid.features, 0.3))


# Loading and failures ---------------------------------------------------------------------------


def test_settings_make_the_same_embedder(tiny_backbone: Path) -> None:
    options: dict[str, Any] = {"layers": (1, 2), "input_size": 112, "place_weight": 0.3}
    settings = Settings(backbone=str(tiny_backbone), **options)
    direct = PatchEmbedder(str(tiny_backbone), **options)
    assert PatchEmbedder.from_settings(settings).identity == direct.identity
    assert direct.identity.model_id == "tiny_dinov2"
    assert (direct.identity.layers, direct.identity.input_size) == ((1, 2), 112)


def test_half_precision_is_recorded_and_close(
    embedder: PatchEmbedder, tiny_backbone: Path, rng: np.random.Generator
) -> None:
    half = PatchEmbedder(str(tiny_backbone), input_size=112, dtype="bfloat16")
    assert (embedder.identity.dtype, half.identity.dtype) == ("float32", "bfloat16")
    batch = images(rng, (112, 112))
    one, other = (e.embed(batch)[0].features for e in (embedder, half))
    assert other.dtype == np.float32
    change = 1 - np.einsum("rcd,rcd->rc", one, other)
    assert 0 < change.max() < 0.01


@pytest.mark.parametrize("blind_to", ["image", "everything"])
def test_networks_that_ignore_the_image_fail_the_self_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blind_to: str
) -> None:
    folder = save_backbone(tmp_path / "backbone")
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.patch_embeddings.projection.weight"].zero_()
    if blind_to == "everything":
        weights["layernorm.weight"].zero_()
        weights["layernorm.bias"].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match="'backbone': self-test"):
        PatchEmbedder(str(folder), input_size=56)


def test_large_dinov2_without_registers_gives_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_backbone(
        tmp_path / "backbone", hidden_size=1024, num_hidden_layers=1, mlp_ratio=1
    )
    with caplog.at_level(logging.WARNING):
        PatchEmbedder(str(folder), input_size=56)
    assert "registers" in caplog.text


def test_loading_prints_nothing(
    tiny_backbone: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    PatchEmbedder(str(tiny_backbone), input_size=56)
    assert capfd.readouterr() == ("", "") and not caplog.text


def test_out_of_memory_is_retried_once(
    embedder: PatchEmbedder, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image,) = images(rng, (60, 80))
    expected = embedder.embed([image])[0]
    run, failures = embedder._run_once, 1

    def scarce(batch: np.ndarray) -> Any:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return run(batch)

    monkeypatch.setattr(embedder, "_run_once", scarce)
    np.testing.assert_array_equal(embedder.embed([image])[0].features, expected.features)
    failures = 2
    with pytest.raises(ModelOutputError, match=r"CUDA out of memory\.$"):
        embedder.embed([image])
    monkeypatch.undo()
    np.testing.assert_array_equal(embedder.embed([image])[0].features, expected.features)


def test_failures_and_wrong_outputs_of_the_network_are_errors(
    tiny_backbone: Path, rng: np.random.Generator
) -> None:
    embedder = PatchEmbedder(str(tiny_backbone), input_size=112)
    (image,) = images(rng, (60, 80))
    with torch.no_grad():
        embedder._norm.weight.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(ModelOutputError, match="finite"):
        embedder.embed([image])
    embedder._model = Averages(patch=28)
    with pytest.raises(ModelOutputError, match="backbone failed"):
        embedder.embed([image])


def test_closed_embedders_raise(tiny_backbone: Path, rng: np.random.Generator) -> None:
    embedder = PatchEmbedder(str(tiny_backbone), input_size=112)
    embedder.close()
    embedder.close()
    with pytest.raises(ModelOutputError, match="closed"):
        embedder.embed(images(rng, (60, 80)))
