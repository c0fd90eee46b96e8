"""Datasets as their authors publish them: where images and labels lie, and what labels mean."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.datasets import (
    ANOMALY,
    IGNORE,
    NORMAL,
)

_MEANINGS = {"normal": NORMAL, "anomaly": ANOMALY, "ignore": IGNORE}
_OTHER = (*_MEANINGS, "refuse")


@dataclass(frozen=True)
class Layout:
    """Where images and labels of a dataset lie, and what label values mean.

    Attributes:
        images: glob of the images below the dataset's folder; of a bag, its image topic.
        label_of: regular expression and replacement that make an image's path, relative to the
            folder, the path of its labels; an image without labels there is left out. Of a bag,
            they make the image topic the topic of the labels.
        values: meaning of a label value in 0..255: normal, anomaly or ignore.
        other: meaning of all other values, or 'refuse'.
        channel: of labels in colour: 0 red, 1 green, 2 blue; grey ones have one.
        sequence: regular expression whose first group names the drive of an image's path; empty:
            every image is by itself.
        leave_out: regular expression of images that do not belong to the set; empty: all do.
        published: where the dataset can be had, and what is expected below its folder.

    Raises:
        InputError: a field that cannot be taken.
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
            where: names the labels in errors.

        Raises:
            InputError: a value without a meaning, where others are refused.
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
# Frames of the validation scenes that SegmentMeIfYouCan does not count: night and snow.
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
        # The red channel of everything out of place, by AnoVox's own colours.
        values={245: "anomaly"},
        other="normal",
        sequence=r"^(Scenario_[^/]+)/",
        published="AnoVox (Bogdoll et al. 2024), https://zenodo.org/records/11210157: "
        "Scenario_ID/RGB-CAM.../NAME.png and Scenario_ID/SEMANTIC-CAM.../NAME.png, alike but for "
        "the camera's kind; where they are not, give a layout file of your own",
    ),
}


def read_layout(path: Path | str) -> Layout:
    """Return the layout that a YAML file describes by the names of the fields of `Layout`.

    Raises:
        InputError: no such file or name, or fields that cannot be taken.
    """
    if not Path(path).is_file():
        raise InputError(f"--layout: expected {', '.join(LAYOUTS)} or a YAML file, found '{path}'")
    try:
        content: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"layout '{path}': {' '.join(str(error).split())}") from error
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
