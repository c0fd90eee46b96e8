"""Loading the networks of segmenters: whole, unaltered, and never from the network."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from semantic_anomaly.backbone_folder import (
    PREPROCESSOR,
    BackboneFolder,
    locate,
    normalisation,
    read_json,
)
from semantic_anomaly.errors import BackboneError
from semantic_anomaly.network import load_pretrained, refuse_not_finite

_UNIVERSAL = "AutoModelForUniversalSegmentation"
# Architectures of each family, and the classes of transformers that they are loaded by.
_CLASSES = {
    "universal": dict.fromkeys(("eomt", "eomt_dinov3", "mask2former", "oneformer"), _UNIVERSAL),
    "promptless": {"edgetam": "EdgeTamModel", "sam2": "Sam2Model", "sam2_video": "Sam2Model"},
    "detector": {"rf_detr": "RfDetrForInstanceSegmentation"},
}


def open_segmenter(family: str, model: str) -> BackboneFolder:
    """Find a segmenter's folder and check what it says of itself.

    Args:
        family: universal, promptless or detector.
        model: a local folder, or a hub id that was downloaded before.

    Raises:
        BackboneError: not there, incomplete, or of another family.
    """
    path, model_id, revision = locate(model)
    config = read_json(path / "config.json", model_id)
    architecture = config.get("model_type")
    if architecture not in _CLASSES[family]:
        raise BackboneError(
            f"segmenter '{model_id}': architecture {architecture!r} is not of the family "
            f"'{family}'; expected one of: {', '.join(_CLASSES[family])}"
        )
    for odd in ("transformers_weights", "quantization_config", "use_pretrained_backbone"):
        if config.get(odd):
            raise BackboneError(f"segmenter '{model_id}': config.json: '{odd}' is not supported")
    content = read_json(path / PREPROCESSOR, model_id)
    values = normalisation(content, model_id)
    return BackboneFolder(path, model_id, revision, config, architecture, (), *values)


def read_size(folder: BackboneFolder) -> Any:
    """Return what preprocessor_config.json says of the size that images are resized to."""
    return read_json(folder.path / PREPROCESSOR, folder.model_id).get("size")


def load_segmentation_network(family: str, folder: BackboneFolder) -> torch.nn.Module:
    """Return the network of a folder in float32, for inference only.

    Unlike a backbone's, its heads count: no weight may be missing, nor be left over.

    Args:
        family: the one that the folder was opened for.
        folder: as `open_segmenter` returns it.

    Raises:
        BackboneError: damaged, incomplete, of another configuration, with weights that are not
            finite, or of an architecture that the installed transformers lacks.
    """
    name = _CLASSES[family][folder.architecture]
    what = f"segmenter '{folder.model_id}'"
    kind = getattr(transformers, name, None)
    if kind is None:
        raise BackboneError(f"{what}: transformers {transformers.__version__} has no {name}")
    model, info = load_pretrained(kind, folder.path, what)
    for sort in ("missing", "mismatched", "unexpected"):
        if info[f"{sort}_keys"]:
            shown = ", ".join(sorted(map(str, info[f"{sort}_keys"]))[:3])
            raise BackboneError(f"{what}: expected exactly its weights, found {sort}: {shown}")
    refuse_not_finite(model, what)
    return model.eval().requires_grad_(False)
