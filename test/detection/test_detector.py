"""The composition: what is odd is found at its place, and nothing odd passes in silence."""

from __future__ import annotations

import numpy as np
import pytest
from worlds.colours import IMAGE_HW, LEFT_HALF, ODD_BOX, PATCH, make_detector, said, street

from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.detection.filters import reject
from semantic_anomaly.errors import ModelOutputError
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Decision, Localization, NominalExample, PatchGrid


@pytest.fixture(scope="module")
def detector() -> AnomalyDetector:
    return make_detector()


def test_odd_thing_is_found_at_its_place_and_explained(detector: AnomalyDetector) -> None:
    result = detector.detect(street(2000, odd=True))
    assert result.decision is Decision.ANOMALY and result.reason == ""
    assert result.threshold == detector.threshold is not None
    assert result.score > result.threshold and result.p_value == pytest.approx(1 / 41)
    place = result.localizations[0]
    left, top, right, bottom = place.box_xyxy
    assert np.abs(np.subtract(place.box_xyxy, ODD_BOX)).max() <= PATCH / 2 + 1
    assert left <= place.centroid_xy[0] <= right and top <= place.centroid_xy[1] <= bottom
    assert place.nearest.frame.startswith("drive/") and place.nearest.grid_hw == (9, 16)
    assert place.nearest.distance == pytest.approx(place.score, abs=1e-5)
    assert result.label_map[44, 92] == place.label == 1
    assert result.heatmap[44, 92] == pytest.approx(place.score, rel=0.05)


def test_examples_of_several_places_are_those_of_each_alone(
    detector: AnomalyDetector, rng: np.random.Generator
) -> None:
    grid = detector.embedder.embed([street(2000, odd=True).image])[0]
    rows, cols = rng.integers(0, 9, 12), rng.integers(0, 16, 12)
    together = detector.index.nearest_many(grid.features[rows, cols])
    alone = [detector.index.nearest(embedding) for embedding in grid.features[rows, cols]]
    assert [(e.frame, e.row, e.col) for e in together] == [(e.frame, e.row, e.col) for e in alone]
    distances = detector.index.exact_distances(grid.features[rows, cols], 1)
    np.testing.assert_allclose([example.distance for example in together], distances, atol=1e-6)


def test_nominal_frames_are_nominal_and_have_no_places(detector: AnomalyDetector) -> None:
    results = [detector.detect(street(seed)) for seed in range(3000, 3040)]
    alarms = [result for result in results if result.decision is Decision.ANOMALY]
    # The target is 5 %; seven of forty would happen once in 300 times.
    assert len(alarms) <= 7
    nominal = [result for result in results if result.decision is Decision.NOMINAL]
    assert all(not r.localizations and not r.label_map.any() for r in nominal)
    assert all(r.p_value is not None and r.p_value > 0.05 for r in nominal)


def test_shapes_types_and_stages(detector: AnomalyDetector) -> None:
    result = detector.detect(street(2000, odd=True))
    assert result.heatmap.shape == result.label_map.shape == IMAGE_HW
    assert result.heatmap.dtype == np.float32 and result.label_map.dtype == np.uint16
    assert set(result.stage_ms) == {"embed", "search", "localize", "total"}
    parts = sum(result.stage_ms[name] for name in ("embed", "search", "localize"))
    assert result.stage_ms["total"] == pytest.approx(parts)
    assert all(value >= 0 for value in result.stage_ms.values())


def test_scale_is_the_calibration_s(detector: AnomalyDetector) -> None:
    scales = [detector.detect(street(seed, odd)).scale for seed, odd in ((1, False), (2, True))]
    assert scales[0] == scales[1]
    assert (scales[0].low, scales[0].high) == (0.001, detector.threshold)


def test_a_frame_of_the_index_scores_about_zero(detector: AnomalyDetector) -> None:
    result = detector.detect(street(3))
    # dedup_distance bounds how far a stored embedding can be.
    assert result.score <= 0.001 + 1e-6 and result.p_value is not None and result.p_value > 0.9


def test_batch_of_several_sizes_equals_single_calls(detector: AnomalyDetector) -> None:
    frames = [
        street(1, odd=True),
        street(2, image_hw=(64, 96)),
        street(3),
        street(4, odd=True, image_hw=(80, 160)),
    ]
    grids = detector.embedder.embed([frame.image for frame in frames])
    together = [detector.assess(frame, grid) for frame, grid in zip(frames, grids, strict=True)]
    for frame, result in zip(frames, together, strict=True):
        single = detector.detect(frame)
        assert said(single) == said(result)
        np.testing.assert_array_equal(single.heatmap, result.heatmap)
    assert [r.decision.value for r in together] == ["anomaly", "nominal", "nominal", "anomaly"]


def test_uncalibrated_says_unknown_and_why() -> None:
    result = make_detector(calibrated=False).detect(street(2000, odd=True))
    assert result.decision is Decision.UNKNOWN and result.reason.startswith("uncalibrated")
    assert result.p_value is None and result.threshold is None and not result.localizations
    assert result.score > 0.1
    # The heatmap is scaled by distances inside the index: the odd patches stand out, others do not.
    assert result.scale.source == "distances inside the index"
    shown = result.scale.normalise(result.heatmap)
    assert shown[40:50, 86:98].min() > 1.0 > np.median(shown)


