"""Patch embeddings: every family, position and order, hidden states, stages, failures."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from worlds.backbones import (
    EFFICIENT,
    FAMILIES,
    HEADS,
    MAE,
    RESIDUAL,
    STAGES,
    VIT,
    WINDOWS,
    Averages,
    images,
    make_network,
    save_backbone,
    save_network,
)
from worlds.nominal_world import unit

from semantic_anomaly.embedding import backbone
from semantic_anomaly.embedding.backbone import (
    POSITION_DIM,
    Backbone,
    PatchEmbedder,
    averaged,
    open_backbone,
    with_positions,
)
from semantic_anomaly.embedding.recommended import RECOMMENDED
from semantic_anomaly.errors import BackboneError, ImageError, ModelOutputError, SettingsError
from semantic_anomaly.settings import Settings
from semantic_anomaly.stages import StageSpec

TOKENS = sorted(name for name, family in backbone.FAMILIES.items() if family.prefix)


def make(folder: Path, layer: int | None = None, size: int = 112, **options: Any) -> PatchEmbedder:
    """Return an embedder of one stage."""
    average = options.pop("average", 1)
    return PatchEmbedder([StageSpec(str(folder), layer, size, average)], device="cpu", **options)


def states_of(network: Any, pixels: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """Return the hidden states of a network as transformers computes them."""
    with torch.inference_mode():
        return list(network(pixels, output_hidden_states=True, **options).hidden_states)


@pytest.fixture(scope="module")
def embedder(tiny_backbone: Path) -> PatchEmbedder:
    return make(tiny_backbone)


# Families ---------------------------------------------------------------------------------------


def test_every_family_has_a_tiny_network_and_a_recommendation() -> None:
    assert set(FAMILIES) == set(backbone.FAMILIES) == set(RECOMMENDED)
    for recommendation in RECOMMENDED.values():
        assert [StageSpec.parse(f"name {end}") for end in recommendation.stages]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_square_moved_by_a_cell_moves_the_response_by_a_cell(tmp_path: Path, name: str) -> None:
    tiny = FAMILIES[name]
    folder = save_backbone(tmp_path / name, tiny.model_class, **tiny.config)
    assert json.loads((folder / "config.json").read_text())["model_type"] == name
    side = tiny.stride
    embedder = make(folder, tiny.layer, 12 * side)
    [identity] = embedder.identities
    assert (identity.architecture, identity.patch_px, identity.dim) == (name, side, tiny.dim)
    dark = np.full((10 * side, 12 * side, 3), 60, np.uint8)
    assert embedder.grids_hw(dark.shape[:2]) == [(10, 12)]
    cells = ((4, 5), (4, 6), (5, 5), (6, 8))
    squares = [dark.copy() for _ in cells]
    for image, (row, col) in zip(squares, cells, strict=True):
        image[row * side : (row + 1) * side, col * side : (col + 1) * side] = 230
    before, *grids = embedder.embed([dark, *squares])
    responses = []
    for after in grids:
        change = 1 - np.einsum("rcd,rcd->rc", before.features, after.features)
        responses.append(np.unravel_index(change.argmax(), change.shape))
    moves = np.subtract(responses, responses[0])
    np.testing.assert_array_equal(moves, np.subtract(cells, cells[0]))
    # Strided convolutions see a cell and a part of the next one.
    assert np.abs(np.subtract(responses[0], cells[0])).max() <= (0 if name in TOKENS else 1)


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2"])
def test_composite_checkpoints_load_their_vision_part(
    tmp_path: Path, rng: np.random.Generator, name: str
) -> None:
    tiny = FAMILIES[name]
    both = make_network(tiny.model_class, **tiny.config)
    vision_class = tiny.model_class.replace("Model", "VisionModel")
    alone = make_network(vision_class, **tiny.config["vision_config"])
    tensors = dict(both.vision_model.named_parameters())
    for key, parameter in alone.named_parameters():
        parameter.data = tensors[key.removeprefix("vision_model.")].data
    batch = images(rng, (64, 96))
    grids = [
        make(save_network(tmp_path / folder, network), size=96).embed(batch)[0]
        for folder, network in (("both", both), ("alone", alone))
    ]
    np.testing.assert_allclose(grids[0].features, grids[1].features, atol=1e-5)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        ("ViTForImageClassification", VIT),
        ("ViTMAEForPreTraining", MAE),
        ("DeiTForImageClassificationWithTeacher", VIT),
        ("CLIPVisionModelWithProjection", VIT),
        ("SwinForImageClassification", {**WINDOWS, **HEADS}),
        ("ConvNextForImageClassification", STAGES),
        ("ResNetForImageClassification", RESIDUAL),
        ("EfficientNetForImageClassification", EFFICIENT),
        ("MobileNetV1ForImageClassification", {"depth_multiplier": 0.25}),
        ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.25}),
    ],
)
def test_checkpoints_with_a_head_load(
    tmp_path: Path, model_class: str, config: dict[str, Any]
) -> None:
    folder = save_backbone(tmp_path / "with_head", model_class, **config)
    assert Backbone(str(folder), "cpu").layers > 2


def test_unknown_architectures_are_refused_with_the_list(tiny_backbone: Path) -> None:
    folder = save_network(
        tiny_backbone.parent / "bert",
        make_network("BertModel", num_hidden_layers=1, hidden_size=12),
    )
    with pytest.raises(BackboneError, match="'bert' is not supported here") as caught:
        make(folder)
    assert str(caught.value).endswith(", ".join(sorted(FAMILIES)))


def test_masked_autoencoders_neither_mask_nor_shuffle(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    network = make_network("ViTMAEModel", **MAE)
    folder = save_network(tmp_path / "mae", network)
    assert json.loads((folder / "config.json").read_text())["mask_ratio"] == 0.75
    loaded = Backbone(str(folder), "cpu")
    pixels = loaded.prepare(np.stack(images(rng, (64, 64), (64, 64))), (64, 64))
    [grid] = loaded.maps(pixels, [0])
    with torch.inference_mode():
        patches = network.embeddings.patch_embeddings(pixels)  # (2, 16, 32)
        expected = patches + network.embeddings.position_embeddings[:, 1:]
        expected = network.layernorm(expected).unflatten(1, (4, 4))
    torch.testing.assert_close(grid, expected, atol=1e-5, rtol=1e-4)


def test_windows_of_swin_survive_small_images(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = save_backbone(tmp_path / "swin", "SwinModel", **{**WINDOWS, **HEADS})
    embedder = make(folder, 1, 160)
    wide, narrow = images(rng, (120, 160), (16, 160))
    first = embedder.embed([wide])[0]
    # Of the coarsest grid there is one row, where windows have four.
    assert embedder.embed([narrow])[0].grid_hw == (4, 20)
    np.testing.assert_array_equal(embedder.embed([wide])[0].features, first.features)


def test_large_dinov2_without_registers_gives_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_backbone(
        tmp_path / "backbone", hidden_size=1024, num_hidden_layers=1, mlp_ratio=1
    )
    with caplog.at_level(logging.WARNING):
        Backbone(str(folder), "cpu")
    assert "registers" in caplog.text


# Simplified networks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "convolutions"),
    [
        ("resnet", RESIDUAL),
        ("regnet", {**RESIDUAL, "groups_width": 8}),
        ("efficientnet", EFFICIENT),
        ("mobilenet_v1", {"depth_multiplier": 0.25}),
        ("mobilenet_v2", {"depth_multiplier": 0.25}),
    ],
)
def test_batch_norms_are_folded_and_nothing_changes(
    tmp_path: Path, rng: np.random.Generator, name: str, convolutions: dict[str, Any]
) -> None:
    network = make_network(FAMILIES[name].model_class, **convolutions)
    loaded = Backbone(str(save_network(tmp_path / name, network)), "cpu")
    assert loaded._model is not None
    assert not [m for m in loaded._model.modules() if isinstance(m, nn.BatchNorm2d)]
    pixels = loaded.prepare(np.stack(images(rng, (64, 96))), (64, 96))
    expected = states_of(network, pixels)
    assert loaded.layers == len(expected)
    for state, values in zip(loaded.maps(pixels, range(loaded.layers)), expected, strict=True):
        scale = values.abs().max()
        torch.testing.assert_close(state.permute(0, 3, 1, 2) / scale, values / scale)


def test_neutral_squeeze_excite_blocks_are_not_computed(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    network = make_network("EfficientNetModel", **EFFICIENT)
    neutral = (True, False, True, True)
    for block, is_neutral in zip(network.encoder.blocks, neutral, strict=True):
        if is_neutral:
            nn.init.zeros_(block.squeeze_excite.expand.weight)
            nn.init.constant_(block.squeeze_excite.expand.bias, 20.0)
    # Without weights in its last layer a block may still be far from 1.
    nn.init.zeros_(network.encoder.blocks[1].squeeze_excite.expand.weight)
    loaded = Backbone(str(save_network(tmp_path / "efficientnet", network)), "cpu")
    blocks = loaded.network.encoder.blocks
    found = tuple(isinstance(block.squeeze_excite, nn.Identity) for block in blocks)
    assert found == neutral
    pixels = loaded.prepare(np.stack(images(rng, (64, 96))), (64, 96))
    for state, values in zip(
        loaded.maps(pixels, range(5)), states_of(network, pixels), strict=True
    ):
        scale = values.abs().max()
        torch.testing.assert_close(state.permute(0, 3, 1, 2) / scale, values / scale)


# Geometry ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "layer"), [("Dinov2Model", None), ("ConvNextModel", 2)])
def test_a_batch_is_its_images_one_by_one(
    tmp_path: Path, rng: np.random.Generator, family: str, layer: int | None
) -> None:
    folder = save_backbone(tmp_path / "backbone", family, **STAGES if layer else {})
    embedder = make(folder, layer, 96)
    batch = images(rng, (60, 80), (90, 50), (60, 80), (60, 80), (33, 200), (90, 50))
    together = embedder.embed(batch)
    for image, grid in zip(batch, together, strict=True):
        alone = embedder.embed([image])[0]
        assert grid.image_hw == image.shape[:2]
        assert [grid.grid_hw] == [alone.grid_hw] == embedder.grids_hw(grid.image_hw)
        np.testing.assert_allclose(grid.features, alone.features, atol=1e-5)


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
    assert embedder.grids_hw(image_hw) == [(input_hw[0] // 14, input_hw[1] // 14)]


def test_images_are_enlarged_to_one_cell_of_the_coarsest_grid(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = save_backbone(tmp_path / "backbone", "ConvNextModel", **STAGES)
    embedder = make(folder, 2, 96)
    for image_hw, grid_hw in (((90, 150), (7, 12)), ((33, 200), (4, 12))):
        assert embedder.grids_hw(image_hw) == [grid_hw]
        assert embedder.embed(images(rng, image_hw))[0].grid_hw == grid_hw


def test_patch_and_pixel_differ_by_one_ratio(tmp_path: Path) -> None:
    path = save_backbone(tmp_path / "plain_colours")
    preprocessor = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(
        json.dumps(preprocessor | {"do_normalize": False})
    )
    embedder = make(path, size=280)
    replace_network(embedder)
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


def replace_network(embedder: PatchEmbedder, patch: int = 14) -> None:
    """Put mean colours in place of the network of an embedder, without a final norm."""
    [loaded] = embedder._backbones.values()
    loaded._model = Averages(loaded.network.config, patch)
    loaded._norm = nn.Identity()


def test_preparation_is_resize_and_the_folders_own_normalisation(
    tiny_backbone: Path, rng: np.random.Generator
) -> None:
    loaded = Backbone(str(tiny_backbone), "cpu")
    (image,) = images(rng, (112, 84))
    pixels = loaded.prepare(image[None], (112, 84)).numpy()[0].transpose(1, 2, 0)
    expected = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(pixels, expected, atol=1e-5)
    # A smooth image keeps its values where it is enlarged or reduced.
    ramp = np.linspace(0, 255, 84).astype(np.uint8)
    smooth = np.broadcast_to(ramp[None, :, None], (112, 84, 3))
    half = loaded.prepare(smooth[None].copy(), (56, 42)).numpy()[0, 0, 10]
    expected_half = (smooth[0, :, 0].reshape(42, 2).mean(1) / 255 - 0.485) / 0.229
    np.testing.assert_allclose(half[1:-1], expected_half[1:-1], atol=0.02)


def test_features_are_fresh_float32_unit_vectors(
    embedder: PatchEmbedder, rng: np.random.Generator
) -> None:
    (image,) = images(rng, (60, 80))
    grid = embedder.embed([image])[0]
    assert grid.features.dtype == np.float32 and grid.features.flags.c_contiguous
    np.testing.assert_allclose(np.linalg.norm(grid.features, axis=-1), 1, atol=1e-5)
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


# Hidden states ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOKENS)
def test_the_last_tokens_are_those_that_the_network_returns(
    tmp_path: Path, rng: np.random.Generator, name: str
) -> None:
    loaded = Backbone(
        str(save_backbone(tmp_path / name, FAMILIES[name].model_class, **FAMILIES[name].config)),
        "cpu",
    )
    pixels = loaded.prepare(np.stack(images(rng, (112, 112))), (112, 112))
    outputs: list[Any] = []
    loaded.network.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    [grid] = loaded.maps(pixels, [loaded.layers - 1])
    patches = outputs[0].last_hidden_state[:, -grid.shape[1] * grid.shape[2] :]
    torch.testing.assert_close(grid.flatten(1, 2), patches, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "config", "layer"),
    [
        ("Dinov2Model", {}, 1),
        ("Dinov2WithRegistersModel", {"num_register_tokens": 3}, 3),
        ("DINOv3ViTModel", {**VIT, "num_register_tokens": 4}, 2),
        ("ResNetModel", RESIDUAL, 3),
    ],
)
def test_hidden_states_are_those_of_the_backbone_classes(
    tmp_path: Path, rng: np.random.Generator, family: str, config: dict[str, Any], layer: int
) -> None:
    folder = save_backbone(tmp_path / "backbone", family, **config)
    embedder = make(folder, layer)
    (image,) = images(rng, (112, 112))
    input_hw = embedder.input_hw((112, 112))
    pixels = Backbone(str(folder), "cpu").prepare(image[None], input_hw)
    backbone_class = getattr(transformers, family.replace("Model", "Backbone"))
    model = backbone_class.from_pretrained(folder, out_indices=[layer]).eval()
    with torch.inference_mode():
        [states] = model(pixels).feature_maps
    expected = nn.functional.normalize(states, dim=1)[0].permute(1, 2, 0)
    np.testing.assert_allclose(embedder.embed([image])[0].features, expected.numpy(), atol=1e-4)


def test_the_default_hidden_state_is_the_last_of_the_folder(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "backbone")
    config = json.loads((folder / "config.json").read_text())
    for out_indices, expected in (([1, 2], 2), (None, 3)):
        config.update(out_indices=out_indices, out_features=None)
        (folder / "config.json").write_text(json.dumps(config))
        assert make(folder, size=56).identities[0].layer == expected


def test_averages_are_means_over_squares_of_patches(
    tiny_backbone: Path, embedder: PatchEmbedder, rng: np.random.Generator
) -> None:
    batch = images(rng, (84, 112))
    plain = embedder.embed(batch)[0].features  # (6, 8, 32)
    smooth = make(tiny_backbone, average=3, place_weight=0.3)
    assert smooth.identities[0].average == 3
    features = smooth.embed(batch)[0].features
    expected = np.empty_like(plain)
    for row in range(6):
        for col in range(8):
            square = plain[max(row - 1, 0) : row + 2, max(col - 1, 0) : col + 2]
            expected[row, col] = unit(square.mean((0, 1)))
    np.testing.assert_allclose(features, with_positions(expected, 0.3), atol=1e-5)


def test_an_average_of_one_patch_is_the_patch() -> None:
    features = nn.functional.normalize(torch.randn(1, 2, 3, 4), dim=-1)
    assert averaged(features, 1) is features


def test_a_backbone_lists_stride_and_channels_of_its_hidden_states(tmp_path: Path) -> None:
    loaded = Backbone(str(save_backbone(tmp_path / "convnext", "ConvNextModel", **STAGES)), "cpu")
    expected = [(0, 4, 8), (1, 4, 8), (2, 8, 16), (3, 16, 24), (4, 32, 32)]
    assert loaded.probe(range(loaded.layers)) == expected
    assert loaded.probe([-1, None]) == [expected[-1]] * 2
    assert loaded.parameters == sum(p.numel() for p in loaded.network.parameters()) > 1000


# Stages -----------------------------------------------------------------------------------------


def test_stages_of_one_backbone_and_size_share_a_forward_pass(
    tiny_backbone: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    convnext = str(save_backbone(tmp_path / "convnext", "ConvNextModel", **STAGES))
    stages = [
        StageSpec(convnext, 2, 96),
        StageSpec(str(tiny_backbone), None, 112),
        StageSpec(convnext, 4, 96),
        StageSpec(convnext, 2, 64, kind="instances"),
    ]
    embedder = PatchEmbedder(stages, device="cpu")
    assert embedder.stages == tuple(stages) and len(embedder._backbones) == 2
    passes: list[tuple[int, ...]] = []
    for loaded in embedder._backbones.values():
        loaded.network.register_forward_hook(
            lambda module, inputs, output: passes.append(tuple(inputs[0].shape))
        )
    (image,) = images(rng, (90, 130))
    [grid] = embedder.embed([image])
    # Both stages of 96 pixels need sides that are multiples of 32.
    assert sorted(passes) == [(1, 3, 48, 64), (1, 3, 64, 96), (1, 3, 84, 112)]
    assert embedder.grids_hw((90, 130)) == [g.grid_hw for g in grid.stages]
    assert [g.grid_hw for g in grid.stages] == [(8, 12), (6, 8), (2, 3), (6, 8)]
    assert [i.layer for i in embedder.identities] == [2, 3, 4, 2]
    assert [i.input_size for i in embedder.identities] == [96, 112, 96, 64]
    # Alone, the stage of the last hidden state has the same input.
    alone = PatchEmbedder(stages[2:3], device="cpu").embed([image])[0]
    np.testing.assert_allclose(alone.features, grid.stages[2].features, atol=1e-5)
    assert all(g.instances is None for g in grid.stages)


def test_stages_that_cannot_be_loaded_are_named(tiny_backbone: Path) -> None:
    good = StageSpec(str(tiny_backbone), size=56)
    missing = StageSpec("nobody/nothing")
    with pytest.raises(BackboneError, match=r"^stage 1 \(nobody/nothing\): backbone 'nobody"):
        PatchEmbedder([good, missing])
    wrong = StageSpec(str(tiny_backbone), 9, size=56)
    with pytest.raises(BackboneError, match=r"^stage 1 \(.*layer=9 size=56\): .*tiny_dinov2.*9"):
        PatchEmbedder([good, wrong])
    with pytest.raises(BackboneError, match=r"^backbone 'nobody/nothing'"):
        PatchEmbedder([missing])


@pytest.mark.parametrize("layer", [4, -5])
def test_missing_hidden_states_are_named(tiny_backbone: Path, layer: int) -> None:
    with pytest.raises(BackboneError, match=rf"layer {layer}: expected .* 0 to 3"):
        make(tiny_backbone, layer)


@pytest.mark.parametrize("other", ["", " layer=3", " layer=-1 weight=0.5"])
def test_equal_stages_are_refused(tiny_backbone: Path, tmp_path: Path, other: str) -> None:
    copy = shutil.copytree(tiny_backbone, tmp_path / "copy")
    stages = [f"{tiny_backbone} layer=2", f"{tiny_backbone}", f"{copy}{other}"]
    with pytest.raises(SettingsError, match=r"stage 2 .* differs in more than name and weight"):
        PatchEmbedder(list(map(StageSpec.parse, stages)), device="cpu")
    stages[2] += " kind=instances"
    assert len(PatchEmbedder(list(map(StageSpec.parse, stages)), device="cpu").identities) == 3


def test_settings_make_the_same_embedder(tiny_backbone: Path) -> None:
    stages = tuple(StageSpec(str(tiny_backbone), layer, 112) for layer in (1, 2))
    direct = PatchEmbedder(stages, device="cpu", place_weight=0.3)
    common: dict[str, Any] = {"place_weight": 0.3, "device": "cpu"}
    for settings in (
        Settings(stages=tuple(map(str, stages)), **common),
        Settings(backbone=str(tiny_backbone), layers=(1, 2), input_size=112, **common),
    ):
        assert PatchEmbedder.from_settings(settings).identities == direct.identities
    assert {i.model_id for i in direct.identities} == {"tiny_dinov2"}


# Shipped backbones ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layer", "stride", "dim", "megabytes"),
    [("efficientnet_lite2", 20, 32, 208, 8), ("mobilenet_v1", 21, 16, 512, 7)],
)
def test_shipped_backbones_load_and_are_small(
    name: str, layer: int, stride: int, dim: int, megabytes: int
) -> None:
    loaded = Backbone(name, "cpu")
    assert loaded.probe([None, layer]) == [(layer, stride, dim)] * 2
    files = list(loaded.folder.path.iterdir())
    assert sum(path.stat().st_size for path in files) < megabytes * 1e6
    assert {"README.md", "config.json", "model.safetensors"} < {path.name for path in files}
    gates = [m for m in loaded.network.modules() if "SqueezeExcite" in type(m).__name__]
    assert not gates


def test_hidden_states_that_a_shipped_backbone_lacks_fail_the_self_test() -> None:
    # Layers above 23 are not shipped.
    with pytest.raises(BackboneError, match="'mobilenet_v1': self-test"):
        PatchEmbedder([StageSpec("mobilenet_v1", 25, 128)], device="cpu")


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
    positioned = make(tiny_backbone, place_weight=0.3)
    plain_grid, grid = (e.embed(batch)[0] for e in (embedder, positioned))
    [plain], [identity] = embedder.identities, positioned.identities
    assert identity.dim == plain.dim + POSITION_DIM == grid.dim
    np.testing.assert_array_equal(grid.features, with_positions(plain_grid.features, 0.3))


# Failures ---------------------------------------------------------------------------------------


def test_half_precision_is_recorded_and_close(
    embedder: PatchEmbedder, tiny_backbone: Path, rng: np.random.Generator
) -> None:
    half = make(tiny_backbone, dtype="bfloat16")
    assert [e.identities[0].dtype for e in (embedder, half)] == ["float32", "bfloat16"]
    batch = images(rng, (112, 112))
    one, other = (e.embed(batch)[0].features for e in (embedder, half))
    assert other.dtype == np.float32
    change = 1 - np.einsum("rcd,rcd->rc", one, other)
    assert 0 < change.max() < 0.01


@pytest.mark.parametrize("place_weight", [0.0, 0.3])
@pytest.mark.parametrize("blind_to", ["image", "everything"])
def test_networks_that_ignore_the_image_fail_the_self_test(
    tmp_path: Path, tiny_backbone: Path, blind_to: str, place_weight: float
) -> None:
    folder = save_backbone(tmp_path / "blind")
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.patch_embeddings.projection.weight"].zero_()
    if blind_to == "everything":
        weights["layernorm.weight"].zero_()
        weights["layernorm.bias"].fill_(1.0)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match=r"^backbone 'blind': self-test: .*depend on image"):
        make(folder, size=56, place_weight=place_weight)
    stages = [StageSpec(str(tiny_backbone), size=56), StageSpec(str(folder), size=56)]
    with pytest.raises(BackboneError, match=r"^stage 1 \(.*\): backbone 'blind': self-test"):
        PatchEmbedder(stages, device="cpu", place_weight=place_weight)


def test_loading_prints_nothing(
    tiny_backbone: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    make(tiny_backbone, size=56)
    assert capfd.readouterr() == ("", "") and not caplog.text


def test_out_of_memory_is_retried_once(
    embedder: PatchEmbedder, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image,) = images(rng, (60, 80))
    expected = embedder.embed([image])[0]
    run, failures = embedder._run_once, 1

    def scarce(*args: Any) -> Any:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return run(*args)

    monkeypatch.setattr(embedder, "_run_once", scarce)
    np.testing.assert_array_equal(embedder.embed([image])[0].features, expected.features)
    failures = 2
    with pytest.raises(ModelOutputError, match=r"CUDA out of memory\.$"):
        embedder.embed([image])
    monkeypatch.undo()
    np.testing.assert_array_equal(embedder.embed([image])[0].features, expected.features)


def test_failures_and_wrong_outputs_of_the_network_are_errors(
    tiny_backbone: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = make(tiny_backbone)
    (image,) = images(rng, (60, 80))
    [loaded] = embedder._backbones.values()
    with torch.no_grad():
        loaded._norm.weight.fill_(float("nan"))
    with pytest.raises(ModelOutputError, match="finite"):
        embedder.embed([image])
    replace_network(embedder, patch=28)
    with pytest.raises(ModelOutputError, match=r"grid of 6 x 8 patches, found 13 tokens"):
        embedder.embed([image])

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(loaded.network, "forward", fail)
    with pytest.raises(ModelOutputError, match=r"^backbone failed: no kernel$"):
        embedder.embed([image])


def test_closed_embedders_raise(tiny_backbone: Path, rng: np.random.Generator) -> None:
    embedder = make(tiny_backbone)
    embedder.close()
    embedder.close()
    with pytest.raises(ModelOutputError, match="closed"):
        embedder.embed(images(rng, (60, 80)))


def test_damaged_folders_are_found_before_the_network_is_built(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "backbone")
    (folder / "model.safetensors").unlink()
    assert open_backbone(str(folder)).architecture == "dinov2"
    with pytest.raises(BackboneError, match="safetensors only"):
        make(folder)


def test_threads_are_those_of_the_settings(tiny_backbone: Path) -> None:
    before = torch.get_num_threads()
    settings = Settings(stages=(f"{tiny_backbone} size=56",), device="cpu")
    try:
        PatchEmbedder.from_settings(settings.replace(threads=before + 1)).close()
        assert torch.get_num_threads() == before + 1
        PatchEmbedder.from_settings(settings).close()
        assert torch.get_num_threads() == before + 1, "0 changes nothing"
    finally:
        torch.set_num_threads(before)
