"""`explain`: the entries nearest to a box, of patches and of instances."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from worlds.cli import World, refused

from semantic_anomaly.cli import main
from semantic_anomaly.io.images import read_image


@pytest.mark.parametrize(
    ("index", "stages"), [("index", [""]), ("index_with_instances", ["", "1:"])]
)
def test_explain(
    index: str,
    stages: list[str],
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, image = tmp_path / "why.jpg", f"{world.at('labelled')}[5:6]"
    box = ["--box", "0", "0", "128", "72", "--count", "3", "--out", str(out)]
    assert main(["explain", world.at(index), image, *box]) == 0
    text = capsys.readouterr().out
    listed = re.findall(r"^ *(1:)?\d+ +\S+/", text, re.M)
    assert listed == sorted(listed) and set(listed) == set(stages)
    assert listed.count("") == 3
    assert f"without these {len(listed)} entries" in text and "threshold" in text
    assert read_image(out).shape[1] > 480


@pytest.mark.parametrize(
    ("image", "options", "pattern"),
    [
        ("labelled[5:6]", "0 0 500 5", "within the image of 128x72 pixels"),
        ("labelled", "0 0 50 50", "expected one frame, found several"),
        ("none.png", "0 0 50 50", r"none\.png"),
    ],
)
def test_refusals(
    image: str, options: str, pattern: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["explain", world.at("index"), world.at(image), "--box", *options.split()]
    refused([*argv, *world.detector], pattern, capsys, world.root)
