"""Tail means by hand."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_anomaly.errors import ModelOutputError
from semantic_anomaly.scoring.anomaly_map import tail_count, tail_mean


@pytest.mark.parametrize(
    ("count", "percent", "expected", "reason"),
    [
        (100, 1.0, 1, "exactly one"),
        (101, 1.0, 2, "rounded up"),
        (3600, 1.0, 36, "the usual grid"),
        (700, 1.1, 8, "7.7 rounded up"),
        (1000, 16.1, 161, "a product that lands a hair above 161 in floating point"),
        (10, 0.001, 1, "never none"),
        (10, 100.0, 10, "all"),
        (1, 50.0, 1, "a single patch"),
    ],
)
def test_tail_count(count: int, percent: float, expected: int, reason: str) -> None:
    assert tail_count(count, percent) == expected


@pytest.mark.parametrize(
    ("distances", "percent", "expected", "reason"),
    [
        ([0.1, 0.9, 0.5, 0.3], 25.0, 0.9, "the largest alone"),
        ([0.1, 0.9, 0.5, 0.3], 50.0, 0.7, "mean of two"),
        ([0.1, 0.9, 0.5, 0.3], 51.0, (0.9 + 0.5 + 0.3) / 3, "2.04 rounded up to three"),
        ([0.1, 0.9, 0.5, 0.3], 100.0, 0.45, "mean of all"),
        ([0.4, 0.4, 0.4], 34.0, 0.4, "ties"),
        ([0.2], 1.0, 0.2, "one patch"),
        ([0.0, 0.0], 1.0, 0.0, "a frame of the index itself"),
    ],
)
def test_tail_mean(distances: list[float], percent: float, expected: float, reason: str) -> None:
    score = tail_mean(np.array(distances, np.float32), percent)
    assert type(score) is float
    assert score == pytest.approx(expected, abs=1e-7)


def test_tail_mean_ignores_order(rng: np.random.Generator) -> None:
    distances = rng.uniform(0, 2, 777).astype(np.float32)
    by_sorting = np.sort(distances.astype(np.float64))[-tail_count(777, 3.0) :].mean()
    assert tail_mean(rng.permutation(distances), 3.0) == pytest.approx(by_sorting, abs=1e-12)


def test_a_tail_mean_above_a_bound_has_a_distance_above_it(rng: np.random.Generator) -> None:
    for _ in range(200):
        distances = rng.uniform(0, 2, rng.integers(1, 50)).astype(np.float32)
        assert float(distances.max()) >= tail_mean(distances, 20.0)


@pytest.mark.parametrize(
    ("distances", "message"),
    [
        (np.zeros(0, np.float32), "non-empty"),
        (np.zeros((2, 2), np.float32), "non-empty"),
        (np.array([0.1, np.nan], np.float32), "NaN or infinity"),
        (np.array([np.inf, 0.1], np.float32), "NaN or infinity"),
    ],
)
def test_tail_mean_refuses(distances: np.ndarray, message: str) -> None:
    with pytest.raises(ModelOutputError, match=message):
        tail_mean(distances, 1.0)
