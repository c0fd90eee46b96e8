"""Calibrations of given scores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.normalisation import CELLS_HW, ScoreNormalisation
from semantic_anomaly.settings import Settings
from semantic_anomaly.storage import canonical_json, sha256_bytes

_SEALS = ("sha256", "created_sha256")
FINGERPRINT = "f" * 64
RIGHT_HALF = RegionOfInterest(((0.5, 0.0), (1.0, 0.0), (1.0, 1.0), (0.5, 1.0)))


def index_of(fingerprint: str = FINGERPRINT, stages: int = 1) -> Any:
    """Return what a calibration compares of an index."""
    return SimpleNamespace(fingerprint=fingerprint, stages=(None,) * stages)


def sealed(body: dict[str, Any]) -> str:
    """Return the text of a calibration file with these fields, whose digests fit."""
    body = {name: value for name, value in body.items() if name not in _SEALS}
    # As in the format's description: sha256 of the canonical JSON of everything else but the
    # time, and of the time with that digest.
    content = {name: value for name, value in body.items() if name != "created"}
    sha256 = sha256_bytes(canonical_json(content).encode())
    created_sha256 = sha256_bytes(canonical_json([body.get("created"), sha256]).encode())
    return canonical_json({**body, "sha256": sha256, "created_sha256": created_sha256})


def normalisation() -> ScoreNormalisation:
    mean = np.linspace(0.01, 0.2, CELLS_HW[0] * CELLS_HW[1], dtype=np.float32).reshape(CELLS_HW)
    return ScoreNormalisation(mean, mean / 3)


def fitted(
    scores: Any,
    rate: float = 0.1,
    *,
    drives: int = 1,
    confidence: float = 0.0,
    fingerprint: str = FINGERPRINT,
    **more: Any,
) -> Calibration:
    """Return the calibration of scores, split into drives of equal length."""
    parts = np.array_split(np.asarray(scores, np.float64), drives)
    values = {
        **{"heatmap_low": 0.05, "roi": RIGHT_HALF, "camera": "camera", "dtype": "float32"},
        **{"normalisations": (normalisation(),), **more},
    }
    return Calibration.fit(
        {f"drive_{number}": part.tolist() for number, part in enumerate(parts)},
        index=SimpleNamespace(fingerprint=fingerprint),
        settings=Settings(target_false_alarm_rate=rate, confidence=confidence),
        **values,
    )
