"""Patch embeddings of images by a frozen vision backbone, with their position in the image."""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional

from semantic_anomaly.embedding.identity import EmbedderIdentity
from semantic_anomaly.embedding.pretrained import (
    PretrainedFolder,
    choose_device,
    choose_dtype,
    fold_batch_norms,
    load_network,
    open_folder,
)
from semantic_anomaly.errors import BackboneError, ModelOutputError, first_line
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import PatchGrid, check_rgb

# Hidden states (n, tokens, channels): a class token, perhaps registers, then patches row by row.
TOKEN_FAMILIES = frozenset(
    {"deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "ijepa", "vit", "vit_msn"}
)
# Hidden states (n, channels, rows, cols).
GRID_FAMILIES = frozenset(
    {
        *("bit", "convnext", "convnextv2", "dinov3_convnext", "focalnet", "mobilenet_v1"),
        *("mobilenet_v2", "poolformer", "regnet", "resnet", "swin", "swinv2"),
    }
)
# Weights without effect on hidden states: poolers, heads, and parts used in training only.
_OPTIONAL_WEIGHTS = re.compile(
    r"(^|\.)(pooler|mask_token|classifier|cls_classifier|distillation_classifier|head|lm_head|fc)"
    r"(\.|$)|num_batches_tracked$|position_ids$"
)
# Position embeddings are interpolated on request; other families interpolate them always.
_INTERPOLATE_ON_REQUEST = ("deit", "ijepa", "vit", "vit_msn")
POSITION_DIM = 4
# Radians over the image: a scene changes far more with the height than from side to side.
_TURN_Y, _TURN_X = np.pi, 0.2 * np.pi
_MIN_SELF_TEST_DISTANCE = 1e-6
_LOG = logging.getLogger(__name__)


class PatchEmbedder:
    """A frozen backbone whose hidden states are the patch embeddings of an image.

    Transformers as in AnomalyDINO (Damm et al. 2024). Of convolutional networks, hidden states of
    several depths are normalised and concatenated on the finest grid, as in PatchCore (Roth et al.
    2022).

    Args:
        backbone: shipped name, local Hugging Face folder, or hub id already downloaded.
        layers: hidden states to use, negative from the end; empty: `out_indices` of config.json,
            else the last hidden state.
        input_size: long side in pixels to which images are resized, >= 1.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16.
        place_weight: weight of the position in the image in the distance, in [0, 1).

    Attributes:
        identity: stored in an index and compared when it is used.

    Raises:
        BackboneError: the backbone cannot be loaded, there is no such device or layer, or the
            self-test fails.
    """

    def __init__(
        self,
        backbone: str,
        *,
        layers: Sequence[int] = (),
        input_size: int = 960,
        device: str = "auto",
        dtype: str = "auto",
        place_weight: float = 0.0,
    ) -> None:
        self._device = choose_device(device)
        self._dtype = choose_dtype(dtype, self._device)
        folder = open_backbone(backbone)
        # Read first: the message about missing weights is better than that of transformers.
        weights_sha256 = folder.weights_sha256
        model = load_network(folder, transformers.AutoModel, _OPTIONAL_WEIGHTS)
        fold_batch_norms(model)
        norm = getattr(model, "layernorm", None) or getattr(model, "norm", None)
        self._norm = norm or nn.Identity()
        self._model: nn.Module | None = model.to(
            device=self._device, dtype=self._dtype, memory_format=torch.channels_last
        )
        self._has_tokens = folder.architecture in TOKEN_FAMILIES
        # Families without a patch size have stems of stride 4 at most.
        self._patch_px = int(np.max(getattr(model.config, "patch_size", 4)))
        on_request = folder.architecture in _INTERPOLATE_ON_REQUEST
        self._options = {"interpolate_pos_encoding": True} if on_request else {}
        # (rescale * pixel - mean) / std = scale * pixel + shift
        mean, std = np.array(folder.mean), np.array(folder.std)
        self._scale, self._shift = (
            torch.tensor(values, dtype=torch.float32, device=self._device).view(1, 3, 1, 1)
            for values in (folder.rescale / std, -mean / std)
        )
        self._layers: tuple[int, ...] = ()
        self._strides, dim = self._probe(tuple(layers) or folder.default_layers, folder)
        self._multiple = math.lcm(*self._strides)
        self.identity = EmbedderIdentity(
            model_id=folder.model_id,
            architecture=folder.architecture,
            revision=folder.revision,
            weights_sha256=weights_sha256,
            config_sha256=folder.config_sha256,
            layers=self._layers,
            input_size=int(input_size),
            patch_px=min(self._strides),
            dim=dim + (POSITION_DIM if place_weight else 0),
            place_weight=float(place_weight),
            dtype=str(self._dtype).removeprefix("torch."),
        )
        self._self_test()
        if folder.architecture == "dinov2" and folder.config.get("hidden_size", 0) >= 1024:
            _LOG.warning(
                "%s: large DINOv2 without registers gives some background patches a high norm and "
                "no local meaning; prefer the variant with registers",
                folder.what,
            )

    @classmethod
    def from_settings(cls, settings: Settings) -> PatchEmbedder:
        """Load the backbone of the settings; unset ones have the defaults of a new index."""
        settings = settings.with_build_defaults()
        names = "layers", "input_size", "device", "dtype", "place_weight"
        return cls(settings.backbone, **{name: getattr(settings, name) for name in names})

    def embed(self, images: Sequence[np.ndarray]) -> list[PatchGrid]:
        """Return the patch grid of each image, in order; images of one size form a batch.

        Args:
            images: (height, width, 3) uint8 RGB, of any sizes.

        Raises:
            ImageError: wrong shape or dtype.
            ModelOutputError: the network failed, ran out of memory, or its output is not finite.
        """
        numbers_of_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, image in enumerate(images):
            check_rgb(image, "image")
            numbers_of_size[image.shape].append(number)
        grids: dict[int, PatchGrid] = {}
        for (height, width, _), numbers in numbers_of_size.items():
            batch = np.stack([images[number] for number in numbers])
            for number, patches, whole in zip(numbers, *self._run(batch), strict=True):
                patches = with_positions(patches, self.identity.place_weight)
                grids[number] = PatchGrid(patches, whole, (height, width))
        return [grids[number] for number in range(len(images))]

    @property
    def device(self) -> str:
        """Return the device of the network, for reports: 'cpu', or 'cuda:0 NVIDIA ...'."""
        if self._device.type != "cuda":
            return str(self._device)
        return f"{self._device} {torch.cuda.get_device_name(self._device)}"

    def input_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (height, width) in pixels to which an image is resized."""
        scale = self.identity.input_size / max(image_hw)
        steps = (max(1, math.floor(side * scale / self._multiple + 0.5)) for side in image_hw)
        height, width = (step * self._multiple for step in steps)
        return height, width

    def grid_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (rows, cols) of the patch grid of an image of (height, width) pixels."""
        height, width = self.input_hw(image_hw)
        return height // min(self._strides), width // min(self._strides)

    def close(self) -> None:
        """Free the network and the memory of the device; the embedder cannot be used any more."""
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _run(self, batch: np.ndarray, is_retry: bool = False) -> tuple[np.ndarray, np.ndarray]:
        try:
            return self._run_once(batch)
        except RuntimeError as error:
            if is_retry or not isinstance(error, torch.cuda.OutOfMemoryError):
                raise ModelOutputError(f"backbone failed: {first_line(error)}") from error
        # Outside of the handler, where the traceback would keep the tensors alive.
        _LOG.warning("device out of memory: cache freed, trying once more")
        torch.cuda.empty_cache()
        return self._run(batch, is_retry=True)

    @torch.inference_mode()
    def _run_once(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (n, rows, cols, dim) and (n, dim) float32 unit vectors of (n, h, w, 3) uint8."""
        height, width = self.input_hw((batch.shape[1], batch.shape[2]))
        maps, whole = self._maps(self._prepare(batch, (height, width)))
        expected = [(height // stride, width // stride) for stride in self._strides]
        grids_hw = [tuple(part.shape[1:3]) for part in maps]
        if grids_hw != expected:
            raise ModelOutputError(f"patch grids: expected {expected}, found {grids_hw}")
        features = _concatenate(maps, max(expected))  # (n, rows, cols, dim)
        whole = _unit(features.mean((1, 2)) if whole is None else whole)  # (n, dim)
        return features.contiguous().cpu().numpy(), whole.cpu().numpy()

    def _prepare(self, batch: np.ndarray, input_hw: tuple[int, int]) -> torch.Tensor:
        """Return (n, 3, *input_hw) of (n, h, w, 3) uint8, resized and normalised."""
        # Channels first by strides alone: the uint8 kernel is fastest on interleaved colours.
        pixels = torch.from_numpy(batch).to(self._device).permute(0, 3, 1, 2)
        if tuple(pixels.shape[2:]) != input_hw:
            # Other devices lack the uint8 kernel; rounding gives them the same pixels.
            has_uint8 = self._device.type == "cpu"
            pixels = functional.interpolate(
                pixels if has_uint8 else pixels.float(), input_hw, mode="bilinear", antialias=True
            )
            pixels = pixels if has_uint8 else pixels.round().clamp(0, 255)
        normalised = torch.addcmul(self._shift, pixels.float(), self._scale)
        return normalised.to(self._dtype, memory_format=torch.channels_last)

    def _maps(self, pixels: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Return (n, rows, cols, channels) by layer, and (n, channels) class tokens if any."""
        states, last = self._states(pixels, bool(self._layers))
        if not self._has_tokens:
            layers = [states[i] for i in self._layers] if self._layers else [last]
            return [layer.permute(0, 2, 3, 1) for layer in layers], None
        # Intermediate states pass the final norm, as in the Backbone classes of transformers.
        layers = [last if i == len(states) - 1 else self._norm(states[i]) for i in self._layers]
        rows, cols = (side // self._patch_px for side in pixels.shape[2:])
        first = layers[0].shape[1] - rows * cols
        maps = [layer[:, first:].unflatten(1, (rows, cols)) for layer in layers]
        return maps, torch.cat([layer[:, 0] for layer in layers], 1) if first else None

    def _states(
        self, pixels: torch.Tensor, with_hidden: bool
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Return the hidden states, empty unless asked for, and the last output of the network."""
        if self._model is None:
            raise ModelOutputError("the embedder was closed")
        output = self._model(pixels, output_hidden_states=with_hidden, **self._options)
        # Swin and FocalNet have their grids under another name.
        states = getattr(output, "reshaped_hidden_states", None) or output.hidden_states
        return states or (), output.last_hidden_state

    @torch.inference_mode()
    def _probe(self, layers: tuple[int, ...], folder: PretrainedFolder) -> tuple[list[int], int]:
        """Set the layers, counted from the front; return their strides in pixels and dimension."""
        # The stem has any stride, and every later stage halves the grid.
        side = self._patch_px * (4 if self._has_tokens else 64)
        pixels = torch.zeros((1, 3, side, side), device=self._device, dtype=self._dtype)
        states, last = self._states(pixels, True)
        count = len(states)
        for layer in layers:
            if not -count <= layer < count:
                raise BackboneError(
                    f"{folder.what}: layer {layer}: expected a hidden state from 0 to {count - 1}"
                )
        if not layers and (self._has_tokens or last.ndim != 4):
            layers = (count - 1,)
        self._layers = tuple(layer % count for layer in layers)
        maps, _ = self._maps(pixels)
        if any(part.shape[1] != part.shape[2] or side % part.shape[1] for part in maps):
            raise BackboneError(
                f"{folder.what}: expected grids that divide {side} x {side} pixels evenly, "
                f"found {[tuple(part.shape[1:3]) for part in maps]}"
            )
        return [side // part.shape[1] for part in maps], sum(part.shape[3] for part in maps)

    def _self_test(self) -> None:
        """Check that embeddings depend on the image and on the position in it."""
        what = f"backbone '{self.identity.model_id}': self-test"
        shape = (2 * self._multiple, 3 * self._multiple, 3)
        noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        ramp = np.linspace(0, 255, shape[1]).astype(np.uint8)[:, None]
        try:
            noise_grid, ramp_grid = self.embed([noise, np.broadcast_to(ramp, shape)])
        except ModelOutputError as error:
            raise BackboneError(f"{what}: {error}") from error
        features = noise_grid.features
        between = 1.0 - np.einsum("rcd,rcd->rc", features, ramp_grid.features)  # (rows, cols)
        across = 1.0 - features @ features[0, 0]  # (rows, cols)
        if min(between.max(), across.max()) < _MIN_SELF_TEST_DISTANCE:
            raise BackboneError(
                f"{what}: expected embeddings that depend on image and position, found distances "
                f"up to {between.max():.2g} between two images and {across.max():.2g} within one"
            )


def open_backbone(name: str) -> PretrainedFolder:
    """Find the folder of a backbone and check its configuration, as `open_folder`."""
    return open_folder("backbone", name, TOKEN_FAMILIES | GRID_FAMILIES)


def with_positions(features: np.ndarray, weight: float) -> np.ndarray:
    """Append the position in the image to patch embeddings, by weighted concatenation.

    One inner product then has both: the cosine distance of two results is the sum of the distance
    of the features, weighted by 1 - weight, and of (2 - cos(pi * dy) - cos(0.2 * pi * dx)) / 2,
    weighted by `weight`, for displacements dy and dx as shares of the image.

    Args:
        features: (rows, cols, dim) float32, unit norm.
        weight: weight of the position, in [0, 1).

    Returns:
        (rows, cols, dim + 4) float32, unit norm; the features themselves for weight 0.
    """
    if not weight:
        return features
    rows, cols, _ = features.shape
    positions = _positions((rows, cols)) * np.float32(np.sqrt(weight))  # (rows, cols, 4)
    return np.concatenate([features * np.float32(np.sqrt(1.0 - weight)), positions], axis=-1)


@lru_cache(maxsize=8)
def _positions(grid_hw: tuple[int, int]) -> np.ndarray:
    """Return (rows, cols, 4) float32 unit vectors: cosines and sines of two angles, y and x."""
    y, x = ((np.arange(count) + 0.5) / count for count in grid_hw)
    angles = np.stack(np.broadcast_arrays(_TURN_Y * y[:, None], _TURN_X * x[None]), axis=-1)
    vectors = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1) / np.sqrt(2.0)
    vectors = vectors.astype(np.float32)
    vectors.flags.writeable = False
    return vectors


def _unit(features: torch.Tensor) -> torch.Tensor:
    return functional.normalize(features.float(), dim=-1)


def _concatenate(maps: list[torch.Tensor], grid_hw: tuple[int, int]) -> torch.Tensor:
    """Return (n, rows, cols, dim) float32 unit vectors of all layers on the finest grid."""
    if len(maps) == 1:
        return _unit(maps[0])
    parts = []
    for part in map(_unit, maps):
        if tuple(part.shape[1:3]) != grid_hw:
            part = functional.interpolate(
                part.permute(0, 3, 1, 2), size=grid_hw, mode="bilinear", align_corners=False
            ).permute(0, 2, 3, 1)
        parts.append(part)
    return _unit(torch.cat(parts, -1))
