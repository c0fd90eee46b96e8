"""Run a drive through the detector, frame by frame, and write the report of the drive."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from semantic_anomaly.evaluation import extras, figures, provenance, report
from semantic_anomaly.evaluation.checkpoint import (
    SkippedFrames,
    bad_row,
    losses_of,
    refuse_full_disk,
    restore,
    result_row,
    resumable_report,
    score_text,
    write_json,
)
from semantic_anomaly.evaluation.events import Event, drive_metrics, refuse_jump, refuse_outside
from semantic_anomaly.evaluation.metrics import latencies
from semantic_anomaly.io.sources import MAX_BAD_SHARE, BadFrame, FrameSource
from semantic_anomaly.stamps import first_jump, order_of
from semantic_anomaly.storage import sha256_bytes
from semantic_anomaly.structures import Decision

if TYPE_CHECKING:
    from semantic_anomaly.detection.detector import AnomalyDetector

SUMMARY = "summary.json"
WRITTEN = frozenset({SUMMARY, "scores.csv", "score_curve.png", "overlays", "panels", report.NAME})
PICTURES = 40
_EVERY_UNKNOWN = 10


def replay(
    detector: AnomalyDetector,
    source: FrameSource,
    out: Path,
    *,
    every: int | None = None,
    events: Sequence[Event] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Score every frame of a source, write the report of the drive and return its summary.

    A frame that cannot be decoded is `unknown`, and is named in the summary; more than
    `MAX_BAD_SHARE` of such frames end the replay. Tracks end with a drive of the source. Unknown
    frames have no score, unless it is for want of a threshold alone.

    An alarm is a run of frames with the decision `anomaly`; its first frame always gets a picture.
    An interrupted run is resumed by the same call.

    Args:
        detector: with or without a calibration.
        source: frames in the order of time; late ones are put in order in the report.
        out: folder to write; an earlier replay is replaced.
        every: write pictures of every n-th frame, 0 for none; None: of about `PICTURES` frames.
        events: anomalies of the drive, for delays and false alarms; None: not known.
        progress: show a progress bar on a terminal.

    Raises:
        InputError: too many frames cannot be read, a jump back in the stamps of a drive with
            events, an event lies outside the drive, or `out` holds something else.
        MissingPackageError: matplotlib or jinja2 is not installed.
    """
    extras.require("matplotlib.figure", "jinja2")
    count = source.count
    if every is None:
        every = _EVERY_UNKNOWN if count is None else max(1, count // PICTURES)
    if events is not None:
        refuse_outside(events, source.stamps_ns())
    described = provenance.describe(detector)
    key = {
        **{"data": provenance.files_state(*source.paths), "frames": str(source.selection)},
        **{"topic": getattr(source, "topic", None), "pictures": every, **described},
    }
    with resumable_report(out, SUMMARY, WRITTEN, key) as checkpoint:
        album = report.Album(checkpoint.folder, every)
        done, warm, skipped = len(checkpoint.rows), False, SkippedFrames()
        newest_ns: int | None = max((row["stamp_ns"] for row in checkpoint.rows), default=None)
        # As the node, which calls a bad image unknown and goes on.
        source.max_bad_share = MAX_BAD_SHARE
        bar = tqdm(source.read(), "replay", count, unit="frame", disable=None if progress else True)
        for number, frame in enumerate(bar):
            drive = source.drive_of(frame)
            if number < done:
                skipped.add(frame, drive)
                continue
            newest_ns = frame.stamp_ns if newest_ns is None else newest_ns
            if events is not None:
                refuse_jump([newest_ns, frame.stamp_ns])
            newest_ns = max(newest_ns, frame.stamp_ns)
            common = {"name": frame.name, "sequence": drive}
            if isinstance(frame, BadFrame):
                checkpoint.record({**common, **bad_row(frame), "alarm": False})
                continue
            if not warm:
                warm = True
                if count is not None:
                    refuse_full_disk(checkpoint.folder, frame.image_hw, count - number, every)
                restore(detector, frame, checkpoint.rows, skipped)
            if checkpoint.rows and checkpoint.rows[-1]["sequence"] != drive:
                detector.reset()
            result = detector.detect(frame)
            row = {
                **common,
                **result_row(frame, result),
                "alarm": result.decision is Decision.ANOMALY,
                "ms": dict(result.stage_ms),
                "sha256": sha256_bytes(frame.image.tobytes()),
            }
            album.add(
                number,
                frame,
                result,
                detector,
                stem=PurePosixPath(frame.name).stem,
                caption=f"{frame.name}   {result.decision.value}   {score_text(result)}",
                always=row["alarm"] and not (checkpoint.rows and checkpoint.rows[-1]["alarm"]),
            )
            checkpoint.record(row)
        album.finish()
        losses = losses_of([source], checkpoint.rows)
        details = {**losses, **described, "data_sha256": provenance.rows_digest(checkpoint.rows)}
        return write_drive(
            checkpoint.folder, source.name, checkpoint.rows, detector.threshold, events, details
        )


def write_drive(
    folder: Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    threshold: float | None,
    events: Sequence[Event] | None,
    details: Mapping[str, Any],
) -> dict[str, Any]:
    """Write scores.csv, score_curve.png, summary.json and report.html, and return the summary.

    `replay` and the recorder of the running node both write their reports here.

    Args:
        rows: one a frame; put in the order of stamps unless there is a jump back: name, stamp_ns,
            score (None if it was not computed), p_value, decision, alarm, drift, and ms by stage.
        events: anomalies of the drive; None: not known.
        details: further entries of the summary, such as its provenance.

    Raises:
        InputError: an event lies outside the drive.
        MissingPackageError: matplotlib or jinja2 is not installed.
    """
    stamps_ns = [row["stamp_ns"] for row in rows]
    if first_jump(stamps_ns) is None:
        rows = [rows[number] for number in order_of(stamps_ns).tolist()]
    scores = [row["score"] for row in rows if row["score"] is not None]
    decisions = [row["decision"] for row in rows]
    summary = {
        "source": name,
        "frames": len(rows),
        "decisions": {d.value: decisions.count(d.value) for d in Decision},
        "threshold": threshold,
        "score_min": min(scores, default=None),
        "score_max": max(scores, default=None),
        "alarms": _alarms(rows),
        "drift": _drift(rows),
        # Without a threshold there are no decisions, so no event was missed either.
        "against_events": None if events is None or threshold is None else _against(rows, events),
        "latency_ms": latencies(row["ms"] for row in rows),
        **details,
    }
    _write_scores(folder / "scores.csv", rows)
    begin_ns, end_ns = rows[0]["stamp_ns"], rows[-1]["stamp_ns"]
    truths = [_truth((row["stamp_ns"] - begin_ns) / 1e9, events) for row in rows]
    frames = [
        figures.ScoredFrame(row["stamp_ns"], row["score"], row["alarm"], truth, row["drift"])
        for row, truth in zip(rows, truths, strict=True)
    ]
    count = len(summary["alarms"])
    title = f"{name}: {count} alarm{'s' * (count != 1)} in {len(rows)} frames"
    figures.score_curve(folder / "score_curve.png", frames, threshold, title)
    write_json(folder / SUMMARY, summary)
    report.write_drive_html(folder, summary, begin_ns, end_ns)
    return summary


def _truth(time_s: float, events: Sequence[Event] | None) -> str | None:
    """Return the kind of the event at a time, empty without one, None if events are not known."""
    if events is None:
        return None
    return next((e.kind or "event" for e in events if e.start_s <= time_s <= e.end_s), "")


def _write_scores(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        columns = "stamp_ns", "score", "p_value", "decision"
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _alarms(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    alarms: list[dict[str, Any]] = []
    for alarm, group in groupby(rows, key=itemgetter("alarm")):
        if alarm:
            run = list(group)
            first, last = run[0], run[-1]
            alarms.append(
                {
                    "first_frame": first["name"],
                    "first_stamp_ns": first["stamp_ns"],
                    "frames": len(run),
                    "peak_score": max(row["score"] for row in run),
                    "last_frame": last["name"],
                    "last_stamp_ns": last["stamp_ns"],
                }
            )
    return alarms


def _drift(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the stretches whose scores are unlike those of the calibration."""
    runs = (list(group) for drift, group in groupby(rows, key=itemgetter("drift")) if drift)
    return [
        {
            "first_frame": run[0]["name"],
            "first_stamp_ns": run[0]["stamp_ns"],
            "frames": len(run),
            "last_frame": run[-1]["name"],
        }
        for run in runs
    ]


def _against(rows: Sequence[Mapping[str, Any]], events: Sequence[Event]) -> dict[str, Any]:
    stamps_ns, alarms = [row["stamp_ns"] for row in rows], [row["alarm"] for row in rows]
    unknown = [row["decision"] == Decision.UNKNOWN.value for row in rows]
    metrics = drive_metrics(stamps_ns, alarms, events, unknown)
    measures = asdict(metrics)
    delays = [delay for delay in measures.pop("delays_s") if delay is not None]
    return {
        "events": [
            {**asdict(event), "delay_s": delay}
            for event, delay in zip(events, metrics.delays_s, strict=True)
        ],
        "missed": metrics.missed,
        "delay_s_median": float(np.median(delays)) if delays else None,
        **measures,
    }
