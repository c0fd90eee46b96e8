"""The short composition: an image goes in, an honest statement comes out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.calibration.format import file_of
from semantic_anomaly.detection.localization import heatmap, localize
from semantic_anomaly.detection.tracking import ComponentTracker, decide, follow, reject
from semantic_anomaly.errors import (
    IndexMismatchError,
    ModelOutputError,
    SettingsError,
    UnknownNameError,
)
from semantic_anomaly.index.build import PartPlan
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.scoring.distances import Branches, DistanceMap, FrameScore
from semantic_anomaly.scoring.normalisation import UsualDistances
from semantic_anomaly.settings import Settings, camera_setting_specs, setting_specs
from semantic_anomaly.settings_schema import refuse_fixed
from semantic_anomaly.structures import (
    AnomalyResult,
    Frame,
    HeatmapScale,
    Localization,
    NominalExample,
    PatchGrid,
)

if TYPE_CHECKING:
    from semantic_anomaly.embedding.identity import Embedder
    from semantic_anomaly.index.nominal_index import NominalIndex

_log = logging.getLogger(__name__)
_UNCALIBRATED = "uncalibrated: no threshold to compare with"


@dataclass(frozen=True, eq=False)
class _Live:
    # Swapped in one assignment: a frame never meets half of a change.
    settings: Settings
    threshold: float | None
    scale: HeatmapScale
    tracker: ComponentTracker


class AnomalyDetector:
    """Scores frames against a nominal index and decides by its calibration.

    Its only state are the tracks of components of its one camera. `update` and `reset` may be
    called from another thread than `assess`.

    Args:
        embedder, index, settings, region: that belong together.
        calibration: None makes decisions `unknown`, unless a threshold is set by hand.
        usual: what distances of each branch are relative to; a calibration brings its own.

    Raises:
        IndexMismatchError: the index was made by another backbone or for another region.
        MismatchError: the calibration was made with another index, region or score.
        CalibrationError: the calibration is too small for the target rate.
    """

    def __init__(
        self,
        embedder: Embedder,
        index: NominalIndex,
        calibration: Calibration | None,
        settings: Settings,
        region: ImageRegion,
        usual: Mapping[str, UsualDistances] | None = None,
    ) -> None:
        index.check_embedder(embedder.identity)
        index.check_region(region)
        segmenter = embedder.segmenter if settings.segments else None
        if settings.segments and segmenter is None:
            raise SettingsError(f"variant '{settings.variant}': needs a segmenter, found none")
        index.plan.check(PartPlan.of_settings(settings, segmenter))
        if settings.neighbours > index.count:
            raise IndexMismatchError(
                "setting 'neighbours'", f"at most the index's {index.count}", settings.neighbours
            )
        if calibration is not None:
            calibration.check(index.fingerprint, settings, region)
            dtypes = calibration.dtype, embedder.identity.dtype
            if dtypes[0] and dtypes[0] != dtypes[1]:
                _log.warning("calibrated in %s, running in %s: scores shift a little", *dtypes)
            if calibration.renewal:
                _log.warning("%s", "; ".join(calibration.warnings))
        self.embedder = embedder
        self.index = index
        self.calibration = calibration
        self.usual = calibration.usual if calibration is not None else dict(usual or {})
        self.region = region
        self._branches = Branches(index, settings, region)
        self._lock = threading.Lock()
        self._live = self._prepared(settings)

    @classmethod
    def load(
        cls,
        settings: Settings,
        camera: str,
        *,
        embedder: Embedder | None = None,
        index: NominalIndex | None = None,
        need_calibration: bool = False,
    ) -> AnomalyDetector:
        """Make the detector of a camera from its settings: what was evaluated is what runs.

        Args:
            settings: name backbone, index folder and region.
            camera: one of `settings.cameras`.
            embedder, index: already loaded; several cameras share an embedder.
            need_calibration: refuse to run uncalibrated.

        Raises:
            UnknownNameError: no such camera.
            SettingsError: no index folder is set.
            SemanticAnomalyError: backbone, index or calibration are damaged, or do not agree.
        """
        if camera not in settings.cameras:
            raise UnknownNameError("camera", camera, settings.cameras)
        region = ImageRegion.from_settings(settings.camera_settings[camera])
        named = settings.index_of(camera)
        if not named:
            raise SettingsError("setting 'index': expected the folder of an index, found none")
        folder = Path(named).expanduser()
        if index is None:
            from semantic_anomaly.index.nominal_index import NominalIndex

            index = NominalIndex.load(folder)
        index.configure_search(settings.search, settings.search_ef)
        calibration = None
        if need_calibration or file_of(folder, camera).exists():
            calibration = Calibration.load(folder, camera)
            if len(settings.cameras) > 1 and calibration.camera != camera:
                _log.warning("camera '%s': calibrated for '%s'", camera, calibration.camera)
        if embedder is None:
            from semantic_anomaly.segmentation.embedder import RunningEmbedder

            embedder = RunningEmbedder.from_settings(settings)
        return cls(embedder, index, calibration, settings, region)

    @property
    def settings(self) -> Settings:
        """Return the settings in force."""
        return self._live.settings

    @property
    def threshold(self) -> float | None:
        """Return the frame score above which a frame is anomalous, None when there is none."""
        return self._live.threshold

    def detect(self, frame: Frame) -> AnomalyResult:
        """Embed a frame and assess it.

        Raises:
            ModelOutputError: the backbone produced something that is not finite.
        """
        begin = time.perf_counter()
        grid = self.embedder.embed([frame.image])[0]
        return self.assess(frame, grid, {"embed": (time.perf_counter() - begin) * 1e3})

    def score(self, grid: PatchGrid) -> tuple[float, np.ndarray]:
        """Return the frame score and the (rows, cols) float32 patch distances, 0 outside.

        Distances are relative to what is usual at their place, where that is known.

        Raises:
            ModelOutputError: a distance is not finite.
            SettingsError: no patch of so small a grid takes part.
        """
        found = self._score(grid, self._live)
        return found.score, found.distances

    def plain_distances(self, grid: PatchGrid) -> dict[str, DistanceMap]:
        """Return the distances of every branch, relative to nothing; raises as `score`."""
        return self._branches.maps(grid)

    def assess(
        self, frame: Frame, grid: PatchGrid, stage_ms: Mapping[str, float] | None = None
    ) -> AnomalyResult:
        """State what a frame's patch embeddings mean: score, p-value, decision, places.

        The decision is `anomaly` when the score exceeds the threshold and one of its components
        is confirmed over time; before that it is `nominal`, with the score above the threshold
        and candidates. Without any threshold it is `unknown`.

        Args:
            frame: gives size and stamp; a stamp before the last one clears the confirmation.
            grid: its patch embeddings.
            stage_ms: milliseconds spent on it so far, by stage.

        Raises:
            ModelOutputError: the grid is of another image size, or a distance is not finite.
        """
        begin = time.perf_counter()
        live = self._live
        if grid.image_hw != frame.image_hw:
            raise ModelOutputError(
                f"frame '{frame.name}': expected embeddings of an image of {frame.image_hw}, "
                f"found {grid.image_hw}"
            )
        found = self._score(grid, live)
        score, distance_map = found.score, found.distances
        searched = time.perf_counter()
        heat = heatmap(distance_map, self.region, frame.image_hw)
        labels, places = self._places(score, distance_map, heat, grid, live)
        places = follow(live.tracker, frame.stamp_ns, places)
        decision = decide(places, live.threshold)
        end = time.perf_counter()
        stages = dict(stage_ms or {})
        stages["search"] = (searched - begin) * 1e3
        stages["localize"] = (end - searched) * 1e3
        # Stages given beforehand may be parts of 'embed' (such as its preparation).
        stages["total"] = stages.get("embed", 0.0) + (end - begin) * 1e3
        return AnomalyResult(
            score=score,
            decision=decision,
            p_value=self.calibration.p_value(score) if self.calibration else None,
            threshold=live.threshold,
            heatmap=heat,
            scale=live.scale,
            label_map=labels,
            localizations=places,
            stage_ms=stages,
            reason=_UNCALIBRATED if live.threshold is None else "",
            parts=found.parts,
            note=found.note,
        )

    def reset(self) -> None:
        """Forget the frames seen so far."""
        with self._lock:
            self._live = self._prepared(self._live.settings)

    def recall(self, stamp_ns: int, boxes: Sequence[Sequence[float]]) -> None:
        """Take in a frame assessed before, by the boxes of its localizations."""
        self._live.tracker.update(stamp_ns, np.array(boxes, np.float64).reshape(-1, 4))

    def update(self, settings: Settings) -> None:
        """Take changed live settings at once, or none of them.

        Raises:
            SettingsError: a setting differs that is read only at the start.
            CalibrationError: the calibration is too small for the new target rate.
            MismatchError: it has a rate of stretches by another confirmation.
        """
        with self._lock:
            specs = {**setting_specs(), **camera_setting_specs()}
            refuse_fixed(self._live.settings.to_parameters(), settings.to_parameters(), specs)
            self._live = self._prepared(settings, self._live)

    def _prepared(self, settings: Settings, before: _Live | None = None) -> _Live:
        threshold = settings.threshold or None
        if threshold is None and self.calibration is not None:
            threshold = self.calibration.threshold_of(settings)
        scale = HeatmapScale(0.0, threshold or 1.0)
        if self.calibration is not None and threshold is not None:
            scale = self.calibration.scale(threshold)
        given = settings.confirm_count, settings.confirm_s, settings.silence_s
        tracker = before.tracker if before else None
        if tracker is None or (tracker.count, tracker.window_s, tracker.silence_s) != given:
            tracker = ComponentTracker(*given)
        return _Live(settings, threshold, scale, tracker)

    def _score(self, grid: PatchGrid, live: _Live) -> FrameScore:
        return self._branches.score(grid, self.usual, live.threshold)

    def _places(
        self,
        score: float,
        distance_map: np.ndarray,
        heat: np.ndarray,
        grid: PatchGrid,
        live: _Live,
    ) -> tuple[np.ndarray, tuple[Localization, ...]]:
        if live.threshold is None or score <= live.threshold:
            return np.zeros(heat.shape, np.uint16), ()

        def nearest(places: Sequence[tuple[int, int]]) -> list[NominalExample]:
            rows, cols = zip(*places, strict=True)
            return self.index.nearest_many(grid.features[rows, cols])

        mask = None if self.region.is_whole_image else self.region.pixel_mask(grid.image_hw)
        least_px = live.settings.min_area_px
        labels, places = localize(distance_map, heat, live.threshold, least_px, mask, nearest)
        return reject(live.settings, labels, places, self.region.pixel_mask(grid.image_hw))
