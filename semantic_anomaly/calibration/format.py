"""The files of calibrations: written whole, and checked before they are believed.

calibration.json is the first camera's, and holds for all that have none of their own; that of
another camera with the same index is calibration.<camera>.json.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from semantic_anomaly.calibration import staleness as renewal
from semantic_anomaly.calibration.conformal import Stretches
from semantic_anomaly.errors import CalibrationError
from semantic_anomaly.scoring.normalisation import UsualDistances
from semantic_anomaly.settings import GRID
from semantic_anomaly.storage import atomic_write_bytes, canonical_json, sha256_bytes

FILE_NAME = "calibration.json"
FORMAT = 2
# Only a calibration that is due for renewal says so: the others keep format and digest.
FORMAT_WITH_RENEWAL = 3
# Only scores of more than patches, or of stretches, need the newest format.
FORMAT_WITH_BRANCHES = 4
_OPTIONAL: dict[str, type] = {"renewal": list, "scoring": dict, "stretches": dict}
_NAMES = re.compile(r"calibration(\.[A-Za-z_][A-Za-z0-9_]*)?\.json")
_TYPES: dict[str, type] = {
    "scores": list,
    "drives": list,
    "target_false_alarm_rate": float,
    "heatmap_low": float,
    "index_fingerprint": str,
    "neighbours": int,
    "tail_percent": float,
    "region": dict,
    "usual": dict,
    "camera": str,
    "dtype": str,
}


def files(folder: Path) -> list[Path]:
    """Return the calibrations in the folder of an index, calibration.json first."""
    first = Path(folder) / FILE_NAME
    others = sorted(p for p in Path(folder).glob("calibration.*.json") if is_calibration(p.name))
    return [path for path in (first, *others) if path.exists()]


def file_of(folder: Path, camera: str) -> Path:
    """Return the calibration that holds for a camera; it need not exist."""
    own = Path(folder) / f"calibration.{camera}.json"
    return own if own.exists() else Path(folder) / FILE_NAME


def is_calibration(name: str) -> bool:
    """Return whether a file's name is that of a calibration."""
    return _NAMES.fullmatch(name) is not None


def write(folder: Path, values: Mapping[str, Any]) -> Path:
    """Write the fields of a calibration into the folder of its index and return the file.

    Raises:
        ArtefactError: the file cannot be written.
    """
    body = _body(values)
    path = Path(folder) / FILE_NAME
    try:
        of_another = path.exists() and read(path)["camera"] != values["camera"]
    except CalibrationError:
        # A damaged one is worth nothing to any camera.
        of_another = False
    if of_another:
        path = path.with_name(f"calibration.{values['camera']}.json")
    atomic_write_bytes(path, canonical_json({**body, "sha256": _digest(body)}).encode())
    return path


def digest(values: Mapping[str, Any]) -> str:
    """Return the sha256 that the file of a calibration's fields carries."""
    return _digest(_body(values))


def read(path: Path) -> dict[str, Any]:
    """Return the fields of a calibration, digest, structure and types checked.

    Raises:
        CalibrationError: missing, damaged, altered or of another format.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CalibrationError(
            f"calibration '{path}' does not exist; make it with 'semantic-anomaly calibrate'"
        ) from None
    except OSError as error:
        raise CalibrationError(f"calibration '{path}': {error.strerror}") from error
    try:
        body = json.loads(content, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"calibration '{path}' is not JSON: {error}") from error
    try:
        return _checked(body)
    except CalibrationError as error:
        raise CalibrationError(f"calibration '{path}': {error}") from error


def _body(values: Mapping[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    usual = {name: found.describe() for name, found in values["usual"].items()}
    number = FORMAT
    if values["renewal"]:
        told["renewal"], number = renewal.describe(values["renewal"]), FORMAT_WITH_RENEWAL
    if values["scoring"]:
        told["scoring"], number = dict(values["scoring"]), FORMAT_WITH_BRANCHES
    if values["stretches"]:
        told["stretches"], number = values["stretches"].describe(), FORMAT_WITH_BRANCHES
    return {
        **{key: value for key, value in values.items() if key not in _OPTIONAL},
        **told,
        "format": number,
        "scores": values["scores"].tolist(),
        "drives": [{"name": name, "frames": count} for name, count in values["drives"]],
        "region": dict(values["region"]),
        # Empty for scores that are relative to nothing.
        "usual": usual if values["scoring"] else usual.get(GRID, {}),
    }


def _digest(body: Mapping[str, Any]) -> str:
    return sha256_bytes(canonical_json(body).encode())


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number")
    return number


def _checked(body: Any) -> dict[str, Any]:
    """Return the constructor's arguments from a parsed file, everything in it checked."""
    known = FORMAT, FORMAT_WITH_RENEWAL, FORMAT_WITH_BRANCHES
    found = body.get("format") if isinstance(body, dict) else type(body).__name__
    if type(found) is not int or found not in known:
        raise CalibrationError(f"expected format {known[0]} to {known[-1]}, found {short(found)}")
    expected = {"format", "sha256", *_TYPES}
    if found == FORMAT_WITH_RENEWAL:
        expected |= {"renewal"}
    if found == FORMAT_WITH_BRANCHES:
        expected |= set(_OPTIONAL) & set(body)
    if set(body) != expected:
        differing = ", ".join(sorted(set(body) ^ expected))
        raise CalibrationError(f"expected keys of format {found}, differing in: {differing:.200}")
    if body.pop("sha256") != _digest(body):
        raise CalibrationError("its sha256 does not agree: it was altered or damaged")
    body.pop("format")
    body = {**{key: kind() for key, kind in _OPTIONAL.items()}, **body}
    body["renewal"] = renewal.from_description(body["renewal"])
    for key, kind in {**_TYPES, "scoring": dict, "stretches": dict}.items():
        if type(body[key]) is not kind:
            raise CalibrationError(f"'{key}' is of type {type(body[key]).__name__}")
    if not all(type(score) is float for score in body["scores"]):
        raise CalibrationError("'scores' holds something that is not a number")
    if not 0.0 < body["target_false_alarm_rate"] < 1.0:
        raise CalibrationError(f"'target_false_alarm_rate' is {body['target_false_alarm_rate']}")
    drives = []
    for drive in body["drives"]:
        if not isinstance(drive, dict) or set(drive) != {"name", "frames"}:
            raise CalibrationError(f"'drives' holds {short(drive)}")
        if type(drive["name"]) is not str or type(drive["frames"]) is not int:
            raise CalibrationError(f"'drives' holds {short(drive)}")
        drives.append((drive["name"], drive["frames"]))
    body["drives"] = tuple(drives)
    usual = body["usual"]
    if usual and not body["scoring"]:
        usual = {GRID: usual}
    body["usual"] = {name: UsualDistances.from_description(told) for name, told in usual.items()}
    stretches = body["stretches"]
    body["stretches"] = Stretches.from_description(stretches) if stretches else None
    body["scores"] = np.array(body["scores"], np.float64)
    return body
