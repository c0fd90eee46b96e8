"""Masks, identities, and the regions that patch embeddings make by themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from semantic_anomaly.embedding.identity import SegmenterIdentity
from semantic_anomaly.errors import IndexFormatError, ModelOutputError, SettingsError
from semantic_anomaly.segmentation.embedder import load_segmenter
from semantic_anomaly.segmentation.masks import InstanceMasks
from semantic_anomaly.segmentation.tokens import token_regions
from semantic_anomaly.structures import PatchGrid

GRID = (18, 32)


def scene(noise: float = 0.02, spread: float = 1.0) -> tuple[np.ndarray, PatchGrid, np.ndarray]:
    """Return an image of three things, its embeddings, and (rows, cols) which thing is where."""
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
def test_things_become_regions_whatever_the_scale_of_distances(spread: float) -> None:
    image, grid, things = scene(spread=spread)
    segmenter = load_segmenter("tokens")
    found = segmenter.segment(image, grid)
    segmenter.close()
    assert found.image_hw == (180, 320) and found.masks.shape[1:] == (36, 64)
    assert found.masks.any(0).all()
    truth = np.kron(things, np.ones((2, 2), int))
    for thing in range(3):
        assert max(overlap(mask, truth == thing) for mask in found.masks) > 0.95


def test_borders_follow_colours_inside_patches() -> None:
    image, grid, _ = scene()
    # The red thing reaches half a patch into those on its right.
    image[70:130, 150:155] = (200, 30, 30)
    found = load_segmenter("tokens").segment(image, grid)
    thing = max(found.masks, key=lambda mask: overlap(mask, _red(image)))
    assert thing[16:24, 30].all() and not thing[16:24, 31:].any()


def _red(image: np.ndarray) -> np.ndarray:
    return image[2::5, 2::5, 0] > 150


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
        lengths = np.linalg.norm(features.reshape(-1, 8)[fine == label].mean(0))
        assert fine_scores[label] == pytest.approx(lengths, abs=1e-5)
        assert _connected((fine == label).reshape(12, 20))


def test_distances_that_hardly_differ_do_not_end_in_one_region() -> None:
    import cv2

    noise = np.random.default_rng(2).standard_normal((40, 60, 16)).astype(np.float32)
    features = np.dstack([cv2.GaussianBlur(noise[..., n], (0, 0), 1) for n in range(16)])
    features[..., 0] += 2 * features.std()
    features /= np.linalg.norm(features, axis=2, keepdims=True)
    (fine, _), (coarse, _) = token_regions(features)
    assert 40 * 60 / 64 <= fine.max() + 1 <= 40 * 60 / 8
    assert 40 * 60 / 256 <= coarse.max() + 1 < fine.max() + 1


def _connected(mask: np.ndarray) -> bool:
    import cv2

    return bool(cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[0] == 2)


def test_the_same_frame_gives_the_same_masks() -> None:
    image, grid, _ = scene(noise=0.2)
    one, other = (load_segmenter("tokens").segment(image, grid) for _ in range(2))
    np.testing.assert_array_equal(one.masks, other.masks)
    np.testing.assert_array_equal(one.scores, other.scores)


@pytest.mark.parametrize("grid_hw", [(1, 1), (1, 7), (5, 1), (3, 4)])
def test_uniform_images_are_one_region(grid_hw: tuple[int, int]) -> None:
    features = np.zeros((*grid_hw, 4), np.float32)
    features[..., 0] = 1.0
    image = np.full((33, 47, 3), 120, np.uint8)
    found = load_segmenter("tokens").segment(image, PatchGrid(features, features[0, 0], (33, 47)))
    assert len(found) == 1 and found.masks.all() and found.scores[0] == 1.0


def test_an_image_of_another_size_than_its_grid_is_refused() -> None:
    image, grid, _ = scene()
    with pytest.raises(ModelOutputError, match=r"expected \(180, 320, 3\) uint8"):
        load_segmenter("tokens").segment(image[:90], grid)
    with pytest.raises(ModelOutputError, match="float32"):
        load_segmenter("tokens").segment(image.astype(np.float32), grid)


def test_no_instance_is_an_answer() -> None:
    masks = InstanceMasks(np.zeros((0, 4, 6), bool), np.zeros(0, np.float32), (40, 60))
    assert len(masks) == 0


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
def test_masks_are_checked_when_made(
    masks: np.ndarray, scores: np.ndarray, image_hw: tuple[int, int], sentence: str
) -> None:
    with pytest.raises(ModelOutputError, match=sentence):
        InstanceMasks(masks, scores, image_hw)


@pytest.mark.parametrize(
    ("family", "model", "sentence"),
    [
        ("token", "", "did you mean 'tokens'"),
        ("tokens", "somewhere", "expected no model, found 'somewhere'"),
        ("universal", "", "expected a model"),
    ],
)
def test_a_family_that_is_not_there_is_refused(family: str, model: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        load_segmenter(family, model)


def test_identities_survive_json() -> None:
    identity = load_segmenter("tokens").identity
    assert SegmenterIdentity.from_dict(identity.to_dict()) == identity
    renamed = SegmenterIdentity("tokens", "other", identity.digest)
    assert identity.matches(renamed)
    assert not identity.matches(SegmenterIdentity("tokens", "", "0" * 64))


@pytest.mark.parametrize(
    "change",
    [{"family": "sam"}, {"model_id": 3}, {"digest": "abc"}, {"digest": None}, {"more": 1}],
)
def test_an_identity_that_is_none_is_refused(change: dict[str, Any]) -> None:
    good = load_segmenter("tokens").identity.to_dict()
    with pytest.raises(IndexFormatError, match="segmenter identity"):
        SegmenterIdentity.from_dict(good | change)
