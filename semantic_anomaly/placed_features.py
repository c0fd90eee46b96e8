"""Embeddings that know where in the image they are, so that a familiar thing may be misplaced.

Weighted concatenation with a unit vector of the place keeps one inner product, and so one graph:
the cosine distance of two such embeddings is the weighted sum of the embeddings' own and
(2 - cos(pi * dy) - cos(0.2 * pi * dx)) / 2 for displacements dy and dx in shares of the image.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

PLACE_DIM = 4
# The scene changes with the height in the image far more than from side to side.
_TURN_Y, _TURN_X = np.pi, 0.2 * np.pi


def with_places(features: np.ndarray, weight: float) -> np.ndarray:
    """Return (rows, cols, dim + 4) float32 of unit norm; the features themselves for weight 0.

    Args:
        features: (rows, cols, dim) float32, unit norm.
        weight: of the place in the cosine distance, in [0, 1).
    """
    if not weight:
        return features
    places = _places((features.shape[0], features.shape[1])) * np.float32(np.sqrt(weight))
    return np.concatenate([features * np.float32(np.sqrt(1.0 - weight)), places], axis=-1)


@lru_cache(maxsize=8)
def _places(grid_hw: tuple[int, int]) -> np.ndarray:
    y, x = ((np.arange(n) + 0.5) / n for n in grid_hw)
    angles = np.stack(np.broadcast_arrays(_TURN_Y * y[:, None], _TURN_X * x[None]), axis=-1)
    places = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1) / np.sqrt(2.0)
    places = places.astype(np.float32)
    places.flags.writeable = False
    return places