def test_threshold_set_by_hand_decides_with_and_without_calibration() -> None:
    bare = make_detector(calibrated=False, threshold=0.05)
    result = bare.detect(street(2000, odd=True))
    assert (result.decision, result.threshold, result.p_value) == (Decision.ANOMALY, 0.05, None)
    assert (result.scale.low, result.scale.high) == (0.0, 0.05) and result.localizations
    calibrated = make_detector(threshold=1.9).detect(street(2000, odd=True))
    assert calibrated.decision is Decision.NOMINAL and calibrated.threshold == 1.9
    assert calibrated.p_value == pytest.approx(1 / 41)


def test_what_lies_outside_the_region_of_interest_takes_no_part() -> None:
    detector = make_detector(roi=LEFT_HALF)
    result = detector.detect(street(2000, odd=True))
    assert result.decision is Decision.NOMINAL
    assert not result.heatmap[:, 65:].any()
    distances = detector.score(detector.embedder.embed([street(1).image])[0]).anomaly_map
    assert distances.shape == (9, 16) and not distances[:, 8:].any() and distances[:, :8].any()


def test_components_that_are_too_small_raise_no_alarm() -> None:
    result = make_detector(min_area_px=2000).detect(street(2000, odd=True))
    assert result.decision is Decision.NOMINAL and not result.localizations
    assert result.threshold is not None and result.score > result.threshold
    assert not result.label_map.any()


@pytest.mark.parametrize(
    ("changes", "left"),
    [({}, 1), ({"max_area": 0.001}, 0), ({"max_aspect": 2.0}, 1), ({"max_area": 0.9}, 1)],
)
def test_components_are_filtered_by_size_and_shape(changes: dict[str, float], left: int) -> None:
    result = make_detector(**changes).detect(street(2000, odd=True))
    assert len(result.localizations) == left == len(set(np.unique(result.label_map)) - {0})
    assert (result.decision is Decision.ANOMALY) == bool(left)


def test_slivers_are_left_out_unless_the_border_cuts_them() -> None:
    labels = np.zeros((60, 80), np.uint16)
    labels[10:12, 20:60], labels[30:50, 78:80] = 1, 2
    nearest = NominalExample("d/0.png", 0, 0, (1, 1), 0.1)
    boxes = (20.0, 10.0, 60.0, 12.0), (78.0, 30.0, 80.0, 50.0)
    places = tuple(
        Localization(box, (box[0], box[1]), 80 // n, 0.5, nearest, n)
        for n, box in enumerate(boxes, start=1)
    )
    inside = np.ones(labels.shape, bool)
    found, left = reject(Settings(max_aspect=4.0), labels, places, inside)
    assert {place.label for place in left} == {2} == set(np.unique(found).tolist()) - {0}


def test_confirmation_delays_the_decision_and_shows_the_excess() -> None:
    detector = make_detector(confirm_count=2, confirm_s=2.0)
    odd = [detector.detect(street(seed, odd=True)) for seed in (10, 11)]
    assert [result.decision.value for result in odd] == ["nominal", "anomaly"]
    assert odd[0].threshold is not None and odd[0].score > odd[0].threshold
    assert odd[0].p_value is not None and odd[0].p_value <= 0.05
    states = [[place.state.value for place in result.localizations] for result in odd]
    assert states[0] == ["candidate"] and "confirmed" in states[1]
    assert odd[0].localizations[0].track == odd[1].localizations[0].track == 1
    detector.reset()
    assert detector.detect(street(12, odd=True)).decision is Decision.NOMINAL


def test_backward_stamp_clears_the_confirmation() -> None:
    detector = make_detector(confirm_count=2, confirm_s=1.0)
    detector.detect(street(50, odd=True))
    assert detector.detect(street(20, odd=True)).decision is Decision.NOMINAL
    assert detector.detect(street(21, odd=True)).decision is Decision.ANOMALY


def test_not_a_number_anywhere_is_an_error_not_a_nominal_frame(
    detector: AnomalyDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = street(1)
    grid = detector.embedder.embed([frame.image])[0]
    with pytest.raises(ModelOutputError, match="patch features"):
        spoilt = grid.features.copy()
        spoilt[4, 7] = np.nan
        detector.assess(frame, PatchGrid(spoilt, grid.global_feature, IMAGE_HW))
    monkeypatch.setattr(
        detector.index, "distances", lambda e, k, **_: np.full(len(e), np.nan, np.float32)
    )
    with pytest.raises(ModelOutputError, match="NaN"):
        detector.detect(frame)


def test_embeddings_of_another_image_are_refused(detector: AnomalyDetector) -> None:
    grid = detector.embedder.embed([street(1, image_hw=(64, 96)).image])[0]
    with pytest.raises(ModelOutputError, match="drive/1"):
        detector.assess(street(1), grid)


def test_graph_search_decides_as_exact_search_does() -> None:
    detector = make_detector(frames=40, dedup_distance=0.0)
    frames = [street(seed, odd=seed % 2 == 0) for seed in range(4000, 4030)]
    answers = {}
    for search in ("exact", "graph"):
        detector.index.configure_search(search, 1)
        answers[search] = [said(detector.detect(frame)) for frame in frames]
    for exact, graph in zip(answers["exact"], answers["graph"], strict=True):
        assert graph[1] == exact[1]
        assert graph[0] == pytest.approx(exact[0], abs=1e-6)
        assert graph[2] == exact[2]
