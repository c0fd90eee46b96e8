"""The search of a GPU is exact. Where there is none, the same code runs in the CPU's float16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from worlds.nominal_world import unit

from semantic_anomaly.errors import IndexMismatchError
from semantic_anomaly.index import device as device_module
from semantic_anomaly.index.device import DeviceEntries

DIM = 48
CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
)


def entries(rng: np.random.Generator) -> np.ndarray:
    """Entries of which many are nearer to each other than float16 can tell, and a few others."""
    centres = unit(rng.standard_normal((4, DIM)))
    near = unit(np.repeat(centres, 150, axis=0) + 1e-3 * rng.standard_normal((600, DIM)))
    return np.concatenate([near, unit(rng.standard_normal((100, DIM)))])


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("candidates", [1, 256])
@pytest.mark.parametrize("k", [1, 3])
def test_similarities_are_those_of_float64(
    rng: np.random.Generator,
    device: str,
    candidates: int,
    k: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = entries(rng)
    monkeypatch.setattr(device_module, "_MAX_CANDIDATES", candidates)
    # Several pieces of queries, of pairs, and of queries with many candidates.
    monkeypatch.setattr(device_module, "_PRODUCTS", 14 * len(stored))
    monkeypatch.setattr(device_module, "_PAIRS", 100)
    asked = np.concatenate([unit(rng.standard_normal((40, DIM))), stored[::9], -stored[::50]])
    products = asked.astype(np.float64) @ stored.T.astype(np.float64)
    similarities = DeviceEntries(stored, device).similarities(asked, k)
    assert similarities.dtype == np.float32
    np.testing.assert_allclose(
        np.sort(similarities, axis=1), np.sort(products, axis=1)[:, -k:], atol=1e-6
    )


def test_as_many_neighbours_as_entries(rng: np.random.Generator) -> None:
    stored = entries(rng)[-5:]
    similarities = DeviceEntries(stored, "cpu").similarities(stored, 5)
    expected = np.sort(stored @ stored.T, axis=1)
    np.testing.assert_allclose(np.sort(similarities, axis=1), expected, atol=1e-6)


def test_entries_larger_than_the_memory_of_the_device_are_refused(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    with pytest.raises(IndexMismatchError, match=r"memory of cuda:0.*1000 bytes.*'lists'"):
        DeviceEntries(entries(rng), "cuda:0")
