"""Drive along synthetic streets and write images with ground truth, or bags."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from semantic_anomaly.cli.options import count, positive
from semantic_anomaly.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from semantic_anomaly.synthetic import StreetDrive

# Bags of a vehicle carry the time of day; a stamp of zero means 'not stamped' to many tools.
_BAG_START_NS = 1_700_000_000_000_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly synth`."""
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    parser.add_argument("--drives", type=positive, default=1, help="number of drives")
    parser.add_argument("--frames", type=positive, default=100, help="length of a drive, 10 Hz")
    parser.add_argument(
        "--stride", type=positive, default=1, help="write every so many frames (folder)"
    )
    parser.add_argument("--seed", type=count, default=0, help="of the first drive; the next is +1")
    parser.add_argument(
        "--anomalies",
        default="none",
        help="none, all, odd-objects, odd-arrangements, or kinds separated by commas",
    )
    parser.add_argument(
        "--per-drive", type=positive, default=1, help="anomalies met on a drive, one after another"
    )
    parser.add_argument("--format", choices=("folder", "mcap", "sqlite3"), default="folder")
    parser.add_argument("--compressed", action="store_true", help="jpeg images (bags)")
    parser.add_argument("--depth", action="store_true", help="write depth as well")
    parser.add_argument("--instances", action="store_true", help="write instance ids (folder)")
    parser.add_argument("--size", type=_size, default="360x640", help="height x width in pixels")


def run(args: argparse.Namespace) -> int:
    """Write the drives and print what was written.

    Raises:
        InputError: an argument that cannot be used, or an output that exists.
    """
    from semantic_anomaly.storage import refuse_unwritable
    from semantic_anomaly.synthetic import StreetDrive
    from semantic_anomaly.synthetic.export import write_bag, write_folder

    bags = args.format != "folder"
    if args.compressed and not bags:
        raise InputError("--compressed: only bags have compressed images; use --format mcap")
    if bags and (args.instances or args.stride > 1):
        raise InputError("--instances and --stride: only folders have them; use --format folder")
    kinds = _kinds(args.anomalies)
    seeds = range(args.seed, args.seed + args.drives)

    def drives() -> Iterator[StreetDrive]:
        for number, seed in enumerate(seeds):
            # Kinds are assigned in turn, so that few drives have as many of them as possible.
            first = number * args.per_drive
            anomalies = [kinds[(first + j) % len(kinds)] for j in range(args.per_drive) if kinds]
            start_ns = _BAG_START_NS if bags else 0
            try:
                drive = StreetDrive(
                    seed, args.frames, anomalies=anomalies, image_hw=args.size, start_ns=start_ns
                )
            except ValueError as error:
                raise InputError(f"drive of seed {seed}: {error}") from error
            yield drive

    # Every drive is checked before the first is rendered.
    for _ in drives():
        pass
    # PNG images take about a byte a pixel, raw ones three; depth takes two or four.
    pixel_bytes = (3 if bags and not args.compressed else 1) + (4 if bags else 2) * args.depth
    frames = len(range(0, args.frames, args.stride))
    drive_bytes = frames * args.size[0] * args.size[1] * pixel_bytes
    if not bags:
        refuse_unwritable(args.out, args.drives * drive_bytes)
        images = write_folder(
            drives(),
            args.out,
            instances=args.instances,
            depth=args.depth,
            stride=args.stride,
            total=args.drives * frames,
        )
        print(f"{images} images of {args.drives} drives in {args.out}")
        return 0
    paths = [args.out / f"drive_{seed}" for seed in seeds]
    if existing := [str(path) for path in paths if path.exists()]:
        raise InputError(f"expected new bags, found already there: {', '.join(existing)}")
    refuse_unwritable(paths[0], args.drives * drive_bytes)
    for drive, path in zip(drives(), paths, strict=True):
        images = write_bag(
            drive, path, storage=args.format, compressed=args.compressed, depth=args.depth
        )
        print(f"{images} images in {path}")
    return 0


def _kinds(wanted: str) -> tuple[str, ...]:
    from semantic_anomaly.synthetic import KINDS, ODD_ARRANGEMENTS, ODD_OBJECTS

    groups = {"all": KINDS, "odd-objects": ODD_OBJECTS, "odd-arrangements": ODD_ARRANGEMENTS}
    groups["none"] = ()
    if wanted in groups:
        return groups[wanted]
    kinds = tuple(kind.strip() for kind in wanted.split(","))
    for kind in kinds:
        if kind not in KINDS:
            raise UnknownNameError("kind of anomaly", kind, (*KINDS, *groups))
    return kinds


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)\s*[xX]\s*(\d+)\s*", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected height x width such as 360x640, found '{text}'")
    return int(match[1]), int(match[2])
