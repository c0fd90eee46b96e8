"""Measures of frame scores, pixel scores and latencies, and how they are pooled by group.

Measures that are not defined, such as an AUROC without anomalies, are None. Pixel measures follow
SegmentMeIfYouCan (Chan et al. 2021): average precision, and the false-positive rate at 95 % recall.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from semantic_anomaly.errors import ModelOutputError
from semantic_anomaly.evaluation import extras
from semantic_anomaly.evaluation.components import ComponentScores, SizeLimits
from semantic_anomaly.evaluation.datasets import ANOMALY, IGNORE, FrameTruth
from semantic_anomaly.evaluation.measures import COMPONENT_MEASURES

# Pixel scores are counted by sign, exponent and the first 12 of the 23 mantissa bits of float32.
_DROPPED_BITS = 23 - 12
# Two scores whose relative difference is smaller may count as equal.
SCORE_RESOLUTION = 2.0**-12
# Magnitudes below 2**-60 count as 0, those of 2**40 and above as the largest below it.
_SMALLEST, _LARGEST = (
    int(np.float32(2.0**exponent).view(np.int32)) >> _DROPPED_BITS for exponent in (-60, 40)
)
# Bins of positive scores; as many of negative ones lie below them, and one of 0 between.
_POSITIVE_BINS = _LARGEST - _SMALLEST
_BINS = 2 * _POSITIVE_BINS + 1
_RECALL = 0.95
# Probability beyond either end of a 95 % interval.
_TAIL = (1 - 0.95) / 2
_BOOTSTRAP_DRAWS = 500
CURVE_POINTS = 400
Row = Mapping[str, Any]
_NOMINAL = ("", "")


def frame_auroc(scores: np.ndarray, anomalous: np.ndarray) -> float | None:
    """Return the share of (anomalous, nominal) pairs in the right order; ties count half.

    Args:
        scores: (n,) frame scores, higher is more anomalous.
        anomalous: (n,) bool.
    """
    anomalous = np.asarray(anomalous, bool)
    if anomalous.all() or not anomalous.any():
        return None
    # The Mann-Whitney statistic: scikit-learn takes 10 ms or more, at every draw of the bootstrap.
    ranks = extras.load("scipy.stats").rankdata(scores)[anomalous]
    least = len(ranks) * (len(ranks) + 1) / 2
    return float((ranks.sum() - least) / (len(ranks) * (len(anomalous) - len(ranks))))


def frame_rates(
    scores: np.ndarray, anomalous: np.ndarray, threshold: float | None
) -> tuple[float | None, float | None]:
    """Return the shares of anomalous and of nominal frames whose score exceeds the threshold.

    Args:
        scores: (n,) frame scores.
        anomalous: (n,) bool.

    Returns:
        True- and false-positive rate; None without a threshold or without such frames.
    """
    if threshold is None:
        return None, None
    above = np.asarray(scores) > threshold
    anomalous = np.asarray(anomalous, bool)
    return share(above[anomalous]), share(above[~anomalous])


def rate_interval(rate: float | None, sequences: int) -> tuple[float, float] | None:
    """Return the 95 % Clopper-Pearson interval (1934) of a share of frames.

    Frames of one sequence are correlated, so the number of trials is the number of sequences. The
    share of n sequences need not be a whole number; the quantiles are those of the beta
    distribution.

    Returns:
        Lower and upper bound; None without a rate or a sequence.
    """
    if rate is None or sequences < 1:
        return None
    beta = extras.load("scipy.stats").beta
    hits = rate * sequences
    low = 0.0 if rate == 0 else float(beta.ppf(_TAIL, hits, sequences - hits + 1))
    high = 1.0 if rate == 1 else float(beta.ppf(1 - _TAIL, hits + 1, sequences - hits))
    return low, high


def auroc_interval(
    scores: np.ndarray, anomalous: np.ndarray, sequences: Sequence[str]
) -> tuple[float, float] | None:
    """Return the 95 % cluster-bootstrap interval of the AUROC: sequences drawn with replacement.

    Args:
        scores: (n,) frame scores.
        anomalous: (n,) bool.
        sequences: (n,) names of the sequences that the frames come from.

    Returns:
        Lower and upper bound; None when the AUROC is not defined or there is a single sequence.
    """
    if frame_auroc(scores, anomalous) is None:
        return None
    return bootstrap_interval(lambda rows: frame_auroc(scores[rows], anomalous[rows]), sequences)


def bootstrap_interval(
    measure: Callable[[np.ndarray], float | None], sequences: Sequence[str]
) -> tuple[float, float] | None:
    """Return the 95 % cluster-bootstrap interval of a measure: sequences drawn with replacement.

    Args:
        measure: of drawn rows, given as (m,) positions; None where it is not defined.
        sequences: (n,) names of the sequences that the rows come from.

    Returns:
        Lower and upper bound; None for a single sequence or when the measure is not defined.
    """
    names, number = np.unique(sequences, return_inverse=True)
    if len(names) < 2:
        return None
    members = [np.flatnonzero(number == i) for i in range(len(names))]
    rng = np.random.default_rng(0)
    values = []
    for _ in range(_BOOTSTRAP_DRAWS):
        rows = np.concatenate([members[i] for i in rng.integers(len(names), size=len(names))])
        value = measure(rows)
        if value is not None:
            values.append(value)
    if not values:
        return None
    low, high = np.quantile(values, [_TAIL, 1 - _TAIL])
    return float(low), float(high)


def share(flags: Sequence[bool] | np.ndarray) -> float | None:
    """Return the share of true flags, None without flags."""
    return float(np.mean(flags)) if len(flags) else None


@dataclass(frozen=True)
class PixelMetrics:
    """Pooled pixel measures; None without anomalous or without normal pixels.

    Attributes:
        average_precision: sum over thresholds of precision times gain of recall, no interpolation.
        auroc: area under the ROC curve; ties count half.
        fpr95: lowest false-positive rate at a recall of at least 95 %.
        anomalous, normal: numbers of pixels.
    """

    average_precision: float | None
    auroc: float | None
    fpr95: float | None
    anomalous: int
    normal: int


def _bins(scores: np.ndarray) -> np.ndarray:
    """Return the bins, (n,) int32 in [0, _BINS), of (n,) float32 scores, in the same order."""
    magnitude = np.abs(scores).view(np.int32) >> _DROPPED_BITS
    bins = np.clip(magnitude - (_SMALLEST - 1), 0, _POSITIVE_BINS)
    return _POSITIVE_BINS + np.where(scores < 0, -bins, bins)


def _threshold_below(bin_number: int) -> float:
    """Return the largest float32 below every score of a bin, and not below the bins before it.

    No finite number is below the most negative float32: it is its own threshold.
    """
    signed = bin_number - _POSITIVE_BINS
    if signed == -_POSITIVE_BINS:
        return float(np.finfo(np.float32).min)
    # A bin holds its end nearer to 0; the other end belongs to the next one.
    end = _SMALLEST + (signed - 1 if signed > 0 else -signed)
    magnitude = np.int32(end << _DROPPED_BITS).view(np.float32)
    return float(np.nextafter(magnitude, np.float32(0)) if signed > 0 else -magnitude)


class PixelScores:
    """Histograms of the scores of labelled pixels: 14 MB for any number of pixels.

    Every pixel is counted; scores are rounded by at most `SCORE_RESOLUTION` of their magnitude.
    """

    def __init__(self) -> None:
        self._counts = np.zeros((2, _BINS), np.int64)

    def add(self, scores: np.ndarray, anomalous: np.ndarray) -> None:
        """Count pixels.

        Args:
            scores: (n,) finite float32.
            anomalous: (n,) bool.

        Raises:
            ModelOutputError: a score is not finite.
        """
        scores = np.ascontiguousarray(scores, np.float32)
        if not np.isfinite(scores).all():
            raise ModelOutputError("pixel scores: expected finite numbers")
        bins = _bins(scores)
        counts = np.bincount(bins + _BINS * anomalous, minlength=2 * _BINS)
        self._counts += counts.reshape(2, _BINS)

    def __add__(self, other: PixelScores) -> PixelScores:
        total = PixelScores()
        total._counts = self._counts + other._counts
        return total

    def curves(self) -> dict[str, np.ndarray]:
        """Return the precision-recall curve for plotting, empty when it is not defined.

        Returns:
            `recall`, rising, and `precision`: (n,) float64 in [0, 1], at most `CURVE_POINTS`.
        """
        if not self._counts.any(axis=1).all():
            return {"recall": np.zeros(0), "precision": np.zeros(0)}
        above = self._counts[:, ::-1].cumsum(axis=1)
        recall = above[1] / above[1, -1]
        # One point per step of recall is enough for a plot.
        steps = np.searchsorted(recall, np.linspace(recall[recall > 0][0], 1.0, CURVE_POINTS))
        picked = np.unique(np.minimum(steps, len(recall) - 1))
        return {
            "recall": recall[picked],
            "precision": above[1][picked] / above.sum(axis=0)[picked],
        }

    def oracle_threshold(self) -> float | None:
        """Return the threshold with the highest pooled F1 of the pixels strictly above it.

        It is chosen with the test labels, as in SegmentMeIfYouCan: an upper bound for every
        threshold chosen beforehand. None without anomalous pixels.
        """
        if not self._counts[1].any():
            return None
        # A threshold below bin b keeps the pixels of bins >= b.
        occupied = np.flatnonzero(self._counts.any(axis=0))
        counts = self._counts[:, occupied]
        normal, anomalous = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
        missed = counts[1].sum() - anomalous
        best = int(np.argmax(2 * anomalous / (2 * anomalous + normal + missed)))
        return _threshold_below(int(occupied[best]))

    def metrics(self) -> PixelMetrics:
        """Return the measures over all pixels counted so far."""
        normal, anomalous = (int(n) for n in self._counts.sum(axis=1))
        if not normal or not anomalous:
            return PixelMetrics(None, None, None, anomalous, normal)
        sklearn = extras.load("sklearn.metrics")
        # The measures depend only on the order of the scores, which is that of their bins.
        label, score = np.nonzero(self._counts)
        weight = self._counts[label, score]
        fpr, tpr, _ = sklearn.roc_curve(label, score, sample_weight=weight, drop_intermediate=False)
        return PixelMetrics(
            float(sklearn.average_precision_score(label, score, sample_weight=weight)),
            float(sklearn.roc_auc_score(label, score, sample_weight=weight)),
            float(fpr[tpr >= _RECALL].min()),
            anomalous,
            normal,
        )


class PixelGroups:
    """Pixel scores by kind and family of anomaly; those of nominal frames form a group too."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], PixelScores] = defaultdict(PixelScores)

    def add(self, truth: FrameTruth, scores: np.ndarray, labels: np.ndarray) -> None:
        """Count the pixels of a frame, unless its truth has no pixel labels.

        Args:
            truth: ground truth of the frame.
            scores: (height, width) float32.
            labels: (height, width) uint8, 0 normal, 1 anomaly, 255 not counted.

        Raises:
            ModelOutputError: a counted score is not finite.
        """
        if not truth.has_pixels:
            return
        counted = labels != IGNORE
        group = (truth.kind or "?", truth.family or "?") if truth.anomaly else _NOMINAL
        self._groups[group].add(scores[counted], labels[counted] == ANOMALY)

    def all(self) -> PixelScores:
        """Return the pixels of all groups."""
        return sum(self._groups.values(), PixelScores())

    def of(self, part: int, name: str) -> PixelScores:
        """Return the pixels of nominal frames and of one kind (part 0) or family (part 1)."""
        groups = (group for key, group in self._groups.items() if key[part] == name)
        return sum(groups, self._groups.get(_NOMINAL, PixelScores()))


