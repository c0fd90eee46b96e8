"""Make the index of nominal embeddings from nominal drives."""

from __future__ import annotations

import argparse
from pathlib import Path

from semantic_anomaly.cli.options import (
    add_detector_options,
    add_topic_option,
    positive,
    settings_of,
)
from semantic_anomaly.cli.tables import megabytes, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly build-index`."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="folder of images, video or rosbag2 bag; 'SOURCE[START:STOP]' takes a part of it",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="INDEX", help="folder of the index to be"
    )
    parser.add_argument(
        "--stride", type=positive, default=1, metavar="N", help="take every N-th frame (default 1)"
    )
    add_topic_option(parser)
    add_detector_options(parser)


def run(args: argparse.Namespace) -> int:
    """Build, save and describe an index."""
    from semantic_anomaly.index.format import refuse_other_folder
    from semantic_anomaly.offline.build_index import build_index

    # Before the work rather than after it.
    refuse_other_folder(args.out)
    settings, camera = settings_of(args)
    index = build_index(settings, camera, args.sources, topic=args.topic, stride=args.stride)
    index.save(args.out)
    size = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    report = index.report
    rows = [
        ("patches seen", f"{report.seen}"),
        ("stored", f"{report.stored}"),
        ("suppressed as near-duplicates", f"{report.suppressed}"),
        ("dropped, index full", f"{report.dropped}"),
        ("size on disk", megabytes(size)),
    ]
    print(table(rows))
    print(f"wrote {args.out}; next: semantic-anomaly calibrate {args.out} OTHER_DRIVES...")
    return 0
