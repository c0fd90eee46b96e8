"""The demo in small: real node, real player, two processes over DDS."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from semantic_anomaly.cli import main
from semantic_anomaly.demo.demo import DemoPlan, run_demo

pytest.importorskip("rclpy")
pytest.importorskip("matplotlib")


def test_demo_scores_what_it_sends_and_writes_its_pictures(
    tmp_path: Path, tiny_backbone: Path
) -> None:
    plan = DemoPlan(
        index_drives=2,
        calibration_drives=2,
        nominal_frames=10,
        frames=80,
        kinds=("cow",),
        rate_hz=10.0,
        target_false_alarm_rate=0.1,
    )
    summary = run_demo(tmp_path, plan, {"backbone": str(tiny_backbone), "input_size": 224})
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["frames_sent"] == 80
    # On a busy machine frames may be replaced by newer ones, never invented.
    assert 20 <= summary["frames_scored"] <= summary["frames_received"] <= 80
    assert summary["by_kind"]["cow"]["frames"] > 0
    assert (
        summary["nominal_frames"] + summary["by_kind"]["cow"]["frames"]
        == (summary["frames_scored"])
    )
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
    from semantic_anomaly.demo.demo import DemoError, play_to_node

    settings = "/**: {ros__parameters: {index: /nowhere, backbone: %s}}" % tiny_backbone  # noqa: UP031
    (tmp_path / "settings.yaml").write_text(settings)
    images = tmp_path / "drive" / "images"
    images.mkdir(parents=True)
    import numpy as np

    from semantic_anomaly.io.images import write_image

    write_image(images / "0.png", np.zeros((36, 64, 3), np.uint8))
    with pytest.raises(DemoError, match=r"node\.log"):
        play_to_node(tmp_path, tmp_path / "drive", 10.0)
    assert "/nowhere" in (tmp_path / "node.log").read_text()
