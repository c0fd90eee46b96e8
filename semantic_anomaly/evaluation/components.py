"""Component measures: how predicted components match anomalies as objects.

The component measures of SegmentMeIfYouCan (Chan et al. 2021, arXiv 2104.14812): adjusted
intersection over union of the anomalies, positive predictive value of the predictions, and F1
averaged over eleven thresholds of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.datasets import ANOMALY, IGNORE

# An anomaly is detected if its sIoU reaches tau, a prediction is false if its PPV is below tau.
TAUS = np.linspace(0.25, 0.75, 11)


@dataclass(frozen=True)
class SizeLimits:
    """Minimum sizes of components in px.

    Attributes:
        predicted_px: smaller predicted components are dropped, >= 0.
        truth_px: smaller anomalies are ignored, with the predictions on them, >= 0.
    """

    predicted_px: int
    truth_px: int

    def __post_init__(self) -> None:
        if self.predicted_px < 0 or self.truth_px < 0:
            raise InputError(f"component sizes: expected 0 px or more, found {self}")


# The limits of the two tracks of the benchmark, at their image sizes.
ANOMALY_TRACK = SizeLimits(predicted_px=500, truth_px=100)
OBSTACLE_TRACK = SizeLimits(predicted_px=50, truth_px=10)


@dataclass(frozen=True)
class ComponentMetrics:
    """Pooled component measures; None when there is nothing to divide by.

    Attributes:
        siou: mean adjusted intersection over union of the anomalies.
        ppv: mean share of a predicted component that lies on anomalies.
        f1: 2 TP / (2 TP + FN + FP), averaged over `TAUS`.
        anomalies, predictions: numbers of counted components.
    """

    siou: float | None
    ppv: float | None
    f1: float | None
    anomalies: int
    predictions: int


class ComponentScores:
    """Component matches pooled over labelled images."""

    def __init__(self, limits: SizeLimits) -> None:
        self._limits = limits
        self._siou: list[float] = []
        self._ppv: list[float] = []

    def add(self, predicted: np.ndarray, labels: np.ndarray) -> None:
        """Match the components of one image.

        Predictions are cut to the labelled area before 8-connected components are formed.

        Args:
            predicted: (height, width) bool, pixels above the threshold.
            labels: (height, width) uint8, 0 normal, 1 anomaly, 255 ignore.
        """
        truth, small = _components(labels == ANOMALY, self._limits.truth_px)
        predictions, _ = _components(predicted & (labels != IGNORE), self._limits.predicted_px)
        counted = (labels != IGNORE) & ~small
        siou, ppv = _match(truth[counted], predictions[counted])
        self._siou.extend(siou)
        self._ppv.extend(ppv)

    def metrics(self) -> ComponentMetrics:
        """Return the measures over all images so far."""
        siou, ppv = np.array(self._siou), np.array(self._ppv)
        # The tolerance lets ratios that equal tau exactly reach it.
        detected = (siou[None] >= TAUS[:, None] - 1e-12).sum(axis=1)
        false = (ppv[None] < TAUS[:, None] - 1e-12).sum(axis=1)
        # Without anomalies every PPV is 0 and every prediction false, so nothing divides by 0.
        f1 = 2 * detected / (detected + len(siou) + false) if len(siou) or len(ppv) else ()
        siou_mean, ppv_mean, f1_mean = (
            float(np.mean(values)) if len(values) else None for values in (siou, ppv, f1)
        )
        return ComponentMetrics(siou_mean, ppv_mean, f1_mean, len(siou), len(ppv))


def _components(mask: np.ndarray, smallest_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Return component numbers, 0 elsewhere, and the mask of components that are too small."""
    count, numbers, stats, _ = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8), connectivity=8, ltype=cv2.CV_32S
    )
    kept = stats[:count, cv2.CC_STAT_AREA] >= smallest_px
    kept[0] = False
    renumbered = np.where(kept, np.cumsum(kept), 0)[numbers]
    return renumbered, mask & (renumbered == 0)


def _match(truth: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sIoU of every anomaly and the PPV of every prediction, from (n,) numbers."""
    shape = int(truth.max(initial=0)) + 1, int(predicted.max(initial=0)) + 1
    flat = np.bincount(truth * shape[1] + predicted, minlength=shape[0] * shape[1])
    # Pixels shared by anomaly i and prediction j; row and column 0 are the background.
    shared = flat.reshape(shape).astype(np.float64)
    area, on_anomalies = shared.sum(axis=0), shared[1:].sum(axis=0)
    met = shared[1:, 1:] > 0
    inside = shared[1:, 1:].sum(axis=1)
    # Adjusted IoU: pixels of the predictions that lie on other anomalies are not counted.
    covered = met @ area[1:]
    of_others = met @ on_anomalies[1:] - inside
    siou = inside / (covered + shared[1:].sum(axis=1) - inside - of_others)
    # Predictions that lie on ignored anomalies only are not counted.
    remaining = area[1:] > 0
    return siou, on_anomalies[1:][remaining] / area[1:][remaining]
