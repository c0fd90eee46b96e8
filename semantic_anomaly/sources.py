"""Frames from a folder of images, a video or a rosbag2 bag, named alike: 'folder[0:56]'."""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import cv2

from semantic_anomaly.errors import ImageError, SourceError
from semantic_anomaly.structures import Frame

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm")
BAG_SUFFIXES = (".mcap", ".db3")
FRAME_PERIOD_NS = 100_000_000

_SLICE = re.compile(r"(?P<path>.+)\[(?P<start>-?\d*):(?P<stop>-?\d*)(?::(?P<step>\d*))?\]")


class FrameSource(ABC):
    """Frames of one size in the order of time; can be iterated over any number of times.

    Attributes:
        path: folder or file.
        name: short name, the first part of every frame's name; the same for every selection.
        selection: which frames are wanted, as a Python slice with a positive step.

    Raises:
        SourceError: while iterating, when the source turns out to be damaged or empty.
        ImageError: while iterating, when a frame cannot be decoded or differs in size.
    """

    def __init__(self, path: Path, name: str, selection: slice = slice(None)) -> None:
        self.path = path
        self.name = name
        self.selection = selection

    @property
    def count(self) -> int | None:
        """Return how many frames are announced, None when unknown; a video may hold fewer."""
        total = self._total(exact=False)
        return None if total is None else len(range(*self.selection.indices(total)))

    @property
    def drives(self) -> tuple[str, ...]:
        """Return the names of the drives that the selected frames are of, one '' if unknown."""
        return ("",)

    def drive_of(self, frame: Frame) -> str:
        """Return the drive of a frame of this source, one of `drives`."""
        return ""

    def __iter__(self) -> Iterator[Frame]:
        first: Frame | None = None
        for frame in self._read(self._wanted()):
            first = first or frame
            if frame.image_hw != first.image_hw:
                raise ImageError(
                    f"source '{self.path}': expected images of one size, "
                    f"{_size(first)} as '{first.name}', found {_size(frame)} in '{frame.name}'"
                )
            yield frame
        if first is None:
            raise SourceError(f"source '{self.path}': expected frames, found none{self._chosen()}")

    @abstractmethod
    def _total(self, *, exact: bool) -> int | None:
        """Return the frames of the whole source; never None when it must be exact."""

    @abstractmethod
    def _read(self, wanted: range) -> Iterator[Frame]:
        """Yield the frames whose index is wanted; the range may reach beyond the end."""

    def _wanted(self) -> range:
        start, stop, step = self.selection.start, self.selection.stop, self.selection.step or 1
        if (start or 0) < 0 or (stop or 0) < 0:
            return range(*self.selection.indices(self._total(exact=True) or 0))
        return range(start or 0, sys.maxsize if stop is None else stop, step)

    def _chosen(self) -> str:
        if self.selection == slice(None):
            return ""
        parts = (self.selection.start, self.selection.stop, self.selection.step)
        total = self._total(exact=False)
        listed = ":".join("" if part is None else str(part) for part in parts)
        return f" in [{listed}]" + ("" if total is None else f" of {total}")


class Video(FrameSource):
    """The frames of a video file, stamped by the frame rate, by 10 Hz where it has none.

    Raises:
        SourceError: the file cannot be opened as a video.
    """

    def __init__(self, path: Path, selection: slice = slice(None)) -> None:
        super().__init__(path, path.stem, selection)
        capture = self._open()
        announced, rate = (capture.get(key) for key in (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS))
        if not capture.grab():
            raise SourceError(f"video '{path}': expected frames, found none that can be decoded")
        capture.release()
        # Streams without an index announce nothing, or negative nonsense.
        self._announced = int(announced) if 0 < announced < 1e9 else None
        self._period_ns = 1e9 / rate if 0 < rate < 1e6 else float(FRAME_PERIOD_NS)

    def _open(self) -> cv2.VideoCapture:
        capture = cv2.VideoCapture(str(self.path))
        if not capture.isOpened():
            raise SourceError(
                f"video '{self.path}' cannot be opened: it is damaged, cut off, or of a codec that "
                "this build of OpenCV lacks"
            )
        return capture

    def _total(self, *, exact: bool) -> int | None:
        if not exact:
            return self._announced
        capture, total = self._open(), 0
        while capture.grab():
            total += 1
        capture.release()
        return total

    def _read(self, wanted: range) -> Iterator[Frame]:
        capture, index = self._open(), 0
        try:
            while index < wanted.stop and capture.grab():
                if index in wanted:
                    done, image = capture.retrieve()
                    name = f"{self.name}/{index:06d}"
                    if not done or image is None or image.ndim != 3:
                        raise ImageError(f"video '{self.path}': frame {index} cannot be decoded")
                    rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
                    yield Frame(rgb, round(index * self._period_ns), name=name)
                index += 1
        finally:
            capture.release()


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
        from semantic_anomaly.bags import BagSource

        return BagSource(path, topic=topic, selection=selection)
    if path.is_file() and suffix in VIDEO_SUFFIXES:
        return Video(path, selection)
    if path.is_dir():
        from semantic_anomaly.image_folder import ImageFolder

        return ImageFolder(path, selection)
    raise SourceError(
        f"source '{path}': expected a folder of images, a video ({', '.join(VIDEO_SUFFIXES)}) "
        f"or a bag ({', '.join(BAG_SUFFIXES)})"
    )


def is_bag(path: Path) -> bool:
    """Return whether a path is a rosbag2 folder or one of its files."""
    named = path.is_file() and path.suffix.lower() in BAG_SUFFIXES
    return named or (path / "metadata.yaml").is_file()


def _size(frame: Frame) -> str:
    return f"{frame.image_hw[1]}x{frame.image_hw[0]}"
