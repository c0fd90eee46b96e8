"""Calibrate an index with nominal drives that it has not seen, scored as the detector does."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.calibration.conformal import Episodes, scores_needed
from semantic_anomaly.calibration.leakage import check_sources, refuse_seen
from semantic_anomaly.detection.detector import probe_scores, resolve_roi, resolve_settings
from semantic_anomaly.embedding.identity import Embedder
from semantic_anomaly.errors import CalibrationError
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.sources import FrameSource
from semantic_anomaly.offline.drives import (
    Sources,
    drive_names,
    embedded_frames,
    frame_total,
    open_drives,
    sample_images,
    settings_of,
)
from semantic_anomaly.scoring.distances import FrameScorer
from semantic_anomaly.scoring.normalisation import (
    NormalisationSums,
    class_anchors,
    normalisations_without,
)
from semantic_anomaly.segmentation.embedder import RunningEmbedder
from semantic_anomaly.settings import DEFAULT_FALSE_ALARM_RATE, Settings
from semantic_anomaly.structures import PatchGrid

FOLDS, FOLD_FRAMES = 5, 10
_SAMPLE_PATCHES = 1024
_FRAME_PERIOD_NS = 100_000_000
# Rounding leaves distances of this size between equal embeddings.
_SEEN_DISTANCE = 1e-5
_log = logging.getLogger(__name__)


def calibrate(
    index: NominalIndex,
    sources: Sources | Mapping[str, Iterable[PatchGrid]],
    *,
    settings: Settings | None = None,
    camera: str | None = None,
    out: str | Path | None = None,
    topic: str | None = None,
    embedder: Embedder | None = None,
    progress: bool = False,
    **overrides: Any,
) -> Calibration:
    """Calibrate an index with nominal drives that it has not seen.

    Frames are scored twice: for the score normalisation, then for scores standardised by the drives
    of the other folds (cross-conformal prediction, Vovk 2015). Precision and execution that are not
    set are chosen by measurement on this machine, and recorded for detectors. Every source is one
    drive; a folder whose labels name the drives of its images is as many drives.

    Example:
        >>> calibration = calibrate(index, ["drives/b", "drives/c"], out="index")

    Args:
        index: the index.
        sources: folders, videos, bags, image files or RGB arrays, see `open_drives`; or patch grids
            by drive, in memory.
        settings: None: all defaults.
        camera: one of the cameras of the settings; None: the first.
        out: index folder to which the calibration is written; None: it is not written.
        topic: image topic of bags that have several.
        embedder: already loaded, or that made the patch grids; None: loaded from the backbone of
            the index.
        progress: show a progress bar on a terminal.
        **overrides: values of single settings, such as `target_false_alarm_rate`.

    Raises:
        UnknownNameError: no such camera or setting.
        SourceError: a source has no usable frames.
        CalibrationError: the index has seen frames of a source, or there are too few frames for
            the target rate.
        SemanticAnomalyError: backbone, index and region of interest do not match.
    """
    settings = settings_of(settings, overrides)
    camera = settings.cameras[0] if camera is None else camera
    if not settings.target_false_alarm_rate:
        settings = settings.replace(target_false_alarm_rate=DEFAULT_FALSE_ALARM_RATE)
    given = settings
    settings = resolve_settings(settings.for_camera(camera), index)
    roi = resolve_roi(settings.camera_settings[camera], index, None)
    index.check_roi(roi)
    index.configure_search(settings.search, settings.search_ef)
    names: list[str]
    with ExitStack() as stack:
        if isinstance(sources, Mapping):
            names = list(sources)
            running = (index.stage if embedder is None else embedder.stages[0]).embedder
            frames = partial(_grid_frames, sources)
        else:
            drives = open_drives(sources, topic)
            needed, total = scores_needed(settings.target_false_alarm_rate), frame_total(drives)
            if total is not None and total < needed:
                raise CalibrationError(
                    f"the target false-alarm rate needs at least {needed} nominal calibration "
                    f"frames, found {total}"
                )
            check_sources(index, drives)
            if embedder is None:
                from semantic_anomaly.embedding.precision import choose_precision

                chosen = choose_precision(
                    settings.replace(dtype=given.dtype, execution=given.execution),
                    sample_images(drives),
                    partial(_median_distances, index),
                    (settings.dtype, settings.execution),
                )
                settings = settings.replace(dtype=chosen.dtype, execution=chosen.execution)
                embedder = stack.enter_context(closing(RunningEmbedder.from_settings(settings)))
            index.check_embedder(embedder.stages)
            names, running = drive_names(drives), embedder.stages[0].embedder
            frames = partial(_source_frames, index, drives, embedder, progress)
        if embedder is not None:
            index.configure_search(settings.search, settings.search_ef, embedder.device)
        scorer = FrameScorer(index, settings, roi)
        anchors = [class_anchors(stage.content.embeddings) for stage in index.stages]
        sums: dict[int, list[NormalisationSums]] = defaultdict(
            lambda: [NormalisationSums(of_stage) for of_stage in anchors]
        )
        largest = 0.0
        for number, (drive, _, grid) in enumerate(frames("score normalisation")):
            of_fold = sums[_fold(names, drive, number)]
            for stage_sums, distances in zip(of_fold, scorer.distance_maps(grid), strict=True):
                stage_sums.add(distances.values, distances.inside, distances.embeddings)
                largest = max(largest, float(distances.values.max()))
        if sums and largest < _SEEN_DISTANCE:
            raise CalibrationError(
                "calibration: all distances are 0: the index has seen these frames; calibrate with "
                "other drives"
            )
        by_fold = {fold: normalisations_without(sums, fold) for fold in sums}
        scores: dict[str, list[float]] = {}
        stamps_ns: dict[str, list[int]] = {}
        medians: list[float] = []
        for number, (drive, stamp_ns, grid) in enumerate(frames("calibration scores")):
            frame_score = scorer.score(grid, by_fold[_fold(names, drive, number)], None)
            scores.setdefault(drive, []).append(frame_score.score)
            stamps_ns.setdefault(drive, []).append(stamp_ns)
            medians.append(float(np.median(frame_score.anomaly_map[frame_score.inside])))
        normalisations = normalisations_without(sums, None) if sums else ()
        probes: list[float] = []
        if embedder is not None and normalisations:
            probes = probe_scores(scorer, index, embedder, normalisations)
    calibration = Calibration.fit(
        scores,
        heatmap_low=float(np.median(medians)) if medians else 0.0,
        index=index,
        settings=settings,
        roi=roi,
        camera=camera,
        dtype=running.dtype,
        execution=running.execution,
        probe_scores=probes,
        normalisations=normalisations,
        episodes=Episodes.of_drives(scores, stamps_ns, settings)
        if settings.target_episode_rate
        else None,
    )
    for warning in calibration.warnings:
        _log.warning("%s", warning)
    if out is not None:
        calibration.save(Path(out).expanduser())
    return calibration


def _median_distances(index: NominalIndex, grids: Sequence[PatchGrid]) -> list[float]:
    """Return the median distance by stage of some patches to the nearest entry."""
    rng = np.random.default_rng(0)
    medians = []
    for number, stage in enumerate(index.stages):
        rows = np.concatenate([g.stages[number].features.reshape(-1, stage.dim) for g in grids])
        some = rng.choice(len(rows), min(len(rows), _SAMPLE_PATCHES), replace=False)
        medians.append(float(np.median(stage.distances(rows[some], k=1))))
    return medians


def _fold(drives: Sequence[str], drive: str, number: int) -> int:
    """Return the fold of a frame: the folds of drives, or of parts of a single drive."""
    if len(drives) > 1:
        return drives.index(drive) % FOLDS
    return number // FOLD_FRAMES % FOLDS


def _grid_frames(
    grids_by_drive: Mapping[str, Iterable[PatchGrid]], description: str
) -> Iterator[tuple[str, int, PatchGrid]]:
    """Yield drive, stamp in nanoseconds and embeddings of every frame."""
    for drive, grids in grids_by_drive.items():
        for number, grid in enumerate(grids):
            yield drive, number * _FRAME_PERIOD_NS, grid


def _source_frames(
    index: NominalIndex,
    drives: Mapping[str, FrameSource],
    embedder: Embedder,
    progress: bool,
    description: str,
) -> Iterator[tuple[str, int, PatchGrid]]:
    """Yield drive, stamp in nanoseconds and embeddings of every frame.

    Raises:
        CalibrationError: the index has seen a frame, or it is given twice.
    """
    given: set[tuple[Path, str]] = set()
    items = embedded_frames(drives, embedder, description=description, progress=progress)
    for drive, source, frame, grid in items:
        refuse_seen(index, frame)
        key = source.path.resolve(), frame.name
        # Arrays have no files: equal names say nothing.
        if source.files and key in given:
            raise CalibrationError(f"calibration frame '{frame.name}' is given twice")
        given.add(key)
        yield drive, frame.stamp_ns, grid
