"""Small random backbones of every supported family, and images for them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
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
TEXT = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 8,
}
TOWERS = {"vision_config": VIT, "text_config": TEXT}
# Siglip2 has a number of patches in place of an image size.
PATCHES = {**{name: VIT[name] for name in VIT if name != "image_size"}, "num_patches": 16}
MAE = {**VIT, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}
MAE |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 32}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
RESIDUAL = {**STAGES, "embedding_size": 8}
WINDOWS = {"embed_dim": 16, "depths": [1, 1, 1, 1], "image_size": 64}
HEADS = {"num_heads": [2, 2, 2, 2], "window_size": 4}
EFFICIENT = {
    "in_channels": [32, 8, 16],
    "out_channels": [8, 16, 24],
    "kernel_sizes": [3, 3, 5],
    "strides": [1, 2, 2],
    "num_block_repeats": [1, 1, 2],
    "expand_ratios": [1, 2, 2],
    "depthwise_padding": [],
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "num_hidden_layers": 16,
    "hidden_dim": 1280,
}


@dataclass(frozen=True)
class Tiny:
    """A small random backbone, a hidden state of it, and what this must have.

    Attributes:
        model_class: class of transformers that saves it.
        config: configuration where it differs from that of the class.
        layer: hidden state; None: the default one.
        stride: in pixels.
        dim: number of channels.
    """

    model_class: str
    config: dict[str, Any] = field(default_factory=dict)
    layer: int | None = None
    stride: int = 16
    dim: int = 32


# By `model_type` of the configuration.
FAMILIES: dict[str, Tiny] = {
    "dinov2": Tiny("Dinov2Model", stride=14),
    "dinov2_with_registers": Tiny("Dinov2WithRegistersModel", {"num_register_tokens": 3}, None, 14),
    "dinov3_vit": Tiny("DINOv3ViTModel", {**VIT, "num_register_tokens": 4}, 2),
    "vit": Tiny("ViTModel", VIT),
    "vit_mae": Tiny("ViTMAEModel", MAE),
    "vit_msn": Tiny("ViTMSNModel", VIT),
    "deit": Tiny("DeiTModel", VIT, 3),
    "ijepa": Tiny("IJepaModel", VIT),
    "clip": Tiny("CLIPModel", TOWERS),
    "clip_vision_model": Tiny("CLIPVisionModel", VIT),
    "siglip": Tiny("SiglipModel", TOWERS),
    "siglip_vision_model": Tiny("SiglipVisionModel", VIT),
    "siglip2": Tiny("Siglip2Model", {**TOWERS, "vision_config": PATCHES}),
    "siglip2_vision_model": Tiny("Siglip2VisionModel", PATCHES),
    "convnext": Tiny("ConvNextModel", {**STAGES, "patch_size": 5}, 2, 10, 16),
    "convnextv2": Tiny("ConvNextV2Model", STAGES, -2, 16, 24),
    "dinov3_convnext": Tiny("DINOv3ConvNextModel", STAGES, 3, 16, 24),
    "resnet": Tiny("ResNetModel", {**RESIDUAL, "layer_type": "basic"}, 2, 8, 16),
    "regnet": Tiny("RegNetModel", {**RESIDUAL, "groups_width": 8}, 3, 16, 24),
    "bit": Tiny(
        "BitModel",
        {**STAGES, "embedding_size": 32, "hidden_sizes": [32, 32, 64, 64], "num_groups": 8},
        *(3, 16, 64),
    ),
    "efficientnet": Tiny("EfficientNetModel", EFFICIENT, 4, 8, 24),
    "mobilenet_v1": Tiny("MobileNetV1Model", {"depth_multiplier": 0.25}, 9, 8, 64),
    "mobilenet_v2": Tiny("MobileNetV2Model", {"depth_multiplier": 0.25}, 5, 16, 16),
    "swin": Tiny("SwinModel", {**WINDOWS, **HEADS}, 1, 8),
    "swinv2": Tiny("Swinv2Model", {**WINDOWS, **HEADS}, 2, 16, 64),
    "focalnet": Tiny("FocalNetModel", WINDOWS, 1, 8),
    "poolformer": Tiny("PoolFormerModel", STAGES, 2, 16, 24),
}


def images(rng: np.random.Generator, *sizes: tuple[int, int]) -> list[np.ndarray]:
    """Return images of noise of the given (height, width)."""
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


class Averages(nn.Module):
    """In place of a network: tokens that are the mean colours of their patches."""

    def __init__(self, config: Any, patch: int = 14) -> None:
        super().__init__()
        self.config = config
        self.patch = patch

    def forward(self, pixels: torch.Tensor, **_: Any) -> SimpleNamespace:
        means = nn.functional.avg_pool2d(pixels, self.patch).flatten(2).transpose(1, 2)
        tokens = torch.cat([torch.ones_like(means[:, :1]), means], 1)
        return SimpleNamespace(hidden_states=(tokens,) * 4)


def make_network(model_class: str = "Dinov2Model", **config: Any) -> Any:
    """Return a small randomly initialised network in evaluation mode."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {**VIT, "mlp_ratio": 2, "image_size": 56, "patch_size": 14}
    cls = getattr(transformers, model_class)
    known = defaults if "Dinov2" in model_class else {}
    network = cls(cls.config_class(**(known | config))).eval()
    if any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        _keep_scale(network)
    return network


@torch.no_grad()
def _keep_scale(network: nn.Module) -> None:
    """Draw convolutions that keep the scale, and batch norms that do something."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.uniform_(module.bias, -0.2, 0.2)


def save_backbone(folder: Path, model_class: str = "Dinov2Model", **config: Any) -> Path:
    """Save a small randomly initialised backbone as a Hugging Face folder."""
    return save_network(folder, make_network(model_class, **config))


def save_network(folder: Path, network: Any) -> Path:
    """Save a network as a Hugging Face folder."""
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder
