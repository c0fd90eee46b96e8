"""Folders of nominal drives in colours, and their calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.offline.calibrate import calibrate
from semantic_anomaly.settings import Settings
from worlds.colours import ColourEmbedder, street

SETTINGS = Settings(target_false_alarm_rate=0.1, dedup_distance=0.001)


class Countdown(ColourEmbedder):
    """Notes the sizes of the batches it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def embed(self, images: Any) -> Any:
        self.batches.append(len(images))
        return super().embed(images)


def write_drives(root: Path) -> Path:
    """Write nominal drives and return their folder: index (10 frames), and a, b, c (7, 6, 5)."""
    for number, (name, count) in enumerate({"index": 10, "a": 7, "b": 6, "c": 5}.items()):
        (root / name).mkdir()
        for frame in range(count):
            image = street(100 * number + frame).image
            cv2.imwrite(str(root / name / f"{frame:03d}.png"), image[..., ::-1])
    return root


def calibrated(index: NominalIndex, sources: list[Any], **changes: Any) -> Calibration:
    """Return the calibration of an index by nominal drives."""
    settings = SETTINGS.replace(**changes)
    return calibrate(index, sources, settings=settings, embedder=ColourEmbedder())
