"""Small random backbones of every supported family, and images for them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_rescale": True,
}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 16,
}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
WINDOWS = {"embed_dim": 16, "depths": [1, 1, 1, 1], "image_size": 64}
HEADS = {"num_heads": [2, 2, 2, 2], "window_size": 4}
# Family, configuration, layers, and the stride and dimension that they must give.
FAMILIES: list[tuple[str, dict[str, Any], tuple[int, ...], int, int]] = [
    ("Dinov2Model", {}, (), 14, 32),
    ("Dinov2WithRegistersModel", {"num_register_tokens": 3}, (), 14, 32),
    ("DINOv3ViTModel", {**VIT, "num_register_tokens": 4}, (2, 3), 16, 64),
    ("ViTModel", VIT, (), 16, 32),
    ("DeiTModel", VIT, (3,), 16, 32),
    ("ViTMSNModel", VIT, (), 16, 32),
    ("IJepaModel", VIT, (), 16, 32),
    ("ConvNextModel", STAGES, (), 32, 32),
    ("ConvNextModel", {**STAGES, "patch_size": 5}, (2, 3), 10, 40),
    ("ConvNextV2Model", STAGES, (1, 3), 4, 32),
    ("DINOv3ConvNextModel", STAGES, (), 32, 32),
    ("ResNetModel", {**STAGES, "embedding_size": 8, "layer_type": "basic"}, (2, 3), 8, 40),
    ("RegNetModel", {**STAGES, "embedding_size": 8, "groups_width": 8}, (2, 3), 8, 40),
    (
        "BitModel",
        {**STAGES, "embedding_size": 32, "hidden_sizes": [32, 32, 64, 64], "num_groups": 8},
        (3,),
        16,
        64,
    ),
    ("MobileNetV1Model", {"depth_multiplier": 0.25}, (9, 21), 8, 192),
    ("MobileNetV2Model", {"depth_multiplier": 0.25}, (5, 8), 16, 32),
    ("SwinModel", {**WINDOWS, **HEADS}, (1, 2), 8, 96),
    ("Swinv2Model", {**WINDOWS, **HEADS}, (), 32, 128),
    ("FocalNetModel", WINDOWS, (1,), 8, 32),
    ("PoolFormerModel", STAGES, (2,), 16, 24),
]
IDS = [f"{name}{list(layers)}" for name, _, layers, _, _ in FAMILIES]


def images(rng: np.random.Generator, *sizes: tuple[int, int]) -> list[np.ndarray]:
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


class Averages(nn.Module):
    """In place of a network: tokens that are the mean colours of their patches."""

    def __init__(self, patch: int = 14) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, pixels: torch.Tensor, **_: Any) -> SimpleNamespace:
        means = nn.functional.avg_pool2d(pixels, self.patch).flatten(2).transpose(1, 2)
        tokens = torch.cat([torch.ones_like(means[:, :1]), means], 1)
        return SimpleNamespace(hidden_states=(tokens,) * 4, last_hidden_state=tokens)


def save_backbone(folder: Path, model_class: str = "Dinov2Model", **config: object) -> Path:
    """Save a small randomly initialised backbone as a Hugging Face folder."""
    torch.manual_seed(0)
    defaults: dict[str, object] = {**VIT, "mlp_ratio": 2, "image_size": 56, "patch_size": 14}
    config_class = getattr(transformers, model_class.replace("Model", "Config"))
    known = defaults if "Dinov2" in model_class else {}
    model = getattr(transformers, model_class)(config_class(**(known | config)))
    model.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder
