"""Conformal prediction in two layers: thresholds that a new nominal drive keeps.

Frames of one drive resemble each other, so drives are what is exchangeable. For each of D drives,
the ceil(n (1 - alpha))-th smallest of its n scores is exceeded by at most a share alpha of its
frames. If the drives and a new one are exchangeable, the ceil((D + 1)(1 - delta))-th smallest of
these D quantiles is at least that of the new drive with probability 1 - delta or more (Dunn,
Wasserman and Ramdas 2018, arXiv 1809.07441; Lee, Barber and Willett 2023, arXiv 2306.06342).

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
DEFAULT_CONFIDENCE = 0.9
EPISODE_SETTINGS = ("episode_s", "confirm_count", "confirm_s", "silence_s")


def frames_needed(rate: float) -> int:
    """Return the least number of scores of a drive that a rate can be seen in: 1 / rate."""
    return math.ceil(1 / _exact(rate))


def drives_needed(confidence: float) -> int:
    """Return the least number of drives for a confidence in (0, 1)."""
    return math.ceil(_exact(confidence) / (1 - _exact(confidence)))


def drive_rank(drives: int, confidence: float) -> int:
    """Return which of the quantiles of D drives, in ascending order from 1, is the threshold.

    Args:
        drives: D, at least 1.
        confidence: probability over new drives, in (0, 1); 0: 0.9, or D / (D + 1) if that is less.

    Raises:
        CalibrationError: too few drives for the confidence.
    """
    if not confidence:
        rank = math.ceil((drives + 1) * _exact(DEFAULT_CONFIDENCE))
        return min(rank, drives)
    rank = math.ceil((drives + 1) * _exact(confidence))
    if rank > drives:
        raise CalibrationError(
            f"a confidence of {confidence:g} needs at least {drives_needed(confidence)} nominal "
            f"calibration drives, found {drives}"
        )
    return rank


def conformal_threshold(
    scores_by_drive: Sequence[np.ndarray], rate: float, confidence: float
) -> float:
    """Return the score that at most a share `rate` of a new nominal drive exceeds.

    Args:
        scores_by_drive: (n,) ascending for each drive, n >= 1.
        rate: in (0, 1).
        confidence: as `drive_rank`.

    Raises:
        CalibrationError: too few drives for the confidence.
    """
    rank = drive_rank(len(scores_by_drive), confidence)
    quantiles = sorted(
        # The (n - floor(n alpha))-th smallest is the ceil(n (1 - alpha))-th.
        float(scores[len(scores) - 1 - math.floor(len(scores) * _exact(rate))])
        for scores in scores_by_drive
    )
    return quantiles[rank - 1]


def p_value(scores_by_drive: Sequence[np.ndarray], score: float, confidence: float) -> float:
    """Return the least rate, in [0, 1], whose threshold a score exceeds.

    Of each drive the share of its scores that are at least as high, and of these shares the one of
    the rank of the threshold.

    Args:
        scores_by_drive: (n,) ascending for each drive, n >= 1.
        score: finite.
        confidence: as `drive_rank`.
    """
    shares = sorted(
        (len(scores) - int(np.searchsorted(scores, score, side="left"))) / len(scores)
        for scores in scores_by_drive
    )
    return shares[drive_rank(len(scores_by_drive), confidence) - 1]


def _exact(rate: float) -> Fraction:
    # 0.07 means seven hundredths: the nearest double below would cost a rank at (n + 1) = 100.
    return Fraction(repr(float(rate)))


@dataclass(frozen=True, eq=False)
class Episodes:
    """The largest confirmed scores of nominal episodes.

    Attributes:
        scores_by_drive: (n,) float64 for each drive that has any, ascending, finite.
        episode_s: length of an episode in seconds.
        confirm_count, confirm_s, silence_s: the confirmation that the scores hold for.
        target_episode_rate: share of nominal episodes that may raise an alarm.

    Raises:
        CalibrationError: no scores, or scores, lengths, count or rate out of range.
    """

    scores_by_drive: tuple[np.ndarray, ...]
    episode_s: float
    confirm_count: int
    confirm_s: float
    silence_s: float
    target_episode_rate: float

    def __post_init__(self) -> None:
        if not self.scores_by_drive:
            raise CalibrationError("episodes: expected complete episodes of a drive, found none")
        for scores in self.scores_by_drive:
            check_scores(scores, "episodes")
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

    @classmethod
    def of_drives(
        cls,
        parts_by_drive: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[int]]]],
        settings: Settings,
    ) -> Episodes:
        """Return the complete episodes of nominal drives, without the rest at the end of each part.

        Args:
            parts_by_drive: parts of each drive by name: frame scores, of which late and equal ones
                are put in order, and stamps of the frames in nanoseconds.
            settings: `episode_s`, `target_episode_rate` and the confirmation.

        Raises:
            CalibrationError: a jump back in the stamps, frames too far apart to be confirmed, or no
                complete episode.
        """
        maxima: list[np.ndarray] = []
        for parts in parts_by_drive.values():
            of_drive: list[float] = []
            for part, (scores, stamps) in parts.items():
                stamps_ns = np.array(stamps, np.int64)
                if (jump := first_jump(stamps_ns)) is not None:
                    raise CalibrationError(
                        f"episodes: drive '{part}': expected stamps that go back by at most "
                        f"{LATE_S:g} s, found a jump back at frame {jump}"
                    )
                order = order_of(stamps_ns)
                stamps_s = stamps_ns[order] / 1e9
                confirmed = _confirmed_scores(
                    np.array(scores, np.float64)[order], stamps_s, settings, part
                )
                episodes = complete_episodes(stamps_s, settings.episode_s)
                of_drive += [float(confirmed[frames].max()) for frames in episodes]
            if of_drive:
                maxima.append(np.sort(of_drive))
        values = {
            name: getattr(settings, name) for name in (*EPISODE_SETTINGS, "target_episode_rate")
        }
        return cls(tuple(maxima), **values)

    @property
    def count(self) -> int:
        """Return the number of episodes."""
        return sum(map(len, self.scores_by_drive))

    def threshold(self, settings: Settings) -> float:
        """Return the score that a share `target_episode_rate` of nominal episodes exceeds at most.

        Raises:
            MismatchError: another length or confirmation than was calibrated.
            CalibrationError: too few drives for the confidence.
        """
        for name in EPISODE_SETTINGS:
            expected, given = getattr(self, name), getattr(settings, name)
            if expected != given:
                raise MismatchError(
                    f"calibration: episodes: setting '{name}'", expected, given, "calibrate again"
                )
        return self.threshold_for(settings.target_episode_rate, settings.confidence)

    def threshold_for(self, rate: float, confidence: float) -> float:
        """Return the threshold of another rate; raises as `conformal_threshold`."""
        return conformal_threshold(self.scores_by_drive, rate, confidence)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**vars(self), "scores_by_drive": [s.tolist() for s in self.scores_by_drive]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Episodes:
        """Make episodes from the values of `to_dict`.

        Raises:
            CalibrationError: keys missing or unknown, or values of another type or out of range.
        """
        types = {**get_type_hints(cls), "scores_by_drive": list}
        if {key: type(value) for key, value in values.items()} != types:
            raise CalibrationError(f"episodes: expected {', '.join(types)}")
        by_drive = values["scores_by_drive"]
        return cls(**{**values, "scores_by_drive": tuple(map(scores_of_list, by_drive))})


def check_scores(scores: np.ndarray, what: str) -> None:
    """Raise CalibrationError unless scores are (n,) float64, n >= 1, finite and ascending."""
    if scores.ndim != 1 or scores.dtype != np.float64 or not len(scores):
        raise CalibrationError(
            f"{what}: expected scores (n,) float64, found {scores.shape} {scores.dtype}"
        )
    if not np.isfinite(scores).all() or np.any(np.diff(scores) < 0):
        raise CalibrationError(f"{what}: expected ascending finite scores")


def scores_of_list(values: Any) -> np.ndarray:
    """Return (n,) float64 of the numbers of a file.

    Raises:
        CalibrationError: no list, or something that is no number.
    """
    if not isinstance(values, list) or not all(type(score) is float for score in values):
        raise CalibrationError("scores: expected a list of numbers")
    return np.array(values, np.float64)


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
