"""The smoothed map against a sum over pairs of patches, and tail means by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from semantic_anomaly.errors import ModelOutputError
from semantic_anomaly.scoring.anomaly_map import (
    smoothed,
    smoothing_support,
    tail_count,
    tail_mean,
)

GRID_HW = (8, 12)
EVERYWHERE = np.ones(GRID_HW, bool)


def by_hand(values: np.ndarray, inside: np.ndarray, sigma: float) -> np.ndarray:
    """Weigh every pair of patches that are near enough, one by one."""
    reach = math.ceil(2 * sigma)
    means = np.zeros(values.shape)
    for row, col in zip(*np.nonzero(inside), strict=True):
        total = weight = 0.0
        for r, c in zip(*np.nonzero(inside), strict=True):
            if max(abs(r - row), abs(c - col)) <= reach:
                near = math.exp(-((r - row) ** 2 + (c - col) ** 2) / (2 * sigma**2))
                total, weight = total + near * values[r, c], weight + near
        means[row, col] = total / weight
    return means


@pytest.fixture
def values(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0, 2, GRID_HW).astype(np.float32)


def polygon() -> np.ndarray:
    inside = np.zeros(GRID_HW, bool)
    inside[2:, 3:9] = True
    inside[4, 5] = False
    return inside


@pytest.mark.parametrize("sigma", [0.3, 1.7, 10.0])
@pytest.mark.parametrize("inside", [EVERYWHERE, polygon()], ids=["whole", "roi"])
def test_smoothing_is_a_weighted_mean_of_what_takes_part(
    values: np.ndarray, inside: np.ndarray, sigma: float
) -> None:
    # Values outside have no weight, whatever they are.
    means = smoothed(values, inside, sigma)
    assert means.dtype == np.float32
    np.testing.assert_allclose(means, by_hand(values, inside, sigma), atol=1e-5)


def test_even_maps_stay_as_they_are_up_to_the_border() -> None:
    even = np.full(GRID_HW, 0.7, np.float32)
    np.testing.assert_allclose(smoothed(even, EVERYWHERE, 1.3), even, atol=1e-6)
    np.testing.assert_array_equal(smoothed(even, EVERYWHERE, 0.0), even)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0])
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


@pytest.mark.parametrize(
    ("count", "percent", "expected"),
    [
        (100, 1.0, 1),
        (101, 1.0, 2),
        # In floating point this product is slightly larger than 161.
        (1000, 16.1, 161),
        (10, 0.001, 1),
        (10, 100.0, 10),
        (1, 50.0, 1),
    ],
)
def test_the_tail_is_rounded_up_and_has_at_least_one_value(
    count: int, percent: float, expected: int
) -> None:
    assert tail_count(count, percent) == expected


def test_tail_mean_is_that_of_the_largest_values(rng: np.random.Generator) -> None:
    values = rng.uniform(0, 2, 777).astype(np.float32)
    expected = np.sort(values.astype(np.float64))[-24:].mean()
    score = tail_mean(values, 3.0)
    assert type(score) is float and score == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(0, np.float32), "non-empty"),
        (np.zeros((2, 2), np.float32), "non-empty"),
        (np.array([0.1, np.nan], np.float32), "NaN or infinity"),
        (np.array([np.inf, 0.1], np.float32), "NaN or infinity"),
    ],
)
def test_tail_mean_refuses(values: np.ndarray, message: str) -> None:
    with pytest.raises(ModelOutputError, match=message):
        tail_mean(values, 1.0)
