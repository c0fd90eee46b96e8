"""From plain distances to the map that is scored: clipped, smoothed, and exact where it counts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from semantic_anomaly.scoring.anomaly_map import smoothed, smoothing_support

GRID_HW = (8, 12)
EVERYWHERE = np.ones(GRID_HW, bool)


def by_hand(values: np.ndarray, inside: np.ndarray, sigma: float) -> np.ndarray:
    """Weigh every pair of patches that are near enough, one by one."""
    reach = math.ceil(2 * sigma)
    found = np.zeros(values.shape)
    for row, col in zip(*np.nonzero(inside), strict=True):
        total = weight = 0.0
        for r, c in zip(*np.nonzero(inside), strict=True):
            if max(abs(r - row), abs(c - col)) <= reach:
                near = math.exp(-((r - row) ** 2 + (c - col) ** 2) / (2 * sigma**2))
                total, weight = total + near * values[r, c], weight + near
        found[row, col] = total / weight
    return found


@pytest.fixture
def values(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0, 2, GRID_HW).astype(np.float32)


def polygon() -> np.ndarray:
    inside = np.zeros(GRID_HW, bool)
    inside[2:, 3:9] = True
    inside[4, 5] = False
    return inside


@pytest.mark.parametrize("sigma", [0.3, 0.8, 1.7, 10.0])
@pytest.mark.parametrize("inside", [EVERYWHERE, polygon()], ids=["whole", "roi"])
def test_smoothing_is_a_weighted_mean_of_what_takes_part(
    values: np.ndarray, inside: np.ndarray, sigma: float
) -> None:
    found = smoothed(values * inside, inside, sigma)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, by_hand(values, inside, sigma), atol=1e-5)
    # What lies outside has no say, whatever it holds.
    np.testing.assert_allclose(smoothed(values, inside, sigma), found, atol=1e-6)


def test_even_maps_stay_as_they_are_up_to_the_border() -> None:
    even = np.full(GRID_HW, 0.7, np.float32)
    np.testing.assert_allclose(smoothed(even, EVERYWHERE, 1.3), even, atol=1e-6)
    np.testing.assert_array_equal(smoothed(even, EVERYWHERE, 0.0), even)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 0.8, 1.0])
def test_smoothed_values_depend_on_their_support_only(
    values: np.ndarray, rng: np.random.Generator, sigma: float
) -> None:
    inside = polygon()
    chosen = np.zeros(GRID_HW, bool)
    chosen[2, 6] = chosen[6, 4] = True
    support = smoothing_support(chosen, sigma)
    assert support[chosen].all() and not support[inside].all()
    changed = np.where(support, values, rng.uniform(0, 2, GRID_HW)).astype(np.float32)
    before, after = (smoothed(each * inside, inside, sigma)[chosen] for each in (values, changed))
    np.testing.assert_allclose(before, after, atol=1e-6)
    assert not smoothing_support(np.zeros_like(chosen), sigma).any()
