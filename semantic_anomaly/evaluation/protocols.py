"""Protocols of the field for datasets without nominal drives of the same vehicle.

drive: index and calibration from separate nominal drives, as on a vehicle.
one-reference, n-reference: an index of one or a few nominal images (arXiv 2605.19744).
self-nominal: an index of the normal pixels of other images of the same dataset, in folds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from semantic_anomaly.calibration.leakage import refuse_seen
from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.datasets import NORMAL, FrameTruth
from semantic_anomaly.evaluation.layouts import Dataset
from semantic_anomaly.index.content import RecordedSource
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.offline.drives import Sources, camera_roi
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame, PatchGrid

if TYPE_CHECKING:
    from semantic_anomaly.embedding.identity import Embedder

FOLDS = 5


class Reference:
    """One uncalibrated index of reference images for all frames of a dataset.

    Args:
        settings, camera, embedder, progress: as in `build_index`.
        references: nominal images; see `build_index`.
        dataset: frames to score; no reference may be among them.

    Attributes:
        name: one-reference or n-reference, by the number of images.
        detail: number of reference images.

    Raises:
        SourceError: no references.
        CalibrationError: a reference is among the frames to score.
    """

    def __init__(
        self,
        settings: Settings,
        camera: str,
        references: Sources,
        dataset: Dataset,
        embedder: Embedder | None = None,
        progress: bool = False,
    ) -> None:
        embedder = embedder or _load_embedder(settings)
        index = build_index(
            references, settings=settings, camera=camera, embedder=embedder, progress=progress
        )
        for frame, _, _ in dataset:
            refuse_seen(index, frame)
        images = index.report.frames
        self.name = "one-reference" if images == 1 else "n-reference"
        self.detail = {"references": images}
        self._detector = AnomalyDetector(index, settings=settings, camera=camera, embedder=embedder)

    def group_of(self, truth: FrameTruth) -> int:
        """Return 0: all frames share a detector."""
        return 0

    def detector_of(self, truth: FrameTruth) -> AnomalyDetector:
        """Return the detector, the same for all frames."""
        return self._detector


class SelfNominal:
    """One uncalibrated index per fold, from the normal pixels of the images of other folds.

    Folds are contiguous, so that images of one scene are in one fold.

    Args:
        settings, camera, embedder: as in `build_index`.
        dataset: labelled images; only patches whose every pixel is normal are indexed.
        folds: maximum number of folds; a smaller dataset has one fold per image.

    Raises:
        InputError: fewer than two images.
    """

    name = "self-nominal"

    def __init__(
        self,
        settings: Settings,
        camera: str,
        dataset: Dataset,
        embedder: Embedder | None = None,
        folds: int = FOLDS,
    ) -> None:
        count = len(dataset)
        if count < 2:
            raise InputError(f"self-nominal: expected at least two images, found {count}")
        self._settings, self._camera, self._dataset = settings, camera, dataset
        self._embedder = embedder or _load_embedder(settings)
        folds = min(folds, count)
        self._fold = {truth.file: i * folds // count for i, truth in enumerate(dataset.truths)}
        self.detail = {"folds": folds}
        self._current: tuple[int, AnomalyDetector] | None = None

    def group_of(self, truth: FrameTruth) -> int:
        """Return the fold of a frame; the frames of a fold share a detector."""
        return self._fold[truth.file]

    def detector_of(self, truth: FrameTruth) -> AnomalyDetector:
        """Return the detector of a frame, whose index has no frame of the same fold."""
        fold = self._fold[truth.file]
        if self._current is None or self._current[0] != fold:
            index = NominalIndex.build(
                self._others(fold),
                stages=self._embedder.stages,
                roi=camera_roi(self._settings, self._camera),
                settings=self._settings.with_build_defaults(),
                sources=[RecordedSource(self._dataset.name)],
                camera=self._camera,
            )
            detector = AnomalyDetector(
                index, settings=self._settings, camera=self._camera, embedder=self._embedder
            )
            self._current = fold, detector
        return self._current[1]

    def _others(self, fold: int) -> Iterator[tuple[Frame, PatchGrid, np.ndarray]]:
        for frame, truth, labels in self._dataset:
            if self._fold[truth.file] != fold:
                grid = self._embedder.embed([frame.image])[0]
                yield frame, grid, labels == NORMAL


def open_protocol(
    name: str,
    settings: Settings,
    camera: str,
    dataset: Dataset,
    references: Sources = (),
    progress: bool = False,
) -> Reference | SelfNominal:
    """Return a protocol by name: one-reference, n-reference or self-nominal.

    Raises:
        InputError: another number of reference images than the name says.
    """
    if name == SelfNominal.name:
        return SelfNominal(settings, camera, dataset)
    protocol = Reference(settings, camera, references, dataset, progress=progress)
    if protocol.name != name:
        images = protocol.detail["references"]
        raise InputError(f"--protocol {name}: found {images} reference images")
    return protocol


def _load_embedder(settings: Settings) -> Embedder:
    from semantic_anomaly.segmentation.embedder import RunningEmbedder

    return RunningEmbedder.from_settings(settings.with_build_defaults())
