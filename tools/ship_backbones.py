"""Make the shipped backbones from pretrained ImageNet networks: cut, and stored in half precision.

EfficientNet-Lite2 keeps its first 20 blocks (hidden states 0 to 20). Its squeeze-excite blocks are
neutral (a gate of 1) and shrink to one channel, since transformers has no EfficientNet without
them. MobileNetV1 keeps all layers; those above hidden state 23 are zeros. Convolutions are stored
in float16, batch norms in float32, whose statistics exceed the range of float16.

Needs the folders efficientnet_lite2_imagenet and mobilenet_v1_imagenet (Hugging Face folders of the
original weights). Takes ten seconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SHIPPED = Path(__file__).parents[1] / "semantic_anomaly" / "backbones"
EFFICIENTNET_BLOCKS = 20
MOBILENET_LAYERS, MOBILENET_LAYER = 24, 21
NEUTRAL_BIAS = 20.0
Weights = dict[str, torch.Tensor]


def efficientnet(weights: Weights, config: dict[str, Any]) -> Weights:
    """Return the weights of the first blocks and cut the configuration to them, in place.

    Raises:
        ValueError: a squeeze-excite block is not neutral.
    """
    totals = itertools.accumulate(config["num_block_repeats"])
    stages = sum(total <= EFFICIENTNET_BLOCKS for total in totals)
    for key, values in config.items():
        if isinstance(values, list) and len(values) == len(config["strides"]) and key != "strides":
            config[key] = values[:stages]
    config["strides"] = config["strides"][:stages]
    config["num_hidden_layers"] = 4 * EFFICIENTNET_BLOCKS
    # max(1, int(channels * ratio)) channels inside a squeeze-excite block.
    config["squeeze_expansion_ratio"] = 1e-6
    kept = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        is_block = name.startswith("encoder.blocks.")
        if name.startswith("encoder.top_") or (is_block and int(parts[2]) >= EFFICIENTNET_BLOCKS):
            continue
        if ".squeeze_excite." in name:
            gate = name.endswith("expand.bias")
            if name.endswith("expand.weight") and tensor.any():
                raise ValueError(f"{name}: expected zeros, found others")
            if gate and not (torch.sigmoid(tensor) == 1).all():
                raise ValueError(f"{name}: expected a gate of 1, found another")
            tensor = _one_channel(name, tensor)
        kept[name] = tensor
    return kept


def _one_channel(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of a neutral squeeze-excite block with one channel inside."""
    if ".reduce." in name:
        return torch.zeros_like(tensor[:1])
    if name.endswith(".weight"):
        return torch.zeros_like(tensor[:, :1])
    return torch.full_like(tensor, NEUTRAL_BIAS)


def mobilenet(weights: Weights, config: dict[str, Any]) -> Weights:
    """Return the weights with zeros above the hidden states that are used; set the default one."""
    # The default hidden state.
    config["out_indices"] = [MOBILENET_LAYER]
    kept = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        if parts[0] == "layer" and int(parts[1]) >= MOBILENET_LAYERS:
            tensor = torch.ones_like(tensor) if name.endswith("_var") else torch.zeros_like(tensor)
        kept[name] = tensor
    return kept


def write(source: Path, folder: Path, cut: Any) -> None:
    """Write a shipped backbone."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    weights = cut(load_file(source / "model.safetensors"), config)
    stored = {
        name: tensor.half().contiguous() if tensor.ndim == 4 else tensor.contiguous()
        for name, tensor in weights.items()
        if not name.endswith("num_batches_tracked")
    }
    for name, tensor in stored.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: expected finite weights in {tensor.dtype}, found others")
    config["dtype"] = "float32"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    shutil.copyfile(source / "preprocessor_config.json", folder / "preprocessor_config.json")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    size = sum(path.stat().st_size for path in folder.iterdir())
    count = sum(tensor.numel() for tensor in stored.values())
    print(f"{folder}: {count / 1e6:.2f} M parameters, {size / 1e6:.2f} MB")


def main() -> None:
    """Write the shipped backbones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", type=Path, help="folder with both folders of original weights")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the shipped backbones")
    args = parser.parse_args()
    for name, cut in (("efficientnet_lite2", efficientnet), ("mobilenet_v1", mobilenet)):
        write(args.weights / f"{name}_imagenet", args.out / name, cut)


if __name__ == "__main__":
    main()
