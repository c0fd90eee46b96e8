"""Nominal frames of a small invented world, and indexes built of them, for the tests of indexes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from semantic_anomaly.embedding.identity import EmbedderIdentity
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame, PatchGrid

DIM = 16
GRID = (6, 8)
IDENTITY = EmbedderIdentity("tiny", "dinov2", "", "0" * 64, "1" * 64, (3,), 112, 14, DIM, "float32")
LEFT_HALF = ImageRegion(((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0)))


def unit(points: np.ndarray) -> np.ndarray:
    points = points.astype(np.float32)
    return points / np.linalg.norm(points, axis=-1, keepdims=True)


def make_frames(count: int, seed: int = 0) -> Iterator[tuple[Frame, PatchGrid]]:
    """Frames of patches around five directions, so that many resemble each other."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((5, DIM))
    for number in range(count):
        around = centres[rng.integers(0, 5, GRID)]
        features = unit(around + 0.4 * rng.standard_normal((*GRID, DIM)))
        image = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        yield (
            Frame(image, name=f"drive/{number:03d}"),
            PatchGrid(features, features[0, 0], (60, 80)),
        )


def build(count: int = 8, region: ImageRegion | None = None, **changes: Any) -> NominalIndex:
    settings = Settings(**{"dedup_distance": 0.05, "graph_m": 8, "search_ef": 77, **changes})
    return NominalIndex.build(
        make_frames(count),
        identity=IDENTITY,
        region=region or ImageRegion(),
        settings=settings,
        source=["drive"],
    )


def patches(count: int, seed: int = 0) -> np.ndarray:
    return np.concatenate([g.features.reshape(-1, DIM) for _, g in make_frames(count, seed)])
