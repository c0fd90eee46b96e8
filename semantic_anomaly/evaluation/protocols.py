"""What is nominal when no drives of the same vehicle are at hand: the field's other protocols.

drive: index and calibration from separate nominal drives; what a vehicle has.
one-reference, n-reference: an index of one nominal image, or of a few (arXiv 2605.19744).
self-nominal: an index of the normal pixels of other images of the same set, in folds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from semantic_anomaly.calibration.leakage import refuse_indexed
from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.embedding.identity import Embedder
from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.datasets import NORMAL, FrameTruth
from semantic_anomaly.evaluation.published import Dataset
from semantic_anomaly.index.build import SCENES
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame, PatchGrid

FOLDS = 5


class Reference:
    """An index of reference images, uncalibrated, for every frame of a set.

    Args:
        settings: backbone, region and scoring.
        camera: one of the settings' cameras.
        references: nominal images: folders, videos or bags, with or without a selection.
        dataset: what will be scored; a reference must not be in it.
        embedder: of the settings.
        progress: show progress on a terminal.

    Attributes:
        name: one-reference or n-reference, by the number of images.

    Raises:
        InputError: no reference, or one that is to be scored.
    """

    def __init__(
        self,
        settings: Settings,
        camera: str,
        references: Sequence[str | Path],
        dataset: Dataset,
        embedder: Embedder,
        progress: bool = True,
    ) -> None:
        index = build_index(settings, camera, references, embedder=embedder, progress=progress)
        for frame, _, _ in dataset:
            refuse_indexed(index, frame)
        images = index.report.frames
        self.name = "one-reference" if images == 1 else "n-reference"
        self.detail = {"references": images}
        self._detector = _uncalibrated(settings, camera, index, embedder)

    def group_of(self, truth: FrameTruth) -> int:
        """Return 0: the frames of all share a detector."""
        return 0

    def detector_of(self, truth: FrameTruth) -> AnomalyDetector:
        """Return the detector of a frame: the same for all."""
        return self._detector


class SelfNominal:
    """An index for every fold of a set, from the normal pixels of the images of other folds.

    Folds are stretches of the set, so that images of one scene are in one fold.

    Args:
        settings: backbone, region and scoring.
        camera: one of the settings' cameras.
        dataset: images with labels; patches with any pixel that is not normal are left out.
        embedder: of the settings.
        folds: most folds; a set with fewer images has one for each.

    Raises:
        InputError: fewer than two images.
    """

    name = "self-nominal"

    def __init__(
        self,
        settings: Settings,
        camera: str,
        dataset: Dataset,
        embedder: Embedder,
        folds: int = FOLDS,
    ) -> None:
        count = len(dataset)
        if count < 2:
            raise InputError(f"self-nominal: expected at least two images, found {count}")
        self._settings, self._camera, self._embedder = settings, camera, embedder
        self._dataset = dataset
        folds = min(folds, count)
        self._fold = {truth.file: i * folds // count for i, truth in enumerate(dataset.truths)}
        self.detail = {"folds": folds}
        self._ready: tuple[int, AnomalyDetector] | None = None

    def group_of(self, truth: FrameTruth) -> int:
        """Return the fold of a frame; frames of one share a detector."""
        return self._fold[truth.file]

    def detector_of(self, truth: FrameTruth) -> AnomalyDetector:
        """Return the detector of a frame, whose index has seen nothing of the frame's fold.

        Raises:
            InputError: scenes are wanted, and no image of the other folds is normal throughout.
        """
        fold = self._fold[truth.file]
        if self._ready is None or self._ready[0] != fold:
            region = ImageRegion.from_settings(self._settings.camera_settings[self._camera])
            index = NominalIndex.build(
                self._others(fold),
                identity=self._embedder.identity,
                region=region,
                settings=self._settings,
                source=[self._dataset.name],
                camera=self._camera,
                segmenter=self._embedder.segmenter,
            )
            if self._settings.scene_frames and SCENES not in index.parts:
                raise InputError(
                    "self-nominal: expected scene_frames 0, or images that are normal throughout "
                    f"(a scene is nominal where all of it is), found scene_frames "
                    f"{self._settings.scene_frames} and none"
                )
            detector = _uncalibrated(self._settings, self._camera, index, self._embedder)
            self._ready = fold, detector
        return self._ready[1]

    def _others(self, fold: int) -> Iterator[tuple[Frame, PatchGrid, np.ndarray]]:
        for frame, truth, labels in self._dataset:
            if self._fold[truth.file] != fold:
                grid = self._embedder.embed([frame.image])[0]
                yield frame, grid, normal_patches(labels, grid.grid_hw)


def normal_patches(labels: np.ndarray, grid_hw: tuple[int, int]) -> np.ndarray:
    """Return (rows, cols) bool: patches whose every pixel is normal.

    Args:
        labels: (height, width) uint8, 0 normal, 1 anomaly, 255 ignore.
        grid_hw: rows and columns of patches.
    """
    normal = (labels == NORMAL).astype(np.float32)
    share = cv2.resize(normal, grid_hw[::-1], interpolation=cv2.INTER_AREA)
    return share > 1.0 - 1e-4


def _uncalibrated(
    settings: Settings, camera: str, index: NominalIndex, embedder: Embedder
) -> AnomalyDetector:
    region = ImageRegion.from_settings(settings.camera_settings[camera])
    index.configure_search(settings.search, settings.search_ef)
    return AnomalyDetector(embedder, index, None, settings, region)
