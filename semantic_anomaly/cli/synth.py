"""Drive along synthetic streets and write images with ground truth, or bags."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from semantic_anomaly.synthetic import StreetDrive

# Bags of a vehicle carry the time of day; a stamp of zero means 'not stamped' to many tools.
_BAG_START_NS = 1_700_000_000_000_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly synth`."""
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    parser.add_argument("--drives", type=int, default=1, help="number of drives")
    parser.add_argument("--frames", type=int, default=100, help="length of a drive, 10 Hz")
    parser.add_argument("--stride", type=int, default=1, help="write every so many frames (folder)")
    parser.add_argument("--seed", type=int, default=0, help="of the first drive; the next is +1")
    parser.add_argument(
        "--anomalies",
        default="none",
        help="none, all, odd-objects, odd-arrangements, or kinds separated by commas",
    )
    parser.add_argument(
        "--per-drive", type=int, default=1, help="anomalies met on a drive, one after another"
    )
    parser.add_argument("--format", choices=("folder", "mcap", "sqlite3"), default="folder")
    parser.add_argument("--compressed", action="store_true", help="jpeg images (bags)")
    parser.add_argument("--depth", action="store_true", help="write depth as well")
    parser.add_argument("--instances", action="store_true", help="write instance ids (folder)")
    parser.add_argument("--size", default="360x640", help="height x width in pixels")


def run(args: argparse.Namespace) -> int:
    """Write the drives and print what was written.

    Raises:
        InputError: an argument that cannot be used, or an output that exists.
    """
    from semantic_anomaly.errors import InputError
    from semantic_anomaly.synthetic.export import write_bag, write_folder

    _check(args)
    kinds, size = _kinds(args.anomalies), _size(args.size)
    bags = args.format != "folder"

    def drives() -> Iterator[StreetDrive]:
        for number in range(args.drives):
            yield _make_drive(args, number, kinds, size, _BAG_START_NS if bags else 0)

    # Every drive is checked before the first is rendered.
    for _ in drives():
        pass
    if not bags:
        images = write_folder(
            drives(),
            args.out,
            instances=args.instances,
            depth=args.depth,
            stride=args.stride,
            total=args.drives * len(range(0, args.frames, args.stride)),
        )
        print(f"{images} images of {args.drives} drives in {args.out}")
        return 0
    places = [args.out / f"drive_{args.seed + number}" for number in range(args.drives)]
    if there := [str(place) for place in places if place.exists()]:
        raise InputError(f"expected new bags, found already there: {', '.join(there)}")
    for drive, place in zip(drives(), places, strict=True):
        images = write_bag(
            drive, place, storage=args.format, compressed=args.compressed, depth=args.depth
        )
        print(f"{images} images in {place}")
    return 0


def _check(args: argparse.Namespace) -> None:
    from semantic_anomaly.errors import InputError

    bounds = {"drives": 1, "frames": 1, "stride": 1, "per_drive": 1, "seed": 0}
    for name, least in bounds.items():
        if getattr(args, name) < least:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option}: expected at least {least}, found {getattr(args, name)}")
    if args.format == "folder" and args.compressed:
        raise InputError("--compressed: only bags have compressed images; use --format mcap")
    if args.format != "folder" and (args.instances or args.stride > 1):
        raise InputError("--instances and --stride: only folders have them; use --format folder")


def _kinds(wanted: str) -> tuple[str, ...]:
    from semantic_anomaly.errors import UnknownNameError
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
    from semantic_anomaly.errors import InputError

    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"--size: expected height x width such as 360x640, found '{text}'")
    return int(parts[0]), int(parts[1])


def _make_drive(
    args: argparse.Namespace, number: int, kinds: tuple[str, ...], size: tuple[int, int], start: int
) -> StreetDrive:
    from semantic_anomaly.errors import InputError
    from semantic_anomaly.synthetic import StreetDrive

    # Kinds are dealt in turn, so that few drives meet as many of them as possible.
    first, count = number * args.per_drive, args.per_drive if kinds else 0
    met = [kinds[(first + j) % len(kinds)] for j in range(count)]
    seed = args.seed + number
    try:
        return StreetDrive(seed, args.frames, anomalies=met, image_hw=size, start_ns=start)
    except ValueError as error:
        raise InputError(f"drive of seed {seed}: {error}") from error
