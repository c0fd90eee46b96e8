"""Run a drive through the detector, frame by frame, and write what it stated."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from semantic_anomaly.evaluation import extras, figures, provenance
from semantic_anomaly.evaluation.album import Album
from semantic_anomaly.evaluation.events import Event, drive_metrics
from semantic_anomaly.evaluation.measures import latencies
from semantic_anomaly.evaluation.reports import report_folder, write_json
from semantic_anomaly.sources import FrameSource
from semantic_anomaly.structures import AnomalyResult, Decision, Frame

if TYPE_CHECKING:
    from semantic_anomaly.detector import AnomalyDetector

SUMMARY = "summary.json"
WRITTEN = frozenset({SUMMARY, "scores.csv", "score_curve.png", "overlays", "panels"})
PICTURES = 40
_EVERY_UNKNOWN = 10


def replay(
    source: FrameSource,
    detector: AnomalyDetector,
    out: Path,
    *,
    every: int | None = None,
    events: Sequence[Event] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Assess every frame of a source, write `out` as a whole, and return its summary.

    An alarm is a run of frames whose decision is `anomaly`; its first frame is always pictured.

    Args:
        source: frames in the order of time.
        detector: used as it stands, uncalibrated too.
        out: folder to write; an earlier replay is replaced.
        every: pictures of every so manieth frame, 0 for none; None: about `PICTURES` of them.
        events: what the drive meets, for delays and false alarms; None: not known.
        progress: show a progress bar on a terminal.

    Raises:
        InputError: a frame cannot be read, an event lies outside the drive, or `out` holds
            something else.
        MissingPackageError: matplotlib is not installed.
    """
    extras.require("matplotlib.figure")
    count = source.count
    if every is None:
        every = _EVERY_UNKNOWN if count is None else max(1, count // PICTURES)
    with report_folder(out, SUMMARY, WRITTEN) as folder:
        album = Album(folder, detector.region, detector.settings.overlay_alpha, every)
        rows: list[dict[str, Any]] = []
        detector.reset()
        bar = tqdm(source, "replay", count, unit="frame", disable=None if progress else True)
        for number, frame in enumerate(bar):
            if number == 0:
                # The first frame pays for what is made once, and would be the slowest.
                detector.detect(frame)
                detector.reset()
            result = detector.detect(frame)
            begins = _is_alarm(result) and not (rows and rows[-1]["alarm"])
            rows.append(_row(frame, result))
            stem = frame.name.rpartition("/")[2].rpartition(".")[0] or frame.name.rpartition("/")[2]
            album.add(
                number,
                frame,
                result,
                stem=stem,
                caption=f"{frame.name}   {result.decision.value}   score {result.score:.3f}",
                always=begins,
            )
        album.finish()
        summary = _summary(source, detector, rows, events)
        _write_scores(folder / "scores.csv", rows)
        begin = rows[0]["stamp_ns"]
        scored = [
            figures.ScoredFrame(
                row["stamp_ns"],
                row["score"],
                row["alarm"],
                _truth((row["stamp_ns"] - begin) / 1e9, events),
            )
            for row in rows
        ]
        title = f"{source.name}: {len(summary['alarms'])} alarms in {len(rows)} frames"
        figures.score_curve(folder / "score_curve.png", scored, detector.threshold, title)
        write_json(folder / SUMMARY, summary)
    return summary


def _truth(time_s: float, events: Sequence[Event] | None) -> str | None:
    """Return the kind of the event at a time, empty for none, None where nothing is known."""
    if events is None:
        return None
    return next((e.kind or "event" for e in events if e.start_s <= time_s <= e.end_s), "")


def _is_alarm(result: AnomalyResult) -> bool:
    return result.decision is Decision.ANOMALY


def _row(frame: Frame, result: AnomalyResult) -> dict[str, Any]:
    return {
        "name": frame.name,
        "stamp_ns": frame.stamp_ns,
        "score": result.score,
        "p_value": result.p_value,
        "decision": result.decision.value,
        "alarm": _is_alarm(result),
        "ms": dict(result.stage_ms),
    }


def _write_scores(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("stamp_ns", "score", "p_value", "decision"))
        for row in rows:
            p_value = "" if row["p_value"] is None else repr(row["p_value"])
            writer.writerow((row["stamp_ns"], repr(row["score"]), p_value, row["decision"]))


def _alarms(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    alarms: list[dict[str, Any]] = []
    for before, row in zip([None, *rows], rows, strict=False):
        if not row["alarm"]:
            continue
        if before is None or not before["alarm"]:
            alarms.append({"first_frame": row["name"], "first_stamp_ns": row["stamp_ns"],
                           "frames": 0, "peak_score": row["score"]})  # fmt: skip
        alarm = alarms[-1]
        alarm["last_frame"], alarm["last_stamp_ns"] = row["name"], row["stamp_ns"]
        alarm["frames"] += 1
        alarm["peak_score"] = max(alarm["peak_score"], row["score"])
    return alarms


def _against(rows: list[dict[str, Any]], events: Sequence[Event]) -> dict[str, Any]:
    stamps, alarms = [row["stamp_ns"] for row in rows], [row["alarm"] for row in rows]
    metrics = drive_metrics(stamps, alarms, events)
    found = [delay for delay in metrics.delays_s if delay is not None]
    return {
        "events": [
            {**asdict(event), "delay_s": delay}
            for event, delay in zip(events, metrics.delays_s, strict=True)
        ],
        "missed": metrics.missed,
        "delay_s_median": float(np.median(found)) if found else None,
        "false_episodes": metrics.false_episodes,
        "nominal_s": metrics.nominal_s,
        "false_per_hour": metrics.false_per_hour,
        "false_share": metrics.false_share,
    }


def _summary(
    source: FrameSource,
    detector: AnomalyDetector,
    rows: list[dict[str, Any]],
    events: Sequence[Event] | None,
) -> dict[str, Any]:
    scores = [row["score"] for row in rows]
    decisions = [row["decision"] for row in rows]
    return {
        "source": source.name,
        "frames": len(rows),
        "decisions": {d.value: decisions.count(d.value) for d in Decision},
        "threshold": detector.threshold,
        "score_min": min(scores),
        "score_max": max(scores),
        "alarms": _alarms(rows),
        # Without a threshold nothing is missed: nothing was decided.
        "against_events": _against(rows, events)
        if events is not None and detector.threshold is not None
        else None,
        "latency_ms": latencies(row["ms"] for row in rows),
        **provenance.describe(detector),
    }
