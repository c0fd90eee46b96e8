"""Patch embeddings: right place, right order, whatever the family and the image size."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.backbones import FAMILIES, IDS, STAGES, Averages, images, save_backbone

from semantic_anomaly.embedding.backbone import PatchEmbedder
from semantic_anomaly.errors import ImageError


@pytest.fixture(scope="module")
def embedder(tiny_backbone: Path) -> PatchEmbedder:
    return PatchEmbedder(str(tiny_backbone), input_size=112)


@pytest.mark.parametrize(("family", "config", "layers", "stride", "dim"), FAMILIES, ids=IDS)
def test_every_family_gives_patches_at_their_place(
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
    before = embedder.embed([noise])[0]
    assert before.grid_hw == embedder.grid_hw((200, 320)) and before.dim == dim
    rows, cols = before.grid_hw
    # What changes in one corner of the image changes most in that corner of the grid.
    for top, left in ((20, 250), (150, 40)):
        changed = noise.copy()
        changed[top : top + 32, left : left + 32] //= 8
        after = embedder.embed([changed])[0]
        change = 1 - np.einsum("rcd,rcd->rc", before.features, after.features)
        # Attention and group norms spread a little over the whole image.
        change = np.maximum(change - np.quantile(change, 0.9), 0)
        row = np.average(np.arange(rows), weights=change.sum(1))
        col = np.average(np.arange(cols), weights=change.sum(0))
        assert abs((row + 0.5) * 200 / rows - (top + 16)) <= 16 + 200 / rows
        assert abs((col + 0.5) * 320 / cols - (left + 16)) <= 16 + 320 / cols


@pytest.mark.parametrize("family", ["Dinov2Model", "MobileNetV1Model"])
def test_a_batch_is_its_images_one_by_one(
    tmp_path: Path, rng: np.random.Generator, family: str
) -> None:
    layers = () if family == "Dinov2Model" else (9, 21)
    folder = save_backbone(tmp_path / "backbone", family)
    embedder = PatchEmbedder(str(folder), layers=layers, input_size=96)
    batch = images(rng, (60, 80), (90, 50), (60, 80), (60, 80), (33, 200), (90, 50))
    together = embedder.embed(batch)
    for image, grid in zip(batch, together, strict=True):
        alone = embedder.embed([image])[0]
        assert grid.image_hw == image.shape[:2]
        assert grid.grid_hw == alone.grid_hw == embedder.grid_hw(grid.image_hw)
        np.testing.assert_allclose(grid.features, alone.features, atol=1e-5)
        np.testing.assert_allclose(grid.global_feature, alone.global_feature, atol=1e-5)


def test_nothing_in_nothing_out(embedder: PatchEmbedder) -> None:
    assert embedder.embed([]) == []


@pytest.mark.parametrize(
    ("image_hw", "input_hw"),
    [
        ((720, 1280), (364, 644)),
        ((1280, 720), (644, 364)),
        ((360, 640), (364, 644)),
        ((64, 64), (644, 644)),
        ((10, 5000), (14, 644)),
    ],
)
def test_both_sides_are_rounded_to_the_patch(
    tiny_backbone: Path, image_hw: tuple[int, int], input_hw: tuple[int, int]
) -> None:
    embedder = PatchEmbedder(str(tiny_backbone), input_size=640)
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


@pytest.mark.parametrize("image_hw", [(112, 112), (90, 160), (233, 77), (64, 500)])
def test_patch_and_pixel_differ_by_one_ratio(tmp_path: Path, image_hw: tuple[int, int]) -> None:
    path = save_backbone(tmp_path / "plain_colours")
    preprocessor = json.loads((path / "preprocessor_config.json").read_text())
    preprocessor.update(do_normalize=False)
    (path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    embedder = PatchEmbedder(str(path), input_size=280)
    embedder._model = Averages()
    height, width = image_hw
    # Red tells the row, green the column, blue the scale.
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


def test_views_and_images_that_cannot_be_written_are_taken_without_a_warning(
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


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((60, 80), np.uint8),
        np.zeros((60, 80, 4), np.uint8),
        np.zeros((0, 80, 3), np.uint8),
        np.zeros((60, 80, 3), np.float32),
        np.zeros((1, 60, 80, 3), np.uint8),
    ],
)
def test_what_is_no_rgb_image_is_refused(embedder: PatchEmbedder, image: np.ndarray) -> None:
    with pytest.raises(ImageError):
        embedder.embed([image])
