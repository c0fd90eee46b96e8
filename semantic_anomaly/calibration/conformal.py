"""Split conformal prediction: a threshold that nominal scores exceed at most so often.

When n calibration scores and a new nominal one are exchangeable, the new one exceeds the
ceil((n + 1)(1 - alpha))-th smallest of them with probability at most alpha (Vovk, Gammerman and
Shafer 2005; Laxhammar and Falkman 2010 for anomalies).

Nominal scores by stretch of driving, for a promise in stretches rather than in frames.

What alarms in a stretch is its largest confirmed score. A component is confirmed by `confirm_count`
frames within `confirm_s` seconds and stays so while it is found again within `silence_s`, so the
confirmed score of a frame is the `confirm_count`-th largest within that time, or what an earlier
one has kept since, its own at most: no less than what its components were confirmed at, for they
must also be the same thing. The promise errs on the side of fewer alarms.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from semantic_anomaly.calibration import conformal
from semantic_anomaly.errors import CalibrationError, MismatchError
from semantic_anomaly.settings import Settings


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


_log = logging.getLogger(__name__)
# Share of a stretch that must be covered.
_WHOLE = 0.9


@dataclass(frozen=True, eq=False)
class Stretches:
    """The largest confirmed scores of nominal stretches.

    Attributes:
        scores: (n,) float64, ascending, in [0, 2].
        episode_s: length of a stretch in seconds.
        confirm_count, confirm_s, silence_s: the confirmation that they hold for.
        target_episode_rate: share of nominal stretches that may raise an alarm.

    Raises:
        CalibrationError: no scores, or some that cannot be; a length, count or rate out of range;
            too few scores for the rate.
    """

    scores: np.ndarray
    episode_s: float
    confirm_count: int
    confirm_s: float
    silence_s: float
    target_episode_rate: float

    def __post_init__(self) -> None:
        scores = self.scores
        # NaN fails the comparisons.
        inside = scores.ndim == 1 and len(scores) and np.all((scores >= 0.0) & (scores <= 2.0))
        if not inside or np.any(np.diff(scores) < 0):
            raise CalibrationError("stretches: expected ascending scores in [0, 2]")
        lengths = self.episode_s, self.confirm_s, self.silence_s
        if not all(0 < length < np.inf for length in lengths):
            raise CalibrationError("stretches: expected lengths above 0 s")
        if self.confirm_count < 1:
            raise CalibrationError(f"stretches: expected a count, found {self.confirm_count}")
        if not 0.0 < self.target_episode_rate < 1.0:
            raise CalibrationError(f"stretches: expected a rate, found {self.target_episode_rate}")
        conformal.threshold(scores, self.target_episode_rate, "stretches")

    @classmethod
    def of_drives(
        cls,
        scores_by_drive: Mapping[str, Sequence[float]],
        stamps_by_drive: Mapping[str, Sequence[int]],
        settings: Settings,
    ) -> Stretches:
        """Return the whole stretches of nominal drives; what is left over at their ends is not one.

        Args:
            scores_by_drive: frame scores in the order of time.
            stamps_by_drive: nanoseconds of each.
            settings: `episode_s`, `target_episode_rate` and those of the confirmation.

        Raises:
            CalibrationError: stamps of a drive that do not rise, frames too far apart to be
                confirmed, or too few stretches for the rate.
        """
        found: list[float] = []
        for drive, scores in scores_by_drive.items():
            stamps_s = np.array(stamps_by_drive[drive], np.int64) / 1e9
            if np.any(np.diff(stamps_s) <= 0):
                raise CalibrationError(f"stretches: drive '{drive}': expected stamps that rise")
            confirmed = _confirmed(np.array(scores, np.float64), stamps_s, settings, drive)
            stretches = whole_stretches(stamps_s, settings.episode_s)
            found += [float(confirmed[frames].max()) for frames in stretches]
        needed = conformal.scores_needed(settings.target_episode_rate)
        if len(found) < needed:
            raise CalibrationError(
                f"a rate of {settings.target_episode_rate:g} of stretches of "
                f"{settings.episode_s:g} s needs at least {needed} nominal calibration stretches, "
                f"found {len(found)} whole ones"
            )
        given = settings.confirm_count, settings.confirm_s, settings.silence_s
        return cls(
            np.sort(np.array(found)), settings.episode_s, *given, settings.target_episode_rate
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings that it promises by."""
        return {k: v for k, v in asdict(self).items() if k != "scores"}

    def threshold(self, settings: Settings) -> float:
        """Return the score that nominal stretches exceed at most at `target_episode_rate`.

        Raises:
            MismatchError: another length or confirmation than was calibrated.
            CalibrationError: too few stretches for the rate.
        """
        for name in ("episode_s", "confirm_count", "confirm_s", "silence_s"):
            expected, found = getattr(self, name), getattr(settings, name)
            if expected != found:
                raise MismatchError(
                    f"calibration: stretches: setting '{name}'", expected, found, "calibrate again"
                )
        return conformal.threshold(self.scores, settings.target_episode_rate, "stretches")

    def describe(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "scores": self.scores.tolist()}

    @classmethod
    def from_description(cls, values: Mapping[str, Any]) -> Stretches:
        """Return what `describe` described.

        Raises:
            CalibrationError: it describes nothing of the kind.
        """
        kinds = {
            **{"scores": list, "episode_s": float, "confirm_count": int, "confirm_s": float},
            **{"silence_s": float, "target_episode_rate": float},
        }
        if {key: type(value) for key, value in values.items()} != kinds:
            raise CalibrationError(f"stretches: expected {', '.join(kinds)}")
        if not all(type(score) is float for score in values["scores"]):
            raise CalibrationError("stretches: expected scores that are numbers")
        return cls(**{**values, "scores": np.array(values["scores"], np.float64)})


