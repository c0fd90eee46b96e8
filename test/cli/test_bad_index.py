"""Damaged indexes and calibrations, and those of another detector, are refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from worlds.cli import World, refused

from semantic_anomaly.cli import main


def missing(index: Path) -> None:
    shutil.rmtree(index)


def truncated(index: Path) -> None:
    graph = index / "graph.hnsw"
    graph.write_bytes(graph.read_bytes()[:-100])


def tampered(index: Path) -> None:
    content = bytearray((index / "embeddings.npy").read_bytes())
    content[-1] ^= 1
    (index / "embeddings.npy").write_bytes(content)


def edited_manifest(index: Path) -> None:
    path = index / "manifest.json"
    path.write_text(path.read_text().replace('"input_size": 140', '"input_size": 154'))


def no_manifest(index: Path) -> None:
    (index / "manifest.json").unlink()


def edited_calibration(index: Path) -> None:
    path = index / "calibration.json"
    text = path.read_text()
    path.write_text(text.replace('"neighbours":1', '"neighbours":2'))
    assert path.read_text() != text


def half_a_calibration(index: Path) -> None:
    path = index / "calibration.json"
    path.write_bytes(path.read_bytes()[:100])


DAMAGES = [
    (missing, r"expected an index folder, found no folder"),
    (truncated, r"graph\.hnsw of \d+ bytes, found \d+"),
    (tampered, r"embeddings\.npy with sha256 .*found another content"),
    (edited_manifest, r"manifest\.json as it was written"),
    (no_manifest, r"expected manifest\.json, found no such file"),
    (edited_calibration, r"calibration.*sha256 does not match"),
    (half_a_calibration, r"calibration.*not JSON"),
]


def reading(verb: str, index: Path, world: World, folder: Path) -> list[str]:
    """Return a command that reads an index, and writes into a folder if at all."""
    out = ["--index", str(index), "--out", str(folder / "out"), *world.detector]
    return {
        "evaluate": ["evaluate", world.at("labelled"), *out],
        "replay": ["replay", world.at("bag"), *out],
        "inspect-index": ["inspect-index", str(index)],
        "calibrate": ["calibrate", str(index), world.at("calibration_11")],
    }[verb]


@pytest.mark.parametrize(
    ("verb", "damage", "named"),
    [
        *(("evaluate", damage, named) for damage, named in DAMAGES),
        ("replay", *DAMAGES[2]),
        ("calibrate", *DAMAGES[2]),
        ("inspect-index", *DAMAGES[2]),
        ("inspect-index", *DAMAGES[5]),
    ],
)
def test_damaged_indexes(
    verb: str,
    damage: Callable[[Path], None],
    named: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    index = world.copy("index", tmp_path / "index")
    damage(index)
    refused(reading(verb, index, world, tmp_path), named, capsys, tmp_path)


@pytest.fixture(scope="module")
def other_index(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a calibrated index of the same backbone and another drive."""
    index = tmp_path_factory.mktemp("other") / "index"
    nominal = f"{world.at('index_2')}[0:2]"
    assert main(["build-index", nominal, "--out", str(index), *world.detector]) == 0
    rate = ["--target-false-alarm-rate", "0.2"]
    drive = world.at("calibration_11")
    assert main(["calibrate", str(index), drive, *rate, *world.detector]) == 0
    return index


@pytest.mark.parametrize("verb", ["evaluate", "inspect-index"])
def test_a_calibration_of_another_index(
    verb: str,
    world: World,
    other_index: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    index = world.copy("index", tmp_path / "index")
    shutil.copy(other_index / "calibration.json", index)
    refused(
        reading(verb, index, world, tmp_path),
        r"index fingerprint: expected [0-9a-f]+, found [0-9a-f]+",
        capsys,
        tmp_path,
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--set", "input_size=126"], r"setting 'input_size': expected 140, found 126"),
        (["--set", "layers=[1]"], r"layers of the embedder"),
        (
            ["--set", "camera.region_of_interest=[0.0, 0.5, 1.0, 0.5, 1.0, 1.0]"],
            r"region of interest: expected .*calibrate again",
        ),
        (["--set", "neighbours=2"], r"setting 'neighbours': expected 1, found 2.*calibrate again"),
        (["--set", "tail_percent=2"], r"setting 'tail_percent': expected 0.2"),
        (["--set", "target_false_alarm_rate=0.001"], r"0\.001 needs at least 999.*found 20"),
    ],
)
def test_settings_of_another_detector(
    changes: list[str],
    named: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = ["--out", str(tmp_path / "out"), "--index", world.at("index")]
    argv = ["evaluate", world.at("labelled"), *out, *world.detector, *changes]
    refused(argv, named, capsys, tmp_path)


def test_another_backbone(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from worlds.backbones import save_backbone

    other = save_backbone(tmp_path / "other", mlp_ratio=4)
    out = ["--out", str(tmp_path / "out"), "--index", world.at("index")]
    argv = ["evaluate", world.at("labelled"), *out, *world.detector, "--backbone", str(other)]
    named = r"weights_sha256 of the embedder: expected [0-9a-f]{64}, found [0-9a-f]{64}"
    refused(argv, named, capsys, tmp_path)


@pytest.mark.parametrize(
    ("rate", "named"),
    [
        ("0.01", r"rate.* needs at least 99 nominal calibration frames, found 10"),
        ("0.9", r"target_false_alarm_rate': expected at most 0\.5, found 0\.9"),
        ("-1", r"target_false_alarm_rate': expected at least"),
    ],
)
def test_a_target_rate_that_cannot_be_had(
    rate: str, named: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["calibrate", world.at("index"), world.at("calibration_11"), *world.detector]
    refused([*argv, "--target-false-alarm-rate", rate], named, capsys, world.root)


def test_calibrating_with_what_the_index_has_seen(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["calibrate", world.at("index"), world.at("index_1"), *world.detector]
    rate = ["--target-false-alarm-rate", "0.2"]
    refused([*argv, *rate], r"the index has seen frame 'index_1/", capsys, world.root)
