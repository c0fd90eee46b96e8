"""The demo with few frames: node and player as two processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from semantic_anomaly.cli import main
from semantic_anomaly.demo.demo import DemoError, DemoPlan, play_to_node, run_demo
from semantic_anomaly.io.images import write_image
from semantic_anomaly.settings import Settings, read_settings_file

pytest.importorskip("rclpy")
pytest.importorskip("matplotlib")


def test_demo_scores_what_it_sends_and_writes_its_pictures(
    tmp_path: Path, tiny_backbone: Path
) -> None:
    plan = DemoPlan(3, 6, frames=65, kinds=("cow",), rate_hz=20.0, target_false_alarm_rate=0.1)
    summary = run_demo(tmp_path, plan, {"backbone": str(tiny_backbone), "input_size": 224})
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["frames_sent"] == 65
    # On a busy machine frames may be replaced by newer ones.
    assert 0 < summary["frames_scored"] <= summary["frames_received"] <= 65
    assert any(row["kind"] == "cow" for row in summary["frames"])
    cow = summary["by_kind"]["cow"]
    assert summary["nominal_frames"] + cow["frames"] == summary["frames_scored"]
    assert 0 <= cow["frames_detected"] <= cow["frames"]
    # The node takes everything else from the index and the calibration.
    settings = Settings.from_parameters(read_settings_file(tmp_path / "settings.yaml"))
    assert (settings.input_size, settings.target_false_alarm_rate) == (0, 0.0)
    assert summary["latency_p50_ms"] <= summary["latency_p95_ms"]
    for name in ("score_curve.png", "contact_sheet.jpg", "drive.gif", "settings.yaml"):
        assert (tmp_path / name).stat().st_size > 0, name
    assert list((tmp_path / "live/overlays").glob("*.jpg"))


def test_demo_refuses_an_unknown_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), "--kinds", "unicorn"]) == 2
    assert "unicorn" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_demo_says_where_the_log_is_when_the_node_refuses(
    tmp_path: Path, tiny_backbone: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = "/**: {ros__parameters: {index: /nowhere, backbone: %s}}" % tiny_backbone  # noqa: UP031
    (tmp_path / "settings.yaml").write_text(settings)
    write_image(tmp_path / "drive" / "images" / "0.png", np.zeros((36, 64, 3), np.uint8))
    with pytest.raises(DemoError, match=r"node\.log"):
        play_to_node(tmp_path, tmp_path / "drive", 10.0)
    assert "/nowhere" in (tmp_path / "node.log").read_text()
