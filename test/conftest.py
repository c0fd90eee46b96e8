"""Fixtures shared by the tests: small models made here, nothing from a network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from cli_world import World

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Field assignments of messages are unchecked by default, and wrong scalars arrive as zero.
os.environ.setdefault("ROS_PYTHON_CHECK_FIELDS", "1")
os.environ.setdefault("FASTDDS_BUILTIN_TRANSPORTS", "LARGE_DATA")

PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_rescale": True,
}


def save_backbone(folder: Path, model_class: str = "Dinov2Model", **config: object) -> Path:
    """Save a small randomly initialised backbone as a Hugging Face folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    defaults: dict[str, object] = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "mlp_ratio": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    config_class = getattr(transformers, model_class.replace("Model", "Config"))
    known = defaults if "Dinov2" in model_class else {}
    model = getattr(transformers, model_class)(config_class(**{**known, **config}))
    model.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random DINOv2: 32-d, 3 layers, patch 14."""
    return save_backbone(tmp_path_factory.mktemp("backbone") / "tiny_dinov2")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> World:
    """Return what the commands are tried on; tests read it and write elsewhere."""
    # What it imports reads the environment that is set above.
    from cli_world import make_world

    return make_world(tmp_path_factory.mktemp("world"), tiny_backbone)


@pytest.fixture
def rng() -> np.random.Generator:
    """Return a seeded random generator."""
    return np.random.default_rng(0)
