"""Images with ground truth: a folder with images, masks and labels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from semantic_anomaly.errors import ImageError, InputError
from semantic_anomaly.io.images import inspect_image
from semantic_anomaly.io.open import split_selection
from semantic_anomaly.io.sources import IMAGE_SUFFIXES, ImageFiles, folder_images
from semantic_anomaly.structures import Frame

NORMAL, ANOMALY, IGNORE = 0, 1, 255
MASK_FOLDERS = ("masks", "labels_masks")


@dataclass(frozen=True)
class FrameTruth:
    """Ground truth of a frame.

    Attributes:
        file: name of the image file.
        stem: unique name without suffix, for files made from the frame.
        anomaly: whether the frame shows an anomaly.
        ignored: the frame is not counted; if its labels say so, nor are its pixels.
        kind, family: kind and family of the anomaly, None when not labelled.
        sequence: drive of the frame; frames of different drives are independent.
        mask: file of the mask, or None.
        has_pixels: whether pixels count; false for an anomaly that is labelled but not masked.
    """

    file: str
    stem: str
    anomaly: bool
    ignored: bool
    kind: str | None
    family: str | None
    sequence: str
    mask: Path | None
    has_pixels: bool


class LabelledFolder:
    """A folder with `images/`, `masks/` or `labels_masks/`, and optionally `labels.json`.

    Masks are 8-bit PNG of the image's stem and size: 0 normal, 1 anomaly, 255 ignore. An image
    without a mask is normal throughout. labels.json maps file names to objects with `anomaly` and
    optionally `kind`, `family`, `ignore`, `stamp_s`, `drive`. A frame without `anomaly` is
    anomalous if its mask has a 1. Frames without `drive` belong to one drive if they have stamps,
    otherwise each is a drive of its own. All masks are checked here.

    Attributes:
        name: name of the folder.
        truths: one per selected image, in the order of iteration.

    Raises:
        InputError: no images, masks with other values or without an image, labels of missing
            files or of the wrong types.
    """

    def __init__(self, path: Path | str) -> None:
        root, selection = split_selection(path)
        self.path = root
        if not (root / "images").is_dir():
            found = "no such folder" if not root.is_dir() else "none there"
            raise InputError(f"dataset '{root}': expected a folder 'images' in it, found {found}")
        self._source = ImageFiles(folder_images(root), selection)
        self.name = self._source.name
        files = self._source.files
        masks = _find_masks(root, {file.stem for file in files})
        labels = _read_labels(root / "labels.json", {file.name for file in files})
        chosen = files[selection]
        if not chosen:
            raise InputError(f"dataset '{path}': expected images, found none of {len(files)}")
        self.truths = [
            _truth(file.name, masks.get(file.stem), labels.get(file.name, {}), self.name)
            for file in chosen
        ]

    def __len__(self) -> int:
        return len(self.truths)

    def __iter__(self) -> Iterator[tuple[Frame, FrameTruth, np.ndarray]]:
        """Yield frame, truth and mask, (height, width) uint8.

        Raises:
            InputError: an image cannot be read, sizes vary, or a mask has another size.
        """
        for frame, truth in zip(self._source, self.truths, strict=True):
            yield frame, truth, self.labels(truth, frame.image_hw)

    def labels(self, truth: FrameTruth, image_hw: tuple[int, int]) -> np.ndarray:
        """Return the mask of a frame, (height, width) uint8; all normal without a mask file.

        Raises:
            InputError: it cannot be read, or is of another size than the image.
        """
        if truth.mask is None:
            return np.zeros(image_hw, np.uint8)
        mask = read_mask(truth.mask)
        check_size(truth, mask, image_hw)
        return mask


def check_size(truth: FrameTruth, labels: np.ndarray, image_hw: tuple[int, int]) -> None:
    """Check that labels have the size of their image.

    Raises:
        InputError: the sizes differ.
    """
    if labels.shape != image_hw:
        raise InputError(
            f"mask '{truth.mask}': expected {_size(image_hw)} as its image '{truth.file}', found "
            f"{_size(labels.shape)}"
        )


def read_mask(path: Path) -> np.ndarray:
    """Return a mask as (height, width) uint8 of 0 normal, 1 anomaly, 255 ignore.

    Raises:
        InputError: not an 8-bit PNG of one channel, damaged, or with other values.
    """
    try:
        content = path.read_bytes()
        kind, _, _ = inspect_image(content)
    except OSError as error:
        raise InputError(f"mask '{path}': {error.strerror}") from error
    except ImageError as error:
        raise InputError(f"mask '{path}': {error}") from error
    # Decoders expand 1-bit masks to 0 and 255, which would turn anomalies into ignored pixels.
    if kind != "PNG" or content[24] != 8:
        found = f"PNG of {content[24]} bits" if kind == "PNG" else kind
        raise InputError(f"mask '{path}': expected an 8-bit PNG, found {found}")
    mask = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if mask is None:
        raise InputError(f"mask '{path}': the PNG is damaged and cannot be decoded")
    if mask.ndim == 3:
        if np.any(mask[..., :3] != mask[..., :1]):
            raise InputError(f"mask '{path}': expected one channel, found colours")
        mask = np.ascontiguousarray(mask[..., 0])
    odd = sorted(set(np.unique(mask).tolist()) - {NORMAL, ANOMALY, IGNORE})
    if odd:
        raise InputError(
            f"mask '{path}': expected values {NORMAL} normal, {ANOMALY} anomaly, {IGNORE} ignore; "
            f"found also {', '.join(map(str, odd[:8]))}"
        )
    return mask


def read_json(path: Path | str, what: str) -> Any:
    """Return the content of a JSON file; raise InputError when it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{what} '{path}' cannot be read: {error}") from error


