"""Bags with a few small images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rosbags.rosbag2 import CompressionFormat, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from semantic_anomaly.io.bags import COMPRESSED_TYPE, IMAGE_TYPE
from semantic_anomaly.io.images import encode_png

STORE = get_typestore(Stores.ROS2_JAZZY)
STORAGES = {"mcap": StoragePlugin.MCAP, "sqlite3": StoragePlugin.SQLITE3}
# Seconds of the stamp of the first image; a second apart.
FIRST_S = 100
START_NS = 1_700_000_000_000_000_000
RAW, COMPRESSED = "/camera/image_raw", "/camera/image_raw/compressed"


def rgb(index: int) -> np.ndarray:
    """Return a picture whose colour tells its number and the order of its channels."""
    return np.full((24, 32, 3), (index, 100, 200), np.uint8)


def header(index: int, *, stamped: bool = True) -> Any:
    time = STORE.types["builtin_interfaces/msg/Time"]
    stamp = time(FIRST_S + index, 5) if stamped else time(0, 0)
    return STORE.types["std_msgs/msg/Header"](stamp, "camera_optical")


def raw(index: int, **changes: object) -> Any:
    fields = {"height": 24, "width": 32, "encoding": "bgr8", "is_bigendian": 0, "step": 96}
    data = np.ascontiguousarray(rgb(index)[..., ::-1]).reshape(-1)
    return STORE.types[IMAGE_TYPE](**{"header": header(index), "data": data, **fields, **changes})


def compressed(index: int, content: bytes | None = None, form: str = "png") -> Any:
    data = np.frombuffer(encode_png(rgb(index)) if content is None else content, np.uint8)
    return STORE.types[COMPRESSED_TYPE](header(index), form, data)


def text(words: str) -> Any:
    return STORE.types["std_msgs/msg/String"](words)


def write_bag(
    path: Path, topics: dict[str, Sequence[Any]], storage: str = "mcap", compression: Any = None
) -> Path:
    """Write a bag with one message a topic every 100 ms."""
    writer = Writer(path, version=9, storage_plugin=STORAGES[storage])
    if compression:
        writer.set_compression(compression, CompressionFormat.ZSTD)
    with writer:
        for topic, messages in topics.items():
            kind = messages[0].__msgtype__ if messages else IMAGE_TYPE
            connection = writer.add_connection(topic, kind, typestore=STORE)
            for index, message in enumerate(messages):
                data = STORE.serialize_cdr(message, kind)
                writer.write(connection, START_NS + index * 100_000_000, data)
    return path


def data_file(bag: Path) -> Path:
    (file,) = (f for f in bag.iterdir() if f.name != "metadata.yaml")
    return file
