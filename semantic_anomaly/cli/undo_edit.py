"""Undo an edit of an index."""

from __future__ import annotations

import argparse
from pathlib import Path

from semantic_anomaly.cli.edits import after_rows
from semantic_anomaly.cli.options import positive
from semantic_anomaly.cli.tables import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly undo-edit`."""
    parser.add_argument("index", type=Path, metavar="INDEX", help="folder of the index")
    parser.add_argument(
        "number", nargs="?", type=positive, metavar="NUMBER", help="of the edit; default: the last"
    )


def run(args: argparse.Namespace) -> int:
    """Undo one edit: retracted entries return, added entries are removed."""
    from semantic_anomaly.index import edits as index_edits
    from semantic_anomaly.index.nominal_index import NominalIndex
    from semantic_anomaly.offline.edit_index import save_edited
    from semantic_anomaly.storage import folder_bytes, refuse_unwritable

    index = NominalIndex.load(args.index)
    refuse_unwritable(args.index, folder_bytes(args.index))
    undone, edit = index_edits.undo(index, args.number)
    calibration = save_edited(args.index, index, undone)
    print(table([("undone", f"{edit.number}: {edit.what}"), *after_rows(undone, calibration)]))
    return 0
