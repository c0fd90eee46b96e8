"""Options that several commands share, and the settings they make."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_anomaly.errors import InputError, SettingsError, UnknownNameError
from semantic_anomaly.settings import Settings, read_settings_file
from semantic_anomaly.storage import parse_yaml

if TYPE_CHECKING:
    from semantic_anomaly.evaluation.components import SizeLimits

# YAML 1.1 reads 1e-3 as a string.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def add_detector_options(parser: argparse.ArgumentParser, *, topic: bool = True) -> None:
    """Add --settings, --backbone, --set, --camera, and --topic for commands that read bags."""
    if topic:
        parser.add_argument("--topic", metavar="T", help="image topic, if a bag has several")
    group = parser.add_argument_group("detector")
    group.add_argument(
        "--settings", type=Path, metavar="FILE.yaml", help="parameter file of the node"
    )
    group.add_argument(
        "--node",
        default="",
        metavar="NAME",
        help="node in --settings, with its namespace (default: semantic_anomaly in any namespace, "
        "or else the only node)",
    )
    group.add_argument(
        "--backbone",
        metavar="FOLDER-OR-ID",
        help="shipped name, Hugging Face folder or hub id already downloaded",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="overrides",
        help="any setting, e.g. --set neighbours=3 --set camera.ego_mask=bonnet.png",
    )
    group.add_argument("--camera", metavar="NAME", help="camera, if the settings have several")


def add_fleet_options(parser: argparse.ArgumentParser) -> None:
    """Add --ray, --num-gpus and --shards."""
    group = parser.add_argument_group("fleet", "needs the extra [fleet]; see docs/fleet.md")
    group.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="run one task per source on Ray: HOST:PORT or auto connects to a cluster; without an "
        "address, one is started on this machine (put --ray after the sources)",
    )
    group.add_argument(
        "--num-gpus",
        type=_share,
        metavar="N",
        help="GPUs of each task, such as 1 or 0.5 (default: 0, tasks run on CPUs)",
    )
    group.add_argument(
        "--shards",
        type=Path,
        metavar="DIR",
        help="folder that all nodes share, for finished parts; the same command runs only what "
        "is missing there (default: beside the output, with '.shards' after its name)",
    )


def report_folders(out: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return the folders of reports by name: `out` for one, folders in it for several."""
    if len(names) == 1:
        return {names[0]: out}
    return {name: out / name for name in names}


def refuse_fleet_options(args: argparse.Namespace) -> None:
    """Refuse options of `add_fleet_options` that have no effect without --ray.

    Raises:
        InputError: naming the option.
    """
    for name in ("num_gpus", "shards"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')}: expected --ray, found none")


def shards_folder(args: argparse.Namespace) -> Path:
    """Return --shards, or the folder beside --out."""
    beside: Path = args.out.with_name(f"{args.out.name}.shards")
    return args.shards or beside


def add_index_output(parser: argparse.ArgumentParser) -> None:
    """Add --out, the folder of a new index, and --force."""
    parser.add_argument(
        "--out", type=Path, required=True, metavar="INDEX", help="folder of the new index"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace an index in --out, with its calibrations and edits",
    )


def add_components_option(parser: argparse.ArgumentParser) -> None:
    """Add --components, a `SizeLimits`."""
    parser.add_argument(
        "--components",
        type=_component_limits,
        default="anomaly-track",
        metavar="LIMITS",
        help="smallest components that count: anomaly-track (500 px predicted, 100 px "
        "anomaly), obstacle-track (50, 10) or PREDICTED,ANOMALY in px (default: %(default)s)",
    )


def add_layout_option(parser: argparse.ArgumentParser) -> None:
    """Add --layout."""
    parser.add_argument(
        "--layout",
        default="",
        metavar="NAME-OR-FILE.yaml",
        help="dataset as published: road-anomaly, smiyc-anomaly, smiyc-obstacle, "
        "fishyscapes-static, fishyscapes-lost-and-found, anovox, or a YAML file that says where "
        "images and labels lie; default: images/, masks/ and labels.json",
    )


def _component_limits(text: str) -> SizeLimits:
    from semantic_anomaly.evaluation.components import ANOMALY_TRACK, OBSTACLE_TRACK, SizeLimits

    tracks = {"anomaly-track": ANOMALY_TRACK, "obstacle-track": OBSTACLE_TRACK}
    if text in tracks:
        return tracks[text]
    match = re.fullmatch(r"(\d+),(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"expected {', '.join(tracks)} or PREDICTED,ANOMALY in px, found '{text}'"
        )
    return SizeLimits(int(match[1]), int(match[2]))


def count(text: str) -> int:
    """Return a whole number of at least 0, for argparse."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected at least 0, found {number}")
    return number


def positive(text: str) -> int:
    """Return a whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {number}")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 64 or (number > 1 and number % 1):
        raise argparse.ArgumentTypeError(
            f"expected a part of a GPU, or a whole number up to 64, found {text}"
        )
    return number


def settings_of(
    args: argparse.Namespace, index: Path | None = None, **changes: Any
) -> tuple[Settings, str]:
    """Return the settings made by the options, and the name of the camera.

    --backbone overrides --set, which overrides the settings file.

    Args:
        args: with the options of `add_detector_options`.
        index: index folder given on the command line; wins over the settings.
        changes: settings with options of their own; None changes nothing.

    Raises:
        SettingsError: a file, name or value is not valid, or a camera must be chosen.
        UnknownNameError: no such setting or camera.
    """
    if args.node and not args.settings:
        raise SettingsError("--node: needs --settings")
    parameters = read_settings_file(args.settings, args.node) if args.settings else {}
    parameters.update(_override(item) for item in args.overrides)
    if args.backbone:
        parameters["backbone"] = args.backbone
    parameters.update({name: value for name, value in changes.items() if value is not None})
    settings = Settings.from_parameters(parameters)
    if args.camera is None and len(settings.cameras) > 1:
        raise SettingsError(
            "the settings have several cameras, choose one with --camera: "
            + ", ".join(settings.cameras)
        )
    camera = settings.cameras[0] if args.camera is None else args.camera
    if camera not in settings.cameras:
        raise UnknownNameError("camera", camera, settings.cameras)
    if index is not None:
        parameters |= {"index": str(index), f"{camera}.index": ""}
        settings = Settings.from_parameters(parameters)
    return settings, camera


def add_sources_argument(parser: argparse.ArgumentParser, *, needed: bool = True) -> None:
    """Add the positional argument for one or more sources, or for none where none is needed."""
    parser.add_argument(
        "sources",
        nargs="+" if needed else "*",
        metavar="SOURCE",
        help="folder of images, video, rosbag2 bag, image files, 'pattern*.png' or @list.txt; "
        "'SOURCE[START:STOP]' selects frames",
    )


def _override(item: str) -> tuple[str, Any]:
    name, sign, text = item.partition("=")
    if not sign or not name:
        raise SettingsError(f"option --set: expected NAME=VALUE, found '{item}'")
    if _EXPONENT.fullmatch(text.strip()):
        return name, float(text)
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise SettingsError(f"option --set: '{text}' is not a YAML value") from error
    # --set ego_mask= means an empty text.
    return name, "" if value is None and not text.strip() else value
