"""Comparison with the nominal frames that resemble an image, rather than with all of them."""

from __future__ import annotations

import numpy as np

from semantic_anomaly.errors import IndexMismatchError
from semantic_anomaly.exact_search import inner_products, mean_distances
from semantic_anomaly.index import NominalIndex
from semantic_anomaly.index_parts import SCENES, unit_scene
from semantic_anomaly.structures import PatchGrid


class SceneSearch:
    """Exact distances to the entries of the nominal frames whose global feature is nearest.

    An index leaves out what resembles an earlier entry, and then the frames that resemble an image
    do not have everything that they showed: build with `dedup_distance` 0 for exact scenes.

    Args:
        index: with a part of scenes.
        frames: how many of the frames that have entries are compared.

    Raises:
        IndexMismatchError: none of the scenes is of a frame that has entries.
    """

    def __init__(self, index: NominalIndex, frames: int) -> None:
        content, scenes = index.content, index.parts[SCENES].content
        self._entries = content.embeddings
        self._order = np.argsort(content.entries[:, 0], kind="stable")
        bounds = np.searchsorted(
            content.entries[self._order, 0], np.arange(len(content.frames) + 1)
        )
        pieces = np.split(self._order, bounds[1:-1])
        # Frames of different drives may have the same name, but not the same picture as well.
        rows = {
            (frame.name, frame.thumbnail): piece
            for frame, piece in zip(content.frames, pieces, strict=True)
            if len(piece)
        }
        seen = [scenes.frames[number] for number in scenes.entries[:, 0].tolist()]
        known = [n for n, frame in enumerate(seen) if (frame.name, frame.thumbnail) in rows]
        if not known:
            raise IndexMismatchError("index: scenes", "those of frames with entries", "none")
        self._rows = [rows[seen[n].name, seen[n].thumbnail] for n in known]
        self._scenes = np.ascontiguousarray(scenes.embeddings[known])
        self._frames = min(frames, len(known))

    def distances(self, grid: PatchGrid, embeddings: np.ndarray, k: int) -> np.ndarray:
        """Return (n,) float32 mean cosine distance in [0, 2] to the k nearest of those entries.

        Args:
            grid: of the image; its global feature says which frames it resembles.
            embeddings: (n, dim) float32, unit norm.
            k: >= 1; all of them where there are fewer.
        """
        whole = unit_scene(grid)[None]
        similar = inner_products(whole, self._scenes.T)[0]
        nearest = np.argsort(-similar, kind="stable")[: self._frames]
        rows = np.unique(np.concatenate([self._rows[n] for n in nearest]))
        return mean_distances(embeddings, self._entries[rows], min(k, len(rows)))
