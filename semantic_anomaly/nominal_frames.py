"""Nominal frames as an index takes them in: whole grids, parts of them, or places of any kind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from semantic_anomaly.errors import ModelOutputError
from semantic_anomaly.regions import ImageRegion, patch_regions
from semantic_anomaly.structures import Frame, PatchGrid


@dataclass(frozen=True, eq=False)
class NominalPlaces:
    """Embeddings of some places of a nominal frame, which need not be its patches.

    Attributes:
        frame: the frame.
        grid_hw: (rows, cols) of the grid that the places are told in.
        places: (n, 2) int, row and col of each.
        embeddings: (n, dim) float32, unit norm.

    Raises:
        ModelOutputError: shapes that do not agree, or places outside the grid.
    """

    frame: Frame
    grid_hw: tuple[int, int]
    places: np.ndarray
    embeddings: np.ndarray

    def __post_init__(self) -> None:
        shapes = self.places.shape, self.embeddings.shape
        if shapes[0] != (len(self.embeddings), 2) or len(shapes[1]) != 2:
            raise ModelOutputError(
                f"frame '{self.frame.name}': expected (n, 2) places and (n, dim) embeddings, "
                f"found {shapes[0]} and {shapes[1]}"
            )
        if not np.all((self.places >= 0) & (self.places < self.grid_hw)):
            raise ModelOutputError(
                f"frame '{self.frame.name}': expected places in a grid of {self.grid_hw}"
            )


# Frame and grid, and (rows, cols) bool where not all of the frame is nominal; or places of it.
NominalFrame = tuple[Frame, PatchGrid] | tuple[Frame, PatchGrid, np.ndarray] | NominalPlaces


def nominal_patches(
    given: tuple[Frame, PatchGrid] | tuple[Frame, PatchGrid, np.ndarray], region: ImageRegion
) -> NominalPlaces:
    """Return the patches of a nominal frame that take part.

    Args:
        given: frame, grid and, where not all of it is nominal, (rows, cols) bool.
        region: patches outside take no part.

    Raises:
        SettingsError: no patch lies in the region.
    """
    frame, grid, *nominal = given
    regions = patch_regions(grid, region)
    wanted = regions.label_map >= 0
    for mask in nominal:
        wanted &= mask
    rows, cols = np.nonzero(wanted)
    embeddings = regions.embeddings[regions.label_map[rows, cols]]
    return NominalPlaces(frame, grid.grid_hw, np.stack([rows, cols], axis=1), embeddings)
