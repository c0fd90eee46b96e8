"""Drives on disk: content of folders and bags, and refusal of bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from rosbags.highlevel import AnyReader

from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.datasets import LabelledFolder
from semantic_anomaly.io.images import decode_compressed
from semantic_anomaly.synthetic import StreetDrive
from semantic_anomaly.synthetic.export import DEPTH_UNIT_M, write_bag, write_folder

SIZE = (90, 160)


def test_a_folder_has_the_frames_and_their_ground_truth(tmp_path: Path) -> None:
    drives = [
        StreetDrive(5, 20, image_hw=SIZE),
        StreetDrive(6, 80, anomalies=["cow"], image_hw=SIZE),
    ]
    out = tmp_path / "street"
    count = write_folder(drives, out, instances=True, depth=True, stride=10, progress=False)
    assert count == 10
    assert list(tmp_path.iterdir()) == [out]
    labels = json.loads((out / "labels.json").read_text())
    classes = json.loads((out / "instances" / "classes.json").read_text())
    cameras = json.loads((out / "camera.json").read_text())
    assert cameras["depth_unit_m"] == DEPTH_UNIT_M
    assert len(labels) == 10
    masks = {file.name for file in (out / "masks").iterdir()}
    assert masks == {name for name, label in labels.items() if label["anomaly"]}
    assert len(masks) >= 2
    for i in (0, 50):
        frame = drives[1].frame(i)
        label = labels[f"{frame.name}.png"]
        expected = (frame.kind, "odd object" if frame.kind else None, i / 10, "drive0000006")
        assert (label["kind"], label["family"], label["stamp_s"], label["drive"]) == expected
        read: dict[str, Any] = {
            part: cv2.imread(str(out / part / f"{frame.name}.png"), cv2.IMREAD_UNCHANGED)
            for part in ("images", "instances", "depth")
        }
        assert np.array_equal(read["images"][..., ::-1], frame.image)
        assert np.array_equal(read["instances"], frame.instances)
        assert np.abs(read["depth"] * DEPTH_UNIT_M - frame.depth_m).max() <= DEPTH_UNIT_M
        named = classes["drive0000006"]
        assert all(named[str(n)] == name for n, name in frame.classes.items())
    assert cameras["drives"]["drive0000006"]["fx"] == drives[1].camera.fx
    # The evaluation reads the same labels.
    for _, truth, mask in LabelledFolder(out):
        assert truth.anomaly == bool(mask.any()) == labels[truth.file]["anomaly"]


def test_bad_input_writes_and_overwrites_nothing(tmp_path: Path) -> None:
    drive = StreetDrive(5, 2, image_hw=SIZE)
    out = tmp_path / "street"
    with pytest.raises(InputError, match="found 5 twice"):
        write_folder([drive, drive], out, progress=False)
    with pytest.raises(InputError, match="at least one drive"):
        write_folder([], out, progress=False)
    with pytest.raises(InputError, match="stride of at least 1"):
        write_folder([drive], out, stride=0, progress=False)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    write_folder([drive], out, progress=False)
    before = sorted(out.rglob("*"))
    with pytest.raises(InputError, match="new or empty"):
        write_folder([drive], out, progress=False)
    with pytest.raises(InputError, match="new or empty"):
        write_bag(drive, out, storage="mcap", progress=False)
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("storage", ["mcap", "sqlite3"])
def test_a_bag_has_the_messages_of_the_drive(
    tmp_path: Path, storage: Any, compressed: bool
) -> None:
    start = 1_600_000_000_123_456_789
    drive = StreetDrive(5, 4, image_hw=SIZE, start_ns=start)
    out = tmp_path / "bag"
    count = write_bag(
        drive, out, storage=storage, compressed=compressed, depth=True, progress=False
    )
    assert count == 4
    assert list(tmp_path.iterdir()) == [out]
    topic = "/camera/image_raw" + "/compressed" * compressed
    received: dict[str, list[Any]] = {}
    with AnyReader([out]) as reader:
        for connection, time, raw in reader.messages():
            message = reader.deserialize(raw, connection.msgtype)
            received.setdefault(connection.topic, []).append(message)
            stamp = message.header.stamp
            assert stamp.sec * 10**9 + stamp.nanosec == time
            assert message.header.frame_id == "camera_optical_frame"
            if connection.topic == topic:
                assert time == start + (len(received[topic]) - 1) * 100_000_000
    assert {name: len(messages) for name, messages in received.items()} == {
        topic: 4,
        "/camera/camera_info": 4,
        "/camera/depth/image_raw": 4,
    }
    frame, image = drive.frame(3), received[topic][3]
    if compressed:
        pixels = decode_compressed(image.data, image.format)
        assert np.abs(pixels.astype(int) - frame.image).mean() < 6
    else:
        assert (image.encoding, image.step) == ("rgb8", SIZE[1] * 3)
        assert np.array_equal(image.data.reshape(*SIZE, 3), frame.image)
    info = received["/camera/camera_info"][0]
    assert (info.height, info.width, info.distortion_model) == (*SIZE, "plumb_bob")
    camera = drive.camera
    assert info.k.tolist() == [camera.fx, 0, camera.cx, 0, camera.fy, camera.cy, 0, 0, 1]
    assert info.p.reshape(3, 4)[:, :3].ravel().tolist() == info.k.tolist()
    metres = received["/camera/depth/image_raw"][3].data.view("<f4").reshape(SIZE)
    assert np.array_equal(np.nan_to_num(metres), frame.depth_m)
    assert np.isnan(metres[0]).any()


def test_an_unknown_storage_is_refused(tmp_path: Path) -> None:
    drive = StreetDrive(5, 2, image_hw=SIZE)
    with pytest.raises(InputError, match="storage mcap or sqlite3"):
        write_bag(drive, tmp_path / "bag", storage="zip")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
