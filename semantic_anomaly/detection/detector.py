"""The detector: an image goes in, score, decision and localizations come out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.calibration.format import calibration_file
from semantic_anomaly.detection.filters import reject
from semantic_anomaly.detection.localization import heatmap, localize
from semantic_anomaly.detection.tracking import ComponentTracker, decide, follow
from semantic_anomaly.embedding.identity import Embedder
from semantic_anomaly.errors import IndexMismatchError, ModelOutputError, SettingsError
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.linalg import inner_products
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.distances import FrameScore, FrameScorer
from semantic_anomaly.scoring.normalisation import ScoreNormalisation
from semantic_anomaly.segmentation.embedder import RunningEmbedder
from semantic_anomaly.settings import (
    UNSET,
    CameraSettings,
    Settings,
    camera_setting_specs,
    setting_specs,
)
from semantic_anomaly.settings_schema import refuse_fixed
from semantic_anomaly.structures import AnomalyResult, Frame, HeatmapScale, Localization, PatchGrid

_log = logging.getLogger(__name__)
_UNCALIBRATED = "uncalibrated: no threshold to compare with"
_FRAME_PERIOD_NS = 100_000_000
# Entries whose nearest other entries give the scale of the heatmap without a calibration.
_SCALE_ENTRIES = 512
_SEED = 100


@dataclass(frozen=True, eq=False)
class _Live:
    # Replaced in one assignment: no frame sees half of a change.
    settings: Settings
    threshold: float | None
    scale: HeatmapScale
    tracker: ComponentTracker


def load_detector(
    settings: Settings,
    camera: str,
    *,
    embedder: Embedder | None = None,
    index: NominalIndex | None = None,
    need_calibration: bool = False,
) -> AnomalyDetector:
    """Load the detector of a camera; commands and node load it by this function alone.

    Args:
        settings: name the index folder; settings that index and calibration fix may be unset.
        camera: one of `settings.cameras`.
        embedder, index: already loaded; several cameras share them.
        need_calibration: refuse to run without a calibration.

    Raises:
        UnknownNameError: no such camera.
        SettingsError: no index folder is set.
        SemanticAnomalyError: backbone, index or calibration are damaged, or do not match.
    """
    path = settings.for_camera(camera).index_of(camera)
    if not path:
        raise SettingsError("setting 'index': expected the folder of an index, found none")
    folder = Path(path).expanduser()
    if index is None:
        index = NominalIndex.load(folder)
    calibration = None
    if need_calibration or calibration_file(folder, camera).exists():
        calibration = Calibration.load(folder, camera)
        if len(settings.cameras) > 1 and calibration.camera != camera:
            _log.warning("camera '%s': using the calibration of '%s'", camera, calibration.camera)
    return AnomalyDetector(index, calibration, settings=settings, camera=camera, embedder=embedder)


def resolve_settings(
    settings: Settings, index: NominalIndex, calibration: Calibration | None = None
) -> Settings:
    """Return settings in which the values of index and calibration replace the unset ones.

    Raises:
        IndexMismatchError: a value that the index fixes is set and differs.
    """
    changes: dict[str, Any] = {}
    for name, expected in index.fixed_settings.items():
        value = getattr(settings, name)
        if value == UNSET[name]:
            changes[name] = expected
        elif name in ("input_size", "place_weight", "variant", "segmenter") and value != expected:
            raise IndexMismatchError(
                f"setting '{name}'", expected, value, "leave it unset, or build the index again"
            )
    settings = settings.replace(**changes)
    return settings if calibration is None else calibration.resolve(settings)


def resolve_roi(
    camera: CameraSettings, index: NominalIndex, calibration: Calibration | None
) -> RegionOfInterest:
    """Return the region of interest of a camera.

    A polygon that is not set is that of the calibration, or else of the index.

    Raises:
        SettingsError: nothing of the image is left.
        ImageError: the ego mask cannot be read.
    """
    if not camera.region_of_interest:
        stored = calibration.roi if calibration is not None else index.roi_description
        numbers = tuple(float(value) for corner in stored["polygon_xy"] for value in corner)
        camera = CameraSettings(region_of_interest=numbers, ego_mask=camera.ego_mask)
    return RegionOfInterest.from_settings(camera)


class AnomalyDetector:
    """Scores frames against a nominal index and decides by a calibration.

    Settings that the index or the calibration fixes may be unset. The only state are the tracks of
    the components of one camera. `update` and `reset` may be called from another thread than
    `detect`.

    Example:
        >>> detector = AnomalyDetector(NominalIndex.load("index"))
        >>> result = detector.detect(image)
        >>> result.score, result.decision, result.heatmap.shape

    Args:
        index: the nominal index.
        calibration: None: decisions are `unknown` unless `threshold` is set, and the heatmap is
            scaled by distances inside the index.
        settings: None: all defaults.
        camera: one of the cameras of the settings; None: the first.
        embedder: None: loaded from the backbone of the index.
        normalisations: score normalisation by stage, if there is no calibration.

    Raises:
        IndexMismatchError: settings, embedder or region of interest do not match the index.
        MismatchError: the calibration belongs to another index, region of interest or settings.
        CalibrationError: the calibration has too few scores for the target rate.
    """

    def __init__(
        self,
        index: NominalIndex,
        calibration: Calibration | None = None,
        *,
        settings: Settings | None = None,
        camera: str | None = None,
        embedder: Embedder | None = None,
        normalisations: Mapping[str, ScoreNormalisation] | None = None,
    ) -> None:
        settings = settings or Settings()
        self.camera = settings.cameras[0] if camera is None else camera
        settings = resolve_settings(settings.for_camera(self.camera), index, calibration)
        roi = resolve_roi(settings.camera_settings[self.camera], index, calibration)
        index.check_roi(roi)
        if settings.neighbours > index.count:
            raise IndexMismatchError(
                "setting 'neighbours'", f"at most the index's {index.count}", settings.neighbours
            )
        if calibration is not None:
            calibration.check(index.fingerprint, settings, roi)
        if embedder is None:
            embedder = RunningEmbedder.from_settings(settings)
        index.check_embedder(embedder.identity)
        if settings.segments:
            if embedder.segmenter is None:
                raise SettingsError(f"variant '{settings.variant}': needs a segmenter, found none")
            index.check_segmenter(embedder.segmenter)
        if calibration is not None:
            dtypes = calibration.dtype, embedder.identity.dtype
            if dtypes[0] and dtypes[0] != dtypes[1]:
                _log.warning("calibrated in %s, running in %s: scores shift slightly", *dtypes)
            if calibration.stale_edits:
                _log.warning("%s", "; ".join(calibration.warnings))
        index.configure_search(settings.search, settings.search_ef)
        self.embedder = embedder
        self.index = index
        self.calibration = calibration
        self.normalisations = dict(
            normalisations or {} if calibration is None else calibration.normalisations
        )
        self.roi = roi
        self._scorer = FrameScorer(index, settings, roi)
        self._next_stamp_ns = 0
        self._lock = threading.Lock()
        self._live = self._prepared(settings)

    @property
    def settings(self) -> Settings:
        """Return the settings in force, those of index and calibration included."""
        return self._live.settings

    @property
    def threshold(self) -> float | None:
        """Return the anomaly score above which a frame is anomalous, None without a threshold."""
        return self._live.threshold

    def detect(self, image: np.ndarray | Frame) -> AnomalyResult:
        """Return score, decision, heatmap and localizations of an image.

        Args:
            image: (height, width, 3) uint8 RGB, or a frame with its stamp. Images without a stamp
                follow each other after 100 ms.

        Raises:
            ImageError: another shape or dtype.
            ModelOutputError: the backbone returned values that are not finite.
        """
        frame = image
        if not isinstance(frame, Frame):
            frame = Frame(np.asarray(image), self._next_stamp_ns)
        self._next_stamp_ns = frame.stamp_ns + _FRAME_PERIOD_NS
        begin = time.perf_counter()
        grid = self.embedder.embed([frame.image])[0]
        return self.assess(frame, grid, {"embed": (time.perf_counter() - begin) * 1e3})

    def score(self, grid: PatchGrid) -> FrameScore:
        """Return score and anomaly map of patch embeddings.

        Raises:
            ModelOutputError: a distance is not finite.
            SettingsError: no patch lies inside the region of interest.
        """
        return self._scorer.score(grid, self.normalisations, self._live.threshold)

    def assess(
        self, frame: Frame, grid: PatchGrid, stage_ms: Mapping[str, float] | None = None
    ) -> AnomalyResult:
        """Return score, p-value, decision and localizations of a frame from its embeddings.

        The decision is `anomaly` when the score exceeds the threshold and a component is confirmed
        over time. Before that it is `nominal`, with a score above the threshold and candidates.
        Without a threshold it is `unknown`.

        Args:
            frame: size and stamp; a stamp before the last one clears the tracks.
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
        frame_score = self._scorer.score(grid, self.normalisations, live.threshold)
        score, anomaly_map = frame_score.score, frame_score.anomaly_map
        searched = time.perf_counter()
        heat = heatmap(anomaly_map, self.roi, frame.image_hw)
        labels = np.zeros(heat.shape, np.uint16)
        localizations: tuple[Localization, ...] = ()
        if live.threshold is not None and score > live.threshold:
            roi_mask, min_area_px = self.roi.pixel_mask(grid.image_hw), live.settings.min_area_px
            labels, localizations = localize(
                anomaly_map, heat, live.threshold, min_area_px, roi_mask, grid, self.index
            )
            labels, localizations = reject(live.settings, labels, localizations, roi_mask)
        localizations = follow(live.tracker, frame.stamp_ns, localizations)
        decision = decide(localizations, live.threshold)
        end = time.perf_counter()
        stages = dict(stage_ms or {})
        stages["search"] = (searched - begin) * 1e3
        stages["localize"] = (end - searched) * 1e3
        # Other stages given may be parts of 'embed', such as the preparation of the image.
        stages["total"] = stages.get("embed", 0.0) + (end - begin) * 1e3
        return AnomalyResult(
            score=score,
            decision=decision,
            p_value=self.calibration.p_value(score) if self.calibration else None,
            threshold=live.threshold,
            heatmap=heat,
            scale=live.scale,
            label_map=labels,
            localizations=localizations,
            stage_ms=stages,
            reason=_UNCALIBRATED if live.threshold is None else "",
            parts=frame_score.parts,
            note=frame_score.note,
        )

    def reset(self) -> None:
        """Forget the tracks of the frames seen so far."""
        with self._lock:
            self._live = self._prepared(self._live.settings)

    def recall(self, stamp_ns: int, boxes: Sequence[Sequence[float]]) -> None:
        """Add a frame that was assessed before to the tracks; boxes are xyxy in pixels."""
        self._live.tracker.update(stamp_ns, np.array(boxes, np.float64).reshape(-1, 4))

    def update(self, settings: Settings) -> None:
        """Take changed live settings at once, or none of them.

        Raises:
            SettingsError: a setting differs that is not live.
            UnknownNameError: the settings lack the camera.
            CalibrationError: the calibration has too few scores for the new target rate.
            MismatchError: it has episodes of another confirmation.
        """
        with self._lock:
            resolved = resolve_settings(
                settings.for_camera(self.camera), self.index, self.calibration
            )
            specs = {**setting_specs(), **camera_setting_specs()}
            refuse_fixed(self._live.settings.to_parameters(), resolved.to_parameters(), specs)
            self._live = self._prepared(resolved, self._live)

    def _prepared(self, settings: Settings, before: _Live | None = None) -> _Live:
        threshold = settings.threshold or None
        if self.calibration is not None:
            threshold = threshold or self.calibration.threshold_of(settings)
            scale = self.calibration.scale(threshold)
        elif threshold is not None:
            scale = HeatmapScale(0.0, threshold)
        else:
            scale = before.scale if before else _scale_of_index(self.index)
        window = settings.confirm_count, settings.confirm_s, settings.silence_s
        tracker = before.tracker if before else None
        if tracker is None or (tracker.count, tracker.window_s, tracker.silence_s) != window:
            tracker = ComponentTracker(*window)
        return _Live(settings, threshold, scale, tracker)


def _scale_of_index(index: NominalIndex) -> HeatmapScale:
    """Return a heatmap scale from the distances of entries to their nearest other entries."""
    entries = index.content.embeddings
    count = min(_SCALE_ENTRIES, len(entries))
    rows = np.random.default_rng(_SEED).choice(len(entries), count, replace=False)
    products = inner_products(np.ascontiguousarray(entries[rows]), entries.T)  # (count, n)
    products[np.arange(count), rows] = -1.0
    distances = 1.0 - products.max(axis=1)  # (count,)
    low, high = float(np.median(distances)), float(distances.max())
    return HeatmapScale(low, max(2.0 * high, low + 1e-6), "distances inside the index")
