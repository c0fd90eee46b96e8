"""A threshold with a known false-alarm rate, and p-values, from nominal drives alone.

By split conformal prediction (`conformal.py`), of frames and, where asked for, of stretches.
Frames of one drive resemble each other, so many short drives are worth more than a long one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from semantic_anomaly.calibration import conformal
from semantic_anomaly.calibration import format as calibration_file
from semantic_anomaly.calibration import staleness as renewals
from semantic_anomaly.calibration.conformal import Stretches, stricter
from semantic_anomaly.errors import CalibrationError, MismatchError, ModelOutputError
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.scoring.normalisation import UsualDistances
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import HeatmapScale

FEW_DRIVES = 5
_MOST = 2.0


class CalibratedIndex(Protocol):
    """What a calibration needs to know of an index."""

    @property
    def fingerprint(self) -> str:
        """Return the digest that names the index."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Nominal scores, and what they are true for.

    Attributes:
        scores: (n,) float64, ascending: frame scores of nominal drives that the index has not
            seen.
        drives: name and number of frames of each drive.
        target_false_alarm_rate: share of nominal frames that may exceed `threshold`.
        heatmap_low: median over frames of the frames' median patch distance: what the heatmap
            shows as typical. Not the median over all patches, which would need all of them.
        index_fingerprint: the index that gave the distances.
        neighbours, tail_percent, region: the settings that shape a score.
        usual: what distances are usual where, by branch, to which the scores are relative; empty:
            to nothing.
        scoring: what shapes a score besides plain patch distances; empty: nothing does.
        camera: name of the camera, for people.
        dtype: precision of the backbone that ran; empty where it is not known.
        renewal: edits of the index since the scores were measured, which make a new calibration
            due; empty: none.
        stretches: nominal scores by stretch of driving; None: not asked for.

    Raises:
        CalibrationError: scores are not finite, not sorted, not in [0, 2], not as many as the
            drives hold, or too few for the rate.
    """

    scores: np.ndarray
    drives: tuple[tuple[str, int], ...]
    target_false_alarm_rate: float
    heatmap_low: float
    index_fingerprint: str
    neighbours: int
    tail_percent: float
    region: Mapping[str, Any]
    usual: Mapping[str, UsualDistances] = field(default_factory=dict)
    scoring: Mapping[str, Any] = field(default_factory=dict)
    camera: str = "camera"
    dtype: str = ""
    renewal: tuple[renewals.Change, ...] = ()
    stretches: Stretches | None = None

    def __post_init__(self) -> None:
        scores = self.scores
        if scores.ndim != 1 or scores.dtype != np.float64:
            raise CalibrationError(
                f"calibration scores: expected (n,) float64, found {scores.shape} {scores.dtype}"
            )
        # NaN fails both comparisons.
        if not np.all((scores >= 0.0) & (scores <= 2.0)):
            raise CalibrationError("calibration scores: expected finite numbers in [0, 2]")
        if np.any(np.diff(scores) < 0):
            raise CalibrationError("calibration scores: expected ascending order")
        if not 0.0 <= self.heatmap_low <= 2.0:
            raise CalibrationError(
                f"calibration heatmap_low: expected a number in [0, 2], found {self.heatmap_low}"
            )
        counts = [count for _, count in self.drives]
        if min(counts, default=0) < 1 or sum(counts) != len(scores):
            raise CalibrationError(
                f"calibration drives: expected frames of every drive, {len(scores)} in all as "
                f"there are scores, found {counts}"
            )
        if self.threshold >= _MOST:
            raise CalibrationError(
                "calibration scores reach 2 at the threshold, the most there is, which nothing "
                "could exceed: calibrate with more frames, or of drives like those of the index"
            )
        if self.threshold <= 0.0:
            raise CalibrationError(
                "calibration scores are 0 up to the threshold: the index has seen these frames; "
                "calibrate with other drives"
            )
        self.scores.flags.writeable = False

    @classmethod
    def fit(
        cls,
        scores_by_drive: Mapping[str, Sequence[float]],
        *,
        heatmap_low: float,
        index: CalibratedIndex,
        settings: Settings,
        region: ImageRegion,
        camera: str,
        dtype: str = "",
        usual: Mapping[str, UsualDistances] | None = None,
        stretches: Stretches | None = None,
    ) -> Calibration:
        """Make a calibration from the frame scores of nominal drives.

        Args:
            scores_by_drive: frame scores by drive; all of drives that the index has not seen.
            heatmap_low: median over frames of the frames' median patch distance.
            index: the index that gave the distances.
            settings: give the target rate and what shapes a score.
            region: the part of the image that was scored.
            camera: name of the camera.
            dtype: precision of the backbone that ran.
            usual: what the scores are relative to.
            stretches: of the same drives, where a rate of them is asked for.

        Raises:
            CalibrationError: too few scores for the target rate, or scores that cannot be.
        """
        drives = tuple((name, len(scores)) for name, scores in scores_by_drive.items())
        if not drives or any(count == 0 for _, count in drives):
            empty = [name for name, count in drives if count == 0]
            raise CalibrationError(f"calibration: expected frames of every drive, found {empty}")
        pooled = np.concatenate([np.asarray(s, np.float64) for s in scores_by_drive.values()])
        return cls(
            scores=np.sort(pooled),
            drives=drives,
            target_false_alarm_rate=settings.target_false_alarm_rate,
            heatmap_low=float(heatmap_low),
            index_fingerprint=index.fingerprint,
            neighbours=settings.neighbours,
            tail_percent=settings.tail_percent,
            region=region.describe(),
            usual=dict(usual or {}),
            scoring=settings.scoring,
            camera=camera,
            dtype=dtype,
            stretches=stretches,
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
            CalibrationError: too few calibration scores for so low a rate.
        """
        return conformal.threshold(self.scores, rate, "frames")

    def threshold_of(self, settings: Settings) -> float:
        """Return the score that keeps both promises: of frames and, if one is asked, of stretches.

        Raises:
            CalibrationError: too few frames or stretches for the rate, or no stretches at all.
            MismatchError: stretches of another length or confirmation.
        """
        of_frames = self.threshold_for(settings.target_false_alarm_rate)
        return stricter(of_frames, self.stretches, settings)

    def p_value(self, score: float) -> float:
        """Return how often nominal frames score at least so high, in (0, 1].

        A score exceeds `threshold_for(rate)` exactly when its p-value is at most `rate`.

        Raises:
            ModelOutputError: the score is not finite.
        """
        if not math.isfinite(score):
            raise ModelOutputError(f"score: expected a finite number, found {score}")
        as_high = self.count - int(np.searchsorted(self.scores, score, side="left"))
        return (1 + as_high) / (self.count + 1)

    def scale(self, threshold: float) -> HeatmapScale:
        """Return the fixed scale of heatmaps: 0 typical nominal, 1 the threshold."""
        if self.heatmap_low < threshold:
            return HeatmapScale(self.heatmap_low, threshold)
        # Only a threshold set by hand lies below what is typical.
        return HeatmapScale(0.0, max(threshold, 1e-6))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return sentences on what weakens the promised rate."""
        found = []
        if len(self.drives) == 1:
            found.append(
                "all calibration frames come from one drive: they resemble each other, and the "
                "false-alarm rate on other drives may be several times the target"
            )
        elif len(self.drives) < FEW_DRIVES:
            found.append(
                f"calibration frames come from {len(self.drives)} drives only; "
                f"{FEW_DRIVES} or more make the false-alarm rate hold on drives not seen"
            )
        allowed = conformal.allowed(self.count, self.target_false_alarm_rate)
        needed = conformal.scores_needed(self.target_false_alarm_rate)
        if allowed < 3:
            found.append(
                f"{self.count} calibration frames are near the least that a rate of "
                f"{self.target_false_alarm_rate:g} needs ({needed}): the threshold rests on the "
                f"{'largest score' if allowed == 1 else 'two largest scores'}"
            )
        if self.renewal:
            found.append(renewals.warning(self.renewal))
        return tuple(found)

    def carried(self, index: CalibratedIndex, changes: Iterable[renewals.Change]) -> Calibration:
        """Return this calibration for an edited index: in force, and due for renewal."""
        since = renewals.after(self.renewal, changes)
        return replace(self, index_fingerprint=index.fingerprint, renewal=since)

    def check(self, index_fingerprint: str, settings: Settings, region: ImageRegion) -> None:
        """Refuse to be used with another index, region or score than it was made with.

        Raises:
            MismatchError: naming what differs.
        """
        pairs = {
            "index fingerprint": (self.index_fingerprint, index_fingerprint),
            "setting 'neighbours'": (self.neighbours, settings.neighbours),
            "setting 'tail_percent'": (self.tail_percent, settings.tail_percent),
            "setting 'place_normalisation'": (
                bool(self.usual),
                settings.place_normalisation,
            ),
            "settings of the score": (dict(self.scoring), settings.scoring),
            "region of interest": (dict(self.region), region.describe()),
        }
        for name, (expected, found) in pairs.items():
            if expected != found:
                raise MismatchError(f"calibration: {name}", expected, found, "calibrate again")

    def save(self, index_folder: Path) -> Path:
        """Write the camera's file into the folder of its index, whole or not at all.

        Raises:
            ArtefactError: the file cannot be written.
        """
        return calibration_file.write(index_folder, self._values())

    @property
    def sha256(self) -> str:
        """Return the digest that its file carries."""
        return calibration_file.digest(self._values())

    @classmethod
    def load(cls, index_folder: Path, camera: str = "") -> Calibration:
        """Read the calibration of a camera, else that of all, from the folder of its index.

        Raises:
            CalibrationError: missing, damaged, altered or of another format.
        """
        return cls.of_file(calibration_file.file_of(index_folder, camera))

    @classmethod
    def of_file(cls, path: Path) -> Calibration:
        """Read a file of a calibration; raises as `load`."""
        values = calibration_file.read(path)
        try:
            return cls(**values)
        except CalibrationError as error:
            raise CalibrationError(f"calibration of index '{path.parent}': {error}") from error

    def _values(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}
