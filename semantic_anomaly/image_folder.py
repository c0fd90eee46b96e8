"""Folders of images as drives, with what a labels.json beside them says of stamps and drives."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from semantic_anomaly.errors import SourceError
from semantic_anomaly.images import read_image
from semantic_anomaly.sources import BAG_SUFFIXES, FRAME_PERIOD_NS, FrameSource
from semantic_anomaly.structures import Frame

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ImageFolder(FrameSource):
    """The images of a folder, or of its subfolder `images`, in natural order of their names.

    Stamps are taken from `stamp_s` in a labels.json beside the images or the subfolder, else one
    frame follows the other after 100 ms; drives from `drive`, where it is given for every image.

    Raises:
        SourceError: no images, or a labels.json that does not give every image a stamp.
    """

    def __init__(self, path: Path, selection: slice = slice(None)) -> None:
        folder = path / "images" if (path / "images").is_dir() else path
        resolved = folder.resolve()
        name = resolved.parent.name if resolved.name == "images" else resolved.name
        super().__init__(path, name, selection)
        try:
            files = [f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES]
        except OSError as error:
            raise SourceError(f"folder '{folder}': {error.strerror}") from error
        self.files = sorted(
            (f for f in files if f.is_file() and not f.name.startswith(".")),
            key=lambda file: natural(file.name),
        )
        if not self.files:
            raise SourceError(
                f"folder '{folder}': expected images ({', '.join(IMAGE_SUFFIXES)}), found none"
                + _bag_remark(folder)
            )
        beside = [folder / "labels.json"]
        if resolved.name == "images":
            beside.append(resolved.parent / "labels.json")
        labels = next((file for file in beside if file.is_file()), None)
        rows = _read_labels(labels) if labels else {}
        self._stamps_ns = _stamps(rows, labels, self.files)
        self._drives = _drives(rows, self.files)

    @property
    def drives(self) -> tuple[str, ...]:
        """Return the drives that the labels name."""
        chosen = self.files[self.selection]
        return tuple(dict.fromkeys(self._drives.get(file.name, "") for file in chosen))

    def drive_of(self, frame: Frame) -> str:
        """Return the drive of a frame of this folder."""
        return self._drives.get(frame.name.rpartition("/")[2], "")

    def _total(self, *, exact: bool) -> int:
        return len(self.files)

    def _read(self, wanted: range) -> Iterator[Frame]:
        for index in range(wanted.start, min(wanted.stop, len(self.files)), wanted.step):
            file = self.files[index]
            stamp_ns = self._stamps_ns.get(file.name, index * FRAME_PERIOD_NS)
            yield Frame(read_image(file), stamp_ns, name=f"{self.name}/{file.name}")


def natural(name: str) -> tuple[list[str | int], str]:
    """Return a key that sorts names as people do: 2 before 10."""
    pieces = re.split(r"(\d+)", name)
    return [int(p) if p.isdecimal() else p.lower() for p in pieces], name


def _bag_remark(folder: Path) -> str:
    bags = sorted(f.name for f in folder.iterdir() if f.suffix.lower() in BAG_SUFFIXES)
    return f"; {bags[0]} lacks its metadata.yaml ('ros2 bag reindex' makes one)" if bags else ""


def _read_labels(labels: Path) -> dict[str, dict[str, Any]]:
    """Return what labels say by file name; other things than objects say nothing."""
    try:
        rows = json.loads(labels.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"labels '{labels}' cannot be read: {error}") from error
    rows = rows if isinstance(rows, dict) else {}
    return {name: row for name, row in rows.items() if isinstance(row, dict)}


def _stamps(
    rows: dict[str, dict[str, Any]], labels: Path | None, files: list[Path]
) -> dict[str, int]:
    """Return nanoseconds by file name; empty when the labels hold no stamps at all."""
    stamps = {name: row["stamp_s"] for name, row in rows.items() if "stamp_s" in row}
    if not stamps:
        return {}
    for file in files:
        stamp: Any = stamps.get(file.name)
        number = isinstance(stamp, int | float) and not isinstance(stamp, bool)
        if not number or not math.isfinite(stamp):
            raise SourceError(
                f"labels '{labels}': expected a stamp_s in seconds for '{file.name}', "
                f"found {stamp!r}"
            )
    return {file.name: round(stamps[file.name] * 1e9) for file in files}


def _drives(rows: dict[str, dict[str, Any]], files: list[Path]) -> dict[str, str]:
    """Return the drive by file name; empty unless the labels name one for every file."""
    named = {file.name: rows.get(file.name, {}).get("drive") for file in files}
    known = {name: drive for name, drive in named.items() if isinstance(drive, str) and drive}
    return known if len(known) == len(files) else {}
