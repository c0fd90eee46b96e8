"""Images with ground truth: a folder with images, masks and labels."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from semantic_anomaly.errors import ImageError, InputError
from semantic_anomaly.evaluation import extras
from semantic_anomaly.io.images import inspect_image
from semantic_anomaly.io.open import split_selection
from semantic_anomaly.io.sources import (
    IMAGE_SUFFIXES,
    MAX_BAD_SHARE,
    BadFrame,
    FrameSource,
    ImageFiles,
    folder_images,
)
from semantic_anomaly.storage import parse_json, parse_yaml, read_file
from semantic_anomaly.structures import Frame

NORMAL, ANOMALY, IGNORE = 0, 1, 255
CONVENTION = f"{NORMAL} normal, {ANOMALY} anomaly, {IGNORE} ignore"
# Byte of the colour type in a PNG, and its value for palettes.
_COLOUR_TYPE, _PALETTE = 25, 3
MASK_FOLDERS = ("masks", "labels_masks")
_FLAGS, _TEXTS = ("anomaly", "ignore"), ("kind", "family", "drive")


@dataclass(frozen=True)
class FrameTruth:
    """Ground truth of a frame.

    Attributes:
        file: name of the image file.
        stem: unique name without suffix, for files made from the frame.
        anomaly: whether the frame shows an anomaly.
        ignored: the frame is not counted; if its labels say so, nor are its pixels.
        sequence: drive of the frame; frames of different drives are independent.
        mask: file of the mask, or None.
        kind, family: kind and family of the anomaly, None when not labelled.
        tags: conditions of the frame, such as 'night' and 'rain'; sorted, each once.
        has_pixels: whether pixels count; false for an anomaly that is labelled but not masked.
    """

    file: str
    stem: str
    anomaly: bool
    ignored: bool
    sequence: str
    mask: Path | None = None
    kind: str | None = None
    family: str | None = None
    has_pixels: bool = True
    tags: tuple[str, ...] = ()

    @classmethod
    def of_labels(
        cls, labels: np.ndarray, file: str, stem: str, sequence: str, mask: Path | None = None
    ) -> FrameTruth:
        """Return the ground truth of a frame that is known by its pixel labels alone."""
        anomaly, ignored = bool((labels == ANOMALY).any()), bool((labels == IGNORE).all())
        return cls(file, stem, anomaly, ignored, sequence, mask)


class Dataset(ABC):
    """Images with ground truth.

    Attributes:
        path: folder or bag.
        name: name of the folder or bag.
        truths: one per image, in the order of iteration.
        sources: the images, and images of labels if they are read like those. Some frames may be
            bad, see `FrameSource.max_bad_share`.
    """

    path: Path
    name: str
    truths: list[FrameTruth]
    sources: tuple[FrameSource, ...]

    def __len__(self) -> int:
        return len(self.truths)

    def __iter__(self) -> Iterator[tuple[Frame, FrameTruth, np.ndarray]]:
        """Yield frame, truth and labels, (height, width) uint8, without the bad frames.

        Raises:
            InputError: too many images cannot be read, or as `labels`.
        """
        for frame, truth in self.read():
            if isinstance(frame, Frame):
                yield frame, truth, self.labels(truth, frame.image_hw)

    @property
    def losses(self) -> str:
        """Return what the last iteration left out, empty if nothing."""
        return "; ".join(source.losses for source in self.sources if source.losses)

    def labels(self, truth: FrameTruth, image_hw: tuple[int, int]) -> np.ndarray:
        """Return the labels of a frame, (height, width) uint8 of 0 normal, 1 anomaly, 255 ignore.

        Raises:
            InputError: they cannot be read, are of another size than the image, or hold other
                values.
        """
        labels = self._labels(truth, image_hw)
        if labels.shape != image_hw:
            expected, found = (f"{hw[1]}x{hw[0]}" for hw in (image_hw, labels.shape))
            raise InputError(
                f"mask '{truth.mask}': expected {expected} as its image '{truth.file}', found "
                f"{found}"
            )
        return labels

    @abstractmethod
    def read(self) -> Iterator[tuple[Frame | BadFrame, FrameTruth]]:
        """Yield every frame, the bad ones too, with its truth.

        Raises:
            InputError: too many images cannot be read.
        """

    @abstractmethod
    def _labels(self, truth: FrameTruth, image_hw: tuple[int, int]) -> np.ndarray:
        """Return the labels of a frame, of the size of their file."""


class LabelledFolder(Dataset):
    """A folder with `images/`, `masks/` or `labels_masks/`, and optionally `labels.json`.

    Masks are 8-bit PNG of the image's stem and size: 0 normal, 1 anomaly, 255 ignore; of a palette
    the indices count. An image without a mask is normal throughout. Masks of 0 and 255 without any
    1 are refused: most tools write anomalies as white.

    labels.json maps file names to objects with `anomaly` and optionally `kind`, `family`, `ignore`,
    `stamp_s`, `drive`, `tags`. A frame without `anomaly` is anomalous if its mask has a 1. Frames
    without `drive` belong to one drive if they have stamps, otherwise each is a drive of its own.
    All masks are checked here.

    Raises:
        InputError: no images, masks with other values, of another convention or without an image,
            labels of missing files or of the wrong types.
    """

    def __init__(self, path: Path | str) -> None:
        root, selection = split_selection(path)
        self.path = root
        if not (root / "images").is_dir():
            found = "no such folder" if not root.is_dir() else "none there"
            raise InputError(f"dataset '{root}': expected a folder 'images' in it, found {found}")
        source = ImageFiles(folder_images(root), selection)
        source.max_bad_share = MAX_BAD_SHARE
        self.sources = (source,)
        self.name = source.name
        files = source.files
        masks = _find_masks(root, {file.stem for file in files})
        labels = _read_labels(root / "labels.json", {file.name for file in files})
        if not files[selection]:
            raise InputError(f"dataset '{path}': expected images, found none of {len(files)}")
        self.truths = [
            _truth(file.name, masks.get(file.stem), labels.get(file.name, {}), self.name)
            for file in files[selection]
        ]
        refuse_white_masks(
            (truth.mask for truth in self.truths if truth.mask is not None),
            (masks[stem] for stem in sorted(masks)),
            read_mask,
        )

    def read(self) -> Iterator[tuple[Frame | BadFrame, FrameTruth]]:
        """Yield every frame, the bad ones too, with its truth."""
        yield from zip(self.sources[0].read(), self.truths, strict=True)

    def _labels(self, truth: FrameTruth, image_hw: tuple[int, int]) -> np.ndarray:
        return np.zeros(image_hw, np.uint8) if truth.mask is None else read_mask(truth.mask)


def refuse_white_masks(
    used: Iterable[Path], all_masks: Iterable[Path], read: Callable[[Path], np.ndarray]
) -> None:
    """Refuse masks that are probably 0 normal and 255 anomaly.

    Some of them ignore a part of their image, and no mask of the folder has an anomaly: by the
    convention every anomaly would count as a false alarm.

    Args:
        used, all_masks: files of the frames in use, and of the whole folder.
        read: returns the labels of a file, (height, width) uint8.

    Raises:
        InputError: names a mask, the values found and the convention.
    """
    suspect: Path | None = None
    for path in used:
        labels = read(path)
        if (labels == ANOMALY).any():
            return
        ignored = labels == IGNORE
        if suspect is None and ignored.any() and not ignored.all():
            suspect = path
    if suspect is None or any((read(path) == ANOMALY).any() for path in all_masks):
        return
    raise InputError(
        f"masks '{suspect.parent}': expected values {CONVENTION}, found {NORMAL} and {IGNORE} (in "
        f"'{suspect.name}') and no {ANOMALY} in any mask; if white means anomaly, give a layout "
        f"with --layout whose values are {{0: normal, 255: anomaly}}, or write {ANOMALY} for "
        f"{IGNORE}"
    )


def read_palette(content: bytes, where: str) -> np.ndarray | None:
    """Return the indices of a palette PNG, (height, width) uint8; None for other images.

    Decoders return the colours of a palette, in which class numbers are lost.

    Raises:
        InputError: the image is damaged.
    """
    if content[:4] != b"\x89PNG" or content[_COLOUR_TYPE : _COLOUR_TYPE + 1] != bytes([_PALETTE]):
        return None
    pillow = extras.load("PIL.Image")
    try:
        with pillow.open(io.BytesIO(content)) as image:
            return np.array(image, np.uint8)
    # Pillow raises many kinds of errors.
    except Exception as error:
        raise InputError(f"{where}: the PNG is damaged and cannot be decoded") from error


def read_mask(path: Path) -> np.ndarray:
    """Return a mask as (height, width) uint8 of 0 normal, 1 anomaly, 255 ignore.

    Raises:
        InputError: neither an 8-bit PNG of one channel nor one of a palette, damaged, or with other
            values.
    """
    try:
        content = read_file(path)
        kind, _, _ = inspect_image(content)
    except (OSError, ImageError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"mask '{path}': {reason}") from error
    palette = read_palette(content, f"mask '{path}'")
    # Decoders expand 1-bit masks to 0 and 255, which would turn anomalies into ignored pixels.
    if kind != "PNG" or (content[24] != 8 and palette is None):
        found = f"PNG of {content[24]} bits" if kind == "PNG" else kind
        raise InputError(
            f"mask '{path}': expected an 8-bit PNG, found {found}; values: {CONVENTION}"
        )
    mask: np.ndarray | None = palette
    if mask is None:
        mask = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if mask is None:
        raise InputError(f"mask '{path}': the PNG is damaged and cannot be decoded")
    if mask.ndim == 3:
        if np.any(mask[..., :3] != mask[..., :1]):
            colours = np.unique(mask[..., 2::-1].reshape(-1, 3), axis=0)[:4].tolist()
            raise InputError(
                f"mask '{path}': expected one channel of {CONVENTION}, found colours "
                f"{', '.join(map(str, colours))}; classes coded by colour need a layout (--layout)"
            )
        mask = np.ascontiguousarray(mask[..., 0])
    others = sorted(set(np.unique(mask).tolist()) - {NORMAL, ANOMALY, IGNORE})
    if others:
        raise InputError(
            f"mask '{path}': expected values {CONVENTION}; found also "
            f"{', '.join(map(str, others[:8]))}; other values need a layout (--layout)"
        )
    return mask


def read_json(path: Path | str, what: str) -> Any:
    """Return the content of a JSON file; raise InputError when it cannot be read."""
    try:
        return parse_json(read_file(Path(path)))
    except (OSError, ValueError) as error:
        raise InputError(f"{what} '{path}' cannot be read: {error}") from error


def read_yaml(path: Path | str, what: str) -> Any:
    """Return the content of a YAML file; raise InputError when it cannot be read."""
    try:
        return parse_yaml(read_file(Path(path)))
    except (OSError, ValueError) as error:
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
    unmatched = [file.name for file in files if file.stem not in stems]
    if unmatched:
        raise InputError(
            f"masks '{folders[0]}': expected an image of the same stem for each, found none for "
            f"{_listed(unmatched)}"
        )
    repeated = [stem for stem, count in Counter(file.stem for file in files).items() if count > 1]
    if repeated:
        raise InputError(f"masks '{folders[0]}': expected one for each image, found several for "
                         f"{_listed(repeated)}")  # fmt: skip
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
    for name, label in labels.items():
        if not isinstance(label, dict):
            raise InputError(f"labels '{path}': '{name}': expected an object, found {label!r:.60}")
        for key in (*_FLAGS, *_TEXTS):
            kind, expected = (bool, "true or false") if key in _FLAGS else (str | None, "a text")
            if key in label and not isinstance(label[key], kind):
                raise InputError(
                    f"labels '{path}': '{name}': {key}: expected {expected}, found "
                    f"{label[key]!r:.60}"
                )
        tags = label.get("tags", [])
        if not isinstance(tags, list) or not all(isinstance(tag, str) and tag for tag in tags):
            raise InputError(
                f"labels '{path}': '{name}': tags: expected a list of texts, found {tags!r:.60}"
            )
    return labels


def _truth(file: str, mask_file: Path | None, label: Mapping[str, Any], dataset: str) -> FrameTruth:
    sequence = label.get("drive") or (dataset if "stamp_s" in label else file)
    mask = np.array(NORMAL) if mask_file is None else read_mask(mask_file)
    masked = FrameTruth.of_labels(mask, file, file.rpartition(".")[0], sequence, mask_file)
    anomaly = label.get("anomaly", masked.anomaly)
    ignored = label.get("ignore", False)
    return replace(
        masked,
        anomaly=anomaly,
        ignored=ignored or masked.ignored,
        kind=label.get("kind") if anomaly else None,
        family=label.get("family") if anomaly else None,
        has_pixels=not ignored and (mask_file is not None or not anomaly),
        tags=tuple(sorted(set(label.get("tags", [])))),
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"'{name}'" for name in names[:5]) + more
