"""Frames that say nothing new: those that an index was built from, or that are given twice."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import cv2

from semantic_anomaly.errors import CalibrationError
from semantic_anomaly.io.sources import FrameSource
from semantic_anomaly.structures import Frame

if TYPE_CHECKING:
    from semantic_anomaly.index.nominal_index import NominalIndex

# Mean difference in grey levels that JPEG leaves between a frame and its thumbnail, and more.
_SAME_PICTURE = 8.0
_log = logging.getLogger(__name__)


class Fresh:
    """Refuses calibration frames that say nothing new: seen by the index, or given twice."""

    def __init__(self, index: NominalIndex) -> None:
        self._index = index
        self._indexed = frozenset(index.frame_names)
        self._taken: set[tuple[Path, str]] = set()

    def foresee(self, sources: dict[str, FrameSource], needed: int) -> None:
        """Refuse before hours of embedding what can be foreseen, and warn of likely trouble."""
        counts = [source.count for source in sources.values()]
        known = [count for count in counts if count is not None]
        if len(known) == len(counts) and sum(known) < needed:
            raise CalibrationError(
                f"the target false-alarm rate needs at least {needed} nominal calibration frames, "
                f"found {sum(known)}"
            )
        folders = {name.rpartition("/")[0] for name in self._indexed}
        for drive, source in sources.items():
            refuse_indexed(self._index, next(iter(source)))
            if source.name in folders:
                _log.warning(
                    "calibration drive '%s' has the name of a drive that the index has seen: if "
                    "it is the same, its frames resemble those of the index, and the false-alarm "
                    "rate on other drives will be higher than the target",
                    drive,
                )

    def check(self, source: FrameSource, frame: Frame) -> None:
        """Refuse a frame that was taken before."""
        refuse_indexed(self._index, frame)
        taken = source.path.resolve(), frame.name
        if taken in self._taken:
            raise CalibrationError(f"calibration frame '{frame.name}' is given twice")
        self._taken.add(taken)


def refuse_indexed(index: NominalIndex, frame: Frame) -> None:
    """Refuse a frame whose picture the index was built from.

    Raises:
        CalibrationError: naming the frame.
    """
    # Folders of different drives often have the same name, so the picture decides.
    thumbnail = index.thumbnail(frame.name) if frame.name in index.frame_names else None
    if thumbnail is None:
        return
    height, width = thumbnail.shape[:2]
    small = cv2.resize(frame.image, (width, height), interpolation=cv2.INTER_AREA)
    if float(cv2.absdiff(small, thumbnail).mean()) < _SAME_PICTURE:
        raise CalibrationError(
            f"the index has seen frame '{frame.name}': its score says nothing about new frames; "
            "take other drives"
        )
