"""The command `synth`: folders, bags, and refusal of bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from semantic_anomaly.cli import main
from semantic_anomaly.io.images import read_image


def test_the_command_writes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "street"
    arguments = ["--drives=2", "--frames=80", "--stride=40", "--seed=7", "--size=90x160"]
    assert main(["synth", str(out), *arguments, "--anomalies", "cow,sofa"]) == 0
    assert "4 images of 2 drives" in capsys.readouterr().out
    labels = json.loads((out / "labels.json").read_text())
    assert {label["kind"] for label in labels.values()} - {None} == {"cow", "sofa"}
    assert {label["drive"] for label in labels.values()} == {"drive0000007", "drive0000008"}
    assert read_image(next((out / "images").iterdir())).shape == (90, 160, 3)


def test_the_command_writes_a_bag_for_each_drive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--drives=2", "--frames=1", "--seed=7", "--size=90x160", "--format=mcap"]
    assert main(["synth", str(tmp_path), *arguments]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["drive_7", "drive_8"]
    assert main(["synth", str(tmp_path), *arguments]) == 2
    assert "drive_7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--anomalies unicorn", "unknown kind of anomaly 'unicorn'.*cow"),
        ("--anomalies all --per-drive 10", "seed 0: 10 anomalies .* need at least"),
        ("--drives 0", "--drives: expected at least 1, found 0"),
        ("--size 640", "--size: expected height x width"),
        ("--size 8x8", "sides >= 32 px"),
        ("--compressed", "--format mcap"),
        ("--format mcap --instances", "--format folder"),
    ],
)
def test_the_command_refuses_bad_input(
    tmp_path: Path, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["synth", str(tmp_path / "out"), *arguments.split()]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
