"""Run a bag, video or folder through the detector."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from semantic_anomaly.cli.options import add_detector_options, count, settings_of
from semantic_anomaly.cli.tables import report_losses, table

_LISTED_ALARMS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly replay`."""
    parser.add_argument(
        "source",
        metavar="BAG",
        help="rosbag2 bag, video or folder of images; 'BAG[START:STOP]' takes a part of it",
    )
    parser.add_argument("--index", type=Path, required=True, help="folder of the index")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--every", type=count, metavar="N", help="pictures of every N-th frame (default: about 40)"
    )
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="EVENTS.yaml",
        help="anomalies of the drive: events: [{start_s: 3.0, end_s: 5.5, kind: cow}], in seconds "
        "after the first frame",
    )
    add_detector_options(parser)


def run(args: argparse.Namespace) -> int:
    """Replay, write scores and pictures, and print the alarms."""
    from semantic_anomaly.detection.detector import load_detector
    from semantic_anomaly.evaluation import extras
    from semantic_anomaly.evaluation.checkpoint import refuse_other_content
    from semantic_anomaly.evaluation.events import read_events
    from semantic_anomaly.evaluation.replay import SUMMARY, WRITTEN, replay
    from semantic_anomaly.io.open import open_source

    extras.require("matplotlib.figure", "jinja2")
    settings, camera = settings_of(args, args.index)
    refuse_other_content(args.out, SUMMARY, WRITTEN)
    events = read_events(args.labels) if args.labels else None
    source = open_source(args.source, topic=args.topic)
    detector = load_detector(settings, camera)
    summary = replay(detector, source, args.out, every=args.every, events=events, progress=True)
    print(_text(summary))
    print(f"wrote {args.out}")
    return report_losses([source])


def _text(summary: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in summary["decisions"].items() if count)
    total = summary["latency_ms"].get("total")
    low, high = summary["score_min"], summary["score_max"]
    threshold = summary["threshold"]
    rows = [
        ("frames", f"{summary['frames']}: {counts}"),
        ("threshold", "none, uncalibrated" if threshold is None else f"{threshold:.4f}"),
        ("scores", "none" if low is None else f"{low:.4f} to {high:.4f}"),
        ("ms a frame", ", ".join(f"{q} {ms:.1f}" for q, ms in (total or {}).items()) or "none"),
        ("alarms", f"{len(summary['alarms'])}"),
    ]
    if summary["frames_blind"]:
        rows.append(("blind", f"{summary['frames_blind']} frames of a frozen or covered camera"))
    rows += _event_rows(summary["against_events"])
    text = table(rows)
    alarms = [
        (a["first_frame"], f"{a['frames']}", f"{a['peak_score']:.4f}")
        for a in summary["alarms"][:_LISTED_ALARMS]
    ]
    if alarms:
        text += "\n\n" + table(alarms, ("first frame of an alarm", "frames", "peak score"))
    if len(summary["alarms"]) > _LISTED_ALARMS:
        text += f"\n... and {len(summary['alarms']) - _LISTED_ALARMS} more in summary.json"
    return text


def _event_rows(against: dict[str, Any] | None) -> list[tuple[str, str]]:
    if against is None:
        return []
    count, missed = len(against["events"]), against["missed"]
    rows = [("events", f"{count - missed} of {count} found, {missed} missed")]
    if (delay := against["delay_s_median"]) is not None:
        rows.append(("delay", f"{delay:.2f} s (median of the found)"))
    if (per_hour := against["false_per_hour"]) is not None:
        text = f"{against['false_alarms']} in {against['nominal_s']:.1f} s nominal"
        share = f"{against['false_share']:.1%} of the frames"
        rows.append(("false alarms", f"{text}: {per_hour:.1f} an hour; {share}"))
    return rows
