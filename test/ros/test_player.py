"""The player: exit codes and messages; the demo's test plays a drive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rclpy")

import rclpy
import worlds.ros  # noqa: F401  sets the ROS domain

from semantic_anomaly.errors import SemanticAnomalyError
from semantic_anomaly.io.images import write_image
from semantic_anomaly.ros import player
from semantic_anomaly.ros.player import SourcePlayer, main


def test_a_missing_source_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err


def test_a_missing_node_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_image(tmp_path / "drive" / "0.png", np.zeros((36, 64, 3), np.uint8))
    bring_up = SourcePlayer.bring_up
    monkeypatch.setattr(player.SourcePlayer, "bring_up", lambda self: bring_up(self, 0.2))
    assert main([str(tmp_path / "drive"), "--node", "/nobody", "--bring-up"]) == 1
    assert "node '/nobody': expected service 'get_state', found none" in capsys.readouterr().err


def test_a_topic_without_a_subscriber_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rclpy.init()
    try:
        source_player = SourcePlayer("/nobody", "camera", "/unheard", False, False)
        monkeypatch.setattr(source_player, "spin_until", lambda done, timeout_s: False)
        with pytest.raises(SemanticAnomalyError, match=r"/unheard.*expected a subscriber"):
            source_player.play([], 0, 10.0)
        source_player.destroy_node()
    finally:
        rclpy.try_shutdown()
