"""How well predicted components match the anomalies in an image, as objects and not as pixels.

The component measures of SegmentMeIfYouCan (Chan et al. 2021, arXiv 2104.14812): adjusted
intersection over union of the anomalies, positive predictive value of the predictions, and F1
averaged over eleven thresholds of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.datasets import ANOMALY, IGNORE, NORMAL

# An anomaly is found when its sIoU reaches tau, a prediction is false when its PPV is below tau.
TAUS = np.linspace(0.25, 0.75, 11)


@dataclass(frozen=True)
class SizeLimits:
    """Components that are too small to count.

    Attributes:
        predicted_px: smaller predicted components are dropped, >= 0.
        truth_px: smaller anomalies are ignored, with the predictions on them, >= 0.
    """

    predicted_px: int
    truth_px: int

    def __post_init__(self) -> None:
        if self.predicted_px < 0 or self.truth_px < 0:
            raise InputError(f"component sizes: expected 0 px or more, found {self}")


# The limits that the two tracks of the benchmark use, at their image sizes.
ANOMALY_TRACK = SizeLimits(predicted_px=500, truth_px=100)
OBSTACLE_TRACK = SizeLimits(predicted_px=50, truth_px=10)


@dataclass(frozen=True)
class ComponentMetrics:
    """What predicted components are worth; None where there is nothing to divide by.

    Attributes:
        siou: mean adjusted intersection over union of the anomalies; None without anomalies.
        ppv: mean share of a predicted component that lies on anomalies; None without predictions.
        f1: 2 found / (2 found + missed + false), averaged over `TAUS`; None with neither.
        anomalies, predictions: numbers of components that count.
    """

    siou: float | None
    ppv: float | None
    f1: float | None
    anomalies: int
    predictions: int


class ComponentScores:
    """Matches of any number of labelled images, pooled over all of them.

    Args:
        limits: which components are too small.
    """

    def __init__(self, limits: SizeLimits) -> None:
        self._limits = limits
        self._siou: list[float] = []
        self._ppv: list[float] = []

    def add(self, predicted: np.ndarray, labels: np.ndarray) -> None:
        """Match the components of one image.

        Predictions are cut to the labelled area before their components are formed, 8-connected.

        Args:
            predicted: (height, width) bool, pixels above the threshold.
            labels: (height, width) uint8, 0 normal, 1 anomaly, 255 ignore.

        Raises:
            InputError: shapes that differ, or labels of other values.
        """
        if predicted.shape != labels.shape or labels.ndim != 2:
            raise InputError(
                f"components: expected prediction and labels of one shape (height, width), found "
                f"{predicted.shape} and {labels.shape}"
            )
        odd = sorted(set(np.unique(labels).tolist()) - {NORMAL, ANOMALY, IGNORE})
        if odd:
            raise InputError(
                f"labels: expected {NORMAL}, {ANOMALY}, {IGNORE}, found also {odd[:8]}"
            )
        truth, small = _components(labels == ANOMALY, self._limits.truth_px)
        found, _ = _components(predicted & (labels != IGNORE), self._limits.predicted_px)
        counted = (labels != IGNORE) & ~small
        siou, ppv = _match(truth[counted], found[counted])
        self._siou += siou
        self._ppv += ppv

    def metrics(self) -> ComponentMetrics:
        """Return the measures over all images so far."""
        siou, ppv = np.array(self._siou), np.array(self._ppv)
        # One part in 10^12 lets a ratio that equals tau on paper reach it.
        found = (siou[None] >= TAUS[:, None] - 1e-12).sum(axis=1)
        false = (ppv[None] < TAUS[:, None] - 1e-12).sum(axis=1)
        # Without anomalies every PPV is 0 and every prediction false: never a division by zero.
        anything = len(siou) or len(ppv)
        f1 = float(np.mean(2 * found / (found + len(siou) + false))) if anything else None
        return ComponentMetrics(
            float(siou.mean()) if len(siou) else None,
            float(ppv.mean()) if len(ppv) else None,
            f1,
            len(siou),
            len(ppv),
        )


def _components(mask: np.ndarray, smallest_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Return numbered components, 0 elsewhere, and where those lay that were too small."""
    count, numbers, stats, _ = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8), connectivity=8, ltype=cv2.CV_32S
    )
    kept = stats[:count, cv2.CC_STAT_AREA] >= smallest_px
    kept[0] = False
    renumbered = np.where(kept, np.cumsum(kept), 0)[numbers]
    return renumbered, mask & (renumbered == 0)


def _match(truth: np.ndarray, found: np.ndarray) -> tuple[list[float], list[float]]:
    """Return the sIoU of every anomaly and the PPV of every prediction, from (n,) numbers."""
    shape = int(truth.max(initial=0)) + 1, int(found.max(initial=0)) + 1
    flat = np.bincount(truth * shape[1] + found, minlength=shape[0] * shape[1])
    # Pixels shared by anomaly i and prediction j; row and column 0 are what is neither.
    shared = flat.reshape(shape).astype(np.float64)
    area, on_anomalies = shared.sum(axis=0), shared[1:].sum(axis=0)
    met = shared[1:, 1:] > 0
    inside = shared[1:, 1:].sum(axis=1)
    # What the predictions that meet an anomaly cover of other anomalies is not held against it.
    covered = met @ area[1:]
    of_others = met @ on_anomalies[1:] - inside
    siou = inside / (covered + shared[1:].sum(axis=1) - inside - of_others)
    # A prediction that lay wholly on ignored anomalies is none.
    remaining = area[1:] > 0
    ppv = on_anomalies[1:][remaining] / area[1:][remaining]
    return siou.tolist(), ppv.tolist()
