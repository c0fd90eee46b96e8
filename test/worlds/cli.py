"""A small world on disk for the commands: drives, a bag, a tiny backbone, an index of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from semantic_anomaly.cli import main
from semantic_anomaly.synthetic import StreetDrive
from semantic_anomaly.synthetic.export import write_bag, write_folder

SIZE = (72, 128)


@dataclass(frozen=True)
class World:
    """Where everything lies; tests read it and write elsewhere."""

    root: Path
    backbone: Path

    @property
    def detector(self) -> list[str]:
        """Return the options that every verb with a detector needs here."""
        return ["--backbone", str(self.backbone), "--set", "input_size=140", "--set", "device=cpu"]

    def at(self, name: str) -> str:
        """Return the path of something in the world."""
        return str(self.root / name)

    def copy(self, name: str, to: Path) -> Path:
        """Return a copy that may be damaged."""
        shutil.copytree(self.root / name, to)
        return to


def make_world(root: Path, backbone: Path) -> World:
    """Write drives and a bag, build an index and calibrate it."""
    world = World(root, backbone)
    quiet = {"progress": False}
    for seed in (1, 2):
        write_folder(
            [StreetDrive(seed, 30, image_hw=SIZE)], root / f"index_{seed}", stride=6, **quiet
        )
    for seed in (11, 12):
        drive = StreetDrive(seed, 60, image_hw=SIZE)
        write_folder([drive], root / f"calibration_{seed}", stride=6, **quiet)
    odd = StreetDrive(21, 90, anomalies=("cow",), image_hw=SIZE)
    write_folder([odd], root / "labelled", stride=9, **quiet)
    write_bag(StreetDrive(22, 6, image_hw=SIZE), root / "bag", storage="mcap", **quiet)
    drives = [world.at("index_1"), world.at("index_2")]
    assert main(["build-index", *drives, "--out", world.at("index"), *world.detector]) == 0
    nominal = [world.at("calibration_11"), world.at("calibration_12")]
    rate = ["--target-false-alarm-rate", "0.1"]
    assert main(["calibrate", world.at("index"), *nominal, *rate, *world.detector]) == 0
    return world


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder, hidden ones too, with its content; folders with nothing."""
    found = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in found}


@contextmanager
def unchanged(*folders: Path) -> Iterator[None]:
    """Assert that nothing in the folders is made, changed or lost."""
    before = [contents(folder) for folder in folders]
    yield
    for folder, expected in zip(folders, before, strict=True):
        found = contents(folder)
        assert sorted(found) == sorted(expected)
        assert found == expected


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line of the error that a command printed."""
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("semantic-anomaly")
    ]
    assert len(lines) == 1 and lines[0].startswith("semantic-anomaly: error: ")
    return lines[0]


def refused(
    argv: list[str], named: str, capsys: pytest.CaptureFixture[str], *kept: Path, code: int = 2
) -> None:
    """Assert that a command refuses with one line, and leaves the folders as they were."""
    capsys.readouterr()
    with unchanged(*kept):
        assert main(argv) == code
    line = said(capsys)
    assert re.search(named, line), line
