"""Patch embeddings of images: hidden states of frozen vision backbones.

Two adapters carry all architectures: tokens (class token, registers, then patches row by row) and
feature maps (channels, rows, cols).
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional

from semantic_anomaly.embedding.execution import OpenVinoRun, Run, choose_execution
from semantic_anomaly.embedding.identity import EmbedderIdentity
from semantic_anomaly.embedding.pretrained import (
    PretrainedFolder,
    choose_device,
    choose_dtype,
    fold_batch_norms,
    load_network,
    open_folder,
)
from semantic_anomaly.embedding.truncation import truncate
from semantic_anomaly.errors import BackboneError, ModelOutputError, SettingsError, first_line
from semantic_anomaly.settings import OPENVINO, Settings
from semantic_anomaly.stages import StageSpec
from semantic_anomaly.structures import PatchGrid, check_rgb
from semantic_anomaly.timing import PREPARE, timed

POSITION_DIM = 4
# Radians over the image: a scene changes far more with the height than from side to side.
_TURN_Y, _TURN_X = np.pi, 0.2 * np.pi
_MIN_SELF_TEST_DISTANCE = 1e-6
# Weights without effect on hidden states: poolers, heads, text towers, and parts of training.
_OPTIONAL_WEIGHTS = re.compile(
    r"(^|\.)(pooler|mask_token|classifier|cls_classifier|distillation_classifier|head|lm_head|fc"
    r"|top_conv|top_bn|decoder\w*|text_model|text_projection|visual_projection|logit_scale"
    r"|logit_bias)(\.|$)|num_batches_tracked$|position_ids$"
)
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """How the hidden states of an architecture are read.

    Attributes:
        prefix: number of tokens before the patches by configuration; None: feature maps.
        model_class: class of transformers; composite checkpoints load their vision part by it.
        options: of `forward`.
        norm: attribute of the network that normalises its last tokens, empty without.
    """

    prefix: Callable[[Any], int] | None = None
    model_class: str = "AutoModel"
    options: tuple[str, ...] = ()
    norm: str = ""


def _tokens(prefix: int, norm: str = "layernorm", **values: Any) -> Family:
    """Return a family of tokens with a number of them before the patches, registers aside."""

    def count(config: Any) -> int:
        return prefix + (getattr(config, "num_register_tokens", 0) or 0)

    return Family(count, norm=norm, **values)


_INTERPOLATE = ("interpolate_pos_encoding",)
_CLIP = _tokens(1, "", model_class="CLIPVisionModel", options=_INTERPOLATE)
_SIGLIP = _tokens(0, "post_layernorm", model_class="SiglipVisionModel", options=_INTERPOLATE)
_SIGLIP2 = _tokens(0, "post_layernorm", model_class="Siglip2VisionModel")
FAMILIES: dict[str, Family] = {
    **{"clip": _CLIP, "clip_vision_model": _CLIP},
    **{"siglip": _SIGLIP, "siglip_vision_model": _SIGLIP},
    **{"siglip2": _SIGLIP2, "siglip2_vision_model": _SIGLIP2},
    **{"dinov2": _tokens(1), "dinov2_with_registers": _tokens(1)},
    **{"dinov3_vit": _tokens(1, "norm"), "ijepa": _tokens(0, options=_INTERPOLATE)},
    # A class and a distillation token.
    "deit": _tokens(2, options=_INTERPOLATE),
    **{name: _tokens(1, options=_INTERPOLATE) for name in ("vit", "vit_mae", "vit_msn")},
    **{name: Family() for name in ("bit", "convnext", "convnextv2", "dinov3_convnext")},
    **{name: Family() for name in ("efficientnet", "focalnet", "mobilenet_v1", "mobilenet_v2")},
    **{name: Family() for name in ("poolformer", "regnet", "resnet", "swin", "swinv2")},
}


class Backbone:
    """A frozen network whose hidden states are maps of the image.

    Args:
        name: shipped name, local Hugging Face folder, or hub id already downloaded.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16.
        execution: auto, torch or openvino.

    Attributes:
        execution: torch or openvino.
        folder: configuration of the network.
        weights_sha256: digest of its weights.
        layers: number of hidden states.
        side_px: side of a square image that all grids divide evenly.
        coarsest_px: largest stride; images must not be smaller.

    Raises:
        BackboneError: it cannot be loaded, or there is no such device or execution.
    """

    def __init__(
        self, name: str, device: str = "auto", dtype: str = "auto", execution: str = "auto"
    ) -> None:
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.execution = choose_execution(execution, self.device, self.dtype)
        # OpenVINO takes a network in float32, whatever it then computes in.
        self._network_dtype = torch.float32 if self.execution == OPENVINO else self.dtype
        self.folder = open_backbone(name)
        self._family = FAMILIES[self.folder.architecture]
        # Read first: the message about missing weights is better than that of transformers.
        self.weights_sha256 = self.folder.weights_sha256
        model_class = getattr(transformers, self._family.model_class)
        model = load_network(self.folder, model_class, _OPTIONAL_WEIGHTS)
        fold_batch_norms(model)
        if self.folder.architecture == "efficientnet":
            _simplify_efficientnet(model)
        if self.folder.architecture == "swin":
            _keep_windows(model)
        self._norm = getattr(model, self._family.norm, None) or nn.Identity()
        self._model: nn.Module | None = model.to(
            device=self.device, dtype=self._network_dtype, memory_format=torch.channels_last
        )
        self._run: Run = self._maps_of_pixels
        if self.execution == OPENVINO:
            self._run = OpenVinoRun(self._run, self.dtype, self.folder.what)
        # Networks of feature maps without a patch size have stems of stride 4 at most.
        self._patch_px = int(np.max(getattr(model.config, "patch_size", None) or 4))
        self._options: dict[str, Any] = dict.fromkeys(self._family.options, True)
        if self.folder.architecture == "vit_mae":
            # No patch is masked, and patches keep their order.
            model.config.mask_ratio = 0.0
            model.embeddings.config.mask_ratio = 0.0
        # (rescale * pixel - mean) / std = scale * pixel + shift
        mean, std = np.array(self.folder.mean), np.array(self.folder.std)
        self._scale, self._shift = (
            torch.tensor(values, dtype=torch.float32, device=self.device).view(1, 3, 1, 1)
            for values in (self.folder.rescale / std, -mean / std)
        )
        # The stem has any stride, and every later stage halves the grid.
        self.side_px = self._patch_px * (4 if self._family.prefix else 64)
        states = self._states(torch.zeros(1, 3, self.side_px, self.side_px))
        self.layers = len(states)
        self.coarsest_px = self._patch_px
        if self._family.prefix is None:
            self.coarsest_px = self.side_px // min(state.shape[2] for state in states)
        is_large = self.folder.config.get("hidden_size", 0) >= 1024
        if self.folder.architecture == "dinov2" and is_large:
            _LOG.warning(
                "%s: large DINOv2 without registers gives some background patches a high norm and "
                "no local meaning; prefer the variant with registers",
                self.folder.what,
            )

    def probe(self, layers: Sequence[int | None]) -> list[tuple[int, int, int]]:
        """Return the number from the front, stride in pixels and channels of hidden states.

        Args:
            layers: negative from the end; None: the last of `out_indices`, or else the last.

        Raises:
            BackboneError: no such hidden state, or a grid that does not divide the image evenly.
        """
        default = (self.folder.default_layers or (-1,))[-1]
        numbers = []
        for layer in (default if layer is None else layer for layer in layers):
            if not -self.layers <= layer < self.layers:
                raise BackboneError(
                    f"{self.folder.what}: layer {layer}: expected a hidden state from 0 to "
                    f"{self.layers - 1}"
                )
            numbers.append(layer % self.layers)
        maps = self.maps(torch.zeros(1, 3, self.side_px, self.side_px), numbers)
        for values in maps:
            rows, cols = values.shape[1:3]
            if rows != cols or self.side_px % rows:
                raise BackboneError(
                    f"{self.folder.what}: expected grids that divide {self.side_px} x "
                    f"{self.side_px} pixels evenly, found {rows} x {cols}"
                )
        return [
            (number, self.side_px // values.shape[1], values.shape[3])
            for number, values in zip(numbers, maps, strict=True)
        ]

    def truncate(self, deepest: int) -> None:
        """Take out the layers above a hidden state; those up to it keep their values and numbers.

        Args:
            deepest: last hidden state that will be asked for, counted from the front.
        """
        noise = torch.randn(
            (1, 3, self.side_px, self.side_px), generator=torch.Generator().manual_seed(0)
        )
        removed = truncate(self.network, lambda: self._states(noise), deepest)
        _LOG.debug("%s: not computed: %s", self.folder.what, ", ".join(removed) or "nothing")

    def embed(
        self, batch: np.ndarray, input_hw: tuple[int, int], layers: Sequence[int]
    ) -> list[torch.Tensor]:
        """Return hidden states of images as (n, rows, cols, channels), by the execution chosen.

        Args:
            batch: (n, height, width, 3) uint8 RGB.
            input_hw: (height, width) in pixels to which they are resized.
            layers: hidden states, counted from the front.

        Raises:
            ModelOutputError: closed, or tokens of another number than the grid has patches.
        """
        with torch.inference_mode():
            with timed(PREPARE):
                pixels = self._resized(batch, input_hw)
            return self._run(pixels, layers)

    def prepare(self, batch: np.ndarray, input_hw: tuple[int, int]) -> torch.Tensor:
        """Return (n, 3, *input_hw) of (n, h, w, 3) uint8, resized and normalised."""
        return self._normalised(self._resized(batch, input_hw))

    @torch.no_grad()
    def maps(self, pixels: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
        """Return hidden states as (n, rows, cols, channels), by torch.

        Args:
            pixels: (n, 3, height, width), normalised.
            layers: hidden states, counted from the front.

        Raises:
            ModelOutputError: closed, or tokens of another number than the grid has patches.
        """
        states = self._states(pixels)
        if self._family.prefix is None:
            return [states[layer].permute(0, 2, 3, 1) for layer in layers]
        rows, cols = (side // self._patch_px for side in pixels.shape[2:])
        prefix = self._family.prefix(self.network.config)
        expected = prefix + rows * cols
        maps = []
        for layer in layers:
            tokens = states[layer]  # (n, prefix + rows * cols, channels)
            if tokens.shape[1] != expected:
                raise ModelOutputError(
                    f"{self.folder.what}: expected {prefix} tokens and a grid of {rows} x {cols} "
                    f"patches, found {tokens.shape[1]} tokens"
                )
            # All states pass the final norm, as in the Backbone classes of transformers.
            maps.append(self._norm(tokens[:, prefix:]).unflatten(1, (rows, cols)))
        return maps

    @property
    def network(self) -> Any:
        """Return the network; raises ModelOutputError once closed."""
        if self._model is None:
            raise ModelOutputError("the embedder was closed")
        return self._model

    @property
    def device_name(self) -> str:
        """Return the device for reports: 'cpu', or 'cuda:0 NVIDIA ...'."""
        if self.device.type != "cuda":
            return str(self.device)
        return f"{self.device} {torch.cuda.get_device_name(self.device)}"

    @property
    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(tensor.numel() for tensor in self.network.parameters())

    def close(self) -> None:
        """Free the network and the memory of the device."""
        self._model = None
        self._run = self._maps_of_pixels
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _resized(self, batch: np.ndarray, input_hw: tuple[int, int]) -> torch.Tensor:
        """Return (n, 3, *input_hw) uint8, or whole float32 numbers, of (n, h, w, 3) uint8."""
        # Channels first by strides alone: the uint8 kernel is fastest on interleaved colours.
        pixels = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2)
        if tuple(pixels.shape[2:]) != input_hw:
            # Other devices lack the uint8 kernel; rounding gives them the same pixels.
            has_uint8 = self.device.type == "cpu"
            pixels = functional.interpolate(
                pixels if has_uint8 else pixels.float(), input_hw, mode="bilinear", antialias=True
            )
            pixels = pixels if has_uint8 else pixels.round().clamp(0, 255)
        return pixels

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        normalised = torch.addcmul(self._shift, pixels.float(), self._scale)
        return normalised.to(self._network_dtype, memory_format=torch.channels_last)

    def _maps_of_pixels(self, pixels: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
        return self.maps(self._normalised(pixels), layers)

    def _states(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return all hidden states."""
        pixels = pixels.to(self.device, self._network_dtype)
        options = dict(self._options)
        rows, cols = (side // self._patch_px for side in pixels.shape[2:])
        if self.folder.architecture == "vit_mae":
            options["noise"] = torch.arange(rows * cols, device=self.device).expand(len(pixels), -1)
        if self._family is _SIGLIP2:
            pixels = _patches(pixels, self._patch_px)  # (n, rows * cols, 3 * patch_px ** 2)
            shape = torch.tensor([[rows, cols]], device=self.device)
            options["spatial_shapes"] = shape.expand(len(pixels), -1)
            options["pixel_attention_mask"] = torch.ones(
                pixels.shape[:2], dtype=torch.long, device=self.device
            )
        output = self.network(pixels, output_hidden_states=True, **options)
        # Swin and FocalNet have their grids under another name.
        states = getattr(output, "reshaped_hidden_states", None) or output.hidden_states
        return tuple(states)


@dataclass(frozen=True)
class _Forward:
    """The stages that share one forward pass: those of equal backbone and input size.

    Attributes:
        backbone: the network.
        stages: numbers of the stages.
        layers: hidden state of each, counted from the front.
        strides: stride of each in pixels.
        size: long side in pixels to which images are resized.
    """

    backbone: Backbone
    stages: tuple[int, ...]
    layers: tuple[int, ...]
    strides: tuple[int, ...]
    size: int

    @property
    def multiple(self) -> int:
        """Return the number of pixels of which both sides are multiples."""
        return math.lcm(*self.strides)

    def input_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (height, width) in pixels to which an image is resized."""
        scale = self.size / max(image_hw)
        fewest = math.ceil(self.backbone.coarsest_px / self.multiple)
        steps = (max(fewest, math.floor(side * scale / self.multiple + 0.5)) for side in image_hw)
        height, width = (step * self.multiple for step in steps)
        return height, width


class PatchEmbedder:
    """Frozen backbones whose hidden states are the patch embeddings of the stages of an image.

    Transformers as in AnomalyDINO (Damm et al. 2024). Of convolutional networks every stage uses
    one hidden state: maps of stages are added, embeddings are not concatenated as in PatchCore
    (Roth et al. 2022). Embeddings may be averaged over neighbouring patches, as in PatchCore.

    Args:
        stages: at least one; a backbone is loaded once for all of its stages.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16.
        execution: auto, torch or openvino.
        place_weight: weight of the position in the image in the distance, in [0, 1).

    Attributes:
        stages: as given.
        identities: of each stage; stored in an index and compared when it is used.

    Raises:
        BackboneError: a backbone cannot be loaded, there is no such device, execution or hidden
            state, or the self-test fails; names the stage.
        SettingsError: two stages that differ in name and weight only.
    """

    def __init__(
        self,
        stages: Sequence[StageSpec],
        *,
        device: str = "auto",
        dtype: str = "auto",
        execution: str = "auto",
        place_weight: float = 0.0,
    ) -> None:
        self.stages = tuple(stages)
        self._backbones: dict[str, Backbone] = {}
        groups: dict[tuple[str, int], list[int]] = defaultdict(list)
        for number, stage in enumerate(self.stages):
            groups[stage.backbone, stage.size].append(number)
            if stage.backbone not in self._backbones:
                try:
                    self._backbones[stage.backbone] = Backbone(
                        stage.backbone, device, dtype, execution
                    )
                except BackboneError as error:
                    raise self._error(number, error) from error
        deepest: dict[str, int] = defaultdict(int)
        self._forwards: list[_Forward] = []
        identities: dict[int, EmbedderIdentity] = {}
        for (name, size), numbers in groups.items():
            backbone = self._backbones[name]
            probed = []
            for number in numbers:
                try:
                    probed += backbone.probe([self.stages[number].layer])
                except BackboneError as error:
                    raise self._error(number, error) from error
            layers, strides, _ = zip(*probed, strict=True)
            deepest[name] = max(deepest[name], *layers)
            self._forwards.append(_Forward(backbone, tuple(numbers), layers, strides, size))
            folder = backbone.folder
            for number, (layer, stride, dim) in zip(numbers, probed, strict=True):
                identities[number] = EmbedderIdentity(
                    model_id=folder.model_id,
                    architecture=folder.architecture,
                    revision=folder.revision,
                    weights_sha256=backbone.weights_sha256,
                    config_sha256=folder.config_sha256,
                    layer=layer,
                    input_size=size,
                    average=self.stages[number].average,
                    patch_px=stride,
                    dim=dim + (POSITION_DIM if place_weight else 0),
                    dtype=str(backbone.dtype).removeprefix("torch."),
                    execution=backbone.execution,
                    place_weight=float(place_weight),
                )
        self.identities = tuple(identities[number] for number in range(len(self.stages)))
        self._check_distinct()
        # Layers are counted, and strides measured, in the whole network.
        for name, layer in deepest.items():
            self._backbones[name].truncate(layer)
        self._self_test()

    @classmethod
    def from_settings(cls, settings: Settings) -> PatchEmbedder:
        """Load the backbones of the settings; unset ones have the defaults of a new index."""
        settings = settings.with_build_defaults()
        if settings.threads:
            # Of the whole process; OpenVINO takes the same number.
            torch.set_num_threads(settings.threads)
        names = "device", "dtype", "execution", "place_weight"
        return cls(settings.stage_specs, **{name: getattr(settings, name) for name in names})

    @property
    def device(self) -> str:
        """Return the device of the networks, for reports: 'cpu', or 'cuda:0 NVIDIA ...'."""
        return self._forwards[0].backbone.device_name

    def embed(self, images: Sequence[np.ndarray]) -> list[PatchGrid]:
        """Return the patch grids of each image, in order; images of one size form a batch.

        Args:
            images: (height, width, 3) uint8 RGB, of any sizes.

        Raises:
            ImageError: wrong shape or dtype.
            ModelOutputError: a network failed, ran out of memory, or its output is not finite.
        """
        numbers_of_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, image in enumerate(images):
            check_rgb(image, "image")
            numbers_of_size[image.shape].append(number)
        grids: dict[int, PatchGrid] = {}
        for (height, width, _), numbers in numbers_of_size.items():
            with timed(PREPARE):
                batch = np.stack([images[number] for number in numbers])
            features = self._features(batch)  # by stage: (n, rows, cols, dim)
            for row, number in enumerate(numbers):
                first, *further = (
                    PatchGrid(with_positions(values[row], identity.place_weight), (height, width))
                    for values, identity in zip(features, self.identities, strict=True)
                )
                grids[number] = replace(first, further=tuple(further)) if further else first
        return [grids[number] for number in range(len(images))]

    def grids_hw(self, image_hw: tuple[int, int]) -> list[tuple[int, int]]:
        """Return (rows, cols) of the patch grid of each stage, of an image of (height, width)."""
        grids_hw = {}
        for forward in self._forwards:
            height, width = forward.input_hw(image_hw)
            for number, stride in zip(forward.stages, forward.strides, strict=True):
                grids_hw[number] = height // stride, width // stride
        return [grids_hw[number] for number in range(len(self.stages))]

    def input_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (height, width) in pixels to which an image is resized for the first stage."""
        return self._forwards[0].input_hw(image_hw)

    def close(self) -> None:
        """Free the networks and the memory of the device; the embedder cannot be used any more."""
        for backbone in self._backbones.values():
            backbone.close()

    def _features(self, batch: np.ndarray) -> list[np.ndarray]:
        """Return (n, rows, cols, dim) float32 unit vectors by stage of (n, h, w, 3) uint8."""
        features = {}
        for forward in self._forwards:
            for number, values in zip(forward.stages, self._run(forward, batch), strict=True):
                features[number] = values
        return [features[number] for number in range(len(self.stages))]

    def _run(
        self, forward: _Forward, batch: np.ndarray, is_retry: bool = False
    ) -> list[np.ndarray]:
        try:
            return self._run_once(forward, batch)
        except RuntimeError as error:
            if is_retry or not isinstance(error, torch.cuda.OutOfMemoryError):
                raise ModelOutputError(f"backbone failed: {first_line(error)}") from error
        # Outside of the handler, where the traceback would keep the tensors alive.
        _LOG.warning("device out of memory: cache freed, trying once more")
        torch.cuda.empty_cache()
        return self._run(forward, batch, is_retry=True)

    @torch.inference_mode()
    def _run_once(self, forward: _Forward, batch: np.ndarray) -> list[np.ndarray]:
        height, width = forward.input_hw((batch.shape[1], batch.shape[2]))
        maps = forward.backbone.embed(batch, (height, width), forward.layers)
        expected = [(height // stride, width // stride) for stride in forward.strides]
        grids_hw = [tuple(values.shape[1:3]) for values in maps]
        if grids_hw != expected:
            raise ModelOutputError(f"patch grids: expected {expected}, found {grids_hw}")
        averages = (self.stages[number].average for number in forward.stages)
        return [
            averaged(_unit(values), average).contiguous().cpu().numpy()
            for values, average in zip(maps, averages, strict=True)
        ]

    def _error(self, number: int, error: Exception) -> BackboneError:
        """Return an error that names the stage, if there are several."""
        if len(self.stages) == 1:
            return BackboneError(str(error))
        return BackboneError(f"stage {number} ({self.stages[number]}): {error}")

    def _check_distinct(self) -> None:
        """Refuse equal stages under two names, such as a default and its number."""
        for number, (spec, identity) in enumerate(zip(self.stages, self.identities, strict=True)):
            for earlier in range(number):
                is_same = identity.difference(self.identities[earlier]) is None
                if is_same and spec.kind == self.stages[earlier].kind:
                    raise SettingsError(
                        f"stage {number} ({spec}): expected one that differs in more than name and "
                        f"weight from stage {earlier} ({self.stages[earlier]})"
                    )

    def _self_test(self) -> None:
        """Check that embeddings depend on the image and on the position in it."""
        for forward in self._forwards:
            what = forward.backbone.folder.what
            height, width = 2 * forward.multiple, 3 * forward.multiple
            noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
            rising = np.linspace(0, 255, height).astype(np.uint8)[:, None, None]
            batch = np.stack([noise, np.broadcast_to(rising, noise.shape)])
            failed = forward.stages[0]
            try:
                for number, values in zip(forward.stages, self._run(forward, batch), strict=True):
                    failed = number
                    first, second = (PatchGrid(grid, (height, width)).features for grid in values)
                    between = 1.0 - np.einsum("rcd,rcd->rc", first, second)
                    across = 1.0 - first @ first[0, 0]  # (rows, cols)
                    if min(between.max(), across.max()) < _MIN_SELF_TEST_DISTANCE:
                        raise ModelOutputError(
                            "expected embeddings that depend on image and position, found "
                            f"distances up to {between.max():.2g} between two images and "
                            f"{across.max():.2g} within one"
                        )
            except ModelOutputError as error:
                message = BackboneError(f"{what}: self-test: {error}")
                raise self._error(failed, message) from error


def open_backbone(name: str) -> PretrainedFolder:
    """Find the folder of a backbone and check its configuration, as `open_folder`."""
    return open_folder("backbone", name, FAMILIES)


def averaged(features: torch.Tensor, side: int) -> torch.Tensor:
    """Return unit vectors of the same shape: means over squares of neighbouring patches.

    Averaging embeddings, not distances, lets a patch be compared with its surroundings (locally
    aware patch features, Roth et al. 2022). Squares end at the border of the image.

    Args:
        features: (n, rows, cols, dim) float32, unit norm.
        side: of the square in patches, odd; 1: none.
    """
    if side == 1:
        return features
    means = functional.avg_pool2d(
        features.permute(0, 3, 1, 2), side, 1, side // 2, count_include_pad=False
    )
    return _unit(means.permute(0, 2, 3, 1))


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


def _patches(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Return (n, rows * cols, side * side * 3): the pixels of each patch, colours last."""
    squares = pixels.unfold(2, side, side).unfold(3, side, side)  # (n, 3, rows, cols, side, side)
    return squares.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def _simplify_efficientnet(model: Any) -> None:
    """Take out what has no effect on hidden states: the top, and gates that are 1 everywhere."""
    model.encoder.top_conv = model.encoder.top_bn = nn.Identity()
    model.pooler = nn.AdaptiveAvgPool2d(1)
    for block in model.encoder.blocks:
        expand = block.squeeze_excite.expand
        is_constant = not bool(expand.weight.any())
        if is_constant and bool((torch.sigmoid(expand.bias) == 1.0).all()):
            block.squeeze_excite = nn.Identity()


def _keep_windows(model: nn.Module) -> None:
    """Keep the windows of Swin as trained; it would shrink them for good on a small image.

    Grids are padded to whole windows, as in `SwinBackbone`.
    """
    for layer in model.modules():
        if hasattr(layer, "set_shift_and_window_size"):
            layer.set_shift_and_window_size = lambda grid_hw: None
