"""Rendering: a fixed scale, the plain image where nominal, and a legible banner."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest

from semantic_anomaly.detection.localization import heatmap, localize
from semantic_anomaly.detection.rendering import contact_sheet, draw_heatmap, draw_overlay
from semantic_anomaly.errors import ImageError
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.structures import (
    AnomalyResult,
    ComponentState,
    Decision,
    Frame,
    HeatmapScale,
    NominalExample,
)

THRESHOLD = 0.3
WEDGE = RegionOfInterest(((0.1, 1.0), (0.4, 0.3), (0.6, 0.3), (0.9, 1.0)))


def result_of(
    anomaly_map: np.ndarray,
    image_hw: tuple[int, int],
    roi: RegionOfInterest | None = None,
    **changes: Any,
) -> AnomalyResult:
    roi = roi or RegionOfInterest()
    inside = roi.patch_mask(anomaly_map.shape, image_hw)  # type: ignore[arg-type]
    anomaly_map = np.where(inside, anomaly_map, 0).astype(np.float32)
    heat = heatmap(anomaly_map, roi, image_hw)
    example = NominalExample("a/1.png", 0, 0, (1, 1), 0.1)
    mask = roi.pixel_mask(image_hw)
    labels, localizations = localize(
        anomaly_map, heat, THRESHOLD, 0, inside, mask, lambda patches: [example] * len(patches)
    )
    values: dict[str, Any] = {
        "score": float(anomaly_map.max()),
        "decision": Decision.ANOMALY if localizations else Decision.NOMINAL,
        "p_value": 0.0123,
        "threshold": THRESHOLD,
        "heatmap": heat,
        "scale": HeatmapScale(0.05, THRESHOLD),
        "label_map": labels,
        "localizations": localizations,
    }
    return AnomalyResult(**{**values, **changes})


def one_odd_patch(grid_hw: tuple[int, int] = (9, 16)) -> np.ndarray:
    distances = np.full(grid_hw, 0.05, np.float32)
    distances[grid_hw[0] * 2 // 3, grid_hw[1] // 2] = 0.8
    return distances


def grey(image_hw: tuple[int, int]) -> np.ndarray:
    return np.full((*image_hw, 3), 120, np.uint8)


def lightness(rgb: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)[..., 0].astype(float)


@pytest.mark.parametrize(
    ("distance", "darkest", "brightest", "reason"),
    [
        (0.05, 0, 3, "typical is black"),
        (0.15, 15, 80, "nominal is dark"),
        (0.30, 100, 170, "the threshold is half way up"),
        (0.54, 230, 255, "almost twice the threshold is bright"),
        (2.0, 230, 255, "saturated"),
    ],
)
def test_heatmap_has_a_fixed_scale(
    distance: float, darkest: int, brightest: int, reason: str
) -> None:
    picture = draw_heatmap(result_of(np.full((4, 6), distance), (40, 60)))
    assert picture.shape == (40, 60, 3) and picture.dtype == np.uint8
    assert (lightness(picture) >= darkest).all() and (lightness(picture) <= brightest).all()


def test_heatmap_does_not_depend_on_the_rest_of_the_image() -> None:
    nominal = np.full((4, 6), 0.1, np.float32)
    odd = nominal.copy()
    odd[3, 5] = 1.9
    beside = draw_heatmap(result_of(nominal, (40, 60))), draw_heatmap(result_of(odd, (40, 60)))
    np.testing.assert_array_equal(beside[0][:20, :30], beside[1][:20, :30])


def test_heatmap_grows_brighter_with_distance_and_never_darker() -> None:
    ramp = np.linspace(0.0, 1.0, 64, dtype=np.float32)[None]
    row = lightness(draw_heatmap(result_of(ramp, (4, 640))))[2]
    assert (np.diff(row) >= -1.0).all() and row[-1] - row[0] > 200


@pytest.mark.parametrize(
    ("low", "high"), [(0.1, 2.5), (-0.4, 2.5), (-3.0, 1.0), (-3.5, -2.5), (-0.95, 0.05)]
)
def test_scales_of_any_sign_are_drawn_alike(low: float, high: float) -> None:
    # From far below the scale to three times the threshold.
    shares = np.array([[-9.0, -2.0, 0.0, 0.5, 1.0, 1.5, 3.0]], np.float32)
    labels = np.zeros(shares.shape, np.uint16)
    drawn = [
        draw_heatmap(result_of(shares, shares.shape, heatmap=heat, label_map=labels, scale=scale))
        for heat, scale in (
            (shares, HeatmapScale(0.0, 1.0)),
            (low + shares * (high - low), HeatmapScale(low, high)),
        )
    ]
    np.testing.assert_allclose(lightness(drawn[1]), lightness(drawn[0]), atol=2.0)
    row = lightness(drawn[1])[0]
    assert (row[:3] < 4).all() and (np.diff(row[2:]) > 20).all()


def test_heatmap_is_black_outside_the_roi() -> None:
    picture = draw_heatmap(result_of(np.full((9, 16), 0.9), (90, 160), WEDGE), WEDGE)
    mask = WEDGE.pixel_mask((90, 160))
    assert not picture[~mask].any() and (lightness(picture)[mask] > 200).mean() > 0.95


def banner_rows(image_hw: tuple[int, int]) -> int:
    return max(12, round(image_hw[0] / 15))


def test_overlay_of_a_nominal_frame_is_the_plain_image_under_a_banner(
    rng: np.random.Generator,
) -> None:
    image = rng.integers(0, 256, (360, 640, 3), np.uint8)
    kept = image.copy()
    result = result_of(np.full((9, 16), 0.08), (360, 640))
    drawn = draw_overlay(image, result)
    rows = banner_rows((360, 640))
    np.testing.assert_array_equal(drawn[rows:], image[rows:])
    np.testing.assert_array_equal(image, kept)
    np.testing.assert_array_equal(
        draw_overlay(Frame(image), result, RegionOfInterest(), 0.5), drawn
    )


def test_overlay_marks_the_component_and_nothing_else() -> None:
    image_hw = (360, 640)
    image = grey(image_hw)
    result = result_of(one_odd_patch(), image_hw)
    drawn = draw_overlay(image, result, RegionOfInterest(), 0.5)
    changed = (drawn != image).any(axis=2)
    changed[: banner_rows(image_hw)] = False
    left, top, right, bottom = (int(v) for v in result.localizations[0].box_xyxy)
    assert changed[top:bottom, left:right].mean() > 0.95
    changed[top - 40 : bottom + 40, left - 40 : right + 120] = False
    assert not changed.any()


def test_alpha_is_the_strength_of_the_heatmap() -> None:
    image = grey((360, 640))
    result = result_of(
        one_odd_patch(),
        (360, 640),
        localizations=(),
        label_map=np.zeros((360, 640), np.uint16),
    )
    y, x = np.unravel_index(int(result.heatmap.argmax()), result.heatmap.shape)
    shifts = [
        np.abs(draw_overlay(image, result, RegionOfInterest(), alpha)[y, x].astype(int) - 120).sum()
        for alpha in (0.0, 0.3, 0.6, 1.0)
    ]
    assert shifts[0] == 0 and shifts == sorted(shifts) and shifts[-1] > 100


def test_outside_of_the_roi_is_dimmed_and_its_edge_drawn() -> None:
    image = grey((360, 640))
    drawn = draw_overlay(image, result_of(np.full((9, 16), 0.05), (360, 640), WEDGE), WEDGE, 0.5)
    assert (drawn[200, 20] < 60).all(), "dimmed"
    assert (drawn[250, 320] == 120).all(), "plain inside"
    row = drawn[250].astype(int)
    assert ((row[:, 1] - row[:, 0]) > 80).any(), "a green outline"


@pytest.mark.parametrize(
    ("image_hw", "decision"),
    [((360, 640), decision) for decision in Decision] + [((720, 1280), Decision.NOMINAL)],
)
def test_banner_is_legible(image_hw: tuple[int, int], decision: Decision) -> None:
    result = result_of(
        np.full((9, 16), 0.08),
        image_hw,
        decision=decision,
        reason="uncalibrated: no threshold" if decision is Decision.UNKNOWN else "",
    )
    banner = draw_overlay(grey(image_hw), result)[: banner_rows(image_hw)]
    light = lightness(banner) > 120
    ys, xs = np.nonzero(light)
    assert ys.max() - ys.min() >= 9, "letters of ten pixels"
    assert ys.min() > 0 and ys.max() < len(banner) - 1 and xs.max() < image_hw[1] - 1, "not cut"
    assert np.median(lightness(banner)[~light]) < 60, "on a dark ground"


def test_the_banner_of_a_candidate_differs_from_nominal_and_anomaly() -> None:
    confirmed = result_of(one_odd_patch(), (360, 640))
    localizations = tuple(
        replace(item, state=ComponentState.CANDIDATE) for item in confirmed.localizations
    )
    nominal = replace(confirmed, decision=Decision.NOMINAL, localizations=())
    candidate = replace(nominal, localizations=localizations)
    banners = [draw_overlay(grey((360, 640)), r)[:24] for r in (confirmed, nominal, candidate)]
    # Orange, blue and yellow on a dark ground.
    colours = [banner.reshape(-1, 3)[banner.sum(axis=2).argmax()] for banner in banners]
    assert [tuple(int(v > 150) for v in colour) for colour in colours] == [
        (1, 0, 0),
        (0, 1, 1),
        (1, 1, 0),
    ]


@pytest.mark.parametrize("image_hw", [(2, 3), (16, 16), (48, 64), (97, 131), (2000, 90)])
def test_small_and_odd_sizes_are_drawn(image_hw: tuple[int, int]) -> None:
    for roi in (RegionOfInterest(), RegionOfInterest(((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)))):
        result = result_of(one_odd_patch(), image_hw, roi)
        drawn = draw_overlay(grey(image_hw), result, roi)
        assert drawn.shape == (*image_hw, 3) and drawn.dtype == np.uint8
        assert draw_heatmap(result, roi).shape == (*image_hw, 3)


def test_uncalibrated_result_is_drawn_with_its_reason() -> None:
    shared = {"p_value": None, "threshold": None, "decision": Decision.UNKNOWN, "localizations": ()}
    images = []
    for reason in ("uncalibrated", "no frames"):
        result = result_of(one_odd_patch(), (360, 640), reason=reason, **shared)
        images.append(draw_overlay(grey((360, 640)), result))
    assert (images[0] != images[1]).any()


def test_overlay_refuses_another_size_or_dtype() -> None:
    result = result_of(one_odd_patch(), (40, 60))
    with pytest.raises(ImageError, match=r"expected an image of the result's size \(40, 60\)"):
        draw_overlay(grey((40, 61)), result)
    with pytest.raises(ImageError, match="uint8 RGB"):
        draw_overlay(grey((40, 60)) / 255, result)


def test_contact_sheet_is_filled_row_by_row() -> None:
    tiles = [np.full((4, 6, 3), value, np.uint8) for value in (10, 20, 30)]
    sheet = contact_sheet(tiles, columns=2)
    assert sheet.shape == (12, 16, 3)
    expected = np.full((12, 16, 3), 255)
    expected[:4, :6], expected[:4, 10:], expected[8:, :6] = 10, 20, 30
    np.testing.assert_array_equal(sheet, expected)
    assert contact_sheet(tiles[:1], columns=5).shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("tiles", "columns"),
    [
        ([], 2),
        ([np.zeros((4, 6, 3), np.uint8), np.zeros((4, 7, 3), np.uint8)], 2),
        ([np.zeros((4, 6, 3), np.uint8)], 0),
    ],
)
def test_contact_sheet_refuses(tiles: list[np.ndarray], columns: int) -> None:
    with pytest.raises(ImageError, match="contact sheet"):
        contact_sheet(tiles, columns)
