"""Bounds from lists are bounds, and the exact search is exact, on data that makes it hard."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from worlds.nominal_world import unit

from semantic_anomaly.index import limits as limits_module
from semantic_anomaly.index import partition as partition_module
from semantic_anomaly.index.limits import EntryLimits
from semantic_anomaly.index.partition import Partition, PartitionedEntries

Rng = np.random.Generator
DIM = 12


def clustered(rng: Rng) -> np.ndarray:
    centres = rng.standard_normal((7, DIM))
    return unit(centres[rng.integers(0, 7, 800)] + 0.05 * rng.standard_normal((800, DIM)))


def duplicated(rng: Rng) -> np.ndarray:
    return np.repeat(unit(rng.standard_normal((20, DIM))), 30, axis=0)


def scattered(rng: Rng) -> np.ndarray:
    return unit(rng.standard_normal((500, DIM)))


def opposite(rng: Rng) -> np.ndarray:
    half = unit(rng.standard_normal((100, DIM)))
    return np.concatenate([half, -half])


def few(rng: Rng) -> np.ndarray:
    return unit(rng.standard_normal((5, DIM)))


@pytest.fixture(params=[clustered, duplicated, scattered, opposite, few])
def entries(request: pytest.FixtureRequest, rng: Rng) -> np.ndarray:
    make: Callable[[Rng], np.ndarray] = request.param
    return make(rng)


@pytest.fixture(params=["integers", "floats"], autouse=True)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test with both kinds of products that limits are computed with, and many lists."""
    monkeypatch.setattr(partition_module, "_ENTRIES_PER_LIST", 20)
    monkeypatch.setattr(limits_module, "_LEAST_INTEGERS", 0)
    if request.param == "floats":
        monkeypatch.setattr(limits_module, "has_integer_products", lambda: False)
    elif not limits_module.has_integer_products():
        pytest.skip("this processor has no products of 8-bit integers (VNNI)")


def queries(rng: Rng, entries: np.ndarray) -> np.ndarray:
    """Entries themselves, their opposites, neighbours of entries, and others."""
    near = entries[rng.integers(0, len(entries), 40)]
    far = rng.standard_normal((40, DIM))
    mixed = near + 0.1 * rng.standard_normal(near.shape)
    return np.concatenate([near, -near, unit(mixed), unit(far)])


@pytest.mark.parametrize("lists", ["default", "one entry each", "one list"])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_bounds_never_exceed_the_exact_similarities(
    rng: Rng, entries: np.ndarray, lists: str, k: int
) -> None:
    partition = Partition.of(entries)
    if lists == "one entry each":
        distinct = np.unique(entries, axis=0)
        partition = Partition(distinct, np.empty(0, np.int32)).with_entries(entries)
    elif lists == "one list":
        partition = Partition(entries[:1], np.zeros(len(entries), np.int32))
    searched = PartitionedEntries(entries, partition)
    asked = queries(rng, entries)
    expected = np.sort(asked.astype(np.float64) @ entries.T.astype(np.float64), axis=1)[:, -k:]
    exact = np.sort(searched.exact_similarities(asked, k), axis=1)
    np.testing.assert_allclose(exact, expected, atol=2e-6)
    bounds = searched.similarities(asked, k)
    assert bounds.min() >= -1.0 - 2e-6
    assert (np.sort(bounds, axis=1) <= expected + 2e-6).all()
    again = np.sort(searched.exact_similarities(asked, k, bounds), axis=1)
    np.testing.assert_allclose(again, expected, atol=2e-6)


