"""Calibrations of given scores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.normalisation import CELLS_HW, ScoreNormalisation
from semantic_anomaly.settings import Settings

FINGERPRINT = "f" * 64
RIGHT_HALF = RegionOfInterest(((0.5, 0.0), (1.0, 0.0), (1.0, 1.0), (0.5, 1.0)))


def index_of(fingerprint: str = FINGERPRINT, stages: int = 1) -> Any:
    """Return what a calibration compares of an index."""
    return SimpleNamespace(fingerprint=fingerprint, stages=(None,) * stages)


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
