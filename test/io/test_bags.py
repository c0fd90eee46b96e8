from __future__ import annotations

import itertools
import os
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rosbags.rosbag2 import CompressionMode
from worlds.bags import (
    COMPRESSED,
    RAW,
    START_NS,
    STORAGES,
    compressed,
    data_file,
    header,
    raw,
    rgb,
    text,
    write_bag,
)

from semantic_anomaly.errors import ImageError, SourceError
from semantic_anomaly.io.bags import COMPRESSED_TYPE, IMAGE_TYPE, BagSource
from semantic_anomaly.io.images import encode_jpeg, encode_png
from semantic_anomaly.io.open import open_source

REAL_BAG = Path(os.environ.get("SEMANTIC_ANOMALY_DATA", ""), "carla_drives/spawn_props_bag")


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("kind", ["raw", "compressed"])
@pytest.mark.parametrize("storage", STORAGES)
def test_images_come_back_as_they_were_recorded(
    tmp_path: Path, storage: str, kind: str, bare: bool
) -> None:
    choices: dict[str, Any] = {"raw": (raw, RAW), "compressed": (compressed, COMPRESSED)}
    make, topic = choices[kind]
    other = {"/words": [text("other")] * 3}
    bag = write_bag(tmp_path / "drive", {topic: [make(n) for n in range(12)], **other}, storage)
    source = open_source(data_file(bag) if bare else bag)
    assert isinstance(source, BagSource)
    assert (source.topic, source.compressed) == (topic, kind == "compressed")
    assert source.count == 12
    for _ in range(2):
        frames = list(source)
        assert [frame.name for frame in frames] == [f"drive/{n:06d}" for n in range(12)]
        for index, frame in enumerate(frames):
            np.testing.assert_array_equal(frame.image, rgb(index))
            assert frame.stamp_ns == (100 + index) * 1_000_000_000 + 5
            assert frame.frame_id == "camera_optical"


@pytest.mark.parametrize(
    ("storage", "mode"),
    [("mcap", CompressionMode.FILE), ("mcap", CompressionMode.STORAGE),
     ("sqlite3", CompressionMode.MESSAGE), ("sqlite3", CompressionMode.FILE)],
)  # fmt: skip
def test_compressed_bags_are_read(tmp_path: Path, storage: str, mode: CompressionMode) -> None:
    bag = write_bag(tmp_path / "drive", {RAW: [raw(n) for n in range(3)]}, storage, mode)
    assert [int(frame.image[0, 0, 0]) for frame in open_source(bag)] == [0, 1, 2]


def test_selections_mean_what_python_slices_mean(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "drive", {RAW: [raw(n) for n in range(6)]})
    for selection in ("0:4", "4:", "::3", "-3:", ":-3", "1:100:2", "5:6"):
        expected = range(6)[slice(*(int(p) if p else None for p in selection.split(":")))]
        source = open_source(f"{bag}[{selection}]")
        assert source.count == len(expected)
        assert [frame.name for frame in source] == [f"drive/{n:06d}" for n in expected], selection


def test_images_without_a_stamp_get_the_recording_time(tmp_path: Path) -> None:
    messages = [raw(n, header=header(n, stamped=False)) for n in range(2)]
    bag = write_bag(tmp_path / "drive", {RAW: messages})
    assert [frame.stamp_ns for frame in open_source(bag)] == [START_NS, START_NS + 100_000_000]


def test_a_jpeg_topic_is_rgb_whatever_the_source_encoding(tmp_path: Path) -> None:
    content = encode_jpeg(rgb(10), 98)
    names = ["jpeg", "bgr8; jpeg compressed bgr8", "rgb8; jpeg compressed bgr8"]
    bag = write_bag(tmp_path / "drive", {COMPRESSED: [compressed(0, content, n) for n in names]})
    for frame in open_source(bag):
        assert np.abs(frame.image.astype(int) - rgb(10)).max() <= 4


@pytest.fixture
def several(tmp_path: Path) -> Path:
    images = {RAW: [raw(0)], COMPRESSED: [compressed(0)] * 2, "/still": []}
    return write_bag(tmp_path / "drive", {**images, "/words": [text("other")]})


def test_a_topic_is_chosen_by_name(several: Path) -> None:
    assert open_source(several, topic=RAW).count == 1
    assert open_source(several, topic=COMPRESSED).count == 2


LISTED = (
    f"image topics: {RAW} \\({IMAGE_TYPE}, 1 messages\\), {COMPRESSED} "
    f"\\({COMPRESSED_TYPE}, 2 messages\\), /still \\({IMAGE_TYPE}, 0 messages\\)$"
)


