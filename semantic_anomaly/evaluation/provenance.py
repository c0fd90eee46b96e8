"""What a report must say so that its figures can be made again."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_anomaly import __version__

if TYPE_CHECKING:
    from semantic_anomaly.detector import AnomalyDetector

_DISTRIBUTIONS = ("numpy", "torch", "transformers", "hnswlib", "scikit-learn", "matplotlib")
_OPENCV = ("opencv-python-headless", "opencv-python", "opencv-contrib-python")


def describe(detector: AnomalyDetector) -> dict[str, Any]:
    """Return settings, identities, versions and device of a detector, as plain values."""
    return {
        "settings": detector.settings.to_parameters(),
        "region": detector.region.describe(),
        "index": {"fingerprint": detector.index.fingerprint, "entries": detector.index.count},
        "backbone": detector.embedder.identity.to_dict(),
        "device": str(getattr(detector.embedder, "device", "")) or None,
        "versions": versions(),
        "git_commit": git_commit(),
    }


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
