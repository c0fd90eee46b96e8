"""Nominal drives: opened sources by name, and their frames with embeddings."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from tqdm import tqdm

from semantic_anomaly.embedding.identity import Embedder
from semantic_anomaly.errors import SourceError
from semantic_anomaly.io.open import open_source
from semantic_anomaly.io.sources import IMAGE_SUFFIXES, MAX_BAD_SHARE, FrameSource
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame, PatchGrid

# One source, several sources, or images: as files or as (height, width, 3) uint8 RGB arrays.
Sources: TypeAlias = "str | Path | np.ndarray | FrameSource | Sequence[Any]"

# Larger batches gain a few percent on a CPU and cost memory with every image.
BATCH_FRAMES = 4
_SAMPLE_IMAGES, _SAMPLE_STRIDE = 8, 10


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


def drive_names(sources: Mapping[str, FrameSource]) -> list[str]:
    """Return the names of all drives; the labels of a folder may name several."""
    return [
        _drive_name(name, source, drive)
        for name, source in sources.items()
        for drive in source.drives
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
    stride: int = 1,
    description: str = "frames",
    progress: bool = False,
) -> Iterator[tuple[str, FrameSource, Frame, PatchGrid]]:
    """Yield name of the drive, source, frame and embeddings of every frame, embedded in batches.

    Args:
        sources: by name, from `open_drives`.
        embedder: computes the embeddings.
        stride: use every stride-th frame of each source.
        description: of the progress bar.
        progress: show a progress bar on a terminal.
    """
    # None shows the bar on a terminal only.
    disable = None if progress else True
    total = frame_total(sources, stride)
    with tqdm(total=total, desc=description, unit="frame", disable=disable) as bar:
        for name, source in sources.items():
            bar.set_postfix_str(name, refresh=False)
            frames = itertools.islice(source, 0, None, stride)
            while batch := list(itertools.islice(frames, BATCH_FRAMES)):
                grids = embedder.embed([frame.image for frame in batch])
                for frame, grid in zip(batch, grids, strict=True):
                    yield _drive_name(name, source, source.drive_of(frame)), source, frame, grid
                bar.update(len(batch))


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


def _drive_name(name: str, source: FrameSource, drive: str) -> str:
    return f"{name}/{drive}" if len(source.drives) > 1 else name


def _selection_text(selection: slice) -> str:
    if selection == slice(None):
        return ""
    numbers = [selection.start, selection.stop]
    if selection.step is not None:
        numbers.append(selection.step)
    return f"[{':'.join('' if number is None else str(number) for number in numbers)}]"
