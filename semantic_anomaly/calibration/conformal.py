"""Split conformal prediction: thresholds that nominal scores exceed at a known rate.

If n calibration scores and the score of a new nominal frame are exchangeable, the new one exceeds
the ceil((n + 1)(1 - alpha))-th smallest of them with probability at most alpha (Vovk, Gammerman and
Shafer 2005; Laxhammar and Falkman 2010 for anomalies).

The same holds for episodes, stretches of driving of fixed length. The score of an episode is the
largest confirmed score of its frames. A component is confirmed by `confirm_count` detections within
`confirm_s` seconds and stays confirmed while it is detected again within `silence_s`. The confirmed
score of a frame is therefore the `confirm_count`-th largest score within `confirm_s`, or an earlier
confirmed score that lasts, but at most its own score. This is an upper bound, because confirmed
detections must also belong to one component: the calibrated rate errs on the safe side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, get_type_hints

import numpy as np

from semantic_anomaly.errors import CalibrationError, MismatchError
from semantic_anomaly.settings import Settings
from semantic_anomaly.stamps import LATE_S, first_jump, order_of

# Least share of an episode that the frames of a drive must cover.
_COVERED_SHARE = 0.9
EPISODE_SETTINGS = ("episode_s", "confirm_count", "confirm_s", "silence_s")


def scores_needed(rate: float) -> int:
    """Return the least number of nominal scores for a rate: 1 / rate - 1, rounded up."""
    return math.ceil(1 / _exact(rate)) - 1


def allowed(count: int, rate: float) -> int:
    """Return how many of count + 1 exchangeable scores may exceed the threshold."""
    return min(count, math.floor((count + 1) * _exact(rate)))


def conformal_threshold(scores: np.ndarray, rate: float, unit: str) -> float:
    """Return the score that new nominal scores exceed with a probability of at most `rate`.

    Args:
        scores: (n,) ascending.
        rate: in (0, 1).
        unit: of the scores, for the message: 'frames' or 'episodes of 10 s'.

    Raises:
        CalibrationError: too few scores for the rate.
    """
    may_exceed = allowed(len(scores), rate)
    if may_exceed < 1:
        raise CalibrationError(
            f"a false-alarm rate of {rate:g} needs at least {scores_needed(rate)} nominal "
            f"calibration {unit}, found {len(scores)}"
        )
    # The (n + 1 - allowed)-th smallest is the ceil((n + 1)(1 - alpha))-th.
    return float(scores[len(scores) - may_exceed])


def _exact(rate: float) -> Fraction:
    # 0.07 means seven hundredths: the nearest double below would cost a rank at (n + 1) = 100.
    return Fraction(repr(float(rate)))


@dataclass(frozen=True, eq=False)
class Episodes:
    """The largest confirmed scores of nominal episodes.

    Attributes:
        scores: (n,) float64, ascending, finite.
        episode_s: length of an episode in seconds.
        confirm_count, confirm_s, silence_s: the confirmation that the scores hold for.
        target_episode_rate: share of nominal episodes that may raise an alarm.

    Raises:
        CalibrationError: scores, lengths, count or rate out of range, or too few scores for the
            rate.
    """

    scores: np.ndarray
    episode_s: float
    confirm_count: int
    confirm_s: float
    silence_s: float
    target_episode_rate: float

    def __post_init__(self) -> None:
        scores = self.scores
        finite = scores.ndim == 1 and np.isfinite(scores).all()
        if not finite or np.any(np.diff(scores) < 0):
            raise CalibrationError("episodes: expected ascending finite scores")
        lengths_s = self.episode_s, self.confirm_s, self.silence_s
        if not all(0 < length_s < np.inf for length_s in lengths_s):
            raise CalibrationError("episodes: expected lengths above 0 s")
        if self.confirm_count < 1:
            raise CalibrationError(
                f"episodes: expected a confirm_count of at least 1, found {self.confirm_count}"
            )
        if not 0.0 < self.target_episode_rate < 1.0:
            raise CalibrationError(
                f"episodes: expected a rate in (0, 1), found {self.target_episode_rate}"
            )
        self._threshold_for(self.target_episode_rate)

    @classmethod
    def of_drives(
        cls,
        scores_by_drive: Mapping[str, Sequence[float]],
        stamps_by_drive: Mapping[str, Sequence[int]],
        settings: Settings,
    ) -> Episodes:
        """Return the complete episodes of nominal drives, without the rest at the end of each.

        Args:
            scores_by_drive: frame scores; late and equal ones are put in order.
            stamps_by_drive: stamps of the frames in nanoseconds.
            settings: `episode_s`, `target_episode_rate` and the confirmation.

        Raises:
            CalibrationError: a jump back in the stamps, frames too far apart to be confirmed, or
                too few episodes for the rate.
        """
        maxima: list[float] = []
        for drive, scores in scores_by_drive.items():
            stamps_ns = np.array(stamps_by_drive[drive], np.int64)
            if (jump := first_jump(stamps_ns)) is not None:
                raise CalibrationError(
                    f"episodes: drive '{drive}': expected stamps that go back by at most "
                    f"{LATE_S:g} s, found a jump back at frame {jump}"
                )
            order = order_of(stamps_ns)
            stamps_s = stamps_ns[order] / 1e9
            confirmed = _confirmed_scores(
                np.array(scores, np.float64)[order], stamps_s, settings, drive
            )
            episodes = complete_episodes(stamps_s, settings.episode_s)
            maxima += [float(confirmed[frames].max()) for frames in episodes]
        values = {
            name: getattr(settings, name) for name in (*EPISODE_SETTINGS, "target_episode_rate")
        }
        return cls(np.sort(np.array(maxima)), **values)

    def threshold(self, settings: Settings) -> float:
        """Return the score that nominal episodes exceed at most at `target_episode_rate`.

        Raises:
            MismatchError: another length or confirmation than was calibrated.
            CalibrationError: too few episodes for the rate.
        """
        for name in EPISODE_SETTINGS:
            expected, given = getattr(self, name), getattr(settings, name)
            if expected != given:
                raise MismatchError(
                    f"calibration: episodes: setting '{name}'", expected, given, "calibrate again"
                )
        return self._threshold_for(settings.target_episode_rate)

    def _threshold_for(self, rate: float) -> float:
        return conformal_threshold(self.scores, rate, f"episodes of {self.episode_s:g} s")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**vars(self), "scores": self.scores.tolist()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Episodes:
        """Make episodes from the values of `to_dict`.

        Raises:
            CalibrationError: keys missing or unknown, or values of another type or out of range.
        """
        types = {**get_type_hints(cls), "scores": list}
        if {key: type(value) for key, value in values.items()} != types:
            raise CalibrationError(f"episodes: expected {', '.join(types)}")
        if not all(type(score) is float for score in values["scores"]):
            raise CalibrationError("episodes: expected scores that are numbers")
        return cls(**{**values, "scores": np.array(values["scores"], np.float64)})


def complete_episodes(stamps_s: np.ndarray, episode_s: float) -> list[np.ndarray]:
    """Return the frames of every complete episode of a drive, as (n,) positions.

    A frame stands for the time up to the next one; an episode is complete when nine tenths of it
    are covered. Stamps are (n,) rising seconds.
    """
    # Frames of one stamp, as of two publishers, say nothing about the period.
    periods_s = np.diff(np.unique(stamps_s))
    period_s = float(np.median(periods_s)) if len(periods_s) else 0.0
    covered_s = stamps_s[-1] - stamps_s[0] + period_s
    # Tenths of a second have no exact binary form.
    numbers = ((stamps_s - stamps_s[0]) / episode_s + 1e-9).astype(int)
    return [
        np.flatnonzero(numbers == number)
        for number in np.unique(numbers)
        if covered_s >= (number + _COVERED_SHARE) * episode_s - 1e-9
    ]


def _confirmed_scores(
    scores: np.ndarray, stamps_s: np.ndarray, settings: Settings, drive: str
) -> np.ndarray:
    """Return (n,) the score up to which each frame is confirmed, the least one where none is."""
    count, least = settings.confirm_count, float(scores.min())
    confirmed = np.full(len(scores), least)
    # Confirmed scores in falling order, and when each was last reached.
    lasting: list[tuple[float, float]] = []
    first = full_windows = 0
    for last, (score, now_s) in enumerate(zip(scores, stamps_s, strict=True)):
        # The tolerance keeps the frame of one second ago in a window of one second.
        while now_s - stamps_s[first] > settings.confirm_s + 1e-6:
            first += 1
        window = scores[first : last + 1]
        full_windows += len(window) >= count
        if len(window) >= count:
            # A frame raises no alarm above its own score.
            confirmed[last] = min(np.partition(window, len(window) - count)[-count], score)
        lasting = [(s, t) for s, t in lasting if now_s - t <= settings.silence_s + 1e-6]
        confirmed[last] = max([confirmed[last], *(min(level, score) for level, _ in lasting)])
        lasting = [(s, t) for s, t in lasting if s > confirmed[last]]
        if confirmed[last] > least:
            lasting.append((float(confirmed[last]), float(now_s)))
    if 2 * full_windows < len(scores) and len(scores) >= count:
        raise CalibrationError(
            f"episodes: drive '{drive}': expected frames so close that {count} lie within "
            f"{settings.confirm_s:g} s, found {full_windows} such of {len(scores)}; calibrate with "
            "every frame"
        )
    return confirmed
