"""The detector: an image goes in, score, decision and localizations come out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.calibration.drift import DRIFT, DriftCheck
from semantic_anomaly.calibration.format import calibration_file
from semantic_anomaly.detection.blindness import BlindnessCheck
from semantic_anomaly.detection.filters import reject
from semantic_anomaly.detection.localization import heatmap, localize
from semantic_anomaly.detection.tracking import ComponentTracker, decide, follow
from semantic_anomaly.embedding.identity import Embedder
from semantic_anomaly.errors import (
    CalibrationError,
    IndexMismatchError,
    MismatchError,
    ModelOutputError,
    SettingsError,
)
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.images import decode_compressed
from semantic_anomaly.linalg import inner_products
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.distances import FrameScore, FrameScorer
from semantic_anomaly.scoring.normalisation import ScoreNormalisation, constant_normalisation
from semantic_anomaly.segmentation.embedder import RunningEmbedder
from semantic_anomaly.segmentation.masks import StageEmbeddings
from semantic_anomaly.settings import (
    COMBINED,
    INSTANCE,
    SHORTHAND,
    TORCH,
    UNSET,
    CameraSettings,
    Settings,
    camera_setting_specs,
    setting_specs,
)
from semantic_anomaly.settings_schema import refuse_fixed
from semantic_anomaly.stages import GRID, INSTANCES, StageSpec
from semantic_anomaly.structures import (
    AnomalyResult,
    Decision,
    Frame,
    HeatmapScale,
    Localization,
    NominalExample,
    PatchGrid,
)
from semantic_anomaly.timing import (
    DECODE,
    FORWARD,
    LOCALIZE,
    PREPARE,
    SCORE,
    SEARCH,
    TOTAL,
    elapsed_ms,
    stage_times,
)

_log = logging.getLogger(__name__)
_UNCALIBRATED = "uncalibrated: no threshold to compare with"
_LEAVE_UNSET = "leave it unset, or build the index again"
_FRAME_PERIOD_NS = 100_000_000
# Entries whose nearest other entries give the scale of the heatmap without a calibration.
_SCALE_ENTRIES = 512
_SEED = 100
_PROBES = 8
# Largest change of a probe's score by another precision, as a share of the interquartile range of
# the calibration scores.
_ALLOWED_CHANGE = 0.05


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

    `stages` replaces its shorthand. Precision and execution are those of the calibration, or else
    of the index. Names of backbones may differ from those of the index: the embedder is checked by
    its weights.

    Raises:
        IndexMismatchError: a value that the index fixes is set and differs.
    """
    fixed = index.fixed_settings
    changes: dict[str, Any] = {name: UNSET[name] for name in SHORTHAND}
    changes["stages"] = tuple(map(str, _resolved_stages(settings, index)))
    for name in fixed.keys() - {"stages"}:
        value = getattr(settings, name)
        if value == UNSET[name]:
            changes[name] = fixed[name]
        elif name != "segmenter_model" and value != fixed[name]:
            raise IndexMismatchError(f"setting '{name}'", fixed[name], value, _LEAVE_UNSET)
    running = index.stage.embedder
    if calibration is not None and calibration.execution:
        running = replace(
            running, dtype=calibration.dtype or running.dtype, execution=calibration.execution
        )
    # Two starts score alike: what was measured once is used again.
    for name in ("dtype", "execution"):
        if getattr(settings, name) == "auto":
            changes[name] = getattr(running, name)
    settings = settings.replace(**changes)
    return settings if calibration is None else calibration.resolve(settings)


