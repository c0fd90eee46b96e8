"""`backbone`: what it prints, and backbones that cannot be used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from worlds.backbones import save_backbone
from worlds.cli import refused, row

from semantic_anomaly.cli import main
from semantic_anomaly.embedding.backbone import Backbone
from semantic_anomaly.index.nominal_index import NominalIndex

QUICK = ["--device", "cpu", "--repeat", "1", "--sizes"]


def numbered(text: str, number: int) -> str:
    """Return what stands behind a right-aligned number in a printed table."""
    match = re.search(rf"^ *{number}  +(.*)$", text, re.M)
    assert match is not None, f"no row {number} in:\n{text}"
    return match[1]


def test_it_prints_how_a_backbone_can_be_used(
    tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["backbone", str(tiny_backbone), *QUICK, "112", "56"]) == 0
    text = capsys.readouterr().out
    loaded = Backbone(str(tiny_backbone), "cpu")
    assert row(text, "backbone") == "tiny_dinov2 (dinov2)"
    assert row(text, "weights") == f"sha256 {loaded.weights_sha256[:16]}"
    assert row(text, "parameters") == f"{loaded.parameters / 1e6:.2f} M"
    assert row(text, "device") == "cpu, float32 by torch"
    assert row(text, "hidden states") == "0 to 3"
    states = [numbered(text, number).split() for number in range(4)]
    assert [state[:2] for state in states] == [["14", "32"]] * 4
    assert [state[2:] for state in states] == [[]] * 3 + [["timed", "below"]]
    # Images are 1920 x 1080.
    for size, grid in ((112, (5, 8)), (56, (2, 4))):
        found = re.fullmatch(r"(\d+) x (\d+) +(\d+) +(\d+) MB", numbered(text, size))
        assert found is not None and (int(found[1]), int(found[2])) == grid
        expected = NominalIndex.predicted_bytes(1000 * grid[0] * grid[1], 32)
        assert int(found[4]) == round(expected / 1e6)
    assert f"\nrecommended stages\n  {tiny_backbone}\nnot measured here" in text


def test_hidden_states_may_be_chosen_and_those_of_feature_maps_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(save_backbone(tmp_path / "net", "MobileNetV1Model", depth_multiplier=0.25))
    assert main(["backbone", folder, *QUICK, "128"]) == 0
    text = capsys.readouterr().out
    assert numbered(text, 21).split()[:2] == ["16", "128"]
    assert "\nhidden state 21, images" in text and numbered(text, 128).startswith("5 x 8 ")
    assert f"  {folder} layer=21 size=800\n" in text
    assert "\nmeasured with MobileNetV1" in text
    assert main(["backbone", folder, *QUICK, "128", "--layer", "-17"]) == 0
    text = capsys.readouterr().out
    assert "\nhidden state 9, images" in text and numbered(text, 128).startswith("9 x 16 ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", "4"], "layer 4: expected a hidden state from 0 to 3"),
        (["--sizes", "9000"], "size: expected 1 to 8192 pixels, found 9000"),
        (["--device", "cuda:99"], "device 'cuda:99'"),
    ],
)
def test_bad_options_are_refused(
    tiny_backbone: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["backbone", str(tiny_backbone), *QUICK, "56", *options], message, capsys)


def test_backbones_that_cannot_be_loaded_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["backbone", "mobilenet_v2"], "did you mean 'mobilenet_v1'", capsys)
    refused(["backbone", str(tmp_path)], r"config\.json: No such file", capsys)
