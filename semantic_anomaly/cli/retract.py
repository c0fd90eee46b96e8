"""Retract entries of an index, to find anomalies that it missed."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from semantic_anomaly.cli.edits import after_rows, entry_numbers
from semantic_anomaly.cli.tables import table
from semantic_anomaly.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly retract`."""
    parser.add_argument("index", type=Path, metavar="INDEX", help="folder of the index")
    parser.add_argument(
        "--entries",
        metavar="12,15-20,1:33",
        help="numbers as 'explain' prints them, 'STAGE:' before those of a further stage; they "
        "stay until an addition is undone",
    )
    parser.add_argument("--frame", metavar="NAME", help="all entries of a nominal frame")
    parser.add_argument(
        "--near",
        metavar="ENTRY",
        help="an entry and those of its stage near it; needs --within",
    )
    parser.add_argument("--within", type=float, metavar="DISTANCE", help="cosine distance, 0 to 2")
    parser.add_argument("--note", default="", metavar="TEXT", help="why, kept with the edit")


def run(args: argparse.Namespace) -> int:
    """Retract all entries that the options name, as one edit."""
    from semantic_anomaly.index import edits as index_edits
    from semantic_anomaly.index.nominal_index import NominalIndex
    from semantic_anomaly.offline.edit_index import save_edited
    from semantic_anomaly.storage import folder_bytes, refuse_unwritable

    if (args.near is None) != (args.within is None):
        raise InputError("--near and --within: expected both or neither")
    if args.entries is None and args.frame is None and args.near is None:
        raise InputError("retract: expected --entries, --frame or --near, found none of them")
    index = NominalIndex.load(args.index)
    refuse_unwritable(args.index, folder_bytes(args.index))
    named: dict[int, list[int]] = {}

    def add(entries: Mapping[int, Sequence[int]]) -> None:
        for stage, of_stage in entries.items():
            named.setdefault(stage, []).extend(of_stage)

    if args.entries is not None:
        add(entry_numbers("--entries", args.entries))
    if args.frame is not None:
        add(index_edits.of_frame(index, args.frame))
    if args.near is not None:
        for stage, of_stage in entry_numbers("--near", args.near).items():
            for number in of_stage:
                add(
                    {
                        stage: index_edits.near(
                            index_edits.stage_of(index, stage), number, args.within
                        )
                    }
                )
    edited = index_edits.retract(index, named, note=args.note)
    calibration = save_edited(args.index, index, edited)
    last = edited.edits[-1]
    print(table([("edit", f"{last.number}: {last.what}"), *after_rows(edited, calibration)]))
    print(f"undo with: semantic-anomaly undo-edit {args.index} {last.number}")
    return 0