def _resolved_stages(settings: Settings, index: NominalIndex) -> tuple[StageSpec, ...]:
    """Return the stages of the index, with the backbones of the settings where they are set."""
    own = tuple(stage.stage.spec for stage in index.stages)
    if settings.stages:
        given = settings.stage_specs
        same = len(given) == len(own) and all(
            replace(spec, backbone=stage.backbone, layer=stage.layer) == stage
            and spec.layer in (None, stage.layer)
            for spec, stage in zip(given, own, strict=True)
        )
        if not same:
            raise IndexMismatchError(
                "setting 'stages'", [*map(str, own)], [*settings.stages], _LEAVE_UNSET
            )
        return tuple(
            replace(stage, backbone=spec.backbone) for spec, stage in zip(given, own, strict=True)
        )
    kinds = [spec.kind for spec in own]
    variant = GRID if INSTANCES not in kinds else INSTANCE if GRID not in kinds else COMBINED
    shared: dict[str, set[Any]] = {
        "input_size": {spec.size for spec in own},
        "variant": {variant},
    }
    for name, values in shared.items():
        value = getattr(settings, name)
        if value != UNSET[name] and values != {value}:
            expected = ", ".join(map(str, sorted(values)))
            raise IndexMismatchError(f"setting '{name}'", expected, value, _LEAVE_UNSET)
    layers = tuple(spec.layer for spec in own if spec.kind == GRID or variant == INSTANCE)
    if any(layer >= 0 for layer in settings.layers) and settings.layers != layers:
        raise IndexMismatchError("setting 'layers'", layers, settings.layers, _LEAVE_UNSET)
    backbones = {spec.backbone for spec in own}
    if settings.backbone and len(backbones) == 1:
        return tuple(replace(spec, backbone=settings.backbone) for spec in own)
    if settings.backbone:
        raise IndexMismatchError(
            "setting 'backbone'", ", ".join(sorted(backbones)), settings.backbone, "set 'stages'"
        )
    return own


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


def probe_scores(
    scorer: FrameScorer,
    index: NominalIndex,
    embedder: Embedder,
    normalisations: Sequence[ScoreNormalisation],
    *,
    pattern: bool = False,
) -> list[float]:
    """Return the scores of some thumbnails of an index.

    Other precisions and the self-test must repeat them.

    Args:
        pattern: score them with a test pattern, which no drive shows, in their middle.

    Raises:
        ModelOutputError: a network failed.
    """
    frames = index.content.frames
    numbers = np.unique(np.linspace(0, len(frames) - 1, _PROBES).astype(int))
    scores = []
    for number in numbers:
        image = decode_compressed(frames[number].thumbnail, "jpeg")
        if pattern:
            image = _with_pattern(image)
        grid = embedder.embed([image])[0]
        scores.append(scorer.score(grid, normalisations, None).score)
    return scores


