"""What a drive through a detector comes to, whether it ran here or in the node on the vehicle."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from semantic_anomaly.evaluation import figures, html
from semantic_anomaly.evaluation.events import Event, drive_metrics
from semantic_anomaly.evaluation.measures import latencies
from semantic_anomaly.evaluation.reports import write_json
from semantic_anomaly.structures import Decision

SUMMARY = "summary.json"
WRITTEN = frozenset({SUMMARY, "scores.csv", "score_curve.png", "overlays", "panels", html.NAME})


def write_drive(
    folder: Path,
    name: str,
    rows: Sequence[Mapping[str, Any]],
    threshold: float | None,
    events: Sequence[Event] | None,
    details: Mapping[str, Any],
) -> dict[str, Any]:
    """Write scores.csv, score_curve.png, summary.json and report.html, and return the summary.

    Args:
        folder: of the report.
        name: of the drive.
        rows: one a frame in the order of their stamps: name, stamp_ns, score or None where it was
            not computed, p_value, decision, alarm, and ms by stage.
        threshold: of the score, None where there is none.
        events: what the drive met, None where it is not known.
        details: more for the summary, such as where it comes from.

    Raises:
        InputError: an event lies outside the drive.
        MissingPackageError: matplotlib or jinja2 is not installed.
    """
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
        # Without a threshold nothing is missed: nothing was decided.
        "against_events": None if events is None or threshold is None else _against(rows, events),
        "latency_ms": latencies(row["ms"] for row in rows),
        **details,
    }
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
    count = len(summary["alarms"])
    title = f"{name}: {count} alarm{'s' * (count != 1)} in {len(rows)} frames"
    figures.score_curve(folder / "score_curve.png", scored, threshold, title)
    write_json(folder / SUMMARY, summary)
    html.write_drive_html(folder, summary, begin, rows[-1]["stamp_ns"])
    return summary


def _truth(time_s: float, events: Sequence[Event] | None) -> str | None:
    """Return the kind of the event at a time, empty for none, None where nothing is known."""
    if events is None:
        return None
    return next((e.kind or "event" for e in events if e.start_s <= time_s <= e.end_s), "")


def _write_scores(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("stamp_ns", "score", "p_value", "decision"))
        for row in rows:
            numbers = ["" if row[k] is None else repr(row[k]) for k in ("score", "p_value")]
            writer.writerow((row["stamp_ns"], *numbers, row["decision"]))


def _alarms(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
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


def _against(rows: Sequence[Mapping[str, Any]], events: Sequence[Event]) -> dict[str, Any]:
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
