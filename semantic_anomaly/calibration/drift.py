"""Drift: whether the frames of the road still score like those of the calibration.

A window of frames is unusual if more of them lie above the calibration's 90th percentile than of
any calibration drive. Three such windows in a row are drift: the road is another one, and the
calibrated rate says nothing about it. Nothing is adapted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_QUANTILE = 0.9
_WINDOWS = 3
DRIFT = "the scores have drifted from those of the calibration: recalibrate with drives like this"


class DriftCheck:
    """Counts frames above the usual scores in windows, one after the other.

    Args:
        scores_by_drive: (n,) of each calibration drive.
        window: frames of a window, >= 1.

    Attributes:
        level: 90th percentile of the calibration scores.
        largest_share: largest share of the frames of a calibration drive above it.
        is_drift: whether the last three windows had larger shares.
        is_known: whether there were three windows; before, `is_drift` says nothing.
    """

    def __init__(self, scores_by_drive: Sequence[np.ndarray], window: int) -> None:
        self.level = float(np.quantile(np.concatenate(scores_by_drive), _QUANTILE))
        self.largest_share = max(float(np.mean(s > self.level)) for s in scores_by_drive)
        self._window = window
        self.clear()

    def clear(self) -> None:
        """Forget all frames."""
        self.is_drift = self.is_known = False
        self._windows = 0
        self._frames = self._above = self._unusual_windows = 0

    def add(self, score: float) -> bool:
        """Take in the score of the next frame; return whether drift begins with it."""
        self._frames += 1
        self._above += score > self.level
        if self._frames < self._window:
            return False
        self._windows += 1
        self.is_known = self._windows >= _WINDOWS
        is_unusual = self._above / self._frames > self.largest_share
        self._unusual_windows = self._unusual_windows + 1 if is_unusual else 0
        self._frames = self._above = 0
        was_drift, self.is_drift = self.is_drift, self._unusual_windows >= _WINDOWS
        return self.is_drift and not was_drift
