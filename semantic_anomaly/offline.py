"""Index and calibration from recorded drives, with the same code that runs on the vehicle."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from tqdm import tqdm

from semantic_anomaly.calibration import Calibration, scores_needed
from semantic_anomaly.detector import AnomalyDetector, Embedder
from semantic_anomaly.errors import CalibrationError, SourceError, UnknownNameError
from semantic_anomaly.regions import ImageRegion
from semantic_anomaly.settings import Settings
from semantic_anomaly.sources import FrameSource, open_source
from semantic_anomaly.structures import Frame, PatchGrid

if TYPE_CHECKING:
    from semantic_anomaly.embedding import PatchEmbedder
    from semantic_anomaly.index import NominalIndex

# Larger batches gain a few percent on a CPU and cost memory with every image.
BATCH_FRAMES = 4

# Mean difference in grey levels that JPEG leaves between a frame and its thumbnail, and more.
_SAME_PICTURE = 8.0

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

    Every source counts as a drive of its own, also a selection of one.

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
        detector = AnomalyDetector(embedder, index, None, settings, region)
        fresh = _Fresh(index)
        fresh.foresee(opened, scores_needed(settings.target_false_alarm_rate))
        scores: dict[str, list[float]] = {}
        medians: list[float] = []
        for drive, (frame, grid) in _embedded(opened, embedder, "calibrate", 1, progress):
            fresh.check(opened[drive], frame)
            score, distances = detector.score(grid)
            scores.setdefault(drive, []).append(score)
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
        )
    finally:
        if own:
            own.close()
    for sentence in calibration.warnings:
        _log.warning("%s", sentence)
    return calibration


def _region(settings: Settings, camera: str) -> ImageRegion:
    if camera not in settings.cameras:
        raise UnknownNameError("camera", camera, settings.cameras)
    return ImageRegion.from_settings(settings.camera_settings[camera])


def _embedder(settings: Settings, given: Embedder | None) -> tuple[Embedder, PatchEmbedder | None]:
    """Return the embedder to use, and once more if it was made here and is to be closed here."""
    if given is not None:
        return given, None
    from semantic_anomaly.embedding import PatchEmbedder

    made = PatchEmbedder.from_settings(settings)
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
                for pair in zip(batch, grids, strict=True):
                    yield drive, pair
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


class _Fresh:
    """Refuses calibration frames that say nothing new: seen by the index, or given twice."""

    def __init__(self, index: NominalIndex) -> None:
        self._index = index
        self._indexed = frozenset(index.frame_names)
        self._taken: set[tuple[Path, str]] = set()

    def foresee(self, sources: dict[str, FrameSource], needed: int) -> None:
        """Refuse before hours of embedding what can be foreseen, and warn of likely trouble."""
        counts = [source.count for source in sources.values()]
        known = [count for count in counts if count is not None]
        if len(known) == len(counts) and sum(known) < needed:
            raise CalibrationError(
                f"the target false-alarm rate needs at least {needed} nominal calibration frames, "
                f"found {sum(known)}"
            )
        folders = {name.rpartition("/")[0] for name in self._indexed}
        for drive, source in sources.items():
            refuse_indexed(self._index, next(iter(source)))
            if source.name in folders:
                _log.warning(
                    "calibration drive '%s' has the name of a drive that the index has seen: if "
                    "it is the same, its frames resemble those of the index, and the false-alarm "
                    "rate on other drives will be higher than the target",
                    drive,
                )

    def check(self, source: FrameSource, frame: Frame) -> None:
        """Refuse a frame that was taken before."""
        refuse_indexed(self._index, frame)
        taken = source.path.resolve(), frame.name
        if taken in self._taken:
            raise CalibrationError(f"calibration frame '{frame.name}' is given twice")
        self._taken.add(taken)


def refuse_indexed(index: NominalIndex, frame: Frame) -> None:
    """Refuse a frame whose picture the index was built from.

    Raises:
        CalibrationError: naming the frame.
    """
    # Folders of different drives often have the same name, so the picture decides.
    thumbnail = index.thumbnail(frame.name) if frame.name in index.frame_names else None
    if thumbnail is None:
        return
    height, width = thumbnail.shape[:2]
    small = cv2.resize(frame.image, (width, height), interpolation=cv2.INTER_AREA)
    if float(cv2.absdiff(small, thumbnail).mean()) < _SAME_PICTURE:
        raise CalibrationError(
            f"the index has seen frame '{frame.name}': its score says nothing about new frames; "
            "take other drives"
        )
