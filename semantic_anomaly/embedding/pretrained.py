"""What a backbone's folder says of itself, read and checked before any network is made of it.

Making the network of a backbone folder: whole, unaltered, and on the device asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from semantic_anomaly.errors import BackboneError, UnknownNameError
from semantic_anomaly.storage import canonical_json, sha256_bytes, sha256_file

SHIPPED = Path(__file__).parents[1] / "backbones"
# Families whose hidden states are a class token, perhaps registers, then patches row by row.
TOKEN_FAMILIES = frozenset(
    {"deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "ijepa", "vit", "vit_msn"}
)
# Families whose hidden states are (n, channels, rows, cols).
GRID_FAMILIES = frozenset(
    {
        "bit",
        "convnext",
        "convnextv2",
        "dinov3_convnext",
        "focalnet",
        "mobilenet_v1",
        "mobilenet_v2",
        "poolformer",
        "regnet",
        "resnet",
        "swin",
        "swinv2",
    }
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PLAIN_FILE = re.compile(r"[\w.-]+\.safetensors")
_WEIGHTS = "model.safetensors"
_SHARDS = "model.safetensors.index.json"
PREPROCESSOR = "preprocessor_config.json"
# Parts that take no part in patch features: poolers, heads, and what only training needs.
_APART = re.compile(
    r"(^|\.)(pooler|mask_token|classifier|cls_classifier|distillation_classifier|head|lm_head|fc)"
    r"(\.|$)|num_batches_tracked$|position_ids$"
)


@dataclass(frozen=True)
class BackboneFolder:
    """A Hugging Face folder that passed the checks that need no network.

    Attributes:
        path: the folder.
        model_id: shipped name, folder name or hub id.
        revision: commit of the hub snapshot, empty for a local folder.
        config: content of config.json.
        architecture: its `model_type`.
        default_layers: hidden states that config.json names in `out_indices`, else empty.
        mean, std: of the three channels, in units of the rescaled image.
        rescale: factor applied to pixel values before.
    """

    path: Path
    model_id: str
    revision: str
    config: dict[str, Any]
    architecture: str
    default_layers: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float

    @property
    def config_sha256(self) -> str:
        """Return the digest of config.json and preprocessor_config.json together."""
        names = ("config.json", PREPROCESSOR)
        return sha256_bytes(canonical_json({n: sha256_file(self.path / n) for n in names}).encode())

    @property
    def weights_sha256(self) -> str:
        """Return the digest of the weights: of the file, or of the shards' digests.

        Raises:
            BackboneError: no safetensors weights, or a shard is missing.
        """
        if (self.path / _WEIGHTS).is_file():
            return sha256_file(self.path / _WEIGHTS)
        if not (self.path / _SHARDS).is_file():
            raise BackboneError(
                f"backbone '{self.model_id}': expected weights in {_WEIGHTS} (safetensors only), "
                f"found {_listing(self.path)}"
            )
        mapping = read_json(self.path / _SHARDS, self.model_id).get("weight_map")
        names = set(mapping.values()) if isinstance(mapping, dict) else set()
        if not names or not all(isinstance(n, str) and _PLAIN_FILE.fullmatch(n) for n in names):
            raise BackboneError(
                f"backbone '{self.model_id}': {_SHARDS}: expected 'weight_map' with names of "
                "safetensors files beside it"
            )
        missing = sorted(n for n in names if not (self.path / n).is_file())
        if missing:
            raise BackboneError(f"backbone '{self.model_id}': missing weights {missing[0]}")
        return sha256_bytes(canonical_json({n: sha256_file(self.path / n) for n in names}).encode())

    def check_loading(self, info: dict[str, Any]) -> None:
        """Refuse a network of which some weights were not in the file, or the other way round.

        Transformers fills missing weights at random and says so in a warning at most.

        Args:
            info: as `from_pretrained(..., output_loading_info=True)` returns it.

        Raises:
            BackboneError: missing, mismatched or unexpected weights outside poolers and heads.
        """
        for kind in ("missing", "mismatched", "unexpected"):
            keys = [k if isinstance(k, str) else str(k[0]) for k in info[f"{kind}_keys"]]
            odd = sorted(k for k in keys if kind == "mismatched" or not _APART.search(k))
            if odd:
                shown = ", ".join(odd[:3]) + (", ..." if len(odd) > 3 else "")
                raise BackboneError(
                    f"backbone '{self.model_id}': expected exactly the weights of a "
                    f"{self.architecture} as in config.json, found {len(odd)} {kind}: {shown}"
                )
        if info.get("error_msgs"):
            raise BackboneError(f"backbone '{self.model_id}': {info['error_msgs'][0]}")


def open_backbone(name: str) -> BackboneFolder:
    """Find a backbone and check what its folder says of itself.

    Args:
        name: a shipped name, a local folder, or a hub id that was downloaded before.

    Raises:
        BackboneError: not there, incomplete, or of a family that is not supported.
    """
    path, model_id, revision = locate(name)
    config = read_json(path / "config.json", model_id)
    architecture = config.get("model_type")
    supported = TOKEN_FAMILIES | GRID_FAMILIES
    if architecture not in supported:
        raise BackboneError(
            f"backbone '{model_id}': architecture {architecture!r} is not supported; "
            f"expected one of: {', '.join(sorted(supported))}"
        )
    for odd in ("transformers_weights", "quantization_config"):
        if config.get(odd) is not None:
            raise BackboneError(f"backbone '{model_id}': config.json: '{odd}' is not supported")
    if (path / "adapter_config.json").exists():
        raise BackboneError(f"backbone '{model_id}': adapters are not supported, merge them first")
    # Configurations written by transformers itself carry null for "not chosen".
    layers = config.get("out_indices") or []
    if not isinstance(layers, list) or any(type(i) is not int for i in layers):
        raise BackboneError(
            f"backbone '{model_id}': config.json: out_indices: expected integers, found {layers!r}"
        )
    mean, std, rescale = normalisation(read_json(path / PREPROCESSOR, model_id), model_id)
    return BackboneFolder(
        path, model_id, revision, config, architecture, tuple(layers), mean, std, rescale
    )


def shipped_backbones() -> list[str]:
    """Return the names of the backbones that come with the package."""
    return sorted(p.parent.name for p in SHIPPED.glob("*/config.json"))


def locate(name: str) -> tuple[Path, str, str]:
    """Return folder, name for people and hub revision of a shipped name, folder or hub id.

    Raises:
        BackboneError: nothing of the name on this machine.
    """
    if name in shipped_backbones():
        return SHIPPED / name, name, ""
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path, path.resolve().name or str(path), ""
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        if not name or "/" in name or name.startswith("~") or path.exists():
            raise BackboneError(f"backbone '{name}': expected a folder, found none there")
        unknown = UnknownNameError("backbone", name, shipped_backbones())
        raise BackboneError(f"{unknown}, a local folder, or a hub id 'owner/name'")
    return _locate_in_hub_cache(name)


def _locate_in_hub_cache(name: str) -> tuple[Path, str, str]:
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except ValueError as error:
        raise BackboneError(f"backbone '{name}': {error}") from error
    if not isinstance(cached, str):
        raise BackboneError(
            f"backbone '{name}': neither a local folder nor in the local hub cache; nothing is "
            f"downloaded while running: run 'hf download {name}' beforehand"
        )
    snapshot = Path(cached).parent
    return snapshot, name, snapshot.name


def read_json(path: Path, model_id: str) -> dict[str, Any]:
    """Return the object in a JSON file of a model's folder.

    Raises:
        BackboneError: it cannot be read, or is no object.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise BackboneError(
            f"backbone '{model_id}': {path.name}: {error.strerror}; found {_listing(path.parent)}"
        ) from error
    except ValueError as error:
        raise BackboneError(f"backbone '{model_id}': {path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BackboneError(f"backbone '{model_id}': {path.name}: expected a JSON object")
    return content


def normalisation(
    preprocessor: dict[str, Any], model_id: str
) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Return mean, deviation and rescaling factor of a preprocessor's configuration.

    Raises:
        BackboneError: numbers that are none, or out of range.
    """
    rescale = preprocessor.get("rescale_factor", 1 / 255)
    rescale = rescale if preprocessor.get("do_rescale", True) else 1.0
    mean: Any = preprocessor.get("image_mean")
    std: Any = preprocessor.get("image_std")
    if not preprocessor.get("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    for key, value, low in (("image_mean", mean, -1e9), ("image_std", std, 1e-9)):
        _check_numbers(value, low, f"backbone '{model_id}': {PREPROCESSOR}: {key}", 3)
    _check_numbers([rescale], 1e-9, f"backbone '{model_id}': {PREPROCESSOR}: rescale_factor", 1)
    return tuple(map(float, mean)), tuple(map(float, std)), float(rescale)


def _check_numbers(values: Any, low: float, what: str, count: int) -> None:
    good = isinstance(values, Sequence) and len(values) == count
    good = good and all(type(v) in (int, float) and np.isfinite(v) and v >= low for v in values)
    if not good:
        raise BackboneError(f"{what}: expected {count} finite numbers, found {values!r}")


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "no files"


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
