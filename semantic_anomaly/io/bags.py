"""Read frames from rosbag2 bags (sqlite3 and mcap) with the rosbags library; needs no ROS."""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_anomaly.errors import ImageError, SourceError, first_line
from semantic_anomaly.io.bag_files import announced_bytes, bag_files, recorded_messages
from semantic_anomaly.io.images import decode_compressed, decode_raw
from semantic_anomaly.io.remarks import Remarks
from semantic_anomaly.io.sources import BadFrame, FrameSource
from semantic_anomaly.storage import parse_yaml, read_file
from semantic_anomaly.structures import Frame
from semantic_anomaly.timing import elapsed_ms

if TYPE_CHECKING:
    from rosbags.rosbag2 import Reader
    from rosbags.typesys.store import Typestore

IMAGE_TYPE = "sensor_msgs/msg/Image"
COMPRESSED_TYPE = "sensor_msgs/msg/CompressedImage"
# What helps, by a part of the reader's error.
_ADVICE = {
    "Profile is not ros2": "it has messages of ROS 1; convert the ROS 1 bag that it was made from: "
    "'rosbags-convert --src OLD.bag --dst NEW'",
    "Storage plugin": "storage_identifier in metadata.yaml, which 'ros2 bag reindex' may leave "
    "empty: write 'mcap' or 'sqlite3' there",
    "files are missing": "copy them there, or make metadata of the other files by 'ros2 bag "
    "reindex'",
}
_OTHER_ADVICE = (
    "damaged, truncated or no bag; 'mcap recover' may restore an mcap file, 'ros2 bag reindex' the "
    "metadata"
)
_log = logging.getLogger(__name__)


class _DamagedBagError(SourceError):
    """A bag that cannot be opened, but may be readable in the order of recording."""


