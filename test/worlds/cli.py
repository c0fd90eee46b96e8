"""A small world on disk for the commands: drives, a bag, a tiny backbone, an index of it."""

from __future__ import annotations

import re
import shutil
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
        return Path(shutil.copytree(self.root / name, to))

    def add_index(self, name: str, *options: str) -> None:
        """Build an index with further options, and calibrate it."""
        drives = [self.at("index_1"), self.at("index_2")]
        assert main(["build-index", *drives, "--out", self.at(name), *self.detector, *options]) == 0
        nominal = [self.at("calibration_11"), self.at("calibration_12")]
        rate = ["--target-false-alarm-rate", "0.1"]
        assert main(["calibrate", self.at(name), *nominal, *rate, *self.detector, *options]) == 0


def make_world(root: Path, backbone: Path) -> World:
    """Write drives and a bag, and the calibrated indexes `index` and `index_with_instances`."""
    for name, seed, frames, stride, anomalies in (
        ("index_1", 1, 30, 6, ()),
        ("index_2", 2, 30, 6, ()),
        ("calibration_11", 11, 60, 6, ()),
        ("calibration_12", 12, 60, 6, ()),
        ("labelled", 21, 90, 9, ("cow",)),
    ):
        drive = StreetDrive(seed, frames, anomalies=anomalies, image_hw=SIZE)
        write_folder([drive], root / name, stride=stride, progress=False)
    write_bag(StreetDrive(22, 6, image_hw=SIZE), root / "bag", storage="mcap", progress=False)
    world = World(root, backbone)
    world.add_index("index")
    world.add_index("index_with_instances", "--set", "variant=combined")
    return world


def row(text: str, name: str) -> str:
    """Return what stands behind a name in a printed table."""
    match = re.search(rf"^{re.escape(name)}  +(.*)$", text, re.M)
    assert match is not None, f"no row '{name}' in:\n{text}"
    return match[1]


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder, hidden ones too, with its content; folders with nothing."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in paths}


def refused(argv: list[str], pattern: str, capsys: pytest.CaptureFixture[str], *kept: Path) -> None:
    """Assert that a command refuses bad input with one line, and leaves the folders unchanged."""
    capsys.readouterr()
    before = [contents(folder) for folder in kept]
    assert main(argv) == 2
    for folder, expected in zip(kept, before, strict=True):
        found = contents(folder)
        assert sorted(found) == sorted(expected)
        assert found == expected
    lines = [s for s in capsys.readouterr().err.splitlines() if s.startswith("semantic-anomaly")]
    assert len(lines) == 1 and lines[0].startswith("semantic-anomaly: error: ")
    assert re.search(pattern, lines[0]), lines[0]
