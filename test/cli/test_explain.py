"""`explain`: the entries nearest to a box, of patches and of instances."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from worlds.cli import World, refused

from semantic_anomaly.cli import main
from semantic_anomaly.io.images import read_image


@pytest.mark.parametrize(
    ("index", "options", "unit"),
    [
        ("index", [], "patches in the box"),
        ("index_with_instances", ["--part", "instances"], "instances in the box"),
    ],
)
def test_explain(
    index: str,
    options: list[str],
    unit: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, image = tmp_path / "why.jpg", f"{world.at('labelled')}[5:6]"
    box = ["--box", "0", "0", "128", "72", "--count", "3", "--out", str(out)]
    assert main(["explain", world.at(index), image, *box, *options]) == 0
    text = capsys.readouterr().out
    assert len(re.findall(r"^ *\d+ +\S+/", text, re.M)) == 3
    assert unit in text and "without these 3 entries" in text
    assert ("numbers of part 'instances'" in text) == bool(options)
    assert ("threshold" in text) != bool(options)
    assert read_image(out).shape[1] > 480


@pytest.mark.parametrize(
    ("image", "options", "pattern"),
    [
        ("labelled[5:6]", "0 0 500 5", "within the image of 128x72 pixels"),
        ("labelled", "0 0 50 50", "expected one frame, found several"),
        ("none.png", "0 0 50 50", r"none\.png"),
        ("labelled[5:6]", "0 0 50 50 --part scenes", "unknown part 'scenes'"),
    ],
)
def test_refusals(
    image: str, options: str, pattern: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["explain", world.at("index"), world.at(image), "--box", *options.split()]
    refused([*argv, *world.detector], pattern, capsys, world.root)
