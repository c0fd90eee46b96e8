"""Calibrate an index, with its own drives or with others."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semantic_anomaly.cli.options import (
    add_detector_options,
    add_fleet_options,
    add_sources_argument,
    refuse_fleet_options,
    settings_of,
)
from semantic_anomaly.cli.tables import drives_listed, print_losses, report_losses, table
from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.measures import figure, interval

if TYPE_CHECKING:
    from semantic_anomaly.calibration.calibration import Calibration
    from semantic_anomaly.settings import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly calibrate`."""
    parser.add_argument("index", type=Path, metavar="INDEX", help="folder of the index")
    add_sources_argument(parser, needed=False)
    parser.add_argument(
        "--leave-one-drive-out",
        action="store_true",
        help="take the drives of the index besides SOURCE, each compared with the entries of the "
        "others; the default without SOURCE",
    )
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="OLD=NEW",
        dest="moved",
        help="new beginning of a path from which drives of the index have moved; may be repeated",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        metavar="P",
        help="probability, over new drives, that the target rates hold (default 0.9, or as much "
        "as the number of drives D allows: D / (D + 1))",
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
    add_fleet_options(parser)


def run(args: argparse.Namespace) -> int:
    """Calibrate an index, write the calibration to its folder and print a summary."""
    if args.check and args.ray is not None:
        raise InputError("--check: expected no --ray, found it")
    if args.ray is None:
        refuse_fleet_options(args)
    if args.check:
        return _check(args)
    from semantic_anomaly.calibration.format import FILE_NAME
    from semantic_anomaly.index.nominal_index import NominalIndex
    from semantic_anomaly.offline.calibrate import calibrate
    from semantic_anomaly.offline.drives import open_drives
    from semantic_anomaly.storage import refuse_unwritable

    settings, camera = settings_of(
        args,
        args.index,
        target_false_alarm_rate=args.target_false_alarm_rate,
        confidence=args.confidence,
        target_episode_rate=args.target_episode_rate,
        episode_s=args.episode_s,
    )
    if args.ray is not None:
        return _run_on_cluster(args, settings, camera)
    # Opened here, so that their losses can be reported.
    sources = list(open_drives(args.sources, args.topic).values()) if args.sources else []
    refuse_unwritable(args.index / FILE_NAME)
    index = NominalIndex.load(args.index)
    calibration = calibrate(
        index,
        sources or None,
        leave_one_drive_out=args.leave_one_drive_out,
        moved=moved_sources(args.moved),
        settings=settings,
        camera=camera,
        progress=True,
    )
    _save(args, calibration, settings, camera)
    return report_losses(sources)


def _run_on_cluster(args: argparse.Namespace, settings: Settings, camera: str) -> int:
    from semantic_anomaly.fleet.calibrate import calibrate_on_cluster

    fleet = calibrate_on_cluster(
        args.index,
        args.sources,
        address=args.ray,
        shards=args.shards or args.index.with_name(f"{args.index.name}.shards"),
        settings=settings,
        camera=camera,
        leave_one_drive_out=args.leave_one_drive_out,
        moved=moved_sources(args.moved),
        topic=args.topic,
        num_gpus=args.num_gpus or 0.0,
        progress=True,
    )
    _save(args, fleet.calibration, settings, camera)
    return print_losses(fleet.losses, ((f.name, f.reason) for f in fleet.failed))


def _save(
    args: argparse.Namespace, calibration: Calibration, settings: Settings, camera: str
) -> None:
    """Write a calibration into the index folder, and print a summary."""
    path = calibration.save(args.index)
    settings = calibration.resolve(settings.for_camera(camera))
    episode_rows = []
    if (episodes := calibration.episodes) is not None:
        target = f"{episodes.target_episode_rate:g} of episodes of {episodes.episode_s:g} s"
        episode_rows = [
            ("target of episodes", target),
            ("nominal episodes", f"{episodes.count}"),
        ]
    least, median, most = np.quantile(calibration.scores, (0.0, 0.5, 1.0))
    rows = [
        ("threshold", f"{calibration.threshold_of(settings):.4f}"),
        ("target false-alarm rate", f"{calibration.target_false_alarm_rate:g}"),
        *episode_rows,
        ("nominal frames", f"{calibration.count}"),
        ("drives", drives_listed(calibration.frames_by_drive.items())),
        ("scores, least/median/most", f"{least:.4f} / {median:.4f} / {most:.4f}"),
    ]
    print(table(rows))
    print(f"{calibration.promise[0].upper()}{calibration.promise[1:]}.")
    print(f"wrote {path}")


def moved_sources(items: Sequence[str]) -> dict[str, str]:
    """Return new beginnings of paths by old ones from OLD=NEW.

    Raises:
        InputError: an item of another form.
    """
    moved = {}
    for item in items:
        old, _, new = item.partition("=")
        if not old or not new:
            raise InputError(f"--source: expected OLD=NEW, found '{item}'")
        moved[old] = new
    return moved


def _check(args: argparse.Namespace) -> int:
    from semantic_anomaly.detection.detector import load_detector
    from semantic_anomaly.evaluation.false_alarms import false_alarm_rates

    if not args.sources:
        raise InputError("--check: expected further nominal drives as SOURCE, found none")
    targets = args.target_false_alarm_rate, args.target_episode_rate, args.confidence
    if any(target is not None for target in targets):
        raise InputError(
            "--check: the target rates and the confidence are those of the calibration, found "
            "others in the options"
        )
    if args.leave_one_drive_out or args.moved:
        raise InputError("--check: expected no drives of the index, found options for them")
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
    of_drives = [
        (row["drive"], f"{row['frames']}", figure(row["frame_rate"])) for row in rates["by_drive"]
    ]
    print(f"\n{table(of_drives, ('drive', 'frames', 'rate of frames'))}")
    assert detector.calibration is not None
    print(f"\npromise: {detector.promise}")
    if not rates["kept"]:
        print("warning: more false alarms than the target: calibrate with drives like these")
    return 0


def _rate_row(rates: dict[str, Any], name: str, remark: str) -> tuple[str, ...]:
    bounds = interval(rates[f"{name}_rate_interval"])
    return name, figure(rates[f"{name}_rate"]), bounds, remark
