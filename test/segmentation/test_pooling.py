"""Pooling over masks: exact areas, nothing lost, the region's cut, and what surrounds a thing."""

from __future__ import annotations

import numpy as np
import pytest
from worlds.colours import LEFT_HALF
from worlds.nominal_world import unit

from semantic_anomaly.errors import ModelOutputError
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.segmentation.masks import (
    BELOW_WEIGHT,
    InstanceMasks,
    instances_of,
    pairs_of,
    patch_shares,
)
from semantic_anomaly.structures import PatchGrid

WHOLE = ImageRegion()
HW = (60, 80)


def masks(*given: np.ndarray) -> InstanceMasks:
    return InstanceMasks(np.array(given, bool), np.ones(len(given), np.float32), HW)


def grid(shares: np.ndarray, seed: int = 0, dim: int = 5) -> PatchGrid:
    features = unit(np.random.default_rng(seed).standard_normal((*shares.shape[1:], dim)))
    return PatchGrid(features, features[0, 0], HW, shares.astype(np.float32))


def overlap(start: float, stop: float, first: float, last: float) -> float:
    return max(0.0, min(stop, last) - max(start, first))


@pytest.mark.parametrize("mask_hw", [(24, 32), (13, 17), (60, 80), (3, 5), (6, 32)])
def test_shares_are_the_exact_areas(mask_hw: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    given = rng.random((3, *mask_hw)) < 0.4
    given[:, 0, 0] = True
    found = patch_shares(masks(*given), (6, 8))
    height, width = mask_hw
    wanted = np.zeros((3, 6, 8))
    for row, col in np.ndindex(6, 8):
        for y, x in np.ndindex(mask_hw):
            tall = overlap(row / 6, (row + 1) / 6, y / height, (y + 1) / height)
            wide = overlap(col / 8, (col + 1) / 8, x / width, (x + 1) / width)
            wanted[:, row, col] += given[:, y, x] * tall * wide * 48
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_a_mask_smaller_than_a_patch_is_not_lost() -> None:
    mask = np.zeros(HW, bool)
    mask[31, 47] = True
    shares = patch_shares(masks(mask), (6, 8))
    assert shares[0, 3, 4] == pytest.approx(0.01) and shares.sum() == shares[0, 3, 4]
    image = grid(shares)
    found = instances_of(image, WHOLE)
    np.testing.assert_allclose(found.embeddings[0], image.features[3, 4], atol=1e-6)
    assert found.places.tolist() == [[3, 4]]


def test_an_embedding_is_the_mean_by_area() -> None:
    shares = np.zeros((2, 4, 5))
    shares[0, 1, 1:4] = 1.0, 0.5, 0.25
    shares[1, :, 2] = 1.0
    image = grid(shares)
    found = instances_of(image, WHOLE)
    for number in range(2):
        mean = (shares[number][..., None] * image.features).sum((0, 1))
        np.testing.assert_allclose(found.embeddings[number], mean / np.linalg.norm(mean), atol=1e-6)
    painted = found.paint(np.array([1.0, 3.0]))
    assert painted[1, 2] == pytest.approx((0.5 * 1 + 1 * 3) / 1.5)
    assert painted[1, 1] == 1.0 and painted[0, 2] == 3.0 and painted[0, 0] == 0.0
    assert found.covered[1, 2] and found.covered[1, 1] and not found.covered[1, 3]


def test_opposite_patches_do_not_cancel_to_nothing() -> None:
    shares = np.zeros((1, 2, 2))
    shares[0, 0] = 1.0
    image = grid(shares)
    features = image.features.copy()
    features[0, 1] = -features[0, 0]
    found = instances_of(PatchGrid(features, features[0, 0], HW, image.instances), WHOLE)
    np.testing.assert_allclose(found.embeddings[0], features[0, 0], atol=1e-6)


def test_the_region_of_interest_cuts_instances() -> None:
    shares = np.zeros((2, 4, 8))
    shares[0, 1, 2:6] = 1.0
    shares[1, 2, 5:] = 1.0
    image = grid(shares)
    found = instances_of(image, LEFT_HALF)
    assert len(found.embeddings) == 1, "one lies outside"
    mean = image.features[1, 2:4].sum(0)
    np.testing.assert_allclose(found.embeddings[0], mean / np.linalg.norm(mean), atol=1e-6)
    assert not found.shares[:, :, 4:].any()


def test_the_place_of_a_ring_is_on_the_ring() -> None:
    shares = np.ones((1, 5, 5))
    shares[0, 1:4, 1:4] = 0.0
    row, col = instances_of(grid(shares), WHOLE).places[0]
    assert shares[0, row, col] == 1.0


def test_what_was_not_segmented_has_no_instances() -> None:
    features = unit(np.ones((2, 2, 3)))
    with pytest.raises(ModelOutputError, match="expected a segmented image"):
        instances_of(PatchGrid(features, features[0, 0], HW), WHOLE)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (np.ones((1, 3, 2), np.float32), "expected \\(n, 2, 2\\)"),
        (np.ones((1, 2, 2)), "float32"),
        (np.full((1, 2, 2), np.nan, np.float32), "shares in"),
        (np.full((1, 2, 2), 1.5, np.float32), "shares in"),
        (np.zeros((1, 2, 2), np.float32), "some in each"),
    ],
)
def test_instances_that_cannot_be_are_refused(shares: np.ndarray, message: str) -> None:
    features = unit(np.ones((2, 2, 3)))
    with pytest.raises(ModelOutputError, match=message):
        PatchGrid(features, features[0, 0], HW, shares)