def test_few_entries_are_compared_in_full_where_they_are_clustered(
    rng: Rng, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As real embeddings do, these vary mostly in a few dimensions.
    entries = clustered(rng)
    entries[:, DIM // 2 :] *= 0.05
    entries = unit(entries)
    searched = PartitionedEntries(entries, Partition.of(entries))
    monkeypatch.setattr(partition_module, "_MAX_PAIRS_PER_ENTRY", 50.0)
    monkeypatch.setattr(partition_module, "nearest_similarities", None)
    pairs: list[int] = []
    products = partition_module.pair_products

    def counted(*arguments: torch.Tensor) -> torch.Tensor:
        pairs.append(len(arguments[2]))
        return products(*arguments)

    monkeypatch.setattr(partition_module, "pair_products", counted)
    searched.exact_similarities(entries[:50], 1)
    assert 50 <= sum(pairs) < 50 * len(entries) / 20


@pytest.mark.parametrize("k", [1, 3])
def test_one_product_replaces_the_comparisons_where_too_many_entries_are_near(
    rng: Rng, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    entries = scattered(rng)
    calls: list[int] = []
    product = partition_module.nearest_similarities

    def counted(asked: np.ndarray, stored: np.ndarray, k: int) -> np.ndarray:
        calls.append(len(asked))
        return product(asked, stored, k)

    monkeypatch.setattr(partition_module, "nearest_similarities", counted)
    monkeypatch.setattr(partition_module, "_MAX_PAIRS_PER_ENTRY", 3.0)
    monkeypatch.setattr(limits_module, "_BLOCK", 64)
    monkeypatch.setattr(limits_module, "_GROUP", 16)
    monkeypatch.setattr(partition_module, "_EXACT_QUERIES", 16)
    searched = PartitionedEntries(entries, Partition.of(entries))
    asked = np.concatenate([unit(rng.standard_normal((30, DIM))), entries[:10]])
    similarities = np.sort(searched.exact_similarities(asked, k), axis=1)
    expected = np.sort(asked @ entries.T, axis=1)[:, -k:]
    np.testing.assert_allclose(similarities, expected, atol=1e-6)
    assert len(calls) == 1 and 0 < calls[0] < 40


def test_bounds_hold_for_norms_that_are_1_only_nearly(rng: Rng, entries: np.ndarray) -> None:
    stretched = entries * rng.uniform(0.9991, 1.0009, (len(entries), 1)).astype(np.float32)
    asked = queries(rng, entries) * np.float32(1.0009)
    searched = PartitionedEntries(stretched, Partition.of(entries))
    expected = (asked.astype(np.float64) @ stretched.T.astype(np.float64)).max(axis=1)
    np.testing.assert_allclose(searched.exact_similarities(asked, 1)[:, 0], expected, atol=2e-6)


def test_every_entry_is_in_the_list_of_its_nearest_centroid(entries: np.ndarray) -> None:
    partition = Partition.of(entries)
    assert partition.lists.shape == (len(entries),) and partition.lists.dtype == np.int32
    products = entries @ partition.centroids.T
    own = np.take_along_axis(products, partition.lists[:, None].astype(int), 1)[:, 0]
    np.testing.assert_allclose(own, products.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(partition.centroids, axis=1), 1.0, atol=1e-5)
    again = Partition.of(entries)
    np.testing.assert_array_equal(again.centroids, partition.centroids)
    np.testing.assert_array_equal(again.lists, partition.lists)


def test_the_list_of_an_entry_does_not_depend_on_the_others(rng: Rng) -> None:
    entries = clustered(rng)
    partition = Partition.of(entries)
    part = partition.with_entries(entries[100:333])
    np.testing.assert_array_equal(part.lists, partition.lists[100:333])
    np.testing.assert_array_equal(part.centroids, partition.centroids)


def test_empty_lists_are_never_nearest(rng: Rng) -> None:
    entries = clustered(rng)
    partition = Partition.of(entries).with_entries(entries[:3])
    searched = PartitionedEntries(entries[:3], partition)
    expected = np.sort(entries @ entries[:3].T, axis=1)
    for k in (1, 3):
        found = np.sort(searched.similarities(entries, k), axis=1)
        np.testing.assert_array_less(found, expected[:, -k:] + 1e-6)
        np.testing.assert_allclose(found[:, 0] > -1.0, True)
    np.testing.assert_allclose(
        np.sort(searched.exact_similarities(entries, 2), axis=1), expected[:, -2:], atol=1e-6
    )


def test_no_entry_that_counts_is_left_out_and_few_others_stay(
    rng: Rng, entries: np.ndarray
) -> None:
    points = torch.from_numpy(entries)
    asked = torch.from_numpy(queries(rng, entries).astype(np.float32))
    limits = EntryLimits(points, np.zeros(len(points), int))
    factors = limits.factors(asked)
    true = asked @ points[limits.order].T
    of_all = limits.of_range(factors, 0, len(points))
    assert (of_all >= true - 1e-6).all()
    for quantile in (0.5, 0.9, 1.0):
        least = true.quantile(quantile, dim=1)
        (rows, positions), is_wide = limits.reaching(factors, least, 10**6)
        assert not is_wide.any()
        reached = torch.zeros_like(true, dtype=torch.bool)
        reached[rows, positions] = True
        assert reached[true >= least[:, None] + 1e-6].all(), "an entry that counts is left out"
        # Steps leave over up to .03, and the entries of a group have the limit of the farthest.
        is_wasted = reached & (of_all < least[:, None] - 0.1)
        assert is_wasted.double().mean() < 0.05
        # With fewer pairs, queries have none.
        most = int(0.7 * len(rows))
        (few, _), is_wide = limits.reaching(factors, least, most)
        assert len(few) <= most and is_wide.any() and not is_wide[few].any()
        (few, _), is_wide = limits.reaching(factors, least, 0)
        assert not len(few) and is_wide.all()
