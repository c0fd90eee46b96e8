"""Every verb on a small world: what it prints, what it writes."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from worlds.cli import World, refused

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.cli import main
from semantic_anomaly.index.nominal_index import NominalIndex


def row(text: str, name: str) -> str:
    """Return what stands behind a name in a printed table."""
    found = re.search(rf"^{re.escape(name)}  +(.*)$", text, re.M)
    assert found is not None, f"no row '{name}' in:\n{text}"
    return found[1]


def test_build_index(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "index"
    sources = [f"{world.at('index_1')}[0:4]", world.at("bag")]
    argv = ["build-index", *sources, "--out", str(out), "--stride", "2", *world.detector]
    assert main([*argv, "--set", "dedup_distance=0.001"]) == 0
    said = capsys.readouterr()
    assert "predicted size" in said.err
    report = NominalIndex.load(out).report
    assert report.frames == 2 + 3
    assert row(said.out, "patches seen") == str(report.seen)
    assert row(said.out, "stored") == str(report.stored)
    assert row(said.out, "suppressed as near-duplicates") == str(report.suppressed)
    assert row(said.out, "dropped, index full") == "0"
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    assert row(said.out, "size on disk") in (f"{size / 1e3:.1f} kB", f"{size / 1e6:.1f} MB")


def test_an_existing_index_is_replaced_only_with_force(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = world.copy("index", tmp_path / "index")
    argv = ["build-index", world.at("index_1"), "--out", str(out), *world.detector]
    refused(argv, r"exists with \d+ entries.*1 calibration.*--force", capsys, out)
    assert main([*argv, "--force", "--set", "max_entries=20"]) == 0
    assert NominalIndex.load(out).count == 20
    assert not (out / "calibration.json").exists(), "it was of the old index"


def test_calibrate(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = world.copy("index", tmp_path / "index")
    argv = ["calibrate", str(index), world.at("calibration_11"), *world.detector]
    assert main([*argv, "--target-false-alarm-rate", "0.2"]) == 0
    said = capsys.readouterr()
    calibration = Calibration.load(index)
    assert row(said.out, "threshold") == f"{calibration.threshold:.4f}"
    assert row(said.out, "nominal frames") == "10"
    assert row(said.out, "target false-alarm rate") == "0.2"
    assert row(said.out, "drives") == "calibration_11 (10)"
    assert said.err.count("warning: all calibration frames come from one drive") == 1


def test_evaluate(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, index = tmp_path / "report", world.at("index")
    argv = ["evaluate", world.at("labelled"), "--index", index, "--out", str(out)]
    assert main([*argv, *world.detector]) == 0
    text = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    calibration = Calibration.load(Path(index))
    assert results["threshold"] == calibration.threshold, "at the rate it was calibrated for"
    assert results["calibration"]["frames"] == 20
    assert row(text, "frame AUROC").split()[0] == f"{results['frame_auroc']:.3f}"
    assert row(text, "TPR").split()[0] == f"{results['tpr']:.3f}"
    assert row(text, "pixel AP").split()[0] == f"{results['pixel_ap']:.3f}"
    assert "target 0.1" in row(text, "FPR")
    assert row(text, "cow").split()[0] == str(results["by_kind"]["cow"]["frames"])
    assert len(results["frames"]) == 10 and results["by_kind"]["cow"]["family"] == "odd object"
    assert results["device"] == "cpu"
    for name in ("contact_sheet.jpg", "score_curve.png", "score_histogram.png"):
        assert (out / name).stat().st_size > 1000


def test_evaluate_at_another_rate(world: World, tmp_path: Path) -> None:
    out, index = tmp_path / "report", world.at("index")
    argv = ["evaluate", f"{world.at('labelled')}[0:1]", "--index", index, "--out", str(out)]
    rate = ["--set", "target_false_alarm_rate=0.3"]
    assert main([*argv, *rate, *world.detector]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["target_false_alarm_rate"] == 0.3
    assert results["threshold"] == Calibration.load(Path(index)).threshold_for(0.3)


def test_evaluate_says_why_a_measure_is_not_defined(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = world.copy("index", tmp_path / "index")
    (index / "calibration.json").unlink()
    out = tmp_path / "report"
    nominal = f"{world.at('calibration_11')}[0:2]"
    assert (
        main(["evaluate", nominal, "--index", str(index), "--out", str(out), *world.detector]) == 0
    )
    text = capsys.readouterr().out
    for name in ("TPR", "FPR"):
        assert re.fullmatch(r"-\s+no threshold: the index is not calibrated", row(text, name))
    assert re.fullmatch(r"-\s+needs anomalous and nominal frames", row(text, "frame AUROC"))
    assert re.fullmatch(r"-\s+no anomalous pixels in the masks", row(text, "pixel AP"))


def test_replay(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "replay"
    argv = ["replay", world.at("bag"), "--index", world.at("index"), "--out", str(out)]
    topic = ["--topic", "/camera/image_raw", "--every", "3", "--set", "threshold=0.00001"]
    assert main([*argv, *topic, *world.detector]) == 0
    text = capsys.readouterr().out
    with (out / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["decision"] for r in rows] == ["anomaly"] * 6
    assert [int(r["stamp_ns"]) for r in rows] == sorted(int(r["stamp_ns"]) for r in rows)
    assert row(text, "alarms") == "1" and row(text, "bag/000000").split()[0] == "6"
    assert sorted(p.name for p in (out / "overlays").iterdir()) == ["000000.jpg", "000003.jpg"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["frames"] == 6 and set(summary["latency_ms"]["total"]) == {"p50", "p95", "p99"}


@pytest.mark.parametrize("calibrated", [True, False])
def test_inspect_index(
    world: World, tmp_path: Path, calibrated: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = world.copy("index", tmp_path / "index")
    if not calibrated:
        (folder / "calibration.json").unlink()
    assert main(["inspect-index", str(folder), *["--recall"] * calibrated]) == 0
    text = capsys.readouterr().out
    index = NominalIndex.load(folder)
    assert row(text, "entries") == f"{index.count} of dimension {index.dim}"
    assert row(text, "fingerprint") == index.fingerprint[:16]
    assert row(text, "backbone").startswith("tiny_dinov2 (dinov2)")
    assert row(text, "sources") == "index_1, index_2"
    assert row(text, "region of interest") == "whole image"
    if calibrated:
        threshold = Calibration.load(folder).threshold
        assert row(text, "threshold") == f"{threshold:.4f}"
        assert row(text, "drives") == "calibration_11 (10), calibration_12 (10)"
        assert "only 2 drives" in row(text, "warning")
        assert 0.5 < float(row(text, "recall")) <= 1.0
    else:
        assert row(text, "calibration").startswith("none")


def test_settings_file_of_the_node_is_taken_as_it_is(world: World, tmp_path: Path) -> None:
    settings = tmp_path / "node.yaml"
    settings.write_text(
        "/**:\n  ros__parameters:\n    use_sim_time: true\n    input_size: 140\n    device: cpu\n"
        f"    backbone: {world.backbone}\n    camera:\n"
        "      region_of_interest: [0.0, 0.5, 1.0, 0.5, 1.0, 1.0, 0.0, 1.0]\n"
    )
    out, given = tmp_path / "index", ["--settings", str(settings)]
    drive = f"{world.at('index_1')}[0:2]"
    assert main(["build-index", drive, "--out", str(out), *given]) == 0
    index = NominalIndex.load(out)
    assert len(index.roi_description["polygon_xy"]) == 4
    report = tmp_path / "report"
    argv = ["evaluate", f"{world.at('labelled')}[4:6]", "--index", str(out), "--out", str(report)]
    assert main([*argv, *given, "--set", "threshold=0.5"]) == 0
    results = json.loads((report / "results.json").read_text())
    assert results["pixels"]["roi"] == "region of interest"
    assert results["threshold_from"] == "setting"
    assert results["roi"] == index.roi_description
