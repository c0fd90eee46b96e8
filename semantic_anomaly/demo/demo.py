"""The demo: synthetic drives, an index, a calibration, and a drive played to the real node.

The node and the player are started as processes of their own, as on a vehicle, and exchange
messages over DDS. This module imports no ROS package and computes no score.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from semantic_anomaly.errors import SemanticAnomalyError
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.offline.calibrate import calibrate
from semantic_anomaly.settings import Settings, read_settings_file
from semantic_anomaly.storage import atomic_write_bytes
from semantic_anomaly.synthetic import KINDS, StreetDrive, family
from semantic_anomaly.synthetic.export import write_folder

NODE_STOP_S = 30.0
# Polygon of the lane ahead: houses and adverts are new on every street, and not relevant.
ROAD = (0.0, 1.0, 0.0, 0.9, 0.45, 0.46, 0.54, 0.46, 0.56, 0.5, 0.87, 1.0)
# One stage of smaller images than the default, for two cores without a GPU.
BACKBONE, INPUT_SIZE = "mobilenet_v1", 640


class DemoError(SemanticAnomalyError):
    """A process of the demo failed; the message names its log."""


@dataclass(frozen=True)
class DemoPlan:
    """The drives of the demo.

    Attributes:
        nominal_drives: number of drives of the index, each left out once by the calibration.
        nominal_frames: frames of each nominal drive.
        frames: frames of the drive that is played to the node.
        kinds: kinds of the anomalies on that drive, in this order.
        seed: seed of the first drive; the next drives have the next seeds.
        rate_hz: frames per second played to the node.
        target_false_alarm_rate: of the calibration.
    """

    nominal_drives: int = 18
    nominal_frames: int = 20
    frames: int = 400
    kinds: tuple[str, ...] = (*KINDS[:3], "stop_sign_on_billboard")
    seed: int = 4000
    rate_hz: float = 10.0
    target_false_alarm_rate: float = 0.05


def run_demo(out: Path, plan: DemoPlan, overrides: dict[str, Any]) -> dict[str, Any]:
    """Run the demo and return the summary that was written to `out`/summary.json.

    Args:
        out: folder for drives, index, settings, pictures and summary; files there are replaced.
        plan: the drives.
        overrides: settings of the index by name, such as `backbone`.

    Raises:
        DemoError: a process failed.
        SemanticAnomalyError: a setting or a backbone cannot be used.
    """
    nominal, drive = _synthesise(out / "drives", plan)
    # The node takes all other settings from the index and the calibration.
    parameters = {
        "index": str((out / "index").absolute()),
        "camera": {"image_topic": "/camera/image_raw", "region_of_interest": list(ROAD)},
    }
    document = {"/**": {"ros__parameters": parameters}}
    atomic_write_bytes(out / "settings.yaml", yaml.safe_dump(document).encode())
    settings = Settings.from_parameters(read_settings_file(out / "settings.yaml"))
    if "stages" not in overrides:
        overrides = {"backbone": BACKBONE, "input_size": INPUT_SIZE, **overrides}
    common: dict[str, Any] = {"settings": settings, "out": out / "index", "progress": True}
    index = build_index(nominal, force=True, **common, **overrides)
    rate = plan.target_false_alarm_rate
    calibration = calibrate(index, target_false_alarm_rate=rate, **common)
    live = play_to_node(out, drive, plan.rate_hz)
    labels = json.loads((drive / "labels.json").read_text(encoding="utf-8"))
    rows = [_row(record, labels) for record in live["frames"]]
    summary = _summarise(rows, live, calibration.threshold, plan)
    summary |= {"index_entries": index.count, "promise": calibration.promise}
    atomic_write_bytes(out / "summary.json", json.dumps(summary, indent=1).encode())
    from semantic_anomaly.evaluation import figures

    figures.demo_pictures(out, rows, calibration.threshold)
    return summary


def _write_drive(seed: int, frames: int, kinds: Sequence[str], stride: int, out: Path) -> None:
    if not (out / "labels.json").is_file():
        drive = StreetDrive(seed, frames=frames, anomalies=kinds)
        write_folder([drive], out, progress=False, stride=stride)


def _synthesise(folder: Path, plan: DemoPlan) -> tuple[list[Path], Path]:
    count = plan.nominal_drives
    nominal = [folder / f"nominal_{plan.seed + i}_{plan.nominal_frames}" for i in range(count)]
    driven = folder / f"driven_{plan.seed + count}_{plan.frames}_{'-'.join(plan.kinds)}"
    # Nominal frames are spread over a longer drive: consecutive frames resemble each other.
    jobs: list[tuple[int, int, Sequence[str], int, Path]] = [
        (plan.seed + i, 5 * plan.nominal_frames, (), 5, path) for i, path in enumerate(nominal)
    ]
    jobs.append((plan.seed + count, plan.frames, plan.kinds, 1, driven))
    folder.mkdir(parents=True, exist_ok=True)
    workers = min(os.cpu_count() or 1, 8)
    # A fork would copy the threads of loaded libraries in an undefined state.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_write_drive, *job) for job in reversed(jobs)]
        for future in tqdm(futures, desc="synthesise drives", disable=None):
            future.result()
    return nominal, driven


def play_to_node(out: Path, drive: Path, rate_hz: float, overlays: bool = True) -> dict[str, Any]:
    """Start the node with `out`/settings.yaml, play a drive to it, and return the recorded results.

    Args:
        out: folder of the settings and of the results.
        drive: folder, video or bag.
        rate_hz: frames per second.
        overlays: listen to the overlay pictures, which are drawn for listeners only.

    Raises:
        DemoError: the node or the player failed; the log of the node is `out`/node.log.
    """
    # Overlays of an earlier drive must not be mistaken for new ones.
    shutil.rmtree(out / "live", ignore_errors=True)
    # A ROS domain of its own separates the demo from other nodes on this network.
    domain = str(1 + os.getpid() % 100)
    own = {"FASTDDS_BUILTIN_TRANSPORTS": "LARGE_DATA", "ROS_DOMAIN_ID": domain}
    environment = {**own, **os.environ}
    node_command = [
        *(sys.executable, "-m", "semantic_anomaly.ros.node"),
        *("--ros-args", "--params-file", str(out / "settings.yaml")),
    ]
    player_command = [
        *(sys.executable, "-m", "semantic_anomaly.ros.player", str(drive)),
        *("--out", str(out / "live"), "--rate-hz", str(rate_hz)),
        *("--bring-up", *(["--overlays"] if overlays else [])),
    ]
    log_path = out / "node.log"
    with log_path.open("wb") as log:
        node = subprocess.Popen(node_command, stdout=log, stderr=log, env=environment)
        try:
            player = subprocess.run(player_command, env=environment, check=False)
        finally:
            node.send_signal(signal.SIGINT)
            try:
                code = node.wait(NODE_STOP_S)
            except subprocess.TimeoutExpired:
                node.kill()
                code = node.wait()
    if player.returncode or code:
        raise DemoError(
            f"exit codes: player {player.returncode}, node {code}; see the log {log_path}"
        )
    return json.loads((out / "live" / "frames.json").read_text(encoding="utf-8"))


def _row(record: dict[str, Any], labels: dict[str, Any]) -> dict[str, Any]:
    label = labels[Path(record["name"]).name]
    status = record.get("status", {})
    scored = "score" in status and status.get("decision") != "unknown"
    return {
        "name": record["name"],
        "anomaly": bool(label["anomaly"]),
        "kind": label.get("kind"),
        "received": bool(status),
        "score": float(status["score"]) if scored else None,
        "decision": status.get("decision"),
        "latency_ms": record.get("latency_ms") if scored else None,
    }


def _summarise(
    rows: list[dict[str, Any]], live: dict[str, Any], threshold: float, plan: DemoPlan
) -> dict[str, Any]:
    scored = [row for row in rows if row["score"] is not None]
    nominal = [row for row in scored if not row["anomaly"]]
    alarms = [row for row in nominal if row["decision"] == "anomaly"]
    latencies = [row["latency_ms"] for row in scored]
    by_kind = {}
    for kind in plan.kinds:
        decisions = [row["decision"] for row in scored if row["kind"] == kind]
        detected, frames = decisions.count("anomaly"), len(decisions)
        by_kind[kind] = {"family": family(kind), "frames": frames, "frames_detected": detected}
    return {
        "frames_sent": len(rows),
        "frames_received": sum(row["received"] for row in rows),
        "frames_scored": len(scored),
        "scores_received": live["scores_received"],
        "threshold": threshold,
        "target_false_alarm_rate": plan.target_false_alarm_rate,
        "false_alarms": len(alarms),
        "nominal_frames": len(nominal),
        "by_kind": by_kind,
        "latency_p50_ms": float(np.percentile(latencies, 50)) if latencies else None,
        "latency_p95_ms": float(np.percentile(latencies, 95)) if latencies else None,
        "frames": rows,
    }
