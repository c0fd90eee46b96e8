"""Nominal drives: opened sources by name, and their frames with embeddings."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from tqdm import tqdm

from semantic_anomaly.detection.blindness import BlindnessCheck
from semantic_anomaly.embedding.identity import Embedder
from semantic_anomaly.errors import SourceError
from semantic_anomaly.index.content import RecordedSource
from semantic_anomaly.io.open import open_source, split_selection
from semantic_anomaly.io.sources import IMAGE_SUFFIXES, MAX_BAD_SHARE, FrameSource
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.settings import Settings
from semantic_anomaly.storage import available_memory_bytes
from semantic_anomaly.structures import Frame, PatchGrid

# One source, several sources, or images: as files or as (height, width, 3) uint8 RGB arrays.
Sources: TypeAlias = "str | Path | np.ndarray | FrameSource | Sequence[Any]"

# Larger batches gain a few percent on a CPU and cost memory with every image.
BATCH_FRAMES = 4
_SAMPLE_IMAGES, _SAMPLE_STRIDE = 8, 10
# Embeddings that are kept for another reading of the drives.
_KEPT_BYTES = 2**30
_SELECTED = re.compile(r"(\[[-\d:]*\])?( \(\d+\))?$")
# A file of a split bag.
_BAG_PART = re.compile(r"(?P<recording>.+)_\d+\.(?:mcap|db3)")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class EmbeddedFrame:
    """A frame of a drive: its number among all, stamp in nanoseconds, embeddings, and source."""

    drive: str
    recording: str
    number: int
    stamp_ns: int
    grid: PatchGrid
    source: int = 0


class KeptFrames:
    """The first embedded frames of drives, as many as fit: 1 GiB, or a quarter of what is free.

    Attributes:
        frames: in order, without gaps.
        are_all: whether they are all frames of the drives.
    """

    def __init__(self) -> None:
        self.frames: list[EmbeddedFrame] = []
        self.are_all = False
        self._room = min(_KEPT_BYTES, (available_memory_bytes() or 0) // 4)

    def offer(self, frame: EmbeddedFrame) -> None:
        """Keep a frame if it is the next one and fits."""
        size = sum(part.features.nbytes for part in frame.grid.stages)
        if frame.number == len(self.frames) and size <= self._room:
            self.frames.append(frame)
            self._room -= size


def settings_of(settings: Settings | None, overrides: Mapping[str, Any]) -> Settings:
    """Return settings with values of single settings replaced.

    Raises:
        SettingsError: a value of the wrong type or out of bounds.
        UnknownNameError: no such setting.
    """
    parameters = {} if settings is None else settings.to_parameters()
    values = {k: str(v) if isinstance(v, Path) else v for k, v in overrides.items()}
    return Settings.from_parameters({**parameters, **values})


def camera_roi(settings: Settings, camera: str) -> RegionOfInterest:
    """Return the region of interest of a camera.

    Raises:
        UnknownNameError: no such camera.
    """
    return RegionOfInterest.from_settings(settings.for_camera(camera).camera_settings[camera])


def open_drives(sources: Sources, topic: str | None = None) -> dict[str, FrameSource]:
    """Return opened sources by name: the name of the source with its selection, made unique.

    Args:
        sources: one source, or a sequence of sources, each anything that `open_source` takes. A
            sequence of arrays or of image files is one source.
        topic: image topic of bags that have several.

    Raises:
        SourceError: no sources, a source without frames, or one given twice.
    """
    several = _is_several(sources)
    items: list[Any] = [*sources] if several else [sources]  # type: ignore[misc]
    if not items:
        raise SourceError("sources: expected at least one drive, found none")
    drives: dict[str, FrameSource] = {}
    for item in items:
        source = item if isinstance(item, FrameSource) else open_source(item, topic=topic)
        if any(source.reads_same(other) for other in drives.values()):
            raise SourceError(f"source '{source.path}' is given twice")
        # As the node, which calls a bad image unknown and goes on.
        source.max_bad_share = MAX_BAD_SHARE
        stem = source.name + _selection_text(source.selection)
        drive, number = stem, 2
        while drive in drives:
            drive, number = f"{stem} ({number})", number + 1
        drives[drive] = source
    return drives


def drive_name(name: str, source: FrameSource, drive: str) -> str:
    """Return the name of a drive of a source; the labels of a folder may name several."""
    return f"{name}/{drive}" if len(source.drives) > 1 else name


def recordings_of(
    drives: Mapping[str, FrameSource], pattern: str = "", recorded: Sequence[RecordedSource] = ()
) -> dict[str, str]:
    """Return the recording of every drive by its name.

    Parts of one recording are parts of the same files by selection, and the files of a split bag:
    `bag_0.mcap` and `bag_1.mcap`. Other drives are recordings of their own.

    Args:
        drives: opened sources by name, from `open_drives`.
        pattern: regular expression; where it matches the name of a drive without its selection, the
            first group names the recording. Empty: none.
        recorded: sources of an index; other parts of its recordings have their names.
    """
    recordings: dict[str, str] = {}
    taken = {name for source in recorded for name in source.recordings.values()}
    names: dict[Any, str] = {}
    for name, source in drives.items():
        for drive in source.drives:
            key, title = _recording_key(source, drive)
            avoided = taken
            if known := recorded_recording(recorded, source, drive):
                recordings[drive_name(name, source, drive)] = known
                continue
            if pattern and (match := re.search(pattern, title)) and match[1]:
                key, title, avoided = match[1], match[1], set()
            if key not in names:
                recording, number = title, 2
                while recording in avoided or recording in names.values():
                    recording, number = f"{title} ({number})", number + 1
                names[key] = recording
            recordings[drive_name(name, source, drive)] = names[key]
    return recordings


def reopened(
    recorded: Sequence[RecordedSource], moved: Mapping[str, str]
) -> tuple[dict[str, FrameSource], dict[str, str]]:
    """Open the sources of an index again.

    Args:
        recorded: of the index.
        moved: new beginnings of paths by old ones, where sources have moved.

    Returns:
        Sources by name, as from `open_drives`, and the recording of each drive by its name.

    Raises:
        SourceError: a source was in memory, cannot be opened, or has other drives than before.
    """
    drives: dict[str, FrameSource] = {}
    recordings: dict[str, str] = {}
    for source in relocated(recorded, moved):
        if not source.opened:
            raise SourceError(
                f"source '{source.name}' of the index was in memory and cannot be read again; give "
                "calibration drives as sources"
            )
        try:
            opened = open_source(source.opened, topic=source.topic or None)
        except SourceError as error:
            raise SourceError(
                f"source '{source.name}' of the index: {error}; if it has moved, pass --source "
                "OLD=NEW"
            ) from error
        if set(opened.drives) != set(source.recordings):
            raise SourceError(
                f"source '{source.name}' of the index: expected the drives "
                f"{sorted(source.recordings)}, found {sorted(opened.drives)}"
            )
        drives[source.name] = opened
        for drive, recording in source.recordings.items():
            recordings[drive_name(source.name, opened, drive)] = recording
    return drives, recordings


def relocated(
    recorded: Sequence[RecordedSource], moved: Mapping[str, str]
) -> tuple[RecordedSource, ...]:
    """Return the sources of an index where they are now.

    Args:
        recorded: of the index.
        moved: new beginnings of paths by old ones.

    Raises:
        SourceError: an old beginning is that of no path.
    """
    beginnings = {old.rstrip("/"): new.rstrip("/") for old, new in moved.items()}
    unused = set(beginnings)

    def now(opened: str) -> str:
        is_list = opened.startswith("@")
        path = opened[is_list:]
        for old, new in beginnings.items():
            if path == old or path.startswith((f"{old}/", f"{old}[")):
                unused.discard(old)
                return "@" * is_list + new + path[len(old) :]
        return opened

    sources = tuple(
        replace(
            source,
            opened=now(source.opened)
            if isinstance(source.opened, str)
            else tuple(map(now, source.opened)),
        )
        for source in recorded
    )
    for old in sorted(unused):
        raise SourceError(
            f"moved source '{old}': expected the beginning of a path of the index, found "
            f"{', '.join(str(source.opened) for source in recorded[:3])}"
        )
    return sources


def recorded_recording(
    recorded: Sequence[RecordedSource], source: FrameSource, drive: str
) -> str | None:
    """Return the recording of a drive if an index was built from another part of it, else None."""
    for other in recorded:
        if isinstance(other.opened, str) and other.opened and source.files:
            path = split_selection(other.opened)[0]
            same = _file_of_recording(path) == _file_of_recording(source.path)
            if same and drive in other.recordings:
                return other.recordings[drive]
    return None


def file_of_recording(opened: str) -> tuple[str, str]:
    """Return folder and name of the file that a source was opened from, equal for its parts."""
    folder, name = _file_of_recording(split_selection(opened.removeprefix("@"))[0])
    return str(folder), name


def without_selection(name: str) -> str:
    """Return the name of a source without its selection and number: 'drive[0:9] (2)', 'drive'."""
    return _SELECTED.sub("", name)


def _file_of_recording(path: Path) -> tuple[Path, str]:
    """Return folder and name of a source, of a split bag without the number of its file."""
    path = path.resolve()
    part = None if path.is_dir() else _BAG_PART.fullmatch(path.name)
    return path.parent, part["recording"] if part else path.name


def _recording_key(source: FrameSource, drive: str) -> tuple[Any, str]:
    """Return what identifies the recording of a drive, and its name."""
    if not source.files:
        return (id(source), drive), drive_name(source.name, source, drive)
    folder, name = _file_of_recording(source.path)
    if len(source.paths) == 1 and name != source.path.resolve().name:
        return (folder, name), name
    paths = tuple(sorted({str(path.resolve()) for path in source.paths}))
    return (paths, drive), drive_name(source.name, source, drive)


def recorded_sources(
    drives: Mapping[str, FrameSource], recordings: Mapping[str, str]
) -> list[RecordedSource]:
    """Return sources as an index remembers them.

    Args:
        drives: opened sources by name, from `open_drives`.
        recordings: of every drive, from `recordings_of`.
    """
    return [
        RecordedSource(
            name,
            source.opened,
            source.topic,
            {drive: recordings[drive_name(name, source, drive)] for drive in source.drives},
        )
        for name, source in drives.items()
    ]


def frame_total(sources: Mapping[str, FrameSource], stride: int = 1) -> int | None:
    """Return the number of frames, None if a source does not announce it."""
    counts = [source.count for source in sources.values()]
    known = [-(-count // stride) for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def sample_images(sources: Mapping[str, FrameSource]) -> list[np.ndarray]:
    """Return some images of all drives, (height, width, 3) uint8 RGB: 8, or one of each drive."""
    of_each = -(-_SAMPLE_IMAGES // len(sources))
    images = []
    for source in sources.values():
        # Neighbouring frames say less, but reading a whole drive for eight frames takes too long.
        stride = _SAMPLE_STRIDE
        if source.count is not None:
            stride = min(stride, max(1, source.count // of_each))
        frames = itertools.islice(source, 0, of_each * stride, stride)
        images += [frame.image for frame in frames]
    return images


def embedded_frames(
    sources: Mapping[str, FrameSource],
    embedder: Embedder,
    *,
    recordings: Mapping[str, str] | None = None,
    stride: int = 1,
    strides: Mapping[str, int] | None = None,
    skipped: int = 0,
    warns: bool = True,
    description: str = "frames",
    progress: bool = False,
) -> Iterator[tuple[str, FrameSource, Frame, PatchGrid]]:
    """Yield name of the drive, source, frame and embeddings of every frame, embedded in batches.

    Args:
        sources: by name, from `open_drives`.
        embedder: computes the embeddings.
        recordings: of every drive, which frames then name; None: not known.
        stride: use every stride-th frame of each source.
        strides: by source, where they differ.
        skipped: number of the first of these frames that are not embedded again.
        warns: warn about frames that show nothing.
        description: of the progress bar.
        progress: show a progress bar on a terminal.
    """
    recordings = recordings or {}
    # None shows the bar on a terminal only.
    disable = None if progress else True
    strides = strides or {}
    totals = [frame_total({n: s}, strides.get(n, stride)) for n, s in sources.items()]
    total = None if None in totals else sum(filter(None, totals))
    with tqdm(total=total, desc=description, unit="frame", disable=disable) as bar:
        for name, source in sources.items():
            bar.set_postfix_str(name, refresh=False)
            blind_frames = BlindFrames(name)
            frames = itertools.islice(source, 0, None, strides.get(name, stride))
            while skipped and next(frames, None) is not None:
                skipped -= 1
                bar.update()
            while batch := list(itertools.islice(frames, BATCH_FRAMES)):
                grids = embedder.embed([frame.image for frame in batch])
                for frame, grid in zip(batch, grids, strict=True):
                    blind_frames.add(frame)
                    drive = drive_name(name, source, source.drive_of(frame))
                    yield drive, source, replace(frame, recording=recordings.get(drive, "")), grid
                bar.update(len(batch))
            if warns:
                blind_frames.warn()


class BlindFrames:
    """Frames of a source that the detector calls unknown, as the camera is covered or frozen."""

    def __init__(self, name: str) -> None:
        self._name, self._settings, self._check = name, Settings(), BlindnessCheck()
        self._seen = self._blind = 0
        self._first = ""

    def add(self, frame: Frame) -> None:
        """Add the next frame."""
        settings = self._settings
        reason = self._check.reason(frame, settings.least_contrast, settings.frozen_after_s)
        self._seen += 1
        if reason:
            self._blind += 1
            self._first = self._first or f"'{frame.name}': {reason}"

    def warn(self) -> None:
        """Say how many there were: what they show becomes nominal."""
        if self._blind:
            _log.warning(
                "source '%s': %d of %d frames are taken as nominal although they show nothing, the "
                "first %s; select the others with '%s[START:STOP]'",
                *(self._name, self._blind, self._seen, self._first, self._name),
            )


def _is_several(sources: Sources) -> bool:
    """Return whether sources are several, rather than one source or the images of one."""
    if isinstance(sources, str | Path | np.ndarray | FrameSource):
        return False
    if all(isinstance(item, np.ndarray) for item in sources):
        return not len(sources)
    return not all(
        isinstance(item, str | Path) and Path(item).suffix.lower() in IMAGE_SUFFIXES
        for item in sources
    )


def _selection_text(selection: slice) -> str:
    if selection == slice(None):
        return ""
    numbers = [selection.start, selection.stop]
    if selection.step is not None:
        numbers.append(selection.step)
    return f"[{':'.join('' if number is None else str(number) for number in numbers)}]"
