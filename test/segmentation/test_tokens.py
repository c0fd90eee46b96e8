"""Segmentation by tokens: regions, their borders and scores."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from semantic_anomaly.errors import ModelOutputError
from semantic_anomaly.segmentation.tokens import TokenSegmenter, token_regions
from semantic_anomaly.structures import PatchGrid

GRID = (18, 32)


def scene(noise: float = 0.02, spread: float = 1.0) -> tuple[np.ndarray, PatchGrid, np.ndarray]:
    """Return an image of three things, its patch grid, and the (rows, cols) number of the thing."""
    generator = np.random.default_rng(0)
    things = np.zeros(GRID, int)
    things[10:] = 1
    things[7:13, 8:15] = 2
    colours = np.array([[90, 140, 220], [80, 80, 80], [200, 30, 30]], np.uint8)
    image = np.kron(colours[things], np.ones((10, 10, 1), np.uint8))
    directions = np.zeros((3, 24))
    directions[:, 0] = 1.0
    directions[[0, 1, 2], [1, 2, 3]] = spread
    features = directions[things] + noise * spread * generator.standard_normal((*GRID, 24))
    features /= np.linalg.norm(features, axis=2, keepdims=True)
    features = features.astype(np.float32)
    return image, PatchGrid(features, features[0, 0], (180, 320)), things


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


@pytest.mark.parametrize("spread", [1.0, 0.3])
def test_things_become_regions_at_any_scale_of_distances(spread: float) -> None:
    image, grid, things = scene(spread=spread)
    instances = TokenSegmenter().segment(image, grid)
    assert instances.image_hw == (180, 320) and instances.masks.shape[1:] == (36, 64)
    assert instances.masks.any(0).all()
    truth = np.kron(things, np.ones((2, 2), int))
    for thing in range(3):
        assert max(overlap(mask, truth == thing) for mask in instances.masks) > 0.95


def test_borders_follow_colours_inside_patches() -> None:
    image, grid, _ = scene()
    # The red thing extends half a patch to the right.
    image[70:130, 150:155] = (200, 30, 30)
    red = image[2::5, 2::5, 0] > 150
    instances = TokenSegmenter().segment(image, grid)
    thing = max(instances.masks, key=lambda mask: overlap(mask, red))
    assert thing[16:24, 30].all() and not thing[16:24, 31:].any()


def test_regions_are_connected_and_coarse_ones_join_fine_ones() -> None:
    generator = np.random.default_rng(1)
    features = generator.standard_normal((12, 20, 8)).astype(np.float32)
    features[:, :10, 0] += 4
    features /= np.linalg.norm(features, axis=2, keepdims=True)
    (fine, fine_scores), (coarse, coarse_scores) = token_regions(features)
    assert set(fine) == set(range(len(fine_scores)))
    assert set(coarse) == set(range(len(coarse_scores)))
    for label in range(len(fine_scores)):
        assert len(set(coarse[fine == label])) == 1
        norm = np.linalg.norm(features.reshape(-1, 8)[fine == label].mean(0))
        assert fine_scores[label] == pytest.approx(norm, abs=1e-5)
        mask = (fine == label).reshape(12, 20).astype(np.uint8)
        assert cv2.connectedComponents(mask, connectivity=8)[0] == 2


def test_nearly_equal_distances_do_not_give_one_region() -> None:
    noise = np.random.default_rng(2).standard_normal((40, 60, 16)).astype(np.float32)
    features = np.dstack([cv2.GaussianBlur(noise[..., n], (0, 0), 1) for n in range(16)])
    features[..., 0] += 2 * features.std()
    features /= np.linalg.norm(features, axis=2, keepdims=True)
    (fine, _), (coarse, _) = token_regions(features)
    assert 40 * 60 / 64 <= fine.max() + 1 <= 40 * 60 / 8
    assert 40 * 60 / 256 <= coarse.max() + 1 < fine.max() + 1


def test_the_same_frame_gives_the_same_masks() -> None:
    image, grid, _ = scene(noise=0.2)
    one, other = (TokenSegmenter().segment(image, grid) for _ in range(2))
    np.testing.assert_array_equal(one.masks, other.masks)
    np.testing.assert_array_equal(one.scores, other.scores)


@pytest.mark.parametrize("grid_hw", [(1, 1), (1, 7), (5, 1), (3, 4)])
def test_uniform_images_are_one_region(grid_hw: tuple[int, int]) -> None:
    features = np.zeros((*grid_hw, 4), np.float32)
    features[..., 0] = 1.0
    image = np.full((33, 47, 3), 120, np.uint8)
    instances = TokenSegmenter().segment(image, PatchGrid(features, features[0, 0], (33, 47)))
    assert len(instances) == 1 and instances.masks.all() and instances.scores[0] == 1.0


def test_an_image_of_another_size_than_its_grid_is_refused() -> None:
    image, grid, _ = scene()
    with pytest.raises(ModelOutputError, match=r"expected \(180, 320, 3\) uint8"):
        TokenSegmenter().segment(image[:90], grid)
    with pytest.raises(ModelOutputError, match="float32"):
        TokenSegmenter().segment(image.astype(np.float32), grid)
