"""Nominal drives: opened sources, their names, and their frames with embeddings."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from semantic_anomaly.embedding.identity import Embedder
from semantic_anomaly.errors import SourceError, UnknownNameError
from semantic_anomaly.io.open import open_source
from semantic_anomaly.io.sources import FrameSource
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame, PatchGrid

if TYPE_CHECKING:
    from semantic_anomaly.segmentation.embedder import RunningEmbedder

# Larger batches gain a few percent on a CPU and cost memory with every image.
BATCH_FRAMES = 4


def camera_roi(settings: Settings, camera: str) -> ImageRegion:
    """Return the region of interest of a camera; raise UnknownNameError for an unknown camera."""
    if camera not in settings.cameras:
        raise UnknownNameError("camera", camera, settings.cameras)
    return ImageRegion.from_settings(settings.camera_settings[camera])


def given_or_loaded_embedder(
    settings: Settings, given: Embedder | None
) -> tuple[Embedder, RunningEmbedder | None]:
    """Return the embedder to use, and once more if it was made here and is to be closed here."""
    if given is not None:
        return given, None
    from semantic_anomaly.segmentation.embedder import RunningEmbedder

    made = RunningEmbedder.from_settings(settings)
    return made, made


def open_drives(sources: Sequence[str | Path], topic: str | None) -> dict[str, FrameSource]:
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


def sources_by_drive(sources: Mapping[str, FrameSource]) -> dict[str, FrameSource]:
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


def embedded_frames(
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
