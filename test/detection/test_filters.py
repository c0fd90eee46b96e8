"""Filters of regions: which one rejects what, computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_anomaly.detection.filters import (
    FilteredRegions,
    RegionFilters,
    apply,
    border_share,
    patch_agreement,
)
from semantic_anomaly.errors import ModelOutputError, SettingsError

IMAGE_HW = (100, 200)


def judge(
    filters: RegionFilters,
    side: tuple[float, float] = (10.0, 10.0),
    area: float = 100.0,
    border: float = 0.0,
) -> FilteredRegions:
    """Judge a single region of some (width, height)."""
    boxes = np.array([[0.0, 0.0, *side]])
    return apply(filters, IMAGE_HW, boxes, np.array([area]), np.array([border]))


def test_defaults_reject_nothing() -> None:
    worst = judge(RegionFilters(), (200.0, 1.0), 0.0, 1.0)
    assert worst.keep.tolist() == [True] and worst.rejected_by == ("",)
    assert judge(RegionFilters(), area=20000).keep.all()
    assert not worst.cut.any()


@pytest.mark.parametrize(
    ("area", "kept"), [(199, False), (200, True), (10000, True), (10001, False)]
)
def test_size_is_a_share_of_the_image(area: float, kept: bool) -> None:
    result = judge(RegionFilters(min_area=0.01, max_area=0.5), area=area)
    assert result.keep.tolist() == [kept] and result.rejected_by == ("" if kept else "size",)


@pytest.mark.parametrize(
    ("side", "kept"),
    [((50, 10), True), ((10, 50), True), ((51, 10), False), ((10, 51), False), ((7, 7), True)],
)
def test_aspect_of_standing_and_lying_slivers(side: tuple[float, float], kept: bool) -> None:
    result = judge(RegionFilters(max_aspect=5.0), side)
    assert result.rejected_by == ("" if kept else "aspect",)


def test_cut_regions_are_flagged_and_their_shape_is_not_judged() -> None:
    filters = RegionFilters(min_area=0.001, max_aspect=5.0, max_border_share=0.3)
    cut = judge(filters, (2, 60), 120, border=0.31)
    assert cut.cut.tolist() == [True] and cut.keep.tolist() == [True]
    assert judge(filters, (2, 60), 120, border=0.3).rejected_by == ("aspect",)
    assert judge(filters, (2, 60), 19, border=0.4).rejected_by == ("size",), "little evidence"


def test_the_first_filter_that_rejects_is_named() -> None:
    filters = RegionFilters(0.01, 1.0, 4.0, 0.5)
    boxes = np.array([[0, 0, 50, 10]] * 3 + [[0, 0, 20, 20]], np.float64)
    result = apply(
        filters,
        IMAGE_HW,
        boxes,
        np.array([100.0, 400, 400, 400]),
        np.array([0.0, 0, 0.6, 0]),
    )
    assert result.rejected_by == ("size", "aspect", "", "")
    assert result.keep.tolist() == [False, False, True, True]
    assert result.cut.tolist() == [False, False, True, False]


def test_no_regions() -> None:
    none = np.zeros(0)
    result = apply(RegionFilters(), IMAGE_HW, np.zeros((0, 4)), none, none)
    assert result.keep.shape == (0,) and result.keep.dtype == bool and result.rejected_by == ()


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        ({"min_area": -0.1}, "'min_area'"),
        ({"max_area": 1.1}, "'max_area'"),
        ({"min_area": 0.6, "max_area": 0.5}, "min_area <= max_area, found 0.6 and 0.5"),
        ({"max_aspect": 0.9}, "at least 1, found 0.9"),
        ({"max_aspect": float("nan")}, "at least 1"),
        ({"max_border_share": float("nan")}, "'max_border_share'"),
    ],
)
def test_refuses_limits(limits: dict[str, float], match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        RegionFilters(**limits)


@pytest.mark.parametrize(
    ("region", "match"),
    [
        ({"side": (0.0, 5.0)}, "not empty"),
        ({"side": (np.nan, 5.0)}, "finite"),
        ({"area": 20001.0}, "region areas"),
        ({"area": np.nan}, "region areas"),
        ({"border": 1.1}, "border shares"),
    ],
)
def test_refuses_regions(region: dict[str, object], match: str) -> None:
    with pytest.raises(ModelOutputError, match=match):
        judge(RegionFilters(), **region)  # type: ignore[arg-type]


def test_refuses_arrays_of_other_lengths() -> None:
    one, two = np.zeros(1), np.zeros(2)
    with pytest.raises(ModelOutputError, match=r"border shares: expected \(1,\)"):
        apply(RegionFilters(), IMAGE_HW, np.array([[0, 0, 1, 1]]), one, two)
    with pytest.raises(ModelOutputError, match=r"boxes: expected \(n, 4\)"):
        apply(RegionFilters(), IMAGE_HW, two, one, one)


def labelled(text: str) -> np.ndarray:
    rows = [[-1 if c == "." else int(c) for c in row] for row in text.split()]
    return np.array(rows, np.int32)


@pytest.mark.parametrize(
    ("text", "expected", "reason"),
    [
        ("..... .00.. .00.. .....", [0.0], "in the middle"),
        ("00... 00... ..... .....", [4 / 8], "in a corner"),
        ("..... 000.. ..... .....", [1 / 8], "one end of three pixels"),
        ("00000 00000", [1.0], "all of the image"),
        (".0... .0... .0... .0...", [2 / 10], "from top to bottom"),
        ("..... .011. .011. .....", [0.0, 0.0], "regions that meet are not cut"),
        ("01... 01... .....", [3 / 6, 1 / 6], "each its own"),
        ("000.. 0.0.. 000..", [9 / 16], "the outline of a hole counts"),
        ("..1.. ..... .....", [0.0, 1 / 4], "a region without pixels"),
    ],
)
def test_border_share(text: str, expected: list[float], reason: str) -> None:
    labels = labelled(text)
    np.testing.assert_allclose(border_share(labels, np.ones(labels.shape, bool)), expected)


def test_the_edge_of_the_region_of_interest_is_a_border() -> None:
    labels = labelled("..... .00.. .00.. .....")
    mask = np.ones(labels.shape, bool)
    mask[3] = False
    np.testing.assert_allclose(border_share(labels, mask), [2 / 8])
    mask[2] = False
    # Only the upper half takes part, and it is the half that is measured.
    np.testing.assert_allclose(border_share(labels, mask), [2 / 6])
    np.testing.assert_array_equal(border_share(labels, ~mask & False), [0.0])


def test_border_share_of_as_many_regions_as_are_asked_for() -> None:
    labels = labelled("0... .... ....")
    mask = np.ones(labels.shape, bool)
    np.testing.assert_allclose(border_share(labels, mask, 3), [0.5, 0.0, 0.0])
    assert border_share(labelled(".. .."), np.ones((2, 2), bool)).shape == (0,)
    with pytest.raises(ModelOutputError, match="from -1 to -1, found -1 to 0"):
        border_share(labels, mask, 0)


@pytest.mark.parametrize(
    ("labels", "mask", "match"),
    [
        (np.zeros((2, 2), np.uint16), np.ones((2, 2), bool), "signed integers"),
        (np.zeros(4, np.int32), np.ones(4, bool), "signed integers"),
        (np.zeros((2, 2), np.int32), np.ones((2, 3), bool), "region mask"),
        (np.zeros((2, 2), np.int32), np.ones((2, 2), np.uint8), "region mask"),
        (np.full((2, 2), -2, np.int32), np.ones((2, 2), bool), "found -2"),
    ],
)
def test_border_share_refuses(labels: np.ndarray, mask: np.ndarray, match: str) -> None:
    with pytest.raises(ModelOutputError, match=match):
        border_share(labels, mask)


def test_patch_agreement_weighs_patches_by_what_lies_on_them() -> None:
    weights = np.array([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], np.float32)
    shares = patch_agreement(weights, np.array([True, False, True]))
    np.testing.assert_allclose(shares, [0.75, 1.0, 1.0])
    assert patch_agreement(weights[:0], np.array([True, False, True])).shape == (0,)


def test_full_agreement_is_exactly_one() -> None:
    weights = np.random.default_rng(0).random((200, 777)).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    assert np.all(patch_agreement(weights, np.ones(777, bool)) == 1.0)


@pytest.mark.parametrize(
    ("weights", "exceeds", "match"),
    [
        ([[0.5, 0.4]], [True, False], "sums from 0.9 to 0.9"),
        ([[1.5, -0.5]], [True, False], "weights >= 0"),
        ([[np.nan, 1.0]], [True, False], "sum to 1"),
        ([[0.5, 0.5]], [True], "found shapes"),
        ([[0.5, 0.5]], [1, 0], "int64"),
    ],
)
def test_patch_agreement_refuses(
    weights: list[list[float]], exceeds: list[bool], match: str
) -> None:
    with pytest.raises(ModelOutputError, match=match):
        patch_agreement(np.array(weights, np.float32), np.array(exceeds))
