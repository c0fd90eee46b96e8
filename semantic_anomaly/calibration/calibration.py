"""Calibration: a threshold with a known false-alarm rate, and p-values, from nominal drives alone.

By conformal prediction over drives (`conformal.py`), of frames and, if a rate is set, of episodes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semantic_anomaly.calibration import format as calibration_format
from semantic_anomaly.calibration.conformal import (
    DEFAULT_CONFIDENCE,
    EPISODE_SETTINGS,
    Episodes,
    check_scores,
    conformal_threshold,
    drive_rank,
    drives_needed,
    frames_needed,
    p_value,
)
from semantic_anomaly.calibration.drift import DriftCheck
from semantic_anomaly.calibration.staleness import StaleEdit, edits_since, staleness_warning
from semantic_anomaly.errors import CalibrationError, MismatchError, ModelOutputError
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.normalisation import ScoreNormalisation
from semantic_anomaly.settings import EXECUTIONS, Settings
from semantic_anomaly.structures import HeatmapScale

if TYPE_CHECKING:
    from semantic_anomaly.index.nominal_index import NominalIndex

TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class DriveScores:
    """The frame scores of a nominal drive; parts of one recording are one drive.

    Attributes:
        name: of the recording.
        scores: (n,) float64, ascending, finite.
        left_out: whether the index was built from the drive too, and it was compared with the
            entries of the other drives only.

    Raises:
        CalibrationError: no scores, or scores out of range or order.
    """

    name: str
    scores: np.ndarray
    left_out: bool = False

    def __post_init__(self) -> None:
        check_scores(self.scores, f"calibration drive '{self.name}'")
        self.scores.flags.writeable = False


@dataclass(frozen=True, eq=False)
class Calibration:
    """Nominal scores, and the conditions under which they hold.

    Attributes:
        drives: their frame scores, at least one drive.
        target_false_alarm_rate: share of the frames of a nominal drive that may exceed `threshold`.
        confidence: probability, over new drives, that they keep the rate; 0: as `drive_rank`.
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
        pattern_scores: scores of the same thumbnails with a test pattern, for the self-test.
        stale_edits: edits of the index since calibration; empty: none.
        episodes: nominal scores of episodes; None: no rate of episodes was set.
        created: UTC time of creation as `TIME_FORMAT`, empty if unknown. It is not part of the
            digest: equal calibrations have equal digests.

    Raises:
        CalibrationError: no drives, two of one name, too few for the confidence, or numbers that
            are not finite.
    """

    drives: tuple[DriveScores, ...]
    target_false_alarm_rate: float
    confidence: float
    heatmap_low: float
    index_fingerprint: str
    scoring: Mapping[str, Any]
    roi: Mapping[str, Any]
    normalisations: tuple[ScoreNormalisation, ...]
    camera: str = "camera"
    dtype: str = ""
    execution: str = ""
    probe_scores: tuple[float, ...] = ()
    pattern_scores: tuple[float, ...] = ()
    stale_edits: tuple[StaleEdit, ...] = ()
    episodes: Episodes | None = None
    created: str = ""

    def __post_init__(self) -> None:
        if self.created:
            _parsed_time(self.created)
        if not math.isfinite(self.heatmap_low):
            raise CalibrationError(
                f"calibration heatmap_low: expected a finite number, found {self.heatmap_low}"
            )
        if not self.normalisations:
            raise CalibrationError("calibration normalisations: expected one for each stage")
        for name in ("probe_scores", "pattern_scores"):
            if not np.isfinite(getattr(self, name)).all():
                raise CalibrationError(f"calibration {name}: expected finite numbers")
        if len(self.pattern_scores) not in (0, len(self.probe_scores)):
            raise CalibrationError(
                f"calibration pattern_scores: expected {len(self.probe_scores)} as probe_scores "
                f"has, found {len(self.pattern_scores)}"
            )
        if self.execution not in ("", *EXECUTIONS):
            raise CalibrationError(
                f"calibration execution: expected one of {', '.join(EXECUTIONS)}, found "
                f"'{self.execution}'"
            )
        names = [drive.name for drive in self.drives]
        if not names or len(set(names)) < len(names):
            raise CalibrationError(f"calibration: expected drives of distinct names, found {names}")
        # Too few drives for the confidence raise here.
        _ = self.threshold

    @classmethod
    def fit(
        cls,
        scores_by_drive: Mapping[str, Sequence[float]],
        *,
        left_out: Collection[str] = (),
        heatmap_low: float,
        index: NominalIndex,
        settings: Settings,
        roi: RegionOfInterest,
        camera: str,
        dtype: str = "",
        execution: str = "",
        probe_scores: Sequence[float] = (),
        pattern_scores: Sequence[float] = (),
        normalisations: Sequence[ScoreNormalisation],
        episodes: Episodes | None = None,
    ) -> Calibration:
        """Make a calibration from the frame scores of nominal drives.

        Those of `left_out` are in the index, and were compared with the entries of the others. The
        other arguments are those of the attributes; `settings` has target rate and confidence, and
        the settings that shape a score.

        Raises:
            CalibrationError: a drive without scores, too few drives for the confidence, or scores
                that are not finite.
        """
        return cls(
            drives=tuple(
                DriveScores(name, np.sort(np.array(scores, np.float64)), name in left_out)
                for name, scores in scores_by_drive.items()
            ),
            target_false_alarm_rate=settings.target_false_alarm_rate,
            confidence=settings.confidence,
            heatmap_low=float(heatmap_low),
            index_fingerprint=index.fingerprint,
            scoring=settings.scoring,
            roi=roi.describe(),
            normalisations=tuple(normalisations),
            camera=camera,
            dtype=dtype,
            execution=execution,
            probe_scores=tuple(map(float, probe_scores)),
            pattern_scores=tuple(map(float, pattern_scores)),
            episodes=episodes,
            created=datetime.now(timezone.utc).strftime(TIME_FORMAT),
        )

    @property
    def age_days(self) -> float | None:
        """Return the days since creation by the clock of this machine, None if unknown.

        Simulated time has no part in it. It is negative if a clock was wrong.
        """
        if not self.created:
            return None
        return (datetime.now(timezone.utc) - _parsed_time(self.created)) / timedelta(days=1)

    @property
    def scores(self) -> np.ndarray:
        """Return (n,) float64, ascending: the frame scores of all drives."""
        return np.sort(np.concatenate(self._scores_by_drive))

    @property
    def spread(self) -> float:
        """Return the interquartile range of the frame scores of all drives."""
        return float(np.subtract(*np.quantile(self.scores, (0.75, 0.25))))

    @property
    def frames_by_drive(self) -> dict[str, int]:
        """Return the number of frames of each drive by its name."""
        return {drive.name: len(drive.scores) for drive in self.drives}

    @property
    def count(self) -> int:
        """Return the number of calibration frames."""
        return sum(map(len, self._scores_by_drive))

    @property
    def _scores_by_drive(self) -> list[np.ndarray]:
        return [drive.scores for drive in self.drives]

    @property
    def threshold(self) -> float:
        """Return the score above which a frame is anomalous at target rate and confidence."""
        return self.threshold_for(self.target_false_alarm_rate)

    def threshold_for(self, rate: float, confidence: float | None = None) -> float:
        """Return the score above which a frame is anomalous at another rate.

        Args:
            rate: in (0, 1).
            confidence: as `drive_rank`; None: that of the calibration.

        Raises:
            CalibrationError: too few drives for the confidence.
        """
        confidence = self.confidence if confidence is None else confidence
        return conformal_threshold(self._scores_by_drive, rate, confidence)

    def resolve(self, settings: Settings) -> Settings:
        """Return settings with the rates of the calibration where none is set.

        Episode length and confirmation come with the rate of episodes, where they have their
        defaults.
        """
        changes: dict[str, Any] = {}
        if not settings.target_false_alarm_rate:
            changes["target_false_alarm_rate"] = self.target_false_alarm_rate
        if not settings.confidence:
            changes["confidence"] = self.confidence
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
            CalibrationError: too few drives for the confidence, or no episodes.
            MismatchError: episodes of another length or confirmation.
        """
        threshold = self.threshold_for(settings.target_false_alarm_rate, settings.confidence)
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

    def p_value(self, score: float, confidence: float | None = None) -> float:
        """Return the least rate whose threshold a score exceeds, in [0, 1].

        A score exceeds `threshold_for(rate)` exactly when its p-value is at most `rate`. It is 0
        above all scores of as many drives as the confidence asks for.

        Args:
            score: of a frame.
            confidence: as `threshold_for`.

        Raises:
            ModelOutputError: the score is not finite.
        """
        if not math.isfinite(score):
            raise ModelOutputError(f"score: expected a finite number, found {score}")
        confidence = self.confidence if confidence is None else confidence
        return p_value(self._scores_by_drive, score, confidence)

    def drift_check(self, window: int) -> DriftCheck:
        """Return a drift check against these scores, of windows of so many frames."""
        return DriftCheck(self._scores_by_drive, window)

    def scale(self, threshold: float) -> HeatmapScale:
        """Return the scale of heatmaps: 0 typical nominal, 1 the threshold."""
        return HeatmapScale.from_typical(self.heatmap_low, threshold)

    @property
    def promise(self) -> str:
        """Return in one sentence what the threshold promises."""
        return self._promise_for(self.target_false_alarm_rate, self.confidence)

    def promise_of(self, settings: Settings) -> str:
        """Return in one sentence what the threshold of `threshold_of` promises."""
        return self._promise_for(settings.target_false_alarm_rate, settings.confidence)

    def _promise_for(self, rate: float, confidence: float) -> str:
        count = len(self.drives)
        if count == 1:
            return (
                f"nothing is promised beyond drive '{self.drives[0].name}': calibrate with at "
                f"least 2 drives, with {drives_needed(DEFAULT_CONFIDENCE)} for a probability of "
                f"{DEFAULT_CONFIDENCE:g}"
            )
        rank = drive_rank(count, confidence)
        estimated = any(drive.left_out for drive in self.drives)
        short = len(self._short_drives(rate))
        needed = frames_needed(rate)
        return (
            f"{'estimated by leaving one drive out: ' * estimated}on a new drive like "
            f"these {count}, at most {100 * rate:g} % of the frames are "
            f"above the threshold, with probability {rank}/{count + 1}"
            + f"; {short} of these drives have fewer than {needed} frames, too few to show it"
            * (short > 0)
        )

    def _short_drives(self, rate: float) -> list[str]:
        """Return the names of drives with too few frames to show a rate."""
        needed = frames_needed(rate)
        return [drive.name for drive in self.drives if len(drive.scores) < needed]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return warnings about the reliability of the false-alarm rate."""
        warnings = []
        count, wanted = len(self.drives), drives_needed(DEFAULT_CONFIDENCE)
        if count == 1:
            warnings.append(self.promise)
        elif count < wanted and not self.confidence:
            warnings.append(
                f"{count} calibration drives: new drives keep the rate with probability "
                f"{count}/{count + 1}; {wanted} drives give {DEFAULT_CONFIDENCE:g}"
            )
        rate = self.target_false_alarm_rate
        needed, short = frames_needed(rate), self._short_drives(rate)
        if short:
            warnings.append(
                f"{len(short)} of {count} calibration drives have fewer than the {needed} frames "
                f"of a rate of {rate:g}, such as '{short[0]}': their "
                "largest score counts"
            )
        if self.stale_edits:
            warnings.append(staleness_warning(self.stale_edits))
        return tuple(warnings)

    def carried(self, index: NominalIndex, changes: Iterable[StaleEdit]) -> Calibration:
        """Return this calibration for an edited index: still in force, but stale."""
        since = edits_since(self.stale_edits, changes)
        return replace(self, index_fingerprint=index.fingerprint, stale_edits=since)

    def check(self, index: NominalIndex, settings: Settings, roi: RegionOfInterest) -> None:
        """Check that index, settings and region of interest are those of the calibration.

        Raises:
            MismatchError: one of them differs.
        """
        scoring, expected_scoring = settings.scoring, dict(self.scoring)
        pairs = {
            "index fingerprint": (self.index_fingerprint, index.fingerprint),
            "score normalisations": (len(self.normalisations), len(index.stages)),
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
            return cls(
                **{**values, "drives": tuple(DriveScores(**drive) for drive in values["drives"])}
            )
        except CalibrationError as error:
            raise CalibrationError(f"calibration of index '{path.parent}': {error}") from error


def _parsed_time(text: str) -> datetime:
    try:
        return datetime.strptime(text, TIME_FORMAT).replace(tzinfo=timezone.utc)
    except ValueError:
        raise CalibrationError(
            f"calibration created: expected a time such as 2026-01-31T12:00:00Z, found '{text:.40}'"
        ) from None
