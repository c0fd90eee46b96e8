"""`build-index`: what it prints and writes, and bad sources, backbones and segmenters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from worlds.cli import World, refused, row

from semantic_anomaly.cli import main
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.images import encode_png, write_image

PICTURE = np.full((72, 128, 3), 90, np.uint8)


def test_build_index(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "index"
    sources = [f"{world.at('index_1')}[0:4]", world.at("bag")]
    argv = ["build-index", *sources, "--out", str(out), "--stride", "2", *world.detector]
    assert main([*argv, "--set", "dedup_distance=0.001"]) == 0
    printed = capsys.readouterr()
    assert "predicted size" in printed.err
    report = NominalIndex.load(out).report
    assert report.frames == 2 + 3
    assert row(printed.out, "patches seen") == str(report.seen)
    assert row(printed.out, "stored") == str(report.stored)
    assert row(printed.out, "suppressed as near-duplicates") == str(report.suppressed)
    assert row(printed.out, "dropped, index full") == "0"
    assert row(printed.out, "size on disk").endswith("B")


def test_the_summary_counts_every_stage(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, drive = tmp_path / "index", f"{world.at('index_1')}[0:2]"
    stages = f"stages=['{world.backbone} size=56', '{world.backbone} size=112']"
    options = ["--set", stages, "--set", "device=cpu", "--set", "dedup_distance=0.001"]
    assert main(["build-index", drive, "--out", str(out), *options]) == 0
    printed = capsys.readouterr().out
    reports = [stage.report for stage in NominalIndex.load(out).stages]
    assert reports[0].seen < reports[1].seen
    assert row(printed, "patches seen") == f"{reports[0].seen} + {reports[1].seen}"
    assert row(printed, "stored") == f"{reports[0].stored} + {reports[1].stored}"


def test_an_existing_index_is_replaced_only_with_force(
    world: World, index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["build-index", world.at("index_1"), "--out", str(index), *world.detector]
    refused(argv, r"exists with \d+ entries.*1 calibration.*--force", capsys, index)
    assert main([*argv, "--force", "--set", "max_entries=20"]) == 0
    assert NominalIndex.load(index).count == 20
    assert not (index / "calibration.json").exists(), "it was of the old index"


def test_the_settings_file_of_the_node_is_taken_as_it_is(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "node.yaml"
    settings.write_text(
        "/**:\n  ros__parameters:\n    use_sim_time: true\n    input_size: 140\n    device: cpu\n"
        f"    backbone: {world.backbone}\n    camera:\n"
        "      region_of_interest: [0.0, 0.5, 1.0, 0.5, 1.0, 1.0, 0.0, 1.0]\n"
    )
    out, drive = tmp_path / "index", f"{world.at('index_1')}[0:2]"
    assert main(["build-index", drive, "--out", str(out), "--settings", str(settings)]) == 0
    assert main(["inspect-index", str(out)]) == 0
    printed = capsys.readouterr().out
    assert row(printed, "region of interest") == "polygon of 4 corners"
    assert row(printed, "input").startswith("long side 140 px")
    assert row(printed, "calibration").startswith("none")


def unreadable_images(folder: Path) -> None:
    """Write more bad frames than are left out: one, or 10 %."""
    write_image(folder / "0.png", PICTURE)
    for number in (1, 2):
        (folder / f"{number}.png").write_bytes(encode_png(PICTURE)[:-30])


def sizes_that_vary(folder: Path) -> None:
    write_image(folder / "0.png", PICTURE)
    write_image(folder / "1.png", PICTURE[:64])


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (Path.mkdir, r"expected images .*found none"),
        (unreadable_images, r"found more.*2\.png.*truncated"),
        (sizes_that_vary, r"one size, 128x72.*found 128x64.*1\.png"),
    ],
)
def test_bad_sources(
    make: Callable[[Path], None],
    pattern: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(tmp_path / "source")
    sources, out = [world.at("index_1"), str(tmp_path / "source")], str(tmp_path / "out")
    refused(["build-index", *sources, "--out", out, *world.detector], pattern, capsys, tmp_path)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (["--backbone", "/nowhere"], r"backbone.*expected a folder, found none"),
        (["--topic", "/no/such"], r"no topic '/no/such'.*/camera/image_raw \(sensor_msgs/msg/Imag"),
        (["--set", "variant=objects"], r"setting 'variant'"),
        (["--set", "segmenter_model=x"], r"segmenter 'tokens': expected no model"),
        (["--set", "segmenter=universal"], r"segmenter 'universal': expected a model"),
        (["--set", "segmenter=universal", "--set", "segmenter_model=/nowhere"], r"/nowhere"),
        (
            ["--set", "segmenter=detector", "--set", "segmenter_model=BACKBONE"],
            r"segmenter 'tiny_dinov2': architecture 'dinov2' is not supported here",
        ),
    ],
)
def test_bad_options(
    options: list[str],
    pattern: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [option.replace("BACKBONE", str(world.backbone)) for option in options]
    argv = ["build-index", world.at("bag"), "--out", str(tmp_path / "out"), *world.detector]
    refused([*argv, "--set", "variant=instance", *options], pattern, capsys, tmp_path)
