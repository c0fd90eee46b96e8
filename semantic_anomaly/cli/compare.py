"""Put the results of evaluations side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from semantic_anomaly.cli.tables import table
from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.measures import MEASURES, figure

# Measures of different data or protocols cannot be compared.
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
    names = [folder.resolve().name for folder in args.reports]
    header = ["measure", names[0]]
    for name in names[1:]:
        header += [name, "difference"]
    rows = [
        _row(key, [report.get(key) for report in reports], _DIGITS)
        for keys in MEASURES.values()
        for key in keys
    ]
    latencies = [r.get("latency_ms", {}).get("total", {}).get("p50") for r in reports]
    rows.append(_row("ms a frame (median)", latencies, 1))
    print(table([row for row in rows if row], header))
    for key in _SAME:
        values = [json.dumps(report.get(key), sort_keys=True) for report in reports]
        if len(set(values)) > 1:
            listed = ", ".join(f"{n}: {v}" for n, v in zip(names, values, strict=True))
            print(f"warning: {key} differs ({listed}): the measures are not comparable")
    return 0


def _row(name: str, values: list[float | None], digits: int) -> list[str]:
    """Return the cells of a measure, none when no report has it."""
    first = values[0]
    if all(value is None for value in values):
        return []
    cells = [name, figure(first, digits)]
    for value in values[1:]:
        difference = None if value is None or first is None else value - first
        cells += [figure(value, digits), "-" if difference is None else f"{difference:+.{digits}f}"]
    return cells


def _read(folder: Path) -> dict[str, Any]:
    from semantic_anomaly.evaluation.datasets import read_json

    content = read_json(folder / "results.json", "report")
    if not isinstance(content, dict) or "frame_auroc" not in content:
        raise InputError(f"report '{folder}': its results.json is not of evaluate or score-maps")
    return content
