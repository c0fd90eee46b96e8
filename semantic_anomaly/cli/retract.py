"""Retract entries of an index, to find anomalies that it missed."""

from __future__ import annotations

import argparse
from pathlib import Path

from semantic_anomaly.cli.edits import after_rows, numbers, part_of, with_part
from semantic_anomaly.cli.options import count
from semantic_anomaly.cli.tables import table
from semantic_anomaly.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly retract`."""
    parser.add_argument("index", type=Path, metavar="INDEX", help="folder of the index")
    parser.add_argument(
        "--entries",
        metavar="12,15-20",
        help="numbers as 'explain' prints them; they stay until an addition is undone",
    )
    parser.add_argument("--frame", metavar="NAME", help="all entries of a nominal frame")
    parser.add_argument(
        "--near", type=count, metavar="ENTRY", help="an entry and those near it; needs --within"
    )
    parser.add_argument("--within", type=float, metavar="DISTANCE", help="cosine distance, 0 to 2")
    parser.add_argument("--part", metavar="NAME", help="part of the index; default: the index")
    parser.add_argument("--note", default="", metavar="TEXT", help="why, kept with the edit")


def run(args: argparse.Namespace) -> int:
    """Retract all entries that the options name, as one edit."""
    from semantic_anomaly.index import edits as index_edits
    from semantic_anomaly.index.nominal_index import NominalIndex
    from semantic_anomaly.offline.edit_index import save_edited

    if (args.near is None) != (args.within is None):
        raise InputError("--near and --within: expected both or neither")
    if args.entries is None and args.frame is None and args.near is None:
        raise InputError("retract: expected --entries, --frame or --near, found none of them")
    whole = NominalIndex.load(args.index)
    index = part_of(whole, args.part)
    named = numbers("--entries", args.entries) if args.entries is not None else []
    if args.frame is not None:
        named += index_edits.of_frame(index, args.frame)
    if args.near is not None:
        named += index_edits.near(index, args.near, args.within)
    edited = index_edits.retract(index, named, note=args.note)
    after = with_part(whole, args.part, edited)
    calibration = save_edited(args.index, whole, after)
    last = edited.edits[-1]
    print(table([("edit", f"{last.number}: {last.what}"), *after_rows(after, calibration)]))
    part = f" --part {args.part}" if args.part else ""
    print(f"undo with: semantic-anomaly undo-edit {args.index} {last.number}{part}")
    return 0
