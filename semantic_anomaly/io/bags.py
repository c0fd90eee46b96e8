"""Read frames from rosbag2 bags (sqlite3 and mcap) with the rosbags library; needs no ROS."""

from __future__ import annotations

import itertools
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_anomaly.errors import ImageError, SourceError, first_line
from semantic_anomaly.io.images import decode_compressed, decode_raw
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


class BagSource(FrameSource):
    """The images of one topic of a rosbag2 bag, in order of recording.

    Iterating raises SourceError at the end if the number of images read differs from the number
    that the bag announces: an index built from half a drive would look like any other.

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
        with _opened(path) as reader:
            topics = {
                name: (info.msgtype or "several types", info.msgcount)
                for name, info in reader.topics.items()
            }
        self.topic = _choose_topic(path, topics, topic)
        self._type, self._announced = topics[self.topic]
        self.compressed = self._type == COMPRESSED_TYPE
        if self._announced < 1:
            raise SourceError(f"bag '{path}': topic '{self.topic}' has no messages")

    def _total(self, *, exact: bool) -> int:
        return self._announced

    def _read(self, wanted: range) -> Iterator[Frame | BadFrame]:
        index = -1
        for index, (bag_time_ns, message) in enumerate(self._messages(wanted)):
            if message is not None:
                yield self._frame(index, bag_time_ns, message)
            if wanted.stop < self._announced and index + 1 >= wanted.stop:
                return
        if index + 1 != self._announced:
            raise SourceError(
                f"bag '{self.path}' is damaged: {index + 1} of {self._announced} messages of "
                f"topic '{self.topic}' could be read; 'mcap recover' writes an mcap file with a "
                "new message index, 'ros2 bag reindex' new metadata"
            )

    def _messages(self, wanted: range) -> Iterator[tuple[int, Any]]:
        """Yield recording time in ns and message, None for messages that are not wanted."""
        with _opened(self.path) as reader:
            stream = reader.messages(reader.topics[self.topic].connections)
            for index in itertools.count():
                try:
                    item = next(stream, None)
                    if item is None:
                        return
                    _, bag_time_ns, raw = item
                    wants = index in wanted
                    message = _typestore().deserialize_cdr(raw, self._type) if wants else None
                # Damaged bags raise any kind of error.
                except Exception as error:
                    raise SourceError(
                        f"bag '{self.path}' is damaged: message {index} of {self._announced} of "
                        f"topic '{self.topic}' cannot be read ({first_line(error)})"
                    ) from error
                yield bag_time_ns, message

    def _frame(self, index: int, bag_time_ns: int, message: Any) -> Frame | BadFrame:
        stamp = message.header.stamp
        stamp_ns = stamp.sec * 1_000_000_000 + stamp.nanosec or bag_time_ns
        name = f"{self.name}/{index:06d}"
        begin_s = time.perf_counter()
        try:
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
        return Frame(image, stamp_ns, message.header.frame_id, name, decode_ms)


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
        raise SourceError(f"bag '{path}': {error}") from error
    except Exception as error:
        problem = first_line(error)
        advice = next((text for part, text in _ADVICE.items() if part in problem), _OTHER_ADVICE)
        raise SourceError(f"bag '{path}' cannot be opened ({problem}): {advice}") from error
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
        with file.open("rb") as database:
            head = database.read(100)
        page_bytes, pages = struct.unpack_from(">H10xI", head, 16)
        announced = (65536 if page_bytes == 1 else page_bytes) * pages
        # SQLite reads missing bytes of the last page as zeros: black pixels, and no error.
        if file.stat().st_size < announced:
            raise SourceError(
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