@pytest.mark.parametrize(
    ("topic", "found"),
    [
        (None, f"several image topics, choose one; {LISTED}"),
        ("/camera/image", f"has no topic '/camera/image'; {LISTED}"),
        ("", f"has no topic ''; {LISTED}"),
        ("/words", f"topic '/words' is of type std_msgs/msg/String, expected .*; {LISTED}"),
        ("/still", "topic '/still' has no messages$"),
    ],
)
def test_other_topics_are_refused_with_the_available_ones(
    several: Path, topic: str | None, found: str
) -> None:
    with pytest.raises(SourceError, match=found):
        open_source(several, topic=topic)


def test_a_bag_without_images_is_refused(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "drive", {"/words": [text("other")]})
    for topic in (None, RAW):
        with pytest.raises(SourceError, match=r"has no image topic; its topics: /words \(std_msgs"):
            open_source(bag, topic=topic)
    empty = write_bag(tmp_path / "empty", {})
    with pytest.raises(SourceError, match="has no image topic; its topics: none"):
        open_source(empty)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_truncated_bag_is_refused(tmp_path: Path, storage: str) -> None:
    bag = write_bag(tmp_path / "drive", {RAW: [raw(n) for n in range(20)]}, storage)
    file = data_file(bag)
    for share in (0.999, 0.5, 0.01, 0.0):
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
        for path in (bag, file):
            with pytest.raises(SourceError, match=r"cannot be opened .*mcap recover|is truncated"):
                list(open_source(path))


def test_messages_lost_in_the_middle_are_noticed(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "drive", {RAW: [raw(n) for n in range(10)]}, "sqlite3")
    with sqlite3.connect(data_file(bag)) as database:
        database.execute("DELETE FROM messages WHERE id IN (7, 8)")
    database.close()
    frames = iter(open_source(bag))
    assert len(list(itertools.islice(frames, 8))) == 8
    with pytest.raises(SourceError, match="is damaged: 8 of 10 messages of topic '/camera/im"):
        next(frames)
    # What lies before the end of a selection is all that a selection needs.
    assert len(list(open_source(f"{bag}[:5]"))) == 5


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [("message_count: 6", "message_count: 4", "6 of 4"), (IMAGE_TYPE, COMPRESSED_TYPE, "0 of 6")],
)
def test_metadata_of_another_bag_are_noticed(
    tmp_path: Path, old: str, new: str, found: str
) -> None:
    bag = write_bag(tmp_path / "drive", {RAW: [raw(n) for n in range(6)]})
    metadata = (bag / "metadata.yaml").read_text()
    (bag / "metadata.yaml").write_text(metadata.replace(old, new))
    for selection in ("", "[-2:]"):
        with pytest.raises(SourceError, match=f"is damaged: {found} messages"):
            list(open_source(f"{bag}{selection}"))


@pytest.mark.parametrize("content", ["", "{", "rosbag2_bagfile_information: 5", "a: 1"])
def test_damaged_metadata_is_refused(tmp_path: Path, content: str) -> None:
    bag = write_bag(tmp_path / "drive", {RAW: [raw(0)]})
    (bag / "metadata.yaml").write_text(content)
    with pytest.raises(SourceError, match="drive' cannot be opened"):
        open_source(bag)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("storage_identifier: mcap", 'storage_identifier: ""', "write 'mcap' or 'sqlite3' there"),
        ("storage_identifier: mcap", "storage_identifier:", "write 'mcap' or 'sqlite3' there"),
        (
            "- drive.mcap",
            "- drive.mcap\n  - drive_1.mcap",
            r"are missing: .*drive_1\.mcap.*copy them",
        ),
    ],
)
def test_metadata_that_cannot_be_followed_say_what_to_do(
    tmp_path: Path, old: str, new: str, text: str
) -> None:
    bag = write_bag(tmp_path / "drive", {RAW: [raw(0)]})
    metadata = (bag / "metadata.yaml").read_text()
    assert old in metadata
    (bag / "metadata.yaml").write_text(metadata.replace(old, new))
    with pytest.raises(SourceError, match=text):
        open_source(bag)


def test_bags_of_ros_1_and_packed_bags_say_what_to_do(tmp_path: Path) -> None:
    content = b"\x89MCAP0\r\n\x01" + (12).to_bytes(8, "little") + b"\x04\0\0\0ros1\0\0\0\0"
    for name, expected in {
        "old.bag": "is a ROS 1 bag; 'rosbags-convert --src .*old.bag --dst .*old'",
        "new.mcap": "has messages of ROS 1; convert the ROS 1 bag",
        "whole.mcap.zstd": "is compressed as a file: unpack it",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SourceError, match=expected):
            open_source(tmp_path / name)


