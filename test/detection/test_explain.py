"""The nominal entries nearest to a box are listed and drawn."""

from __future__ import annotations

import numpy as np
import pytest
from worlds.colours import ColourEmbedder, make_detector, street

from semantic_anomaly.detection.explain import (
    draw_explanations,
    explain,
    instances_of_box,
    patches_of_box,
)
from semantic_anomaly.errors import InputError
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.structures import PatchGrid

WHOLE = RegionOfInterest()
BOX = (16, 8, 40, 24)


@pytest.fixture(scope="module")
def index() -> NominalIndex:
    return make_detector(calibrated=False).index


@pytest.fixture(scope="module")
def grid() -> PatchGrid:
    return ColourEmbedder().embed([street(3).image])[0]


def test_patches_of_a_box(grid: PatchGrid) -> None:
    inside = patches_of_box(grid, WHOLE, BOX)
    assert np.argwhere(inside).min(0).tolist() == [1, 2] and inside.sum() == 6
    assert patches_of_box(grid, WHOLE, (17, 9, 19, 11)).sum() == 1, "smaller than a patch"
    for box in ((0, 0, 0, 5), (5, 5, 4, 9), (-1, 0, 4, 4), (0, 0, 129, 4), (0, 0, float("nan"), 4)):
        with pytest.raises(InputError, match="within the image of 128x72"):
            patches_of_box(grid, WHOLE, box)
    left_half = RegionOfInterest(((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0)))
    with pytest.raises(InputError, match="region of interest"):
        patches_of_box(grid, left_half, (100, 10, 120, 30))


def test_instances_at_least_half_inside_a_box(grid: PatchGrid) -> None:
    inside = patches_of_box(grid, WHOLE, BOX)
    shares = np.zeros((2, *grid.grid_hw), np.float32)
    shares[0, 1:3, 3:7] = 1.0  # 4 of 8 patches inside
    shares[1, 1:3, 4:7] = 1.0  # 2 of 6
    segmented = PatchGrid(grid.features, grid.global_feature, grid.image_hw, shares)
    embeddings = instances_of_box(segmented, WHOLE, inside)
    mean = grid.features[1:3, 3:7].mean(axis=(0, 1))
    np.testing.assert_allclose(embeddings, [mean / np.linalg.norm(mean)], atol=1e-5)
    with pytest.raises(InputError, match="at least half inside it"):
        instances_of_box(segmented, WHOLE, patches_of_box(grid, WHOLE, (100, 40, 120, 60)))


def test_the_nearest_entries_are_listed(index: NominalIndex, grid: PatchGrid) -> None:
    embeddings = grid.features[patches_of_box(grid, WHOLE, BOX)]
    explanations = explain(index, embeddings, 3)
    counts = [e.patches for e in explanations]
    assert counts == sorted(counts, reverse=True) and sum(counts) == 3 * 6
    products = embeddings @ index.content.embeddings.T
    least = 1 - products.max()
    assert min(e.distance for e in explanations) == pytest.approx(least, abs=1e-5)

    gain = np.linspace(1.0, 2.0, 6)
    scaled = explain(index, embeddings, 3, gain=gain, offset=0.5)
    expected = (0.5 + gain * (1 - products.max(axis=1))).min()
    assert min(e.distance for e in scaled) == pytest.approx(expected, abs=1e-5)


def test_the_nearest_entries_are_drawn(index: NominalIndex, grid: PatchGrid) -> None:
    explanations = explain(index, grid.features[patches_of_box(grid, WHOLE, BOX)], 3)
    image = street(3).image
    drawn = draw_explanations(image, BOX, index, explanations)
    assert drawn.ndim == 3 and drawn.shape[1] >= 2 * 480
    with_threshold = draw_explanations(image, BOX, index, explanations, 0.25)
    changed = np.argwhere((drawn != with_threshold).any(axis=2))
    assert len(changed) and changed.max(axis=0)[0] < 26, "in the title of the image only"
