"""Index and calibration from recorded drives, with the same code that runs on the vehicle."""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from semantic_anomaly.calibration import Calibration
from semantic_anomaly.conformal import scores_needed
from semantic_anomaly.detector import AnomalyDetector
from semantic_anomaly.errors import SourceError, UnknownNameError
from semantic_anomaly.freshness import Fresh
from semantic_anomaly.identity import Embedder
from semantic_anomaly.kinds import anchors_of
from semantic_anomaly.places import PlaceSums, usual_of_others
from semantic_anomaly.regions import ImageRegion
from semantic_anomaly.settings import Settings
from semantic_anomaly.sources import FrameSource, open_source
from semantic_anomaly.stretches import Stretches
from semantic_anomaly.structures import Frame, PatchGrid

if TYPE_CHECKING:
    from semantic_anomaly.index import NominalIndex
    from semantic_anomaly.instance_embedding import RunningEmbedder

# Larger batches gain a few percent on a CPU and cost memory with every image.
BATCH_FRAMES = 4
FOLDS, STRETCH_FRAMES = 5, 10

_log = logging.getLogger(__name__)


def build_index(
    settings: Settings,
    camera: str,
    sources: Sequence[str | Path],
    *,
    topic: str | None = None,
    embedder: Embedder | None = None,
    stride: int = 1,
    progress: bool = True,
) -> NominalIndex:
    """Build the nominal index of a camera from nominal drives, in bounded memory.

    Args:
        settings: backbone, region and how the index is made.
        camera: one of `settings.cameras`.
        sources: folders, videos or bags, each with or without a selection ('drive[0:56]').
        topic: image topic of bags that have several.
        embedder: one already loaded.
        stride: take every so manieth frame.
        progress: show a progress bar on a terminal.

    Raises:
        UnknownNameError: no such camera.
        SourceError: a source has no usable frames.
        SemanticAnomalyError: the backbone cannot be loaded, or what it gives is not finite.
    """
    from semantic_anomaly.index import NominalIndex

    region = _region(settings, camera)
    opened = _open(sources, topic)
    if stride < 1:
        raise SourceError(f"stride: expected at least 1, found {stride}")
    embedder, own = _embedder(settings, embedder)
    try:
        _log_predicted_size(settings, region, opened, embedder, stride)
        frames = (pair for _, pair in _embedded(opened, embedder, "index", stride, progress))
        return NominalIndex.build(
            frames,
            identity=embedder.identity,
            region=region,
            settings=settings,
            source=list(opened),
            camera=camera,
            segmenter=embedder.segmenter if settings.segments else None,
        )
    finally:
        if own:
            own.close()


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
    region = _region(settings, camera)
    opened = _open(sources, topic)
    embedder, own = _embedder(settings, embedder)
    try:
        index.configure_search(settings.search, settings.search_ef)
        fresh = Fresh(index)
        fresh.foresee(opened, scores_needed(settings.target_false_alarm_rate))
        drives = _drives(opened)
        folds: dict[int, dict[str, PlaceSums]] = defaultdict(dict)
        anchors = anchors_of(index.content.embeddings, settings.usual_kinds)
        if settings.place_normalisation:
            detector = AnomalyDetector(embedder, index, None, settings, region)
            for number, (drive, (frame, grid)) in enumerate(
                _embedded(opened, embedder, "usual distances", 1, progress)
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
            _embedded(opened, embedder, "calibrate", 1, progress)
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


def _region(settings: Settings, camera: str) -> ImageRegion:
    if camera not in settings.cameras:
        raise UnknownNameError("camera", camera, settings.cameras)
    return ImageRegion.from_settings(settings.camera_settings[camera])


def _embedder(
    settings: Settings, given: Embedder | None
) -> tuple[Embedder, RunningEmbedder | None]:
    """Return the embedder to use, and once more if it was made here and is to be closed here."""
    if given is not None:
        return given, None
    from semantic_anomaly.instance_embedding import RunningEmbedder

    made = RunningEmbedder.from_settings(settings)
    return made, made


def _open(sources: Sequence[str | Path], topic: str | None) -> dict[str, FrameSource]:
    """Return opened sources by drive: their names with the selection, told apart by number."""
    if not sources:
        raise SourceError("sources: expected at least one drive, found none")
    opened: dict[str, FrameSource] = {}
    for given in sources:
        source = open_source(given, topic=topic)
        for other in opened.values():
            same = source.path.resolve() == other.path.resolve()
            if same and source.selection == other.selection:
                raise SourceError(f"source '{given}' is given twice")
        drive = source.name + _selected(source.selection)
        number = 2
        while drive in opened:
            drive, number = f"{source.name}{_selected(source.selection)} ({number})", number + 1
        opened[drive] = source
    return opened


def _drives(sources: Mapping[str, FrameSource]) -> dict[str, FrameSource]:
    """Return the source of every drive; a folder may name several."""
    return {
        _named(name, source, drive): source
        for name, source in sources.items()
        for drive in source.drives
    }


def _named(name: str, source: FrameSource, drive: str) -> str:
    return f"{name}/{drive}" if len(source.drives) > 1 else name


def _selected(selection: slice) -> str:
    parts = (selection.start, selection.stop, selection.step)
    if parts == (None, None, None):
        return ""
    listed = ["" if part is None else str(part) for part in parts]
    return f"[{':'.join(listed if parts[2] is not None else listed[:2])}]"


def _embedded(
    sources: dict[str, FrameSource], embedder: Embedder, what: str, stride: int, progress: bool
) -> Iterator[tuple[str, tuple[Frame, PatchGrid]]]:
    """Yield every frame with its embeddings and its drive, a batch at a time."""
    counts = [source.count for source in sources.values()]
    known = [-(-count // stride) for count in counts if count is not None]
    total = sum(known) if len(known) == len(counts) else None
    # None shows the bar on a terminal only.
    disable = None if progress else True
    with tqdm(total=total, desc=what, unit="frame", disable=disable) as bar:
        for drive, source in sources.items():
            bar.set_postfix_str(drive, refresh=False)
            frames = itertools.islice(source, 0, None, stride)
            while batch := list(itertools.islice(frames, BATCH_FRAMES)):
                grids = embedder.embed([frame.image for frame in batch])
                for frame, grid in zip(batch, grids, strict=True):
                    yield _named(drive, source, source.drive_of(frame)), (frame, grid)
                bar.update(len(batch))


def _log_predicted_size(
    settings: Settings,
    region: ImageRegion,
    sources: dict[str, FrameSource],
    embedder: Embedder,
    stride: int,
) -> None:
    """Say beforehand how large the index may become."""
    from semantic_anomaly.index import NominalIndex

    image_hw = next(iter(next(iter(sources.values())))).image_hw
    patches = int(region.patch_mask(embedder.grid_hw(image_hw), image_hw).sum())
    dim = embedder.identity.dim
    counts = [source.count for source in sources.values()]
    most = NominalIndex.predicted_bytes(settings.max_entries, dim, settings.graph_m)
    text = f"predicted size: at most {most / 1e6:.0f} MB ({settings.max_entries} entries)"
    if all(count is not None for count in counts):
        frames = sum(-(-(count or 0) // stride) for count in counts)
        every = NominalIndex.predicted_bytes(frames * patches, dim, settings.graph_m)
        text += (
            f"; {every / 1e6:.0f} MB if every patch of the {frames} frames were stored "
            f"({patches} a frame)"
        )
    _log.info("%s", text)
