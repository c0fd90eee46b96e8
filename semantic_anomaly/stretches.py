"""Nominal scores by stretch of driving, for a promise in stretches rather than in frames.

What alarms in a stretch is its largest confirmed score. A component is confirmed by `confirm_count`
frames within `confirm_s` seconds, so the confirmed score of a frame is the `confirm_count`-th
largest within that time, its own at most: no less than what its components were confirmed at, for
they must also be the same thing. The promise errs on the side of fewer alarms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from semantic_anomaly import conformal
from semantic_anomaly.errors import CalibrationError, MismatchError
from semantic_anomaly.settings import Settings


@dataclass(frozen=True, eq=False)
class Stretches:
    """The largest confirmed scores of nominal stretches.

    Attributes:
        scores: (n,) float64, ascending, in [0, 2].
        episode_s: length of a stretch in seconds.
        confirm_count, confirm_s: the confirmation that they hold for.
        target_episode_rate: share of nominal stretches that may raise an alarm.

    Raises:
        CalibrationError: no scores, or some that cannot be; a length, count or rate out of range;
            too few scores for the rate.
    """

    scores: np.ndarray
    episode_s: float
    confirm_count: int
    confirm_s: float
    target_episode_rate: float

    def __post_init__(self) -> None:
        scores = self.scores
        # NaN fails the comparisons.
        inside = scores.ndim == 1 and len(scores) and np.all((scores >= 0.0) & (scores <= 2.0))
        if not inside or np.any(np.diff(scores) < 0):
            raise CalibrationError("stretches: expected ascending scores in [0, 2]")
        if not (0 < self.episode_s < np.inf and 0 < self.confirm_s < np.inf):
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
        """Return the stretches of nominal drives; what is left over at their ends counts as one.

        Args:
            scores_by_drive: frame scores in the order of time.
            stamps_by_drive: nanoseconds of each.
            settings: `episode_s`, `confirm_count`, `confirm_s` and `target_episode_rate`.

        Raises:
            CalibrationError: stamps of a drive that do not rise, or too few stretches for the rate.
        """
        found: list[float] = []
        for drive, scores in scores_by_drive.items():
            stamps_s = np.array(stamps_by_drive[drive], np.int64) / 1e9
            if np.any(np.diff(stamps_s) <= 0):
                raise CalibrationError(f"stretches: drive '{drive}': expected stamps that rise")
            confirmed = _confirmed(
                np.array(scores, np.float64), stamps_s, settings.confirm_count, settings.confirm_s
            )
            numbers = ((stamps_s - stamps_s[0]) / settings.episode_s).astype(int)
            found += [float(confirmed[numbers == n].max()) for n in np.unique(numbers)]
        given = settings.episode_s, settings.confirm_count, settings.confirm_s
        return cls(np.sort(np.array(found)), *given, settings.target_episode_rate)

    def threshold(self, settings: Settings) -> float:
        """Return the score that nominal stretches exceed at most at `target_episode_rate`.

        Raises:
            MismatchError: another length or confirmation than was calibrated.
            CalibrationError: too few stretches for the rate.
        """
        for name in ("episode_s", "confirm_count", "confirm_s"):
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
            "target_episode_rate": float,
        }
        if {key: type(value) for key, value in values.items()} != kinds:
            raise CalibrationError(f"stretches: expected {', '.join(kinds)}")
        if not all(type(score) is float for score in values["scores"]):
            raise CalibrationError("stretches: expected scores that are numbers")
        return cls(**{**values, "scores": np.array(values["scores"], np.float64)})


def _confirmed(scores: np.ndarray, stamps_s: np.ndarray, count: int, window_s: float) -> np.ndarray:
    """Return (n,) the count-th largest score of the window up to each frame, its own at most."""
    found = np.zeros(len(scores))
    first = 0
    for last in range(len(scores)):
        # A little room, for a window of a second holds the frame of a second ago.
        while stamps_s[last] - stamps_s[first] > window_s + 1e-6:
            first += 1
        window = scores[first : last + 1]
        if len(window) >= count:
            # What is not found now raises no alarm now, however often it was.
            kth = np.partition(window, len(window) - count)[len(window) - count]
            found[last] = min(kth, scores[last])
    return found
