"""Datasets laid out as their authors publish them, read like any labelled folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.datasets import (
    ANOMALY,
    IGNORE,
    FrameTruth,
    LabelledFolder,
    check_size,
)
from semantic_anomaly.evaluation.layouts import LAYOUTS, Layout, read_layout
from semantic_anomaly.evaluation.recorded import RecordedDataset
from semantic_anomaly.io.images import read_image
from semantic_anomaly.io.sources import is_bag, natural
from semantic_anomaly.structures import Frame


class LayoutDataset:
    """The images of a layout with their labels; sizes may vary from image to image.

    Args:
        root: the dataset's folder.
        layout: where things lie in it.
        progress: show a progress bar on a terminal while labels are checked.

    Attributes:
        name: name of the folder.
        truths: one an image, in natural order.

    Raises:
        InputError: nothing where the layout expects it, or labels of unknown values.
    """

    def __init__(self, root: Path, layout: Layout, progress: bool = True) -> None:
        self.path, self.name = root, root.resolve().name
        self._layout = layout
        found = sorted(root.glob(layout.images), key=lambda file: natural(str(file)))
        images = [file for file in found if not self._left_out(file)]
        pairs = [(image, label) for image in images if (label := self._label(image)).is_file()]
        if not pairs:
            have = f"{len(images)} images without labels" if images else "no image"
            expected = layout.published or f"{layout.images} with labels by {layout.label_of}"
            raise InputError(f"dataset '{root}': found {have}; expected {expected}")
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
        found = re.search(self._layout.sequence, relative) if self._layout.sequence else None
        values = set(np.unique(self._read(label)).tolist())
        return FrameTruth(
            file=relative,
            stem=image.stem if flat else relative.rpartition(".")[0].replace("/", "__"),
            anomaly=ANOMALY in values,
            ignored=values == {IGNORE},
            kind=None,
            family=None,
            sequence=found[1] if found else relative,
            mask=label,
            has_pixels=True,
        )


Dataset = LabelledFolder | LayoutDataset | RecordedDataset


def open_dataset(path: Path | str, layout: str = "", progress: bool = True) -> Dataset:
    """Open a dataset: a plain labelled folder, or one of a layout.

    Args:
        path: the folder, or a bag with a layout.
        layout: empty for a plain folder, a name of `LAYOUTS`, or a YAML file of a layout's fields.
        progress: show a progress bar on a terminal.

    Raises:
        InputError: no such layout, or nothing of it in the folder.
    """
    if not layout:
        return LabelledFolder(path)
    root, known = Path(path).expanduser(), LAYOUTS.get(layout) or read_layout(layout)
    if is_bag(root):
        return RecordedDataset(root, known, progress)
    return LayoutDataset(root, known, progress)
