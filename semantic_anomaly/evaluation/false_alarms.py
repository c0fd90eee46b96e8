"""Realised false-alarm rates of a calibration on further nominal drives."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from semantic_anomaly.calibration.conformal import complete_episodes
from semantic_anomaly.calibration.leakage import refuse_seen
from semantic_anomaly.errors import CalibrationError, InputError
from semantic_anomaly.evaluation import extras
from semantic_anomaly.evaluation.events import drive_metrics
from semantic_anomaly.evaluation.metrics import rate_interval, share
from semantic_anomaly.io.open import open_source
from semantic_anomaly.structures import Decision

if TYPE_CHECKING:
    from semantic_anomaly.detection.detector import AnomalyDetector

_log = logging.getLogger(__name__)


def false_alarm_rates(
    detector: AnomalyDetector,
    sources: Sequence[str | Path],
    *,
    topic: str | None = None,
    episode_s: float = 10.0,
    progress: bool = False,
) -> dict[str, Any]:
    """Return the realised false-alarm rates on nominal drives, with intervals over drives.

    Args:
        detector: with a calibration.
        sources: nominal folders, videos or bags that neither index nor calibration has seen.
        topic: image topic of bags that have several.
        episode_s: length of an episode in s, > 0.

    Returns:
        Numbers of `frames`, `drives`, `episodes` and `hours`; `by_drive`: name, frames and
        `frame_rate` of each; `frame_rate` of scores above the
        threshold, `alarm_rate` of frames in confirmed alarm and `episode_rate` of complete episodes
        with an alarm, each with its `_interval`, None when not defined; `false_alarms`,
        `false_alarms_per_hour`; `target`; `kept`: whether no target rate lies below its interval.

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
    by_drive = [
        {"drive": name, "frames": len(rows), "frame_rate": float(rows[:, 1].mean())}
        for name, rows in drives
    ]
    calibrated = {drive.name for drive in calibration.drives}
    for name in sorted(calibrated & {name for name, _ in drives}):
        _log.warning("check: drive '%s' has the name of a drive of the calibration", name)
    above = np.concatenate([rows[:, 1] for _, rows in drives]).astype(bool)
    alarms = np.concatenate([rows[:, 2] for _, rows in drives]).astype(bool)
    episodes = [
        bool(rows[frames, 2].any())
        for _, rows in drives
        for frames in complete_episodes(rows[:, 0] / 1e9, episode_s)
    ]
    metrics = [drive_metrics(rows[:, 0].tolist(), rows[:, 2].tolist(), []) for _, rows in drives]
    hours = sum(drive.nominal_s for drive in metrics) / 3600.0
    false_alarms = sum(drive.false_alarms for drive in metrics)
    rates: dict[str, Any] = {
        "frames": len(above),
        "drives": len(drives),
        "episodes": len(episodes),
        "hours": hours,
        "false_alarms": false_alarms,
        "false_alarms_per_hour": false_alarms / hours if hours else None,
        "target": detector.settings.target_false_alarm_rate,
        "by_drive": by_drive,
    }
    for name, flags in (("frame", above), ("alarm", alarms), ("episode", np.array(episodes))):
        rates[f"{name}_rate"] = share(flags)
        rates[f"{name}_rate_interval"] = rate_interval(share(flags), len(drives))
    targets = {"frame": rates["target"], "episode": detector.settings.target_episode_rate}
    rates["kept"] = all(
        interval[0] <= target
        for name, target in targets.items()
        if target and (interval := rates[f"{name}_rate_interval"])
    )
    return rates


def _drives(
    detector: AnomalyDetector, source: str | Path, topic: str | None, progress: bool
) -> dict[str, np.ndarray]:
    """Return (n, 3) int64 by drive: stamp in ns, whether above the threshold, whether in alarm."""
    frames = open_source(source, topic=topic)
    rows: dict[str, list[tuple[int, bool, bool]]] = {}
    disable = None if progress else True
    for frame in tqdm(frames, f"check {frames.name}", frames.count, unit="frame", disable=disable):
        refuse_seen(detector.index, frame)
        drive = "/".join(part for part in (frames.name, frames.drive_of(frame)) if part)
        if drive not in rows:
            detector.reset()
        result = detector.detect(frame)
        above = result.threshold is not None and result.score > result.threshold
        alarm = result.decision is Decision.ANOMALY
        rows.setdefault(drive, []).append((frame.stamp_ns, above, alarm))
    return {drive: np.array(values, np.int64) for drive, values in rows.items()}
