"""Measures against values found by hand, and against implementations of their own definition."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import ArrayLike

from semantic_anomaly.errors import ModelOutputError
from semantic_anomaly.evaluation import metrics
from semantic_anomaly.evaluation.metrics import (
    CURVE_POINTS,
    SCORE_RESOLUTION,
    PixelScores,
    auroc_interval,
    frame_auroc,
    frame_rates,
    latencies,
    rate_interval,
)


def auroc_by_pairs(scores: np.ndarray, anomalous: np.ndarray) -> float:
    gap = scores[anomalous][:, None].astype(np.float64) - scores[~anomalous][None, :]
    return float(((gap > 0) + 0.5 * (gap == 0)).mean())


def rates_by_threshold(scores: np.ndarray, anomalous: np.ndarray) -> list[tuple[float, ...]]:
    """Return (recall, precision, false-positive rate) at every distinct score, highest first."""
    rows = []
    for threshold in sorted(set(scores.tolist()), reverse=True):
        above = scores >= threshold
        true, false = (above & anomalous).sum(), (above & ~anomalous).sum()
        rows.append((true / anomalous.sum(), true / (true + false), false / (~anomalous).sum()))
    return rows


def average_precision_by_steps(scores: np.ndarray, anomalous: np.ndarray) -> float:
    total = before = 0.0
    for recall, precision, _ in rates_by_threshold(scores, anomalous):
        total += (recall - before) * precision
        before = recall
    return total


@pytest.mark.parametrize(
    ("scores", "anomalous", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1], 1.0),  # parted
        ([0.4, 0.3, 0.2, 0.1], [0, 0, 1, 1], 0.0),  # parted the wrong way
        ([0.5, 0.5, 0.5], [0, 1, 1], 0.5),  # ties count half
        ([0.1, 0.3, 0.3, 0.9], [0, 0, 1, 1], 0.875),  # one tie of four pairs
        ([0.2, 0.1, 0.3], [1, 0, 0], 0.5),  # above one, below the other
    ],
)
def test_frame_auroc_by_hand(scores: list, anomalous: list, expected: float) -> None:
    assert frame_auroc(np.array(scores), np.array(anomalous, bool)) == pytest.approx(expected)


def test_frame_auroc_is_the_share_of_ordered_pairs(rng: np.random.Generator) -> None:
    scores, anomalous = rng.integers(0, 12, 80) / 12, rng.random(80) < 0.3
    expected = auroc_by_pairs(scores, anomalous)
    assert frame_auroc(scores, anomalous) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("anomalous", [[0, 0], [1, 1], []])
def test_frame_auroc_needs_both(anomalous: list[int]) -> None:
    assert frame_auroc(np.linspace(0, 1, len(anomalous)), np.array(anomalous, bool)) is None


@pytest.mark.parametrize(
    ("anomalous", "threshold", "expected"),
    [
        ([0, 0, 1, 1], 0.25, (1.0, 0.0)),
        ([0, 0, 1, 1], 0.3, (0.5, 0.0)),  # a score at the threshold is not above it
        ([0, 1, 0, 1], 0.15, (1.0, 0.5)),
        ([0, 0, 0, 0], 0.25, (None, 0.5)),  # nothing to find
        ([1, 1, 1, 1], 0.25, (0.5, None)),  # nothing to disturb
        ([0, 0, 1, 1], None, (None, None)),  # uncalibrated
    ],
)
def test_frame_rates(anomalous: list[int], threshold: float | None, expected: tuple) -> None:
    scores = np.array([0.1, 0.2, 0.3, 0.4])
    assert frame_rates(scores, np.array(anomalous, bool), threshold) == expected


def pixel_scores(scores: ArrayLike, anomalous: ArrayLike) -> PixelScores:
    pixels = PixelScores()
    pixels.add(np.asarray(scores, np.float32), np.asarray(anomalous, bool))
    return pixels


def test_pixel_measures_by_hand() -> None:
    # Descending: true, false, true, false, false. Precision 1 and 2/3 at the two steps.
    measures = pixel_scores([2.0, 0.875, 0.75, 0.5, 0.0], [1, 0, 1, 0, 0]).metrics()
    assert measures.average_precision == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert measures.auroc == pytest.approx(5 / 6)
    assert measures.fpr95 == pytest.approx(1 / 3)
    assert (measures.anomalous, measures.normal) == (2, 3)


def test_fpr95_takes_the_first_threshold_that_finds_95_percent() -> None:
    # 19 of 20 is 95 % exactly; the last anomalous pixel lies below every normal one.
    scores = np.array([1.0] * 19 + [0.0] + [0.5] * 4, np.float32)
    anomalous = np.arange(24) < 20
    assert pixel_scores(scores, anomalous).metrics().fpr95 == 0.0
    # With 18 of 20 above, 95 % take one more, and with it all normal pixels.
    scores[18] = 0.0
    assert pixel_scores(scores, anomalous).metrics().fpr95 == 1.0


@pytest.mark.parametrize("levels", [7, 100_000])
def test_pixel_measures_are_those_of_their_definition(
    levels: int, rng: np.random.Generator
) -> None:
    """With many ties and with next to none."""
    anomalous = rng.random(1500) < 0.08
    scores = rng.integers(0, levels, 1500) + 0.4 * levels * anomalous
    # On both sides of 0; the first bits of each number, which bins keep apart.
    scores = (np.rint(scores * 2000 / levels) - 900).astype(np.float32)
    measures = pixel_scores(scores, anomalous).metrics()
    assert measures.auroc == pytest.approx(auroc_by_pairs(scores, anomalous), abs=1e-12)
    expected = average_precision_by_steps(scores, anomalous)
    assert measures.average_precision == pytest.approx(expected, abs=1e-12)
    rates = rates_by_threshold(scores, anomalous)
    fpr95 = min(fpr for recall, _, fpr in rates if recall >= 0.95)
    assert measures.fpr95 == pytest.approx(fpr95, abs=1e-12)


def test_rounding_scores_changes_next_to_nothing(rng: np.random.Generator) -> None:
    anomalous = rng.random(4000) < 0.05
    scores = (rng.normal(-0.2, 1.0, 4000) + 1.5 * anomalous).astype(np.float32)
    measures = pixel_scores(scores, anomalous).metrics()
    expected = average_precision_by_steps(scores, anomalous)
    assert measures.average_precision == pytest.approx(expected, abs=1e-3)
    assert measures.auroc == pytest.approx(auroc_by_pairs(scores, anomalous), abs=1e-4)


def test_any_finite_score_is_counted_in_order() -> None:
    ends = [1e-30, 2.0**-60, 1e-9, 0.5, 0.5 * (1 + 2 * SCORE_RESOLUTION), 1.0, 9e9, 2.0**39.9]
    scores = np.array([-x for x in ends[:0:-1]] + ends, np.float32)
    assert pixel_scores(scores, np.arange(len(scores)) > 4).metrics().auroc == 1.0
    # Magnitudes below 2**-60 count as 0, those of 2**40 and above as equal.
    for equal in ([1e-30, 0.0], [-1e-30, -0.0], [2.0**40, 3e38], [-(2.0**40), -3e38]):
        assert pixel_scores(equal, [1, 0]).metrics().auroc == 0.5


@pytest.mark.parametrize(
    "score", [-3e38, -(2.0**40), -7.25, -1.0, -1e-9, -(2.0**-60), 0.0, 2.0**-60, 1.0, 7.3, 3e38]
)
def test_the_threshold_of_a_bin_parts_it_from_lower_ones(score: float) -> None:
    value = np.float32(score)
    lower = value - abs(value) * np.float32(2 * SCORE_RESOLUTION) - np.float32(1e-17)
    if value <= -(2.0**40):  # nothing is below the lowest bin
        lower = np.finfo(np.float32).min
    lower = min(lower, np.float32(2.0**39))
    threshold = pixel_scores([value, lower], [1, 0]).oracle_threshold()
    assert threshold is not None and lower <= threshold < value


def test_pixels_may_be_added_in_pieces_and_groups_summed(rng: np.random.Generator) -> None:
    scores, anomalous = rng.random(900).astype(np.float32), rng.random(900) < 0.2
    whole = pixel_scores(scores, anomalous)
    pieces = PixelScores()
    for part in np.array_split(np.arange(900), 4):
        pieces.add(scores[part], anomalous[part])
    halves = pixel_scores(scores[:400], anomalous[:400]) + pixel_scores(
        scores[400:], anomalous[400:]
    )
    assert whole.metrics() == pieces.metrics() == halves.metrics()


@pytest.mark.parametrize("anomalous", [True, False])
def test_pixel_measures_need_both(anomalous: bool) -> None:
    measures = pixel_scores([0.1, 0.2], [anomalous] * 2).metrics()
    assert (measures.average_precision, measures.auroc, measures.fpr95) == (None, None, None)
    assert measures.anomalous + measures.normal == 2


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_impossible_scores_are_refused(score: float) -> None:
    with pytest.raises(ModelOutputError, match="finite numbers"):
        pixel_scores([0.5, score], [0, 1])


@pytest.mark.parametrize(("hits", "sequences"), [(0, 8), (3, 8), (8, 8), (1, 1), (40, 200)])
def test_the_interval_of_whole_sequences_is_that_of_clopper_and_pearson(
    hits: int, sequences: int
) -> None:
    from scipy.stats import binomtest

    exact = binomtest(hits, sequences).proportion_ci(0.95, method="exact")
    assert rate_interval(hits / sequences, sequences) == pytest.approx((exact.low, exact.high))


def test_many_frames_of_few_sequences_leave_the_interval_wide() -> None:
    few, many = rate_interval(0.05, 4), rate_interval(0.05, 400)
    assert few is not None and many is not None
    assert few[0] < many[0] < 0.05 < many[1] < few[1]
    assert few[1] > 0.4
    assert rate_interval(None, 4) is None and rate_interval(0.5, 0) is None


def test_the_interval_of_the_auroc_draws_sequences(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_BOOTSTRAP_DRAWS", 50)
    drives = np.repeat([f"drive {i}" for i in range(12)], 20)
    anomalous = np.tile(np.arange(20) < 10, 12)
    # Every drive has a level of its own, so that its frames say little more than one does.
    scores = np.repeat(rng.normal(0, 1, 12), 20) + 0.5 * anomalous + rng.normal(0, 0.1, 240)
    low, high = auroc_interval(scores, anomalous, drives) or (0.0, 0.0)
    auroc = frame_auroc(scores, anomalous)
    assert auroc is not None and low < auroc < high
    assert auroc_interval(scores, anomalous, drives) == (low, high)
    by_frame = auroc_interval(scores, anomalous, [str(i) for i in range(240)]) or (0.0, 1.0)
    assert by_frame != (low, high)
    assert auroc_interval(scores, anomalous, ["one"] * 240) is None
    assert auroc_interval(scores, np.zeros(240, bool), drives) is None


def test_the_oracle_threshold_has_the_best_f1_of_what_lies_strictly_above(
    rng: np.random.Generator,
) -> None:
    def f1_above(limit: float) -> float:
        above = scores > limit
        return float(2 * (above & anomalous).sum() / (above.sum() + anomalous.sum()))

    for _ in range(20):
        anomalous = rng.random(60) < 0.3
        scores = (rng.integers(-6, 6, 60) / 8).astype(np.float32)
        threshold = pixel_scores(scores, anomalous).oracle_threshold()
        assert threshold is not None
        assert f1_above(threshold) == max(f1_above(limit) for limit in [-10.0, *scores.tolist()])
    assert pixel_scores([0.5], [0]).oracle_threshold() is None


def test_the_curve_is_precision_over_recall(rng: np.random.Generator) -> None:
    anomalous = rng.random(3000) < 0.1
    scores = (rng.integers(-900, 900, 3000) + 900 * anomalous).astype(np.float32)
    curve = pixel_scores(scores, anomalous).curves()
    assert 20 < len(curve["recall"]) <= CURVE_POINTS and curve["recall"][-1] == 1.0
    rows = {round(r, 9): p for r, p, _ in rates_by_threshold(scores, anomalous)[::-1]}
    for recall, precision in zip(curve["recall"], curve["precision"], strict=True):
        assert rows[round(float(recall), 9)] == pytest.approx(precision)
    assert len(pixel_scores(scores, anomalous & False).curves()["recall"]) == 0


def test_latencies_by_stage() -> None:
    percentiles = latencies({"embed": float(n), "total": 2.0 * n} for n in range(101))
    assert percentiles == {
        "embed": {"p50": 50.0, "p95": 95.0, "p99": 99.0},
        "total": {"p50": 100.0, "p95": 190.0, "p99": 198.0},
    }
