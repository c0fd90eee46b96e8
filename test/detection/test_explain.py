"""The nominal entries nearest to a box are listed and drawn."""

from __future__ import annotations

import numpy as np
import pytest
from worlds.colours import ColourEmbedder, make_detector, street
from worlds.nominal_world import STAGES, make_frames

from semantic_anomaly.detection.explain import (
    Explanation,
    draw_explanations,
    explain,
    patches_of_box,
)
from semantic_anomaly.errors import InputError
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.normalisation import constant_normalisation
from semantic_anomaly.settings import Settings
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


def explained(index: NominalIndex, grid: PatchGrid, mean: float = 0.0) -> list[Explanation]:
    (explanations,) = explain(index, grid, WHOLE, [constant_normalisation(mean, 0.5)], BOX, 3)
    return explanations


def test_the_nearest_entries_are_listed(index: NominalIndex, grid: PatchGrid) -> None:
    explanations = explained(index, grid, 0.25)
    counts = [e.embeddings for e in explanations]
    assert counts == sorted(counts, reverse=True) and sum(counts) == 3 * 6
    embeddings = grid.features[patches_of_box(grid, WHOLE, BOX)]
    least = 1 - (embeddings @ index.content.embeddings.T).max()
    expected = (least - 0.25) / 0.5
    assert min(e.distance for e in explanations) == pytest.approx(expected, abs=1e-5)


def test_every_stage_has_entries_of_its_own() -> None:
    frames = list(make_frames(3, stages=STAGES))
    index = NominalIndex.build(
        frames, stages=STAGES, roi=WHOLE, settings=Settings(dedup_distance=0.0)
    )
    normalisations = [constant_normalisation(0.0, 1.0)] * 3
    grid = frames[1][1]
    by_stage = explain(index, grid, WHOLE, normalisations, (40, 0, 80, 30), 1)
    assert [{e.stage for e in stage} for stage in by_stage] == [{0}, {1}, {2}]
    # The frame is in the index: of each embedding the nearest entry is itself.
    for stage, explanations in zip(index.stages, by_stage, strict=True):
        assert max(e.distance for e in explanations) == pytest.approx(0.0, abs=1e-5)
        numbers = {e.number for e in explanations}
        assert numbers <= set(stage.content.numbers.tolist())
    assert by_stage[0][0].entry == f"{by_stage[0][0].number}"
    assert by_stage[1][0].entry == f"1:{by_stage[1][0].number}"


def test_the_nearest_entries_are_drawn(index: NominalIndex, grid: PatchGrid) -> None:
    drawn = draw_explanations(street(3).image, BOX, index, explained(index, grid))
    assert drawn.ndim == 3 and drawn.shape[1] >= 2 * 480
