"""Run the demo: synthetic drives, index, calibration, the real node, pictures."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly demo`."""
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder to write")
    parser.add_argument("--seed", type=int, default=4000, help="seed of the first drive")
    parser.add_argument("--frames", type=int, help="frames of the drive played to the node")
    parser.add_argument("--kinds", help="kinds of anomalies, separated by commas")
    parser.add_argument("--backbone", help="backbone folder, shipped name or hub id")
    parser.add_argument("--quick", action="store_true", help="few and short drives")


def run(args: argparse.Namespace) -> int:
    """Run the demo and print its table."""
    from semantic_anomaly.demo.demo import DemoPlan, run_demo
    from semantic_anomaly.errors import UnknownNameError
    from semantic_anomaly.storage import refuse_unwritable
    from semantic_anomaly.synthetic import KINDS

    refuse_unwritable(args.out / "index")
    plan: dict[str, Any] = {"seed": args.seed}
    if args.quick:
        plan |= {"nominal_drives": 8, "frames": 100, "kinds": KINDS[:1]}
    if args.kinds:
        plan["kinds"] = tuple(args.kinds.split(","))
        for kind in plan["kinds"]:
            if kind not in KINDS:
                raise UnknownNameError("kind of anomaly", kind, KINDS)
    if args.frames:
        plan["frames"] = args.frames
    overrides: dict[str, Any] = {"backbone": args.backbone} if args.backbone else {}
    begin = time.monotonic()
    summary = run_demo(args.out, DemoPlan(**plan), overrides)
    print(_table(summary))
    print(f"{time.monotonic() - begin:.0f} s; wrote pictures and summary.json to {args.out}/")
    print(f"look next at {args.out}/contact_sheet.jpg, score_curve.png and drive.gif")
    return 0


def _table(summary: dict[str, Any]) -> str:
    def milliseconds(key: str) -> str:
        return "none" if summary[key] is None else f"{summary[key]:.0f} ms"

    lines = [
        f"frames sent {summary['frames_sent']}, with a status {summary['frames_received']}, "
        f"scored {summary['frames_scored']}",
        f"{'anomaly':<28}{'family':<18}{'frames detected':>16}",
    ]
    for kind, row in summary["by_kind"].items():
        share = f"{row['frames_detected']} of {row['frames']}"
        missed = "" if row["frames_detected"] else "   not found"
        lines.append(f"{kind:<28}{row['family']:<18}{share:>16}{missed}")
    nominal = summary["nominal_frames"]
    realised = f"{summary['false_alarms'] / nominal:.3f}" if nominal else "none"
    lines += [
        f"promise: {summary['promise']}",
        f"false alarms {summary['false_alarms']} of {nominal} nominal frames of this new drive: "
        f"realised rate {realised}, target {summary['target_false_alarm_rate']:g}",
        f"latency from stamp to status: median {milliseconds('latency_p50_ms')}, "
        f"95th percentile {milliseconds('latency_p95_ms')}",
    ]
    return "\n".join(lines)
