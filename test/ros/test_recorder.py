"""The recorded results of the running node equal those of `replay`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

import rclpy
from worlds.ros import bench, nominal_image, odd_image, offline_detector

from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.events import Event
from semantic_anomaly.evaluation.replay import replay
from semantic_anomaly.io.images import write_image
from semantic_anomaly.io.open import open_source
from semantic_anomaly.ros.camera import LATENCY
from semantic_anomaly.ros.messages import image_message
from semantic_anomaly.ros.recorder import ResultRecorder, main, write_recording
from semantic_anomaly.timing import SEGMENT, STAGES

KIND = "block"


def test_live_and_offline_agree_frame_by_frame(tmp_path: Path, staged: dict[str, Any]) -> None:
    (tmp_path / "drive").mkdir()
    for number in range(12):
        image = odd_image(40) if 5 <= number < 8 else nominal_image(50 + number)
        write_image(tmp_path / "drive" / f"{number:02d}.png", image)
    source, events = open_source(tmp_path / "drive"), [Event(0.45, 0.75, KIND)]
    expected = replay(offline_detector(staged), source, tmp_path / "offline", events=events)
    with bench(staged) as b:
        recorder = ResultRecorder("/semantic_anomaly", "camera")
        b.executor.add_node(recorder)
        b.start("status")
        topic = "/semantic_anomaly/camera/status"
        b.spin_until(lambda: recorder.count_publishers(topic) > 0)
        begin_ns = b.helper.get_clock().now().nanoseconds
        for frame in source:
            message = b.stamped(
                image_message(frame.image, "rgb8"), stamp_ns=begin_ns + frame.stamp_ns
            )
            b.publisher().publish(message)
            # One after the other: none is replaced by a newer one.
            b.spin_until(
                lambda at=begin_ns + frame.stamp_ns: at in {r["stamp_ns"] for r in recorder.rows}
            )
        summary = write_recording(recorder, tmp_path / "live", "drive", events)
        recorder.destroy_node()
    scores = [
        np.loadtxt(tmp_path / name / "scores.csv", delimiter=",", skiprows=1, usecols=(0, 1, 2))
        for name in ("offline", "live")
    ]
    np.testing.assert_allclose(scores[1][:, 1:], scores[0][:, 1:], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(scores[1][:, 0] - begin_ns, scores[0][:, 0])
    for key in ("frames", "decisions", "against_events", "source"):
        assert summary[key] == expected[key]
    assert summary["against_events"]["missed"] == 0
    assert summary["threshold"] == pytest.approx(expected["threshold"])
    assert {"p50", "p95", "p99"} <= set(summary["latency_ms"]["latency"])
    assert set(summary["latency_ms"]) - {SEGMENT} == {LATENCY, *STAGES}
    assert json.loads((tmp_path / "live" / "summary.json").read_text()) == summary
    assert (tmp_path / "live" / "score_curve.png").is_file()


def test_without_statuses_there_is_no_report(tmp_path: Path) -> None:
    rclpy.init()
    try:
        recorder = ResultRecorder("/nowhere", "camera")
        with pytest.raises(InputError, match="found none"):
            write_recording(recorder, tmp_path / "out", "drive", None)
        recorder.destroy_node()
    finally:
        rclpy.try_shutdown()
    assert not (tmp_path / "out").exists()


def test_bad_arguments_are_refused_before_the_drive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert main(["--out", str(tmp_path / "out")]) == 2
    assert "mine.txt" in capsys.readouterr().err
    assert main(["--out", str(tmp_path / "new"), "--labels", str(tmp_path / "absent")]) == 2
    assert "cannot be read" in capsys.readouterr().err
