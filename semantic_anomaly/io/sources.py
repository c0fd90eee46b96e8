"""Frames from a folder of images, a video or a rosbag2 bag, named alike: 'folder[0:56]'.

Folders of images as drives, with what a labels.json beside them says of stamps and drives.
"""

from __future__ import annotations

import json
import math
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2

from semantic_anomaly.errors import ImageError, SourceError
from semantic_anomaly.io.images import read_image
from semantic_anomaly.structures import Frame

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm")
BAG_SUFFIXES = (".mcap", ".db3")
FRAME_PERIOD_NS = 100_000_000


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


def is_bag(path: Path) -> bool:
    """Return whether a path is a rosbag2 folder or one of its files."""
    named = path.is_file() and path.suffix.lower() in BAG_SUFFIXES
    return named or (path / "metadata.yaml").is_file()


def _size(frame: Frame) -> str:
    return f"{frame.image_hw[1]}x{frame.image_hw[0]}"


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ImageFolder(FrameSource):
    """The images of a folder, or of its subfolder `images`, in natural order of their names.

    Stamps are taken from `stamp_s` in a labels.json beside the images or the subfolder, else one
    frame follows the other after 100 ms; drives from `drive`, where it is given for every image.

    Raises:
        SourceError: no images, or a labels.json that does not give every image a stamp.
    """

    def __init__(self, path: Path, selection: slice = slice(None)) -> None:
        folder = path / "images" if (path / "images").is_dir() else path
        resolved = folder.resolve()
        name = resolved.parent.name if resolved.name == "images" else resolved.name
        super().__init__(path, name, selection)
        try:
            files = [f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES]
        except OSError as error:
            raise SourceError(f"folder '{folder}': {error.strerror}") from error
        self.files = sorted(
            (f for f in files if f.is_file() and not f.name.startswith(".")),
            key=lambda file: natural(file.name),
        )
        if not self.files:
            raise SourceError(
                f"folder '{folder}': expected images ({', '.join(IMAGE_SUFFIXES)}), found none"
                + _bag_remark(folder)
            )
        beside = [folder / "labels.json"]
        if resolved.name == "images":
            beside.append(resolved.parent / "labels.json")
        labels = next((file for file in beside if file.is_file()), None)
        rows = _read_labels(labels) if labels else {}
        self._stamps_ns = _stamps(rows, labels, self.files)
        self._drives = _drives(rows, self.files)

    @property
    def drives(self) -> tuple[str, ...]:
        """Return the drives that the labels name."""
        chosen = self.files[self.selection]
        return tuple(dict.fromkeys(self._drives.get(file.name, "") for file in chosen))

    def drive_of(self, frame: Frame) -> str:
        """Return the drive of a frame of this folder."""
        return self._drives.get(frame.name.rpartition("/")[2], "")

    def _total(self, *, exact: bool) -> int:
        return len(self.files)

    def _read(self, wanted: range) -> Iterator[Frame]:
        for index in range(wanted.start, min(wanted.stop, len(self.files)), wanted.step):
            file = self.files[index]
            stamp_ns = self._stamps_ns.get(file.name, index * FRAME_PERIOD_NS)
            yield Frame(read_image(file), stamp_ns, name=f"{self.name}/{file.name}")


def natural(name: str) -> tuple[list[str | int], str]:
    """Return a key that sorts names as people do: 2 before 10."""
    pieces = re.split(r"(\d+)", name)
    return [int(p) if p.isdecimal() else p.lower() for p in pieces], name


def _bag_remark(folder: Path) -> str:
    bags = sorted(f.name for f in folder.iterdir() if f.suffix.lower() in BAG_SUFFIXES)
    return f"; {bags[0]} lacks its metadata.yaml ('ros2 bag reindex' makes one)" if bags else ""


def _read_labels(labels: Path) -> dict[str, dict[str, Any]]:
    """Return what labels say by file name; other things than objects say nothing."""
    try:
        rows = json.loads(labels.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"labels '{labels}' cannot be read: {error}") from error
    rows = rows if isinstance(rows, dict) else {}
    return {name: row for name, row in rows.items() if isinstance(row, dict)}


def _stamps(
    rows: dict[str, dict[str, Any]], labels: Path | None, files: list[Path]
) -> dict[str, int]:
    """Return nanoseconds by file name; empty when the labels hold no stamps at all."""
    stamps = {name: row["stamp_s"] for name, row in rows.items() if "stamp_s" in row}
    if not stamps:
        return {}
    for file in files:
        stamp: Any = stamps.get(file.name)
        number = isinstance(stamp, int | float) and not isinstance(stamp, bool)
        if not number or not math.isfinite(stamp):
            raise SourceError(
                f"labels '{labels}': expected a stamp_s in seconds for '{file.name}', "
                f"found {stamp!r}"
            )
    return {file.name: round(stamps[file.name] * 1e9) for file in files}


def _drives(rows: dict[str, dict[str, Any]], files: list[Path]) -> dict[str, str]:
    """Return the drive by file name; empty unless the labels name one for every file."""
    named = {file.name: rows.get(file.name, {}).get("drive") for file in files}
    known = {name: drive for name, drive in named.items() if isinstance(drive, str) and drive}
    return known if len(known) == len(files) else {}
