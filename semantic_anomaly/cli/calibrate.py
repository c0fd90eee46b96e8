"""Calibrate an index with nominal drives that it has not seen."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from semantic_anomaly.cli.options import add_detector_options, add_sources_argument, settings_of
from semantic_anomaly.cli.tables import drives_listed, report_losses, table
from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.measures import figure, interval


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly calibrate`."""
    parser.add_argument("index", type=Path, metavar="INDEX", help="folder of the index")
    add_sources_argument(parser)
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
        help="share of nominal episodes of --episode-s seconds that may raise an alarm (default: "
        "no such rate); needs every frame of the drives",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; print the false-alarm rates of the calibration on the sources, "
        "which are further nominal drives",
    )
    parser.add_argument(
        "--episode-s",
        type=float,
        metavar="S",
        help="length of an episode in seconds (default: the setting, 10)",
    )
    add_detector_options(parser)


def run(args: argparse.Namespace) -> int:
    """Calibrate an index, write the calibration to its folder and print a summary."""
    if args.check:
        return _check(args)
    from semantic_anomaly.index.nominal_index import NominalIndex
    from semantic_anomaly.offline.calibrate import calibrate
    from semantic_anomaly.offline.drives import open_drives

    settings, camera = settings_of(
        args,
        args.index,
        target_false_alarm_rate=args.target_false_alarm_rate,
        target_episode_rate=args.target_episode_rate,
        episode_s=args.episode_s,
    )
    # Opened here, so that their losses can be reported.
    sources = list(open_drives(args.sources, args.topic).values())
    index = NominalIndex.load(args.index)
    calibration = calibrate(index, sources, settings=settings, camera=camera, progress=True)
    path = calibration.save(args.index)
    settings = calibration.resolve(settings.for_camera(camera))
    episode_rows = []
    if (episodes := calibration.episodes) is not None:
        target = f"{episodes.target_episode_rate:g} of episodes of {episodes.episode_s:g} s"
        episode_rows = [
            ("target of episodes", target),
            ("nominal episodes", f"{len(episodes.scores)}"),
        ]
    rows = [
        ("threshold", f"{calibration.threshold_of(settings):.4f}"),
        ("target false-alarm rate", f"{calibration.target_false_alarm_rate:g}"),
        *episode_rows,
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
    return report_losses(sources)


def _check(args: argparse.Namespace) -> int:
    from semantic_anomaly.detection.detector import load_detector
    from semantic_anomaly.evaluation.false_alarms import false_alarm_rates

    if args.target_false_alarm_rate is not None or args.target_episode_rate is not None:
        raise InputError(
            "--check: the target rates are those of the calibration, found others in the options"
        )
    settings, camera = settings_of(args, args.index)
    detector = load_detector(settings, camera, need_calibration=True)
    length = detector.settings.episode_s if args.episode_s is None else args.episode_s
    rates = false_alarm_rates(
        detector, args.sources, topic=args.topic, episode_s=length, progress=True
    )
    frames = f"of {rates['frames']} frames above the threshold; target {rates['target']:g}"
    episodes = f"of {rates['episodes']} complete episodes of {length:g} s with an alarm"
    if target := detector.settings.target_episode_rate:
        episodes += f"; target {target:g}"
    per_hour = f"{figure(rates['false_alarms_per_hour'], 1)} an hour"
    rows = [
        _rate_row(rates, "frame", frames),
        _rate_row(rates, "alarm", "of the frames in confirmed alarm"),
        _rate_row(rates, "episode", episodes),
        ("false alarms", f"{rates['false_alarms']}", "", per_hour),
    ]
    print(table(rows, ("rate", "value", f"95 %, {rates['drives']} drives", "remark")))
    if not rates["kept"]:
        print("warning: more false alarms than the target: calibrate with drives like these")
    return 0


def _rate_row(rates: dict[str, Any], name: str, remark: str) -> tuple[str, ...]:
    bounds = interval(rates[f"{name}_rate_interval"])
    return name, figure(rates[f"{name}_rate"]), bounds, remark
