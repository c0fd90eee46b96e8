"""Measure a detector on labelled images: results.json, pictures and report.html."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from semantic_anomaly.calibration.leakage import is_seen, refuse_seen
from semantic_anomaly.detection.detector import AnomalyDetector, load_detector
from semantic_anomaly.errors import CalibrationError, InputError
from semantic_anomaly.evaluation import extras, figures, provenance, report
from semantic_anomaly.evaluation.checkpoint import (
    Checkpoint,
    SkippedFrames,
    bad_row,
    losses_of,
    refuse_full_disk,
    refuse_other_content,
    restore,
    result_row,
    resumable_report,
    score_text,
    temporary_checkpoint,
    write_json,
)
from semantic_anomaly.evaluation.components import ANOMALY_TRACK, SizeLimits
from semantic_anomaly.evaluation.datasets import ANOMALY, IGNORE, FrameTruth
from semantic_anomaly.evaluation.layouts import Dataset, open_dataset
from semantic_anomaly.evaluation.metrics import (
    SCORE_RESOLUTION,
    PixelGroups,
    assessed,
    component_measures,
    dataset_measures,
    frame_rates,
    latencies,
    share,
    truth_row,
)
from semantic_anomaly.evaluation.protocols import Reference, SelfNominal
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.sources import BadFrame
from semantic_anomaly.offline.drives import settings_of
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.settings import Settings
from semantic_anomaly.storage import sha256_bytes
from semantic_anomaly.structures import AnomalyResult, Decision, Frame

if TYPE_CHECKING:
    from semantic_anomaly.embedding.identity import Embedder

RESULTS, MAPS = "results.json", "maps"
_PICTURES = "overlays", "panels", "worst", "contact_sheet.jpg"
WRITTEN = frozenset({RESULTS, MAPS, *_PICTURES, *figures.FIGURES, report.NAME})
PICTURES = 20
SHEET_PICTURES = 16


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The measures of a detector on labelled frames.

    Example:
        >>> evaluation = evaluate("index", "labelled")
        >>> evaluation["frame_auroc"], evaluation["pixel_ap"]

    Attributes:
        results: content of results.json: measures, provenance and one row a frame. Measures that
            are not defined are None.
        out: folder of the report, None if none was written.
    """

    results: dict[str, Any]
    out: Path | None = None

    def __getitem__(self, name: str) -> Any:
        return self.results[name]


