"""Provenance of a report: settings, identities, versions and digests to reproduce it."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_anomaly import __version__
from semantic_anomaly.storage import canonical_json, sha256_bytes

if TYPE_CHECKING:
    from semantic_anomaly.detection.detector import AnomalyDetector

_DISTRIBUTIONS = ("numpy", "torch", "transformers", "hnswlib", "scikit-learn", "matplotlib")
_OPENCV = ("opencv-python-headless", "opencv-python", "opencv-contrib-python")


def describe(detector: AnomalyDetector) -> dict[str, Any]:
    """Return settings, identities, versions and device of a detector as JSON values."""
    return {
        "settings": detector.settings.to_parameters(),
        "roi": detector.roi.describe(),
        "index": {"fingerprint": detector.index.fingerprint, "entries": detector.index.count},
        "calibration_sha256": detector.calibration.sha256 if detector.calibration else None,
        "stages": [
            {"stage": stage.name, "weight": stage.spec.weight, **stage.embedder.to_dict()}
            for stage in detector.embedder.stages
        ],
        "device": str(getattr(detector.embedder, "device", "")) or None,
        "versions": versions(),
        "git_commit": git_commit(),
    }


def files_state(*paths: Path) -> str:
    """Return a digest of the names, sizes and modification times of files and folders' files.

    Hidden files are skipped: an unfinished report may be among them.
    """
    states = []
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            name = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") for part in name.parts):
                stat = file.stat()
                states.append((str(name), stat.st_size, stat.st_mtime_ns))
    return sha256_bytes(canonical_json(states).encode())


def rows_digest(rows: Sequence[dict[str, Any]]) -> str:
    """Return one digest of names and contents of all frames, from `name` and `sha256` of rows."""
    return sha256_bytes(canonical_json([(row["name"], row["sha256"]) for row in rows]).encode())


def versions() -> dict[str, str]:
    """Return the versions of this package and of its numerical dependencies."""
    installed = {"semantic_anomaly": __version__, "python": platform.python_version()}
    for name in (*_DISTRIBUTIONS, *_OPENCV):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def git_commit() -> str | None:
    """Return the commit of this package's own repository, with '+changes' if edited, or None."""
    package = Path(__file__).resolve().parents[1]
    top = _git(package, "rev-parse", "--show-toplevel")
    # The package may be installed inside somebody else's repository.
    if top is None or Path(top).resolve() != package.parent:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", str(package))
    return f"{commit}+changes" if commit and changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        process = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()
