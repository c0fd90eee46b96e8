"""Loading the networks of segmenters: whole, unaltered, and never from the network."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from semantic_anomaly.backbone_folder import (
    _PREPROCESSOR,
    BackboneFolder,
    _locate,
    _normalisation,
    _read_json,
)
from semantic_anomaly.errors import BackboneError
from semantic_anomaly.network import _quiet_transformers as quiet_transformers
from semantic_anomaly.network import first_line

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
    path, model_id, revision = _locate(model)
    config = _read_json(path / "config.json", model_id)
    architecture = config.get("model_type")
    if architecture not in _CLASSES[family]:
        raise BackboneError(
            f"segmenter '{model_id}': architecture {architecture!r} is not of the family "
            f"'{family}'; expected one of: {', '.join(_CLASSES[family])}"
        )
    for odd in ("transformers_weights", "quantization_config", "use_pretrained_backbone"):
        if config.get(odd):
            raise BackboneError(f"segmenter '{model_id}': config.json: '{odd}' is not supported")
    content = _read_json(path / _PREPROCESSOR, model_id)
    normalisation = _normalisation(content, model_id)
    return BackboneFolder(path, model_id, revision, config, architecture, (), *normalisation)


def read_size(folder: BackboneFolder) -> Any:
    """Return what preprocessor_config.json says of the size that images are resized to."""
    return _read_json(folder.path / _PREPROCESSOR, folder.model_id).get("size")


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
    try:
        with quiet_transformers():
            model, info = kind.from_pretrained(
                folder.path,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
    # Damaged folders raise nearly anything: OSError, SafetensorError, KeyError, TypeError.
    except Exception as error:
        raise BackboneError(f"{what}: {first_line(error)}") from error
    for sort in ("missing", "mismatched", "unexpected"):
        if info[f"{sort}_keys"]:
            shown = ", ".join(sorted(map(str, info[f"{sort}_keys"]))[:3])
            raise BackboneError(f"{what}: expected exactly its weights, found {sort}: {shown}")
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BackboneError(f"{what}: weights of '{key}' are not finite")
    return model.eval().requires_grad_(False)
