"""Detectors of several stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from worlds.nominal_world import COARSE, LEFT_HALF, PATCHES, STAGES, make_frames

from semantic_anomaly.detection.detector import AnomalyDetector, resolve_settings
from semantic_anomaly.embedding.identity import StageIdentity
from semantic_anomaly.errors import IndexMismatchError
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.offline.calibrate import calibrate
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Decision, Frame, PatchGrid

TWO = (PATCHES, COARSE)


class GivenEmbedder:
    """Has stages but embeds nothing."""

    device = "cpu"

    def __init__(self, stages: Sequence[StageIdentity]) -> None:
        self.stages = tuple(stages)


def make_index(stages: Sequence[StageIdentity] = TWO, **more: Any) -> NominalIndex:
    values = {"roi": RegionOfInterest(), "settings": Settings(dedup_distance=0.0), **more}
    return NominalIndex.build(make_frames(4, stages=stages), stages=stages, **values)


def make_detector(index: NominalIndex, **settings: Any) -> AnomalyDetector:
    embedder: Any = GivenEmbedder([stage.stage for stage in index.stages])
    return AnomalyDetector(index, settings=Settings(smoothing=0.0, **settings), embedder=embedder)


def odd_in(number: int, row: int, col: int) -> tuple[Frame, PatchGrid]:
    """Return a frame of the index with an opposite embedding in one patch of a stage."""
    frame, grid = next(iter(make_frames(1, stages=TWO)))
    grids = list(grid.stages)
    features = grids[number].features.copy()
    features[row, col] *= -1.0
    grids[number] = replace(grids[number], features=features, further=())
    return frame, replace(grids[0], further=tuple(grids[1:]))


@pytest.mark.parametrize("number", [0, 1])
def test_the_nearest_example_is_of_the_stage_that_adds_most(number: int) -> None:
    index = make_index()
    frame, grid = odd_in(number, 1, 2)
    result = make_detector(index, threshold=0.5).assess(frame, grid)
    assert result.decision is Decision.ANOMALY
    nearest = result.localizations[0].nearest
    assert nearest.stage == number
    assert nearest.grid_hw == grid.stages[number].grid_hw
    expected = index.stages[number].nearest(grid.stages[number].features[1, 2])
    assert nearest == replace(expected, stage=number)
    assert len(result.stage_scores) == 2
    assert list(result.stage_scores.values())[number] == max(result.stage_scores.values())


def test_without_a_calibration_there_is_no_decision() -> None:
    result = make_detector(make_index()).assess(*odd_in(0, 1, 2))
    assert result.decision is Decision.UNKNOWN and result.threshold is None
    assert result.scale.source == "distances inside the index"
    assert not result.localizations


def test_grids_of_two_sizes_share_a_region_of_interest() -> None:
    detector = make_detector(make_index(roi=LEFT_HALF))
    frame, grid = odd_in(1, 1, 3)
    score = detector.score(grid)
    assert score.anomaly_map.shape == score.inside.shape == (6, 8)
    assert score.inside[:, :4].all() and not score.inside[:, 4:].any()
    assert not score.anomaly_map[:, 4:].any()
    nominal = detector.score(next(iter(make_frames(1, stages=TWO)))[1])
    np.testing.assert_array_equal(score.anomaly_map, nominal.anomaly_map)
    heat = detector.assess(frame, grid).heatmap
    assert (heat[:, 41:] == np.float32(detector.assess(frame, grid).scale.low)).all()


@pytest.mark.parametrize("threshold", [-2.5, 0.0])
def test_a_threshold_may_be_zero_or_below_and_be_unset_again(threshold: float) -> None:
    detector = make_detector(make_index())
    assert detector.threshold is None
    frame, grid = odd_in(0, 1, 2)
    detector.update(detector.settings.replace(threshold=threshold))
    result = detector.assess(frame, grid)
    assert detector.threshold == threshold and result.decision is Decision.ANOMALY
    detector.update(detector.settings.replace(threshold=None))
    assert detector.threshold is None
    assert detector.assess(frame, grid).decision is Decision.UNKNOWN


def test_a_live_threshold_gives_way_to_the_calibrated_one_again() -> None:
    index, settings = make_index(), Settings(target_false_alarm_rate=0.1, smoothing=0.0)
    grids = {
        name: [grid for _, grid in make_frames(6, seed, TWO)] for seed, name in enumerate("abc", 1)
    }
    embedder: Any = GivenEmbedder(TWO)
    calibration = calibrate(index, grids, settings=settings)
    detector = AnomalyDetector(index, calibration, settings=settings, embedder=embedder)
    frame, grid = odd_in(1, 1, 2)
    before = detector.assess(frame, grid)
    assert before.threshold == calibration.threshold > 0.0
    for threshold in (before.score + 1.0, before.score - 0.1, 0.0, -2.5):
        detector.update(detector.settings.replace(threshold=threshold))
        result = detector.assess(frame, grid)
        assert (result.decision is Decision.ANOMALY) == (before.score > threshold)
        assert result.threshold == result.scale.high == threshold
        assert (result.score, result.p_value) == (before.score, before.p_value)
    detector.update(detector.settings.replace(threshold=None))
    after = detector.assess(frame, grid)
    assert (after.threshold, after.scale) == (before.threshold, before.scale)
    assert after.decision is before.decision


def test_settings_that_agree_with_the_stages_resolve_to_them() -> None:
    index = make_index(STAGES)
    own = tuple(str(stage.stage.spec) for stage in index.stages)
    assert resolve_settings(Settings(), index).stages == own
    assert resolve_settings(Settings(stages=own), index).stages == own
    moved = tuple(text.replace("tiny", "copy/of/tiny") for text in own)
    assert resolve_settings(Settings(stages=moved), index).stages == moved
    assert resolve_settings(Settings(variant="combined"), index).stages == own
    assert resolve_settings(Settings(backbone="copy/of/tiny"), index).stages == moved
    layers = Settings(backbone="tiny", layers=(3, 2))
    assert resolve_settings(layers, index).stages == own


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"variant": "grid"}, "'variant'"),
        ({"input_size": 112}, "'input_size'"),
        ({"backbone": "tiny", "layers": (2,)}, "'layers'"),
        ({"stages": ("tiny layer=3 size=112",)}, "'stages'"),
    ],
)
def test_settings_that_differ_from_the_stages_are_refused(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(IndexMismatchError, match=named):
        resolve_settings(Settings(**changes), make_index(STAGES))
