"""What a calibration's promise came to on further nominal drives."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from semantic_anomaly.calibration.conformal import whole_stretches
from semantic_anomaly.calibration.leakage import refuse_indexed
from semantic_anomaly.errors import CalibrationError, InputError
from semantic_anomaly.evaluation import extras
from semantic_anomaly.evaluation.events import drive_metrics
from semantic_anomaly.evaluation.metrics import rate_interval
from semantic_anomaly.io.open import open_source
from semantic_anomaly.structures import Decision

if TYPE_CHECKING:
    from semantic_anomaly.detection.detector import AnomalyDetector

_log = logging.getLogger(__name__)


def realised_rates(
    detector: AnomalyDetector,
    sources: Sequence[str | Path],
    *,
    topic: str | None = None,
    episode_s: float = 10.0,
    progress: bool = True,
) -> dict[str, Any]:
    """Return how often nominal drives raise an alarm, with intervals over drives.

    Args:
        detector: calibrated.
        sources: nominal folders, videos or bags that neither index nor calibration have seen.
        topic: image topic of bags that have several.
        episode_s: seconds of a stretch of driving.
        progress: show a progress bar on a terminal.

    Returns:
        `frames`, `drives`, `stretches`, `hours`; `frame_rate` of scores above the threshold,
        `alarm_rate` of frames in confirmed alarm and `stretch_rate` of stretches with one, each
        with its `_interval`, None without a whole one; `episodes_per_hour`, `target`; `kept`,
        whether the targets of frames and of stretches lie above the lower ends of their intervals.

    Raises:
        CalibrationError: there is no calibration, or the index has seen a frame.
        InputError: no sources, a source without usable frames, or episode_s <= 0.
        MissingPackageError: scipy is not installed.
    """
    extras.require("scipy.stats")
    calibration = detector.calibration
    if calibration is None or detector.threshold is None:
        raise CalibrationError("check: expected a calibrated index, found no calibration")
    if not sources or not episode_s > 0:
        raise InputError(
            f"check: expected sources and episode_s > 0, found {len(sources)}, {episode_s:g}"
        )
    drives = [
        drive for source in sources for drive in _drives(detector, source, topic, progress).items()
    ]
    known = {name for name, _ in calibration.drives}
    for name in sorted(known & {name for name, _ in drives}):
        _log.warning("check: drive '%s' has the name of one of the calibration's", name)
    above = np.concatenate([rows[:, 1] for _, rows in drives]).astype(bool)
    alarms = np.concatenate([rows[:, 2] for _, rows in drives]).astype(bool)
    stretches = [
        bool(rows[frames, 2].any())
        for _, rows in drives
        for frames in whole_stretches(rows[:, 0] / 1e9, episode_s)
    ]
    metrics = [drive_metrics(rows[:, 0].tolist(), rows[:, 2].tolist(), []) for _, rows in drives]
    hours = sum(one.nominal_s for one in metrics) / 3600.0
    episodes = sum(one.false_episodes for one in metrics)
    found: dict[str, Any] = {
        "frames": len(above),
        "drives": len(drives),
        "stretches": len(stretches),
        "hours": hours,
        "episodes": episodes,
        "episodes_per_hour": episodes / hours if hours else None,
        "target": detector.settings.target_false_alarm_rate,
    }
    for name, flags in (("frame", above), ("alarm", alarms), ("stretch", np.array(stretches))):
        rate = float(np.mean(flags)) if len(flags) else None
        found[f"{name}_rate"] = rate
        found[f"{name}_rate_interval"] = rate_interval(rate, len(drives))
    targets = {"frame": found["target"], "stretch": detector.settings.target_episode_rate}
    found["kept"] = all(
        interval[0] <= target
        for name, target in targets.items()
        if target and (interval := found[f"{name}_rate_interval"])
    )
    return found


def _drives(
    detector: AnomalyDetector, source: str | Path, topic: str | None, progress: bool
) -> dict[str, np.ndarray]:
    """Return (n, 3) int64 by drive: stamp, whether above the threshold, whether in alarm."""
    opened = open_source(source, topic=topic)
    rows: dict[str, list[tuple[int, bool, bool]]] = {}
    hide = None if progress else True
    for frame in tqdm(opened, f"check {opened.name}", opened.count, unit="frame", disable=hide):
        refuse_indexed(detector.index, frame)
        drive = "/".join(part for part in (opened.name, opened.drive_of(frame)) if part)
        if drive not in rows:
            detector.reset()
        result = detector.detect(frame)
        exceeds = result.threshold is not None and result.score > result.threshold
        alarm = result.decision is Decision.ANOMALY
        rows.setdefault(drive, []).append((frame.stamp_ns, exceeds, alarm))
    return {drive: np.array(found, np.int64) for drive, found in rows.items()}
