"""The options of `semantic-anomaly evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from worlds.cli import World, refused

from semantic_anomaly.cli import main


def test_seen_frames_need_permission(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, index = tmp_path / "out", ["--index", world.at("index")]
    argv = ["evaluate", f"{world.at('index_1')}[1:3]", *index, "--out", str(out), *world.detector]
    refused(argv, r"has seen frame 'index_1/\w+\.png'.*--allow-seen", capsys, tmp_path)
    assert main([*argv, "--allow-seen"]) == 0
    warning = "data leakage: the index was built from 2 of the 2 frames"
    assert f"warning: {warning}" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert results["frames_seen"] == 2 and results["warnings"][0].startswith(warning)