def truth_row(truth: FrameTruth) -> dict[str, Any]:
    """Return the ground-truth fields of a frame's row in results.json."""
    names = "anomaly", "ignored", "kind", "family", "sequence"
    row = {name: getattr(truth, name) for name in names}
    return {"name": truth.file, **row, "tags": list(truth.tags)}


def assessed(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that measures count: of frames that are not ignored and have a score.

    A bad frame, or one of a blind camera, is unknown. As a nominal frame it would raise no false
    alarm, and as an anomalous one it was not missed: it takes no part.
    """
    return [row for row in rows if not row["ignored"] and row["score"] is not None]


def frame_measures(rows: Sequence[Row], threshold: float | None) -> dict[str, Any]:
    """Return AUROC and rates of frames, each with its interval over sequences.

    Args:
        rows: counted frames, with `score`, `anomaly` and `sequence`.
    """
    scores = np.array([row["score"] for row in rows], np.float64)
    anomalous = np.array([row["anomaly"] for row in rows], bool)
    names = [row["sequence"] for row in rows]
    tpr, fpr = frame_rates(scores, anomalous, threshold)
    sequences = {
        "anomalous": len({row["sequence"] for row in rows if row["anomaly"]}),
        "nominal": len({row["sequence"] for row in rows if not row["anomaly"]}),
    }
    return {
        "frame_auroc": frame_auroc(scores, anomalous),
        "frame_auroc_interval": _as_list(auroc_interval(scores, anomalous, names)),
        "tpr": tpr,
        "tpr_interval": _as_list(rate_interval(tpr, sequences["anomalous"])),
        "fpr": fpr,
        "fpr_interval": _as_list(rate_interval(fpr, sequences["nominal"])),
        "sequences": sequences,
    }


def dataset_measures(
    rows: Sequence[Row], pixels: PixelGroups, threshold: float | None
) -> dict[str, Any]:
    """Return the measures of frames and pixels, of all and by kind and family of anomaly.

    Args:
        rows: all frames, with their `truth_row` and `score`, None for unknown ones.
        pixels: pixel scores of the same frames.
        threshold: frame score above which a frame is anomalous, or None.
    """
    counted = assessed(rows)
    metrics = pixels.all().metrics()
    return {
        **frame_measures(counted, threshold),
        "threshold": threshold,
        "pixel_ap": metrics.average_precision,
        "pixel_auroc": metrics.auroc,
        "pixel_fpr95": metrics.fpr95,
        "pixels": {"anomalous": metrics.anomalous, "normal": metrics.normal},
        "frames_counted": len(counted),
        "frames_anomalous": sum(row["anomaly"] for row in counted),
        "by_kind": _by_group("kind", counted, pixels, threshold),
        "by_family": _by_group("family", counted, pixels, threshold),
    }


def component_measures(
    frames: Iterable[tuple[np.ndarray, np.ndarray]],
    limits: SizeLimits,
    thresholds: Mapping[str, float | None],
) -> dict[str, Any]:
    """Return the component measures at every threshold, None without a threshold.

    Args:
        frames: (height, width) scores, and labels 0 normal, 1 anomaly, 255 not counted.
        limits: minimum sizes of components.
        thresholds: pixel thresholds by the suffix of their measures' keys.
    """
    chosen = {name: threshold for name, threshold in thresholds.items() if threshold is not None}
    pooled = {name: ComponentScores(limits) for name in chosen}
    for scores, labels in frames if chosen else ():
        for name, threshold in chosen.items():
            pooled[name].add(scores > threshold, labels)
    measures: dict[str, Any] = {"component_limits": asdict(limits)}
    for name in thresholds:
        metrics = pooled[name].metrics() if name in pooled else None
        for measure in COMPONENT_MEASURES:
            measures[f"component_{measure}_{name}"] = getattr(metrics, measure, None)
        measures[f"pixel_threshold_{name}"] = thresholds[name]
    return measures


def _by_group(
    key: str, rows: Sequence[Row], pixels: PixelGroups, threshold: float | None
) -> dict[str, dict[str, Any]]:
    """Return measures of each kind or family of anomaly against all nominal frames."""
    nominal = [row["score"] for row in rows if not row["anomaly"]]
    groups = {}
    for name in dict.fromkeys(row[key] for row in rows if row["anomaly"] and row[key]):
        members = [row for row in rows if row["anomaly"] and row[key] == name]
        scores = np.array([*(row["score"] for row in members), *nominal], np.float64)
        anomalous = np.arange(len(scores)) < len(members)
        groups[name] = {
            "frames": len(members),
            "tpr": frame_rates(scores, anomalous, threshold)[0],
            "auroc": frame_auroc(scores, anomalous),
            "pixel_ap": pixels.of(0 if key == "kind" else 1, name).metrics().average_precision,
        }
        if key == "kind":
            families = {row["family"] for row in rows if row["kind"] == name}
            groups[name]["family"] = families.pop() if len(families) == 1 else None
    return groups


def latencies(stages: Iterable[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return median, 95th and 99th percentile by stage, of milliseconds by stage of each frame."""
    by_stage: dict[str, list[float]] = defaultdict(list)
    for row in stages:
        for stage, ms in row.items():
            by_stage[stage].append(ms)
    return {
        stage: {f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 95, 99)}
        for stage, values in by_stage.items()
    }


def _as_list(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
