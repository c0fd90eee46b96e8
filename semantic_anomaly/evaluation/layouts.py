"""Datasets as published: where images and labels are, what labels mean, and how they are read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.datasets import (
    ANOMALY,
    IGNORE,
    NORMAL,
    FrameTruth,
    LabelledFolder,
    check_size,
    read_yaml,
)
from semantic_anomaly.io.bags import BagSource
from semantic_anomaly.io.images import read_image
from semantic_anomaly.io.sources import is_bag, natural
from semantic_anomaly.structures import Frame

_MEANINGS = {"normal": NORMAL, "anomaly": ANOMALY, "ignore": IGNORE}
_OTHER = (*_MEANINGS, "refuse")


@dataclass(frozen=True)
class Layout:
    """Where images and labels of a dataset are, and what label values mean.

    Attributes:
        images: glob of the images below the dataset's folder; of a bag, its image topic.
        label_of: regular expression and replacement that turn an image path, relative to the
            folder, into the path of its labels; images without labels are left out. For a bag,
            they turn the image topic into the topic of the labels.
        values: meaning of a label value in 0..255: normal, anomaly or ignore.
        other: meaning of all other values, or 'refuse'.
        channel: channel of colour labels: 0 red, 1 green, 2 blue.
        sequence: regular expression whose first group in the image path is the drive; empty: each
            image is a drive of its own.
        leave_out: regular expression of images to leave out; empty: none.
        published: where the dataset is published, and the expected content of its folder.

    Raises:
        InputError: a field of another type or value.
    """

    images: str
    label_of: tuple[str, str]
    values: Mapping[int, str]
    other: str = "refuse"
    channel: int = 0
    sequence: str = ""
    leave_out: str = ""
    published: str = ""

    def __post_init__(self) -> None:
        for value, meaning in self.values.items():
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not 0 <= value <= 255 or meaning not in _MEANINGS:
                raise InputError(
                    f"layout: values: expected 0..255 with {', '.join(_MEANINGS)}, found "
                    f"{value!r}: {meaning!r}"
                )
        if self.other not in _OTHER:
            raise InputError(f"layout: other: expected {', '.join(_OTHER)}, found '{self.other}'")
        if self.channel not in (0, 1, 2):
            raise InputError(f"layout: channel: expected 0, 1 or 2, found {self.channel!r}")
        if len(self.label_of) != 2:
            raise InputError("layout: label_of: expected a regular expression and a replacement")
        for name, text in (
            ("label_of", self.label_of[0]),
            ("sequence", self.sequence),
            ("leave_out", self.leave_out),
        ):
            try:
                re.compile(text)
            except re.error as error:
                raise InputError(f"layout: {name}: no regular expression: {error}") from error

    def meanings(self, raw: np.ndarray, where: str) -> np.ndarray:
        """Return 0 normal, 1 anomaly, 255 ignore of label values, (height, width) uint8.

        Args:
            raw: (height, width) or (height, width, 3) RGB, uint8.
            where: name of the labels for errors.

        Raises:
            InputError: a value without a meaning, when others are refused.
        """
        values = raw if raw.ndim == 2 else raw[..., self.channel]
        table = np.full(256, _MEANINGS.get(self.other, -1), np.int16)
        for value, meaning in self.values.items():
            table[value] = _MEANINGS[meaning]
        labels = table[values]
        if labels.size and labels.min() < 0:
            odd = sorted(set(np.unique(values[labels < 0]).tolist()))
            known = ", ".join(map(str, self.values))
            raise InputError(f"labels '{where}': expected values {known}, found also {odd[:8]}")
        return labels.astype(np.uint8)


_PLAIN = {0: "normal", 1: "anomaly", 255: "ignore"}
_TRACK = (r"^images/(.+)\.\w+$", r"labels_masks/\1_labels_semantic.png")
# Validation scenes that SegmentMeIfYouCan does not count: night and snow.
_NOT_COUNTED = r"validation_(19|2[1-9])\."

LAYOUTS: Mapping[str, Layout] = {
    "road-anomaly": Layout(
        images="frames/*.jpg",
        label_of=(r"\.jpg$", ".labels/labels_semantic.png"),
        values={0: "normal", 1: "normal", 2: "anomaly", 255: "ignore"},
        published="Road Anomaly (Lis et al. 2019), https://www.epfl.ch/labs/cvlab/data/"
        "road-anomaly/: frames/NAME.jpg and frames/NAME.labels/labels_semantic.png",
    ),
    "smiyc-anomaly": Layout(
        images="images/validation*.jpg",
        label_of=_TRACK,
        values=_PLAIN,
        published="SegmentMeIfYouCan AnomalyTrack (Chan et al. 2021), "
        "https://segmentmeifyoucan.com/datasets: images/validationNNNN.jpg and "
        "labels_masks/validationNNNN_labels_semantic.png",
    ),
    "smiyc-obstacle": Layout(
        images="images/validation*.webp",
        label_of=_TRACK,
        values=_PLAIN,
        leave_out=_NOT_COUNTED,
        published="SegmentMeIfYouCan ObstacleTrack (Chan et al. 2021), "
        "https://segmentmeifyoucan.com/datasets: images/validation_N.webp and "
        "labels_masks/validation_N_labels_semantic.png",
    ),
    "fishyscapes-static": Layout(
        images="images/*.*",
        label_of=(r"^images/(.+?)(_rgb)?\.\w+$", r"labels/\1_labels.png"),
        values=_PLAIN,
        published="Fishyscapes Static (Blum et al. 2021), https://fishyscapes.com/dataset: made "
        "with Cityscapes by the authors' tool; images/NAME.png and labels/NAME_labels.png",
    ),
    "fishyscapes-lost-and-found": Layout(
        images="images/*_leftImg8bit.png",
        label_of=(r"^images/(.+)_leftImg8bit\.png$", r"labels/\1_labels.png"),
        values=_PLAIN,
        sequence=r"^images/(?:\d{4}_)?(.+)_\d{6}_leftImg8bit",
        published="Fishyscapes Lost & Found (Blum et al. 2021), https://fishyscapes.com/dataset, "
        "labels of the validation set; images of Lost and Found (Pinggera et al. 2016), "
        "http://www.6d-vision.com/lostandfounddataset: images/NAME_leftImg8bit.png and "
        "labels/NAME_labels.png",
    ),
    "anovox": Layout(
        images="Scenario_*/RGB-CAM*/*.png",
        label_of=(r"RGB-CAM", "SEMANTIC-CAM"),
        # The red channel of anomalies in AnoVox's palette.
        values={245: "anomaly"},
        other="normal",
        sequence=r"^(Scenario_[^/]+)/",
        published="AnoVox (Bogdoll et al. 2024), https://zenodo.org/records/11210157: "
        "Scenario_ID/RGB-CAM.../NAME.png and Scenario_ID/SEMANTIC-CAM.../NAME.png, alike but for "
        "the camera's kind; where they are not, give a layout file of your own",
    ),
}


def read_layout(path: Path | str) -> Layout:
    """Return the layout of a YAML file with the fields of `Layout`.

    Raises:
        InputError: no such file or name, or other fields.
    """
    if not Path(path).is_file():
        raise InputError(f"--layout: expected {', '.join(LAYOUTS)} or a YAML file, found '{path}'")
    content = read_yaml(path, "layout")
    fields = {field.name for field in dataclasses.fields(Layout)}
    needed = {"images", "label_of", "values"}
    if not isinstance(content, dict) or not needed <= set(content) <= fields:
        found = sorted(map(str, content)) if isinstance(content, dict) else content
        raise InputError(
            f"layout '{path}': expected {', '.join(sorted(needed))} and at most "
            f"{', '.join(sorted(fields - needed))}, found {found!r:.120}"
        )
    kinds: dict[str, type | tuple[type, ...]] = {
        **dict.fromkeys(("images", "other", "sequence", "leave_out", "published"), str),
        "label_of": list,
        "values": dict,
        "channel": int,
    }
    for name, value in content.items():
        if not isinstance(value, kinds[name]):
            raise InputError(f"layout '{path}': {name}: found {value!r:.60}")
    return Layout(**{**content, "label_of": tuple(map(str, content["label_of"]))})


class LayoutDataset:
    """The images of a layout with their labels; sizes may vary from image to image.

    Args:
        root: the dataset's folder.
        layout: where images and labels are in it.
        progress: show a progress bar on a terminal while labels are checked.

    Attributes:
        name: name of the folder.
        truths: one per image, in natural order.

    Raises:
        InputError: no images or labels where the layout expects them, or unknown label values.
    """

    def __init__(self, root: Path, layout: Layout, progress: bool = False) -> None:
        self.path, self.name = root, root.resolve().name
        self._layout = layout
        files = sorted(root.glob(layout.images), key=lambda file: natural(str(file)))
        images = [file for file in files if not self._left_out(file)]
        pairs = [(image, label) for image in images if (label := self._label(image)).is_file()]
        if not pairs:
            content = f"{len(images)} images without labels" if images else "no image"
            expected = layout.published or f"{layout.images} with labels by {layout.label_of}"
            raise InputError(f"dataset '{root}': found {content}; expected {expected}")
        hide = None if progress else True
        flat = len({image.stem for image, _ in pairs}) == len(pairs)
        self.truths = [
            self._truth(image, label, flat)
            for image, label in tqdm(pairs, "check labels", unit="image", disable=hide)
        ]

    def __len__(self) -> int:
        return len(self.truths)

    def __iter__(self) -> Iterator[tuple[Frame, FrameTruth, np.ndarray]]:
        """Yield frame, truth and labels, (height, width) uint8.

        Raises:
            InputError: an image cannot be read, or its labels have another size.
        """
        for number, truth in enumerate(self.truths):
            image = read_image(self.path / truth.file)
            frame = Frame(image, number, name=f"{self.name}/{truth.file}")
            yield frame, truth, self.labels(truth, frame.image_hw)

    def labels(self, truth: FrameTruth, image_hw: tuple[int, int]) -> np.ndarray:
        """Return the labels of a frame, (height, width) uint8 of 0 normal, 1 anomaly, 255 ignore.

        Raises:
            InputError: they cannot be read, are of another size, or hold unknown values.
        """
        assert truth.mask is not None
        labels = self._read(truth.mask)
        check_size(truth, labels, image_hw)
        return labels

    def _left_out(self, file: Path) -> bool:
        return bool(self._layout.leave_out and re.search(self._layout.leave_out, file.name))

    def _label(self, image: Path) -> Path:
        pattern, replacement = self._layout.label_of
        relative = image.relative_to(self.path).as_posix()
        return self.path / re.sub(pattern, replacement, relative)

    def _read(self, file: Path) -> np.ndarray:
        try:
            content = np.frombuffer(file.read_bytes(), np.uint8)
        except OSError as error:
            raise InputError(f"labels '{file}': {error.strerror}") from error
        raw = cv2.imdecode(content, cv2.IMREAD_UNCHANGED) if len(content) else None
        if raw is None or raw.dtype != np.uint8:
            raise InputError(f"labels '{file}': expected an 8-bit image, found none")
        if raw.ndim == 3:
            # OpenCV gives blue first.
            raw = raw[..., 2::-1]
        return self._layout.meanings(raw, str(file))

    def _truth(self, image: Path, label: Path, flat: bool) -> FrameTruth:
        relative = image.relative_to(self.path).as_posix()
        match = re.search(self._layout.sequence, relative) if self._layout.sequence else None
        values = set(np.unique(self._read(label)).tolist())
        return FrameTruth(
            file=relative,
            stem=image.stem if flat else relative.rpartition(".")[0].replace("/", "__"),
            anomaly=ANOMALY in values,
            ignored=values == {IGNORE},
            kind=None,
            family=None,
            sequence=match[1] if match else relative,
            mask=label,
            has_pixels=True,
        )


class RecordedDataset:
    """The images of a bag with labels of the same stamp, as simulators record them.

    Args:
        path: rosbag2 folder or file.
        layout: image topic, topic of the labels, and what they mean.
        progress: show a progress bar on a terminal while labels are checked.

    Attributes:
        name: name of the bag.
        truths: one per image with labels, in the order of recording; all of one drive.

    Raises:
        SourceError: the bag or a topic cannot be read.
        InputError: no image with labels, or unknown label values.
    """

    def __init__(self, path: Path, layout: Layout, progress: bool = False) -> None:
        topic = re.sub(layout.label_of[0], layout.label_of[1], layout.images)
        if topic == layout.images:
            raise InputError(
                f"layout: label_of: expected another topic of '{layout.images}', found the same"
            )
        self._images = BagSource(path, topic=layout.images)
        self._labels = BagSource(path, topic=topic)
        self._layout = layout
        self.path, self.name = path, self._images.name
        hide = None if progress else True
        bar = tqdm(self._labels, "check labels", self._labels.count, disable=hide, unit="image")
        truths = {frame.stamp_ns: self._truth(frame) for frame in bar}
        self._by_stamp: dict[int, FrameTruth] = {}
        for frame in self._images:
            if frame.stamp_ns in truths:
                self._by_stamp[frame.stamp_ns] = truths[frame.stamp_ns]
        if not self._by_stamp:
            raise InputError(
                f"bag '{path}': expected images on '{layout.images}' with labels of the same stamp "
                f"on '{topic}', found none"
            )
        self.truths = list(self._by_stamp.values())
        self._stamp_of = {truth.file: stamp for stamp, truth in self._by_stamp.items()}
        self._stream: Iterator[Frame] = iter(())
        self._last = -1, np.empty((0, 0), np.uint8)

    def __len__(self) -> int:
        return len(self.truths)

    def __iter__(self) -> Iterator[tuple[Frame, FrameTruth, np.ndarray]]:
        """Yield frame, truth and labels, (height, width) uint8.

        Raises:
            InputError: labels of another size than their image.
        """
        for frame in self._images:
            truth = self._by_stamp.get(frame.stamp_ns)
            if truth is not None:
                yield frame, truth, self.labels(truth, frame.image_hw)

    def labels(self, truth: FrameTruth, image_hw: tuple[int, int]) -> np.ndarray:
        """Return the labels of a frame, (height, width) uint8 of 0 normal, 1 anomaly, 255 ignore.

        Raises:
            InputError: they are of another size than the image.
        """
        labels = self._labels_at(self._stamp_of[truth.file])
        check_size(truth, labels, image_hw)
        return labels

    def _labels_at(self, stamp_ns: int) -> np.ndarray:
        if self._last[0] == stamp_ns:
            return self._last[1]
        # Labels are read in the order of recording; earlier ones need a second pass.
        for _ in range(2):
            for frame in self._stream:
                if frame.stamp_ns == stamp_ns:
                    self._last = stamp_ns, self._layout.meanings(frame.image, frame.name)
                    return self._last[1]
            self._stream = iter(self._labels)
        raise InputError(f"bag '{self.path}': the labels of stamp {stamp_ns} are no longer there")

    def _truth(self, frame: Frame) -> FrameTruth:
        values = set(np.unique(self._layout.meanings(frame.image, frame.name)).tolist())
        name = str(frame.stamp_ns)
        return FrameTruth(
            file=name,
            stem=name,
            anomaly=ANOMALY in values,
            ignored=values == {IGNORE},
            kind=None,
            family=None,
            sequence=self.name,
            mask=None,
            has_pixels=True,
        )


Dataset = LabelledFolder | LayoutDataset | RecordedDataset


def open_dataset(path: Path | str, layout: str = "", progress: bool = False) -> Dataset:
    """Open a dataset: a labelled folder, or a folder or bag with a layout.

    Args:
        path: the folder, or a bag with a layout.
        layout: empty for a labelled folder, a name of `LAYOUTS`, or a YAML file; see `Layout`.
        progress: show a progress bar on a terminal.

    Raises:
        InputError: no such layout, or nothing of it in the folder.
    """
    if not layout:
        return LabelledFolder(path)
    root, fields = Path(path).expanduser(), LAYOUTS.get(layout) or read_layout(layout)
    if is_bag(root):
        return RecordedDataset(root, fields, progress)
    return LayoutDataset(root, fields, progress)
