from __future__ import annotations

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
from semantic_anomaly.io.bag_files import bag_files, recorded_messages
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
        assert source.stamps_ns() == tuple(frame.stamp_ns for frame in source)


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


LARGE = {"height": 90, "width": 120, "step": 360}


def large(index: int) -> Any:
    """Return an image of which a chunk holds about 30."""
    return raw(index, data=np.full(90 * 360, index, np.uint8), **LARGE)


def cut(bag: Path, share: float) -> None:
    file = data_file(bag)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


@pytest.mark.parametrize("with_metadata", [True, False])
@pytest.mark.parametrize("compression", [None, CompressionMode.STORAGE])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_bag_that_was_cut_off_is_read_up_to_there(
    tmp_path: Path,
    storage: str,
    compression: CompressionMode | None,
    with_metadata: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if compression and storage == "sqlite3":
        pytest.skip("sqlite3 has no compression of storage")
    topics = {RAW: [large(n) for n in range(120)], "/words": [text("other")] * 120}
    before, bag = 120, write_bag(tmp_path / "drive", topics, storage, compression)
    if not with_metadata:
        (bag / "metadata.yaml").unlink()
    for share in (0.999, 0.8, 0.5):
        cut(bag, share)
        caplog.clear()
        source = open_source(bag, topic=RAW)
        count = source.count
        assert count is not None and 0 < count <= before < 121
        before = count
        for _ in range(2):
            frames = list(source)
            assert [int(frame.image[0, 0, 0]) for frame in frames] == [*range(count)]
            # The last image is complete, too.
            assert all((f.image == f.image[0, 0, 0]).all() for f in frames)
            assert frames[-1].stamp_ns == (100 + count - 1) * 10**9 + 5
        if count == 120:
            # Only the index behind the messages is lost.
            continue
        if with_metadata:
            assert source.shortfall == 120 - count
            expected = f"{count} of about 120 frames could be read"
        elif storage == "sqlite3":
            assert source.shortfall is not None and abs(source.shortfall - 120 + count) < 60
            expected = f"{count} of about"
        else:
            assert source.shortfall is None
            expected = f"{count} of an unknown number of frames could be read"
        assert expected in caplog.text and data_file(bag).name in caplog.text
        assert "frames fewer than" in source.losses or "all frames after" in source.losses
        # Selections count in what can be read.
        assert [f.name for f in open_source(f"{bag}[-2:]", topic=RAW)] == [
            f"drive/{n:06d}" for n in (count - 2, count - 1)
        ]
        complete = open_source(f"{bag}[:5]", topic=RAW)
        assert len(list(complete)) == 5 and complete.losses == ""
    assert before < 120


@pytest.mark.parametrize("storage", STORAGES)
def test_a_bag_of_which_nothing_can_be_read_is_refused(tmp_path: Path, storage: str) -> None:
    bag = write_bag(tmp_path / "drive", {RAW: [raw(n) for n in range(20)]}, storage)
    file = data_file(bag)
    for share in (0.05, 0.01, 0.0):
        cut(bag, share)
        for path in (bag, file):
            with pytest.raises(SourceError, match=r"cannot be opened .*mcap recover|is truncated"):
                list(open_source(path))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_bag_without_metadata_is_read_file_by_file(
    tmp_path: Path, storage: str, caplog: pytest.LogCaptureFixture
) -> None:
    bag = write_bag(tmp_path / "drive_0", {RAW: [raw(n) for n in range(3)]}, storage)
    more = write_bag(tmp_path / "drive_1", {RAW: [raw(n) for n in range(3, 5)]}, storage)
    data_file(more).rename(bag / data_file(more).name)
    (bag / "metadata.yaml").unlink()
    source = open_source(bag)
    assert [int(frame.image[0, 0, 0]) for frame in source] == [0, 1, 2, 3, 4]
    assert (source.count, source.losses) == (5, "")
    assert "read without metadata and index: drive_0." in caplog.text
    first = min(bag.iterdir())
    first.write_bytes(first.read_bytes()[:-200])
    # What follows the damage may be another part of the drive.
    source = open_source(bag)
    assert len(list(source)) <= 3 and source.losses


def test_a_folder_of_images_with_a_bag_in_it_stays_one(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "drive", {RAW: [raw(0)]})
    (bag / "metadata.yaml").unlink()
    (bag / "00.png").write_bytes(encode_png(rgb(7)))
    assert [frame.name for frame in open_source(bag)] == ["drive/00.png"]


@pytest.mark.parametrize("storage", STORAGES)
def test_a_bag_damaged_in_the_middle_is_read_up_to_there(
    tmp_path: Path, storage: str, caplog: pytest.LogCaptureFixture
) -> None:
    topics = {RAW: [large(n) for n in range(120)]}
    compression = CompressionMode.STORAGE if storage == "mcap" else None
    bag = write_bag(tmp_path / "drive", topics, storage, compression)
    content = bytearray(data_file(bag).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8192] = bytes(8192)
    data_file(bag).write_bytes(content)
    source = open_source(bag)
    frames = list(source)
    assert [int(frame.image[0, 0, 0]) for frame in frames] == [*range(len(frames))]
    assert 0 < len(frames) < 120 and source.shortfall == 120 - len(frames)
    assert f"{len(frames)} of about 120 frames could be read" in caplog.text


def test_an_unknown_type_in_a_bag_does_not_matter(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "drive", {RAW: [raw(n) for n in range(4)], "/w": [text("a")] * 4})
    file = data_file(bag)
    # The index has other definitions, which rosbags does not know.
    file.write_bytes(file.read_bytes().replace(b"ros2msg", b"unknown"))
    source = open_source(bag)
    assert [int(frame.image[0, 0, 0]) for frame in source] == [0, 1, 2, 3]
    assert source.losses == ""


def test_a_chunk_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    topics = {RAW: [large(n) for n in range(9)]}
    bag = write_bag(tmp_path / "drive", topics, "mcap", CompressionMode.STORAGE)
    (bag / "metadata.yaml").unlink()
    content = data_file(bag).read_bytes()
    start = content.index(b"\x28\xb5\x2f\xfd")
    # A frame of 2**40 bytes by its own header.
    data_file(bag).write_bytes(
        content[: start + 4] + b"\xe0" + (2**40).to_bytes(8, "little") + content[start + 13 : -20]
    )
    with pytest.raises(SourceError, match="cannot be opened"):
        open_source(bag)
    with pytest.raises(SourceError, match=f"at most 1073741824 bytes, found {2**40}"):
        list(recorded_messages(bag_files(bag)))


def test_messages_lost_in_the_middle_are_noticed(tmp_path: Path) -> None:
    bag = write_bag(tmp_path / "drive", {RAW: [raw(n) for n in range(10)]}, "sqlite3")
    with sqlite3.connect(data_file(bag)) as database:
        database.execute("DELETE FROM messages WHERE id IN (7, 8)")
    database.close()
    source = open_source(bag)
    assert len(list(source)) == 8 and source.shortfall == 2
    # What lies before the end of a selection is all that a selection needs.
    part = open_source(f"{bag}[:5]")
    assert len(list(part)) == 5 and part.losses == ""


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
def test_damaged_metadata_are_not_needed(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    bag = write_bag(tmp_path / "drive", {RAW: [raw(0)]})
    (bag / "metadata.yaml").write_text(content)
    source = open_source(bag)
    assert len(list(source)) == 1 and source.losses == ""
    assert "drive': read without metadata and index: drive.mcap" in caplog.text
    data_file(bag).unlink()
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


def test_metadata_that_expand_without_a_limit_are_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bag = write_bag(tmp_path / "drive", {RAW: [raw(0)]})
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 60)]
    (bag / "metadata.yaml").write_text("\n".join(lines))
    source = open_source(bag)
    assert len(list(source)) == 1
    assert "drive': read without metadata and index: drive.mcap" in caplog.text
    data_file(bag).unlink()
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
    with pytest.raises(ImageError, match="topic '/camera/image_raw', image 2: the message is dam"):
        next(frames)
    source = open_source(bag)
    source.max_bad_share = 0.1
    assert [frame.name[-1] for frame in source] == ["0", "1", "3"]
    assert [bad.stamp_ns for bad in source.bad_frames] == [START_NS + 2 * 10**8]


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


