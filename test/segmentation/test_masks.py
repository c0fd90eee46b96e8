"""Embeddings of stages: exact shares of patches, pooling, lone patches, region of interest."""

from __future__ import annotations

import numpy as np
import pytest
from worlds.nominal_world import LEFT_HALF, unit

from semantic_anomaly.errors import SettingsError
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.segmentation.masks import patch_shares, stage_embeddings
from semantic_anomaly.structures import PatchGrid

WHOLE = RegionOfInterest()
HW = (60, 80)


def grid(shares: np.ndarray, seed: int = 0, dim: int = 5) -> PatchGrid:
    features = unit(np.random.default_rng(seed).standard_normal((*shares.shape[1:], dim)))
    return PatchGrid(features, HW, shares.astype(np.float32))


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
    stage = stage_embeddings(image, WHOLE)
    np.testing.assert_allclose(stage.embeddings[0], image.features[3, 4], atol=1e-6)
    # It covers too little of its patch to take its place.
    assert stage.cells[0].tolist() == [3, 4] and len(stage.patches) == 6 * 8


def test_an_embedding_is_the_mean_by_area() -> None:
    shares = np.zeros((2, 4, 5))
    shares[0, 1, 1:4] = 1.0, 0.5, 0.25
    shares[1, :, 2] = 1.0
    image = grid(shares)
    stage = stage_embeddings(image, WHOLE)
    for number in range(2):
        mean = (shares[number][..., None] * image.features).sum((0, 1))
        np.testing.assert_allclose(stage.embeddings[number], unit(mean), atol=1e-6)


def test_patches_that_no_instance_covers_to_one_half_stand_for_themselves() -> None:
    shares = np.zeros((2, 2, 3))
    shares[0, 0] = 1.0, 0.3, 0.49
    shares[1, 0] = 0.0, 0.3, 0.0
    image = grid(shares)
    stage = stage_embeddings(image, WHOLE)
    # Both instances together cover the patch in the middle.
    alone = [[0, 2], [1, 0], [1, 1], [1, 2]]
    assert stage.patches.tolist() == alone and len(stage.embeddings) == 2 + 4
    np.testing.assert_array_equal(stage.embeddings[2:], image.features[tuple(np.transpose(alone))])
    assert stage.cells.tolist() == [[0, 0], [0, 1], *alone]
    values = np.array([1.0, 3.0, 10.0, 20.0, 30.0, 40.0])
    painted = stage.paint(values)
    assert painted.dtype == np.float32
    np.testing.assert_allclose(painted, [[1.0, 2.0, 10.0], [20.0, 30.0, 40.0]])
    # An instance counts most where it covers most; elsewhere the patch itself.
    np.testing.assert_array_equal(stage.at(0, 0), stage.embeddings[0])
    np.testing.assert_array_equal(stage.at(0, 2), image.features[0, 2])
    np.testing.assert_array_equal(stage.at(1, 1), image.features[1, 1])


def test_painting_tells_which_embeddings_a_patch_depends_on() -> None:
    shares = np.zeros((2, 2, 3))
    shares[0, 0, :2] = 1.0
    shares[1, 0, 1:] = 1.0
    stage = stage_embeddings(grid(shares), WHOLE)
    rng = np.random.default_rng(0)
    values = rng.random(5)
    before = stage.paint(values)
    for row in range(2):
        for col in range(3):
            chosen = np.zeros((2, 3), bool)
            chosen[row, col] = True
            used = stage.painting(chosen)
            after = stage.paint(np.where(used, values, 100.0))
            assert after[row, col] == before[row, col]
            assert stage.paint(np.where(used, 100.0, values))[row, col] > 50


def test_stages_of_patches_have_one_embedding_for_each() -> None:
    features = unit(np.random.default_rng(0).standard_normal((3, 4, 5)))
    stage = stage_embeddings(PatchGrid(features, HW), LEFT_HALF)
    assert stage.shares.shape == (0, 3, 4) and stage.inside.sum() == 6
    np.testing.assert_array_equal(stage.embeddings, features[:, :2].reshape(6, 5))
    np.testing.assert_array_equal(stage.cells, np.argwhere(stage.inside))
    painted = stage.paint(np.arange(1.0, 7.0))
    np.testing.assert_array_equal(painted, [[1, 2, 0, 0], [3, 4, 0, 0], [5, 6, 0, 0]])
    np.testing.assert_array_equal(stage.at(2, 1), features[2, 1])


def test_opposite_patches_do_not_cancel_out() -> None:
    shares = np.zeros((1, 2, 2))
    shares[0, 0] = 1.0
    image = grid(shares)
    features = image.features.copy()
    features[0, 1] = -features[0, 0]
    stage = stage_embeddings(PatchGrid(features, HW, image.instances), WHOLE)
    np.testing.assert_allclose(stage.embeddings[0], features[0, 0], atol=1e-6)


def test_instances_are_cut_to_the_region_of_interest() -> None:
    shares = np.zeros((2, 4, 8))
    shares[0, 1, 2:6] = 1.0
    shares[1, 2, 5:] = 1.0
    image = grid(shares)
    stage = stage_embeddings(image, LEFT_HALF)
    assert len(stage.shares) == 1, "one lies outside"
    mean = image.features[1, 2:4].sum(0)
    np.testing.assert_allclose(stage.embeddings[0], unit(mean), atol=1e-6)
    assert not stage.shares[:, :, 4:].any() and len(stage.patches) == 16 - 2
    painted = stage.paint(np.full(len(stage.embeddings), 7.0))
    assert (painted[:, :4] == 7).all() and not painted[:, 4:].any()


def test_the_cell_of_a_ring_is_on_the_ring() -> None:
    shares = np.ones((1, 5, 5))
    shares[0, 1:4, 1:4] = 0.0
    row, col = stage_embeddings(grid(shares), WHOLE).cells[0]
    assert shares[0, row, col] == 1.0


def test_a_region_without_any_patch_is_refused() -> None:
    speck = RegionOfInterest(((0.0, 0.0), (0.01, 0.0), (0.0, 0.01)))
    with pytest.raises(SettingsError, match="leave no patch"):
        stage_embeddings(grid(np.ones((1, 2, 2))), speck)


def test_there_may_be_no_instances() -> None:
    shares = patch_shares(np.zeros((0, 4, 6), bool), (2, 3))
    assert shares.shape == (0, 2, 3)
    stage = stage_embeddings(grid(shares), WHOLE)
    assert len(stage.shares) == 0 and len(stage.embeddings) == 6
