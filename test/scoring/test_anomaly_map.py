"""From plain distances to the map that is scored: clipped, smoothed, and exact where it counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from worlds.nominal_world import build, patches

from semantic_anomaly.scoring.anomaly_map import ScoreMap, smoothed

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
@pytest.mark.parametrize("inside", [EVERYWHERE, polygon()], ids=["whole", "region"])
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


def test_values_are_relative_clipped_and_then_smoothed(values: np.ndarray) -> None:
    inside = polygon()
    count = int(inside.sum())
    factor, offset = np.full(count, 3.0, np.float32), np.full(count, -1.5, np.float32)
    plain = values[inside]
    relative = np.zeros(GRID_HW)
    relative[inside] = np.clip(3 * plain - 1.5, 0, 2)
    assert {0.0, 2.0} <= set(relative[inside]), "both ends must be clipped to show anything"
    found = ScoreMap(inside, (factor, offset), 0.8).values(plain)
    np.testing.assert_allclose(found, by_hand(relative, inside, 0.8)[inside], atol=1e-5)
    unsmoothed = ScoreMap(inside, (factor, offset), 0.0).values(plain)
    np.testing.assert_allclose(unsmoothed, relative[inside], atol=1e-6)
    np.testing.assert_array_equal(ScoreMap(inside, None, 0.0).values(plain), plain)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 0.8, 1.0])
def test_values_are_made_of_what_it_says_and_of_nothing_else(
    values: np.ndarray, rng: np.random.Generator, sigma: float
) -> None:
    inside = polygon()
    scored = ScoreMap(inside, None, sigma)
    chosen = np.zeros(int(inside.sum()), bool)
    chosen[[3, 20]] = True
    needed = scored.made_of(chosen)
    assert needed[chosen].all() and not needed.all()
    changed = values[inside].copy()
    changed[~needed] = rng.uniform(0, 2, int((~needed).sum()))
    before, after = (scored.values(each)[chosen] for each in (values[inside], changed))
    np.testing.assert_allclose(before, after, atol=1e-6)
    assert not scored.made_of(np.zeros_like(chosen)).any()


@pytest.mark.parametrize("sigma", [0.0, 0.8])
def test_a_poor_graph_gives_the_scores_of_an_exact_search(sigma: float) -> None:
    index = build(dedup_distance=0.0, graph_m=2, graph_ef_construction=8)
    index.configure_search("graph", 1)
    queries = patches(4, seed=5)
    inside = np.ones((len(queries) // 8, 8), bool)
    scored = ScoreMap(inside, None, sigma)
    exact = scored.values(index.exact_distances(queries, 1))
    raw = scored.values(index.distances(queries, 1))
    assert (raw > exact + 0.01).sum() > 50, "the graph must be poor for this to show anything"
    top = 6
    checked = scored.values(index.distances(queries, 1, exact_top=top, ranking=scored))
    np.testing.assert_allclose(np.sort(checked)[-top:], np.sort(exact)[-top:], atol=1e-5)
    assert (checked > exact + 0.01).any(), "what does not count need not be exact"
    threshold = float(np.quantile(exact, 0.9))
    checked = scored.values(index.distances(queries, 1, exact_above=threshold, ranking=scored))
    away = np.abs(exact - threshold) > 1e-5
    np.testing.assert_array_equal((checked > threshold)[away], (exact > threshold)[away])
