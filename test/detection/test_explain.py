"""What explains a box is found and drawn."""

from __future__ import annotations

import numpy as np
import pytest
from worlds.colours import ColourEmbedder, make_detector, street

from semantic_anomaly.detection import explain as explanation
from semantic_anomaly.errors import InputError
from semantic_anomaly.roi import ImageRegion

WHOLE = ImageRegion()


def test_what_explains_a_box_is_found_and_drawn() -> None:
    index, embedder = make_detector(calibrated=False).index, ColourEmbedder()
    frame = street(3)
    grid = embedder.embed([frame.image])[0]
    inside = explanation.patches_of_box(grid, WHOLE, (16, 8, 40, 24))
    assert np.argwhere(inside).min(0).tolist() == [1, 2] and inside.sum() == 6
    assert explanation.patches_of_box(grid, WHOLE, (17, 9, 19, 11)).sum() == 1
    found = explanation.explain(index, grid.features[inside], 3)
    assert [e.patches for e in found] == sorted((e.patches for e in found), reverse=True)
    assert sum(e.patches for e in found) == 18
    products = grid.features[inside] @ index.content.embeddings.T
    assert min(e.distance for e in found) == pytest.approx(1 - products.max(), abs=1e-5)
    drawn = explanation.picture(frame.image, (16, 8, 40, 24), index, found)
    assert drawn.ndim == 3 and drawn.shape[1] >= 2 * 480
    for box in ((0, 0, 0, 5), (5, 5, 4, 9), (-1, 0, 4, 4), (0, 0, 129, 4), (0, 0, float("nan"), 4)):
        with pytest.raises(InputError, match="within the image of 128x72"):
            explanation.patches_of_box(grid, WHOLE, box)
    half = ImageRegion(((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0)))
    with pytest.raises(InputError, match="region of interest"):
        explanation.patches_of_box(grid, half, (100, 10, 120, 30))
