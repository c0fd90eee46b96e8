"""Log lines: throttled, forwarded at their severity, one for the start and the end of an alarm."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

from semantic_anomaly.ros import logs
from semantic_anomaly.ros.logs import REPEAT_AFTER_S, AlarmLog, RosLogHandler, ThrottledLog
from semantic_anomaly.structures import (
    AnomalyResult,
    Decision,
    HeatmapScale,
    Localization,
    NominalExample,
)

SECOND_NS = 10**9


class Recorder:
    """A logger that keeps (severity, text)."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def __getattr__(self, severity: str) -> Any:
        return lambda text: self.lines.append((severity, text))


def test_a_subject_is_logged_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now_s)
    logger = Recorder()
    log = ThrottledLog(logger)
    log.error("a", "first")
    log.error("a", "too early")
    log.warning("b", "another subject")
    now_s += REPEAT_AFTER_S
    log.error("a", "again")
    assert logger.lines == [
        ("error", "first"),
        ("warning", "another subject"),
        ("error", "again"),
    ]


def test_records_of_the_package_keep_their_severity() -> None:
    logger, package = Recorder(), logging.getLogger("semantic_anomaly.test_logs")
    package.addHandler(handler := RosLogHandler(logger))
    package.setLevel(logging.INFO)
    try:
        package.info("i %d", 1)
        package.warning("w")
        package.error("e")
    finally:
        package.removeHandler(handler)
    assert logger.lines == [("info", "i 1"), ("warning", "w"), ("error", "e")]


def result(score: float, decision: Decision) -> AnomalyResult:
    places = (
        Localization((1, 2, 3, 4), (2, 3), 4, score, NominalExample("f", 0, 0, (1, 1), 0.1), 1),
    )
    anomalous = decision is Decision.ANOMALY
    return AnomalyResult(
        score=score,
        decision=decision,
        p_value=None,
        threshold=0.3,
        heatmap=np.zeros((4, 4), np.float32),
        scale=HeatmapScale(0.0, 1.0),
        label_map=np.zeros((4, 4), np.uint16),
        localizations=places if anomalous else (),
    )


@pytest.mark.parametrize(
    ("frames", "starts", "durations"),
    [
        # (stamp in seconds, anomaly or not); silence_s is 1.
        ([(0.0, False), (1.0, False)], 0, []),
        ([(0.0, True), (0.5, True), (2.0, False)], 1, ["0.5 s, 2 frames"]),
        # A short gap does not end an alarm.
        ([(0.0, True), (0.5, False), (1.0, True), (3.0, False)], 1, ["1.0 s, 2 frames"]),
        ([(0.0, True), (5.0, True)], 2, ["0.0 s, 1 frames"]),
        # A late frame belongs to the alarm, also if it is nominal; a jump back is another drive.
        (
            [(0.0, True), (0.5, True), (0.4, True), (0.6, True), (2.0, False)],
            1,
            ["0.6 s, 4 frames"],
        ),
        ([(1.0, True), (0.5, False), (1.1, True), (3.0, False)], 1, ["0.1 s, 2 frames"]),
        ([(9.0, True), (1.0, True)], 2, ["0.0 s, 1 frames"]),
    ],
)
def test_alarms(frames: list[tuple[float, bool]], starts: int, durations: list[str]) -> None:
    logger = Recorder()
    alarms = AlarmLog(logger, "front")
    for stamp_s, anomalous in frames:
        decision = Decision.ANOMALY if anomalous else Decision.NOMINAL
        alarms.update(round(stamp_s * SECOND_NS), result(0.5, decision), 1.0)
    texts = [text for _, text in logger.lines]
    assert sum("alarm starts" in text for text in texts) == starts
    ends = [text for text in texts if "alarm ends" in text]
    assert len(ends) == len(durations)
    assert all(duration in text for duration, text in zip(durations, ends, strict=True))
    assert all(text.startswith("camera 'front': ") for text in texts)
