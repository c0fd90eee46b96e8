"""How well scores tell anomalous frames and pixels from nominal ones.

Measures that are not defined, such as an AUROC without anomalies, are None. Pixel measures follow
SegmentMeIfYouCan (Chan et al. 2021): average precision, and the false-positive rate at 95 % recall.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from semantic_anomaly.errors import ModelOutputError
from semantic_anomaly.evaluation import extras

# Distances lie in [0, 2]; two that differ by less than 2e-6 count as equal.
SCORE_RESOLUTION = 2.0**-19
_BINS = int(2.0 / SCORE_RESOLUTION) + 1
RECALL = 0.95
CONFIDENCE = 0.95


def frame_auroc(scores: np.ndarray, anomalous: np.ndarray) -> float | None:
    """Return how often an anomalous frame scores above a nominal one, ties counting half.

    Args:
        scores: (n,) frame scores, higher is more anomalous.
        anomalous: (n,) bool.
    """
    anomalous = np.asarray(anomalous, bool)
    if anomalous.all() or not anomalous.any():
        return None
    return float(extras.load("sklearn.metrics").roc_auc_score(anomalous, scores))


def frame_rates(
    scores: np.ndarray, anomalous: np.ndarray, threshold: float | None
) -> tuple[float | None, float | None]:
    """Return the shares of anomalous and of nominal frames whose score exceeds the threshold.

    Args:
        scores: (n,) frame scores.
        anomalous: (n,) bool.
        threshold: None where there is none.

    Returns:
        True- and false-positive rate; None without a threshold or without such frames.
    """
    if threshold is None:
        return None, None
    above = np.asarray(scores) > threshold
    anomalous = np.asarray(anomalous, bool)
    return share(above[anomalous]), share(above[~anomalous])


def rate_interval(
    rate: float | None, sequences: int, confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Return the interval of Clopper and Pearson (1934) of a share of frames.

    Frames of one sequence resemble each other, so that it is sequences that count as trials: a
    share of n sequences, whole or not, has the quantiles of the beta distribution.

    Args:
        rate: share of frames in [0, 1], None where there is none.
        sequences: sequences that the frames come from.
        confidence: probability with which such intervals hold the truth.
    """
    if rate is None or sequences < 1:
        return None
    beta = extras.load("scipy.stats").beta
    hits, tail = rate * sequences, (1 - confidence) / 2
    low = 0.0 if rate == 0 else float(beta.ppf(tail, hits, sequences - hits + 1))
    high = 1.0 if rate == 1 else float(beta.ppf(1 - tail, hits + 1, sequences - hits))
    return low, high


def auroc_interval(
    scores: np.ndarray,
    anomalous: np.ndarray,
    sequences: Sequence[str],
    *,
    seed: int = 0,
    draws: int = 500,
    confidence: float = CONFIDENCE,
) -> tuple[float, float] | None:
    """Return quantiles of the AUROC over sequences drawn with replacement (cluster bootstrap).

    Args:
        scores: (n,) frame scores.
        anomalous: (n,) bool.
        sequences: (n,) names of the sequences that the frames come from.
        seed: of the draws.
        draws: number of draws.
        confidence: as above.

    Returns:
        None where the AUROC is not defined, or where there is a single sequence.
    """
    scores, anomalous = np.asarray(scores), np.asarray(anomalous, bool)
    names, number = np.unique(np.asarray(sequences), return_inverse=True)
    if len(names) < 2 or frame_auroc(scores, anomalous) is None:
        return None
    members = [np.flatnonzero(number == i) for i in range(len(names))]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        rows = np.concatenate([members[i] for i in rng.integers(len(names), size=len(names))])
        value = frame_auroc(scores[rows], anomalous[rows])
        if value is not None:
            found.append(value)
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail]) if found else (0.0, 1.0)
    return float(low), float(high)


def share(flags: Sequence[bool] | np.ndarray) -> float | None:
    """Return the share of flags that are set, None where there are none."""
    return float(np.mean(flags)) if len(flags) else None


