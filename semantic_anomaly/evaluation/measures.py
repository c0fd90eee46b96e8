"""What results.json says of quality: the same measures for maps and scores of any method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from semantic_anomaly.evaluation.components import ComponentScores, SizeLimits
from semantic_anomaly.evaluation.datasets import IGNORE, FrameTruth
from semantic_anomaly.evaluation.metrics import (
    PixelScores,
    auroc_interval,
    frame_auroc,
    frame_rates,
    rate_interval,
)

Row = Mapping[str, Any]
_NOMINAL = ""


class PixelGroups:
    """Pixel scores by kind and family of anomaly, those of nominal frames by themselves."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], PixelScores] = defaultdict(PixelScores)

    def add(self, truth: FrameTruth, scores: np.ndarray, labels: np.ndarray) -> None:
        """Count the pixels of a frame; none where the truth says nothing of its pixels.

        Args:
            truth: of the frame.
            scores: (height, width) float32 in [0, 2].
            labels: (height, width) uint8, 0 normal, 1 anomaly, 255 not counted.

        Raises:
            ModelOutputError: a score that counts is not in [0, 2].
        """
        if not truth.has_pixels:
            return
        counted = labels != IGNORE
        group = (truth.kind or "?", truth.family or "?") if truth.anomaly else (_NOMINAL, "")
        self._groups[group].add(scores[counted], labels[counted] == 1)

    def all(self) -> PixelScores:
        """Return the pixels of all groups."""
        return sum(self._groups.values(), PixelScores())

    def of(self, part: int, name: str) -> PixelScores:
        """Return the pixels of nominal frames and of one kind (part 0) or family (part 1)."""
        own = (group for labels, group in self._groups.items() if labels[part] == name)
        return sum(own, self._groups.get((_NOMINAL, ""), PixelScores()))


def truth_row(truth: FrameTruth) -> dict[str, Any]:
    """Return what a row of results.json says of a frame's truth, as the measures read it."""
    return {
        "name": truth.file,
        "anomaly": truth.anomaly,
        "ignored": truth.ignored,
        "kind": truth.kind,
        "family": truth.family,
        "sequence": truth.sequence,
    }


def frame_measures(rows: Sequence[Row], threshold: float | None) -> dict[str, Any]:
    """Return AUROC and rates of frames, each with its interval over sequences.

    Args:
        rows: frames that count, with `score`, `anomaly` and `sequence`.
        threshold: of the score, None where there is none.
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
        "frame_auroc_interval": _listed(auroc_interval(scores, anomalous, names)),
        "tpr": tpr,
        "tpr_interval": _listed(rate_interval(tpr, sequences["anomalous"])),
        "fpr": fpr,
        "fpr_interval": _listed(rate_interval(fpr, sequences["nominal"])),
        "sequences": sequences,
    }


def pixel_measures(pixels: PixelGroups) -> dict[str, Any]:
    """Return the pooled pixel measures and what they are of."""
    metrics = pixels.all().metrics()
    return {
        "pixel_ap": metrics.average_precision,
        "pixel_auroc": metrics.auroc,
        "pixel_fpr95": metrics.fpr95,
        "pixels": {"anomalous": metrics.anomalous, "normal": metrics.normal},
    }


def component_measures(
    frames: Iterable[tuple[np.ndarray, np.ndarray]],
    limits: SizeLimits,
    thresholds: Mapping[str, float | None],
) -> dict[str, Any]:
    """Return the component measures at every threshold, None where there is none.

    Args:
        frames: (height, width) scores, and labels 0 normal, 1 anomaly, 255 not counted.
        limits: components that are too small to count.
        thresholds: pixels above them are anomalous; by the name that ends their measures' names.
    """
    chosen = {name: limit for name, limit in thresholds.items() if limit is not None}
    pooled = {name: ComponentScores(limits) for name in chosen}
    for scores, labels in frames if chosen else ():
        for name, limit in chosen.items():
            pooled[name].add(scores > limit, labels)
    found: dict[str, Any] = {"component_limits": asdict(limits)}
    for name in thresholds:
        metrics = pooled[name].metrics() if name in pooled else None
        for measure in ("siou", "ppv", "f1"):
            found[f"component_{measure}_{name}"] = getattr(metrics, measure, None)
        found[f"pixel_threshold_{name}"] = thresholds[name]
    return found


def by_group(
    key: str, rows: Sequence[Row], pixels: PixelGroups, threshold: float | None
) -> dict[str, dict[str, Any]]:
    """Return measures of each kind or family of anomaly against all nominal frames.

    Args:
        key: 'kind' or 'family'.
        rows: frames that count.
        pixels: of the same frames.
        threshold: of the score, None where there is none.
    """
    nominal = [row["score"] for row in rows if not row["anomaly"]]
    found = {}
    for name in dict.fromkeys(row[key] for row in rows if row["anomaly"] and row[key]):
        met = [row["score"] for row in rows if row["anomaly"] and row[key] == name]
        scores = np.array([*met, *nominal], np.float64)
        anomalous = np.arange(len(scores)) < len(met)
        own = pixels.of(0 if key == "kind" else 1, name)
        found[name] = {
            "frames": len(met),
            "tpr": frame_rates(scores, anomalous, threshold)[0],
            "auroc": frame_auroc(scores, anomalous),
            "pixel_ap": own.metrics().average_precision,
        }
        if key == "kind":
            families = {row["family"] for row in rows if row["kind"] == name}
            found[name]["family"] = families.pop() if len(families) == 1 else None
    return found


def latencies(stages: Any) -> dict[str, dict[str, float]]:
    """Return median, 95th and 99th percentile of milliseconds by stage.

    Args:
        stages: iterable of milliseconds by stage, one a frame.
    """
    by_stage: dict[str, list[float]] = defaultdict(list)
    for row in stages:
        for stage, ms in row.items():
            by_stage[stage].append(ms)
    return {
        stage: {f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 95, 99)}
        for stage, values in by_stage.items()
    }


def _listed(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
