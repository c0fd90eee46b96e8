"""`replay`: scores, alarms and overlays of a bag."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from worlds.cli import SIZE, World, refused, row

from semantic_anomaly.cli import main
from semantic_anomaly.synthetic import StreetDrive
from semantic_anomaly.synthetic.export import write_bag


def test_replay(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, index = tmp_path / "replay", world.at("index_with_instances")
    # Backbone, input size and variant come from the index.
    argv = ["replay", world.at("bag"), "--index", index, "--out", str(out)]
    topic = ["--topic", "/camera/image_raw", "--every", "3", "--set", "threshold=0.00001"]
    assert main([*argv, *topic]) == 0
    text = capsys.readouterr().out
    with (out / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["decision"] for r in rows] == ["anomaly"] * 6
    assert [int(r["stamp_ns"]) for r in rows] == sorted(int(r["stamp_ns"]) for r in rows)
    assert row(text, "alarms") == "1" and row(text, "bag/000000").split()[0] == "6"
    assert sorted(p.name for p in (out / "overlays").iterdir()) == ["000000.jpg", "000003.jpg"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["frames"] == 6 and set(summary["latency_ms"]["total"]) == {"p50", "p95", "p99"}


def test_bad_sources(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drive = world.copy("labelled", tmp_path / "drive") / "images"
    last = max(drive.iterdir())
    last.write_bytes(last.read_bytes()[:-40])
    out = ["--index", world.at("index"), "--out", str(tmp_path / "out")]
    argv = ["replay", f"{drive}[-1:]", *out]
    refused(argv, rf"{last.name}.*truncated", capsys, tmp_path)
    argv = ["replay", world.at("bag"), *out, "--topic", "/no/such"]
    refused(argv, r"no topic '/no/such'", capsys, tmp_path)
    assert main(["replay", f"{drive}[-2:]", *out[:-1], str(tmp_path / "part")]) == 3
    assert f"left out: source '{drive.parent}': 1 bad frames" in capsys.readouterr().out
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    refused(["replay", world.at("bag"), *out], r"thesis\.tex", capsys, tmp_path)


def test_a_bag_that_was_cut_off(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bag = tmp_path / "drive"
    write_bag(StreetDrive(22, 12, image_hw=SIZE), bag, storage="sqlite3", progress=False)
    (file,) = bag.glob("*.db3")
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * 0.7)])
    argv = ["replay", str(bag), "--index", world.at("index"), "--topic", "/camera/image_raw"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 3
    output = capsys.readouterr()
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert 0 < summary["frames"] < 12 and summary["frames_missing"] == 12 - summary["frames"]
    assert f"{summary['frames']} of about 12 frames could be read" in output.err
    assert f"{summary['frames_missing']} frames fewer than announced" in output.out
    built = ["build-index", f"{bag}[0:]", "--out", str(tmp_path / "index"), *world.detector]
    assert main([*built, "--topic", "/camera/image_raw"]) == 3
    assert "frames fewer than announced" in capsys.readouterr().out
    file.write_bytes(content[:3000])
    refused([*argv, "--out", str(tmp_path / "none")], "truncated: expected", capsys, tmp_path)
