"""The short composition: an image goes in, an honest statement comes out."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from semantic_anomaly.calibration import Calibration
from semantic_anomaly.calibration_file import FILE_NAME
from semantic_anomaly.errors import ModelOutputError, SettingsError, UnknownNameError
from semantic_anomaly.filtering import FrameConfirmation
from semantic_anomaly.localization import heatmap, localize
from semantic_anomaly.regions import ImageRegion, patch_regions
from semantic_anomaly.scoring import check_distances, tail_mean
from semantic_anomaly.settings import Settings, camera_setting_specs, setting_specs
from semantic_anomaly.structures import (
    AnomalyResult,
    Decision,
    Frame,
    HeatmapScale,
    Localization,
    NominalExample,
    PatchGrid,
)

if TYPE_CHECKING:
    from semantic_anomaly.identity import EmbedderIdentity
    from semantic_anomaly.index import NominalIndex

_log = logging.getLogger(__name__)


class Embedder(Protocol):
    """What the detector needs of a backbone; `embedding.PatchEmbedder` in earnest."""

    @property
    def identity(self) -> EmbedderIdentity:
        """Return what the embeddings depend on."""

    def embed(self, images: Sequence[np.ndarray]) -> list[PatchGrid]:
        """Return the patch embeddings of (height, width, 3) uint8 RGB images, in order."""


@dataclass(frozen=True, eq=False)
class _Live:
    # Everything that may change between two frames, swapped in one assignment: a frame never
    # meets half of a change.
    settings: Settings
    threshold: float | None
    scale: HeatmapScale
    confirmation: FrameConfirmation


class AnomalyDetector:
    """Scores frames against a nominal index and decides by its calibration.

    One detector serves one camera: confirmation over time is its only state. `update` and
    `reset` may be called from another thread than `assess`.

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
    ) -> None:
        index.check_embedder(embedder.identity)
        index.check_region(region)
        if calibration is not None:
            calibration.check(index.fingerprint, settings, region)
            running = embedder.identity.dtype
            if calibration.dtype not in ("", running):
                _log.warning(
                    "calibrated in %s, running in %s: scores shift a little; calibrate again in "
                    "the precision that runs",
                    calibration.dtype,
                    running,
                )
        self.embedder = embedder
        self.index = index
        self.calibration = calibration
        self.region = region
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
            embedder: one already loaded; several cameras share it.
            index: the camera's index already loaded.
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
            from semantic_anomaly.index import NominalIndex

            index = NominalIndex.load(folder)
        index.configure_search(settings.search, settings.search_ef)
        calibration = None
        if need_calibration or (folder / FILE_NAME).exists():
            calibration = Calibration.load(folder)
        if embedder is None:
            from semantic_anomaly.embedding import PatchEmbedder

            embedder = PatchEmbedder.from_settings(settings)
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

        Raises:
            ModelOutputError: a distance is not finite.
            SettingsError: no patch of so small a grid takes part.
        """
        live = self._live
        regions = patch_regions(grid, self.region)
        distances = self.index.distances(
            regions.embeddings, live.settings.neighbours, exact_above=live.threshold
        )
        check_distances(distances)
        return tail_mean(distances, live.settings.tail_percent), regions.paint(distances)

    def assess(
        self, frame: Frame, grid: PatchGrid, stage_ms: Mapping[str, float] | None = None
    ) -> AnomalyResult:
        """State what a frame's patch embeddings mean: score, p-value, decision, places.

        The decision is `anomaly` when the score exceeds the threshold and confirmation over time
        agrees; an exceeding frame that is not confirmed yet is `nominal` with its score above
        its threshold. Without any threshold it is `unknown`.

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
        score, distance_map = self.score(grid)
        searched = time.perf_counter()
        decision = self._decide(frame, score, live)
        heat = heatmap(distance_map, self.region, frame.image_hw)
        labels, places = self._places(decision, distance_map, heat, grid, live)
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
            reason=""
            if live.threshold is not None
            else "uncalibrated: no threshold to compare with",
        )

    def reset(self) -> None:
        """Forget the frames seen so far."""
        with self._lock:
            live = self._live
            self._live = dataclasses.replace(live, confirmation=_confirmation(live.settings))

    def update(self, settings: Settings) -> None:
        """Take changed live settings at once, or none of them.

        Raises:
            SettingsError: a setting differs that is read only at the start.
            CalibrationError: the calibration is too small for the new target rate.
        """
        with self._lock:
            _refuse_fixed(self._live.settings, settings)
            self._live = self._prepared(settings, self._live)

    def _prepared(self, settings: Settings, before: _Live | None = None) -> _Live:
        threshold: float | None = None
        scale = HeatmapScale(0.0, 1.0)
        if settings.threshold > 0.0:
            threshold = settings.threshold
            scale = HeatmapScale(0.0, threshold)
        elif self.calibration is not None:
            threshold = self.calibration.threshold_for(settings.target_false_alarm_rate)
        if self.calibration is not None and threshold is not None:
            scale = self.calibration.scale(threshold)
        confirmation = _confirmation(settings)
        kept = before.confirmation if before else confirmation
        if (kept.count, kept.window) == (confirmation.count, confirmation.window):
            confirmation = kept
        return _Live(settings, threshold, scale, confirmation)

    def _decide(self, frame: Frame, score: float, live: _Live) -> Decision:
        if live.threshold is None:
            return Decision.UNKNOWN
        confirmed = live.confirmation.update(frame.stamp_ns, score > live.threshold)
        return Decision.ANOMALY if confirmed else Decision.NOMINAL

    def _places(
        self,
        decision: Decision,
        distance_map: np.ndarray,
        heat: np.ndarray,
        grid: PatchGrid,
        live: _Live,
    ) -> tuple[np.ndarray, tuple[Localization, ...]]:
        if decision is not Decision.ANOMALY or live.threshold is None:
            return np.zeros(heat.shape, np.uint16), ()

        def nearest(row: int, col: int) -> NominalExample:
            return self.index.nearest(grid.features[row, col])

        mask = None if self.region.is_whole_image else self.region.pixel_mask(grid.image_hw)
        return localize(
            distance_map, heat, live.threshold, live.settings.min_area_px, mask, nearest
        )


def _confirmation(settings: Settings) -> FrameConfirmation:
    return FrameConfirmation(settings.confirm_count, settings.confirm_window)


def _refuse_fixed(before: Settings, after: Settings) -> None:
    old, new = before.to_parameters(), after.to_parameters()
    specs = {**setting_specs(), **camera_setting_specs()}
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name) and not specs[name.rpartition(".")[2]].live:
            raise SettingsError(
                f"setting '{name}' cannot change while running: expected {old.get(name)!r}, "
                f"found {new.get(name)!r}"
            )