def evaluate(
    detector: AnomalyDetector | NominalIndex | Reference | SelfNominal | str | Path,
    source: Dataset | str | Path,
    *,
    settings: Settings | None = None,
    camera: str | None = None,
    layout: str = "",
    out: str | Path | None = None,
    every: int | None = None,
    limits: SizeLimits = ANOMALY_TRACK,
    save_maps: bool = False,
    allow_seen: bool = False,
    embedder: Embedder | None = None,
    progress: bool = False,
    **overrides: Any,
) -> Evaluation:
    """Score every frame of a labelled dataset and compare with its ground truth.

    Frame rates count scores above the threshold. `localized` is the share of anomalous frames with
    an alarm in which a localization overlaps the anomaly. Pixel measures count the pixels inside
    the region of interest that the masks do not ignore. Component measures are given at the
    benchmark's oracle threshold and at the calibrated one.

    Frames that cannot be decoded, up to `MAX_BAD_SHARE`, and those of a blind camera are unknown:
    they are named or counted, and take no part in the measures. Tracks end with a drive.

    With `out`, an interrupted run is resumed by the same call.

    Args:
        detector: a detector, an index (uncalibrated), an index folder (with its calibration), or a
            protocol that builds its own indexes.
        source: labelled folder or opened dataset.
        settings: for an index or index folder; None: all defaults.
        camera: one of the cameras of the settings; None: the first.
        layout: layout of a labelled folder, as in `open_dataset`.
        out: folder to write; an earlier report is replaced. None: nothing is written.
        every: write pictures of every n-th frame, 0 for none; None: of about `PICTURES` frames.
        limits: minimum sizes of components.
        save_maps: keep `maps/<stem>.npy`, (height, width) float32 anomaly maps at full resolution.
        allow_seen: evaluate frames that the index was built from; the report warns of them.
        embedder: already loaded, for an index or index folder.
        progress: show a progress bar on a terminal.
        **overrides: values of single settings, for an index or index folder.

    Raises:
        InputError: a mask or too many images cannot be used, or `out` holds something else.
        CalibrationError: the index was built from one of the frames.
        MissingPackageError: a package of the extra [report] is not installed.
    """
    extras.require("sklearn.metrics", "scipy.stats")
    if out is not None:
        extras.require("matplotlib.figure", "jinja2")
        out = Path(out)
        refuse_other_content(out, RESULTS, WRITTEN)
    elif save_maps:
        raise InputError("save_maps: expected a folder 'out', found none")
    dataset = open_dataset(source, layout, progress) if isinstance(source, str | Path) else source
    protocol = None
    if isinstance(detector, Reference | SelfNominal):
        protocol = detector
        detector = protocol.detector_of(dataset.truths[0])
    elif not isinstance(detector, AnomalyDetector):
        settings = settings_of(settings, overrides)
        camera = settings.cameras[0] if camera is None else camera
        if isinstance(detector, NominalIndex):
            detector = AnomalyDetector(
                detector, settings=settings, camera=camera, embedder=embedder
            )
        else:
            folder = {"index": str(detector), f"{camera}.index": ""}
            detector = load_detector(settings_of(settings, folder), camera, embedder=embedder)
    elif settings is not None or camera is not None or overrides:
        raise InputError("evaluate: expected settings and camera for an index only")

    step = max(1, len(dataset) // PICTURES) if every is None else every
    described = {
        "protocol": protocol.name if protocol else "drive",
        "protocol_detail": protocol.detail if protocol else {},
        **provenance.describe(detector),
    }
    key = {
        **{"data": provenance.files_state(dataset.path), "pictures": step, **described},
        **{"frames": [truth.file for truth in dataset.truths], "allow_seen": allow_seen},
    }
    run = temporary_checkpoint() if out is None else resumable_report(out, RESULTS, WRITTEN, key)
    with run as checkpoint:
        album = None
        if out is not None:
            sheet = frozenset(_sheet_frames(dataset.truths))
            album = report.Album(checkpoint.folder, step, sheet)
        maps = checkpoint.scratch(MAPS, keep=save_maps)
        _score_frames(dataset, detector, protocol, album, checkpoint, maps, allow_seen, progress)
        pixels = PixelGroups()
        rows = checkpoint.rows
        for truth, scores, labels in _maps(maps, dataset, rows, detector.roi):
            pixels.add(truth, scores, labels)
        thresholds = {"oracle": pixels.all().oracle_threshold(), "calibrated": detector.threshold}
        pairs = (maps_of[1:] for maps_of in _maps(maps, dataset, rows, detector.roi))
        components = component_measures(pairs, limits, thresholds)
        results = {
            **described,
            **_results(dataset, detector, rows, pixels),
            **losses_of(dataset.sources, rows),
            **components,
            "data_sha256": provenance.rows_digest(rows),
            "frames": rows,
        }
        if album is not None:
            album.finish()
            write_json(checkpoint.folder / RESULTS, results)
            figures.draw_evaluation(checkpoint.folder, results, pixels.all(), detector.calibration)
            report.write_html(checkpoint.folder, results)
    return Evaluation(results, out)


def _score_frames(
    dataset: Dataset,
    detector: AnomalyDetector,
    protocol: Reference | SelfNominal | None,
    album: report.Album | None,
    checkpoint: Checkpoint,
    maps: Path,
    allow_seen: bool,
    progress: bool,
) -> None:
    """Record one row a frame, and write anomaly maps and pictures."""
    done = len(checkpoint.rows)
    if album is not None:
        for number, (row, truth) in enumerate(zip(checkpoint.rows, dataset.truths, strict=False)):
            album.rank(number, truth.stem, _ranks(row))
    is_checked = False
    groups = [protocol.group_of(truth) if protocol else 0 for truth in dataset.truths]
    disable = None if progress else True
    bar = tqdm(dataset.read(), "evaluate", len(dataset), unit="frame", disable=disable)
    group: int | None = None
    skipped = SkippedFrames()
    for number, (frame, truth) in enumerate(bar):
        if number < done:
            skipped.add(frame, truth.sequence)
            continue
        if isinstance(frame, BadFrame):
            unknown = {"localized": None, "anomaly_px": None, "seen": False}
            checkpoint.record({**truth_row(truth), **bad_row(frame), **unknown})
            continue
        mask = dataset.labels(truth, frame.image_hw)
        if not is_checked:
            is_checked = True
            left, every = len(dataset) - number, album.every if album is not None else 0
            refuse_full_disk(maps, frame.image_hw, left, every, maps=True)
        if groups[number] != group:
            group = groups[number]
            if protocol is not None:
                detector = protocol.detector_of(truth)
            rows = zip(checkpoint.rows, groups, strict=False)
            of_group = (row for row, of_row in rows if of_row == group)
            restore(detector, frame, of_group, skipped)
            skipped = SkippedFrames()
        if checkpoint.rows and checkpoint.rows[-1]["sequence"] != truth.sequence:
            detector.reset()
        # Protocols exclude the frames that they score from their indexes.
        seen = protocol is None and _seen(detector, frame, allow_seen)
        result = detector.detect(frame)
        if not result.blind:
            np.save(maps / f"{truth.stem}.npy", result.heatmap, allow_pickle=False)
        detected = truth.anomaly and truth.has_pixels and result.decision is Decision.ANOMALY
        row = {
            **truth_row(truth),
            **result_row(frame, result),
            # An alarm elsewhere in the image has not detected the anomaly.
            "localized": bool(result.label_map[mask == ANOMALY].any()) if detected else None,
            "anomaly_px": int((mask == ANOMALY).sum()) if truth.has_pixels else None,
            "seen": seen,
            "ms": {stage: round(ms, 3) for stage, ms in result.stage_ms.items()},
            "sha256": sha256_bytes(frame.image.tobytes() + mask.tobytes()),
        }
        if album is not None:
            album.add(
                number,
                frame,
                result,
                detector,
                stem=truth.stem,
                caption=_caption(truth, result, row["localized"]),
                mask=mask,
                ranks=_ranks(row),
            )
        checkpoint.record(row)


def _seen(detector: AnomalyDetector, frame: Frame, allow_seen: bool) -> bool:
    if allow_seen:
        return is_seen(detector.index, frame)
    try:
        refuse_seen(detector.index, frame)
    except CalibrationError as error:
        raise CalibrationError(f"{error}, or evaluate it anyway with --allow-seen") from None
    return False


def _maps(
    maps: Path, dataset: Dataset, rows: Sequence[Mapping[str, Any]], roi: RegionOfInterest
) -> Iterator[tuple[FrameTruth, np.ndarray, np.ndarray]]:
    """Yield truth, anomaly map and labels of frames with score and pixel labels.

    Labels are 255 outside the ROI.
    """
    for truth, row in zip(dataset.truths, rows, strict=True):
        if truth.has_pixels and row["score"] is not None:
            scores = np.load(maps / f"{truth.stem}.npy", allow_pickle=False)  # (height, width)
            labels = dataset.labels(truth, scores.shape)
            yield truth, scores, np.where(roi.pixel_mask(scores.shape), labels, np.uint8(IGNORE))


def _results(
    dataset: Dataset, detector: AnomalyDetector, rows: list[dict[str, Any]], pixels: PixelGroups
) -> dict[str, Any]:
    counted = assessed(rows)
    anomalous = np.array([row["anomaly"] for row in counted], bool)
    alarms = np.array([float(row["decision"] == Decision.ANOMALY.value) for row in counted])
    alarm_threshold = None if detector.threshold is None else 0.5
    alarm_tpr, alarm_fpr = frame_rates(alarms, anomalous, alarm_threshold)
    calibration = detector.calibration
    by_hand = detector.settings.threshold is not None
    measures = dataset_measures(rows, pixels, detector.threshold)
    measures["pixels"] |= {
        "roi": "whole image" if detector.roi.is_whole_image else "region of interest",
        "score_resolution": SCORE_RESOLUTION,
        "frames_without_truth": sum(not truth.has_pixels for truth in dataset.truths),
    }
    warnings = list(calibration.warnings) if calibration else []
    seen = sum(row["seen"] for row in rows)
    if seen:
        warnings.insert(
            0,
            f"data leakage: the index was built from {seen} of the {len(rows)} frames; their "
            "scores say nothing about new frames",
        )
    unknown = [row for row in rows if not row["ignored"] and row["score"] is None]
    if unknown:
        warnings.append(
            f"{len(unknown)} of the {len(rows)} frames are unknown, bad or of a blind camera, "
            f"{sum(row['anomaly'] for row in unknown)} of them anomalous: they take no part in the "
            "measures"
        )
    return {
        "dataset": dataset.name,
        **measures,
        "alarm_tpr": alarm_tpr,
        "alarm_fpr": alarm_fpr,
        "localized": share([row["localized"] for row in counted if row["localized"] is not None]),
        "target_false_alarm_rate": detector.settings.target_false_alarm_rate
        if calibration and not by_hand
        else None,
        "threshold_from": "setting" if by_hand else "calibration" if calibration else None,
        "calibration": {
            "frames": calibration.count,
            "promise": detector.promise,
            "warnings": list(calibration.warnings),
        }
        if calibration
        else None,
        "false_alarms_by_drive": _false_alarms_by_drive(counted, detector.threshold),
        "frames_ignored": sum(row["ignored"] for row in rows),
        "frames_unknown": len(unknown),
        "frames_seen": seen,
        "warnings": warnings,
        "latency_ms": latencies(row["ms"] for row in rows),
    }


def _false_alarms_by_drive(
    rows: Sequence[Mapping[str, Any]], threshold: float | None
) -> dict[str, dict[str, Any]]:
    """Return number and realised false-alarm rate of the nominal frames by drive."""
    if threshold is None:
        return {}
    above: dict[str, list[bool]] = {}
    for row in rows:
        if not row["anomaly"]:
            above.setdefault(row["sequence"], []).append(row["score"] > threshold)
    return {
        drive: {"frames": len(of_drive), "rate": share(of_drive)}
        for drive, of_drive in above.items()
        # Single images are no drives.
        if len(of_drive) > 1
    }


def _sheet_frames(truths: list[FrameTruth]) -> list[int]:
    """Return frames for the contact sheet, half of them anomalous if there are enough."""
    anomalous = [i for i, truth in enumerate(truths) if truth.anomaly]
    nominal = [i for i, truth in enumerate(truths) if not truth.anomaly]
    half = SHEET_PICTURES // 2
    chosen = figures.evenly(anomalous, max(half, SHEET_PICTURES - len(nominal)))
    return sorted([*chosen, *figures.evenly(nominal, SHEET_PICTURES - len(chosen))])


def _ranks(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    if row["ignored"] or row["score"] is None:
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
    return f"{truth.file}   truth: {label}   {score_text(result)}   {verdict}".rstrip()