def test_the_distance_of_pairs_is_the_weighted_sum() -> None:
    shares = np.zeros((2, 6, 6))
    shares[0, 1:3, 1:3] = 1.0
    shares[1, 4, 2:5] = 1.0
    image = grid(shares)
    found = instances_of(image, WHOLE)
    pairs = pairs_of(image, found, WHOLE, 0.3)
    own = 1 - found.embeddings[0] @ found.embeddings[1]
    around = 1 - pairs.surroundings[0] @ pairs.surroundings[1]
    joined = 1 - pairs.embeddings[0] @ pairs.embeddings[1]
    assert joined == pytest.approx(0.7 * own + 0.3 * around, abs=1e-6)
    np.testing.assert_allclose(np.linalg.norm(pairs.embeddings, axis=1), 1.0, atol=1e-6)


def test_surroundings_leave_the_instance_out_and_count_below_twice() -> None:
    shares = np.zeros((1, 7, 7))
    shares[0, 2:4, 2:4] = 1.0
    image = grid(shares)
    found = pairs_of(image, instances_of(image, WHOLE), WHOLE, 0.5)
    weights = np.zeros((7, 7))
    weights[1:5, 1:5] = 1.0
    weights[4, 2:4] = BELOW_WEIGHT
    weights[2:4, 2:4] = 0.0
    mean = (weights[..., None] * image.features).sum((0, 1))
    np.testing.assert_allclose(found.surroundings[0], mean / np.linalg.norm(mean), atol=1e-6)


def test_surroundings_lie_in_the_region_and_may_be_missing() -> None:
    shares = np.zeros((2, 4, 8))
    shares[0, 1, 3] = 1.0
    shares[1, :, :4] = 1.0
    image = grid(shares)
    found = instances_of(image, LEFT_HALF)
    pairs = pairs_of(image, found, LEFT_HALF, 0.5)
    around = [(r, c) for r in range(3) for c in (2, 3) if (r, c) != (1, 3)]
    mean = sum(image.features[r, c] * (2.0 if (r, c) == (2, 3) else 1.0) for r, c in around)
    np.testing.assert_allclose(pairs.surroundings[0], mean / np.linalg.norm(mean), atol=1e-6)
    # Nothing is left around the second: it is its own surroundings.
    np.testing.assert_allclose(pairs.surroundings[1], found.embeddings[1], atol=1e-6)
