"""Embeddings with their places: a weighted sum of two distances, in one inner product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from semantic_anomaly.embedding.backbone import PLACE_DIM, PatchEmbedder, with_places


def unit(rng: np.random.Generator, rows: int, cols: int) -> np.ndarray:
    features = rng.normal(size=(rows, cols, 8)).astype(np.float32)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


@pytest.mark.parametrize("weight", [0.05, 0.5, 0.99])
def test_distances_are_weighted_sums(rng: np.random.Generator, weight: float) -> None:
    features = unit(rng, 6, 10)
    placed = with_places(features, weight)
    assert placed.shape == (6, 10, 8 + PLACE_DIM) and placed.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(placed, axis=-1), 1.0, atol=1e-6)
    for (r0, c0), (r1, c1) in [((0, 0), (5, 9)), ((2, 3), (2, 4)), ((1, 7), (4, 7))]:
        dy, dx = (r1 - r0) / 6, (c1 - c0) / 10
        own = 1 - features[r0, c0] @ features[r1, c1]
        place = (2 - np.cos(np.pi * dy) - np.cos(0.2 * np.pi * dx)) / 2
        found = 1 - placed[r0, c0] @ placed[r1, c1]
        assert found == pytest.approx((1 - weight) * own + weight * place, abs=1e-6)


def test_without_weight_nothing_changes(rng: np.random.Generator) -> None:
    features = unit(rng, 2, 3)
    assert with_places(features, 0.0) is features


def test_the_embedder_adds_places(tiny_backbone: Path, rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (90, 160, 3), dtype=np.uint8)
    settings = {"input_size": 112, "device": "cpu", "dtype": "float32"}
    plain = PatchEmbedder(str(tiny_backbone), **settings)
    placed = PatchEmbedder(str(tiny_backbone), **settings, place_weight=0.3)
    grids = [embedder.embed([image])[0] for embedder in (plain, placed)]
    assert placed.identity.dim == plain.identity.dim + PLACE_DIM == grids[1].dim
    np.testing.assert_array_equal(grids[1].features, with_places(grids[0].features, 0.3))
    assert not plain.identity.matches(placed.identity)
