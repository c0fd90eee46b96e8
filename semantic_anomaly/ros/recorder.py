"""Record the results of the running node on a drive, and report them as `replay` does."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy

from semantic_anomaly.errors import InputError, SemanticAnomalyError
from semantic_anomaly.evaluation import extras, provenance
from semantic_anomaly.evaluation.checkpoint import refuse_other_content, report_folder
from semantic_anomaly.evaluation.events import Event, read_events
from semantic_anomaly.evaluation.replay import SUMMARY, WRITTEN, write_drive
from semantic_anomaly.ros import messages
from semantic_anomaly.ros.inputs import SILENCE
from semantic_anomaly.storage import forbid_writing_by_all
from semantic_anomaly.structures import Decision

# A fast bag must not overwrite statuses in the queue while the disk is busy.
_QOS = QoSProfile(depth=1000, reliability=ReliabilityPolicy.RELIABLE)
_STAGE = "_ms"
# Of two frames with one stamp the more serious decision is kept.
_SERIOUS = [decision.value for decision in (Decision.NOMINAL, Decision.UNKNOWN, Decision.ANOMALY)]


class ResultRecorder(Node):
    """Collects the statuses of one camera of the anomaly node, given by its full name."""

    def __init__(self, node_name: str, camera: str) -> None:
        super().__init__("result_recorder")
        self._rows: dict[int, dict[str, Any]] = {}
        self.threshold: float | None = None
        # Before the first status, when the bag has not started, it is not idle.
        self.received_s = math.inf
        self.create_subscription(
            DiagnosticArray, f"{node_name}/{camera}/status", self._on_status, _QOS
        )

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each stamp in the order of the stamps, as `write_drive` takes them."""
        return [self._rows[stamp_ns] for stamp_ns in sorted(self._rows)]

    def _on_status(self, message: DiagnosticArray) -> None:
        stamp_ns = messages.stamp_ns(message.header)
        if not message.status or not stamp_ns:
            return
        values = {pair.key: pair.value for pair in message.status[0].values}
        if values.get("reason", "").startswith(SILENCE):
            return
        self.received_s = time.monotonic()
        score, decision = _number(values.get("score")), values.get("decision", "unknown")
        threshold = _number(values.get("threshold"))
        self.threshold = self.threshold if threshold is None else threshold
        row = {
            "name": str(stamp_ns),
            "stamp_ns": stamp_ns,
            "score": score,
            "p_value": _number(values.get("p_value")),
            "decision": decision,
            "drift": values.get("drift") == "True",
            "alarm": decision == Decision.ANOMALY.value and score is not None,
            "ms": {
                key.removesuffix(_STAGE): float(value)
                for key, value in values.items()
                if key.endswith(_STAGE) and _number(value) is not None
            },
        }
        before = self._rows.get(stamp_ns)
        if before is None or _seriousness(row) >= _seriousness(before):
            self._rows[stamp_ns] = row


def write_recording(
    recorder: ResultRecorder, out: Path, name: str, events: list[Event] | None
) -> dict[str, Any]:
    """Write the report of a recorded drive and return its summary.

    Args:
        recorder, name: of the drive.
        out: folder to write; an earlier recording or replay is replaced.
        events: anomalies of the drive; None: not known.

    Raises:
        InputError: nothing was recorded, an event lies outside the drive, or `out` contains
            something else.
    """
    rows = recorder.rows
    if not rows:
        raise InputError("recorder: expected statuses of the node, found none")
    details = {"versions": provenance.versions(), "git_commit": provenance.git_commit()}
    with report_folder(out, SUMMARY, WRITTEN) as folder:
        return write_drive(folder, name, rows, recorder.threshold, events, details)


def _seriousness(row: dict[str, Any]) -> int:
    return _SERIOUS.index(row["decision"]) if row["decision"] in _SERIOUS else 1


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--name", default="drive", help="name of the drive in the report")
    parser.add_argument("--labels", type=Path, help="events of the drive, as for replay")
    parser.add_argument("--node", default="/semantic_anomaly", help="full name of the node")
    parser.add_argument("--camera", default="camera", help="name of the camera in the node")
    parser.add_argument(
        "--idle-s",
        type=float,
        default=0.0,
        help="end after this time without a status; 0: when interrupted",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Record until stopped or idle, and write the report.

    Returns:
        0, or with one line on stderr 2 for bad input, 1 for any other failure.
    """
    forbid_writing_by_all()
    arguments = sys.argv if argv is None else ["result_recorder", *argv]
    args = _parser().parse_args(rclpy.utilities.remove_ros_args(arguments)[1:])
    try:
        extras.require("matplotlib.figure", "jinja2")
        refuse_other_content(args.out, SUMMARY, WRITTEN)
        events = read_events(args.labels) if args.labels else None
        rclpy.init(args=arguments)
        recorder = ResultRecorder(args.node, args.camera)
        _record(recorder, args.idle_s)
        summary = write_recording(recorder, args.out, args.name, events)
    except SemanticAnomalyError as error:
        print(f"result_recorder: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    finally:
        rclpy.try_shutdown()
    print(f"recorded {summary['frames']} frames, {len(summary['alarms'])} alarms; wrote {args.out}")
    return 0


def _record(recorder: ResultRecorder, idle_s: float) -> None:
    executor = SingleThreadedExecutor()
    executor.add_node(recorder)
    try:
        while rclpy.ok():
            executor.spin_once(timeout_sec=0.1)
            if idle_s and time.monotonic() - recorder.received_s > idle_s:
                return
    except (KeyboardInterrupt, ExternalShutdownException):
        return


if __name__ == "__main__":
    sys.exit(main())
