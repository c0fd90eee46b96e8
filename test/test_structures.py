"""Shared data types: sizes, and refusal of invalid values."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from worlds.nominal_world import unit

from semantic_anomaly.errors import ImageError, ModelOutputError
from semantic_anomaly.structures import (
    AnomalyResult,
    Decision,
    Frame,
    HeatmapScale,
    Localization,
    NominalExample,
    PatchGrid,
)


def result(**changes: Any) -> AnomalyResult:
    values: dict[str, Any] = {
        "score": 0.5,
        "decision": Decision.NOMINAL,
        "p_value": 0.3,
        "threshold": 0.6,
        "heatmap": np.zeros((4, 6), np.float32),
        "scale": HeatmapScale(0.1, 0.6),
        "label_map": np.zeros((4, 6), np.uint16),
    }
    return AnomalyResult(**{**values, **changes})


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 6), np.uint8),
        np.zeros((4, 6, 4), np.uint8),
        np.zeros((4, 6, 3), np.float32),
        np.zeros((0, 6, 3), np.uint8),
    ],
)
def test_frame_refuses(image: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"frame 'a/1\.png': expected a non-empty"):
        Frame(image, name="a/1.png")


def test_frames_have_a_size_and_are_frozen() -> None:
    frame = Frame(np.zeros((4, 6, 3), np.uint8))
    assert frame.image_hw == (4, 6)
    with pytest.raises(dataclasses.FrozenInstanceError):
        frame.stamp_ns = 1  # type: ignore[misc]


@pytest.fixture
def features(rng: np.random.Generator) -> np.ndarray:
    return unit(rng.normal(size=(2, 3, 5)))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: f.astype(np.float64),
        lambda f: f[0],
        lambda f: f[:0],
        lambda f: f * 1.01,
        lambda f: f * np.inf,
    ],
    ids=["float64", "no rows", "empty", "longer than one", "infinite"],
)
def test_grid_refuses(spoil: Any, features: np.ndarray) -> None:
    with pytest.raises(ModelOutputError, match="patch features"):
        PatchGrid(spoil(features), (20, 30))


def test_grid_refuses_a_single_bad_patch(features: np.ndarray) -> None:
    features[1, 2, 4] = np.nan
    with pytest.raises(ModelOutputError, match="finite unit vectors"):
        PatchGrid(features, (20, 30))


def test_grid_refuses_an_image_without_pixels(features: np.ndarray) -> None:
    with pytest.raises(ModelOutputError, match="image size"):
        PatchGrid(features, (0, 30))


def test_grid_has_sizes(features: np.ndarray) -> None:
    grid = PatchGrid(features, (20, 30))
    assert (grid.grid_hw, grid.dim) == ((2, 3), 5)
    assert grid.stages == (grid,)


def test_grid_holds_those_of_further_stages(features: np.ndarray) -> None:
    coarse = PatchGrid(features[:1, :2], (20, 30))
    grid = PatchGrid(features, (20, 30), further=(coarse,))
    assert grid.stages == (grid, coarse)
    other_size = PatchGrid(features, (20, 31))
    for further in (other_size, grid):
        with pytest.raises(ModelOutputError, match=r"further stages: expected .*\(20, 30\)"):
            PatchGrid(features, (20, 30), further=(coarse, further))


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (np.ones((1, 3, 2), np.float32), r"expected \(n, 2, 3\)"),
        (np.ones((1, 2, 3)), "float64"),
        (np.full((1, 2, 3), np.nan, np.float32), "shares in"),
        (np.full((1, 2, 3), 1.5, np.float32), "shares in"),
        (np.zeros((1, 2, 3), np.float32), "some above 0"),
    ],
)
def test_grid_refuses_invalid_instances(
    shares: np.ndarray, message: str, features: np.ndarray
) -> None:
    with pytest.raises(ModelOutputError, match=message):
        PatchGrid(features, (20, 30), shares)


def test_localization_refuses_empty_boxes_and_nan() -> None:
    nearest = NominalExample("a/1.png", 0, 0, (2, 3), 0.1)
    with pytest.raises(ModelOutputError, match="non-empty box"):
        Localization((3.0, 0.0, 3.0, 2.0), (3.0, 1.0), 1, 0.5, nearest, 1)
    with pytest.raises(ModelOutputError, match="finite score"):
        Localization((3.0, 0.0, 4.0, 2.0), (3.0, 1.0), 1, float("nan"), nearest, 1)


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (float("nan"), 1.0), (0.5, float("inf"))])
def test_scale_refuses(low: float, high: float) -> None:
    with pytest.raises(ModelOutputError, match="low < high"):
        HeatmapScale(low, high)


def test_scale_is_0_at_low_1_at_high_and_has_no_upper_limit() -> None:
    scaled = HeatmapScale(0.1, 0.5).normalise(np.array([0.0, 0.1, 0.3, 0.5, 1.3], np.float32))
    np.testing.assert_allclose(scaled, [0.0, 0.0, 0.5, 1.0, 3.0], atol=1e-6)
    assert scaled.dtype == np.float32


@pytest.mark.parametrize(
    ("typical", "high", "low"), [(0.5, 3.0, 0.5), (-0.2, 0.1, -0.2), (0.5, 0.5, -0.5), (0, -2, -3)]
)
def test_scale_begins_at_the_typical_value_or_below_the_threshold(
    typical: float, high: float, low: float
) -> None:
    assert HeatmapScale.from_typical(typical, high, "x") == HeatmapScale(low, high, "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": float("nan")}, "finite number"),
        ({"threshold": None}, "needs a threshold"),
        ({"decision": Decision.UNKNOWN}, "needs a reason"),
    ],
)
def test_result_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelOutputError, match=message):
        result(**changes)


def test_result_with_a_threshold_may_lack_a_p_value() -> None:
    assert result(p_value=None).decision is Decision.NOMINAL


def test_scores_and_thresholds_may_be_negative() -> None:
    below = result(score=-1.5, threshold=-0.5, scale=HeatmapScale(-3.0, -0.5))
    assert (below.score, below.threshold) == (-1.5, -0.5)
    np.testing.assert_allclose(below.scale.normalise(np.float32([-4.0, -1.75])), [0.0, 0.5])


def test_values_of_decisions() -> None:
    assert [decision.value for decision in Decision] == ["nominal", "anomaly", "unknown"]
