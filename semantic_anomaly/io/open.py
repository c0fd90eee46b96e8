"""Open a folder of images, a video or a rosbag2 bag, with or without a selection of frames."""

from __future__ import annotations

import re
from pathlib import Path

from semantic_anomaly.errors import SourceError
from semantic_anomaly.io.sources import (
    BAG_SUFFIXES,
    VIDEO_SUFFIXES,
    FrameSource,
    ImageFolder,
    Video,
    is_bag,
)

_SLICE = re.compile(r"(?P<path>.+)\[(?P<start>-?\d*):(?P<stop>-?\d*)(?::(?P<step>\d*))?\]")


def open_source(path: Path | str, *, topic: str | None = None) -> FrameSource:
    """Open a folder of images, a video, or a rosbag2 bag (folder, .mcap or .db3 file).

    A tail `[START:STOP]` or `[START:STOP:STEP]` selects frames by their numbers in the whole
    source, as a Python slice does: `drive[0:56]` is the first 56 frames, `drive[-50:]` the last.
    A path that exists as it stands, brackets included, is taken as it stands.

    Args:
        path: what to open, with or without a selection.
        topic: image topic of a bag, needed where it has several; other sources have none.

    Raises:
        SourceError: there is nothing, nothing usable, or nothing selected.
    """
    try:
        found, selection = split_selection(path)
        source = _open(found, selection, topic)
    except OSError as error:
        raise SourceError(f"source '{path}': {error.strerror}") from error
    if source.count == 0:
        raise SourceError(f"source '{found}': expected frames, found none{source._chosen()}")
    return source


def split_selection(path: Path | str) -> tuple[Path, slice]:
    """Split 'drive[0:56]' into path and slice; without brackets the slice is everything.

    Raises:
        SourceError: brackets at the end that are not a selection.
    """
    whole = Path(path).expanduser()
    if whole.exists() or not whole.name.endswith("]"):
        return whole, slice(None)
    match = _SLICE.fullmatch(str(whole))
    numbers = [match[part] for part in ("start", "stop", "step")] if match else []
    if not match or "-" in numbers or numbers[2] == "0":
        raise SourceError(
            f"source '{path}': expected an existing path, or one followed by [START:STOP] or "
            "[START:STOP:STEP] with a positive step"
        )
    return Path(match["path"]), slice(*(int(n) if n else None for n in numbers))


def _open(path: Path, selection: slice, topic: str | None) -> FrameSource:
    suffix = path.suffix.lower()
    if not path.exists():
        raise SourceError(f"source '{path}' does not exist")
    if is_bag(path):
        from semantic_anomaly.io.bags import BagSource

        return BagSource(path, topic=topic, selection=selection)
    if path.is_file() and suffix in VIDEO_SUFFIXES:
        return Video(path, selection)
    if path.is_dir():
        return ImageFolder(path, selection)
    raise SourceError(
        f"source '{path}': expected a folder of images, a video ({', '.join(VIDEO_SUFFIXES)}) "
        f"or a bag ({', '.join(BAG_SUFFIXES)})"
    )
