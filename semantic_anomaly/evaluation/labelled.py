"""Measure a detector on labelled images: figures in results.json, and pictures to look at."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from semantic_anomaly.evaluation import extras, figures, provenance
from semantic_anomaly.evaluation.album import Album, evenly
from semantic_anomaly.evaluation.datasets import IGNORE, FrameTruth, LabelledFolder
from semantic_anomaly.evaluation.metrics import (
    SCORE_RESOLUTION,
    PixelScores,
    frame_auroc,
    frame_rates,
    share,
)
from semantic_anomaly.evaluation.reports import report_folder, write_json
from semantic_anomaly.structures import AnomalyResult, Decision

if TYPE_CHECKING:
    from semantic_anomaly.detector import AnomalyDetector

RESULTS = "results.json"
WRITTEN = frozenset(
    {
        RESULTS,
        *("overlays", "panels", "worst"),
        *("contact_sheet.jpg", "score_curve.png", "score_histogram.png"),
    }
)
PICTURES = 20
SHEET_PICTURES = 16
_NOMINAL = ""


def evaluate(
    dataset: LabelledFolder,
    detector: AnomalyDetector,
    out: Path,
    *,
    every: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Assess every frame, write `out` as a whole, and return what results.json holds.

    Frame rates are of scores above the threshold; `localized` is the share of the anomalous frames
    with an alarm in which a localization touches the anomaly; pixel measures are of pixels inside
    the region of interest that the masks do not ignore. Measures that are not defined are None.

    Args:
        dataset: images with ground truth.
        detector: used as it stands, uncalibrated too.
        out: folder to write; an earlier report is replaced.
        every: pictures of every so manieth frame, 0 for none; None: about `PICTURES` of them.
        progress: show a progress bar on a terminal.

    Raises:
        InputError: an image or mask cannot be used, or `out` holds something else.
        MissingPackageError: scikit-learn or matplotlib is not installed.
    """
    extras.require("sklearn.metrics", "matplotlib.figure")
    with report_folder(out, RESULTS, WRITTEN) as folder:
        step = max(1, len(dataset) // PICTURES) if every is None else every
        sheet = _sheet_frames(dataset.truths)
        album = Album(
            folder, detector.region, detector.settings.overlay_alpha, step, frozenset(sheet)
        )
        rows, pixels = _assess(dataset, detector, album, progress)
        album.finish()
        results = _results(dataset, detector, rows, pixels)
        write_json(folder / RESULTS, results)
        _draw(folder, dataset, detector, rows, results)
    return results


def _assess(
    dataset: LabelledFolder, detector: AnomalyDetector, album: Album, progress: bool
) -> tuple[list[dict[str, Any]], dict[tuple[str, str], PixelScores]]:
    """Return one row a frame, and pixel scores by kind and family, nominal frames by themselves."""
    rows: list[dict[str, Any]] = []
    pixels: dict[tuple[str, str], PixelScores] = defaultdict(PixelScores)
    detector.reset()
    bar = tqdm(dataset, "evaluate", len(dataset), unit="frame", disable=None if progress else True)
    for number, (frame, truth, mask) in enumerate(bar):
        if number == 0:
            # The first frame pays for what is made once, and would be the slowest.
            detector.detect(frame)
            detector.reset()
        result = detector.detect(frame)
        if truth.has_pixels:
            counted = (mask != IGNORE) & detector.region.pixel_mask(frame.image_hw)
            group = (truth.kind or "?", truth.family or "?") if truth.anomaly else (_NOMINAL, "")
            pixels[group].add(result.heatmap[counted], mask[counted] == 1)
        rows.append(_row(truth, result, frame.stamp_ns, mask))
        album.add(
            number,
            frame,
            result,
            stem=Path(truth.file).stem,
            caption=_caption(truth, result, rows[-1]["localized"]),
            mask=mask,
            rank=_rank(truth, result),
        )
    return rows, pixels


def _row(
    truth: FrameTruth, result: AnomalyResult, stamp_ns: int, mask: np.ndarray
) -> dict[str, Any]:
    found = truth.anomaly and truth.has_pixels and result.decision is Decision.ANOMALY
    return {
        "name": truth.file,
        "stamp_ns": stamp_ns,
        "score": result.score,
        "p_value": result.p_value,
        "decision": result.decision.value,
        "anomaly": truth.anomaly,
        "ignored": truth.ignored,
        "kind": truth.kind,
        "family": truth.family,
        # An alarm for another reason than the anomaly is luck.
        "localized": bool(result.label_map[mask == 1].any()) if found else None,
        "ms": {stage: round(ms, 3) for stage, ms in result.stage_ms.items()},
    }


def _results(
    dataset: LabelledFolder,
    detector: AnomalyDetector,
    rows: list[dict[str, Any]],
    pixels: dict[tuple[str, str], PixelScores],
) -> dict[str, Any]:
    counted = [row for row in rows if not row["ignored"]]
    scores = np.array([row["score"] for row in counted], np.float64)
    anomalous = np.array([row["anomaly"] for row in counted], bool)
    tpr, fpr = frame_rates(scores, anomalous, detector.threshold)
    alarms = np.array([float(row["decision"] == Decision.ANOMALY.value) for row in counted])
    confirmed = None if detector.threshold is None else 0.5
    alarm_tpr, alarm_fpr = frame_rates(alarms, anomalous, confirmed)
    every_pixel = sum(pixels.values(), PixelScores()).metrics()
    calibration = detector.calibration
    by_hand = detector.settings.threshold > 0.0
    return {
        "dataset": dataset.name,
        "frame_auroc": frame_auroc(scores, anomalous),
        "tpr": tpr,
        "fpr": fpr,
        "alarm_tpr": alarm_tpr,
        "alarm_fpr": alarm_fpr,
        "localized": share([row["localized"] for row in counted if row["localized"] is not None]),
        "target_false_alarm_rate": detector.settings.target_false_alarm_rate
        if calibration and not by_hand
        else None,
        "threshold": detector.threshold,
        "threshold_from": "setting" if by_hand else "calibration" if calibration else None,
        "calibration": {"frames": calibration.count, "warnings": list(calibration.warnings)}
        if calibration
        else None,
        "pixel_ap": every_pixel.average_precision,
        "pixel_auroc": every_pixel.auroc,
        "pixel_fpr95": every_pixel.fpr95,
        "pixels": {
            "anomalous": every_pixel.anomalous,
            "normal": every_pixel.normal,
            "region": "whole image" if detector.region.is_whole_image else "region of interest",
            "score_resolution": SCORE_RESOLUTION,
            "frames_without_truth": sum(not truth.has_pixels for truth in dataset.truths),
        },
        "frames_counted": len(counted),
        "frames_anomalous": int(anomalous.sum()),
        "frames_ignored": len(rows) - len(counted),
        "by_kind": _by(0, "kind", counted, pixels, detector.threshold),
        "by_family": _by(1, "family", counted, pixels, detector.threshold),
        "latency_ms": latencies(row["ms"] for row in rows),
        **provenance.describe(detector),
        "frames": rows,
    }


def _by(
    part: int,
    key: str,
    rows: list[dict[str, Any]],
    pixels: dict[tuple[str, str], PixelScores],
    threshold: float | None,
) -> dict[str, dict[str, Any]]:
    """Return measures of each kind or family of anomaly against all nominal frames."""
    nominal = [row["score"] for row in rows if not row["anomaly"]]
    nominal_pixels = pixels.get((_NOMINAL, ""), PixelScores())
    found = {}
    for name in dict.fromkeys(row[key] for row in rows if row["anomaly"] and row[key]):
        met = [row["score"] for row in rows if row["anomaly"] and row[key] == name]
        scores = np.array([*met, *nominal], np.float64)
        anomalous = np.arange(len(scores)) < len(met)
        own = (group for labels, group in pixels.items() if labels[part] == name)
        found[name] = {
            "frames": len(met),
            "tpr": frame_rates(scores, anomalous, threshold)[0],
            "auroc": frame_auroc(scores, anomalous),
            "pixel_ap": sum(own, nominal_pixels).metrics().average_precision,
        }
        if key == "kind":
            families = {row["family"] for row in rows if row["kind"] == name}
            found[name]["family"] = families.pop() if len(families) == 1 else None
    return found


def latencies(stages: Any) -> dict[str, dict[str, float]]:
    """Return median and 95th percentile of milliseconds by stage.

    Args:
        stages: iterable of milliseconds by stage, one a frame.
    """
    by_stage: dict[str, list[float]] = defaultdict(list)
    for row in stages:
        for stage, ms in row.items():
            by_stage[stage].append(ms)
    return {
        stage: {f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 95)}
        for stage, values in by_stage.items()
    }


