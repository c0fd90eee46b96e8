"""Folders of nominal drives in colours, their index and their calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.offline.calibrate import calibrate
from semantic_anomaly.settings import Settings
from worlds.colours import ColourEmbedder, street

SETTINGS = Settings(target_false_alarm_rate=0.1, dedup_distance=0.001)


class CountingEmbedder(ColourEmbedder):
    """Records the sizes of its batches."""

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


def build(sources: Any, **more: Any) -> NominalIndex:
    """Return the index of nominal drives."""
    return build_index(sources, **{"settings": SETTINGS, "embedder": ColourEmbedder(), **more})


def calibrated(index: NominalIndex, sources: Any, **more: Any) -> Calibration:
    """Return the calibration of an index by nominal drives."""
    return calibrate(index, sources, **{"settings": SETTINGS, "embedder": ColourEmbedder(), **more})