def read_yaml(path: Path | str, what: str) -> Any:
    """Return the content of a YAML file; raise InputError when it cannot be read."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{what} '{path}' cannot be read: {reason}") from error


def _find_masks(root: Path, stems: set[str]) -> dict[str, Path]:
    folders = [root / name for name in MASK_FOLDERS if (root / name).is_dir()]
    if len(folders) > 1:
        raise InputError(f"dataset '{root}': expected one of {', '.join(MASK_FOLDERS)}, found both")
    files = [
        file
        for folder in folders
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    ]
    lost = [file.name for file in files if file.stem not in stems]
    if lost:
        raise InputError(
            f"masks '{folders[0]}': expected an image of the same stem for each, found none for "
            f"{_listed(lost)}"
        )
    twice = [stem for stem, count in Counter(file.stem for file in files).items() if count > 1]
    if twice:
        raise InputError(f"masks '{folders[0]}': expected one for each image, found several for "
                         f"{_listed(twice)}")  # fmt: skip
    return {file.stem: file for file in files}


def _read_labels(path: Path, files: set[str]) -> dict[str, Mapping[str, Any]]:
    if not path.is_file():
        return {}
    labels = read_json(path, "labels")
    if not isinstance(labels, dict):
        raise InputError(f"labels '{path}': expected an object of file names")
    absent = [name for name in labels if name not in files]
    if absent:
        raise InputError(
            f"labels '{path}': expected names of images, found absent {_listed(absent)}"
        )
    kinds = {
        "anomaly": bool,
        "ignore": bool,
        "kind": (str, type(None)),
        "family": (str, type(None)),
        "drive": (str, type(None)),
    }
    for name, label in labels.items():
        if not isinstance(label, dict):
            raise InputError(f"labels '{path}': '{name}': expected an object, found {label!r:.60}")
        for key, kind in kinds.items():
            if key in label and not isinstance(label[key], kind):  # type: ignore[arg-type]
                wanted = "true or false" if kind is bool else "a text"
                raise InputError(
                    f"labels '{path}': '{name}': {key}: expected {wanted}, found {label[key]!r:.60}"
                )
    return labels


def _truth(file: str, mask_file: Path | None, label: Mapping[str, Any], dataset: str) -> FrameTruth:
    values = set(np.unique(read_mask(mask_file)).tolist()) if mask_file else {NORMAL}
    marked = ANOMALY in values
    anomaly = label.get("anomaly", marked)
    skipped = label.get("ignore", False)
    return FrameTruth(
        file=file,
        stem=file.rpartition(".")[0],
        anomaly=anomaly,
        ignored=skipped or values == {IGNORE},
        kind=label.get("kind") if anomaly else None,
        family=label.get("family") if anomaly else None,
        sequence=label.get("drive") or (dataset if "stamp_s" in label else file),
        mask=mask_file,
        has_pixels=not skipped and (marked or not anomaly or mask_file is not None),
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"'{name}'" for name in names[:5]) + more


def _size(image_hw: tuple[int, ...]) -> str:
    return f"{image_hw[1]}x{image_hw[0]}"
