"""The options that every verb with a detector has, and the settings that they make."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_anomaly.errors import InputError, SettingsError, UnknownNameError
from semantic_anomaly.settings import Settings
from semantic_anomaly.settings_schema import read_parameters_yaml

if TYPE_CHECKING:
    from semantic_anomaly.detection.detector import AnomalyDetector
    from semantic_anomaly.evaluation.components import SizeLimits

# YAML 1.1 takes 1e-3 for a string, for it has no point.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def add_detector_options(parser: argparse.ArgumentParser) -> None:
    """Add --settings, --backbone, --set and --camera."""
    group = parser.add_argument_group("detector")
    group.add_argument(
        "--settings", type=Path, metavar="FILE.yaml", help="the node's own parameter file"
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
    group.add_argument(
        "--camera", metavar="NAME", help="which of the settings' cameras, where it has several"
    )


def add_components_option(parser: argparse.ArgumentParser) -> None:
    """Add --components."""
    parser.add_argument(
        "--components",
        default="anomaly-track",
        metavar="LIMITS",
        help="least sizes of components that count: anomaly-track (500 px predicted, 100 px "
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


def component_limits(text: str) -> SizeLimits:
    """Return the limits that --components names.

    Raises:
        InputError: neither a track nor two numbers of pixels.
    """
    from semantic_anomaly.evaluation.components import ANOMALY_TRACK, OBSTACLE_TRACK, SizeLimits

    tracks = {"anomaly-track": ANOMALY_TRACK, "obstacle-track": OBSTACLE_TRACK}
    if text in tracks:
        return tracks[text]
    match = re.fullmatch(r"(\d+),(\d+)", text)
    if not match:
        raise InputError(
            f"--components: expected {', '.join(tracks)} or PREDICTED,ANOMALY in px, found '{text}'"
        )
    return SizeLimits(int(match[1]), int(match[2]))


def add_topic_option(parser: argparse.ArgumentParser) -> None:
    """Add --topic."""
    parser.add_argument("--topic", metavar="T", help="image topic of bags that have several")


def count(text: str) -> int:
    """Return a whole number of at least 0, for argparse."""
    number = int(text)
    if number < 0:
        raise ValueError(f"expected at least 0, found {number}")
    return number


def positive(text: str) -> int:
    """Return a whole number of at least 1, for argparse."""
    number = count(text)
    if not number:
        raise ValueError("expected at least 1, found 0")
    return number


def settings_of(
    args: argparse.Namespace, index: Path | None = None, **changes: Any
) -> tuple[Settings, str]:
    """Return the settings that the options make, and the camera's name.

    Args:
        args: with the options of `add_detector_options`.
        index: index folder given on the command line; wins over the settings.
        changes: settings given by options of their own; None changes nothing.

    Raises:
        SettingsError: a file, name or value cannot be taken, or a camera must be chosen.
        UnknownNameError: no such setting or camera.
    """
    parameters = _parameters(args)
    parameters.update({name: value for name, value in changes.items() if value is not None})
    settings = Settings.from_parameters(parameters)
    camera = _camera(settings, args.camera)
    if index is not None:
        given = {"index": str(index), f"{camera}.index": ""}
        settings = Settings.from_parameters({**parameters, **given})
    return settings, camera


def load_detector(args: argparse.Namespace, settings: Settings, camera: str) -> AnomalyDetector:
    """Return the detector of a camera, at the rate it was calibrated for where none is given.

    Raises:
        SemanticAnomalyError: as `AnomalyDetector.load`.
    """
    from semantic_anomaly.calibration.calibration import Calibration
    from semantic_anomaly.calibration.format import file_of
    from semantic_anomaly.detection.detector import AnomalyDetector

    folder = Path(settings.index_of(camera)).expanduser()
    if file_of(folder, camera).exists():
        # A default is not a wish: 'calibrate' was told which rates are wanted.
        calibration, given = Calibration.load(folder, camera), _parameters(args)
        promised = {"target_false_alarm_rate": calibration.target_false_alarm_rate}
        if calibration.stretches is not None:
            promised |= calibration.stretches.settings
        settings = settings.replace(**{k: v for k, v in promised.items() if k not in given})
    return AnomalyDetector.load(settings, camera)


def _parameters(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was given: the settings file, over it --set, over it --backbone."""
    parameters = read_parameters_yaml(args.settings) if args.settings else {}
    parameters.update(_override(item) for item in args.overrides)
    if args.backbone:
        parameters["backbone"] = args.backbone
    return parameters


def _camera(settings: Settings, name: str | None) -> str:
    if name is None and len(settings.cameras) > 1:
        raise SettingsError(
            "settings name several cameras, choose one with --camera: "
            + ", ".join(settings.cameras)
        )
    camera = settings.cameras[0] if name is None else name
    if camera not in settings.cameras:
        raise UnknownNameError("camera", camera, settings.cameras)
    return camera


def _override(item: str) -> tuple[str, Any]:
    import yaml

    name, sign, text = item.partition("=")
    if not sign or not name:
        raise SettingsError(f"option --set: expected NAME=VALUE, found '{item}'")
    if _EXPONENT.fullmatch(text.strip()):
        return name, float(text)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"option --set: '{text}' is not a YAML value") from error
    # Whoever writes --set ego_mask= means an empty text.
    return name, "" if value is None and not text.strip() else value
