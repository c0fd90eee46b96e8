"""Merge indexes of one camera into one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from semantic_anomaly.cli.options import add_index_output, positive
from semantic_anomaly.cli.tables import folder_size, table
from semantic_anomaly.errors import InputError

if TYPE_CHECKING:
    from semantic_anomaly.index.nominal_index import NominalIndex


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly merge-index`."""
    parser.add_argument(
        "indexes",
        type=Path,
        nargs="+",
        metavar="INDEX",
        help="folders of indexes of one camera, built with the same settings from other drives",
    )
    add_index_output(parser)
    parser.add_argument(
        "--max-entries",
        type=positive,
        metavar="N",
        help="most entries of each stage (default: the largest limit of the indexes)",
    )


def run(args: argparse.Namespace) -> int:
    """Merge, write the index and print a summary."""
    from semantic_anomaly.offline.merge_index import merge_indexes

    if len(args.indexes) < 2:
        raise InputError(f"merge: expected at least two indexes, found {len(args.indexes)}")
    index = merge_indexes(
        args.indexes, args.out, force=args.force, max_entries=args.max_entries, progress=True
    )
    print(table([*merged_rows(index), ("size on disk", folder_size(args.out))]))
    print(f"wrote {args.out}; next: semantic-anomaly calibrate {args.out}")
    return 0


def merged_rows(index: NominalIndex) -> list[tuple[str, str]]:
    """Return what a merged index was made of, for a table."""
    reports = [stage.report for stage in index.stages]
    return [
        ("indexes merged", f"{len(index.content.parts)}"),
        ("entries of these", f"{sum(part.entries for part in index.content.parts)}"),
        ("stored", " + ".join(f"{report.stored}" for report in reports)),
        ("suppressed as near-duplicates", " + ".join(f"{r.suppressed}" for r in reports)),
        ("dropped, index full", " + ".join(f"{report.dropped}" for report in reports)),
        ("recordings", f"{len(index.recordings)}"),
        ("edits", f"{len(index.edits)}"),
    ]
