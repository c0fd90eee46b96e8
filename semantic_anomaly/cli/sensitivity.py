"""Find out which things a calibrated detector would see, and where in the image."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from semantic_anomaly.cli.options import (
    add_detector_options,
    add_layout_option,
    count,
    positive,
    settings_of,
)
from semantic_anomaly.cli.tables import table
from semantic_anomaly.evaluation.measures import figure, percent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly sensitivity`."""
    parser.add_argument("index", type=Path, metavar="INDEX", help="folder of a calibrated index")
    parser.add_argument(
        "drive",
        metavar="DRIVE",
        help="nominal frames of the camera that neither index nor calibration has seen; "
        "'DRIVE[START:STOP]' selects frames",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="INDEX",
        help="further calibrated indexes, such as of another input size or stage, measured on the "
        "same composites",
    )
    what = parser.add_argument_group("things")
    what.add_argument(
        "--kinds",
        type=_names,
        metavar="KIND,...",
        help="rendered things: cow, sofa, ladder, fallen_tree, overturned_car, "
        "traffic_light_on_road, bench, bin (default: these), person, car",
    )
    what.add_argument(
        "--sizes",
        type=_sizes,
        default=(),
        metavar="PX,...",
        help="longer sides in px (default: 1/24, 1/12, 1/6 and 1/3 of the image's height)",
    )
    what.add_argument(
        "--distances",
        type=_distances,
        default=(),
        metavar="M,...",
        help="distances in m instead of sizes; things have their true size and stand on a flat "
        "ground. Needs --focal-px and the setting camera_height_m",
    )
    what.add_argument("--focal-px", type=float, default=0.0, metavar="PX", help="focal length")
    what.add_argument(
        "--horizon-px", type=float, metavar="ROW", help="row of the horizon (default: the middle)"
    )
    what.add_argument(
        "--cutouts",
        metavar="DATASET",
        help="labelled images, as for evaluate; what their masks mark is cut out and pasted too",
    )
    where = parser.add_argument_group("places")
    where.add_argument(
        "--places",
        type=float,
        nargs=4,
        metavar=("X0", "Y0", "X1", "Y1"),
        default=(0.0, 0.55, 1.0, 1.0),
        help="where things stand, in relative image coordinates (default: 0 .55 1 1, below a "
        "horizon in the middle)",
    )
    where.add_argument(
        "--cells",
        type=positive,
        nargs=2,
        metavar=("ROWS", "COLUMNS"),
        default=(6, 8),
        help="cells of the image for which recall is drawn (default: 6 8)",
    )
    parser.add_argument(
        "--composites", type=positive, default=240, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--frames",
        type=positive,
        default=40,
        metavar="N",
        help="frames of the drive that are used, evenly spaced (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=count, default=0, metavar="N", help="of all choices (default: %(default)s)"
    )
    parser.add_argument(
        "--allow-seen",
        action="store_true",
        help="use frames that index or calibration have seen; the report warns of them",
    )
    add_layout_option(parser)
    add_detector_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, write the report and print its tables."""
    from semantic_anomaly.cli import DONE, INCOMPLETE
    from semantic_anomaly.evaluation.composites import CompositePlan
    from semantic_anomaly.evaluation.sensitivity import sensitivity
    from semantic_anomaly.io.open import open_source

    settings, camera = settings_of(args, args.index)
    chosen = {} if args.kinds is None else {"kinds": args.kinds}
    plan = CompositePlan(
        **chosen,
        sizes_px=args.sizes,
        distances_m=args.distances,
        places_xyxy=tuple(args.places),
        cells=tuple(args.cells),
        composites=args.composites,
        frames=args.frames,
        focal_px=args.focal_px,
        horizon_px=args.horizon_px,
        camera_height_m=settings.for_camera(camera).camera_settings[camera].camera_height_m,
        seed=args.seed,
    )
    # Opened here, so that its losses can be reported.
    source = open_source(args.drive, topic=args.topic)
    found = sensitivity(
        args.index,
        source,
        plan,
        compare=args.compare,
        cutouts=args.cutouts,
        layout=args.layout,
        settings=settings,
        camera=camera,
        out=args.out,
        allow_seen=args.allow_seen,
        progress=True,
    )
    print(_summary(found.results))
    print(f"wrote {args.out}")
    lost = found["bad_frames"] or found["frames_missing"] != 0
    return INCOMPLETE if lost else DONE


def _summary(results: dict[str, Any]) -> str:
    by = f"{'distance' if results['unit'] == 'm' else 'size'} [{results['unit']}]"
    detectors = results["detectors"]
    parts = []
    for detector in detectors:
        untouched = detector["untouched"]
        rows = [
            (size, str(m["composites"]), *(percent(m[key]) for key in _RATES))
            for size, m in detector["by_size"].items()
        ]
        rows.append(
            ("all", str(detector["composites"]), *(percent(detector[key]) for key in _RATES))
        )
        parts += [
            f"{detector['name']}: {untouched['alarms']} of {untouched['frames']} untouched frames "
            f"raise an alarm; pixel AP {figure(detector['pixel_ap'])}",
            table(rows, (by, "composites", "found", "controls", "untouched")),
            "",
        ]
    kinds = [
        (kind, *(percent(d["by_kind"][kind]["recall"]) for d in detectors))
        for kind in detectors[0]["by_kind"]
    ]
    parts.append(table(kinds, ("kind", *(d["name"] for d in detectors))))
    for compared in results["comparisons"]:
        counts = compared["all"]
        parts.append(
            f"\n{compared['first']} and {compared['other']}: {counts['both']} found by both, "
            f"{counts['first_only']} only by the first, {counts['other_only']} only by the other"
        )
    return "\n".join([*parts, *(f"warning: {sentence}" for sentence in results["warnings"])])


_RATES = ("recall", "control_rate", "untouched_rate")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def _distances(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))
