"""Instance masks: exact shares of patches, pooling, and the region of interest."""

from __future__ import annotations

import numpy as np
import pytest
from worlds.nominal_world import LEFT_HALF, unit

from semantic_anomaly.errors import ModelOutputError
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.segmentation.masks import instances_of, patch_shares
from semantic_anomaly.structures import PatchGrid

WHOLE = RegionOfInterest()
HW = (60, 80)


def grid(shares: np.ndarray, seed: int = 0, dim: int = 5) -> PatchGrid:
    features = unit(np.random.default_rng(seed).standard_normal((*shares.shape[1:], dim)))
    return PatchGrid(features, features[0, 0], HW, shares.astype(np.float32))


def overlaps(parts: int, pixels: int) -> np.ndarray:
    """Return (parts, pixels) shares of the side of an image that both cover."""
    part, pixel = (np.arange(count + 1) / count for count in (parts, pixels))
    stop = np.minimum(part[1:, None], pixel[1:])
    return np.maximum(stop - np.maximum(part[:-1, None], pixel[:-1]), 0.0)


@pytest.mark.parametrize("mask_hw", [(13, 17), (60, 80), (3, 5), (6, 32)])
def test_shares_are_the_exact_areas(mask_hw: tuple[int, int]) -> None:
    masks = np.random.default_rng(1).random((3, *mask_hw)) < 0.4
    tall, wide = overlaps(6, mask_hw[0]), overlaps(8, mask_hw[1])
    expected = np.einsum("rh,nhw,cw->nrc", tall, masks, wide) * 48
    np.testing.assert_allclose(patch_shares(masks, (6, 8)), expected, atol=2e-6)


def test_a_mask_smaller_than_a_patch_is_not_lost() -> None:
    mask = np.zeros(HW, bool)
    mask[31, 47] = True
    shares = patch_shares(mask[None], (6, 8))
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
    assert patch_shares(np.zeros((0, 4, 6), bool), (2, 3)).shape == (0, 2, 3)
