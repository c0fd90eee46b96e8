"""A backbone of mean colours, and small streets for it: fast, with results computed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.embedding.identity import EmbedderIdentity, StageIdentity
from semantic_anomaly.index.content import RecordedSource
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.normalisation import constant_normalisation
from semantic_anomaly.settings import Settings
from semantic_anomaly.stages import StageSpec
from semantic_anomaly.structures import AnomalyResult, Frame, PatchGrid

PATCH = 8
IMAGE_HW = (72, 128)
ODD_BOX = (80, 32, 104, 56)
LEFT_HALF = RegionOfInterest(((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0)))


class ColourEmbedder:
    """Embeds each patch of 8 pixels by its mean colour, as a unit vector of four numbers."""

    def __init__(self, *, dtype: str = "float32", weights: str = "0" * 64) -> None:
        self._identity = EmbedderIdentity(
            model_id="colours",
            architecture="colours",
            revision="",
            weights_sha256=weights,
            config_sha256="0" * 64,
            layer=0,
            input_size=128,
            average=1,
            patch_px=PATCH,
            dim=4,
            dtype=dtype,
        )

    @property
    def stages(self) -> tuple[StageIdentity, ...]:
        """Return its only stage."""
        return (StageIdentity(StageSpec("colours", 0, 128), self._identity),)

    @property
    def device(self) -> str:
        return "cpu"

    def grid_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (rows, cols) of whole patches."""
        return image_hw[0] // PATCH, image_hw[1] // PATCH

    def grids_hw(self, image_hw: tuple[int, int]) -> list[tuple[int, int]]:
        """Return the grid of its only stage."""
        return [self.grid_hw(image_hw)]

    def embed(self, images: Sequence[np.ndarray]) -> list[PatchGrid]:
        grids = []
        for image in images:
            rows, cols = self.grid_hw(image.shape[:2])
            blocks = image[: rows * PATCH, : cols * PATCH].reshape(rows, PATCH, cols, PATCH, 3)
            colours = blocks.mean(axis=(1, 3)) / 127.5 - 1.0
            vectors = np.concatenate([colours, np.ones((rows, cols, 1))], axis=2)
            unit = vectors / np.linalg.norm(vectors, axis=2, keepdims=True)
            features = unit.astype(np.float32)
            grids.append(PatchGrid(features, (image.shape[0], image.shape[1])))
        return grids


def street(seed: int, odd: bool = False, image_hw: tuple[int, int] = IMAGE_HW) -> Frame:
    """Return sky above road with a little noise, and on demand something magenta on the road."""
    height, width = image_hw
    image = np.empty((height, width, 3), np.float64)
    image[: height // 2] = (120, 160, 220)
    image[height // 2 :] = (90, 90, 95)
    noise = np.random.default_rng(seed)
    rows, cols = height // PATCH, width // PATCH
    image += np.kron(noise.normal(0, 12, (rows, cols, 3)), np.ones((PATCH, PATCH, 1)))
    if odd:
        left, top, right, bottom = ODD_BOX
        image[top:bottom, left:right] = (230, 20, 220)
    return Frame(image.clip(0, 255).astype(np.uint8), seed * 100_000_000, "cam", f"drive/{seed}")


@cache
def embedded_street(seed: int) -> tuple[Frame, PatchGrid]:
    """Return a nominal street with its patch embeddings."""
    frame = street(seed)
    return frame, ColourEmbedder().embed([frame.image])[0]


def make_detector(
    *,
    calibrated: bool = True,
    roi: RegionOfInterest | None = None,
    frames: int = 30,
    **changes: Any,
) -> AnomalyDetector:
    """Return a detector of plain distances: no smoothing.

    With a calibration, distances are not standardised.
    """
    roi = roi or RegionOfInterest()
    embedder = ColourEmbedder()
    parameters = {
        **{"target_false_alarm_rate": 0.05, "dedup_distance": 0.001, "smoothing": 0.0},
        **changes,
    }
    if roi.polygon_xy:
        parameters["camera.region_of_interest"] = [v for xy in roi.polygon_xy for v in xy]
    settings = Settings.from_parameters(parameters)
    base = settings.replace(threshold=None, target_false_alarm_rate=0.05)
    index = NominalIndex.build(
        (embedded_street(seed) for seed in range(frames)),
        stages=embedder.stages,
        roi=roi,
        settings=base,
        sources=[RecordedSource("drive")],
    )
    if not calibrated:
        return AnomalyDetector(index, settings=settings, embedder=embedder)
    plain = (constant_normalisation(0.0, 1.0),)
    scorer = AnomalyDetector(index, settings=base, embedder=embedder, normalisations=plain)
    scores = [scorer.score(embedded_street(seed)[1]).score for seed in range(1000, 1040)]
    calibration = Calibration.fit(
        {"a": scores[:20], "b": scores[20:]},
        heatmap_low=0.001,
        index=index,
        settings=scorer.settings,
        roi=roi,
        camera="camera",
        dtype=embedder.stages[0].embedder.dtype,
        normalisations=plain,
    )
    return AnomalyDetector(index, calibration, settings=settings, embedder=embedder)


def said(result: AnomalyResult) -> tuple[Any, ...]:
    """Return the values of a result without its images."""
    localizations = tuple((item.box_xyxy, item.score, item.label) for item in result.localizations)
    return result.score, result.decision, result.p_value, result.threshold, localizations
