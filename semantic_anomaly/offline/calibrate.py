"""Calibrate an index with nominal drives, scored as the detector does.

Drives that the index was built from are compared with the entries of the other drives only.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.calibration.conformal import Episodes, drive_rank
from semantic_anomaly.calibration.leakage import check_sources, is_seen, refuse_seen
from semantic_anomaly.detection.detector import (
    load_embedder,
    probe_scores,
    resolve_roi,
    resolve_settings,
)
from semantic_anomaly.embedding.identity import Embedder
from semantic_anomaly.errors import CalibrationError, InputError
from semantic_anomaly.index.content import RecordedSource
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.sources import FrameSource
from semantic_anomaly.offline.drives import (
    EmbeddedFrame,
    KeptFrames,
    Sources,
    drive_name,
    embedded_frames,
    open_drives,
    recordings_of,
    relocated,
    reopened,
    sample_images,
    settings_of,
)
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.distances import FrameScorer
from semantic_anomaly.scoring.normalisation import (
    NormalisationSums,
    ScoreNormalisation,
    class_anchors,
    normalisations_without,
)
from semantic_anomaly.segmentation.embedder import RunningEmbedder
from semantic_anomaly.settings import DEFAULT_FALSE_ALARM_RATE, Settings
from semantic_anomaly.structures import Frame, PatchGrid

# Folds of drives, and of parts of a single drive.
DRIVE_FOLDS = 20
FOLDS, FOLD_FRAMES = 5, 10
_SAMPLE_PATCHES = 1024
_FRAME_PERIOD_NS = 100_000_000
# Rounding leaves distances of this size between equal embeddings.
_SEEN_DISTANCE = 1e-5
_log = logging.getLogger(__name__)


def calibrate(
    index: NominalIndex,
    sources: Sources | Mapping[str, Iterable[PatchGrid]] | None = None,
    *,
    leave_one_drive_out: bool = False,
    moved: Mapping[str, str] | None = None,
    settings: Settings | None = None,
    camera: str | None = None,
    out: str | Path | None = None,
    topic: str | None = None,
    embedder: Embedder | None = None,
    kept: KeptFrames | None = None,
    scored: Scoring | None = None,
    progress: bool = False,
    **overrides: Any,
) -> Calibration:
    """Calibrate an index with nominal drives.

    Without sources, the drives of the index are read again, and each is compared with the entries
    of the others (leave one drive out). Every source is one drive; parts of one recording are one
    drive, and a folder whose labels name the drives of its images is as many drives.

    Every frame is scored by the score normalisation of other drives (cross-conformal prediction,
    Vovk 2015). Precision and execution that are not set are chosen by measurement on this machine,
    and recorded for detectors.

    Example:
        >>> calibration = calibrate(index, out="index")

    Args:
        index: the index.
        sources: folders, videos, bags, image files or RGB arrays, see `open_drives`; or patch grids
            by drive, in memory; None: the drives of the index.
        leave_one_drive_out: take the drives of the index besides the sources.
        moved: new beginnings of paths by old ones, where drives of the index have moved.
        settings: None: all defaults.
        camera: one of the cameras of the settings; None: the first.
        out: index folder to which the calibration is written; None: it is not written.
        topic: image topic of bags that have several.
        embedder: already loaded, or that made the patch grids; None: loaded from the backbone of
            the index.
        kept: first frames of the drives of the index, embedded with its stride; None: none.
        scored: scores opened sources elsewhere, with precision and execution of the settings or
            the index; None: they are scored here.
        progress: show a progress bar on a terminal.
        **overrides: values of single settings, such as `target_false_alarm_rate`.

    Raises:
        UnknownNameError: no such camera or setting.
        SourceError: a source has no usable frames, or a drive of the index has moved.
        CalibrationError: the index has seen frames of a source, has frames of one drive only, or
            was built from other frames; a drive has one frame; or there are too few drives for the
            confidence.
        InputError: `leave_one_drive_out` or `moved` where no drive of the index is read.
        SemanticAnomalyError: backbone, index and region of interest do not match.
    """
    if leave_one_drive_out and isinstance(sources, Mapping):
        raise InputError("leave_one_drive_out: expected sources to be opened, found patch grids")
    leave_one_drive_out |= sources is None
    if moved and not leave_one_drive_out:
        raise InputError("moved sources: expected leave_one_drive_out, or no sources")
    settings = settings_of(settings, overrides)
    camera = settings.cameras[0] if camera is None else camera
    if not settings.target_false_alarm_rate:
        settings = settings.replace(target_false_alarm_rate=DEFAULT_FALSE_ALARM_RATE)
    given = settings
    settings = resolve_settings(settings.for_camera(camera), index)
    roi = resolve_roi(settings.camera_settings[camera], index, None)
    index.check_roi(roi)
    index.configure_search(settings.search, settings.search_ef)
    with ExitStack() as stack:
        if isinstance(sources, Mapping):
            running = (index.stage if embedder is None else embedder.stages[0]).embedder
            drives: Drives = _GridDrives(sources)
        else:
            drives = opened = SourceDrives.of(
                index,
                sources,
                leave_one_drive_out,
                moved or {},
                topic,
                settings,
            )
            # Before the work rather than after it.
            drive_rank(len(opened.recordings), settings.confidence)
            if embedder is None and scored is not None:
                embedder = stack.enter_context(closing(load_embedder(settings, given)))
            elif embedder is None:
                from semantic_anomaly.embedding.precision import choose_precision

                chosen = choose_precision(
                    settings.replace(dtype=given.dtype, execution=given.execution),
                    sample_images(opened.sources),
                    partial(_median_distances, index),
                    (settings.dtype, settings.execution),
                )
                settings = settings.replace(dtype=chosen.dtype, execution=chosen.execution)
                embedder = stack.enter_context(closing(RunningEmbedder.from_settings(settings)))
            index.check_embedder(embedder.stages)
            opened.embedder, opened.progress = embedder, progress
            opened.kept = kept or opened.kept
            running = embedder.stages[0].embedder
        device = "cpu" if embedder is None else embedder.device
        index.configure_search(settings.search, settings.search_ef, device)
        scorers = Scorers(index, settings, roi, device)
        by_fold, rows_of_frames = (scored or _scored)(drives, scorers)
        scores = _by_recording(rows_of_frames)
        normalisations = normalisations_without(by_fold, None)
        probes: list[float] = []
        patterns: list[float] = []
        if embedder is not None:
            whole = scorers.of(None), index, embedder, normalisations
            probes, patterns = probe_scores(*whole), probe_scores(*whole, pattern=True)
    calibration = Calibration.fit(
        {drive: rows.scores for drive, rows in scores.items()},
        left_out=scorers.left_out.intersection(scores),
        heatmap_low=float(np.median([m for rows in scores.values() for m in rows.medians])),
        index=index,
        settings=settings,
        roi=roi,
        camera=camera,
        dtype=running.dtype,
        execution=running.execution,
        probe_scores=probes,
        pattern_scores=patterns,
        normalisations=normalisations,
        episodes=Episodes.of_drives({d: rows.parts for d, rows in scores.items()}, settings)
        if settings.target_episode_rate
        else None,
    )
    for warning in calibration.warnings:
        _log.warning("%s", warning)
    for recording in sorted(_built_from(index).intersection(scores) - scorers.left_out):
        _log.warning(
            "calibration drive '%s' is another part of the only drive of the index: its scores are "
            "lower than those of other drives",
            recording,
        )
    if out is not None:
        calibration.save(Path(out).expanduser())
    return calibration


@dataclass
class _Scores:
    """The scores of a recording.

    Attributes:
        scores: of the frames.
        parts: scores and stamps in nanoseconds of its parts by name, in order.
        medians: of the anomaly maps of the frames.
    """

    scores: list[float] = field(default_factory=list)
    parts: dict[str, tuple[list[float], list[int]]] = field(default_factory=dict)
    medians: list[float] = field(default_factory=list)


class Scorers:
    """Scorers against the index without one recording.

    Args:
        index, settings, roi: of the calibration; attributes too.
        device: that searches run on.

    Attributes:
        left_out: recordings whose frames are compared with the entries of the others; none if the
            index was built from one recording.
    """

    def __init__(
        self, index: NominalIndex, settings: Settings, roi: RegionOfInterest, device: str
    ) -> None:
        self.index = index
        self.settings, self.roi, self._device = settings, roi, device
        self._whole = FrameScorer(index, settings, roi)
        self.left_out = set(index.recordings) if len(_built_from(index)) > 1 else set()
        # Of the last recording that was left out: a copy of the entries is large.
        self._last: tuple[str, FrameScorer] | None = None

    def of(self, recording: str | None) -> FrameScorer:
        """Return the scorer for frames of a recording; None: against the whole index."""
        if recording not in self.left_out or recording is None:
            return self._whole
        if self._last is None or self._last[0] != recording:
            self._last = None
            index = self.index.without(recording)
            index.configure_search(self.settings.search, self.settings.search_ef, self._device)
            self._last = recording, FrameScorer(index, self.settings, self.roi)
        return self._last[1]


def _built_from(index: NominalIndex) -> set[str]:
    """Return the recordings that an index was built from, without those of added frames."""
    built = {name for source in index.content.sources for name in source.recordings.values()}
    # An index of embeddings in memory may know no sources.
    return built or set(index.recordings)


@dataclass(frozen=True, eq=False)
class SourceSums:
    """What the score normalisation takes of a source.

    Attributes:
        sums: of each stage by fold.
        counts: frames by recording.
        largest: largest distance.
    """

    sums: dict[int, list[NormalisationSums]]
    counts: Counter[str]
    largest: float


def source_sums(frames: Iterable[EmbeddedFrame], drives: Drives, scorers: Scorers) -> SourceSums:
    """Return the sums of the frames of a source."""
    anchors = [class_anchors(stage.content.embeddings) for stage in scorers.index.stages]
    sums: dict[int, list[NormalisationSums]] = defaultdict(
        lambda: [NormalisationSums(of_stage) for of_stage in anchors]
    )
    counts: Counter[str] = Counter()
    largest = 0.0
    for frame in frames:
        counts[frame.recording] += 1
        maps = scorers.of(frame.recording).distance_maps(frame.grid)
        for stage_sums, distances in zip(sums[drives.fold(frame)], maps, strict=True):
            stage_sums.add(distances.values, distances.inside, distances.embeddings)
            largest = max(largest, float(distances.values.max()))
    return SourceSums(dict(sums), counts, largest)


def sums_by_fold(sources: Iterable[SourceSums]) -> dict[int, list[NormalisationSums]]:
    """Return the sums of all sources by fold, added in the order of the sources.

    Raises:
        CalibrationError: no frames, one frame of a recording, or frames that the index has seen.
    """
    sums: dict[int, list[NormalisationSums]] = {}
    counts: Counter[str] = Counter()
    largest = 0.0
    for source in sources:
        for fold, of_stages in source.sums.items():
            before = sums.get(fold)
            sums[fold] = (
                of_stages
                if before is None
                else [one + other for one, other in zip(before, of_stages, strict=True)]
            )
        counts += source.counts
        largest = max(largest, source.largest)
    if not sums:
        raise CalibrationError("calibration: expected frames of nominal drives, found none")
    for recording, count in counts.items():
        if count < 2:
            raise CalibrationError(
                f"calibration drive '{recording}': expected at least 2 frames, found {count}"
            )
    if largest < _SEEN_DISTANCE:
        raise CalibrationError(
            "calibration: all distances are 0: the index has seen these frames; calibrate with "
            "other drives"
        )
    return sums


# Recording, drive, score, stamp in nanoseconds and median of the anomaly map of a frame.
ScoredFrame: TypeAlias = tuple[str, str, float, int, float]


def scored_frames(
    frames: Iterable[EmbeddedFrame],
    drives: Drives,
    scorers: Scorers,
    normalisations: Mapping[int, Sequence[ScoreNormalisation]],
) -> Iterator[ScoredFrame]:
    """Yield the scores of frames by the normalisations of their folds."""
    for frame in frames:
        scorer = scorers.of(frame.recording)
        frame_score = scorer.score(frame.grid, normalisations[drives.fold(frame)], None)
        median = float(np.median(frame_score.anomaly_map[frame_score.inside]))
        yield frame.recording, frame.drive, frame_score.score, frame.stamp_ns, median


def _scored(
    drives: Drives, scorers: Scorers
) -> tuple[dict[int, list[NormalisationSums]], Iterator[ScoredFrame]]:
    """Return the sums of the score normalisation by fold, and the scores of all frames."""
    frames = drives.frames("score normalisation")
    sums = sums_by_fold(
        source_sums(of_source, drives, scorers)
        for _, of_source in groupby(frames, key=attrgetter("source"))
    )
    by_fold = {fold: normalisations_without(sums, fold) for fold in sums}
    frames = drives.frames("calibration scores")
    return sums, scored_frames(frames, drives, scorers, by_fold)


def _by_recording(rows: Iterable[ScoredFrame]) -> dict[str, _Scores]:
    scores: dict[str, _Scores] = defaultdict(_Scores)
    for recording, drive, score, stamp_ns, median in rows:
        of_recording = scores[recording]
        of_recording.scores.append(score)
        part = of_recording.parts.setdefault(drive, ([], []))
        part[0].append(score)
        part[1].append(stamp_ns)
        of_recording.medians.append(median)
    return dict(scores)


class Drives(ABC):
    """Drives whose frames can be read several times.

    Args:
        recordings: names.

    Attributes:
        recordings: distinct names.
    """

    def __init__(self, recordings: Iterable[str]) -> None:
        self.recordings = list(dict.fromkeys(recordings))

    def fold(self, frame: EmbeddedFrame) -> int:
        """Return the fold of a frame: of its recording, or of parts of the only recording."""
        if len(self.recordings) > 1:
            return self.recordings.index(frame.recording) % DRIVE_FOLDS
        return frame.number // FOLD_FRAMES % FOLDS

    @abstractmethod
    def frames(self, description: str) -> Iterator[EmbeddedFrame]:
        """Yield all frames, drive by drive."""


class _GridDrives(Drives):
    """Patch grids by drive, 100 ms apart."""

    def __init__(self, grids_by_drive: Mapping[str, Iterable[PatchGrid]]) -> None:
        super().__init__(grids_by_drive)
        self._grids_by_drive = grids_by_drive

    def frames(self, description: str) -> Iterator[EmbeddedFrame]:
        for drive, grids in self._grids_by_drive.items():
            for number, grid in enumerate(grids):
                yield EmbeddedFrame(drive, drive, number, number * _FRAME_PERIOD_NS, grid)


class SourceDrives(Drives):
    """Drives of opened sources.

    Args:
        index: that they calibrate.
        own: sources that the index was built from, by name.
        further: other sources, by name.
        recordings: of every drive of both, by its name.
        stride: of own.

    Attributes:
        own, further, stride: as given; of_drive: the recordings.
        sources: own and further ones, by name.
        embedder, progress: to be set before frames are read.
        kept: frames that are not read again.
    """

    def __init__(
        self,
        index: NominalIndex,
        own: Mapping[str, FrameSource],
        further: Mapping[str, FrameSource],
        recordings: Mapping[str, str],
        stride: int,
    ) -> None:
        super().__init__(recordings.values())
        self._index, self.own, self.further = index, own, further
        self.of_drive, self.stride = recordings, stride
        self.sources = {**own, **further}
        self.embedder: Embedder | None = None
        self.progress = False
        frames = (frame for stage in index.stages for frame in stage.content.frames)
        self._stored = {(frame.recording, frame.name) for frame in frames}
        self.kept = KeptFrames()
        self._is_first_pass = True

    @classmethod
    def of(
        cls,
        index: NominalIndex,
        sources: Sources | None,
        leave_one_drive_out: bool,
        moved: Mapping[str, str],
        topic: str | None,
        settings: Settings,
    ) -> SourceDrives:
        """Open sources, and those of the index if a drive is to be left out at a time."""
        own: dict[str, FrameSource] = {}
        recordings: dict[str, str] = {}
        recorded: Sequence[RecordedSource] = index.content.sources
        if leave_one_drive_out:
            count = len(_built_from(index))
            if count < 2:
                raise CalibrationError(
                    "calibration: expected an index of at least 2 drives, of which one is left "
                    f"out, found {count}; give calibration drives as sources"
                )
            own, recordings = reopened(recorded, moved)
            recorded = relocated(recorded, moved)
        further: dict[str, FrameSource] = {}
        if sources is not None:
            opened = open_drives(sources, topic)
            check_sources(index, opened)
            of_further = recordings_of(opened, settings.recording_pattern, recorded)
            for name, source in opened.items():
                unique, number = name, 2
                while unique in own or unique in further:
                    unique, number = f"{name} ({number})", number + 1
                further[unique] = source
                for drive in source.drives:
                    recording = of_further[drive_name(name, source, drive)]
                    recordings[drive_name(unique, source, drive)] = recording
        # Episodes need every frame.
        stride = 1 if settings.target_episode_rate else index.content.stride
        return cls(index, own, further, recordings, stride)

    def frames(self, description: str) -> Iterator[EmbeddedFrame]:
        """Yield all frames, drive by drive; those kept are not embedded again."""
        assert self.embedder is not None
        yield from self.kept.frames
        if self.kept.are_all:
            return
        given: set[tuple[Path, str]] = set()
        numbers = {id(source): number for number, source in enumerate(self.sources.values())}
        total = len(self.kept.frames)
        items = embedded_frames(
            self.sources,
            self.embedder,
            recordings=self.of_drive,
            strides=dict.fromkeys(self.own, self.stride),
            skipped=len(self.kept.frames),
            warns=self._is_first_pass,
            description=description,
            progress=self.progress,
        )
        self._is_first_pass = False
        for number, (drive, source, frame, grid) in enumerate(items, start=total):
            if source in self.own.values():
                self._check_unchanged(source, frame)
            else:
                refuse_seen(self._index, frame)
                key = source.path.resolve(), frame.name
                # Arrays have no files: equal names say nothing.
                if source.files and key in given:
                    raise CalibrationError(f"calibration frame '{frame.name}' is given twice")
                given.add(key)
            position = drive, frame.recording, number, frame.stamp_ns
            embedded = EmbeddedFrame(*position, grid, numbers[id(source)])
            self.kept.offer(embedded)
            total = number + 1
            yield embedded
        self.kept.are_all = len(self.kept.frames) == total

    def _check_unchanged(self, source: FrameSource, frame: Frame) -> None:
        """Refuse a frame of the index whose image is another one now."""
        is_stored = (frame.recording, frame.name) in self._stored
        if is_stored and not is_seen(self._index, frame):
            raise CalibrationError(
                f"source '{source.path}' of the index: expected the frame '{frame.name}' that the "
                "index was built from, found another image of that name"
            )


# Returns what `_scored` does.
Scoring: TypeAlias = Callable[
    [Drives, Scorers], tuple[dict[int, list[NormalisationSums]], Iterable[ScoredFrame]]
]


def _median_distances(index: NominalIndex, grids: Sequence[PatchGrid]) -> list[float]:
    """Return the median distance by stage of some patches to the nearest entry."""
    rng = np.random.default_rng(0)
    medians = []
    for number, stage in enumerate(index.stages):
        rows = np.concatenate([g.stages[number].features.reshape(-1, stage.dim) for g in grids])
        some = rng.choice(len(rows), min(len(rows), _SAMPLE_PATCHES), replace=False)
        distances = stage.distances(rows[some], k=1)
        # Of frames of the index, entries themselves say nothing.
        others = distances[distances > _SEEN_DISTANCE]
        medians.append(float(np.median(others)) if len(others) else 0.0)
    return medians
