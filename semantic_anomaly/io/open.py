"""Open any source of frames: images, arrays, lists, glob patterns, videos and rosbag2 bags."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from semantic_anomaly.errors import SourceError
from semantic_anomaly.io.sources import (
    BAG_SUFFIXES,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    Arrays,
    FrameSource,
    ImageFiles,
    Video,
    folder_images,
    is_bag,
    natural,
)
from semantic_anomaly.storage import read_file

SourceLike: TypeAlias = "str | Path | np.ndarray | Sequence[str | Path] | Sequence[np.ndarray]"

_PACKED_SUFFIXES = ".zst", ".zstd", ".gz", ".bz2", ".xz", ".zip"
_SLICE = re.compile(r"(?P<path>.+)\[(?P<start>-?\d*):(?P<stop>-?\d*)(?::(?P<step>\d*))?\]")


def open_source(source: SourceLike, *, topic: str | None = None, name: str = "") -> FrameSource:
    """Open one source of frames.

    A path is one of:

    - a folder of images, or one with a subfolder `images`
    - an image file
    - a glob pattern of images or folders: `drive/*.png`, `drives/**/*.jpg`
    - `@list.txt`: one image, folder or pattern per line, relative to the list; `#` starts a comment
    - a video, or a rosbag2 bag (folder, .mcap or .db3)

    A suffix `[START:STOP]` or `[START:STOP:STEP]` selects frames by their numbers in the whole
    source, like a Python slice: `drive[0:56]` is the first 56 frames, `drive[-50:]` the last 50.
    An existing path is used as it is, even with brackets, `*` or `@` in it.

    Args:
        source: a path; a sequence of image files, folders and patterns, read as one source; or RGB
            images, (height, width, 3) or (n, height, width, 3) uint8, or a sequence of the former.
        topic: image topic of a bag, needed if it has several; ignored by other sources.
        name: name of the source, instead of its folder, file or 'array'.

    Raises:
        SourceError: a path does not exist or cannot be read as images, or nothing is selected.
        ImageError: an array of another shape or dtype.
    """
    try:
        if isinstance(source, str | Path):
            opened = _open(*split_selection(source), topic, name)
        elif isinstance(source, np.ndarray) or any(isinstance(i, np.ndarray) for i in source):
            opened = Arrays(source, name)
        else:
            opened = ImageFiles([file for entry in source for file in _files(entry)], name=name)
    except OSError as error:
        raise SourceError(f"source '{source}': {error.strerror}") from error
    if opened.count == 0:
        raise opened.no_frames()
    if isinstance(source, str | Path):
        opened.opened = _absolute(source)
    elif opened.files:
        opened.opened = tuple(_absolute(entry) for entry in source if isinstance(entry, str | Path))
    return opened


def _absolute(source: str | Path) -> str:
    """Return a path, pattern, list or selection that means the same from every folder."""
    text = str(source)
    is_list = text.startswith("@") and not Path(text).exists()
    return "@" * is_list + str(Path(text[is_list:]).expanduser().absolute())


def split_selection(path: Path | str) -> tuple[Path, slice]:
    """Split 'drive[0:56]' into path and slice; without a selection, the slice is everything.

    Raises:
        SourceError: brackets at the end that are not a selection.
    """
    whole = Path(path).expanduser()
    if whole.exists() or not whole.name.endswith("]"):
        return whole, slice(None)
    match = _SLICE.fullmatch(str(whole))
    numbers = [match[part] for part in ("start", "stop", "step")] if match else []
    if match and "-" not in numbers and numbers[2] != "0":
        return Path(match["path"]), slice(*(int(n) if n else None for n in numbers))
    if _matches(whole):
        return whole, slice(None)
    raise SourceError(
        f"source '{path}': expected an existing path, or one followed by [START:STOP] or "
        "[START:STOP:STEP] with a positive step"
    )


def _open(path: Path, selection: slice, topic: str | None, name: str) -> FrameSource:
    if path.exists():
        if is_bag(path):
            from semantic_anomaly.io.bags import BagSource

            return BagSource(path, topic=topic, selection=selection, name=name)
        if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES:
            return Video(path, selection, name)
    elif str(path).startswith("@"):
        return ImageFiles(_list_files(Path(str(path)[1:]).expanduser()), selection, name)
    return ImageFiles(_image_files(path), selection, name)


def _list_files(path: Path) -> list[Path]:
    """Return the image files that a text file lists."""
    try:
        lines = read_file(path).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise SourceError(f"list '{path}': {error.strerror}") from error
    except ValueError as error:
        raise SourceError(f"list '{path}': expected UTF-8 text") from error
    files: list[Path] = []
    for number, line in enumerate(lines, 1):
        entry = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()
        try:
            # An absolute entry replaces the list's folder.
            files += _files(path.parent / Path(entry).expanduser()) if entry else []
        except SourceError as error:
            raise SourceError(f"list '{path}', line {number}: {error}") from error
    if not files:
        raise SourceError(f"list '{path}': expected one path per line, found none")
    return files


def _files(entry: object) -> list[Path]:
    """Return the image files of one entry of a list, with or without a selection."""
    if not isinstance(entry, str | Path):
        raise SourceError(f"sources: expected a path or an array, found {type(entry).__name__}")
    path, selection = split_selection(entry)
    return _image_files(path)[selection]


def _image_files(path: Path) -> list[Path]:
    """Return the image files of a folder, an image file or a glob pattern."""
    if is_bag(path) or (path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES):
        raise SourceError(
            f"source '{path}': expected images, found a video or bag; open it as its own source"
        )
    if path.is_dir():
        return folder_images(path)
    if path.is_file():
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return [path]
        if path.suffix == ".bag":
            raise SourceError(
                f"source '{path}' is a ROS 1 bag; 'rosbags-convert --src {path} --dst "
                f"{path.with_suffix('')}' makes a ROS 2 bag of it"
            )
        if path.suffix in _PACKED_SUFFIXES:
            raise SourceError(f"source '{path}' is compressed as a file: unpack it first")
        listed = f"; '@{path}' reads it as a list of images" if path.suffix == ".txt" else ""
        raise SourceError(
            f"source '{path}': expected a folder of images, an image "
            f"({', '.join(IMAGE_SUFFIXES)}), a video ({', '.join(VIDEO_SUFFIXES)}) or a bag "
            f"({', '.join(BAG_SUFFIXES)}){listed}"
        )
    if not glob.has_magic(str(path)):
        raise SourceError(f"source '{path}' does not exist")
    matches = _matches(path)
    # A pattern such as drive/* also matches labels and masks beside the images.
    files = [match for match in matches if match.suffix.lower() in IMAGE_SUFFIXES]
    files = [file for file in files if not file.is_dir()]
    files = files or [f for match in matches if match.is_dir() for f in folder_images(match)]
    if not files:
        raise SourceError(
            f"source '{path}': expected a pattern that matches images ({', '.join(IMAGE_SUFFIXES)})"
            f" or folders of images, found {len(matches)} other files"
            if matches
            else f"source '{path}': no file matches the pattern"
        )
    return files


def _matches(pattern: Path) -> list[Path]:
    """Return what a glob pattern matches, in natural order."""
    # Path.glob takes no absolute patterns.
    return [Path(m) for m in sorted(glob.glob(str(pattern), recursive=True), key=natural)]  # noqa: PTH207