def test_a_database_that_lacks_a_byte_is_cut_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bag = write_bag(tmp_path / "drive", {RAW: [large(n) for n in range(9)]}, "sqlite3")
    content = data_file(bag).read_bytes()
    data_file(bag).write_bytes(content[:-1])
    source = open_source(bag)
    frames = list(source)
    # Its last page belongs to one of the images, or to the index.
    assert len(frames) in (8, 9) and source.shortfall == 9 - len(frames)
    assert all((f.image == f.image[0, 0, 0]).all() for f in frames)


def test_random_damage_raises_only_input_errors(tmp_path: Path, rng: np.random.Generator) -> None:
    for storage in STORAGES:
        bag = write_bag(tmp_path / storage, {RAW: [raw(n) for n in range(5)]}, storage)
        file, content = data_file(bag), np.fromfile(data_file(bag), np.uint8)
        for _ in range(15):
            damaged = content.copy()
            damaged[rng.integers(0, len(content), 30)] = rng.integers(0, 256, 30)
            file.write_bytes(damaged.tobytes())
            try:
                source = open_source(bag)
                assert len(list(source)) == 5 or source.losses
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


@pytest.mark.parametrize("name", ["../secret/{file}", "/{secret}/{file}", "x/../../secret/{file}"])
def test_metadata_lead_to_no_file_outside_of_the_bag(tmp_path: Path, name: str) -> None:
    secret = write_bag(tmp_path / "secret", {RAW: [raw(7)]})
    bag = write_bag(tmp_path / "drive", {RAW: [raw(1)]})
    metadata = bag / "metadata.yaml"
    own, other = data_file(bag).name, data_file(secret).name
    path = name.format(secret=secret, file=other)
    metadata.write_text(metadata.read_text().replace(own, path))
    with pytest.raises(SourceError, match="files are missing"):
        list(open_source(bag))
    # A file of that name in the bag itself is read.
    data_file(bag).rename(bag / other)
    [frame] = open_source(bag)
    np.testing.assert_array_equal(frame.image, rgb(1))


def test_a_file_without_message_index_is_read_in_the_order_of_recording(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mcap.writer import IndexType, Writer

    bag = write_bag(tmp_path / "drive", {RAW: [raw(n) for n in range(6)]})
    path = tmp_path / "bare.mcap"
    with path.open("wb") as file:
        writer = Writer(file, index_types=IndexType.CHUNK)
        writer.start(profile="ros2")
        schema = writer.register_schema("sensor_msgs/msg/Image", "ros2msg", b"")
        channel = writer.register_channel(RAW, "cdr", schema)
        for message in recorded_messages(bag_files(bag)):
            writer.add_message(channel, message.time_ns, message.data, message.time_ns)
        writer.finish()
    for _ in range(2):
        source = open_source(f"{path}[1:5]")
        frames = list(source)
        assert [int(frame.image[0, 0, 0]) for frame in frames] == [1, 2, 3, 4]
        assert source.losses == ""
    assert source.stamps_ns() == tuple(frame.stamp_ns for frame in frames)
    assert "read without message index: bare.mcap" in caplog.text
