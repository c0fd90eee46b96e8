"""Write drives to disk: folders of images with ground truth, and rosbag2 bags."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from semantic_anomaly.errors import InputError
from semantic_anomaly.io.images import encode_jpeg, encode_png
from semantic_anomaly.storage import atomic_folder
from semantic_anomaly.synthetic.drive import StreetDrive, StreetFrame, family

DEPTH_UNIT_M = 0.01
IMAGE_TOPIC = "/camera/image_raw"
_JPEG_QUALITY = 90
_NS_PER_S = 1_000_000_000


def write_folder(
    drives: Iterable[StreetDrive],
    out: Path,
    *,
    instances: bool = False,
    depth: bool = False,
    progress: bool = True,
    stride: int = 1,
    total: int | None = None,
) -> int:
    """Write drives as images with ground truth and return the number of images.

    The folder has `images/<frame>.png`; `masks/<frame>.png` (0 nominal, 1 anomaly) of frames with
    an anomaly; `labels.json` with anomaly, kind, family, stamp_s and drive by image file;
    `camera.json` with the intrinsics by drive; optionally `instances/` (16-bit ids, and classes by
    drive and id in `classes.json`) and `depth/` (16-bit centimetres, 0 for the sky). It is written
    atomically.

    Args:
        drives: drives of different seeds.
        out: a new or empty folder.
        instances: whether to write instance ids.
        depth: whether to write depth.
        progress: whether to show progress on a terminal.
        stride: write every n-th frame.
        total: expected number of images, for the progress.

    Raises:
        InputError: `out` is not empty, no drives or two of one seed, or a stride below 1.
        ArtefactError: the folder cannot be written.
    """
    if stride < 1:
        raise InputError(f"expected a stride of at least 1, found {stride}")
    labels: dict[str, dict[str, Any]] = {}
    classes: dict[str, dict[int, str]] = {}
    cameras: dict[str, dict[str, Any]] = {}
    with _new_folder(out) as folder:
        for part in ("images", "masks", *["instances"] * instances, *["depth"] * depth):
            (folder / part).mkdir()
        for drive, frame in _frames(drives, stride, progress, total):
            name = drive.name
            if frame.name.endswith("_000000") and name in cameras:
                raise InputError(f"expected drives of different seeds, found {drive.seed} twice")
            cameras[name] = dataclasses.asdict(drive.camera)
            file = f"{frame.name}.png"
            (folder / "images" / file).write_bytes(encode_png(frame.image))
            if frame.kind is not None:
                mask = frame.anomaly_mask.astype(np.uint8)
                (folder / "masks" / file).write_bytes(encode_png(mask))
            if instances:
                _write_16_bit(folder / "instances" / file, frame.instances)
                classes.setdefault(name, {}).update(frame.classes)
            if depth:
                _write_16_bit(folder / "depth" / file, np.rint(frame.depth_m / DEPTH_UNIT_M))
            labels[file] = {
                "anomaly": frame.kind is not None,
                "kind": frame.kind,
                "family": frame.kind and family(frame.kind),
                "stamp_s": frame.stamp_ns / _NS_PER_S,
                "drive": name,
            }
        if not labels:
            raise InputError("expected at least one drive, found none")
        _write_json(folder / "labels.json", labels)
        _write_json(folder / "camera.json", {"depth_unit_m": DEPTH_UNIT_M, "drives": cameras})
        if instances:
            _write_json(folder / "instances" / "classes.json", classes)
    return len(labels)


def write_bag(
    drive: StreetDrive,
    out: Path,
    *,
    storage: Literal["mcap", "sqlite3"],
    compressed: bool = False,
    depth: bool = False,
    progress: bool = True,
) -> int:
    """Write a drive as a rosbag2 bag and return the number of images.

    It has Image (rgb8) on /camera/image_raw, or CompressedImage (jpeg) on
    /camera/image_raw/compressed; CameraInfo on /camera/camera_info; optionally Image (32FC1 in
    metres, NaN for the sky) on /camera/depth/image_raw. It is written atomically.

    Args:
        drive: the drive; its stamps are those of the headers and of the recording.
        out: a new or empty folder.
        storage: mcap or sqlite3.
        compressed: whether to write jpeg.
        depth: whether to write depth.
        progress: whether to show progress on a terminal.

    Raises:
        InputError: `out` is not empty, an unknown storage, or rosbags is not installed.
        ArtefactError: the bag cannot be written.
    """
    try:
        from rosbags.rosbag2 import StoragePlugin, Writer
        from rosbags.typesys import Stores, get_typestore
    except ImportError as error:
        raise InputError(f"bag '{out}': writing bags needs the package 'rosbags'") from error
    plugins = {"mcap": StoragePlugin.MCAP, "sqlite3": StoragePlugin.SQLITE3}
    if storage not in plugins:
        raise InputError(f"expected storage {' or '.join(plugins)}, found '{storage}'")
    store = get_typestore(Stores.ROS2_HUMBLE)
    topics = _Messages(store, drive).topics(compressed, depth)
    with _new_folder(out) as folder:
        # The writer creates its folder and names the files in it after the folder.
        bag = folder / out.name
        # ROS 2 distributions before Jazzy cannot parse metadata of version 9.
        with Writer(bag, version=8, storage_plugin=plugins[storage]) as writer:
            connections = {
                topic: writer.add_connection(topic, kind, typestore=store)
                for topic, (kind, _) in topics.items()
            }
            for _, frame in _frames([drive], 1, progress, len(drive)):
                for topic, (kind, make) in topics.items():
                    content = store.serialize_cdr(make(frame), kind)
                    writer.write(connections[topic], frame.stamp_ns, content)
        for file in bag.iterdir():
            file.rename(folder / file.name)
        bag.rmdir()
    return len(drive)


class _Messages:
    """ROS messages of the frames of a drive."""

    def __init__(self, store: Any, drive: StreetDrive) -> None:
        self._types, self._camera = store.types, drive.camera

    def topics(
        self, compressed: bool, depth: bool
    ) -> dict[str, tuple[str, Callable[[StreetFrame], Any]]]:
        """Return the type of message and the function that makes it, by topic."""
        topics: dict[str, tuple[str, Callable[[StreetFrame], Any]]] = {
            "/camera/camera_info": ("sensor_msgs/msg/CameraInfo", self._info)
        }
        if compressed:
            topics[f"{IMAGE_TOPIC}/compressed"] = ("sensor_msgs/msg/CompressedImage", self._jpeg)
        else:
            topics[IMAGE_TOPIC] = ("sensor_msgs/msg/Image", self._image)
        if depth:
            topics["/camera/depth/image_raw"] = ("sensor_msgs/msg/Image", self._depth)
        return topics

    def _header(self, frame: StreetFrame) -> Any:
        time = self._types["builtin_interfaces/msg/Time"](*divmod(frame.stamp_ns, _NS_PER_S))
        return self._types["std_msgs/msg/Header"](time, "camera_optical_frame")

    def _raw(self, frame: StreetFrame, encoding: str, pixels: np.ndarray) -> Any:
        height, width = pixels.shape[:2]
        content = np.ascontiguousarray(pixels).reshape(-1).view(np.uint8)
        step = content.size // height
        make = self._types["sensor_msgs/msg/Image"]
        return make(self._header(frame), height, width, encoding, 0, step, content)

    def _image(self, frame: StreetFrame) -> Any:
        return self._raw(frame, "rgb8", frame.image)

    def _depth(self, frame: StreetFrame) -> Any:
        # REP 118: NaN without depth.
        metres = np.where(frame.depth_m > 0, frame.depth_m, np.nan).astype("<f4")
        return self._raw(frame, "32FC1", metres)

    def _jpeg(self, frame: StreetFrame) -> Any:
        content = np.frombuffer(encode_jpeg(frame.image, _JPEG_QUALITY), np.uint8)
        make = self._types["sensor_msgs/msg/CompressedImage"]
        return make(self._header(frame), "rgb8; jpeg compressed bgr8", content)

    def _info(self, frame: StreetFrame) -> Any:
        camera, types = self._camera, self._types
        height, width = camera.image_hw
        k = np.array([camera.fx, 0, camera.cx, 0, camera.fy, camera.cy, 0, 0, 1], np.float64)
        p = np.insert(k.reshape(3, 3), 3, 0.0, axis=1).reshape(-1)
        return types["sensor_msgs/msg/CameraInfo"](
            header=self._header(frame),
            height=height,
            width=width,
            distortion_model="plumb_bob",
            d=np.zeros(5),
            k=k,
            r=np.eye(3).reshape(-1),
            p=p,
            binning_x=0,
            binning_y=0,
            roi=types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False),
        )


def _new_folder(out: Path) -> Any:
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"folder '{out}': expected a new or empty folder, found files in it")
    return atomic_folder(out)


def _frames(
    drives: Iterable[StreetDrive], stride: int, progress: bool, total: int | None
) -> Iterator[tuple[StreetDrive, StreetFrame]]:
    hide = None if progress else True
    with tqdm(total=total, desc="drive", unit="frame", disable=hide) as bar:
        for drive in drives:
            for i in range(0, len(drive), stride):
                yield drive, drive.frame(i)
                bar.update()


def _write_16_bit(path: Path, values: np.ndarray) -> None:
    import cv2

    content = cv2.imencode(".png", np.clip(values, 0, 65535).astype(np.uint16))[1]
    path.write_bytes(content.tobytes())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
