"""Put the results of evaluations side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from semantic_anomaly.cli.tables import figure, table
from semantic_anomaly.errors import InputError

MEASURES = (
    *("frame_auroc", "tpr", "fpr", "alarm_tpr", "alarm_fpr", "localized"),
    *("pixel_ap", "pixel_auroc", "pixel_fpr95"),
    *(f"component_{m}_{t}" for t in ("oracle", "calibrated") for m in ("siou", "ppv", "f1")),
)
# Figures of different questions must not be read as better or worse.
_SAME = ("dataset", "protocol", "frames_counted", "frames_anomalous", "component_limits")
_DIGITS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly compare`."""
    parser.add_argument(
        "reports",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="folders written by evaluate or score-maps; the first is what others are compared to",
    )


def run(args: argparse.Namespace) -> int:
    """Print every measure of every report, and its difference to the first."""
    if len(args.reports) < 2:
        raise InputError(f"compare: expected at least two folders, found {len(args.reports)}")
    reports = [_read(folder) for folder in args.reports]
    print(comparison([_name(folder) for folder in args.reports], reports))
    return 0


def comparison(names: list[str], reports: list[dict[str, Any]]) -> str:
    """Return the table, and a warning for whatever makes reports differ in kind.

    Args:
        names: one a report.
        reports: contents of results.json.
    """
    rows = []
    for measure in MEASURES:
        values = [report.get(measure) for report in reports]
        if all(value is None for value in values):
            continue
        cells = [figure(values[0], _DIGITS)]
        for value in values[1:]:
            cells += [figure(value, _DIGITS), _difference(value, values[0])]
        rows.append([measure, *cells])
    medians = [_median_ms(report) for report in reports]
    if any(value is not None for value in medians):
        cells = [figure(medians[0], 1)]
        for value in medians[1:]:
            cells += [figure(value, 1), _difference(value, medians[0], 1)]
        rows.append(["ms a frame (median)", *cells])
    header = ["measure", names[0]]
    for name in names[1:]:
        header += [name, "difference"]
    lines = [table(rows, header)]
    for key in _SAME:
        values = [json.dumps(report.get(key), sort_keys=True) for report in reports]
        if len(set(values)) > 1:
            listed = ", ".join(f"{n}: {v}" for n, v in zip(names, values, strict=True))
            lines.append(f"warning: {key} differs ({listed}): the figures answer other questions")
    return "\n".join(lines)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"report '{folder}': expected a results.json, which cannot be read: {error}"
        ) from error
    if not isinstance(content, dict) or "frame_auroc" not in content:
        raise InputError(f"report '{folder}': its results.json is not of evaluate or score-maps")
    return content


def _name(folder: Path) -> str:
    return folder.resolve().name


def _difference(value: float | None, first: float | None, digits: int = _DIGITS) -> str:
    return "-" if value is None or first is None else f"{value - first:+.{digits}f}"


def _median_ms(report: dict[str, Any]) -> float | None:
    median = report.get("latency_ms", {}).get("total", {}).get("p50")
    return None if median is None else float(median)
