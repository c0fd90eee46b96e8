"""Semantic anomaly detection for cameras, by embeddings of vision foundation models.

Example:
    >>> from semantic_anomaly import AnomalyDetector, build_index, calibrate
    >>> index = build_index("drives/nominal")
    >>> calibration = calibrate(index, ["drives/b", "drives/c"])
    >>> result = AnomalyDetector(index, calibration).detect(image)
    >>> result.decision, result.score, result.localizations
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semantic_anomaly.calibration.calibration import Calibration as Calibration
    from semantic_anomaly.detection.detector import AnomalyDetector as AnomalyDetector
    from semantic_anomaly.detection.rendering import draw_overlay as draw_overlay
    from semantic_anomaly.errors import SemanticAnomalyError as SemanticAnomalyError
    from semantic_anomaly.evaluation.composites import CompositePlan as CompositePlan
    from semantic_anomaly.evaluation.evaluate import evaluate as evaluate
    from semantic_anomaly.evaluation.sensitivity import sensitivity as sensitivity
    from semantic_anomaly.index.nominal_index import NominalIndex as NominalIndex
    from semantic_anomaly.io.open import open_source as open_source
    from semantic_anomaly.offline.build_index import build_index as build_index
    from semantic_anomaly.offline.calibrate import calibrate as calibrate
    from semantic_anomaly.roi import RegionOfInterest as RegionOfInterest
    from semantic_anomaly.settings import Settings as Settings
    from semantic_anomaly.structures import AnomalyResult as AnomalyResult
    from semantic_anomaly.structures import Frame as Frame
    from semantic_anomaly.structures import Localization as Localization
    from semantic_anomaly.structures import PatchGrid as PatchGrid

__version__ = "0.2.0"

# Images with more pixels are refused. OpenCV reads the variable once, when it is imported.
MAX_IMAGE_PIXELS = 40_000_000
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_IMAGE_PIXELS))

_MODULES = {
    "AnomalyDetector": "detection.detector",
    "AnomalyResult": "structures",
    "Calibration": "calibration.calibration",
    "CompositePlan": "evaluation.composites",
    "Frame": "structures",
    "Localization": "structures",
    "NominalIndex": "index.nominal_index",
    "PatchGrid": "structures",
    "RegionOfInterest": "roi",
    "SemanticAnomalyError": "errors",
    "Settings": "settings",
    "build_index": "offline.build_index",
    "calibrate": "offline.calibrate",
    "draw_overlay": "detection.rendering",
    "evaluate": "evaluation.evaluate",
    "open_source": "io.open",
    "sensitivity": "evaluation.sensitivity",
}

__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'semantic_anomaly' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"semantic_anomaly.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
