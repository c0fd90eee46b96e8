"""Load pretrained networks from Hugging Face folders: complete, checked, and never downloaded."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn

from semantic_anomaly.errors import BackboneError, UnknownNameError, first_line
from semantic_anomaly.storage import (
    canonical_json,
    parse_json,
    read_file,
    sha256_bytes,
    sha256_file,
)

SHIPPED = Path(__file__).parents[1] / "backbones"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
_WEIGHTS = "model.safetensors"
_SHARDS = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SAFETENSORS = re.compile(r"[\w.-]+\.safetensors")
# Keys of config.json that would load other weights than those of the folder.
_UNSUPPORTED_KEYS = ("transformers_weights", "quantization_config", "use_pretrained_backbone")
# Keys of config.json with numbers of layers.
_LAYER_COUNTS = re.compile(r"num_\w*layers|depths|repeats")
# Names of a convolution and of the batch norm after it in ResNet, RegNet, MobileNet, EfficientNet.
_CONVOLUTION_AND_NORM = (
    ("convolution", "normalization"),
    ("convolution", "batchnorm"),
    ("expand_conv", "expand_bn"),
    ("depthwise_conv", "depthwise_norm"),
    ("project_conv", "project_bn"),
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class PretrainedFolder:
    """A Hugging Face folder whose configuration was checked.

    Attributes:
        what: role of the network and its `model_id`, for messages.
        path: the folder.
        model_id: shipped name, folder name or hub id.
        revision: commit of the hub snapshot, empty for a local folder.
        config: content of config.json.
        preprocessor: content of preprocessor_config.json.
        architecture: `model_type` of config.json.
        default_layers: `out_indices` of config.json, hidden states; empty without.
        mean, std: of the three channels, in units of the rescaled image.
        rescale: factor applied to the pixel values first.
    """

    what: str
    path: Path
    model_id: str
    revision: str
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    architecture: str
    default_layers: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float

    @property
    def config_sha256(self) -> str:
        """Return the digest of config.json and preprocessor_config.json together."""
        return _sha256_of_files(self.path, (CONFIG, PREPROCESSOR))

    @property
    def weights_sha256(self) -> str:
        """Return the digest of the weights file, or of the digests of its shards.

        Raises:
            BackboneError: no safetensors weights, or a shard is missing or cannot be read.
        """
        names = self.weight_files
        try:
            if names == [_WEIGHTS]:
                return sha256_file(self.path / _WEIGHTS)
            return _sha256_of_files(self.path, names)
        except OSError as error:
            raise BackboneError(f"{self.what}: weights: {error.strerror}") from error

    @property
    def weight_files(self) -> list[str]:
        """Return the names of the weights file or of its shards.

        Raises:
            BackboneError: no safetensors weights, or a shard is missing.
        """
        if (self.path / _WEIGHTS).is_file():
            return [_WEIGHTS]
        if not (self.path / _SHARDS).is_file():
            raise BackboneError(
                f"{self.what}: expected weights in {_WEIGHTS} (safetensors only), "
                f"found {_listing(self.path)}"
            )
        weight_map = _read_json(self.path / _SHARDS, self.what).get("weight_map")
        names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
        if not names or not all(isinstance(n, str) and _SAFETENSORS.fullmatch(n) for n in names):
            raise BackboneError(
                f"{self.what}: {_SHARDS}: expected a 'weight_map' to safetensors files of the "
                "same folder"
            )
        for name in sorted(names):
            if not (self.path / name).is_file():
                raise BackboneError(f"{self.what}: missing weights {name}")
        return sorted(names)


def shipped_backbones() -> list[str]:
    """Return the names of the backbones that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))


def open_folder(role: str, name: str, architectures: Collection[str]) -> PretrainedFolder:
    """Find the folder of a network and check its configuration; the weights are not read.

    Args:
        role: `backbone` or `segmenter`, for messages.
        name: shipped name, local folder, or hub id that was downloaded before.
        architectures: supported values of `model_type`.

    Raises:
        BackboneError: not found, incomplete, invalid, or of another architecture.
    """
    path, model_id, revision = _locate(role, name)
    what = f"{role} '{model_id}'"
    config = _read_json(path / CONFIG, what)
    architecture: Any = config.get("model_type")
    if not isinstance(architecture, str) or architecture not in architectures:
        raise BackboneError(
            f"{what}: architecture {architecture!r} is not supported here; expected one of: "
            f"{', '.join(sorted(architectures))}"
        )
    for key in _UNSUPPORTED_KEYS:
        if config.get(key) not in (None, False):
            raise BackboneError(f"{what}: {CONFIG}: '{key}' is not supported")
    if (path / "adapter_config.json").exists():
        raise BackboneError(f"{what}: adapters are not supported, merge them first")
    # transformers writes null for the default.
    layers = config.get("out_indices") or []
    if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
        raise BackboneError(f"{what}: {CONFIG}: out_indices: expected integers, found {layers!r}")
    preprocessor = _read_json(path / PREPROCESSOR, what)
    mean, std, rescale = _pixel_normalisation(preprocessor, what)
    return PretrainedFolder(
        what=what,
        path=path,
        model_id=model_id,
        revision=revision,
        config=config,
        preprocessor=preprocessor,
        architecture=architecture,
        default_layers=tuple(layers),
        mean=mean,
        std=std,
        rescale=rescale,
    )


