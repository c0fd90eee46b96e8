"""Layers above the deepest hidden state asked for: taken out, and nothing else changes."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from worlds.backbones import FAMILIES, images, save_backbone

from semantic_anomaly.embedding.backbone import Backbone, PatchEmbedder
from semantic_anomaly.embedding.truncation import truncate
from semantic_anomaly.stages import StageSpec


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_hidden_states_up_to_the_deepest_stay_bit_by_bit(
    tmp_path: Path, rng: np.random.Generator, name: str
) -> None:
    tiny = FAMILIES[name]
    folder = str(save_backbone(tmp_path / name, tiny.model_class, **tiny.config))
    whole, cut = Backbone(folder, "cpu"), Backbone(folder, "cpu")
    deepest = whole.layers // 2
    cut.truncate(deepest)
    assert cut.parameters < 0.95 * whole.parameters
    assert (cut.layers, cut.coarsest_px) == (whole.layers, whole.coarsest_px)
    side = 2 * whole.side_px
    pixels = whole.prepare(np.stack(images(rng, (side, side))), (side, side))
    layers = range(deepest + 1)
    for values, expected in zip(cut.maps(pixels, layers), whole.maps(pixels, layers), strict=True):
        assert torch.equal(values, expected)


@pytest.mark.parametrize(("name", "layer"), [("efficientnet_lite2", 18), ("mobilenet_v1", 21)])
def test_shipped_backbones_are_truncated(
    name: str, layer: int, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = Backbone(name, "cpu")
    whole = loaded.parameters
    with caplog.at_level(logging.DEBUG):
        loaded.truncate(layer)
    assert loaded.parameters < 0.8 * whole
    # Poolers and activations without weights cost nothing and stay.
    assert f"'{name}': not computed: " in caplog.text and "pooler" not in caplog.text


def test_stages_of_one_backbone_share_the_deepest_hidden_state(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    tiny = FAMILIES["mobilenet_v1"]
    folder = str(save_backbone(tmp_path / "mobilenet", tiny.model_class, **tiny.config))
    whole = Backbone(folder, "cpu")
    # Of 26 hidden states; -16 is number 10. Sizes differ, so there are two passes.
    stages = [StageSpec(folder, 4, 64), StageSpec(folder, -16, 96), StageSpec(folder, 7, 64)]
    embedder = PatchEmbedder(stages, device="cpu")
    assert [identity.layer for identity in embedder.identities] == [4, 10, 7]
    [loaded] = embedder._backbones.values()
    whole.truncate(10)
    assert loaded.parameters == whole.parameters
    # As the number of the last hidden state, None and -1 mean the whole network.
    (image,) = images(rng, (60, 80))
    for layer in (None, -1):
        last = PatchEmbedder([StageSpec(folder, layer, 64)], device="cpu")
        assert last.identities[0].layer == 25
    assert embedder.embed([image])[0].stages[1].grid_hw == (5, 6)


class _Chain(nn.Module):
    """Layers whose outputs are hidden states, and a rule about the number of layers."""

    def __init__(self, needed: int, inplace: bool = False) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace)) for _ in range(4)]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(4, 2)
        self.needed = needed

    def forward(self, values: torch.Tensor) -> list[torch.Tensor]:
        if len(self.layers) < self.needed:
            raise RuntimeError("layers are missing")
        states = []
        for layer in self.layers:
            values = layer(values)
            states.append(values)
        self.head(values)
        return states


@pytest.mark.parametrize("inplace", [False, True])
def test_names_of_what_was_taken_out_are_returned(inplace: bool) -> None:
    network, values = _Chain(0, inplace), torch.randn(3, 4)
    expected = network(values)
    assert truncate(network, lambda: network(values), 1) == ["layers.2", "layers.3", "head"]
    assert [*map(len, network.layers)] == [2, 2]
    for state, other in zip(network(values), expected[:2], strict=True):
        assert torch.equal(state, other)
    assert not truncate(network, lambda: network(values), 1)


def test_networks_that_need_their_layers_stay_whole() -> None:
    network, values = _Chain(3), torch.randn(3, 4)
    expected = [*network.named_modules()]
    assert truncate(network, lambda: network(values), 1) == []
    assert [*network.named_modules()] == expected and len(network(values)) == 4
    # Hidden states that no module returns have no place at which a layer could start.
    assert truncate(network, lambda: [s + 1 for s in network(values)], 1) == []
