"""Bad input: exit code 2, one line that names expected and found, nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from worlds.cli import World, contents, refused

from semantic_anomaly.io.images import encode_png, write_image

RATE = ["--target-false-alarm-rate", "0.1"]
PICTURE = np.full((72, 128, 3), 90, np.uint8)


def no_images(folder: Path) -> None:
    folder.mkdir()


def unreadable_image(folder: Path) -> None:
    folder.mkdir()
    write_image(folder / "0.png", PICTURE)
    (folder / "1.png").write_bytes(encode_png(PICTURE)[:-30])


def sizes_that_vary(folder: Path) -> None:
    folder.mkdir()
    write_image(folder / "0.png", PICTURE)
    write_image(folder / "1.png", PICTURE[:64])


def a_text_file(folder: Path) -> None:
    folder.write_text("no video")


def a_cut_bag(folder: Path) -> None:
    folder.mkdir()
    (folder / "drive.mcap").write_bytes(b"\x89MCAP0\r\n" + bytes(50))


def nothing(folder: Path) -> None:
    pass


SOURCES = [
    (no_images, r"expected images .*found none"),
    (unreadable_image, r"1\.png.*truncated"),
    (sizes_that_vary, r"one size, 128x72.*found 128x64.*1\.png"),
    (a_text_file, r"expected a folder of images, .*a video .* or a bag"),
    (a_cut_bag, r"drive\.mcap|lacks its metadata"),
    (nothing, r"does not exist"),
]


@pytest.mark.parametrize(
    ("verb", "make", "named"),
    [
        *(("build-index", make, named) for make, named in SOURCES),
        ("calibrate", *SOURCES[0]),
        ("calibrate", *SOURCES[1]),
        ("replay", *SOURCES[1]),
    ],
)
def test_bad_sources(
    verb: str,
    make: Callable[[Path], None],
    named: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "source"
    make(source)
    index, out = world.at("index"), str(tmp_path / "out")
    argv = {
        "build-index": [verb, world.at("index_1"), str(source), "--out", out],
        "calibrate": [verb, index, world.at("calibration_11"), str(source), *RATE],
        "replay": [verb, str(source), "--index", index, "--out", out],
    }[verb]
    refused([*argv, *world.detector], named, capsys, tmp_path, Path(index))


@pytest.mark.parametrize("verb", ["build-index", "calibrate", "replay"])
@pytest.mark.parametrize(
    ("topic", "named"),
    [
        ("/no/such", r"no topic '/no/such'.*/camera/image_raw \(sensor_msgs/msg/Image, 6"),
        ("/camera/camera_info", r"of type sensor_msgs/msg/CameraInfo, expected sensor_msgs"),
    ],
)
def test_bad_topics(
    verb: str,
    topic: str,
    named: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = ["--out", str(tmp_path / "out")]
    argv = {
        "build-index": [verb, world.at("bag"), *out],
        "calibrate": [verb, world.at("index"), world.at("bag"), *RATE],
        "replay": [verb, world.at("bag"), "--index", world.at("index"), *out],
    }[verb]
    refused([*argv, "--topic", topic, *world.detector], named, capsys, tmp_path, world.root)


def missing_backbone(folder: Path) -> None:
    shutil.rmtree(folder)


def no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def other_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))


def other_weights(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (missing_backbone, r"backbone.*expected a folder, found none"),
        (no_safetensors, r"expected weights in .*safetensors"),
        (other_architecture, r"'bert'.*expected one of: .*dinov2"),
        (other_weights, r"expected exactly the weights of a"),
    ],
)
@pytest.mark.parametrize("verb", ["build-index"])
def test_bad_backbones(
    verb: str,
    damage: Callable[[Path], None],
    named: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    backbone = shutil.copytree(world.backbone, tmp_path / "backbone")
    damage(backbone)
    out = ["--out", str(tmp_path / "out"), "--backbone", str(backbone)]
    argv = {
        "build-index": ["build-index", world.at("index_1"), *out],
        "evaluate": ["evaluate", world.at("labelled"), "--index", world.at("index"), *out],
    }[verb]
    refused([*argv, "--set", "input_size=140"], named, capsys, tmp_path)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--set", "neighbour=3"], r"unknown setting 'neighbour' \(did you mean 'neighbours'\?\)"),
        (["--set", "neighbours=0"], r"'neighbours': expected at least 1, found 0"),
        (["--set", "tail_percent=200"], r"'tail_percent': expected at most 100"),
        (["--set", "search=fast"], r"'search': expected one of auto, exact, graph, found 'fast'"),
        (["--set", "camera.region_of_interest=[0.1, 0.2]"], r"at least 3 pairs"),
        (["--set", "camera.ego_mask=absent.png"], r"absent\.png"),
        (["--settings", "SETTINGS"], r"unknown setting 'neighbors'"),
        (["--camera", "rear"], r"unknown camera 'rear'.*expected one of: camera"),
    ],
)
@pytest.mark.parametrize("verb", ["evaluate"])
def test_bad_settings(
    verb: str,
    options: list[str],
    named: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = tmp_path / "node.yaml"
    settings.write_text("/**:\n  ros__parameters:\n    neighbors: 3\n")
    options = [str(settings) if option == "SETTINGS" else option for option in options]
    index, out = world.at("index"), ["--out", str(tmp_path / "out")]
    argv = {
        "build-index": [verb, world.at("index_1"), *out],
        "calibrate": [verb, index, world.at("calibration_11")],
        "evaluate": [verb, world.at("labelled"), "--index", index, *out],
        "replay": [verb, world.at("bag"), "--index", index, *out],
    }[verb]
    refused([*argv, *world.detector, *options], named, capsys, tmp_path)


@pytest.mark.parametrize("verb", ["build-index", "evaluate", "replay"])
@pytest.mark.parametrize("in_the_way", ["a file", "other files"])
def test_nothing_of_others_is_overwritten(
    verb: str,
    in_the_way: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    if in_the_way == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    index, given = world.at("index"), ["--out", str(out), *world.detector]
    argv = {
        "build-index": [verb, world.at("index_1"), *given],
        "evaluate": [verb, world.at("labelled"), "--index", index, *given],
        "replay": [verb, world.at("bag"), "--index", index, *given],
    }[verb]
    refused(argv, r"out", capsys, tmp_path)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("bag", r"expected a folder 'images' in it"),
        ("absent", r"expected a folder 'images' in it, found no such folder"),
        ("labelled[50:60]", r"found none"),
    ],
)
def test_bad_datasets(
    name: str, named: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--index", world.at("index"), "--out", str(tmp_path / "out")]
    refused(["evaluate", world.at(name), *out, *world.detector], named, capsys, tmp_path)


def test_a_dataset_that_turns_out_bad_leaves_nothing(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = world.copy("labelled", tmp_path / "labelled")
    last = sorted((dataset / "images").iterdir())[-1]
    last.write_bytes(last.read_bytes()[:-40])
    out = ["--index", world.at("index"), "--out", str(tmp_path / "out")]
    refused(["evaluate", str(dataset), *out, *world.detector], last.name, capsys, tmp_path)
    assert next(iter(contents(tmp_path))) == "labelled"
