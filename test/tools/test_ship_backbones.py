"""Shipped backbones: cut from the original weights without a change of their hidden states."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel
from worlds.backbones import EFFICIENT, images, make_network, save_network

from semantic_anomaly.embedding.backbone import Backbone

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import ship_backbones  # noqa: E402

SHIPPED = ROOT / "semantic_anomaly" / "backbones"
WEIGHTS = Path(os.environ.get("SEMANTIC_ANOMALY_DATA", ""), "weights")
NAMES = {"efficientnet_lite2": 20, "mobilenet_v1": 21}
needs_weights = pytest.mark.skipif(
    not (WEIGHTS / "mobilenet_v1_imagenet").is_dir(),
    reason="SEMANTIC_ANOMALY_DATA has no original weights",
)


@needs_weights
def test_shipped_folders_are_those_that_the_script_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["ship_backbones.py", str(WEIGHTS), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    ship_backbones.main()
    for name in NAMES:
        for path in (tmp_path / name).iterdir():
            shipped = SHIPPED / name / path.name
            assert path.read_bytes() == shipped.read_bytes(), f"{name}/{path.name}"


@needs_weights
@pytest.mark.parametrize("name", sorted(NAMES))
def test_hidden_states_are_those_of_the_original(name: str, rng: np.random.Generator) -> None:
    layer = NAMES[name]
    loaded = Backbone(name, "cpu")
    pixels = loaded.prepare(np.stack(images(rng, (128, 192))), (128, 192))
    original = AutoModel.from_pretrained(WEIGHTS / f"{name}_imagenet", dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = original(pixels, output_hidden_states=True).hidden_states[layer]
    [found] = loaded.maps(pixels, [layer])
    cosines = nn.functional.cosine_similarity(found.permute(0, 3, 1, 2), expected, dim=1)
    # Half precision moves embeddings a little.
    assert float(cosines.min()) > 0.9995


def neutral_network() -> nn.Module:
    network = make_network("EfficientNetModel", **EFFICIENT)
    for block in network.encoder.blocks:
        nn.init.zeros_(block.squeeze_excite.expand.weight)
        nn.init.constant_(block.squeeze_excite.expand.bias, 20.0)
    network_: nn.Module = network
    return network_


def test_whole_stages_are_cut_and_gates_shrink(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    source = save_network(tmp_path / "source", neutral_network())
    monkeypatch.setattr(ship_backbones, "EFFICIENTNET_BLOCKS", 2)
    ship_backbones.write(source, tmp_path / "cut", ship_backbones.efficientnet)
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert (config["out_channels"], config["strides"]) == ([8, 16], [1, 2])
    weights = load_file(tmp_path / "cut" / "model.safetensors")
    assert not [name for name in weights if "top" in name or "blocks.2" in name]
    gates = [tensor for name, tensor in weights.items() if "reduce.weight" in name]
    assert gates and {tensor.shape[0] for tensor in gates} == {1}
    assert {tensor.dtype for tensor in weights.values() if tensor.ndim == 4} == {torch.float16}
    whole, cut = (Backbone(str(folder), "cpu") for folder in (source, tmp_path / "cut"))
    assert (whole.layers, cut.layers) == (5, 3)
    pixels = whole.prepare(np.stack(images(rng, (64, 64))), (64, 64))
    for one, other in zip(whole.maps(pixels, range(3)), cut.maps(pixels, range(3)), strict=True):
        assert float(nn.functional.cosine_similarity(one, other, dim=-1).min()) > 0.999


@pytest.mark.parametrize(
    ("part", "message"), [("weight", "expected zeros"), ("bias", "a gate of 1")]
)
def test_gates_that_do_something_are_not_cut(tmp_path: Path, part: str, message: str) -> None:
    network = neutral_network()
    gate = network.get_parameter(f"encoder.blocks.1.squeeze_excite.expand.{part}")
    gate.data[0] = -3.0
    source = save_network(tmp_path / "source", network)
    with pytest.raises(ValueError, match=rf"blocks\.1\.squeeze_excite.*{message}"):
        ship_backbones.write(source, tmp_path / "cut", ship_backbones.efficientnet)
    assert not (tmp_path / "cut").exists()
