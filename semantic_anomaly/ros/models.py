"""What takes memory: the backbone, the indexes and a detector for each camera.

Loaded and freed by the executor's thread, or by the thread of a reload; a loaded set is replaced
as a whole, never changed, so the worker may hold one while the next is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from semantic_anomaly.calibration.leakage import refuse_indexed
from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.errors import ModelOutputError, SemanticAnomalyError
from semantic_anomaly.index import edits as index_edits
from semantic_anomaly.offline import edit_index as edit_saving
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame, PatchGrid

if TYPE_CHECKING:
    from semantic_anomaly.index.nominal_index import NominalIndex
    from semantic_anomaly.segmentation.embedder import RunningEmbedder

# The real size is unknown before the first image; this one is common and not small.
WARM_UP_HW = (720, 1280)


@dataclass(frozen=True, eq=False)
class Models:
    """A backbone and the detectors that share it, by camera.

    Attributes:
        embedder: used by one thread at a time: the worker, or `load`.
        detectors: by camera.
        probe: a synthetic frame and its embeddings, to try detectors with.
    """

    embedder: RunningEmbedder
    detectors: Mapping[str, AnomalyDetector]
    probe: tuple[Frame, PatchGrid]

    @classmethod
    def load(cls, settings: Settings) -> Models:
        """Load, match, warm up and try out everything that the settings name.

        Raises:
            SemanticAnomalyError: something is missing, damaged or does not agree.
        """
        from semantic_anomaly.segmentation.embedder import RunningEmbedder

        embedder = RunningEmbedder.from_settings(settings)
        try:
            detectors = load_detectors(settings, embedder)
            embedder.warm_up(WARM_UP_HW)
            noise = np.random.default_rng(0).integers(0, 256, (*WARM_UP_HW, 3), dtype=np.uint8)
            probe = Frame(noise, name="self-test")
            models = cls(embedder, detectors, (probe, embedder.embed([noise])[0]))
            models.self_test()
        except BaseException:
            embedder.close()
            raise
        return models

    def self_test(self) -> None:
        """Send the probe through every detector.

        Raises:
            ModelOutputError: a score is not finite or out of range.
        """
        for camera, detector in self.detectors.items():
            result = detector.assess(*self.probe)
            detector.reset()
            if not (math.isfinite(result.score) and 0.0 <= result.score <= 2.0):
                raise ModelOutputError(
                    f"self-test of camera '{camera}': expected a score in [0, 2], "
                    f"found {result.score}"
                )

    def reloaded(self, settings: Settings) -> Models:
        """Return a set with indexes and calibrations read anew, and the same backbone.

        Raises:
            SemanticAnomalyError: as `load`; the present set is unaffected.
        """
        models = Models(self.embedder, load_detectors(settings, self.embedder), self.probe)
        models.self_test()
        return models

    def add_nominal(self, settings: Settings, frames: Mapping[str, tuple[Frame, PatchGrid]]) -> str:
        """Add frames to the index folders of their cameras, and return a sentence that says so.

        Args:
            settings: name the folders.
            frames: with their embeddings, by camera.

        Raises:
            SemanticAnomalyError: an index has a frame already, or cannot take or write it.
        """
        edited: dict[Path, tuple[NominalIndex, NominalIndex]] = {}
        said = []
        for camera, (frame, grid) in frames.items():
            folder, detector = Path(settings.index_of(camera)), self.detectors[camera]
            before, index = edited.get(folder, (detector.index, detector.index))
            refuse_indexed(index, frame)
            index, report = index_edits.add_nominal(
                index, [(frame, grid)], region=detector.region, source=frame.name, note="service"
            )
            edited[folder] = before, index
            said.append(f"{report.stored} entries of '{frame.name}'")
        for folder, (before, index) in edited.items():
            edit_saving.save_edited(folder, before, index)
        return f"added {', '.join(said)}"

    def update(self, settings: Settings) -> None:
        """Give all detectors new live settings, or none of them.

        Raises:
            SemanticAnomalyError: a detector refuses them.
        """
        done: list[tuple[AnomalyDetector, Settings]] = []
        try:
            for detector in self.detectors.values():
                before = detector.settings
                detector.update(settings)
                done.append((detector, before))
        except SemanticAnomalyError:
            for detector, before in done:
                detector.update(before)
            raise

    def reset(self) -> None:
        """Forget the frames seen so far."""
        for detector in self.detectors.values():
            detector.reset()

    def close(self) -> None:
        """Free the backbone; indexes go with the last reference."""
        self.embedder.close()


def load_detectors(settings: Settings, embedder: RunningEmbedder) -> dict[str, AnomalyDetector]:
    """Load a detector for each camera; cameras with the same index folder share the index.

    Raises:
        SemanticAnomalyError: prefixed with the camera's name where there are several.
    """
    indexes: dict[Path, NominalIndex] = {}
    detectors: dict[str, AnomalyDetector] = {}
    for camera in settings.cameras:
        folder = Path(settings.index_of(camera)).expanduser()
        try:
            detector = AnomalyDetector.load(
                settings, camera, embedder=embedder, index=indexes.get(folder)
            )
        except SemanticAnomalyError as error:
            # The class decides what is done about it, so only the sentence changes.
            if len(settings.cameras) > 1 and error.args:
                error.args = (f"camera '{camera}': {error.args[0]}", *error.args[1:])
            raise
        indexes[folder] = detector.index
        detectors[camera] = detector
    return detectors


def renewal_of(detector: AnomalyDetector) -> str | None:
    """Return why a detector's calibration is due for renewal, None if it is not."""
    calibration = detector.calibration
    if calibration is None or not calibration.renewal:
        return None
    return "; ".join(calibration.warnings)
