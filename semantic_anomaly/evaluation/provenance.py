"""What a report must say so that its figures can be made again."""

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
    """Return settings, identities, versions and device of a detector, as plain values."""
    return {
        "settings": detector.settings.to_parameters(),
        "region": detector.region.describe(),
        "index": {"fingerprint": detector.index.fingerprint, "entries": detector.index.count},
        "calibration_sha256": detector.calibration.sha256 if detector.calibration else None,
        "backbone": detector.embedder.identity.to_dict(),
        "device": str(getattr(detector.embedder, "device", "")) or None,
        "versions": versions(),
        "git_commit": git_commit(),
    }


def files_state(path: Path) -> str:
    """Return a digest of the names, sizes and times of change of a file or of all in a folder.

    Hidden files are left out: a report that is being written may lie among them.
    """
    names = ["."]
    if path.is_dir():
        found = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
        names = sorted(str(n) for n in found if not any(p.startswith(".") for p in n.parts))
    states = [(path / name).stat() for name in names]
    told = [(n, s.st_size, s.st_mtime_ns) for n, s in zip(names, states, strict=True)]
    return sha256_bytes(canonical_json(told).encode())


def rows_digest(rows: Sequence[dict[str, Any]]) -> str:
    """Return one digest of names and contents of all frames, taking `sha256` out of their rows."""
    return sha256_bytes(canonical_json([(row["name"], row.pop("sha256")) for row in rows]).encode())


def versions() -> dict[str, str]:
    """Return the versions of this package and of what it computes with."""
    found = {"semantic_anomaly": __version__, "python": platform.python_version()}
    for name in (*_DISTRIBUTIONS, *_OPENCV):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Return the commit of this package's own repository, '+changes' if edited; else None."""
    package = Path(__file__).resolve().parents[1]
    top = _git(package, "rev-parse", "--show-toplevel")
    # Installed somewhere inside another repository, that one's commit would say nothing.
    if top is None or Path(top).resolve() != package.parent:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", str(package))
    return f"{commit}+changes" if commit and changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
