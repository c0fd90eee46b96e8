"""Streets of colours that are segmented too: an embedder with instances, and segmenters by rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from semantic_anomaly.embedding.identity import SegmenterIdentity
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.segmentation.embedder import RunningEmbedder
from semantic_anomaly.segmentation.tokens import TokenSegmenter
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame, PatchGrid
from worlds.colours import PATCH, ColourEmbedder, street

Rule = Callable[[np.ndarray, tuple[int, int]], np.ndarray]


def every_patch(image: np.ndarray, grid_hw: tuple[int, int]) -> np.ndarray:
    """Return one mask a patch."""
    count = grid_hw[0] * grid_hw[1]
    return np.eye(count, dtype=bool).reshape(count, *grid_hw)


def nothing(image: np.ndarray, grid_hw: tuple[int, int]) -> np.ndarray:
    return np.zeros((0, *grid_hw), bool)


def halves(image: np.ndarray, grid_hw: tuple[int, int]) -> np.ndarray:
    """Return sky, road, and what is magenta."""
    blocks = image[: grid_hw[0] * PATCH, : grid_hw[1] * PATCH]
    small = blocks[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].astype(int)
    magenta = (small[..., 0] > 200) & (small[..., 1] < 90)
    sky = np.zeros(grid_hw, bool)
    sky[: grid_hw[0] // 2] = True
    masks = np.stack([sky & ~magenta, ~sky & ~magenta, magenta])
    return masks[masks.any(axis=(1, 2))]


class ByRule:
    """Segments by a rule; the digest names it."""

    def __init__(self, rule: Rule, digest: str = "a" * 64) -> None:
        self._rule = rule
        self.identity = SegmenterIdentity("tokens", "", digest)

    def segment(self, image: np.ndarray, grid: PatchGrid) -> np.ndarray:
        return self._rule(image, grid.grid_hw)


class SegmentedColours(RunningEmbedder):
    """The colours of patches, with instances."""

    def __init__(self, segmenter: Any = None) -> None:
        backbone: Any = ColourEmbedder()
        super().__init__(backbone, segmenter or TokenSegmenter())

    def frames(self, seeds: Sequence[int], odd: bool = False) -> list[tuple[Frame, PatchGrid]]:
        shown = [street(seed, odd) for seed in seeds]
        return list(zip(shown, self.embed([frame.image for frame in shown]), strict=True))


def build(
    embedder: SegmentedColours,
    settings: Settings,
    count: int = 12,
    roi: RegionOfInterest | None = None,
) -> NominalIndex:
    return NominalIndex.build(
        embedder.frames(range(count)),
        identity=embedder.identity,
        roi=roi or RegionOfInterest(),
        settings=settings,
        source=["drive"],
        segmenter=embedder.segmenter if settings.segments else None,
    )
