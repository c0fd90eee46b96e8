"""Instance masks: validation, exact shares of patches, pooling, and the region of interest."""

from __future__ import annotations

import numpy as np
import pytest
from worlds.nominal_world import LEFT_HALF, unit

from semantic_anomaly.errors import ModelOutputError
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.segmentation.masks import InstanceMasks, instances_of, patch_shares
from semantic_anomaly.structures import PatchGrid

WHOLE = RegionOfInterest()
HW = (60, 80)


def masks(*parts: np.ndarray) -> InstanceMasks:
    return InstanceMasks(np.array(parts, bool), np.ones(len(parts), np.float32), HW)


def grid(shares: np.ndarray, seed: int = 0, dim: int = 5) -> PatchGrid:
    features = unit(np.random.default_rng(seed).standard_normal((*shares.shape[1:], dim)))
    return PatchGrid(features, features[0, 0], HW, shares.astype(np.float32))


def overlap(start: float, stop: float, first: float, last: float) -> float:
    return max(0.0, min(stop, last) - max(start, first))


@pytest.mark.parametrize("mask_hw", [(24, 32), (13, 17), (60, 80), (3, 5), (6, 32)])
def test_shares_are_the_exact_areas(mask_hw: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    pixels = rng.random((3, *mask_hw)) < 0.4
    pixels[:, 0, 0] = True
    shares = patch_shares(masks(*pixels), (6, 8))
    height, width = mask_hw
    expected = np.zeros((3, 6, 8))
    for row, col in np.ndindex(6, 8):
        for y, x in np.ndindex(mask_hw):
            tall = overlap(row / 6, (row + 1) / 6, y / height, (y + 1) / height)
            wide = overlap(col / 8, (col + 1) / 8, x / width, (x + 1) / width)
            expected[:, row, col] += pixels[:, y, x] * tall * wide * 48
    np.testing.assert_allclose(shares, expected, atol=2e-6)


def test_a_mask_smaller_than_a_patch_is_not_lost() -> None:
    mask = np.zeros(HW, bool)
    mask[31, 47] = True
    shares = patch_shares(masks(mask), (6, 8))
    assert shares[0, 3, 4] == pytest.approx(0.01) and shares.sum() == shares[0, 3, 4]
    image = grid(shares)
    instances = instances_of(image, WHOLE)
    np.testing.assert_allclose(instances.embeddings[0], image.features[3, 4], atol=1e-6)
    assert instances.cells.tolist() == [[3, 4]]


def test_an_embedding_is_the_mean_by_area() -> None:
    shares = np.zeros((2, 4, 5))
    shares[0, 1, 1:4] = 1.0, 0.5, 0.25
    shares[1, :, 2] = 1.0
    image = grid(shares)
    instances = instances_of(image, WHOLE)
    for number in range(2):
        mean = (shares[number][..., None] * image.features).sum((0, 1))
        np.testing.assert_allclose(instances.embeddings[number], unit(mean), atol=1e-6)
    painted = instances.paint(np.array([1.0, 3.0]))
    assert painted[1, 2] == pytest.approx((0.5 * 1 + 1 * 3) / 1.5)
    assert painted[1, 1] == 1.0 and painted[0, 2] == 3.0 and painted[0, 0] == 0.0
    assert instances.covered[1, 2] and instances.covered[1, 1] and not instances.covered[1, 3]


def test_opposite_patches_do_not_cancel_out() -> None:
    shares = np.zeros((1, 2, 2))
    shares[0, 0] = 1.0
    image = grid(shares)
    features = image.features.copy()
    features[0, 1] = -features[0, 0]
    instances = instances_of(PatchGrid(features, features[0, 0], HW, image.instances), WHOLE)
    np.testing.assert_allclose(instances.embeddings[0], features[0, 0], atol=1e-6)


def test_instances_are_cut_to_the_region_of_interest() -> None:
    shares = np.zeros((2, 4, 8))
    shares[0, 1, 2:6] = 1.0
    shares[1, 2, 5:] = 1.0
    image = grid(shares)
    instances = instances_of(image, LEFT_HALF)
    assert len(instances.embeddings) == 1, "one lies outside"
    mean = image.features[1, 2:4].sum(0)
    np.testing.assert_allclose(instances.embeddings[0], unit(mean), atol=1e-6)
    assert not instances.shares[:, :, 4:].any()


def test_the_cell_of_a_ring_is_on_the_ring() -> None:
    shares = np.ones((1, 5, 5))
    shares[0, 1:4, 1:4] = 0.0
    row, col = instances_of(grid(shares), WHOLE).cells[0]
    assert shares[0, row, col] == 1.0


def test_images_that_were_not_segmented_are_refused() -> None:
    features = unit(np.ones((2, 2, 3)))
    with pytest.raises(ModelOutputError, match="expected a segmented image"):
        instances_of(PatchGrid(features, features[0, 0], HW), WHOLE)


def test_there_may_be_no_instances() -> None:
    empty = InstanceMasks(np.zeros((0, 4, 6), bool), np.zeros(0, np.float32), (40, 60))
    assert len(empty) == 0
    assert patch_shares(empty, (2, 3)).shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("masks", "scores", "image_hw", "sentence"),
    [
        (np.ones((4, 6), bool), np.ones(4, np.float32), (4, 6), r"expected \(n, h, w\) bool"),
        (np.ones((1, 4, 6), np.uint8), np.ones(1, np.float32), (4, 6), "uint8"),
        (np.ones((1, 0, 6), bool), np.ones(1, np.float32), (4, 6), r"\(1, 0, 6\)"),
        (np.ones((1, 4, 6), bool), np.ones(2, np.float32), (4, 6), r"expected \(1,\) float32"),
        (np.ones((1, 4, 6), bool), np.ones(1), (4, 6), "float64"),
        (np.ones((1, 4, 6), bool), np.full(1, np.nan, np.float32), (4, 6), "found .nan"),
        (np.ones((1, 4, 6), bool), np.full(1, 1.5, np.float32), (4, 6), "found .1.5"),
        (np.zeros((2, 4, 6), bool), np.ones(2, np.float32), (4, 6), "found 2 without"),
        (np.ones((1, 4, 6), bool), np.ones(1, np.float32), (0, 6), "image size"),
    ],
)
def test_invalid_masks_are_refused(
    masks: np.ndarray, scores: np.ndarray, image_hw: tuple[int, int], sentence: str
) -> None:
    with pytest.raises(ModelOutputError, match=sentence):
        InstanceMasks(masks, scores, image_hw)