def _with_pattern(image: np.ndarray) -> np.ndarray:
    """Return the image with coloured squares in the middle third of both sides."""
    height, width = image.shape[:2]
    colours = np.random.default_rng(_SEED).integers(0, 256, (4, 4, 3), np.uint8)
    changed = image.copy()
    middle = changed[height // 3 : height * 2 // 3, width // 3 : width * 2 // 3]
    middle[:] = cv2.resize(colours, middle.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    return changed


def load_embedder(settings: Settings, given: Settings) -> RunningEmbedder:
    """Load the embedder in the precision and execution recorded by calibration or index.

    Where the device lacks them, it runs in its own precision by torch; a detector then compares
    scores with those of the calibration.

    Args:
        settings: from `resolve_settings`.
        given: settings before that; what they set is not replaced.

    Raises:
        SemanticAnomalyError: as `RunningEmbedder.from_settings`.
    """
    # The rest of this module needs no torch.
    from semantic_anomaly.embedding.execution import candidates
    from semantic_anomaly.embedding.pretrained import choose_device

    pair = settings.dtype, settings.execution
    if "auto" in (given.dtype, given.execution) and pair not in candidates(
        choose_device(settings.device)
    ):
        execution = TORCH if given.execution == "auto" else given.execution
        _log.warning("this device has no %s by %s, as recorded; %s is tried", *pair, execution)
        settings = settings.replace(dtype=given.dtype, execution=execution)
    return RunningEmbedder.from_settings(settings)


def embed_timed(
    embedder: Embedder, images: Sequence[np.ndarray]
) -> tuple[list[PatchGrid], dict[str, float]]:
    """Return the patch grids of images, and the milliseconds spent on all of them by stage.

    Args:
        embedder: makes the grids.
        images: (height, width, 3) uint8 RGB each.

    Raises:
        ImageError, ModelOutputError: as `Embedder.embed`.
    """
    begin_s = time.perf_counter()
    with stage_times() as times_ms:
        times_ms[PREPARE] = 0.0
        grids = embedder.embed(images)
    # What remains: a GPU has computed the embeddings only when they are copied.
    times_ms[FORWARD] = elapsed_ms(begin_s) - sum(times_ms.values())
    return grids, times_ms


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
        normalisations: score normalisation of each stage, if there is no calibration; None: by the
            distances inside the index.

    Raises:
        IndexMismatchError: settings, embedder or region of interest do not match the index.
        MismatchError: the calibration belongs to another index, region of interest or settings, or
            precision and execution differ from its own, and so do scores.
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
        normalisations: Sequence[ScoreNormalisation] | None = None,
    ) -> None:
        given = settings = settings or Settings()
        self.camera = settings.cameras[0] if camera is None else camera
        settings = resolve_settings(settings.for_camera(self.camera), index, calibration)
        roi = resolve_roi(settings.camera_settings[self.camera], index, calibration)
        index.check_roi(roi)
        for number, stage in enumerate(index.stages):
            if settings.neighbours > stage.count:
                raise IndexMismatchError(
                    "setting 'neighbours'",
                    f"at most the {stage.count} entries of stage {number}",
                    settings.neighbours,
                )
        if calibration is not None:
            calibration.check(index, settings, roi)
        if embedder is None:
            embedder = load_embedder(settings, given)
        index.check_embedder(embedder.stages)
        if calibration is not None and calibration.stale_edits:
            _log.warning("%s", "; ".join(calibration.warnings))
        index.configure_search(settings.search, settings.search_ef, embedder.device)
        self.embedder = embedder
        self.index = index
        self.calibration = calibration
        self._distances_inside: list[DistancesInside] = []
        if calibration is not None:
            normalisations = calibration.normalisations
        else:
            self._distances_inside = [DistancesInside.of(stage) for stage in index.stages]
            inside = [distances.normalisation for distances in self._distances_inside]
            normalisations = inside if normalisations is None else normalisations
        self.normalisations = tuple(normalisations)
        self.roi = roi
        self._scorer = FrameScorer(index, settings, roi)
        self._next_stamp_ns = 0
        self._lock = threading.Lock()
        self._live = self._prepared(settings)
        self._blindness = BlindnessCheck()
        self._drift: DriftCheck | None = None
        if calibration is not None:
            self._drift = calibration.drift_check(settings.drift_window)
        self._check_running()

    @property
    def settings(self) -> Settings:
        """Return the settings in force, those of index and calibration included."""
        return self._live.settings

    @property
    def threshold(self) -> float | None:
        """Return the anomaly score above which a frame is anomalous, None without a threshold."""
        return self._live.threshold

    @property
    def promise(self) -> str | None:
        """Return in one sentence what the threshold in force promises, None without calibration."""
        if self.calibration is None:
            return None
        if self.settings.threshold is not None:
            return "the threshold is a setting: nothing is promised"
        return self.calibration.promise_of(self.settings)

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
        [grid], times_ms = embed_timed(self.embedder, [frame.image])
        return self.assess(frame, grid, times_ms)

    def score(self, grid: PatchGrid) -> FrameScore:
        """Return score and anomaly map of patch embeddings.

        Raises:
            ModelOutputError: a distance is not finite.
            SettingsError: no patch lies inside the region of interest.
        """
        return self._scorer.score(grid, self.normalisations, self._live.threshold)

    def nearest(
        self, score: FrameScore, patches: Sequence[tuple[int, int]]
    ) -> list[NominalExample]:
        """Return for each patch (row, col) the nearest example in the stage that adds most."""
        stage_maps = score.stage_maps
        examples: dict[int, NominalExample] = {}
        values = np.array([[stage_map.values[p] for stage_map in stage_maps] for p in patches])
        stages = values.argmax(axis=1).tolist()
        for stage in sorted(set(stages)):
            numbers = [number for number, other in enumerate(stages) if other == stage]
            embeddings = stage_maps[stage].embeddings
            queries = [
                embeddings.at(*_resized_patch(patches[n], stage_maps[stage].values, embeddings))
                for n in numbers
            ]
            found = self.index.stages[stage].nearest_many(np.stack(queries))
            examples.update(zip(numbers, (replace(e, stage=stage) for e in found), strict=True))
        return [examples[number] for number in range(len(patches))]

    def assess(
        self, frame: Frame, grid: PatchGrid, stage_ms: Mapping[str, float] | None = None
    ) -> AnomalyResult:
        """Return score, p-value, decision and localizations of a frame from its embeddings.

        The decision is `anomaly` when the score exceeds the threshold and a component is confirmed
        over time. Before that it is `nominal`, with a score above the threshold and candidates.
        Without a threshold it is `unknown`, and while the camera is blind (see `blindness`): such a
        frame takes no part in tracks and drift check.

        Args:
            frame: size and stamp; a jump back clears the tracks (see `stamps`).
            grid: its patch embeddings.
            stage_ms: milliseconds spent on its embeddings, by stage.

        Raises:
            ModelOutputError: the grid is of another image size, or a distance is not finite.
        """
        begin_s = time.perf_counter()
        live = self._live
        if grid.image_hw != frame.image_hw:
            raise ModelOutputError(
                f"frame '{frame.name}': expected embeddings of an image of {frame.image_hw}, "
                f"found {grid.image_hw}"
            )
        with stage_times() as searching_ms:
            frame_score = self._scorer.score(grid, self.normalisations, live.threshold)
        score = frame_score.score
        scored_ms = elapsed_ms(begin_s)
        heat = heatmap(frame_score.anomaly_map, self.roi, frame.image_hw)
        blind = self._blindness.reason(
            frame, live.settings.least_contrast, live.settings.frozen_after_s
        )
        decision, labels = Decision.UNKNOWN, np.zeros(heat.shape, np.uint16)
        localizations: tuple[Localization, ...] = ()
        if not blind:
            labels, localizations = self._localized(frame_score, heat, live)
            localizations = follow(live.tracker, frame.stamp_ns, localizations)
            decision = decide(localizations, live.threshold)
            self._note_drift(score)
        if not self.roi.is_whole_image:
            heat = np.where(self.roi.pixel_mask(frame.image_hw), heat, np.float32(live.scale.low))
        search_ms = searching_ms.get(SEARCH, 0.0)
        times_ms = {DECODE: frame.decode_ms, **(stage_ms or {})}
        times_ms[SEARCH] = search_ms
        times_ms[SCORE] = scored_ms - search_ms
        times_ms[LOCALIZE] = elapsed_ms(begin_s) - scored_ms
        times_ms[TOTAL] = sum(times_ms.values())
        return AnomalyResult(
            score=score,
            decision=decision,
            p_value=self.calibration.p_value(score, live.settings.confidence)
            if self.calibration
            else None,
            threshold=live.threshold,
            heatmap=heat,
            scale=live.scale,
            label_map=labels,
            localizations=localizations,
            stage_ms=times_ms,
            reason=blind or (_UNCALIBRATED if live.threshold is None else ""),
            stage_scores=frame_score.stage_scores,
            coarse=frame_score.coarse,
            drift=self.is_drift,
            blind=bool(blind),
        )

    @property
    def is_drift(self) -> bool:
        """Return whether the frames seen last score unlike those of the calibration."""
        return self._drift is not None and self._drift.is_drift

    @property
    def is_drift_known(self) -> bool:
        """Return whether there were enough frames since the start to tell."""
        return self._drift is not None and self._drift.is_known

    def continue_drift(self, before: AnomalyDetector) -> None:
        """Go on with the drift check of a detector of the same calibration and window."""
        one, other = self.calibration, before.calibration
        if one is None or other is None or one.sha256 != other.sha256:
            return
        if self._live.settings.drift_window == before.settings.drift_window:
            self._drift = before._drift

    def continue_blindness(self, before: BlindnessCheck) -> None:
        """Go on with the images that another check has seen last."""
        self._blindness = before

    def _note_drift(self, score: float) -> None:
        if self._drift is not None and self._drift.add(score):
            _log.warning("camera '%s': %s", self.camera, DRIFT)

    def reset(self, *, drift: bool = False) -> None:
        """Forget the tracks of the frames seen so far.

        Args:
            drift: forget their scores in the drift check too. A gap or a jump of the clock says
                nothing about the road, so it is kept otherwise.
        """
        with self._lock:
            self._live = self._prepared(self._live.settings)
            self._blindness.clear()
            if drift and self._drift is not None:
                self._drift.clear()

    def recall(
        self, stamp_ns: int, boxes: Sequence[Sequence[float]], score: float | None = None
    ) -> None:
        """Add a frame that was assessed before to the tracks and to the drift check.

        Args:
            stamp_ns: stamp of the frame.
            boxes: of its components, xyxy in pixels.
            score: of the frame; None: it has none.
        """
        self._live.tracker.update(stamp_ns, np.array(boxes, np.float64).reshape(-1, 4))
        if score is not None:
            self._note_drift(score)

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

    def self_test(self) -> str:
        """Compare scores of stored frames with those at calibration; return a line about them.

        Some nominal frames of the index, and the same with a test pattern, go through backbone,
        search and scoring. Tracks and drift check take no part.

        Raises:
            CalibrationError: there are no stored scores to compare with.
            MismatchError: a score differs from the stored one.
            ModelOutputError: a network failed.
        """
        calibration = self.calibration
        if calibration is None or not calibration.pattern_scores:
            raise CalibrationError(
                "self-test: expected a calibration with scores of stored frames, found none; "
                "calibrate the index from sources"
            )
        parts = self._scorer, self.index, self.embedder, self.normalisations
        lines = []
        for name, stored, pattern in (
            ("nominal frames", calibration.probe_scores, False),
            ("frames with a test pattern", calibration.pattern_scores, True),
        ):
            scores = probe_scores(*parts, pattern=pattern)
            if len(scores) != len(stored):
                raise MismatchError(
                    "self-test",
                    f"{len(stored)} stored frames as at calibration",
                    str(len(scores)),
                    "the index was edited since: calibrate again",
                )
            typical = float(np.median(np.abs(stored)))
            allowed = _ALLOWED_CHANGE * max(calibration.spread, typical)
            change = float(np.abs(np.subtract(scores, stored)).max())
            if change > allowed:
                raise MismatchError(
                    f"self-test: scores of {name}",
                    f"those at calibration within {allowed:.3g}",
                    f"differences up to {change:.3g}",
                    "calibrate on this device",
                )
            lines.append(f"{len(scores)} {name} score {np.median(scores):.2f} (median)")
        return f"self-test passed: {', '.join(lines)}, as at calibration"

    def _check_running(self) -> None:
        """Compare precision and execution with the calibration's, by scores of stored frames.

        Raises:
            MismatchError: they differ, and so do scores or decisions.
        """
        calibration, running = self.calibration, self.embedder.stages[0].embedder
        if calibration is None or not calibration.dtype:
            return
        ways = calibration.dtype, calibration.execution or running.execution
        if ways == (running.dtype, running.execution):
            return
        texts = (f"{dtype} by {by}" for dtype, by in (ways, (running.dtype, running.execution)))
        calibrated, now = texts
        if not calibration.probe_scores:
            _log.warning("calibrated in %s, running in %s: scores shift slightly", calibrated, now)
            return
        scores = probe_scores(self._scorer, self.index, self.embedder, self.normalisations)
        # Another number of probes: the index was edited since.
        count = min(len(scores), len(calibration.probe_scores))
        before, after = np.array(calibration.probe_scores[:count]), np.array(scores[:count])
        spread = calibration.spread
        change = float(np.abs(after - before).max())
        threshold = calibration.threshold
        if (
            change >= _ALLOWED_CHANGE * spread
            or ((before > threshold) != (after > threshold)).any()
        ):
            raise MismatchError(
                "precision and execution",
                f"{calibrated} as calibrated, or scores of stored frames within "
                f"{_ALLOWED_CHANGE * spread:.3g} of it",
                f"{now} with differences up to {change:.3g}",
                "calibrate on this device",
            )
        _log.warning(
            "calibrated in %s, running in %s: scores of stored frames differ by up to %.2g",
            *(calibrated, now, change),
        )

    def _prepared(self, settings: Settings, before: _Live | None = None) -> _Live:
        threshold = settings.threshold
        if threshold is None and self.calibration is not None:
            threshold = self.calibration.threshold_of(settings)
        if self.calibration is not None and threshold is not None:
            scale = self.calibration.scale(threshold)
        else:
            scale = self._scale_of_index(threshold)
        window = settings.confirm_count, settings.confirm_s, settings.silence_s
        tracker = before.tracker if before else None
        if tracker is None or (tracker.count, tracker.window_s, tracker.silence_s) != window:
            tracker = ComponentTracker(*window)
        return _Live(settings, threshold, scale, tracker)

    def _scale_of_index(self, threshold: float | None) -> HeatmapScale:
        """Return a heatmap scale from the distances inside the index: 0 is their median."""
        weights = [stage.stage.spec.weight for stage in self.index.stages]
        highest = [distances.highest for distances in self._distances_inside]
        high = float(np.average(highest, weights=weights)) if threshold is None else threshold
        return HeatmapScale.from_typical(0.0, high, "distances inside the index")

    def _localized(
        self, frame_score: FrameScore, heat: np.ndarray, live: _Live
    ) -> tuple[np.ndarray, tuple[Localization, ...]]:
        if live.threshold is None or frame_score.score <= live.threshold:
            return np.zeros(heat.shape, np.uint16), ()
        image_hw = (heat.shape[0], heat.shape[1])
        pixel_mask = self.roi.pixel_mask(image_hw)
        labels, localizations = localize(
            frame_score.anomaly_map,
            heat,
            live.threshold,
            live.settings.min_area_px,
            frame_score.inside,
            pixel_mask,
            lambda patches: self.nearest(frame_score, patches),
        )
        return reject(live.settings, labels, localizations, pixel_mask)


@dataclass(frozen=True)
class DistancesInside:
    """Cosine distances of entries to their nearest other entries: the scale without a calibration.

    Attributes:
        normalisation: by their median, and their largest value above it.
        highest: value drawn as 1 in a heatmap: twice the largest distance, standardised.
    """

    normalisation: ScoreNormalisation
    highest: float

    @classmethod
    def of(cls, index: NominalIndex) -> DistancesInside:
        """Return those of one stage of an index, of some entries chosen by a fixed seed."""
        entries = index.content.embeddings
        count = min(_SCALE_ENTRIES, len(entries))
        rows = np.random.default_rng(_SEED).choice(len(entries), count, replace=False)
        products = inner_products(np.ascontiguousarray(entries[rows]), entries.T)  # (count, n)
        products[np.arange(count), rows] = -1.0
        distances = np.clip(1.0 - products.max(axis=1), 0.0, 2.0)  # (count,)
        median, largest = float(np.median(distances)), float(distances.max())
        deviation = max(largest - median, 1e-6)
        return cls(
            constant_normalisation(median, deviation), (2.0 * largest - median) / deviation + 1e-6
        )


def _resized_patch(
    patch: tuple[int, int], values: np.ndarray, embeddings: StageEmbeddings
) -> tuple[int, int]:
    """Return the patch of a stage's own grid that has the centre of a patch of the finest grid."""
    row, col = (
        int((position + 0.5) * own / finest)
        for position, own, finest in zip(patch, embeddings.inside.shape, values.shape, strict=True)
    )
    return row, col
