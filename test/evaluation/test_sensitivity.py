"""Sensitivity: what counts as found, and what the report holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from worlds.cli import World, make_world

from semantic_anomaly.errors import CalibrationError, InputError, SourceError
from semantic_anomaly.evaluation.composites import CompositePlan
from semantic_anomaly.evaluation.sensitivity import WRITTEN, sensitivity
from semantic_anomaly.synthetic import StreetDrive
from semantic_anomaly.synthetic.export import write_folder

PLAN = CompositePlan(kinds=("cow", "bin"), sizes_px=(10, 40), composites=16, frames=10)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> World:
    world = make_world(tmp_path_factory.mktemp("sensitivity"), tiny_backbone)
    drive = StreetDrive(41, 60, image_hw=(72, 128))
    write_folder([drive], world.root / "held_out", stride=5, progress=False)
    return world


def test_results_and_report_agree(world: World, tmp_path: Path) -> None:
    index, other = world.at("index"), world.at("index_with_instances")
    found = sensitivity(
        index, world.at("held_out"), PLAN, compare=[other], out=tmp_path / "seen", device="cpu"
    )
    results = json.loads((tmp_path / "seen" / "results.json").read_text())
    assert results == json.loads(json.dumps(found.results))
    assert {path.name for path in (tmp_path / "seen").iterdir()} == WRITTEN
    assert results["plan"]["seed"] == 0 and len(results["frames"]) == 10
    assert [d["name"] for d in results["detectors"]] == ["index", "index_with_instances"]
    rows = results["composites"]
    for detector in results["detectors"]:
        own = [row[detector["name"]] for row in rows]
        assert detector["composites"] == 16
        assert detector["found"] == sum(row["found"] for row in own)
        assert detector["control_rate"] == sum(row["control_found"] for row in own) / 16
        assert all(row["score"] > detector["threshold"] for row in own if row["found"])
        for size in ("10", "40"):
            chosen = [r for r, row in zip(own, rows, strict=True) if row["size"] == float(size)]
            part = detector["by_size"][size]
            assert part["composites"] == len(chosen) == 8
            assert part["found"] == sum(row["found"] for row in chosen)
        for key, total in (("composites", 16), ("found", detector["found"])):
            assert sum(map(sum, detector["by_cell"][key])) == total
    [compared] = results["comparisons"]
    assert sum(compared["all"].values()) == 16
    firsts = compared["all"]["both"] + compared["all"]["first_only"]
    assert firsts == results["detectors"][0]["found"]
    text = (tmp_path / "seen" / "report.html").read_text()
    assert "What composites cannot show" in text and "only the other" in text
    assert text.count("data:image/jpeg") >= 5
    again = sensitivity(index, world.at("held_out"), PLAN, device="cpu")
    assert again["composites"][3]["index"] == results["composites"][3]["index"]


def test_a_low_threshold_finds_everything_and_says_that_it_means_nothing(world: World) -> None:
    found = sensitivity(world.at("index"), world.at("held_out"), PLAN, threshold=-100.0)
    detector = found["detectors"][0]
    assert detector["recall"] == detector["control_rate"] == detector["untouched_rate"] == 1.0
    assert detector["untouched"]["alarms"] == 10 and detector["target_false_alarm_rate"] is None
    assert any("10 of the 10 untouched frames raise an alarm" in w for w in found["warnings"])


def test_a_high_threshold_finds_nothing(world: World) -> None:
    found = sensitivity(world.at("index"), world.at("held_out"), PLAN, threshold=1e6)
    assert found["detectors"][0]["recall"] == 0.0 and found["warnings"] == []


def test_seen_drives_are_refused_or_reported(world: World) -> None:
    index = world.at("index")
    with pytest.raises(CalibrationError, match=r"seen a drive 'calibration_11'.*--allow-seen"):
        sensitivity(index, world.at("calibration_11"), PLAN)
    found = sensitivity(index, world.at("calibration_11"), PLAN, allow_seen=True)
    assert any("data leakage" in warning for warning in found["warnings"])
    many = world.root / "index_drive"
    if not many.exists():
        drive = StreetDrive(1, 30, image_hw=(72, 128))
        write_folder([drive], many / "index_1", stride=3, progress=False)
    with pytest.raises(CalibrationError, match=r"has seen frame 'index_1/\w+\.png'.*--allow-seen"):
        sensitivity(index, many / "index_1", PLAN)


def test_what_is_missing_is_said_before_the_work(world: World, tmp_path: Path) -> None:
    held_out = world.at("held_out")
    with pytest.raises(SourceError, match="expected at least 10 frames, found 4"):
        sensitivity(world.at("index"), f"{held_out}[0:4]", PLAN)
    index = world.copy("index", tmp_path / "index")
    (index / "calibration.json").unlink()
    with pytest.raises(CalibrationError, match="calibrat"):
        sensitivity(index, held_out, PLAN)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        sensitivity(world.at("index"), held_out, PLAN, out=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
