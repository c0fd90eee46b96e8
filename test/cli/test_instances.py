"""The commands with instances: built, calibrated, evaluated, explained, cured, and refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from worlds.cli import World, said

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.cli import main
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.images import read_image

OPTIONS = ["--set", "variant=combined"]


@pytest.fixture(scope="module")
def made(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("instances") / "index"
    drives = [world.at("index_1"), world.at("index_2")]
    assert main(["build-index", *drives, "--out", str(folder), *world.detector, *OPTIONS]) == 0
    nominal = [world.at("calibration_11"), world.at("calibration_12")]
    rate = ["--target-false-alarm-rate", "0.1"]
    assert main(["calibrate", str(folder), *nominal, *rate]) == 0
    return folder


def copied(made: Path, to: Path) -> Path:
    shutil.copytree(made, to)
    return to


def test_an_index_with_instances_is_evaluated_and_replayed(
    world: World, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Backbone, input size, variant and rate come from the index and its calibration.
    options = ["--index", str(made)]
    report, replayed = tmp_path / "report", tmp_path / "replayed"
    assert main(["evaluate", world.at("labelled"), "--out", str(report), *options]) == 0
    results = json.loads((report / "results.json").read_text())
    assert results["settings"]["variant"] == "combined" and results["frame_auroc"] is not None
    assert main(["replay", world.at("bag"), "--out", str(replayed), *options]) == 0
    capsys.readouterr()
    assert main(["inspect-index", str(made)]) == 0
    text = capsys.readouterr().out
    assert "part 'instances'" in text and "combined" in text
    assert Calibration.load(made).scoring["variant"] == "combined"


def test_from_a_miss_to_a_cure_in_a_part(
    world: World, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index, part = copied(made, tmp_path / "index"), "instances"
    before = NominalIndex.load(index)
    out = tmp_path / "why.jpg"
    box = ["--box", "0", "0", "128", "72", "--count", "3", "--part", part, "--out", str(out)]
    image = f"{world.at('labelled')}[5:6]"
    assert main(["explain", str(index), image, *box]) == 0
    text = capsys.readouterr().out
    assert "instances in the box" in text and f"numbers of part '{part}'" in text
    numbers = re.findall(r"^ *(\d+) +\S+/", text, re.M)
    assert len(numbers) == 3 and read_image(out).shape[1] > 480
    listed = ",".join(numbers)
    assert main(["retract", str(index), "--entries", listed, "--part", part]) == 0
    assert f"--part {part}" in capsys.readouterr().out
    edited = NominalIndex.load(index)
    assert edited.parts[part].count == before.parts[part].count - 3
    assert edited.count == before.count
    assert main(["undo-edit", str(index), "--part", part]) == 0
    assert NominalIndex.load(index).fingerprint == before.fingerprint


def test_added_frames_reach_all_parts(world: World, made: Path, tmp_path: Path) -> None:
    index = copied(made, tmp_path / "index")
    before = NominalIndex.load(index)
    add = ["add-nominal", str(index), world.at("calibration_12"), "--frames", "2,5"]
    assert main(add) == 0
    grown = NominalIndex.load(index)
    assert grown.count > before.count
    for name, part in grown.parts.items():
        assert part.count > before.parts[name].count, name
    assert main(["undo-edit", str(index)]) == 0
    assert NominalIndex.load(index).fingerprint == before.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["variant=instance", "segmenter=universal"], "segmenter 'universal': expected a model"),
        (["variant=instance", "segmenter_model=x"], "segmenter 'tokens': expected no model"),
        (["variant=instance", "segmenter=universal", "segmenter_model=/nowhere"], "/nowhere"),
        (["variant=instance", "segmenter=detector", "segmenter_model=BACKBONE"],
         "segmenter 'tiny_dinov2': architecture 'dinov2' is not supported here"),
        (["variant=objects"], "variant"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    world: World,
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [o.replace("BACKBONE", str(world.backbone)) for o in options]
    changed = [part for option in given for part in ("--set", option)]
    argv = ["build-index", world.at("index_1")]
    code = main([*argv, "--out", str(tmp_path / "report"), *world.detector, *changed])
    assert code == 2
    assert message in said(capsys)
    assert not (tmp_path / "report").exists()


def test_other_settings_than_those_of_the_index_are_named(
    world: World, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["evaluate", world.at("labelled"), "--out", str(tmp_path / "r"), "--index"]
    for index, changes, message in (
        (str(made), ["--set", "variant=grid"], "'variant': expected combined, found grid"),
        (world.at("index"), OPTIONS, "'variant': expected grid, found combined"),
        (str(made), ["--set", "smoothing=0.3"], "'smoothing': expected 0.8, found 0.3"),
    ):
        assert main([*argv, index, *changes]) == 2
        assert message in said(capsys)
    box = ["--box", "0", "0", "128", "72", "--part", "scenes"]
    image = f"{world.at('labelled')}[5:6]"
    assert main(["explain", str(made), image, *box]) == 2
    assert "unknown part 'scenes'" in said(capsys)