@dataclass(frozen=True)
class PixelMetrics:
    """What pixel scores are worth; None where there are no anomalous or no normal pixels.

    Attributes:
        average_precision: sum over thresholds of precision times gained recall, no interpolation.
        auroc: how often an anomalous pixel scores above a normal one, ties counting half.
        fpr95: least false-positive rate with which 95 % of the anomalous pixels are found.
        anomalous, normal: numbers of pixels.
    """

    average_precision: float | None
    auroc: float | None
    fpr95: float | None
    anomalous: int
    normal: int


class PixelScores:
    """Scores of any number of labelled pixels in bounded memory: 16 MB, however many there are.

    All pixels are counted, none is sampled; scores are rounded to `SCORE_RESOLUTION`.
    """

    def __init__(self) -> None:
        self._counts = np.zeros((2, _BINS), np.int64)

    def add(self, scores: np.ndarray, anomalous: np.ndarray) -> None:
        """Count pixels.

        Args:
            scores: (n,) float32 in [0, 2].
            anomalous: (n,) bool.

        Raises:
            ModelOutputError: a score is not finite or not in [0, 2].
        """
        # NaN fails both comparisons.
        if not np.all((scores >= 0.0) & (scores <= 2.0)):
            raise ModelOutputError("pixel scores: expected finite numbers in [0, 2]")
        bins = np.rint(scores * np.float32(1.0 / SCORE_RESOLUTION)).astype(np.int32)
        for label in (0, 1):
            chosen = bins[anomalous == bool(label)]
            if len(chosen):
                self._counts[label] += np.bincount(chosen, minlength=_BINS)

    def __add__(self, other: PixelScores) -> PixelScores:
        total = PixelScores()
        total._counts = self._counts + other._counts
        return total

    def curves(self, points: int = 400) -> dict[str, np.ndarray]:
        """Return the precision over recall for drawing, empty where it is not defined.

        Args:
            points: most points, >= 2.

        Returns:
            `recall`, rising, and `precision`: (n,) float64 in [0, 1] each.
        """
        normal, anomalous = (int(n) for n in self._counts.sum(axis=1))
        if not normal or not anomalous:
            return {"recall": np.zeros(0), "precision": np.zeros(0)}
        above = self._counts[:, ::-1].cumsum(axis=1)
        recall = above[1] / anomalous
        # One point a step of recall is enough to see.
        wanted = np.searchsorted(recall, np.linspace(recall[recall > 0][0], 1.0, points))
        picked = np.unique(np.minimum(wanted, len(recall) - 1))
        return {
            "recall": recall[picked],
            "precision": above[1][picked] / above.sum(axis=0)[picked],
        }

    def oracle_threshold(self) -> float | None:
        """Return the threshold with the best pooled F1 of the pixels above it, strictly.

        It is chosen by the very labels that are measured, as SegmentMeIfYouCan does: an upper
        bound for every threshold chosen beforehand. None without anomalous pixels.
        """
        if not self._counts[1].any():
            return None
        # Pixels in bin b or above: those over b less half a bin.
        normal, anomalous = self._counts[:, ::-1].cumsum(axis=1)[:, ::-1]
        missed = self._counts[1].sum() - anomalous
        best = int(np.argmax(2 * anomalous / (2 * anomalous + normal + missed)))
        return (best - 0.5) * SCORE_RESOLUTION

    def metrics(self) -> PixelMetrics:
        """Return the measures over all pixels counted so far."""
        normal, anomalous = (int(n) for n in self._counts.sum(axis=1))
        if not normal or not anomalous:
            return PixelMetrics(None, None, None, anomalous, normal)
        sklearn = extras.load("sklearn.metrics")
        label, bins = np.nonzero(self._counts)
        score, weight = bins * SCORE_RESOLUTION, self._counts[label, bins]
        fpr, tpr, _ = sklearn.roc_curve(label, score, sample_weight=weight, drop_intermediate=False)
        return PixelMetrics(
            float(sklearn.average_precision_score(label, score, sample_weight=weight)),
            float(sklearn.roc_auc_score(label, score, sample_weight=weight)),
            float(fpr[tpr >= RECALL].min()),
            anomalous,
            normal,
        )
