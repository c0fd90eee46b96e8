"""Index and calibration from recorded drives, with the same code that runs on the vehicle."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.calibration.conformal import Stretches, scores_needed
from semantic_anomaly.calibration.leakage import Fresh
from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.embedding.identity import Embedder
from semantic_anomaly.offline.drives import (
    camera_roi,
    embedded_frames,
    given_or_loaded_embedder,
    open_drives,
    sources_by_drive,
)
from semantic_anomaly.scoring.normalisation import PlaceSums, anchors_of, usual_of_others
from semantic_anomaly.settings import Settings

if TYPE_CHECKING:
    from semantic_anomaly.index.nominal_index import NominalIndex

FOLDS, STRETCH_FRAMES = 5, 10
_log = logging.getLogger(__name__)


def calibrate(
    settings: Settings,
    camera: str,
    index: NominalIndex,
    sources: Sequence[str | Path],
    *,
    topic: str | None = None,
    embedder: Embedder | None = None,
    progress: bool = True,
) -> Calibration:
    """Calibrate an index with nominal drives that it has not seen, scored as the detector does.

    Every source counts as a drive of its own, also a selection of one; a folder whose labels name
    the drives of its images, as many drives as they name. With `place_normalisation`
    frames are read twice: for what is usual at every place, then for scores relative to what is
    usual in the drives of other folds (cross-conformal prediction, Vovk 2015).

    Args:
        settings: give the target rate and what shapes a score.
        camera: one of `settings.cameras`.
        index: the index to be calibrated.
        sources: folders, videos or bags, each with or without a selection ('drive[60:90]').
        topic: image topic of bags that have several.
        embedder: one already loaded.
        progress: show a progress bar on a terminal.

    Raises:
        UnknownNameError: no such camera.
        SourceError: a source has no usable frames.
        CalibrationError: the index has seen frames of a source, or there are too few frames for
            the target rate.
        SemanticAnomalyError: backbone, index and region do not agree.
    """
    region = camera_roi(settings, camera)
    opened = open_drives(sources, topic)
    embedder, own = given_or_loaded_embedder(settings, embedder)
    try:
        index.configure_search(settings.search, settings.search_ef)
        fresh = Fresh(index)
        fresh.foresee(opened, scores_needed(settings.target_false_alarm_rate))
        drives = sources_by_drive(opened)
        folds: dict[int, dict[str, PlaceSums]] = defaultdict(dict)
        anchors = anchors_of(index.content.embeddings, settings.usual_kinds)
        if settings.place_normalisation:
            detector = AnomalyDetector(embedder, index, None, settings, region)
            for number, (drive, (frame, grid)) in enumerate(
                embedded_frames(opened, embedder, "usual distances", 1, progress)
            ):
                fresh.check(drives[drive], frame)
                fold = _fold(list(drives), drive, number)
                for branch, found in detector.plain_distances(grid).items():
                    sums = folds[fold].setdefault(branch, PlaceSums(anchors))
                    sums.add(found.values, found.inside, found.embeddings)
        detectors: dict[int, AnomalyDetector] = {}
        scores: dict[str, list[float]] = {}
        stamps: dict[str, list[int]] = {}
        medians: list[float] = []
        for number, (drive, (frame, grid)) in enumerate(
            embedded_frames(opened, embedder, "calibrate", 1, progress)
        ):
            if not folds:
                fresh.check(drives[drive], frame)
            fold = _fold(list(drives), drive, number)
            if fold not in detectors:
                usual = usual_of_others(folds, fold)
                detectors[fold] = AnomalyDetector(embedder, index, None, settings, region, usual)
            score, distances = detectors[fold].score(grid)
            scores.setdefault(drive, []).append(score)
            stamps.setdefault(drive, []).append(frame.stamp_ns)
            inside = region.patch_mask(grid.grid_hw, grid.image_hw)
            medians.append(float(np.median(distances[inside])))
        calibration = Calibration.fit(
            scores,
            heatmap_low=float(np.median(medians)),
            index=index,
            settings=settings,
            region=region,
            camera=camera,
            dtype=embedder.identity.dtype,
            usual=usual_of_others(folds, None),
            stretches=Stretches.of_drives(scores, stamps, settings)
            if settings.target_episode_rate
            else None,
        )
    finally:
        if own:
            own.close()
    for sentence in calibration.warnings:
        _log.warning("%s", sentence)
    return calibration


def _fold(drives: Sequence[str], drive: str, number: int) -> int:
    """Return the fold of a frame: drives are kept whole; of a single one, stretches."""
    if len(drives) > 1:
        return drives.index(drive) % FOLDS
    return number // STRETCH_FRAMES % FOLDS