class BagSource(FrameSource):
    """The images of one topic of a rosbag2 bag, in order of recording.

    A bag that is cut off, damaged or without metadata is read from its beginning up to the damage;
    `shortfall` then counts what is missing, with a warning.

    Args:
        path: bag folder, .mcap or .db3 file.
        topic: image topic, needed if the bag has several.
        selection: slice of the images to read.
        name: name of the source, instead of that of the folder or file.

    Attributes:
        topic: the image topic that is read.
        compressed: whether its type is CompressedImage.

    Raises:
        SourceError: the bag cannot be opened, has no such topic or no images, or has several image
            topics and none is chosen.
    """

    def __init__(
        self,
        path: Path,
        *,
        topic: str | None = None,
        selection: slice = slice(None),
        name: str = "",
    ) -> None:
        resolved = path.resolve()
        default = resolved.stem if path.is_file() else resolved.name
        super().__init__([path], name or default, selection)
        # Files to read in the order of recording, if the bag cannot be opened.
        self._files: tuple[Path, ...] = ()
        self._remarks = Remarks(lambda text: _log.warning("bag '%s': %s", path, text))
        try:
            topics = _announced_topics(path)
        except _DamagedBagError as error:
            self._files = bag_files(path)
            topics = self._readable_topics(error)
        self.topic = _choose_topic(path, topics, topic)
        self._type, self._count = topics[self.topic]
        self.compressed = self._type == COMPRESSED_TYPE
        if self._count < 1:
            raise SourceError(f"bag '{path}': topic '{self.topic}' has no messages")

    def _readable_topics(self, error: SourceError) -> dict[str, tuple[str, int]]:
        """Return types and numbers of the messages that can be read in the order of recording.

        Raises:
            SourceError: `error`, if no images can be read.
        """
        topics: dict[str, tuple[str, int]] = {}
        problem: SourceError | None = None
        try:
            for message in recorded_messages(self._files):
                _, count = topics.get(message.topic, ("", 0))
                topics[message.topic] = message.type_name, count + 1
        except SourceError as damage:
            problem = damage
        if not any(kind in (IMAGE_TYPE, COMPRESSED_TYPE) for kind, _ in topics.values()):
            raise error
        if problem is None:
            names = ", ".join(file.name for file in self._files)
            _log.warning("bag '%s': read without metadata and index: %s", self.path, names)
        return topics

    def stamps_ns(self) -> tuple[int, ...] | None:
        """Return the stamps of the selected images; None if a message of the bag is damaged."""
        messages = self._recorded() if self._files else self._indexed()
        stamps_ns = []
        # Damaged bags raise any kind of error.
        with suppress(Exception):
            for time_ns, raw in messages:
                # Both types begin with their stamp, behind four bytes of encapsulation.
                order = "<" if raw[1] & 1 else ">"
                sec, nanosec = struct.unpack_from(f"{order}iI", raw, 4)
                stamps_ns.append(sec * 1_000_000_000 + nanosec or time_ns)
            return tuple(stamps_ns[self.selection])
        return None

    def _total(self, *, exact: bool) -> int:
        return self._count

    def _read(self, wanted: range) -> Iterator[Frame | BadFrame]:
        found, problem = 0, ""
        messages = self._recorded() if self._files else self._indexed()
        while True:
            try:
                item = next(messages, None)
            # Damaged bags raise any kind of error.
            except Exception as error:
                problem = first_line(error)
                break
            if item is None:
                break
            if found in wanted:
                yield self._frame(found, *item)
            found += 1
            if wanted.stop < self._count and found >= wanted.stop:
                return
        expected = self._expected(found, problem)
        if found == expected:
            return
        if not found and not self._files:
            # Such as an mcap file with a summary and without a message index.
            self._files = bag_files(self.path)
            with suppress(SourceError):
                if any(True for _ in self._recorded()):
                    names = ", ".join(file.name for file in self._files)
                    _log.warning("bag '%s': read without message index: %s", self.path, names)
                    yield from self._read(wanted)
                    return
            self._files = ()
        if not found or (expected is not None and found > expected):
            reason = f" ({problem})" if problem else ""
            raise SourceError(
                f"bag '{self.path}' is damaged: {found} of {expected} messages of topic "
                f"'{self.topic}' could be read{reason}; 'mcap recover' writes an mcap file with a "
                "new message index, 'ros2 bag reindex' new metadata"
            )
        announced = None if expected is None else min(expected, wanted.stop)
        self._warn_shortfall(found, announced, problem)

    def _expected(self, found: int, problem: str) -> int | None:
        """Return how many images were recorded, None if that is not known."""
        if not self._files:
            return self._count
        if not problem:
            return found
        announced = _count_in_metadata(self.path, self.topic)
        if announced is None and len(self._files) == 1 and self._files[0].suffix == ".db3":
            # Of a database that was cut off, by its size.
            there = self._files[0].stat().st_size
            announced = round(found * announced_bytes(self._files[0]) / there)
        return announced if announced is not None and announced > found else None

    def _indexed(self) -> Iterator[tuple[int, Any]]:
        """Yield recording time in ns and serialized message."""
        with _opened(self.path) as reader:
            for _, time_ns, raw in reader.messages(reader.topics[self.topic].connections):
                yield time_ns, raw

    def _recorded(self) -> Iterator[tuple[int, Any]]:
        """Yield the same without metadata and index."""
        for message in recorded_messages(self._files):
            if (message.topic, message.type_name) == (self.topic, self._type):
                yield message.time_ns, message.data

    def _frame(self, index: int, bag_time_ns: int, raw: Any) -> Frame | BadFrame:
        stamp_ns, name = bag_time_ns, f"{self.name}/{index:06d}"
        begin_s = time.perf_counter()
        try:
            message = self._message(raw)
            stamp = message.header.stamp
            stamp_ns = stamp.sec * 1_000_000_000 + stamp.nanosec or bag_time_ns
            if self.compressed:
                image = decode_compressed(message.data, message.format)
            else:
                size = message.height, message.width, message.step
                image = decode_raw(
                    message.encoding, *size, bool(message.is_bigendian), message.data
                )
        except ImageError as error:
            reason = f"bag '{self.path}', topic '{self.topic}', image {index}: {error}"
            return BadFrame(name, stamp_ns, reason)
        decode_ms = elapsed_ms(begin_s)
        if self.compressed:
            self._remarks.on_compressed(message.data)
        else:
            self._remarks.on_raw(message.encoding, *size, message.data)
        return Frame(image, stamp_ns, message.header.frame_id, name, decode_ms)

    def _message(self, raw: Any) -> Any:
        try:
            return _typestore().deserialize_cdr(raw, self._type)
        # Damaged messages raise any kind of error.
        except Exception as error:
            raise ImageError(f"the message is damaged ({first_line(error)})") from error


