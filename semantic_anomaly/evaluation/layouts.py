"""Datasets as published: where images and labels are, what labels mean, and how they are read."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from tqdm import tqdm

from semantic_anomaly.errors import ImageError, InputError
from semantic_anomaly.evaluation.datasets import (
    ANOMALY,
    IGNORE,
    NORMAL,
    Dataset,
    FrameTruth,
    LabelledFolder,
    read_palette,
    read_yaml,
    refuse_white_masks,
)
from semantic_anomaly.io.bags import BagSource
from semantic_anomaly.io.images import read_image
from semantic_anomaly.io.sources import MAX_BAD_SHARE, BadFrame, FrameSource, is_bag, natural
from semantic_anomaly.storage import read_file
from semantic_anomaly.structures import Frame
from semantic_anomaly.timing import elapsed_ms

_MEANINGS = {"normal": NORMAL, "anomaly": ANOMALY, "ignore": IGNORE}


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
        channel: channel of colour labels: 0 red, 1 green, 2 blue; of a palette the indices count.
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
        if self.other not in (*_MEANINGS, "refuse"):
            expected = ", ".join((*_MEANINGS, "refuse"))
            raise InputError(f"layout: other: expected {expected}, found '{self.other}'")
        if self.channel not in (0, 1, 2):
            raise InputError(f"layout: channel: expected 0, 1 or 2, found {self.channel!r}")
        if len(self.label_of) != 2:
            raise InputError("layout: label_of: expected a regular expression and a replacement")
        patterns = {"label_of": self.label_of[0], "sequence": self.sequence}
        for name, pattern in {**patterns, "leave_out": self.leave_out}.items():
            try:
                re.compile(pattern)
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
            unknown = sorted(set(np.unique(values[labels < 0]).tolist()))
            known = ", ".join(map(str, self.values))
            raise InputError(f"labels '{where}': expected values {known}, found also {unknown[:8]}")
        return labels.astype(np.uint8)


_PLAIN = {0: "normal", 1: "anomaly", 255: "ignore"}
_TRACK = (r"^images/(.+)\.\w+$", r"labels_masks/\1_labels_semantic.png")

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
        # Validation scenes that SegmentMeIfYouCan does not count: night and snow.
        leave_out=r"validation_(19|2[1-9])\.",
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
    kinds: dict[str, type] = {
        **{"images": str, "label_of": list, "values": dict, "channel": int},
        **dict.fromkeys(("other", "sequence", "leave_out", "published"), str),
    }
    needed = {"images", "label_of", "values"}
    if not isinstance(content, dict) or not needed <= set(content) <= set(kinds):
        found = sorted(map(str, content)) if isinstance(content, dict) else content
        raise InputError(
            f"layout '{path}': expected {', '.join(sorted(needed))} and at most "
            f"{', '.join(sorted(set(kinds) - needed))}, found {found!r:.120}"
        )
    for name, value in content.items():
        if not isinstance(value, kinds[name]):
            raise InputError(f"layout '{path}': {name}: found {value!r:.60}")
    return Layout(**{**content, "label_of": tuple(map(str, content["label_of"]))})


class LayoutDataset(Dataset):
    """The images of a layout with their labels; sizes may vary from image to image.

    Raises:
        InputError: no images or labels where the layout expects them, or unknown label values.
    """

    def __init__(self, root: Path, layout: Layout, progress: bool = False) -> None:
        self.path, self.name = root, root.resolve().name
        self._layout = layout
        files = sorted(root.glob(layout.images), key=lambda file: natural(str(file)))
        if layout.leave_out:
            files = [file for file in files if not re.search(layout.leave_out, file.name)]
        names = [file.relative_to(root).as_posix() for file in files]
        masks = {name: root / re.sub(*layout.label_of, name) for name in names}
        masks = {name: mask for name, mask in masks.items() if mask.is_file()}
        if not masks:
            content = f"{len(files)} images without labels" if files else "no image"
            expected = layout.published or f"{layout.images} with labels by {layout.label_of}"
            raise InputError(f"dataset '{root}': found {content}; expected {expected}")
        disable = None if progress else True
        flat = len({PurePosixPath(name).stem for name in masks}) == len(masks)
        self.truths = []
        for name, mask in tqdm(masks.items(), "check labels", unit="image", disable=disable):
            match = re.search(layout.sequence, name) if layout.sequence else None
            path = PurePosixPath(name).with_suffix("")
            stem = path.name if flat else str(path).replace("/", "__")
            sequence = match[1] if match else name
            labels = self._read_labels(mask)
            self.truths.append(FrameTruth.of_labels(labels, name, stem, sequence, mask))
        if not any(truth.anomaly for truth in self.truths):
            files = [truth.mask for truth in self.truths if truth.mask is not None]
            refuse_white_masks(files, files, self._read_labels)
        source = _LayoutImages(root, self.name, [truth.file for truth in self.truths])
        source.max_bad_share = MAX_BAD_SHARE
        self.sources = (source,)

    def read(self) -> Iterator[tuple[Frame | BadFrame, FrameTruth]]:
        """Yield every frame, the bad ones too, with its truth."""
        yield from zip(self.sources[0].read(), self.truths, strict=True)

    def _labels(self, truth: FrameTruth, image_hw: tuple[int, int]) -> np.ndarray:
        assert truth.mask is not None
        return self._read_labels(truth.mask)

    def _read_labels(self, file: Path) -> np.ndarray:
        try:
            encoded = read_file(file)
        except OSError as error:
            raise InputError(f"labels '{file}': {error.strerror}") from error
        palette = read_palette(encoded, f"labels '{file}'")
        if palette is not None:
            return self._layout.meanings(palette, str(file))
        content = np.frombuffer(encoded, np.uint8)
        raw = cv2.imdecode(content, cv2.IMREAD_UNCHANGED) if len(content) else None
        if raw is None or raw.dtype != np.uint8:
            raise InputError(f"labels '{file}': expected an 8-bit image, found none")
        if raw.ndim == 3:
            # OpenCV gives blue first.
            raw = raw[..., 2::-1]
        return self._layout.meanings(raw, str(file))


class _LayoutImages(FrameSource):
    """Images of any sizes below a folder, by their paths in it."""

    is_one_size = False

    def __init__(self, root: Path, name: str, files: Sequence[str]) -> None:
        super().__init__([root], name, files=[root / file for file in files])
        self._names = [f"{name}/{file}" for file in files]

    def _total(self, *, exact: bool) -> int:
        return len(self.files)

    def _read(self, wanted: range) -> Iterator[Frame | BadFrame]:
        for number in range(wanted.start, min(wanted.stop, len(self.files)), wanted.step):
            begin_s, name = time.perf_counter(), self._names[number]
            try:
                image = read_image(self.files[number])
            except ImageError as error:
                yield BadFrame(name, number, str(error))
                continue
            yield Frame(image, number, name=name, decode_ms=elapsed_ms(begin_s))


class RecordedDataset(Dataset):
    """The images of a bag with labels of the same stamp, as simulators record them: one drive.

    Raises:
        SourceError: the bag or a topic cannot be read.
        InputError: no image with labels, or unknown label values.
    """

    def __init__(self, path: Path, layout: Layout, progress: bool = False) -> None:
        topic = re.sub(*layout.label_of, layout.images)
        if topic == layout.images:
            raise InputError(
                f"layout: label_of: expected another topic of '{layout.images}', found the same"
            )
        self._images = BagSource(path, topic=layout.images)
        self._label_images = BagSource(path, topic=topic)
        self._layout = layout
        self.path, self.name = path, self._images.name
        self.sources = self._images, self._label_images
        for source in self.sources:
            source.max_bad_share = MAX_BAD_SHARE
        truths = {}
        count, disable = self._label_images.count, None if progress else True
        for frame in tqdm(self._label_images, "check labels", count, unit="image", disable=disable):
            labels, name = layout.meanings(frame.image, frame.name), str(frame.stamp_ns)
            truths[frame.stamp_ns] = FrameTruth.of_labels(labels, name, name, self.name)
        stamps_ns = [frame.stamp_ns for frame in self._images.read()]
        self._by_stamp = {stamp: truths[stamp] for stamp in stamps_ns if stamp in truths}
        if not self._by_stamp:
            raise InputError(
                f"bag '{path}': expected images on '{layout.images}' with labels of the same stamp "
                f"on '{topic}', found none"
            )
        self.truths = list(self._by_stamp.values())
        self._stream: Iterator[Frame] = iter(())
        self._last = -1, np.empty((0, 0), np.uint8)

    def read(self) -> Iterator[tuple[Frame | BadFrame, FrameTruth]]:
        """Yield every frame with labels, the bad ones too, with its truth."""
        for frame in self._images.read():
            if truth := self._by_stamp.get(frame.stamp_ns):
                yield frame, truth

    def _labels(self, truth: FrameTruth, image_hw: tuple[int, int]) -> np.ndarray:
        stamp_ns = int(truth.file)
        if self._last[0] == stamp_ns:
            return self._last[1]
        # Labels are read in the order of recording; earlier ones need a second pass.
        for _ in range(2):
            for frame in self._stream:
                if frame.stamp_ns == stamp_ns:
                    self._last = stamp_ns, self._layout.meanings(frame.image, frame.name)
                    return self._last[1]
            self._stream = iter(self._label_images)
        raise InputError(f"bag '{self.path}': the labels of stamp {stamp_ns} are no longer there")


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