def load_network(
    folder: PretrainedFolder, model_class: Any, optional: re.Pattern[str] | None = None
) -> nn.Module:
    """Return the network of a folder in float32, frozen and in evaluation mode.

    transformers fills missing weights at random with a warning at most. Here it is an error if
    weights are missing, unexpected, or of another shape.

    Args:
        folder: from `open_folder`.
        model_class: class of transformers with `from_pretrained`.
        optional: names of weights that may be missing or unexpected; None: none.

    Raises:
        BackboneError: damaged, incomplete, of another configuration, or weights not finite.
    """
    _refuse_more_layers(folder)
    try:
        with quiet_transformers():
            model, info = model_class.from_pretrained(
                folder.path,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
    # Damaged folders raise nearly anything: OSError, SafetensorError, KeyError, TypeError.
    except Exception as error:
        raise BackboneError(f"{folder.what}: {first_line(error)}") from error
    for problem in ("missing", "mismatched", "unexpected"):
        keys = (k if isinstance(k, str) else str(k[0]) for k in info[f"{problem}_keys"])
        is_optional = optional.search if optional and problem != "mismatched" else lambda _: False
        wrong = sorted(key for key in keys if not is_optional(key))
        if wrong:
            shown = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
            raise BackboneError(
                f"{folder.what}: expected exactly the weights of a {folder.architecture} as in "
                f"{CONFIG}, found {len(wrong)} {problem}: {shown}"
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BackboneError(f"{folder.what}: weights of '{name}' are not finite")
    network: nn.Module = model.eval().requires_grad_(False)
    return network


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and log messages of transformers inside the block."""
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


def fold_batch_norms(model: nn.Module) -> None:
    """Fold each batch norm into the convolution before it, in place."""
    for layer in model.modules():
        for names in _CONVOLUTION_AND_NORM:
            convolution, norm = (getattr(layer, name, None) for name in names)
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(layer, names[0], nn.utils.fuse_conv_bn_eval(convolution, norm))
                setattr(layer, names[1], nn.Identity())


def choose_device(name: str) -> torch.device:
    """Return the device of a name: auto, cpu, cuda or cuda:N.

    Raises:
        BackboneError: an unknown name, or no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d{0,8}))?", name):
        raise BackboneError(f"device '{name}': expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if name != "cpu" and int(name.partition(":")[2] or 0) >= count:
        raise BackboneError(f"device '{name}': expected a CUDA device, found {count}")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the precision of a name: auto, float32, bfloat16 or float16.

    Raises:
        BackboneError: an unknown name.
    """
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if name not in _DTYPES:
        raise BackboneError(f"dtype '{name}': expected auto or one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _refuse_more_layers(folder: PretrainedFolder) -> None:
    """Raise BackboneError for more layers than weights: to create them would take for ever."""
    try:
        count = 0
        for name in folder.weight_files:
            with safe_open(folder.path / name, framework="pt") as weights:
                count += len(list(weights.keys()))
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"{folder.what}: {first_line(error)}") from error
    pending: list[Any] = [folder.config]
    while pending:
        values = pending.pop()
        pending += [value for value in values.values() if isinstance(value, dict)]
        for key, value in values.items():
            repeats = value if isinstance(value, list) else [value]
            numbers = [number for number in repeats if type(number) is int]
            if _LAYER_COUNTS.search(key) and sum(numbers) > count:
                raise BackboneError(
                    f"{folder.what}: {CONFIG}: {key}: expected at most {count}, the number of "
                    f"weights, found {short(value)}"
                )


def _locate(role: str, name: str) -> tuple[Path, str, str]:
    """Return folder, model id and hub revision of a shipped name, folder or hub id."""
    if name in shipped_backbones():
        return SHIPPED / name, name, ""
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path, path.resolve().name or str(path), ""
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        if not name or "/" in name or name.startswith("~") or path.exists():
            raise BackboneError(f"{role} '{name}': expected a folder, found none")
        unknown = UnknownNameError(role, name, shipped_backbones())
        raise BackboneError(f"{unknown}, a local folder, or a hub id 'owner/name'")
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, CONFIG)
    except ValueError as error:
        raise BackboneError(f"{role} '{name}': {error}") from error
    if not isinstance(cached, str):
        raise BackboneError(
            f"{role} '{name}': found neither a local folder nor an entry of the hub cache; "
            f"nothing is downloaded at run time: run 'hf download {name}' first"
        )
    snapshot = Path(cached).parent
    return snapshot, name, snapshot.name


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        content = parse_json(read_file(path))
    except OSError as error:
        raise BackboneError(
            f"{what}: {path.name}: {error.strerror}; found {_listing(path.parent)}"
        ) from error
    except ValueError as error:
        raise BackboneError(f"{what}: {path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BackboneError(f"{what}: {path.name}: expected a JSON object")
    return content


def _pixel_normalisation(
    preprocessor: dict[str, Any], what: str
) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Return mean, standard deviation and rescaling factor of a preprocessor's configuration."""
    mean: Any = [0.0] * 3
    std: Any = [1.0] * 3
    rescale: Any = 1.0
    if preprocessor.get("do_normalize", True):
        mean, std = preprocessor.get("image_mean"), preprocessor.get("image_std")
    if preprocessor.get("do_rescale", True):
        rescale = preprocessor.get("rescale_factor", 1 / 255)

    def numbers(key: str, values: Any, count: int, minimum: float) -> tuple[float, ...]:
        valid = isinstance(values, list) and len(values) == count
        if not valid or not all(
            type(v) in (int, float) and np.isfinite(v) and v >= minimum for v in values
        ):
            raise BackboneError(
                f"{what}: {PREPROCESSOR}: {key}: expected {count} finite numbers, found {values!r}"
            )
        return tuple(map(float, values))

    return (
        numbers("image_mean", mean, 3, -1e9),
        numbers("image_std", std, 3, 1e-9),
        numbers("rescale_factor", [rescale], 1, 1e-9)[0],
    )


def _sha256_of_files(folder: Path, names: Collection[str]) -> str:
    digests = {name: sha256_file(folder / name) for name in names}
    return sha256_bytes(canonical_json(digests).encode())


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "no files"
