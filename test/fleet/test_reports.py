"""Evaluations and replays on a real cluster are those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from worlds.cli import SIZE, refused

from semantic_anomaly.cli import main
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.offline.calibrate import calibrate
from semantic_anomaly.settings import Settings
from semantic_anomaly.synthetic import StreetDrive
from semantic_anomaly.synthetic.export import write_folder

pytest.importorskip("ray", reason="Ray is not installed: extra [fleet]")

# Settings that the index does not fix.
_RUN = ("device", "threads", "dtype", "execution")


@pytest.fixture(scope="module")
def index(
    drives: list[str], options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder of a calibrated index of two drives."""
    folder = tmp_path_factory.mktemp("reports") / "index"
    settings = Settings(**options, target_false_alarm_rate=0.1)
    built = build_index(drives[:2], settings=settings, out=folder)
    calibrate(built, settings=settings, out=folder)
    return folder


def without_times(value: Any) -> Any:
    """Return JSON values without times, and without the settings of the machine."""
    if isinstance(value, dict):
        left_out = {"ms", "latency_ms", "settings"}
        return {k: without_times(v) for k, v in value.items() if k not in left_out}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def read(path: Path) -> Any:
    return without_times(json.loads(path.read_text(encoding="utf-8")))


def test_replay(
    cluster: Any, drives: list[str], index: Path, options: dict[str, Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "cut_off.mcap").write_bytes(b"\x89MCAP0\r\n cut")
    sources = [drives[3], str(tmp_path / "cut_off.mcap"), drives[4]]
    argv = ["--index", str(index), "--every", "0", *(f"--set={k}={options[k]}" for k in _RUN)]
    command = ["replay", *sources, *argv, "--out", str(tmp_path / "fleet")]
    command += ["--ray", cluster.address]
    assert main(command) == 3
    printed = capsys.readouterr().out
    assert "not readable: cut_off.mcap: " in printed and "which 2 were made by this" in printed
    assert main(["replay", drives[3], drives[4], *argv, "--out", str(tmp_path / "here")]) == 0
    for name in ("drive_3", "drive_4"):
        found, expected = (tmp_path / where / name for where in ("fleet", "here"))
        assert read(found / "summary.json") == read(expected / "summary.json")
        assert (found / "scores.csv").read_bytes() == (expected / "scores.csv").read_bytes()
    # Only what is missing runs again.
    (tmp_path / "fleet" / "drive_4" / "summary.json").unlink()
    for rest in (tmp_path / "fleet" / "drive_4").iterdir():
        rest.unlink()
    before = (tmp_path / "fleet" / "drive_3" / "summary.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main(command) == 3
    assert "of which 1 were made by this run" in capsys.readouterr().out
    assert (tmp_path / "fleet" / "drive_3" / "summary.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_evaluate(cluster: Any, index: Path, options: dict[str, Any], tmp_path: Path) -> None:
    for seed in (21, 22):
        drive = StreetDrive(seed, 60, anomalies=("cow",), image_hw=SIZE)
        write_folder([drive], tmp_path / f"labelled_{seed}", stride=10, progress=False)
    datasets = [str(tmp_path / f"labelled_{seed}") for seed in (21, 22)]
    argv = ["--index", str(index), "--every", "0", *(f"--set={k}={options[k]}" for k in _RUN)]
    command = ["evaluate", *datasets, *argv]
    assert main([*command, "--out", str(tmp_path / "here")]) == 0
    assert main([*command, "--out", str(tmp_path / "fleet"), "--ray", cluster.address]) == 0
    for name in ("labelled_21", "labelled_22"):
        found, expected = (tmp_path / where / name for where in ("fleet", "here"))
        assert read(found / "results.json") == read(expected / "results.json")


def test_labels_belong_to_one_drive(
    drives: list[str], index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["replay", *drives[3:], "--index", str(index), "--out", str(tmp_path / "out")]
    refused([*command, "--labels", str(tmp_path / "e.yaml")], "expected one BAG, found 2", capsys)
