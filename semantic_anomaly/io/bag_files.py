"""Read the files of a rosbag2 bag in the order of recording, up to where they are damaged.

Neither metadata nor the index at the end of a file are needed: a recorder writes them last, and a
loss of power leaves a bag without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from semantic_anomaly.errors import SourceError, first_line
from semantic_anomaly.io.sources import BAG_SUFFIXES, natural

# Recorders write chunks of about a megabyte, or of one large message.
_MOST_CHUNK_BYTES = 2**30
_HEADER_BYTES = 100


class RecordedMessage(NamedTuple):
    """A message as recorded: its topic and type, recording time in ns and CDR bytes."""

    topic: str
    type_name: str
    time_ns: int
    data: bytes


def bag_files(path: Path) -> tuple[Path, ...]:
    """Return the files of a bag in the order of their names; of one file, itself."""
    if not path.is_dir():
        return (path,)
    files = [file for file in path.iterdir() if file.suffix.lower() in BAG_SUFFIXES]
    return tuple(sorted(files, key=lambda file: natural(file.name)))


def recorded_messages(files: Sequence[Path]) -> Iterator[RecordedMessage]:
    """Yield the messages of the files of a bag, one file after the other.

    Raises:
        SourceError: where the first damaged file ends; no later file is read.
    """
    for file in files:
        read = _of_mcap if file.suffix.lower() == ".mcap" else _of_database
        try:
            yield from read(file)
        except SourceError:
            raise
        # Damaged files raise any kind of error.
        except Exception as error:
            raise SourceError(f"{file.name} is cut off or damaged ({first_line(error)})") from error


def announced_bytes(database: Path) -> int:
    """Return the size that a sqlite3 file should have by its header, 0 if it has none."""
    with database.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    if len(head) < _HEADER_BYTES or not head.startswith(b"SQLite format 3\0"):
        return 0
    return _page_bytes(head) * int.from_bytes(head[28:32], "big")


def _page_bytes(head: bytes) -> int:
    size = int.from_bytes(head[16:18], "big")
    return 65536 if size == 1 else size


def _of_mcap(path: Path) -> Iterator[RecordedMessage]:
    from mcap.records import Channel, Chunk, Message, Schema
    from mcap.stream_reader import StreamReader, breakup_chunk

    types: dict[int, str] = {}
    channels: dict[int, Channel] = {}
    with path.open("rb") as file:
        # No record is larger than its file.
        limit = path.stat().st_size
        stream = StreamReader(file, emit_chunks=True, record_size_limit=limit)
        for record in stream.records:
            records: Sequence[Any] = [record]
            if isinstance(record, Chunk):
                _check_chunk(record)
                records = breakup_chunk(record, validate_crc=True)
            for item in records:
                if isinstance(item, Schema):
                    types[item.id] = item.name
                elif isinstance(item, Channel):
                    channels[item.id] = item
                elif isinstance(item, Message):
                    channel = channels[item.channel_id]
                    if channel.message_encoding == "cdr":
                        name = types.get(channel.schema_id, "")
                        yield RecordedMessage(channel.topic, name, item.log_time, item.data)


def _check_chunk(chunk: Any) -> None:
    """Refuse a chunk that would take too much memory, before it is decompressed."""
    sizes = [chunk.uncompressed_size]
    if chunk.compression == "zstd":
        import zstandard

        # The decompressor believes the frame, not the chunk; -1: the frame does not say.
        sizes.append(zstandard.frame_content_size(chunk.data))
    if max(sizes) > _MOST_CHUNK_BYTES:
        raise ValueError(
            f"expected chunks of at most {_MOST_CHUNK_BYTES} bytes, found {max(sizes)}"
        )


def _of_database(path: Path) -> Iterator[RecordedMessage]:
    import apsw

    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    if len(head) < _HEADER_BYTES:
        raise ValueError(f"expected a header of {_HEADER_BYTES} bytes, found {len(head)}")
    is_cut = path.stat().st_size < announced_bytes(path)
    flags = apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI
    connection = apsw.Connection(
        f"{path.absolute().as_uri()}?immutable=1", flags=flags, vfs=_whole_pages(_page_bytes(head))
    )
    try:
        # SQLite refuses a file with fewer pages than its header says, unless it is told to repair.
        connection.execute("PRAGMA writable_schema=ON")
        topics = {
            number: (name, type_name)
            for number, name, type_name in connection.execute(
                "SELECT id, name, type FROM topics WHERE serialization_format = 'cdr'"
            )
        }
        # By the table: its index lies behind the messages.
        rows = connection.execute(
            "SELECT topic_id, timestamp, data FROM messages NOT INDEXED ORDER BY id"
        )
        for number, time_ns, data in rows:
            if number in topics:
                yield RecordedMessage(*topics[number], time_ns, data)
    finally:
        connection.close()
    if is_cut:
        raise ValueError(f"expected {announced_bytes(path)} bytes, found {path.stat().st_size}")


@lru_cache(maxsize=8)
def _whole_pages(page_bytes: int) -> str:
    """Return the name of an SQLite file system that hides the part of a page at the end of a file.

    SQLite would read the missing bytes of that page as zeros: black pixels, and no error.
    """
    import apsw

    class File(apsw.VFSFile):
        def xFileSize(self) -> int:  # noqa: N802
            size: int = super().xFileSize()
            return size - size % page_bytes

    class FileSystem(apsw.VFS):
        def xOpen(self, name: Any, flags: list[int]) -> Any:  # noqa: N802
            return File("", name, flags)

    name = f"whole_pages_{page_bytes}"
    _file_systems.append(FileSystem(name, ""))
    return name


# SQLite holds no reference to them.
_file_systems: list[Any] = []
