"""Filters of components by size and shape, computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_anomaly.detection.filters import border_shares, reject
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Localization, NominalExample

IMAGE_HW = (100, 200)
NEAREST = NominalExample("d/0.png", 0, 0, (1, 1), 0.1)


def kept(settings: Settings, *boxes: tuple[int, int, int, int], roi_right: int = 200) -> list[int]:
    """Return the labels of those filled boxes that are kept, from 1."""
    label_map = np.zeros(IMAGE_HW, np.uint16)
    localizations = []
    for label, (left, top, right, bottom) in enumerate(boxes, start=1):
        label_map[top:bottom, left:right] = label
        area = (right - left) * (bottom - top)
        box = (float(left), float(top), float(right), float(bottom))
        localizations.append(Localization(box, box[:2], area, 0.5, NEAREST, label))
    roi_mask = np.zeros(IMAGE_HW, bool)
    roi_mask[:, :roi_right] = True
    labels, rest = reject(settings, label_map, tuple(localizations), roi_mask)
    assert labels.dtype == np.uint16
    numbers = [localization.label for localization in rest]
    np.testing.assert_array_equal(labels, np.where(np.isin(label_map, numbers), label_map, 0))
    return numbers


def test_defaults_reject_nothing() -> None:
    assert kept(Settings(), (0, 0, 200, 1), (0, 10, 200, 100)) == [1, 2]
    assert kept(Settings(max_area=0.5)) == []


@pytest.mark.parametrize(("height", "expected"), [(50, [1]), (51, [])])
def test_max_area_is_a_share_of_the_image(height: int, expected: list[int]) -> None:
    assert kept(Settings(max_area=0.5), (0, 0, 200, height)) == expected


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [(50, 10, [1]), (10, 50, [1]), (51, 10, []), (10, 51, [])],
)
def test_max_aspect_limits_standing_and_lying_slivers(
    width: int, height: int, expected: list[int]
) -> None:
    assert kept(Settings(max_aspect=5.0), (20, 20, 20 + width, 20 + height)) == expected


def test_slivers_cut_by_a_border_are_kept() -> None:
    settings = Settings(max_aspect=4.0)
    along_border, free, end_at_border = (198, 20, 200, 60), (150, 20, 152, 60), (160, 30, 200, 32)
    # 40 of 84 pixel sides lie on the border, none, and 2 of 84.
    assert kept(settings, along_border, free, end_at_border) == [1]
    assert kept(settings, (148, 20, 150, 60), roi_right=150) == [1], "border of the ROI"
    assert kept(settings.replace(max_area=0.003), along_border) == [], "size is judged all the same"


def labelled(text: str) -> np.ndarray:
    return np.array([[0 if c == "." else int(c) for c in row] for row in text.split()], np.uint16)


@pytest.mark.parametrize(
    ("text", "expected", "reason"),
    [
        ("..... .11.. .11.. .....", [0.0], "in the middle"),
        ("11... 11... ..... .....", [4 / 8], "in a corner"),
        ("..... 111.. ..... .....", [1 / 8], "one end of three pixels"),
        ("11111 11111", [1.0], "all of the image"),
        (".1... .1... .1... .1...", [2 / 10], "from top to bottom"),
        ("..... .122. .122. .....", [0.0, 0.0], "components that touch are not cut"),
        ("12... 12... .....", [3 / 6, 1 / 6], "two at the border"),
        ("111.. 1.1.. 111..", [9 / 16], "the outline of a hole counts"),
        ("..2.. ..... .....", [0.0, 1 / 4], "a label without pixels"),
        ("..... .....", [], "no component"),
    ],
)
def test_border_shares(text: str, expected: list[float], reason: str) -> None:
    label_map = labelled(text)
    shares = border_shares(label_map, np.ones(label_map.shape, bool))
    np.testing.assert_allclose(shares, [0.0, *expected], err_msg=reason)


def test_the_edge_of_the_region_of_interest_is_a_border() -> None:
    label_map = labelled("..... .11.. .11.. .....")
    mask = np.ones(label_map.shape, bool)
    mask[3] = False
    np.testing.assert_allclose(border_shares(label_map, mask), [0.0, 2 / 8])
    mask[2] = False
    # Only the upper half is inside.
    np.testing.assert_allclose(border_shares(label_map, mask), [0.0, 2 / 6])
    assert not border_shares(label_map, np.zeros_like(mask)).any()
