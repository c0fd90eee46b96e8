"""Data leakage: calibration or test frames that the index was built from."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import cv2

from semantic_anomaly.errors import CalibrationError
from semantic_anomaly.io.sources import FrameSource
from semantic_anomaly.structures import Frame

if TYPE_CHECKING:
    from semantic_anomaly.index.nominal_index import NominalIndex

# Largest mean difference in grey levels between a frame and its thumbnail, left by JPEG.
_SAME_IMAGE = 8.0
_SOURCE = re.compile(r"(?P<name>.*?)(\[(?P<start>-?\d*):(?P<stop>-?\d*)(:\d*)?\])?( \(\d+\))?")
_log = logging.getLogger(__name__)


def check_sources(index: NominalIndex, sources: Mapping[str, FrameSource]) -> None:
    """Check sources of calibration frames, by drive, as far as possible before they are embedded.

    Raises:
        CalibrationError: the index has seen the first frame of a source.
    """
    for drive, source in sources.items():
        refuse_seen(index, next(iter(source)))
        if source.files and overlaps(source, [recorded.name for recorded in index.content.sources]):
            _log.warning(
                "calibration drive '%s' has the name of a drive in the index: if it is the "
                "same drive, the false-alarm rate on other drives will exceed the target",
                drive,
            )


def is_seen(index: NominalIndex, frame: Frame) -> bool:
    """Return whether the index was built from a frame: the same name and the same image."""
    # Folders of different drives often have the same name, so the image decides.
    for thumbnail in index.thumbnails(frame.name):
        height, width = thumbnail.shape[:2]
        small = cv2.resize(frame.image, (width, height), interpolation=cv2.INTER_AREA)
        if float(cv2.absdiff(small, thumbnail).mean()) < _SAME_IMAGE:
            return True
    return False


def refuse_seen(index: NominalIndex, frame: Frame) -> None:
    """Refuse a frame that the index was built from.

    Raises:
        CalibrationError: naming the frame.
    """
    if is_seen(index, frame):
        raise CalibrationError(
            f"the index has seen frame '{frame.name}': its score says nothing about new frames; "
            "use other drives"
        )


def refuse_calibrated(drives: Iterable[str], source: FrameSource) -> None:
    """Refuse a source that has the name of a calibration drive, with overlapping frame numbers.

    Args:
        drives: names of the drives of the calibration.
        source: of frames that the calibration should not have seen.

    Raises:
        CalibrationError: naming the drive.
    """
    for drive in drives if source.files else ():
        # A folder whose labels name drives is several: 'folder/drive'.
        if overlaps(source, [drive]) or drive.startswith(f"{source.name}/"):
            raise CalibrationError(
                f"the calibration has seen a drive '{drive}', the name of the source "
                f"'{source.path}': its false alarms say nothing about new drives; use another drive"
            )


def overlaps(source: FrameSource, index_sources: Iterable[str]) -> bool:
    """Return whether the index has a source of the same name with overlapping frame numbers."""
    first, last = source.selection.start or 0, source.selection.stop
    for text in index_sources:
        match = _SOURCE.fullmatch(text)
        if match is None or match["name"] != source.name:
            continue
        other_first = int(match["start"] or 0)
        other_last = int(match["stop"]) if match["stop"] else None
        if min(first, last or 0, other_first, other_last or 0) < 0:
            # Counted from the end: unknown without the length of the drive.
            return True
        before = last is not None and last <= other_first
        after = other_last is not None and other_last <= first
        if not (before or after):
            return True
    return False