def _sheet_frames(truths: list[FrameTruth]) -> list[int]:
    """Return frames for the contact sheet: half of them anomalous, where there are so many."""
    anomalous = [i for i, truth in enumerate(truths) if truth.anomaly]
    nominal = [i for i, truth in enumerate(truths) if not truth.anomaly]
    half = SHEET_PICTURES // 2
    first = evenly(anomalous, max(half, SHEET_PICTURES - len(nominal)))
    return sorted([*first, *evenly(nominal, SHEET_PICTURES - len(first))])


def _rank(truth: FrameTruth, result: AnomalyResult) -> tuple[str, float] | None:
    if truth.ignored:
        return None
    return ("lowest_anomaly", -result.score) if truth.anomaly else ("highest_nominal", result.score)


def _caption(truth: FrameTruth, result: AnomalyResult, localized: bool | None) -> str:
    if truth.ignored:
        label, verdict = "ignored", ""
    elif truth.anomaly:
        label = f"anomaly ({truth.kind})" if truth.kind else "anomaly"
        alarm = "ALARM FOR SOMETHING ELSE" if localized is False else "FOUND"
        verdict = {Decision.ANOMALY: alarm, Decision.NOMINAL: "MISSED"}.get(result.decision, "")
    else:
        label = "nominal"
        verdict = "FALSE ALARM" if result.decision is Decision.ANOMALY else ""
    return f"{truth.file}   truth: {label}   score {result.score:.3f}   {verdict}".rstrip()


def _draw(
    folder: Path,
    dataset: LabelledFolder,
    detector: AnomalyDetector,
    rows: list[dict[str, Any]],
    results: dict[str, Any],
) -> None:
    def truth_of(row: dict[str, Any]) -> str | None:
        if row["ignored"]:
            return None
        return (row["kind"] or "anomaly") if row["anomaly"] else ""

    scored = [
        figures.ScoredFrame(
            row["stamp_ns"],
            row["score"],
            row["decision"] == Decision.ANOMALY.value,
            truth_of(row),
        )
        for row in rows
    ]
    auroc = results["frame_auroc"]
    title = dataset.name + (f": frame AUROC {auroc:.3f}" if auroc is not None else "")
    threshold = detector.threshold
    figures.score_curve(folder / "score_curve.png", scored, threshold, title)
    groups: dict[str, list[float]] = {"nominal": []}
    for row in rows:
        if not row["ignored"]:
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
