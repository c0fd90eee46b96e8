"""Frame sources: image files, RGB arrays and videos; `open_source` makes the right one."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from semantic_anomaly.errors import ImageError, SourceError
from semantic_anomaly.io.images import read_image
from semantic_anomaly.io.remarks import Remarks
from semantic_anomaly.storage import parse_json, read_file
from semantic_anomaly.structures import Frame
from semantic_anomaly.timing import elapsed_ms

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm")
BAG_SUFFIXES = (".mcap", ".db3")
FRAME_PERIOD_NS = 100_000_000
# Images that cannot be read; a folder that holds some is reported.
_UNREAD_SUFFIXES = (
    *(".avif", ".cr2", ".dng", ".exr", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".nef"),
    *(".pbm", ".pgm", ".pnm", ".ppm", ".raw", ".tga"),
)
_LISTED_LINKS = 5
_log = logging.getLogger(__name__)


# Share of bad frames up to which the commands go on, at least one frame.
MAX_BAD_SHARE = 0.1
# Nanoseconds of stamps take 64 bits.
_MAX_STAMP_S = 9e9


@dataclass(frozen=True)
class BadFrame:
    """A frame that cannot be decoded: its name, stamp in nanoseconds, and what is wrong."""

    name: str
    stamp_ns: int
    reason: str


class FrameSource(ABC):
    """Frames of one size in order of time; can be iterated over any number of times.

    Attributes:
        paths: folders or files that are read; empty for arrays.
        name: short name; the first part of every frame's name unless frames of several folders
            are read. The same for every selection.
        selection: slice of the frames to read, with a positive step.
        files: the files that hold the frames; those of a bag or video are its path.
        opened: what `open_source` opens again, with absolute paths; empty if not opened by it, or
            for arrays.
        topic: image topic of a bag; empty for others.
        max_bad_share: share of frames, at least one, that may be bad: they are left out with a
            warning. 0: the first bad frame ends the iteration.
        is_one_size: whether frames of different sizes are refused.
        bad_frames: the bad frames of the present or last iteration.
        shortfall: how many frames fewer than announced it had, such as a video that was cut off;
            None: some, but not known how many.

    Raises:
        SourceError: while iterating, if the source is damaged, has no frames or too many bad ones.
        ImageError: while iterating, if a frame cannot be decoded or differs in size.
    """

    max_bad_share = 0.0
    is_one_size = True

    def __init__(
        self,
        paths: Sequence[Path],
        name: str,
        selection: slice = slice(None),
        files: Sequence[Path] | None = None,
    ) -> None:
        self.paths = tuple(paths)
        self.name = name
        self.selection = selection
        self.files = self.paths if files is None else tuple(files)
        self.opened: str | tuple[str, ...] = ""
        self.topic = ""
        self.bad_frames: list[BadFrame] = []
        self.shortfall: int | None = 0
        self._warned: set[str] = set()

    @property
    def path(self) -> Path:
        """Return the folder or file; of several folders the one that contains them."""
        if len(self.paths) > 1:
            return Path(os.path.commonpath([path.resolve() for path in self.paths]))
        return self.paths[0] if self.paths else Path(self.name)

    @property
    def count(self) -> int | None:
        """Return the announced number of frames, None if unknown; a video may hold fewer."""
        total = self._total(exact=False)
        return None if total is None else len(range(*self.selection.indices(total)))

    @property
    def drives(self) -> tuple[str, ...]:
        """Return the names of the drives of the selected frames, ('',) if unknown."""
        return ("",)

    def drive_of(self, frame: Frame | BadFrame) -> str:
        """Return the drive of a frame of this source, one of `drives`."""
        return ""

    def stamps_ns(self) -> tuple[int, ...] | None:
        """Return the stamps of the selected frames, None if only decoding tells them."""
        return None

    def reads_same(self, other: FrameSource) -> bool:
        """Return whether another source reads the same selection of the same files."""
        return (
            bool(self.files)
            and self.selection == other.selection
            and len(self.files) == len(other.files)
            and all(a.samefile(b) for a, b in zip(self.files, other.files, strict=True))
        )

    def no_frames(self) -> SourceError:
        """Return the error of a source or selection without frames."""
        text = f"source '{self.path}': expected frames, found none"
        if self.selection != slice(None):
            parts = (self.selection.start, self.selection.stop, self.selection.step)
            text += f" in [{':'.join('' if part is None else str(part) for part in parts)}]"
            total = self._total(exact=False)
            text += "" if total is None else f" of {total}"
        return SourceError(text)

    @property
    def losses(self) -> str:
        """Return what the last iteration left out, empty if nothing."""
        parts = []
        if self.bad_frames:
            parts.append(f"{len(self.bad_frames)} bad frames ({self.bad_frames[0].name}, ...)")
        if self.shortfall is None:
            parts.append("all frames after it was cut off or damaged")
        elif self.shortfall:
            parts.append(f"{self.shortfall} frames fewer than announced")
        return f"source '{self.path}': {' and '.join(parts)}" if parts else ""

    def __iter__(self) -> Iterator[Frame]:
        return (item for item in self.read() if isinstance(item, Frame))

    def read(self) -> Iterator[Frame | BadFrame]:
        """Yield the frames with the bad ones among them, if some are allowed.

        Raises:
            SourceError, ImageError: as the class.
        """
        # Another iteration may run meanwhile.
        bad_frames: list[BadFrame] = []
        self.bad_frames, self.shortfall = bad_frames, 0
        start, stop, step = self.selection.start, self.selection.stop, self.selection.step or 1
        if (start or 0) < 0 or (stop or 0) < 0:
            wanted = range(*self.selection.indices(self._total(exact=True) or 0))
        else:
            wanted = range(start or 0, sys.maxsize if stop is None else stop, step)
        first: Frame | None = None
        for frame in self._read(wanted):
            if isinstance(frame, BadFrame):
                self.bad_frames = bad_frames
                self._note(frame)
                yield frame
                continue
            first = first or frame
            if self.is_one_size and frame.image_hw != first.image_hw:
                expected, found = (f"{f.image_hw[1]}x{f.image_hw[0]}" for f in (first, frame))
                raise ImageError(
                    f"source '{self.path}': expected images of one size, {expected} as "
                    f"'{first.name}', found {found} in '{frame.name}'"
                )
            yield frame
        self.bad_frames = bad_frames
        if first is None:
            if bad_frames:
                raise ImageError(bad_frames[0].reason)
            raise self.no_frames()

    def _note(self, bad: BadFrame) -> None:
        """Count and name a bad frame.

        Raises:
            ImageError: none is allowed.
            SourceError: more are bad than allowed.
        """
        if not self.max_bad_share:
            raise ImageError(bad.reason)
        self.bad_frames.append(bad)
        if bad.name not in self._warned:
            self._warned.add(bad.name)
            _log.warning("frame '%s' is bad and left out: %s", bad.name, bad.reason)
        allowed = max(1, int(self.max_bad_share * (self.count or 0)))
        if len(self.bad_frames) > allowed:
            raise SourceError(
                f"source '{self.path}': expected at most {allowed} bad frames "
                f"({self.max_bad_share:.0%}), found more; the last one: {bad.reason}"
            )

    def _warn_shortfall(self, found: int, announced: int | None, problem: str = "") -> None:
        """Note that frames are missing at the end; `announced` is None if not known how many."""
        self.shortfall = None if announced is None else announced - found
        if "" not in self._warned:
            self._warned.add("")
            total = "an unknown number of" if announced is None else f"about {announced}"
            _log.warning(
                "source '%s': %d of %s frames could be read: %s",
                *(self.path, found, total, problem or "cut off or damaged"),
            )

    @abstractmethod
    def _total(self, *, exact: bool) -> int | None:
        """Return the number of frames without a selection; never None if it must be exact."""

    @abstractmethod
    def _read(self, wanted: range) -> Iterator[Frame | BadFrame]:
        """Yield the frames whose index is in `wanted`, which may reach beyond the end."""


class ImageFiles(FrameSource):
    """Image files in the given order.

    Frames are named 'folder/file.png', without a subfolder `images`, and with more parent folders
    where names would repeat. A labels.json in a folder, or beside its subfolder `images`, gives
    stamps (`stamp_s`) and drives (`drive`) if it does so for every file; otherwise frames are
    100 ms apart. Files of several folders are of several drives.

    Args:
        files: image files; see `folder_images` for those of a folder.
        selection: slice of the files to read.
        name: replaces the folder in frame names, or precedes several folders.

    Raises:
        SourceError: a file is given twice, or a labels.json has a stamp for some files only.
    """

    def __init__(
        self, files: Sequence[Path], selection: slice = slice(None), name: str = ""
    ) -> None:
        by_folder: dict[Path, list[Path]] = {}
        for file in files:
            by_folder.setdefault(file.parent, []).append(file)
        folders = [_without_images(folder) for folder in by_folder]
        super().__init__(folders, name or "images", selection, files)
        self._remarks = Remarks(lambda text: _log.warning("source '%s': %s", self.path, text))
        self._names = _frame_names(files)
        several = len({_folder_of(frame) for frame in self._names}) > 1
        if name:
            tails = self._names if several else [file.name for file in files]
            self._names = [f"{name}/{tail}" for tail in tails]
        elif files:
            common = self.path.resolve().name if several else _folder_of(self._names[0])
            self.name = common or "images"
        labels = {folder: _read_labels(folder, rows) for folder, rows in by_folder.items()}
        self._stamps_ns, self._drives = [], {}
        for index, (file, frame) in enumerate(zip(files, self._names, strict=True)):
            stamps_ns, drives = labels[file.parent]
            self._stamps_ns.append(stamps_ns.get(file.name, index * FRAME_PERIOD_NS))
            parts = (_folder_of(frame) if several else "", drives.get(file.name, ""))
            self._drives[frame] = "/".join(filter(None, parts))

    @property
    def drives(self) -> tuple[str, ...]:
        """Return the names of the drives of the selected frames, ('',) if unknown."""
        return tuple(dict.fromkeys(self._drives[name] for name in self._names[self.selection]))

    def drive_of(self, frame: Frame | BadFrame) -> str:
        """Return the drive of a frame of this source, one of `drives`."""
        return self._drives.get(frame.name, "")

    def stamps_ns(self) -> tuple[int, ...]:
        """Return the stamps of the selected frames."""
        return tuple(self._stamps_ns[self.selection])

    def _total(self, *, exact: bool) -> int:
        return len(self.files)

    def _read(self, wanted: range) -> Iterator[Frame | BadFrame]:
        for index in range(wanted.start, min(wanted.stop, len(self.files)), wanted.step):
            begin_s = time.perf_counter()
            stamp_ns, name = self._stamps_ns[index], self._names[index]
            try:
                image = read_image(self.files[index])
            except ImageError as error:
                yield BadFrame(name, stamp_ns, str(error))
                continue
            decode_ms = elapsed_ms(begin_s)
            self._remarks.on_file(self.files[index])
            yield Frame(image, stamp_ns, name=name, decode_ms=decode_ms)


class Arrays(FrameSource):
    """RGB images in memory, 100 ms apart, named 'array/000000'.

    Args:
        images: (height, width, 3) or (n, height, width, 3) uint8 RGB, or a sequence of the former.
        name: replaces 'array' in frame names.

    Raises:
        ImageError: another shape or dtype.
    """

    def __init__(self, images: np.ndarray | Sequence[Any], name: str = "") -> None:
        super().__init__((), name or "array")
        if isinstance(images, np.ndarray) and images.ndim != 4:
            images = [images]
        self._frames = [
            Frame(np.ascontiguousarray(image), i * FRAME_PERIOD_NS, name=f"{self.name}/{i:06d}")
            for i, image in enumerate(images)
        ]

    def _total(self, *, exact: bool) -> int:
        return len(self._frames)

    def _read(self, wanted: range) -> Iterator[Frame]:
        yield from self._frames[wanted.start : wanted.stop : wanted.step]


class Video(FrameSource):
    """The frames of a video file.

    Stamps are those of the container, from 0 on. Where it has none, or they do not rise, they
    follow by the frame rate, or by 10 Hz.

    Raises:
        SourceError: the file cannot be opened as a video.
    """

    def __init__(self, path: Path, selection: slice = slice(None), name: str = "") -> None:
        super().__init__([path], name or path.stem, selection)
        capture = self._open()
        announced, rate = (capture.get(key) for key in (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS))
        if not capture.grab():
            raise SourceError(f"video '{path}': expected frames, found none that can be decoded")
        capture.release()
        # Streams without an index announce no number, or a negative one.
        self._announced = int(announced) if 0 < announced < 1e9 else None
        self._period_ns = 1e9 / rate if 0 < rate < 1e6 else float(FRAME_PERIOD_NS)

    def _open(self) -> cv2.VideoCapture:
        capture = cv2.VideoCapture(str(self.path))
        if not capture.isOpened():
            raise SourceError(
                f"video '{self.path}' cannot be opened: it is damaged, truncated, or uses a codec "
                "that this build of OpenCV lacks"
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

    def _read(self, wanted: range) -> Iterator[Frame | BadFrame]:
        capture, index = self._open(), 0
        first_ms, stamp_ns = 0.0, -1
        try:
            while index < wanted.stop:
                begin_s = time.perf_counter()
                if not capture.grab():
                    break
                time_ms = capture.get(cv2.CAP_PROP_POS_MSEC)
                first_ms = time_ms if index == 0 else first_ms
                # Videos of variable frame rate have no period.
                own_ns = round((time_ms - first_ms) * 1e6)
                stamp_ns = own_ns if own_ns > stamp_ns else round(stamp_ns + self._period_ns)
                if index in wanted:
                    done, image = capture.retrieve()
                    name = f"{self.name}/{index:06d}"
                    if done and image is not None and image.ndim == 3:
                        rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
                        yield Frame(rgb, stamp_ns, name=name, decode_ms=elapsed_ms(begin_s))
                    else:
                        reason = f"video '{self.path}': frame {index} cannot be decoded"
                        yield BadFrame(name, stamp_ns, reason)
                index += 1
            announced = min(self._announced or 0, wanted.stop)
            # Containers round their length: a frame or two say nothing.
            if announced - index > max(2, announced // 50):
                self._warn_shortfall(index, announced)
        finally:
            capture.release()


def folder_images(path: Path) -> list[Path]:
    """Return the images of a folder, or of its subfolder `images`, in natural order of names.

    Hidden files are skipped. Images of other formats are reported in one warning.

    Raises:
        SourceError: no images, or links to images that do not exist.
    """
    folder = path / "images" if (path / "images").is_dir() else path
    try:
        entries = [file for file in folder.iterdir() if not file.name.startswith(".")]
    except OSError as error:
        raise SourceError(f"folder '{folder}': {error.strerror}") from error
    entries.sort(key=lambda file: natural(file.name))
    candidates = [file for file in entries if file.suffix.lower() in IMAGE_SUFFIXES]
    broken = [file.name for file in candidates if file.is_symlink() and not file.exists()]
    if broken:
        more = "" if len(broken) <= _LISTED_LINKS else f" and {len(broken) - _LISTED_LINKS} more"
        raise SourceError(
            f"folder '{folder}': expected image files, found broken links: "
            f"{', '.join(broken[:_LISTED_LINKS])}{more}"
        )
    images = [file for file in candidates if file.is_file()]
    unread = [f.suffix.lower() for f in entries if f.suffix.lower() in _UNREAD_SUFFIXES]
    unread_text = f"{len(unread)} images of other formats ({', '.join(sorted(set(unread)))})"
    if not images:
        text = f"folder '{folder}': expected images ({', '.join(IMAGE_SUFFIXES)}), found "
        text += unread_text if unread else "none"
        raise SourceError(text)
    if unread:
        _log.warning("folder '%s': left out %s", folder, unread_text)
    return images


def is_bag(path: Path) -> bool:
    """Return whether a path is a rosbag2 folder, with or without metadata, or one of its files."""
    if path.is_file():
        return path.suffix.lower() in BAG_SUFFIXES
    if (path / "metadata.yaml").is_file():
        return True
    suffixes = {f.suffix.lower() for f in path.iterdir()} if path.is_dir() else set()
    has_images = (path / "images").is_dir() or not suffixes.isdisjoint(IMAGE_SUFFIXES)
    return not has_images and not suffixes.isdisjoint(BAG_SUFFIXES)


def natural(name: str) -> tuple[list[str | int], str]:
    """Return a sort key that orders numbers in names by value: 'a2' before 'a10'."""
    pieces = re.split(r"(\d+)", name)
    return [int(p) if p.isdecimal() else p.lower() for p in pieces], name


def _folder_of(frame_name: str) -> str:
    return frame_name.rpartition("/")[0]


def _without_images(folder: Path) -> Path:
    return folder.parent if folder.name == "images" else folder


def _frame_names(files: Sequence[Path]) -> list[str]:
    """Return 'folder/file.png' of each file, with more parent folders where names would repeat."""
    folders = {folder: folder.resolve() for folder in {file.parent for file in files}}
    parts = {folder: _without_images(resolved).parts for folder, resolved in folders.items()}
    for depth in range(1, max(map(len, parts.values()), default=1) + 1):
        names = ["/".join((*parts[file.parent][-depth:], file.name)) for file in files]
        if len(set(names)) == len(names):
            return names
    repeated = Counter(names).most_common(1)[0][0]
    raise SourceError(f"image '{files[names.index(repeated)]}' is given twice")


def _read_labels(folder: Path, files: list[Path]) -> tuple[dict[str, int], dict[str, str]]:
    """Return stamps in ns and drives by file name; empty where labels.json has none.

    Raises:
        SourceError: the labels cannot be read, or only some files have a stamp.
    """
    labels = folder / "labels.json"
    if not labels.is_file():
        labels = _without_images(folder.resolve()) / "labels.json"
    if not labels.is_file():
        return {}, {}
    try:
        content = parse_json(read_file(labels))
    except (OSError, ValueError) as error:
        raise SourceError(f"labels '{labels}' cannot be read: {error}") from error
    content = content if isinstance(content, dict) else {}
    rows = {name: row for name, row in content.items() if isinstance(row, dict)}
    stamps_ns: dict[str, int] = {}
    if any("stamp_s" in row for row in rows.values()):
        for file in files:
            stamp: Any = rows.get(file.name, {}).get("stamp_s")
            if type(stamp) not in (int, float) or not abs(stamp) <= _MAX_STAMP_S:
                raise SourceError(
                    f"labels '{labels}': expected a stamp_s in seconds for '{file.name}', "
                    f"found {stamp!r}"
                )
            stamps_ns[file.name] = round(stamp * 1e9)
    named = {file.name: rows.get(file.name, {}).get("drive") for file in files}
    drives = {name: drive for name, drive in named.items() if isinstance(drive, str) and drive}
    return stamps_ns, drives if len(drives) == len(files) else {}