def test_metadata_that_expand_without_a_limit_are_refused(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "drive", {RAW: [raw(0)]})
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 60)]
    (bag / "metadata.yaml").write_text("\n".join(lines))
    with pytest.raises(SourceError, match=r"drive' cannot be opened .*merge key"):
        open_source(bag)


def test_negative_numbers_of_messages_are_none(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "drive", {RAW: [raw(0)]})
    metadata = bag / "metadata.yaml"
    metadata.write_text(metadata.read_text().replace("message_count: 1", "message_count: -1"))
    with pytest.raises(SourceError, match="has no messages"):
        open_source(bag)


def test_a_damaged_message_is_named(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "drive", {RAW: [raw(n) for n in range(4)]}, "sqlite3")
    with sqlite3.connect(data_file(bag)) as database:
        database.execute("UPDATE messages SET data = substr(data, 1, 60) WHERE id = 3")
    database.close()
    frames = iter(open_source(bag))
    next(frames), next(frames)
    with pytest.raises(SourceError, match="is damaged: message 2 of 4 of topic '/camera/image_raw"):
        next(frames)


@pytest.mark.parametrize(
    ("topic", "bad", "found"),
    [
        (RAW, raw(1, step=90), "expected a step of at least 96 bytes, found 90"),
        (RAW, raw(1, encoding="h264"), "encoding 'h264' is not supported"),
        (COMPRESSED, compressed(1, encode_png(rgb(1))[:-9]), "PNG image is truncated"),
        (COMPRESSED, compressed(1, form="16UC1; compressedDepth png"), "found a depth image"),
    ],
)
def test_an_image_that_cannot_be_decoded_is_named(
    tmp_path: Path, topic: str, bad: object, found: str
) -> None:
    good = raw(0) if topic == RAW else compressed(0)
    bag = write_bag(tmp_path / "drive", {topic: [good, bad, good]})
    frames = iter(open_source(bag))
    assert next(frames).name == "drive/000000"
    with pytest.raises(ImageError, match=rf"bag '.*drive', topic '{topic}', image 1: .*{found}"):
        next(frames)
    # Where some may be bad, it is named and the rest is read.
    source = open_source(bag)
    source.max_bad_share = 0.1
    assert [frame.name for frame in source] == ["drive/000000", "drive/000002"]
    (bad_frame,) = source.bad_frames
    assert bad_frame.name == "drive/000001" and bad_frame.stamp_ns
    assert found in bad_frame.reason and "1 bad frames (drive/000001" in source.losses
    # An image that is not wanted is not decoded.
    assert len(list(open_source(f"{bag}[::2]"))) == 2


@pytest.mark.parametrize("kind", ["wal", "journal"])
def test_a_journal_left_by_a_killed_recorder_is_refused(tmp_path: Path, kind: str) -> None:
    bag = write_bag(tmp_path / "drive", {RAW: [raw(n) for n in range(3)]}, "sqlite3")
    journal = Path(f"{data_file(bag)}-{kind}")
    journal.write_bytes(b"")
    assert len(list(open_source(bag))) == 3
    journal.write_bytes(b"messages")
    for path in (bag, bag / "drive.db3"):
        with pytest.raises(SourceError, match=rf"recorder did not finish: drive\.db3-{kind}"):
            open_source(path)


def test_a_database_that_lacks_a_byte_is_refused(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "drive", {RAW: [raw(n) for n in range(9)]}, "sqlite3")
    content = data_file(bag).read_bytes()
    data_file(bag).write_bytes(content[:-1])
    with pytest.raises(
        SourceError, match=f"truncated: expected {len(content)} bytes, found {len(content) - 1}"
    ):
        open_source(bag)


def test_random_damage_raises_only_input_errors(tmp_path: Path, rng: np.random.Generator) -> None:
    for storage in STORAGES:
        bag = write_bag(tmp_path / storage, {RAW: [raw(n) for n in range(5)]}, storage)
        file, content = data_file(bag), np.fromfile(data_file(bag), np.uint8)
        for _ in range(15):
            damaged = content.copy()
            damaged[rng.integers(0, len(content), 30)] = rng.integers(0, 256, 30)
            file.write_bytes(damaged.tobytes())
            try:
                assert len(list(open_source(bag))) == 5
            except (SourceError, ImageError):
                continue


@pytest.mark.skipif(not REAL_BAG.is_dir(), reason="SEMANTIC_ANOMALY_DATA has no such bag")
def test_a_real_bag_is_read() -> None:
    frame, last = open_source(f"{REAL_BAG}[138:]")
    assert last.stamp_ns - START_NS == 13_900_000_000
    assert (frame.image_hw, frame.frame_id) == ((540, 960), "camera_front_optical")
    # The sky is blue: the channels are in order.
    top = frame.image[:60].reshape(-1, 3).mean(axis=0)
    assert top[2] > top[0]
