"""The models of the node: one embedder and a detector for each camera.

They are loaded and freed by the executor's thread or by the thread of a reload. A set of models is
replaced as a whole and never changed, so the worker may use one while the next is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from semantic_anomaly.calibration.leakage import refuse_seen
from semantic_anomaly.calibration.staleness import staleness_warning
from semantic_anomaly.detection.detector import AnomalyDetector, load_detector
from semantic_anomaly.errors import (
    CalibrationError,
    IndexMismatchError,
    ModelOutputError,
    SemanticAnomalyError,
)
from semantic_anomaly.index import edits
from semantic_anomaly.offline.edit_index import save_edited
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame, PatchGrid

if TYPE_CHECKING:
    from semantic_anomaly.index.nominal_index import NominalIndex
    from semantic_anomaly.segmentation.embedder import RunningEmbedder

# The image size is unknown before the first image; this one is common and not small.
WARM_UP_HW = (720, 1280)


@dataclass(frozen=True, eq=False)
class Models:
    """An embedder and the detectors that share it.

    Attributes:
        embedder: used by one thread at a time: the worker, or `load`.
        detectors: detector of each camera by its name.
        probe: a synthetic frame and its embeddings, for the self-test.
    """

    embedder: RunningEmbedder
    detectors: Mapping[str, AnomalyDetector]
    probe: tuple[Frame, PatchGrid]

    @classmethod
    def load(cls, settings: Settings) -> Models:
        """Load the detectors of all cameras, warm up the embedder, and run the self-test.

        Raises:
            SemanticAnomalyError: something is missing, damaged or does not match.
        """
        detectors = load_detectors(settings)
        embedder = cast("RunningEmbedder", detectors[settings.cameras[0]].embedder)
        try:
            embedder.warm_up(WARM_UP_HW)
            noise = np.random.default_rng(0).integers(0, 256, (*WARM_UP_HW, 3), dtype=np.uint8)
            probe = Frame(noise, name="self-test"), embedder.embed([noise])[0]
            models = cls(embedder, detectors, probe)
            models.self_test()
        except BaseException:
            embedder.close()
            raise
        return models

    def self_test(self) -> None:
        """Assess the probe with every detector.

        Raises:
            ModelOutputError: a score is not finite.
        """
        for camera, detector in self.detectors.items():
            try:
                detector.assess(*self.probe)
            except ModelOutputError as error:
                raise ModelOutputError(f"self-test of camera '{camera}': {error}") from error
            detector.reset(drift=True)

    def reloaded(self, settings: Settings) -> Models:
        """Return models with indexes and calibrations read again, and the same embedder.

        Raises:
            CalibrationError: a camera that has a threshold would have none.
            SemanticAnomalyError: as `load`; the present models are unaffected.
        """
        models = Models(self.embedder, load_detectors(settings, self.embedder), self.probe)
        for camera, detector in models.detectors.items():
            if detector.threshold is None and self.detectors[camera].threshold is not None:
                raise CalibrationError(
                    f"camera '{camera}': index '{settings.index_of(camera)}': expected a "
                    "calibration, as before, found none; calibrate it first"
                )
        models.self_test()
        for camera, detector in models.detectors.items():
            detector.continue_drift(self.detectors[camera])
        return models

    def add_nominal(self, settings: Settings, frames: Mapping[str, tuple[Frame, PatchGrid]]) -> str:
        """Add frames with their embeddings to the indexes of their cameras; return a summary.

        Raises:
            SemanticAnomalyError: an index has seen a frame, is full, or cannot be written.
        """
        edited: dict[str, tuple[NominalIndex, NominalIndex]] = {}
        additions = []
        for camera, (frame, grid) in frames.items():
            folder, detector = settings.index_of(camera), self.detectors[camera]
            before, index = edited.get(folder, (detector.index, detector.index))
            refuse_seen(index, frame)
            index, report = edits.add_nominal(
                index, [(frame, grid)], roi=detector.roi, source=frame.name, note="service"
            )
            edited[folder] = before, index
            additions.append(f"{report.stored} entries of '{frame.name}'")
        for folder, (before, index) in edited.items():
            save_edited(Path(folder), before, index)
        return f"added {', '.join(additions)}"

    def update(self, settings: Settings) -> None:
        """Change the live settings of all detectors, or of none.

        Raises:
            SemanticAnomalyError: a detector refuses them.
        """
        with ExitStack() as undo:
            for detector in self.detectors.values():
                before = detector.settings
                detector.update(settings)
                undo.callback(detector.update, before)
            undo.pop_all()

    def reset(self) -> None:
        """Forget the tracks of all cameras."""
        for detector in self.detectors.values():
            detector.reset()


def load_detectors(
    settings: Settings, embedder: RunningEmbedder | None = None
) -> dict[str, AnomalyDetector]:
    """Load the detector of each camera.

    Cameras with the same index folder share the index. All cameras share one embedder, so their
    indexes must have been built with the same backbone; without one it is loaded from the index of
    the first camera.

    Raises:
        SemanticAnomalyError: names the camera if there are several.
    """
    indexes: dict[str, NominalIndex] = {}
    detectors: dict[str, AnomalyDetector] = {}
    with ExitStack() as undo:
        for camera in settings.cameras:
            folder = settings.index_of(camera)
            index = indexes.get(folder)
            try:
                detector = load_detector(settings, camera, embedder=embedder, index=index)
            except SemanticAnomalyError as error:
                # The class of an error has a meaning, so only its message is extended.
                if len(settings.cameras) > 1:
                    hint = ""
                    if isinstance(error, IndexMismatchError) and detectors:
                        hint = (
                            f" (all cameras share the backbone of camera '{next(iter(detectors))}')"
                        )
                    error.args = (f"camera '{camera}': {error}{hint}",)
                raise
            if embedder is None:
                embedder = cast("RunningEmbedder", detector.embedder)
                undo.callback(embedder.close)
            indexes[folder] = detector.index
            detectors[camera] = detector
        undo.pop_all()
    return detectors


def stale_calibration(detector: AnomalyDetector) -> str | None:
    """Return why the calibration of a detector is stale, None if it is not."""
    calibration = detector.calibration
    if calibration is None or not calibration.stale_edits:
        return None
    return staleness_warning(calibration.stale_edits)
