"""Check the results of an index against requirements."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from semantic_anomaly.cli.tables import table
from semantic_anomaly.evaluation.measures import figure, interval

if TYPE_CHECKING:
    from semantic_anomaly.evaluation.acceptance import Verdict

_HEADER = ("requirement", "limit", "value", "95 %", "count", "drives", "verdict")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly accept`."""
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="RESULTS",
        help="folders written by evaluate, or by replay with --labels, of one index",
    )
    parser.add_argument(
        "--requirements",
        type=Path,
        required=True,
        metavar="FILE.yaml",
        help="limits of measures; config/acceptance.yaml is an example",
    )
    parser.add_argument(
        "--against",
        type=Path,
        nargs="+",
        default=[],
        metavar="RESULTS",
        help="results of another index or version on the same frames, for worse_by_at_most",
    )
    parser.add_argument(
        "--junit", type=Path, metavar="FILE.xml", help="file to write the verdicts to as JUnit XML"
    )


def run(args: argparse.Namespace) -> int:
    """Print the verdicts, write them as JUnit XML, and return 0, or 3 if one is not met."""
    from semantic_anomaly.cli import DONE, INCOMPLETE
    from semantic_anomaly.evaluation.acceptance import accept, read_requirements
    from semantic_anomaly.storage import atomic_write_bytes, refuse_unwritable

    if args.junit:
        refuse_unwritable(args.junit)
    requirements = read_requirements(args.requirements)
    acceptance = accept(args.results, requirements, args.against, progress=True)
    if args.junit:
        atomic_write_bytes(args.junit, acceptance.junit())
    compared = [acceptance.results, *([acceptance.baseline] if acceptance.baseline else [])]
    print(", compared with ".join(f"index {r.index[:12]} (version {r.version})" for r in compared))
    print()
    print(table([_row(verdict) for verdict in acceptance.verdicts], _HEADER))
    for verdict in acceptance.verdicts:
        if verdict.remark:
            print(f"{verdict.requirement.name}: {verdict.remark}")
    for warning in acceptance.results.warnings:
        print(f"warning: {warning}")
    failed = sum(not verdict.met for verdict in acceptance.verdicts)
    print(f"{len(acceptance.verdicts) - failed} of {len(acceptance.verdicts)} requirements met")
    if args.junit:
        print(f"wrote {args.junit}")
    return INCOMPLETE if failed else DONE


def _row(verdict: Verdict) -> tuple[str, ...]:
    requirement = verdict.requirement
    value = f"{verdict.value:+.3f}" if requirement.paired else figure(verdict.value)
    return (
        requirement.name,
        requirement.limit_text,
        value,
        interval(verdict.interval),
        f"{verdict.count}",
        f"{verdict.drives}",
        "met" if verdict.met else "NOT MET",
    )
