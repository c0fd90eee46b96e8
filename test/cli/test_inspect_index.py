"""`inspect-index`: what it prints, and damaged indexes and calibrations."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds.cli import World, refused, row

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.cli import main
from semantic_anomaly.index.nominal_index import NominalIndex


def test_inspect_index(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(world.at("index_with_instances"))
    assert main(["inspect-index", str(folder), "--recall"]) == 0
    text = capsys.readouterr().out
    index = NominalIndex.load(folder)
    assert row(text, "entries") == f"{index.count} of dimension {index.dim}"
    assert row(text, "fingerprint") == index.fingerprint[:16]
    assert row(text, "backbone").startswith("tiny_dinov2 (dinov2)")
    assert row(text, "sources") == "index_1, index_2"
    assert row(text, "region of interest") == "whole image"
    for number, stage in enumerate(index.stages):
        section = text.split(f"\nstage {number}\n")[1]
        assert row(section, "stage") == str(stage.stage.spec)
        assert row(section, "entries") == f"{stage.count} of dimension {stage.dim}"
    assert row(text, "threshold") == f"{Calibration.load(folder).threshold:.4f}"
    assert row(text, "drives") == "calibration_11 (10), calibration_12 (10)"
    assert "2 calibration drives" in row(text, "warning")
    assert row(text, "promise") == Calibration.load(folder).promise
    assert "on a new drive like these 2, at most 10 %" in row(text, "promise")
    assert 0.5 < float(row(text, "recall")) <= 1.0


def change_byte(index: Path) -> None:
    content = bytearray((index / "embeddings.npy").read_bytes())
    content[-1] ^= 1
    (index / "embeddings.npy").write_bytes(content)


def edit_calibration(index: Path) -> None:
    path = index / "calibration.json"
    path.write_text(path.read_text().replace('"neighbours":1', '"neighbours":2'))


def test_damage_is_named_by_every_command_that_reads_an_index(
    world: World, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--index", str(index), "--out", str(tmp_path / "out")]
    edit_calibration(index)
    pattern = r"calibration.*sha256 does not match"
    refused(["inspect-index", str(index)], pattern, capsys, tmp_path)
    refused(["evaluate", world.at("labelled"), *out], pattern, capsys, tmp_path)
    change_byte(index)
    pattern = r"embeddings\.npy with sha256 .*found another content"
    for argv in (
        ["inspect-index", str(index)],
        ["evaluate", world.at("labelled"), *out],
        ["replay", world.at("bag"), *out],
        ["calibrate", str(index), world.at("calibration_11")],
    ):
        refused(argv, pattern, capsys, tmp_path)
