"""The figures of an evaluation, from what results.json holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semantic_anomaly.errors import CalibrationError
from semantic_anomaly.evaluation import figures
from semantic_anomaly.evaluation.metrics import PixelScores, frame_rates, rate_interval
from semantic_anomaly.structures import Decision

if TYPE_CHECKING:
    from semantic_anomaly.detection.detector import AnomalyDetector

FIGURES = ("score_curve.png", "score_histogram.png", "curves.png", "calibration.png")
_TARGETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2)


def draw(
    folder: Path, detector: AnomalyDetector, results: dict[str, Any], pixels: PixelScores
) -> None:
    """Write `FIGURES`; calibration.png only where there is a calibration and nominal frames.

    Args:
        folder: of the report.
        detector: that was evaluated.
        results: what results.json will hold.
        pixels: all counted pixels.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    rows = results["frames"]
    scored = [
        figures.ScoredFrame(
            row["stamp_ns"], row["score"], row["decision"] == Decision.ANOMALY.value, _truth(row)
        )
        for row in rows
    ]
    auroc, threshold = results["frame_auroc"], detector.threshold
    title = results["dataset"] + (f": frame AUROC {auroc:.3f}" if auroc is not None else "")
    figures.score_curve(folder / "score_curve.png", scored, threshold, title)
    counted = [row for row in rows if not row["ignored"]]
    groups: dict[str, list[float]] = {"nominal": []}
    for row in counted:
        name = (row["family"] or "anomalous") if row["anomaly"] else "nominal"
        groups.setdefault(name, []).append(row["score"])
    calibration = detector.calibration
    figures.score_histogram(
        folder / "score_histogram.png",
        dict(groups),
        calibration.scores.tolist() if calibration else (),
        threshold,
        title,
    )
    figures.quality_curves(
        folder / "curves.png",
        np.array([row["score"] for row in counted]),
        np.array([row["anomaly"] for row in counted], bool),
        pixels.curves(),
        (results["tpr"], results["fpr"]),
    )
    _draw_calibration(folder / "calibration.png", detector, counted)


def _draw_calibration(path: Path, detector: AnomalyDetector, rows: list[dict[str, Any]]) -> None:
    nominal = [row for row in rows if not row["anomaly"]]
    if detector.calibration is None or not nominal:
        return
    scores = np.array([row["score"] for row in nominal])
    sequences = len({row["sequence"] for row in nominal})
    targets, realised, intervals = [], [], []
    for target in _TARGETS:
        try:
            limit = detector.calibration.threshold_for(target)
        except CalibrationError:
            # Too few frames for so small a rate: nothing was promised there.
            continue
        rate = frame_rates(scores, np.zeros(len(scores), bool), limit)[1]
        interval = rate_interval(rate, sequences)
        if rate is not None and interval is not None:
            targets.append(target)
            realised.append(rate)
            intervals.append(interval)
    if targets:
        figures.calibration_curve(path, targets, realised, intervals)


def _truth(row: dict[str, Any]) -> str | None:
    if row["ignored"]:
        return None
    return (row["kind"] or "anomaly") if row["anomaly"] else ""