def _announced_topics(path: Path) -> dict[str, tuple[str, int]]:
    """Return types and numbers of messages that a bag announces, by topic."""
    with _opened(path) as reader:
        return {
            name: (info.msgtype or "several types", info.msgcount)
            for name, info in reader.topics.items()
        }


def _count_in_metadata(path: Path, topic: str) -> int | None:
    """Return the number of messages of a topic by metadata.yaml, None if there is none."""
    try:
        content = parse_yaml(read_file(path / "metadata.yaml"))
        rows = content["rosbag2_bagfile_information"]["topics_with_message_count"]
        counts = {row["topic_metadata"]["name"]: int(row["message_count"]) for row in rows}
        return counts.get(topic)
    # Metadata may be damaged too.
    except Exception:
        return None


@contextmanager
def _opened(path: Path) -> Iterator[Reader]:
    try:
        from rosbags.rosbag2 import Reader
    except ImportError as error:
        raise SourceError(f"bag '{path}': reading bags needs the package 'rosbags'") from error
    try:
        _check_metadata(path)
        _check_databases(path)
        reader = Reader(path)
        reader.open()
    except SourceError as error:
        raise type(error)(f"bag '{path}': {error}") from error
    except Exception as error:
        problem = first_line(error)
        known = next((text for part, text in _ADVICE.items() if part in problem), "")
        text = f"bag '{path}' cannot be opened ({problem}): {known or _OTHER_ADVICE}"
        raise (SourceError if known else _DamagedBagError)(text) from error
    try:
        yield reader
    finally:
        with suppress(Exception):
            reader.close()


def _check_metadata(path: Path) -> None:
    # The reader of rosbags expands whatever the file repeats.
    metadata = path / "metadata.yaml"
    if metadata.is_file():
        parse_yaml(read_file(metadata))


def _check_databases(path: Path) -> None:
    for file in path.glob("*.db3") if path.is_dir() else [path] * (path.suffix == ".db3"):
        # rosbags reads only the database, not messages that a killed recorder left in a journal.
        for journal in (Path(f"{file}-wal"), Path(f"{file}-journal")):
            if journal.is_file() and journal.stat().st_size:
                raise SourceError(
                    f"the recorder did not finish: {journal.name} has messages; "
                    f"'sqlite3 {file.name} \"PRAGMA wal_checkpoint\"' moves them into the database"
                )
        announced = announced_bytes(file)
        # SQLite reads missing bytes of the last page as zeros: black pixels, and no error.
        if file.stat().st_size < announced:
            raise _DamagedBagError(
                f"{file.name} is truncated: expected {announced} bytes, found {file.stat().st_size}"
            )


@lru_cache(maxsize=1)
def _typestore() -> Typestore:
    from rosbags.typesys import Stores, get_typestore

    # Image and CompressedImage are the same in every ROS 2 distribution, so the type definitions in
    # the bag are not needed.
    return get_typestore(Stores.ROS2_HUMBLE)


def _choose_topic(path: Path, topics: Mapping[str, tuple[str, int]], wanted: str | None) -> str:
    images = {n: t for n, t in topics.items() if t[0] in (IMAGE_TYPE, COMPRESSED_TYPE)}
    if not images:
        raise SourceError(f"bag '{path}' has no image topic; its topics: {_listed(topics)}")
    if wanted is None and len(images) == 1:
        return next(iter(images))
    if wanted is None:
        problem = "has several image topics, choose one"
    elif wanted in images:
        return wanted
    elif wanted in topics:
        expected = f"{IMAGE_TYPE} or {COMPRESSED_TYPE}"
        problem = f"topic '{wanted}' is of type {topics[wanted][0]}, expected {expected}"
    else:
        problem = f"has no topic '{wanted}'"
    raise SourceError(f"bag '{path}': {problem}; image topics: {_listed(images)}")


def _listed(topics: Mapping[str, tuple[str, int]]) -> str:
    rows = (f"{n} ({kind}, {count} messages)" for n, (kind, count) in sorted(topics.items()))
    return ", ".join(rows) or "none"
