"""Bags with a camera and its labels, as simulators record them: CARLA's semantic camera."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.datasets import ANOMALY, IGNORE, FrameTruth, check_size
from semantic_anomaly.evaluation.layouts import Layout
from semantic_anomaly.io.bags import BagSource
from semantic_anomaly.structures import Frame


class RecordedDataset:
    """The images of a bag that have labels of the very same stamp.

    Args:
        path: rosbag2 folder or file.
        layout: image topic, topic of the labels, and what they mean.
        progress: show a progress bar on a terminal while labels are checked.

    Attributes:
        name: name of the bag.
        truths: one an image with labels, in the order of recording; all of one drive.

    Raises:
        SourceError: the bag or a topic cannot be read.
        InputError: no image with labels, or labels of unknown values.
    """

    def __init__(self, path: Path, layout: Layout, progress: bool = True) -> None:
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
        found = {frame.stamp_ns: self._truth(frame) for frame in bar}
        self._by_stamp: dict[int, FrameTruth] = {}
        for frame in self._images:
            if frame.stamp_ns in found:
                self._by_stamp[frame.stamp_ns] = found[frame.stamp_ns]
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
        labels = self._found(self._stamp_of[truth.file])
        check_size(truth, labels, image_hw)
        return labels

    def _found(self, stamp_ns: int) -> np.ndarray:
        if self._last[0] == stamp_ns:
            return self._last[1]
        # Frames are asked for in the order of recording; what lies behind needs another reading.
        for _ in range(2):
            for frame in self._stream:
                if frame.stamp_ns == stamp_ns:
                    self._last = stamp_ns, self._layout.meanings(frame.image, frame.name)
                    return self._last[1]
            self._stream = iter(self._labels)
        raise InputError(f"bag '{self.path}': labels of stamp {stamp_ns} are not there any more")

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
