"""`evaluate`: what it prints and writes, and settings and datasets that it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from worlds.backbones import save_backbone
from worlds.cli import World, refused, row

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.cli import main


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


def test_an_index_with_instances_at_another_rate(world: World, tmp_path: Path) -> None:
    out, index = tmp_path / "report", world.at("index_with_instances")
    argv = ["evaluate", f"{world.at('labelled')}[3:6]", "--index", index, "--out", str(out)]
    # Stages come from the index.
    assert main([*argv, "--set", "target_false_alarm_rate=0.3"]) == 0
    results = json.loads((out / "results.json").read_text())
    stages = results["settings"]["stages"]
    assert [("kind=instances" in stage) for stage in stages] == [False, True]
    assert results["frame_auroc"] is not None
    assert results["target_false_alarm_rate"] == 0.3
    assert results["threshold"] == Calibration.load(Path(index)).threshold_for(0.3)


def test_seen_frames_need_permission_and_missing_measures_have_a_reason(
    world: World, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (index / "calibration.json").unlink()
    out = ["--index", str(index), "--out", str(tmp_path / "out")]
    argv = ["evaluate", f"{world.at('index_1')}[1:3]", *out, *world.detector]
    refused(argv, r"has seen frame 'index_1/\w+\.png'.*--allow-seen", capsys, tmp_path)
    assert main([*argv, "--allow-seen"]) == 0
    text = capsys.readouterr().out
    warning = "data leakage: the index was built from 2 of the 2 frames"
    assert f"warning: {warning}" in text
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["frames_seen"] == 2 and results["warnings"][0].startswith(warning)
    for name in ("TPR", "FPR"):
        assert re.fullmatch(r"-\s+no threshold: the index is not calibrated", row(text, name))
    assert re.fullmatch(r"-\s+needs anomalous and nominal frames", row(text, "frame AUROC"))
    assert re.fullmatch(r"-\s+no anomalous pixels in the masks", row(text, "pixel AP"))


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (["--set", "input_size=126"], r"setting 'input_size': expected 140, found 126"),
        (["--set", "layers=[1]"], r"setting 'layers': expected \(\d,\), found \(1,\)"),
        (
            ["--set", "camera.region_of_interest=[0.0, 0.5, 1.0, 0.5, 1.0, 1.0]"],
            r"region of interest: expected .*calibrate again",
        ),
        (["--set", "neighbours=2"], r"setting 'neighbours': expected 1, found 2.*calibrate again"),
        (["--set", "variant=combined"], r"'variant': expected grid, found combined"),
        (["--set", "confidence=0.9"], r"0\.9 needs at least 9 .*drives, found 2"),
        (["--set", "camera.ego_mask=absent.png"], r"absent\.png"),
        (["--camera", "rear"], r"unknown camera 'rear'.*expected one of: camera"),
    ],
)
def test_settings_of_another_detector(
    options: list[str],
    pattern: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = ["--out", str(tmp_path / "out"), "--index", world.at("index")]
    argv = ["evaluate", world.at("labelled"), *out, *world.detector, *options]
    refused(argv, pattern, capsys, tmp_path)


def test_another_backbone_and_the_calibration_of_another_index(
    world: World, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--index", str(index), "--out", str(tmp_path / "out")]
    argv = ["evaluate", world.at("labelled"), *out, *world.detector]
    other = save_backbone(tmp_path / "other", mlp_ratio=4)
    pattern = r"weights_sha256 of the embedder: expected [0-9a-f]{64}, found [0-9a-f]{64}"
    refused([*argv, "--backbone", str(other)], pattern, capsys, tmp_path)
    shutil.copy(Path(world.at("index_with_instances")) / "calibration.json", index)
    pattern = r"index fingerprint: expected [0-9a-f]+, found [0-9a-f]+"
    refused(argv, pattern, capsys, tmp_path)
    refused(["inspect-index", str(index)], pattern, capsys, tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "pattern"),
    [
        ("bag", [], r"expected a folder 'images' in it"),
        ("absent", [], r"expected a folder 'images' in it, found no such folder"),
        ("labelled[50:60]", [], r"found none"),
        ("labelled", ["--reference", "x"], r"--reference: for the reference protocols, found driv"),
        ("labelled", ["--protocol", "self-nominal"], r"--index: needed by the protocol drive only"),
    ],
)
def test_bad_datasets_and_protocols(
    name: str,
    options: list[str],
    pattern: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = ["--index", world.at("index"), "--out", str(tmp_path / "out"), *options]
    refused(["evaluate", world.at(name), *out, *world.detector], pattern, capsys, tmp_path)


def test_other_files_in_the_way(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--index", world.at("index"), "--out", str(tmp_path / "out")]
    (tmp_path / "out").write_text("mine")
    refused(["evaluate", world.at("labelled"), *out], r"/out'", capsys, tmp_path)