def stricter(of_frames: float, stretches: Stretches | None, settings: Settings) -> float:
    """Return the threshold that keeps the promise in frames and, if one is asked, in stretches.

    Raises:
        CalibrationError: a rate of stretches is asked for, and none were calibrated.
        MismatchError: as `Stretches.threshold`.
    """
    if settings.target_episode_rate:
        if stretches is None:
            raise CalibrationError(
                "setting 'target_episode_rate': expected a calibration by stretches, found one by "
                "frames alone; calibrate again with it"
            )
        return max(of_frames, stretches.threshold(settings))
    if stretches is not None:
        _log.warning(
            "calibrated for %g of stretches of %g s too, but target_episode_rate is 0: the "
            "threshold is that of frames alone",
            *(stretches.target_episode_rate, stretches.episode_s),
        )
    return of_frames


def whole_stretches(stamps_s: np.ndarray, episode_s: float) -> list[np.ndarray]:
    """Return the frames of every whole stretch of a drive, as (n,) positions.

    A frame stands for the time up to the next one; a stretch is whole when nine tenths of it are
    covered.

    Args:
        stamps_s: (n,) seconds, rising.
        episode_s: length of a stretch.
    """
    period = float(np.median(np.diff(stamps_s))) if len(stamps_s) > 1 else 0.0
    covered = stamps_s[-1] - stamps_s[0] + period
    # Stamps of a tenth of a second are none in binary.
    numbers = ((stamps_s - stamps_s[0]) / episode_s + 1e-9).astype(int)
    return [
        np.flatnonzero(numbers == n)
        for n in np.unique(numbers)
        if covered >= (n + _WHOLE) * episode_s - 1e-9
    ]


def _confirmed(
    scores: np.ndarray, stamps_s: np.ndarray, settings: Settings, drive: str
) -> np.ndarray:
    """Return (n,) the scores up to which each frame is confirmed, 0 where none is."""
    count, found = settings.confirm_count, np.zeros(len(scores))
    # Confirmed scores, falling, and when each was last reached.
    kept: list[tuple[float, float]] = []
    first = wide_enough = 0
    for last, (score, now_s) in enumerate(zip(scores, stamps_s, strict=True)):
        # A little room, for a window of a second holds the frame of a second ago.
        while now_s - stamps_s[first] > settings.confirm_s + 1e-6:
            first += 1
        window = scores[first : last + 1]
        wide_enough += len(window) >= count
        if len(window) >= count:
            # What is not found now raises no alarm now, however often it was.
            found[last] = min(np.partition(window, len(window) - count)[-count], score)
        kept = [each for each in kept if now_s - each[1] <= settings.silence_s + 1e-6]
        found[last] = max([found[last], *(min(level, score) for level, _ in kept)])
        kept = [each for each in kept if each[0] > found[last]]
        if found[last] > 0.0:
            kept.append((float(found[last]), float(now_s)))
    if 2 * wide_enough < len(scores) and len(scores) >= count:
        raise CalibrationError(
            f"stretches: drive '{drive}': expected frames close enough that {count} lie within "
            f"{settings.confirm_s:g} s, found {wide_enough} of {len(scores)} such; calibrate with "
            "every frame"
        )
    return found
