"""Make the threshold of an index from nominal drives that it has not seen."""

from __future__ import annotations

import argparse
from pathlib import Path

from semantic_anomaly.cli.options import add_detector_options, add_topic_option, settings_of
from semantic_anomaly.cli.tables import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly calibrate`."""
    parser.add_argument("index", type=Path, metavar="INDEX", help="folder of the index")
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="nominal folder of images, video or rosbag2 bag; 'SOURCE[START:STOP]' takes a part",
    )
    parser.add_argument(
        "--target-false-alarm-rate",
        type=float,
        metavar="RATE",
        help="share of nominal frames that may be called anomalous (default 0.01)",
    )
    add_topic_option(parser)
    add_detector_options(parser)


def run(args: argparse.Namespace) -> int:
    """Calibrate an index, store the calibration in its folder and describe it."""
    from semantic_anomaly import offline
    from semantic_anomaly.index import NominalIndex

    settings, camera = settings_of(
        args, args.index, target_false_alarm_rate=args.target_false_alarm_rate
    )
    index = NominalIndex.load(args.index)
    calibration = offline.calibrate(settings, camera, index, args.sources, topic=args.topic)
    path = calibration.save(args.index)
    rows = [
        ("threshold", f"{calibration.threshold:.4f}"),
        ("target false-alarm rate", f"{calibration.target_false_alarm_rate:g}"),
        ("nominal frames", f"{calibration.count}"),
        ("drives", ", ".join(f"{name} ({count})" for name, count in calibration.drives)),
        (
            "scores, least/median/most",
            f"{calibration.scores[0]:.4f} / {calibration.scores[calibration.count // 2]:.4f} / "
            f"{calibration.scores[-1]:.4f}",
        ),
    ]
    print(table(rows))
    print(f"wrote {path}")
    return 0
