"""Measure a detector on labelled images: figures in results.json, and pictures to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from semantic_anomaly.evaluation import extras, html, pictures, provenance
from semantic_anomaly.evaluation.album import Album, evenly, nearest_nominal
from semantic_anomaly.evaluation.components import ANOMALY_TRACK, SizeLimits
from semantic_anomaly.evaluation.datasets import IGNORE, FrameTruth
from semantic_anomaly.evaluation.journal import Journal, resumable_report
from semantic_anomaly.evaluation.measures import (
    PixelGroups,
    by_group,
    component_measures,
    frame_measures,
    latencies,
    pixel_measures,
    truth_row,
)
from semantic_anomaly.evaluation.metrics import SCORE_RESOLUTION, frame_rates, share
from semantic_anomaly.evaluation.published import Dataset
from semantic_anomaly.evaluation.reports import write_json
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.storage import sha256_bytes
from semantic_anomaly.structures import AnomalyResult, Decision, Frame

if TYPE_CHECKING:
    from semantic_anomaly.detection.detector import AnomalyDetector
    from semantic_anomaly.evaluation.protocols import Reference, SelfNominal

RESULTS, MAPS = "results.json", "maps"
WRITTEN = frozenset(
    {
        RESULTS,
        *("overlays", "panels", "worst", MAPS),
        *("contact_sheet.jpg", *pictures.FIGURES, html.NAME),
    }
)
PICTURES = 20
SHEET_PICTURES = 16


def evaluate(
    dataset: Dataset,
    detector: AnomalyDetector,
    out: Path,
    *,
    protocol: Reference | SelfNominal | None = None,
    every: int | None = None,
    limits: SizeLimits = ANOMALY_TRACK,
    save_maps: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Assess every frame, write `out` as a whole, and return what results.json holds.

    Stopped or killed, it goes on from the last frame that was done when it is called again.

    Frame rates are of scores above the threshold; `localized` is the share of the anomalous frames
    with an alarm in which a localization touches the anomaly; pixel measures are of pixels inside
    the region of interest that the masks do not ignore, component measures are at the benchmark's
    oracle threshold and at the calibrated one. Measures that are not defined are None.

    Args:
        dataset: images with ground truth.
        detector: used as it stands, uncalibrated too.
        out: folder to write; an earlier report is replaced.
        protocol: has a detector for every frame, of which `detector` is one; None: drive.
        every: pictures of every so manieth frame, 0 for none; None: about `PICTURES` of them.
        limits: components that are too small to count.
        save_maps: keep `maps/<stem>.npy`, (height, width) float32 patch distances at every pixel.
        progress: show a progress bar on a terminal.

    Raises:
        InputError: an image or mask cannot be used, or `out` holds something else.
        MissingPackageError: a package of the extra [report] is not installed.
    """
    extras.require("sklearn.metrics", "scipy.stats", "matplotlib.figure", "jinja2")
    step = max(1, len(dataset) // PICTURES) if every is None else every
    named = {
        "protocol": protocol.name if protocol else "drive",
        "protocol_detail": protocol.detail if protocol else {},
    }
    made = provenance.describe(detector)
    key = {
        **{"data": provenance.files_state(dataset.path), "pictures": step, **named, **made},
        "frames": [truth.file for truth in dataset.truths],
    }
    with resumable_report(out, RESULTS, WRITTEN, key) as journal:
        folder = journal.folder
        album = Album(
            *(folder, detector.region, detector.settings.overlay_alpha, step),
            frozenset(_sheet_frames(dataset.truths)),
        )
        _assess(dataset, detector, protocol, album, journal, progress)
        album.finish()
        pixels = PixelGroups()
        for truth, heatmap, labels in _maps(folder / MAPS, dataset, detector.region):
            pixels.add(truth, heatmap, labels)
        thresholds = {"oracle": pixels.all().oracle_threshold(), "calibrated": detector.threshold}
        maps = (pair[1:] for pair in _maps(folder / MAPS, dataset, detector.region))
        components = component_measures(maps, limits, thresholds)
        rows = journal.rows
        results = {**named, **_results(dataset, detector, rows, pixels, components), **made}
        results["data_sha256"] = provenance.rows_digest(rows)
        results["frames"] = rows
        if save_maps:
            journal.keep(MAPS)
        write_json(folder / RESULTS, results)
        pictures.draw(folder, detector, results, pixels.all())
        html.write_html(folder, results)
    return results


def _assess(
    dataset: Dataset,
    detector: AnomalyDetector,
    protocol: Reference | SelfNominal | None,
    album: Album,
    journal: Journal,
    progress: bool,
) -> None:
    """Record one row a frame, and write heatmaps and pictures."""
    done = len(journal.rows)
    for number, (row, truth) in enumerate(zip(journal.rows, dataset.truths, strict=False)):
        album.passed(number, truth.stem, _ranks(row))
    maps = journal.scratch(MAPS)
    groups = [protocol.group_of(truth) if protocol else 0 for truth in dataset.truths]
    hide = None if progress else True
    bar = tqdm(dataset, "evaluate", len(dataset), unit="frame", disable=hide)
    for number, (frame, truth, mask) in enumerate(bar):
        if number < done:
            continue
        if number == done or groups[number] != groups[number - 1]:
            if protocol is not None:
                detector = protocol.detector_of(truth)
            detector.reset()
            # The first frame pays for what is made once, and would be the slowest.
            detector.detect(frame)
            detector.reset()
            for row, group in zip(journal.rows, groups, strict=False):
                if group == groups[number]:
                    detector.recall(row["stamp_ns"], row["boxes"])
        result = detector.detect(frame)
        np.save(_map_file(maps, truth), result.heatmap, allow_pickle=False)
        row = _row(truth, result, frame, mask)
        album.add(
            number,
            frame,
            result,
            stem=truth.stem,
            caption=_caption(truth, result, row["localized"]),
            mask=mask,
            ranks=_ranks(row),
            nearest=partial(nearest_nominal, detector, frame),
        )
        journal.record(row)


def _row(
    truth: FrameTruth, result: AnomalyResult, frame: Frame, mask: np.ndarray
) -> dict[str, Any]:
    found = truth.anomaly and truth.has_pixels and result.decision is Decision.ANOMALY
    return {
        **truth_row(truth),
        "stamp_ns": frame.stamp_ns,
        "score": result.score,
        "p_value": result.p_value,
        "boxes": [list(place.box_xyxy) for place in result.localizations],
        "decision": result.decision.value,
        # An alarm for another reason than the anomaly is luck.
        "localized": bool(result.label_map[mask == 1].any()) if found else None,
        "ms": {stage: round(ms, 3) for stage, ms in result.stage_ms.items()},
        "sha256": sha256_bytes(frame.image.tobytes() + mask.tobytes()),
    }


def _map_file(maps: Path, truth: FrameTruth) -> Path:
    return maps / f"{truth.stem}.npy"


def _within(region: ImageRegion, mask: np.ndarray) -> np.ndarray:
    """Return the labels, 255 outside the region."""
    hw = (mask.shape[0], mask.shape[1])
    return np.where(region.pixel_mask(hw), mask, np.uint8(IGNORE))


def _maps(
    maps: Path, dataset: Dataset, region: ImageRegion
) -> Iterator[tuple[FrameTruth, np.ndarray, np.ndarray]]:
    """Yield truth, map and labels of every frame whose pixels count."""
    for truth in dataset.truths:
        if truth.has_pixels:
            heatmap = np.load(_map_file(maps, truth), allow_pickle=False)
            yield truth, heatmap, _within(region, dataset.labels(truth, heatmap.shape))


def _results(
    dataset: Dataset,
    detector: AnomalyDetector,
    rows: list[dict[str, Any]],
    pixels: PixelGroups,
    components: dict[str, Any],
) -> dict[str, Any]:
    counted = [row for row in rows if not row["ignored"]]
    anomalous = np.array([row["anomaly"] for row in counted], bool)
    alarms = np.array([float(row["decision"] == Decision.ANOMALY.value) for row in counted])
    confirmed = None if detector.threshold is None else 0.5
    alarm_tpr, alarm_fpr = frame_rates(alarms, anomalous, confirmed)
    calibration = detector.calibration
    by_hand = detector.settings.threshold > 0.0
    of_pixels = pixel_measures(pixels)
    of_pixels["pixels"] |= {
        "region": "whole image" if detector.region.is_whole_image else "region of interest",
        "score_resolution": SCORE_RESOLUTION,
        "frames_without_truth": sum(not truth.has_pixels for truth in dataset.truths),
    }
    return {
        "dataset": dataset.name,
        **frame_measures(counted, detector.threshold),
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
        **of_pixels,
        **components,
        "frames_counted": len(counted),
        "frames_anomalous": int(anomalous.sum()),
        "frames_ignored": len(rows) - len(counted),
        "by_kind": by_group("kind", counted, pixels, detector.threshold),
        "by_family": by_group("family", counted, pixels, detector.threshold),
        "latency_ms": latencies(row["ms"] for row in rows),
    }


def _sheet_frames(truths: list[FrameTruth]) -> list[int]:
    """Return frames for the contact sheet: half of them anomalous, where there are so many."""
    anomalous = [i for i, truth in enumerate(truths) if truth.anomaly]
    nominal = [i for i, truth in enumerate(truths) if not truth.anomaly]
    half = SHEET_PICTURES // 2
    first = evenly(anomalous, max(half, SHEET_PICTURES - len(nominal)))
    return sorted([*first, *evenly(nominal, SHEET_PICTURES - len(first))])


def _ranks(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    if row["ignored"]:
        return []
    if row["anomaly"]:
        return [("lowest_anomaly", -row["score"]), ("highest_anomaly", row["score"])]
    return [("highest_nominal", row["score"])]


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
