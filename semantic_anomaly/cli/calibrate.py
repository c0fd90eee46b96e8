"""Make the threshold of an index from nominal drives that it has not seen."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_anomaly.cli.options import (
    add_detector_options,
    add_topic_option,
    load_detector,
    settings_of,
)
from semantic_anomaly.cli.tables import drives_listed, figure, table
from semantic_anomaly.errors import InputError

if TYPE_CHECKING:
    from semantic_anomaly.calibration.calibration import Calibration
    from semantic_anomaly.settings import Settings


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
    parser.add_argument(
        "--target-episode-rate",
        type=float,
        metavar="RATE",
        help="share of nominal stretches of --episode-s that may raise an alarm, promised besides "
        "(default: no such promise); needs every frame of the drives",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing, but say what the present calibration's promise comes to on the "
        "sources: further nominal drives",
    )
    parser.add_argument(
        "--episode-s",
        type=float,
        metavar="S",
        help="length of a stretch of driving (default: the setting, 10)",
    )
    add_topic_option(parser)
    add_detector_options(parser)


def run(args: argparse.Namespace) -> int:
    """Calibrate an index, store the calibration in its folder and describe it."""
    if args.check:
        return _check(args)
    from semantic_anomaly.index.nominal_index import NominalIndex
    from semantic_anomaly.offline.calibrate import calibrate

    settings, camera = settings_of(
        args,
        args.index,
        target_false_alarm_rate=args.target_false_alarm_rate,
        target_episode_rate=args.target_episode_rate,
        episode_s=args.episode_s,
    )
    index = NominalIndex.load(args.index)
    calibration = calibrate(settings, camera, index, args.sources, topic=args.topic)
    path = calibration.save(args.index)
    rows = [
        ("threshold", f"{calibration.threshold_of(settings):.4f}"),
        ("target false-alarm rate", f"{calibration.target_false_alarm_rate:g}"),
        *_stretches(calibration, settings),
        ("nominal frames", f"{calibration.count}"),
        ("drives", drives_listed(calibration.drives)),
        (
            "scores, least/median/most",
            f"{calibration.scores[0]:.4f} / {calibration.scores[calibration.count // 2]:.4f} / "
            f"{calibration.scores[-1]:.4f}",
        ),
    ]
    print(table(rows))
    print(f"wrote {path}")
    return 0


def _stretches(calibration: Calibration, settings: Settings) -> list[tuple[str, str]]:
    if calibration.stretches is None:
        return []
    found = calibration.stretches
    told = f"{settings.target_episode_rate:g} of stretches of {found.episode_s:g} s"
    return [("target of stretches", told), ("nominal stretches", f"{len(found.scores)}")]


def _check(args: argparse.Namespace) -> int:
    from semantic_anomaly.evaluation.realised import realised_rates

    if args.target_false_alarm_rate is not None or args.target_episode_rate is not None:
        raise InputError("--check: the target rates are the calibration's own, found others given")
    settings, camera = settings_of(args, args.index)
    detector = load_detector(args, settings, camera)
    length = detector.settings.episode_s if args.episode_s is None else args.episode_s
    found = realised_rates(detector, args.sources, topic=args.topic, episode_s=length)
    stretch = f"of {found['stretches']} whole stretches of {length:g} s with an alarm"
    if promised := detector.settings.target_episode_rate:
        stretch += f"; target {promised:g}"
    hour = found["episodes_per_hour"]
    rows = [
        _rate(found, "frame", f"of {found['frames']} frames above the threshold; target "
              f"{found['target']:g}"),
        _rate(found, "alarm", "of the frames in confirmed alarm"),
        _rate(found, "stretch", stretch),
        ("episodes", f"{found['episodes']}", "", f"{figure(hour, 1)} an hour"),
    ]  # fmt: skip
    print(table(rows, ("rate", "value", f"95 %, {found['drives']} drives", "remark")))
    if not found["kept"]:
        print("warning: more false alarms than promised: calibrate with drives like these")
    return 0


def _rate(found: dict[str, Any], name: str, remark: str) -> tuple[str, ...]:
    interval = found[f"{name}_rate_interval"]
    low_high = " to ".join(figure(end) for end in interval or ())
    return name, figure(found[f"{name}_rate"]), low_high, remark
