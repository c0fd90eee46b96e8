"""Calibration: a threshold with a known false-alarm rate, and p-values, from nominal drives alone.

By split conformal prediction (`conformal.py`), of frames and, if a rate is set, of episodes. Frames
of one drive resemble each other, so many short drives are worth more than one long drive.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semantic_anomaly.calibration import format as calibration_format
from semantic_anomaly.calibration.conformal import (
    EPISODE_SETTINGS,
    Episodes,
    allowed,
    conformal_threshold,
    scores_needed,
)
from semantic_anomaly.calibration.staleness import StaleEdit, edits_since, staleness_warning
from semantic_anomaly.errors import CalibrationError, MismatchError, ModelOutputError
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.normalisation import ScoreNormalisation
from semantic_anomaly.settings import EXECUTIONS, Settings
from semantic_anomaly.structures import HeatmapScale

if TYPE_CHECKING:
    from semantic_anomaly.index.nominal_index import NominalIndex

FEW_DRIVES = 5
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Nominal scores, and the conditions under which they hold.

    Attributes:
        scores: (n,) float64, ascending: frame scores of nominal drives that the index has not
            seen.
        drives: name and number of frames of each drive.
        target_false_alarm_rate: share of nominal frames that may exceed `threshold`.
        heatmap_low: median over frames of the median value of the anomaly map; drawn as 0 in the
            heatmap.
        index_fingerprint: digest of the index.
        scoring: settings that shape a score, as `Settings.scoring`.
        roi: description of the region of interest.
        normalisations: score normalisation of each stage of the index.
        camera: name of the camera.
        dtype: precision of the backbone, empty if unknown.
        execution: what ran the backbone, torch or openvino, empty if unknown.
        probe_scores: scores of some thumbnails of the index, with which another precision is
            compared; empty: unknown.
        stale_edits: edits of the index since calibration; empty: none.
        episodes: nominal scores of episodes; None: no rate of episodes was set.

    Raises:
        CalibrationError: scores that are not finite, not sorted or not as many as the drives have,
            or too few for the rate.
    """

    scores: np.ndarray
    drives: tuple[tuple[str, int], ...]
    target_false_alarm_rate: float
    heatmap_low: float
    index_fingerprint: str
    scoring: Mapping[str, Any]
    roi: Mapping[str, Any]
    normalisations: tuple[ScoreNormalisation, ...]
    camera: str = "camera"
    dtype: str = ""
    execution: str = ""
    probe_scores: tuple[float, ...] = ()
    stale_edits: tuple[StaleEdit, ...] = ()
    episodes: Episodes | None = None

    def __post_init__(self) -> None:
        scores = self.scores
        if scores.ndim != 1 or scores.dtype != np.float64:
            raise CalibrationError(
                f"calibration scores: expected (n,) float64, found {scores.shape} {scores.dtype}"
            )
        if not np.isfinite(scores).all():
            raise CalibrationError("calibration scores: expected finite numbers")
        if np.any(np.diff(scores) < 0):
            raise CalibrationError("calibration scores: expected ascending order")
        if not math.isfinite(self.heatmap_low):
            raise CalibrationError(
                f"calibration heatmap_low: expected a finite number, found {self.heatmap_low}"
            )
        if not self.normalisations:
            raise CalibrationError("calibration normalisations: expected one for each stage")
        if not np.isfinite(self.probe_scores).all():
            raise CalibrationError("calibration probe_scores: expected finite numbers")
        if self.execution not in ("", *EXECUTIONS):
            raise CalibrationError(
                f"calibration execution: expected one of {', '.join(EXECUTIONS)}, found "
                f"'{self.execution}'"
            )
        counts = [count for _, count in self.drives]
        if min(counts, default=0) < 1 or sum(counts) != len(scores):
            raise CalibrationError(
                f"calibration drives: expected frames of every drive, {len(scores)} in all, "
                f"found {list(self.drives)}"
            )
        # Too few scores for the rate raise here.
        _ = self.threshold
        self.scores.flags.writeable = False

    @classmethod
    def fit(
        cls,
        scores_by_drive: Mapping[str, Sequence[float]],
        *,
        heatmap_low: float,
        index: NominalIndex,
        settings: Settings,
        roi: RegionOfInterest,
        camera: str,
        dtype: str = "",
        execution: str = "",
        probe_scores: Sequence[float] = (),
        normalisations: Sequence[ScoreNormalisation],
        episodes: Episodes | None = None,
    ) -> Calibration:
        """Make a calibration from the frame scores of nominal drives that the index has not seen.

        The other arguments are those of the attributes; `settings` has the target rate and the
        settings that shape a score.

        Raises:
            CalibrationError: a drive without scores, too few for the target rate, or scores out of
                range.
        """
        pooled = [score for scores in scores_by_drive.values() for score in scores]
        return cls(
            scores=np.sort(np.array(pooled, np.float64)),
            drives=tuple((name, len(scores)) for name, scores in scores_by_drive.items()),
            target_false_alarm_rate=settings.target_false_alarm_rate,
            heatmap_low=float(heatmap_low),
            index_fingerprint=index.fingerprint,
            scoring=settings.scoring,
            roi=roi.describe(),
            normalisations=tuple(normalisations),
            camera=camera,
            dtype=dtype,
            execution=execution,
            probe_scores=tuple(map(float, probe_scores)),
            episodes=episodes,
        )

    @property
    def count(self) -> int:
        """Return the number of calibration frames."""
        return len(self.scores)

    @property
    def threshold(self) -> float:
        """Return the score above which a frame is anomalous at the target rate."""
        return self.threshold_for(self.target_false_alarm_rate)

    def threshold_for(self, rate: float) -> float:
        """Return the score above which a frame is anomalous at another rate.

        Raises:
            CalibrationError: too few calibration scores for the rate.
        """
        return conformal_threshold(self.scores, rate, "frames")

    def resolve(self, settings: Settings) -> Settings:
        """Return settings with the rates of the calibration where none is set.

        Episode length and confirmation come with the rate of episodes, where they have their
        defaults.
        """
        changes: dict[str, Any] = {}
        if not settings.target_false_alarm_rate:
            changes["target_false_alarm_rate"] = self.target_false_alarm_rate
        if self.episodes is not None and not settings.target_episode_rate:
            changes["target_episode_rate"] = self.episodes.target_episode_rate
            defaults = Settings()
            for name in EPISODE_SETTINGS:
                if getattr(settings, name) == getattr(defaults, name):
                    changes[name] = getattr(self.episodes, name)
        return settings.replace(**changes)

    def threshold_of(self, settings: Settings) -> float:
        """Return the score that keeps the rates of frames and, if one is set, of episodes.

        Raises:
            CalibrationError: too few frames or episodes for the rate, or no episodes.
            MismatchError: episodes of another length or confirmation.
        """
        threshold = self.threshold_for(settings.target_false_alarm_rate)
        if settings.target_episode_rate:
            if self.episodes is None:
                raise CalibrationError(
                    "setting 'target_episode_rate': expected a calibration with episodes, found "
                    "one of frames only; calibrate again with --target-episode-rate"
                )
            return max(threshold, self.episodes.threshold(settings))
        if self.episodes is not None:
            _log.warning(
                "calibrated also for a rate of %g of episodes of %g s, but target_episode_rate is "
                "0: the threshold is that of frames only",
                *(self.episodes.target_episode_rate, self.episodes.episode_s),
            )
        return threshold

    def p_value(self, score: float) -> float:
        """Return the probability that a nominal frame scores at least as high, in (0, 1].

        A score exceeds `threshold_for(rate)` exactly when its p-value is at most `rate`.

        Raises:
            ModelOutputError: the score is not finite.
        """
        if not math.isfinite(score):
            raise ModelOutputError(f"score: expected a finite number, found {score}")
        as_high = self.count - int(np.searchsorted(self.scores, score, side="left"))
        return (1 + as_high) / (self.count + 1)

    def scale(self, threshold: float) -> HeatmapScale:
        """Return the scale of heatmaps: 0 typical nominal, 1 the threshold."""
        return HeatmapScale.from_typical(self.heatmap_low, threshold)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return warnings about the reliability of the false-alarm rate."""
        warnings = []
        if len(self.drives) == 1:
            warnings.append(
                "all calibration frames come from one drive: they resemble each other, and the "
                "false-alarm rate on other drives may be several times the target"
            )
        elif len(self.drives) < FEW_DRIVES:
            warnings.append(
                f"calibration frames come from only {len(self.drives)} drives: use {FEW_DRIVES} or "
                "more for a false-alarm rate that holds on other drives"
            )
        may_exceed = allowed(self.count, self.target_false_alarm_rate)
        if may_exceed < 3:
            needed = scores_needed(self.target_false_alarm_rate)
            warnings.append(
                f"{self.count} calibration frames are few for a rate of "
                f"{self.target_false_alarm_rate:g} (at least {needed}): the threshold depends on "
                f"the {'largest score' if may_exceed == 1 else 'two largest scores'}"
            )
        if self.stale_edits:
            warnings.append(staleness_warning(self.stale_edits))
        return tuple(warnings)

    def carried(self, index: NominalIndex, changes: Iterable[StaleEdit]) -> Calibration:
        """Return this calibration for an edited index: still in force, but stale."""
        since = edits_since(self.stale_edits, changes)
        return replace(self, index_fingerprint=index.fingerprint, stale_edits=since)

    def check(self, index_fingerprint: str, settings: Settings, roi: RegionOfInterest) -> None:
        """Check that index, settings and region of interest are those of the calibration.

        Raises:
            MismatchError: one of them differs.
        """
        scoring, expected_scoring = settings.scoring, dict(self.scoring)
        pairs = {
            "index fingerprint": (self.index_fingerprint, index_fingerprint),
            **{
                f"setting '{name}'": (expected_scoring.get(name), scoring.get(name))
                for name in sorted(expected_scoring.keys() | scoring.keys())
            },
            "region of interest": (dict(self.roi), roi.describe()),
        }
        for name, (expected, given) in pairs.items():
            if expected != given:
                raise MismatchError(f"calibration: {name}", expected, given, "calibrate again")

    def save(self, index_folder: Path) -> Path:
        """Write the camera's file into the folder of its index, whole or not at all.

        Raises:
            ArtefactError: the file cannot be written.
        """
        return calibration_format.write(index_folder, vars(self))

    @property
    def sha256(self) -> str:
        """Return the digest that its file carries."""
        return calibration_format.digest(vars(self))

    @classmethod
    def load(cls, index_folder: Path, camera: str = "") -> Calibration:
        """Read the calibration of a camera, else that of all, from the folder of its index.

        Raises:
            CalibrationError: missing, damaged, altered or of another format.
        """
        return cls.of_file(calibration_format.calibration_file(index_folder, camera))

    @classmethod
    def of_file(cls, path: Path) -> Calibration:
        """Read a file of a calibration; raises as `load`."""
        values = calibration_format.read(path)
        try:
            return cls(**values)
        except CalibrationError as error:
            raise CalibrationError(f"calibration of index '{path.parent}': {error}") from error
