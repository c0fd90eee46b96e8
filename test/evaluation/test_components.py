"""Component measures: hand-computed cases, and an independent implementation by sets of pixels."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.components import (
    ANOMALY_TRACK,
    OBSTACLE_TRACK,
    TAUS,
    ComponentScores,
    SizeLimits,
)

ALL = SizeLimits(predicted_px=0, truth_px=0)


def drawn(*rows: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a drawing: '.' nothing, 'a' anomaly missed, 'p' false prediction, 'b' both, '?' ignore,
    '!' prediction on ignored pixels."""
    letters = np.array([list(row) for row in rows])
    labels = np.zeros(letters.shape, np.uint8)
    labels[np.isin(letters, ["a", "b"])] = 1
    labels[np.isin(letters, ["?", "!"])] = 255
    return np.isin(letters, ["p", "b", "!"]), labels


def measured(*rows: str, limits: SizeLimits = ALL):
    scores = ComponentScores(limits)
    scores.add(*drawn(*rows))
    return scores.metrics()


def by_sets(images, limits: SizeLimits):
    """The measures again, from their definition, with sets of pixels and a flood fill."""

    def components(mask):
        left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
        groups = []
        while left:
            edge, group = [left.pop()], set()
            while edge:
                y, x = edge.pop()
                group.add((y, x))
                near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
                left -= near
                edge += near
            groups.append(group)
        return groups

    siou, ppv = [], []
    for predicted, labels in images:
        anomalies = components(labels == 1)
        ignored = {(int(y), int(x)) for y, x in np.argwhere(labels == 255)}
        for group in [g for g in anomalies if len(g) < limits.truth_px]:
            ignored |= group
        anomalies = [g for g in anomalies if len(g) >= limits.truth_px]
        predictions = components(predicted & (labels != 255))
        predictions = [g - ignored for g in predictions if len(g) >= limits.predicted_px]
        predictions = [g for g in predictions if g]
        for anomaly in anomalies:
            met = set().union(*(g for g in predictions if g & anomaly))
            others = set().union(*(g for g in anomalies if g is not anomaly))
            siou.append(len(anomaly & met) / len((anomaly | met) - (others & met)))
        everything = set().union(*anomalies)
        ppv += [len(g & everything) / len(g) for g in predictions]
    scores = []
    for tau in TAUS:
        true = sum(v >= tau - 1e-12 for v in siou)
        false = sum(v < tau - 1e-12 for v in ppv)
        scores.append(2 * true / max(true + len(siou) + false, 1))
    return np.mean(siou), np.mean(ppv), np.mean(scores), len(siou), len(ppv)


@pytest.mark.parametrize(
    ("rows", "siou", "ppv", "f1", "counts"),
    [
        # Perfect.
        (("......", ".bb...", ".bb...", "......"), 1.0, 1.0, 1.0, (1, 1)),
        # Half of an anomaly. sIoU 2/4: found for tau .25 to .50, six of eleven, else missed.
        ((".bbaa.",), 0.5, 1.0, 6 / 11, (1, 1)),
        # Half beside. Intersection 2, union 4. tau <= .5: found, none false; above: F1 0.
        (("bbpp..",), 0.5, 0.5, 6 / 11, (1, 1)),
        # One prediction of 5 px over two anomalies of 2 px is not held against either. Union with
        # the first: 2 + 5 - 2 = 5, less 2 px of the other: 3. tau .25 to .65, nine of eleven, find
        # both; .70 and .75 miss both.
        (("bbpbb",), 2 / 3, 4 / 5, 9 / 11, (2, 1)),
        # Two predictions on one anomaly count together; a third is beside.
        # tau <= .65: F1 2/3; above: 0.
        (("bab.pp",), 2 / 3, 2 / 3, 9 / 11 * 2 / 3, (1, 3)),
        # Diagonal neighbours are one component.
        (("b..", ".b.", "..a"), 2 / 3, 1.0, 9 / 11, (1, 1)),
        # Predictions are cut to the labelled area before components are formed.
        (("pp!!pp", "......", "bb!!.."), 1.0, 1 / 3, 2 / 4, (1, 3)),
        # Nothing to divide by.
        (("....",), None, None, None, (0, 0)),
        (("aa..",), 0.0, None, 0.0, (1, 0)),
        (("..pp",), None, 0.0, 0.0, (0, 1)),
        (("??!!",), None, None, None, (0, 0)),
    ],
)
def test_measures_by_hand(rows, siou, ppv, f1, counts) -> None:
    result = measured(*rows)
    assert (result.siou, result.ppv, result.f1) == pytest.approx((siou, ppv, f1))
    assert (result.anomalies, result.predictions) == counts


def test_small_anomalies_are_ignored_with_the_predictions_on_them() -> None:
    limits = SizeLimits(predicted_px=0, truth_px=3)
    result = measured("bb....", "......", "..bbbb", limits=limits)
    assert (result.anomalies, result.predictions) == (1, 1)
    assert (result.siou, result.ppv) == (1.0, 1.0)
    # What such a prediction covers beside the ignored anomaly counts.
    assert measured("bbpp..", limits=limits).ppv == 0.0


def test_small_predictions_are_dropped() -> None:
    limits = SizeLimits(predicted_px=3, truth_px=0)
    result = measured("pp..bb", limits=limits)
    assert (result.anomalies, result.predictions) == (1, 0)
    assert result.siou == 0.0 and result.ppv is None and result.f1 == 0.0


def test_images_are_pooled_by_component_and_not_averaged() -> None:
    scores = ComponentScores(ALL)
    scores.add(*drawn("bb....", "......", "bb...."))
    scores.add(*drawn("aa...."))
    result = scores.metrics()
    assert result.siou == pytest.approx(2 / 3)
    assert result.f1 == pytest.approx(2 * 2 / (2 * 2 + 1))


@pytest.mark.parametrize("limits", [ALL, SizeLimits(6, 4), SizeLimits(2, 9)])
def test_an_independent_implementation_agrees(limits: SizeLimits) -> None:
    rng = np.random.default_rng(3)
    images = []
    for _ in range(12):
        shape = (30, 40)
        blobs = [np.zeros(shape, bool) for _ in range(3)]
        for blob in blobs:
            for _ in range(int(rng.integers(0, 9))):
                y, x = rng.integers(0, shape[0]), rng.integers(0, shape[1])
                h, w = rng.integers(1, 9, 2)
                blob[y : y + h, x : x + w] = True
        labels = blobs[0].astype(np.uint8)
        labels[blobs[1] & (rng.random(shape) < 0.9)] = 255
        images.append((blobs[2] | (blobs[0] & (rng.random(shape) < 0.7)), labels))
    scores = ComponentScores(limits)
    for predicted, labels in images:
        scores.add(predicted, labels)
    result = scores.metrics()
    expected = by_sets(images, limits)
    assert (result.anomalies, result.predictions) == expected[3:]
    assert result.anomalies > 5 and result.predictions > 10
    assert (result.siou, result.ppv, result.f1) == pytest.approx(expected[:3], abs=1e-12)


def test_the_limits_are_those_of_the_benchmark() -> None:
    assert (ANOMALY_TRACK.predicted_px, ANOMALY_TRACK.truth_px) == (500, 100)
    assert (OBSTACLE_TRACK.predicted_px, OBSTACLE_TRACK.truth_px) == (50, 10)


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="0 px or more"):
        SizeLimits(-1, 0)
