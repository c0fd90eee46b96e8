"""Textures: sizes, layout of the ground, and its repetition along the street."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_anomaly.synthetic.textures import (
    GROUND_HALF_WIDTH_M,
    GROUND_M_PER_PX,
    PARKING_X,
    ROAD_X,
    SIDEWALK_X,
    advert,
    facade,
    ground,
)


def test_textures_have_their_size_and_follow_the_seed() -> None:
    def textures(seed: int) -> list[np.ndarray]:
        rng = np.random.default_rng(seed)
        return [facade(rng, 10.0, 6.0), advert(rng), ground(rng)]

    first, again, other = textures(1), textures(1), textures(2)
    assert [t.shape for t in first] == [(72, 120, 3), (110, 200, 3), (480, 640, 3)]
    assert {t.dtype for t in first} == {np.dtype(np.uint8)}
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_the_ground_has_lawn_paving_and_a_darker_road(seed: int) -> None:
    image = ground(np.random.default_rng(seed)).astype(float)
    x = (np.arange(image.shape[1]) + 0.5) * GROUND_M_PER_PX - GROUND_HALF_WIDTH_M
    road = image[:, (x > ROAD_X[0]) & (x < ROAD_X[1])]
    paving = image[:, (x > PARKING_X[1] + 0.2) & (x < SIDEWALK_X[1])]
    lawn = image[:, (x < SIDEWALK_X[0]) | (x > SIDEWALK_X[1])]
    assert np.median(road) + 10 < np.median(paving)
    red, green, blue = lawn.mean(axis=(0, 1))
    assert green > max(red, blue)
