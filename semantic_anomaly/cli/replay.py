"""Run bags, videos or folders through the detector."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_anomaly.cli.options import (
    add_detector_options,
    add_fleet_options,
    count,
    refuse_fleet_options,
    report_folders,
    settings_of,
    shards_folder,
)
from semantic_anomaly.cli.tables import print_losses, print_reports, report_losses, table
from semantic_anomaly.errors import InputError

if TYPE_CHECKING:
    from semantic_anomaly.settings import Settings

_LISTED_ALARMS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly replay`."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="BAG",
        help="rosbag2 bag, video or folder of images; 'BAG[START:STOP]' takes a part of it",
    )
    parser.add_argument("--index", type=Path, required=True, help="folder of the index")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to write; of several bags, with a folder for each",
    )
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
    add_fleet_options(parser)


def run(args: argparse.Namespace) -> int:
    """Replay, write scores and pictures, and print the alarms."""
    from semantic_anomaly.detection.detector import load_detector
    from semantic_anomaly.evaluation import extras
    from semantic_anomaly.evaluation.checkpoint import refuse_other_content
    from semantic_anomaly.evaluation.events import read_events
    from semantic_anomaly.evaluation.replay import SUMMARY, WRITTEN, replay
    from semantic_anomaly.offline.drives import open_drives

    extras.require("matplotlib.figure", "jinja2")
    settings, camera = settings_of(args, args.index)
    if args.labels and len(args.sources) > 1:
        raise InputError(f"--labels: expected one BAG, found {len(args.sources)}")
    events = read_events(args.labels) if args.labels else None
    if args.ray is not None:
        return _run_on_cluster(args, settings, camera)
    refuse_fleet_options(args)
    drives = open_drives(args.sources, args.topic)
    folders = report_folders(args.out, list(drives))
    for folder in folders.values():
        refuse_other_content(folder, SUMMARY, WRITTEN)
    detector = load_detector(settings, camera)
    for name, source in drives.items():
        folder = folders[name]
        summary = replay(detector, source, folder, every=args.every, events=events, progress=True)
        print(_text(summary))
        print(f"wrote {folder}")
    return report_losses(drives.values())


def _run_on_cluster(args: argparse.Namespace, settings: Settings, camera: str) -> int:
    from semantic_anomaly.evaluation.checkpoint import refuse_other_content
    from semantic_anomaly.evaluation.provenance import files_state
    from semantic_anomaly.evaluation.replay import SUMMARY, WRITTEN
    from semantic_anomaly.fleet.cluster import on_nodes
    from semantic_anomaly.fleet.reports import replay_drive, reports_on_cluster
    from semantic_anomaly.fleet.sources import open_readable

    drives, failed = open_readable(args.sources, args.topic)
    folders = report_folders(args.out, list(drives))
    for folder in folders.values():
        refuse_other_content(folder, SUMMARY, WRITTEN)
    common = {
        "parameters": on_nodes(settings, args.num_gpus or 0.0).to_parameters(),
        "camera": camera,
        "every": args.every,
        "labels": str(args.labels.absolute()) if args.labels else "",
    }
    labels = [args.labels] if args.labels else []
    reports = reports_on_cluster(
        replay_drive,
        {name: {"opened": s.opened, "topic": s.topic, **common} for name, s in drives.items()},
        keys={name: files_state(*s.paths, args.index, *labels) for name, s in drives.items()},
        folders=folders,
        summary=SUMMARY,
        address=args.ray,
        shards=shards_folder(args),
        num_gpus=args.num_gpus or 0.0,
        progress=True,
    )
    print_reports(reports, folders, SUMMARY, _text)
    unreadable = [*((f.name, f.reason) for f in failed), *reports.unreadable.items()]
    return print_losses(reports.losses.values(), unreadable)


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
