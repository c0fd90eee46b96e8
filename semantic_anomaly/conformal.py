"""Split conformal prediction: a threshold that nominal scores exceed at most so often.

When n calibration scores and a new nominal one are exchangeable, the new one exceeds the
ceil((n + 1)(1 - alpha))-th smallest of them with probability at most alpha (Vovk, Gammerman and
Shafer 2005; Laxhammar and Falkman 2010 for anomalies).
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from semantic_anomaly.errors import CalibrationError


def scores_needed(rate: float) -> int:
    """Return how many nominal scores a false-alarm rate needs at least: 1/rate - 1, rounded up."""
    return math.ceil(1 / _exact(rate)) - 1


def allowed(count: int, rate: float) -> int:
    """Return how many of count + 1 exchangeable scores may exceed the threshold."""
    return min(count, math.floor((count + 1) * _exact(rate)))


def threshold(scores: np.ndarray, rate: float, what: str) -> float:
    """Return the score that nominal ones exceed at most at that rate.

    Args:
        scores: (n,) ascending.
        rate: in (0, 1).
        what: the scores are of, for the message: 'frames'.

    Raises:
        CalibrationError: too few scores for so low a rate.
    """
    may_exceed = allowed(len(scores), rate)
    if may_exceed < 1:
        raise CalibrationError(
            f"a false-alarm rate of {rate:g} needs at least {scores_needed(rate)} nominal "
            f"calibration {what}, found {len(scores)}"
        )
    # The (n + 1 - allowed)-th smallest is the ceil((n + 1)(1 - alpha))-th.
    return float(scores[len(scores) - may_exceed])


def _exact(rate: float) -> Fraction:
    # 0.07 means seven hundredths: the nearest double below would cost a rank at (n + 1) = 100.
    return Fraction(repr(float(rate)))
