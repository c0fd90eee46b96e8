"""Segmentation by tokens: regions and their borders."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

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
    return image, PatchGrid(features, (180, 320)), things


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


@pytest.mark.parametrize("spread", [1.0, 0.3])
def test_things_become_regions_at_any_scale_of_distances(spread: float) -> None:
    image, grid, things = scene(spread=spread)
    masks = TokenSegmenter().segment(image, grid)
    assert masks.dtype == bool and masks.shape[1:] == (36, 64)
    assert masks.any(0).all() and masks.any((1, 2)).all()
    truth = np.kron(things, np.ones((2, 2), int))
    for thing in range(3):
        assert max(overlap(mask, truth == thing) for mask in masks) > 0.95


def test_borders_follow_colours_inside_patches() -> None:
    image, grid, _ = scene()
    # The red thing extends half a patch to the right.
    image[70:130, 150:155] = (200, 30, 30)
    red = image[2::5, 2::5, 0] > 150
    masks = TokenSegmenter().segment(image, grid)
    thing = max(masks, key=lambda mask: overlap(mask, red))
    assert thing[16:24, 30].all() and not thing[16:24, 31:].any()


def test_regions_are_connected_and_coarse_ones_join_fine_ones() -> None:
    generator = np.random.default_rng(1)
    features = generator.standard_normal((12, 20, 8)).astype(np.float32)
    features[:, :10, 0] += 4
    features /= np.linalg.norm(features, axis=2, keepdims=True)
    fine, coarse = token_regions(features)
    assert set(coarse) == set(range(coarse.max() + 1))
    for label in range(fine.max() + 1):
        assert len(set(coarse[fine == label])) == 1
        mask = (fine == label).reshape(12, 20).astype(np.uint8)
        assert cv2.connectedComponents(mask, connectivity=8)[0] == 2


def test_nearly_equal_distances_do_not_give_one_region() -> None:
    noise = np.random.default_rng(2).standard_normal((40, 60, 16)).astype(np.float32)
    features = np.dstack([cv2.GaussianBlur(noise[..., n], (0, 0), 1) for n in range(16)])
    features[..., 0] += 2 * features.std()
    features /= np.linalg.norm(features, axis=2, keepdims=True)
    fine, coarse = token_regions(features)
    assert 40 * 60 / 64 <= fine.max() + 1 <= 40 * 60 / 8
    assert 40 * 60 / 256 <= coarse.max() + 1 < fine.max() + 1


@pytest.mark.parametrize("grid_hw", [(1, 1), (1, 7), (5, 1)])
def test_uniform_images_are_one_region(grid_hw: tuple[int, int]) -> None:
    features = np.zeros((*grid_hw, 4), np.float32)
    features[..., 0] = 1.0
    image = np.full((33, 47, 3), 120, np.uint8)
    masks = TokenSegmenter().segment(image, PatchGrid(features, (33, 47)))
    assert len(masks) == 1 and masks.all()
