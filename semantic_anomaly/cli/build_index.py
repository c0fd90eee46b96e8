"""Build the index of nominal embeddings from nominal drives."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from semantic_anomaly.cli.options import (
    add_detector_options,
    add_fleet_options,
    add_index_output,
    add_sources_argument,
    positive,
    refuse_fleet_options,
    settings_of,
    shards_folder,
)
from semantic_anomaly.cli.tables import folder_size, print_losses, report_losses, table

if TYPE_CHECKING:
    from semantic_anomaly.calibration.calibration import Calibration
    from semantic_anomaly.index.nominal_index import NominalIndex


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly build-index`."""
    add_sources_argument(parser)
    add_index_output(parser)
    parser.add_argument(
        "--stride", type=positive, default=1, metavar="N", help="use every N-th frame (default 1)"
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="calibrate it too, each drive against the others, without embedding frames again that "
        "fit into memory; rates: --set target_false_alarm_rate=0.05",
    )
    add_detector_options(parser)
    add_fleet_options(parser)


def run(args: argparse.Namespace) -> int:
    """Build and write an index and print a summary."""
    if args.ray is not None:
        return _run_on_cluster(args)
    refuse_fleet_options(args)
    from semantic_anomaly.calibration.calibration import Calibration
    from semantic_anomaly.offline.build_index import build_index
    from semantic_anomaly.offline.drives import open_drives

    settings, camera = settings_of(args)
    # Opened here, so that their losses can be reported.
    sources = list(open_drives(args.sources, args.topic).values())
    index = build_index(
        sources,
        settings=settings,
        camera=camera,
        out=args.out,
        force=args.force,
        stride=args.stride,
        calibrated=args.calibrate,
        progress=True,
    )
    _print_summary(index, args.out)
    _print_written(args.out, Calibration.load(args.out, camera) if args.calibrate else None)
    return report_losses(sources)


def _run_on_cluster(args: argparse.Namespace) -> int:
    from semantic_anomaly.fleet.build_index import build_index_on_cluster

    settings, camera = settings_of(args)
    built = build_index_on_cluster(
        args.sources,
        address=args.ray,
        shards=shards_folder(args),
        out=args.out,
        settings=settings,
        camera=camera,
        force=args.force,
        topic=args.topic,
        stride=args.stride,
        calibrated=args.calibrate,
        num_gpus=args.num_gpus or 0.0,
        progress=True,
    )
    content = built.index.content
    _print_summary(built.index, args.out)
    print(f"{len(content.sources)} sources, of which {built.ran} were read by this run")
    fleet = built.calibration
    _print_written(args.out, fleet.calibration if fleet else None)
    failed = (*content.failed, *(fleet.failed if fleet else ()))
    return print_losses(built.losses, ((f.name, f.reason) for f in failed))


def _print_written(out: Path, calibration: Calibration | None) -> None:
    if calibration is None:
        print(f"wrote {out}; next: semantic-anomaly calibrate {out}")
    else:
        print(f"wrote {out}; threshold {calibration.threshold:.4f}; {calibration.promise}")


def _print_summary(index: NominalIndex, out: Path) -> None:
    names = {
        "patches seen": "seen",
        "stored": "stored",
        "suppressed as near-duplicates": "suppressed",
        "dropped, index full": "dropped",
    }
    # Of every stage, as the commands that edit an index print entries.
    rows = [
        (title, " + ".join(f"{getattr(stage.report, name)}" for stage in index.stages))
        for title, name in names.items()
    ]
    print(table([*rows, ("size on disk", folder_size(out))]))
