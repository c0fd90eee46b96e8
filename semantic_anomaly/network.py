"""Making the network of a backbone folder: whole, unaltered, and on the device asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from semantic_anomaly.backbone_folder import BackboneFolder
from semantic_anomaly.errors import BackboneError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fold_normalisations(model: nn.Module) -> None:
    """Fold each batch norm into the convolution before it; the family's layers name both alike."""
    for layer in model.modules():
        convolution = getattr(layer, "convolution", None)
        norm = getattr(layer, "normalization", None)
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            layer.convolution = nn.utils.fuse_conv_bn_eval(convolution, norm)
            layer.normalization = nn.Identity()


def load_network(folder: BackboneFolder) -> nn.Module:
    """Return the network of a folder in float32, for inference only.

    Args:
        folder: as `open_backbone` returns it.

    Raises:
        BackboneError: damaged, incomplete, of another configuration, or with weights that are
            not finite.
    """
    what = f"backbone '{folder.model_id}'"
    model, info = load_pretrained(transformers.AutoModel, folder.path, what)
    folder.check_loading(info)
    refuse_not_finite(model, what)
    return model.eval().requires_grad_(False)


def load_pretrained(kind: Any, path: Path, what: str) -> tuple[Any, dict[str, Any]]:
    """Return the network of a folder in float32 and what transformers says of its loading.

    Args:
        kind: class of transformers with `from_pretrained`.
        path: the folder; nothing else is looked for.
        what: names it in errors.

    Raises:
        BackboneError: damaged, or of another configuration.
    """
    try:
        with quiet_transformers():
            model, info = kind.from_pretrained(
                path,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
    # Damaged folders raise nearly anything: OSError, SafetensorError, KeyError, TypeError.
    except Exception as error:
        raise BackboneError(f"{what}: {first_line(error)}") from error
    return model, info


def refuse_not_finite(model: torch.nn.Module, what: str) -> None:
    """Raise BackboneError where a parameter or buffer is not finite."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BackboneError(f"{what}: weights of '{name}' are not finite")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence bars and reports of transformers while the block lasts."""
    # Its bars and reports would repeat, or contradict, what is raised here.
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def choose_device(name: str) -> torch.device:
    """Return the device of a name; raise BackboneError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise BackboneError(f"device '{name}': expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise BackboneError(f"device '{name}': expected a CUDA device, found {count}")
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the precision of a name on a device; raise BackboneError for unknown names."""
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if name not in _DTYPES:
        raise BackboneError(f"dtype '{name}': expected auto or one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class's name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
