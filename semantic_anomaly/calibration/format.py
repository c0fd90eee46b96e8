"""The files of calibrations: written atomically, and checked when they are read.

calibration.json belongs to the first camera, and holds for all cameras without a file of their own.
The file of another camera with the same index is calibration.<camera>.json.

The time of creation has a digest of its own, so that equal calibrations keep equal digests. It is
in the file because copying a file may change its time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from reprlib import repr as short
from typing import Any, get_type_hints

from semantic_anomaly.calibration.conformal import Episodes, scores_of_list
from semantic_anomaly.calibration.staleness import StaleEdit
from semantic_anomaly.errors import CalibrationError, SettingsError
from semantic_anomaly.index.format import is_calibration_file
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.normalisation import ScoreNormalisation
from semantic_anomaly.storage import (
    atomic_write_bytes,
    canonical_json,
    parse_json,
    read_file,
    sha256_bytes,
)

FILE_NAME = "calibration.json"
FORMAT_VERSION = 4
_TYPES: dict[str, tuple[type, ...]] = {
    "drives": (list,),
    "target_false_alarm_rate": (float,),
    "confidence": (float,),
    "heatmap_low": (float,),
    "index_fingerprint": (str,),
    "scoring": (dict,),
    "roi": (dict,),
    "normalisations": (list,),
    "camera": (str,),
    "dtype": (str,),
    "execution": (str,),
    "probe_scores": (list,),
    "pattern_scores": (list,),
    "stale_edits": (list,),
    "episodes": (dict, type(None)),
}
_SCORE_LISTS = "probe_scores", "pattern_scores"
_TYPES_OF_ROWS: dict[str, dict[str, type]] = {
    "drives": {"name": str, "scores": list, "left_out": bool},
    "stale_edits": get_type_hints(StaleEdit),
}


def calibration_files(folder: Path) -> list[Path]:
    """Return the calibrations in the folder of an index, calibration.json first."""
    first = folder / FILE_NAME
    others = sorted(p for p in folder.glob("calibration.*.json") if is_calibration_file(p.name))
    return [path for path in (first, *others) if path.exists()]


def calibration_file(folder: Path, camera: str) -> Path:
    """Return the calibration that holds for a camera; it need not exist."""
    own = Path(folder) / f"calibration.{camera}.json"
    return own if own.exists() else Path(folder) / FILE_NAME


def write(folder: Path, values: Mapping[str, Any]) -> Path:
    """Write the fields of a calibration into the folder of its index and return the file.

    Raises:
        ArtefactError: the file cannot be written.
    """
    body, created = _to_body(values), values["created"]
    path = Path(folder) / FILE_NAME
    try:
        other_camera = path.exists() and read(path)["camera"] != values["camera"]
    except CalibrationError:
        # A damaged calibration is of no use to any camera.
        other_camera = False
    if other_camera:
        path = path.with_name(f"calibration.{values['camera']}.json")
    sha256 = _digest(body)
    seal = {"created": created, "created_sha256": _created_digest(created, sha256)}
    atomic_write_bytes(path, canonical_json({**body, **seal, "sha256": sha256}).encode())
    return path


def digest(values: Mapping[str, Any]) -> str:
    """Return the sha256 that the file with these fields carries, of all but the time."""
    return _digest(_to_body(values))


def read(path: Path) -> dict[str, Any]:
    """Return the fields of a calibration after checking digest, structure and types.

    Raises:
        CalibrationError: missing, damaged, altered or of another format.
    """
    try:
        content = read_file(path)
    except FileNotFoundError:
        raise CalibrationError(
            f"calibration '{path}' does not exist; create it with 'semantic-anomaly calibrate'"
        ) from None
    except OSError as error:
        raise CalibrationError(f"calibration '{path}': {error.strerror}") from error
    try:
        body = parse_json(content, parse_constant=_finite, parse_float=_finite)
    except ValueError as error:
        raise CalibrationError(f"calibration '{path}' is not JSON: {error}") from error
    try:
        return _from_body(body)
    except CalibrationError as error:
        raise CalibrationError(f"calibration '{path}': {error}") from error


def _to_body(values: Mapping[str, Any]) -> dict[str, Any]:
    episodes = values["episodes"]
    return {
        **{name: value for name, value in values.items() if name != "created"},
        "format": FORMAT_VERSION,
        **{name: list(values[name]) for name in _SCORE_LISTS},
        "drives": [{**vars(drive), "scores": drive.scores.tolist()} for drive in values["drives"]],
        "normalisations": [values.to_dict() for values in values["normalisations"]],
        "stale_edits": [asdict(edit) for edit in values["stale_edits"]],
        "episodes": None if episodes is None else episodes.to_dict(),
    }


def _from_body(body: Any) -> dict[str, Any]:
    """Return the constructor arguments of a calibration from a parsed file."""
    version = body.get("format") if isinstance(body, dict) else type(body).__name__
    if type(version) is not int or version != FORMAT_VERSION:
        raise CalibrationError(
            f"expected format {FORMAT_VERSION}, found {short(version)}; calibrate again"
        )
    expected = {"format", "sha256", "created", "created_sha256", *_TYPES}
    if set(body) != expected:
        differing = ", ".join(sorted(set(body) ^ expected))
        raise CalibrationError(
            f"expected the keys of format {version}, differing: {differing:.200}"
        )
    created, created_sha256, sha256 = map(body.pop, ("created", "created_sha256", "sha256"))
    if sha256 != _digest(body) or created_sha256 != _created_digest(created, sha256):
        raise CalibrationError("sha256 does not match: the file was altered or damaged")
    body.pop("format")
    if type(created) is not str:
        raise CalibrationError(f"'created' has the type {type(created).__name__}")
    for key, types in _TYPES.items():
        if type(body[key]) not in types:
            raise CalibrationError(f"'{key}' has the type {type(body[key]).__name__}")
    for name in _SCORE_LISTS:
        if not all(type(score) is float for score in body[name]):
            raise CalibrationError(f"'{name}' contains something that is not a number")
    if not 0.0 < body["target_false_alarm_rate"] < 1.0:
        raise CalibrationError(f"'target_false_alarm_rate' is {body['target_false_alarm_rate']}")
    if not 0.0 <= body["confidence"] < 1.0:
        raise CalibrationError(f"'confidence' is {body['confidence']}")
    for key, row_types in _TYPES_OF_ROWS.items():
        for row in body[key]:
            if not isinstance(row, dict) or {k: type(v) for k, v in row.items()} != row_types:
                raise CalibrationError(
                    f"'{key}' contains {short(row)}, expected {', '.join(row_types)}"
                )
    try:
        RegionOfInterest.checked_description(body["roi"])
    except SettingsError as error:
        raise CalibrationError(str(error)) from error
    episodes = body["episodes"]
    return {
        **body,
        "created": created,
        **{name: tuple(body[name]) for name in _SCORE_LISTS},
        "drives": tuple(
            {**drive, "scores": scores_of_list(drive["scores"])} for drive in body["drives"]
        ),
        "normalisations": tuple(map(ScoreNormalisation.from_dict, body["normalisations"])),
        "stale_edits": tuple(StaleEdit(**edit) for edit in body["stale_edits"]),
        "episodes": None if episodes is None else Episodes.from_dict(episodes),
    }


def _digest(body: Mapping[str, Any]) -> str:
    return sha256_bytes(canonical_json(body).encode())


def _created_digest(created: Any, sha256: Any) -> str:
    return sha256_bytes(canonical_json([created, sha256]).encode())


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number
