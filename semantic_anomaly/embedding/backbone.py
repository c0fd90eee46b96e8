"""Embeddings that know where in the image they are, so that a familiar thing may be misplaced.

Weighted concatenation with a unit vector of the place keeps one inner product, and so one graph:
the cosine distance of two such embeddings is the weighted sum of the embeddings' own and
(2 - cos(pi * dy) - cos(0.2 * pi * dx)) / 2 for displacements dy and dx in shares of the image.

Images to patch embeddings, by a frozen backbone.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from semantic_anomaly.embedding.identity import EmbedderIdentity
from semantic_anomaly.embedding.pretrained import (
    TOKEN_FAMILIES,
    BackboneFolder,
    choose_device,
    choose_precision,
    first_line,
    fold_normalisations,
    load_network,
    open_backbone,
)
from semantic_anomaly.errors import BackboneError, ImageError, ModelOutputError
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import PatchGrid

PLACE_DIM = 4
# The scene changes with the height in the image far more than from side to side.
_TURN_Y, _TURN_X = np.pi, 0.2 * np.pi


def with_places(features: np.ndarray, weight: float) -> np.ndarray:
    """Return (rows, cols, dim + 4) float32 of unit norm; the features themselves for weight 0.

    Args:
        features: (rows, cols, dim) float32, unit norm.
        weight: of the place in the cosine distance, in [0, 1).
    """
    if not weight:
        return features
    places = _places((features.shape[0], features.shape[1])) * np.float32(np.sqrt(weight))
    return np.concatenate([features * np.float32(np.sqrt(1.0 - weight)), places], axis=-1)


@lru_cache(maxsize=8)
def _places(grid_hw: tuple[int, int]) -> np.ndarray:
    y, x = ((np.arange(n) + 0.5) / n for n in grid_hw)
    angles = np.stack(np.broadcast_arrays(_TURN_Y * y[:, None], _TURN_X * x[None]), axis=-1)
    places = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1) / np.sqrt(2.0)
    places = places.astype(np.float32)
    places.flags.writeable = False
    return places


_LOG = logging.getLogger(__name__)
# The other families interpolate their position embeddings, if any, unasked.
_ASKED = ("deit", "ijepa", "vit", "vit_msn")
_LEAST_CHANGE = 1e-6
_ARTEFACTS = (
    "backbone '%s': large DINOv2 without registers gives some background patches of high norm "
    "that stand for nothing at their place; prefer the variant with registers"
)


class PatchEmbedder:
    """A frozen backbone whose hidden states are the patch embeddings of an image.

    Patches as in AnomalyDINO (Damm et al. 2024); of convolutional backbones the hidden states of
    several depths, each of unit norm, on the finest grid, as in PatchCore (Roth et al. 2022).

    Args:
        backbone: a shipped name, a local Hugging Face folder, or a hub id already downloaded.
        layers: hidden states to use, negative from the end; empty: `out_indices` of config.json,
            else the last hidden state.
        input_size: long side in pixels to which images are resized, >= 1.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16.

    Attributes:
        identity: what an index stores to be compared.

    Raises:
        BackboneError: the backbone cannot be had whole, the device is absent, a layer is not
            there, or the self-test fails.
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
        self._precision = choose_precision(dtype, self._device)
        folder = open_backbone(backbone)
        weights_sha256 = folder.weights_sha256
        model = load_network(folder)
        fold_normalisations(model)
        norm = getattr(model, "layernorm", None) or getattr(model, "norm", None)
        self._norm = norm or nn.Identity()
        self._model: nn.Module | None = model.to(
            device=self._device, dtype=self._precision, memory_format=torch.channels_last
        )
        self._tokens = folder.architecture in TOKEN_FAMILIES
        # Convolutional families without the word have stems of stride 4 at most.
        patch = getattr(model.config, "patch_size", 4)
        self._patch_px = patch if isinstance(patch, int) else int(max(patch))
        self._extra = {"interpolate_pos_encoding": True} if folder.architecture in _ASKED else {}
        mean, std = np.array(folder.mean), np.array(folder.std)
        self._scale, self._shift = (
            torch.tensor(v, dtype=torch.float32, device=self._device).view(1, 3, 1, 1)
            for v in (folder.rescale / std, -mean / std)
        )
        self._layers, self._strides, dim = self._probe(
            tuple(layers) or folder.default_layers, folder
        )
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
            dim=dim + (PLACE_DIM if place_weight else 0),
            place_weight=float(place_weight),
            dtype=str(self._precision).removeprefix("torch."),
        )
        self._self_test()
        if folder.architecture == "dinov2" and folder.config.get("hidden_size", 0) >= 1024:
            _LOG.warning(_ARTEFACTS, folder.model_id)

    @classmethod
    def from_settings(cls, settings: Settings) -> PatchEmbedder:
        """Make the embedder that settings describe; raises as the class does."""
        names = "layers", "input_size", "device", "dtype", "place_weight"
        return cls(settings.backbone, **{name: getattr(settings, name) for name in names})

    def embed(self, images: Sequence[np.ndarray]) -> list[PatchGrid]:
        """Return one grid an image, in order; images of one size run as one batch.

        Args:
            images: (height, width, 3) uint8 RGB, of any sizes.

        Raises:
            ImageError: another shape or dtype.
            ModelOutputError: the network failed, ran out of memory, or its output is not finite.
        """
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for position, image in enumerate(images):
            shape, dtype = image.shape, image.dtype
            if len(shape) != 3 or shape[2] != 3 or 0 in shape or dtype != np.uint8:
                raise ImageError(f"image: expected (height, width, 3) uint8, found {shape} {dtype}")
            groups[image.shape].append(position)
        grids: list[PatchGrid | None] = [None] * len(images)
        for shape, positions in groups.items():
            batch = np.stack([images[p] for p in positions])
            features, globals_ = self._run(batch)
            for position, patches, whole in zip(positions, features, globals_, strict=True):
                patches = with_places(patches, self.identity.place_weight)
                grids[position] = PatchGrid(patches, whole, (shape[0], shape[1]))
        return [grid for grid in grids if grid is not None]

    @property
    def device(self) -> str:
        """Return where the network runs, for reports: 'cpu', or 'cuda:0 NVIDIA ...'."""
        if self._device.type != "cuda":
            return str(self._device)
        return f"{self._device} {torch.cuda.get_device_name(self._device)}"

    def input_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (height, width) in pixels to which an image is resized, never cropped."""
        scale = self.identity.input_size / max(image_hw)
        steps = (max(1, math.floor(side * scale / self._multiple + 0.5)) for side in image_hw)
        height, width = (step * self._multiple for step in steps)
        return height, width

    def grid_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (rows, cols) of the grid of an image of this size."""
        height, width = self.input_hw(image_hw)
        return height // min(self._strides), width // min(self._strides)

    def warm_up(self, image_hw: tuple[int, int]) -> None:
        """Run once at an image size, so that the first frame is not the slow one."""
        self.embed(_test_images(image_hw)[:1])

    def close(self) -> None:
        """Free the network and the device's memory; the embedder cannot be used afterwards."""
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _run(self, batch: np.ndarray, again: bool = False) -> tuple[np.ndarray, np.ndarray]:
        try:
            return self._run_once(batch)
        except RuntimeError as error:
            if again or not isinstance(error, torch.cuda.OutOfMemoryError):
                raise ModelOutputError(f"backbone failed: {first_line(error)}") from error
        # Outside the handler, for its traceback holds on to the tensors.
        _LOG.warning("device out of memory: cache freed, trying once more")
        torch.cuda.empty_cache()
        return self._run(batch, again=True)

    @torch.inference_mode()
    def _run_once(self, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        image_hw = (batch.shape[1], batch.shape[2])
        height, width = self.input_hw(image_hw)
        maps, whole = self._maps(self._prepare(batch, (height, width)))
        expected = [(height // s, width // s) for s in self._strides]
        found = [tuple(m.shape[1:3]) for m in maps]
        if found != expected:
            raise ModelOutputError(f"patch grids: expected {expected}, found {found}")
        features = _concatenate(maps, max(expected))
        whole = _unit(features.mean((1, 2)) if whole is None else whole)
        return features.contiguous().cpu().numpy(), whole.cpu().numpy()

    def _prepare(self, batch: np.ndarray, input_hw: tuple[int, int]) -> torch.Tensor:
        # Channels first by strides alone: the uint8 kernel is fastest on interleaved colours.
        pixels = torch.from_numpy(batch).to(self._device).permute(0, 3, 1, 2)
        if tuple(pixels.shape[2:]) != input_hw:
            # Other devices lack the uint8 kernel; rounding keeps their pixels alike.
            native = self._device.type == "cpu"
            pixels = functional.interpolate(
                pixels if native else pixels.float(), input_hw, mode="bilinear", antialias=True
            )
            pixels = pixels if native else pixels.round().clamp(0, 255)
        normalised = torch.addcmul(self._shift, pixels.float(), self._scale)
        return normalised.to(self._precision, memory_format=torch.channels_last)

    def _maps(self, pixels: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        # Maps are (n, rows, cols, channels); the second is the class token where there is one.
        states, last = self._states(pixels, bool(self._layers))
        chosen = [states[i] for i in self._layers] if self._layers else [last]
        if not self._tokens:
            return [c.permute(0, 2, 3, 1) for c in chosen], None
        # Intermediate states pass the final norm, as in the Backbone classes of transformers.
        chosen = [last if i == len(states) - 1 else self._norm(states[i]) for i in self._layers]
        patch = self._patch_px
        rows, cols = pixels.shape[2] // patch, pixels.shape[3] // patch
        first = chosen[0].shape[1] - rows * cols
        grids = [c[:, first:].unflatten(1, (rows, cols)) for c in chosen]
        return grids, torch.cat([c[:, 0] for c in chosen], 1) if first else None

    def _states(
        self, pixels: torch.Tensor, every: bool
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        if self._model is None:
            raise ModelOutputError("the embedder was closed")
        output = self._model(pixels, output_hidden_states=every, **self._extra)
        # Transformers with windows give their grids under another name.
        states = getattr(output, "reshaped_hidden_states", None) or output.hidden_states
        return states or (), output.last_hidden_state

    @torch.inference_mode()
    def _probe(
        self, wanted: tuple[int, ...], folder: BackboneFolder
    ) -> tuple[tuple[int, ...], list[int], int]:
        """Return the layers counted from the front, their strides in pixels, and the dimension."""
        # A stem may take patches of any size, and every later stage halves the grid.
        side = self._patch_px * (4 if self._tokens else 64)
        pixels = torch.zeros((1, 3, side, side), device=self._device, dtype=self._precision)
        states, last = self._states(pixels, True)
        count = len(states)
        for layer in wanted:
            if not -count <= layer < count:
                raise BackboneError(
                    f"backbone '{folder.model_id}': layer {layer}: expected one of its hidden "
                    f"states 0 to {count - 1}"
                )
        if not wanted and (self._tokens or last.ndim != 4):
            wanted = (count - 1,)
        self._layers = tuple(layer % count for layer in wanted)
        maps, _ = self._maps(pixels)
        if any(m.shape[1] != m.shape[2] or side % m.shape[1] for m in maps):
            raise BackboneError(
                f"backbone '{folder.model_id}': expected grids that divide {side} x {side} pixels "
                f"evenly, found {[tuple(m.shape[1:3]) for m in maps]}"
            )
        return self._layers, [side // m.shape[1] for m in maps], sum(m.shape[3] for m in maps)

    def _self_test(self) -> None:
        what = f"backbone '{self.identity.model_id}': self-test"
        try:
            one, other = self.embed(_test_images((2 * self._multiple, 3 * self._multiple)))
        except ModelOutputError as error:
            raise BackboneError(f"{what}: {error}") from error
        # A network that does not look at the image gives finite, well-shaped rubbish.
        between = 1.0 - np.einsum("rcd,rcd->rc", one.features, other.features)
        across = 1.0 - one.features @ one.features[0, 0]
        if min(between.max(), across.max()) < _LEAST_CHANGE:
            raise BackboneError(
                f"{what}: expected features that depend on image and place, found distances up to "
                f"{between.max():.2g} between two images and {across.max():.2g} across one"
            )


def _test_images(image_hw: tuple[int, int]) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (*image_hw, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, image_hw[1]).astype(np.uint8)
    return [noise, np.broadcast_to(ramp[None, :, None], noise.shape)]


def _unit(features: torch.Tensor) -> torch.Tensor:
    return functional.normalize(features.float(), dim=-1)


def _concatenate(maps: list[torch.Tensor], grid_hw: tuple[int, int]) -> torch.Tensor:
    """Return (n, rows, cols, dim) float32 of unit norm on the finest grid."""
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
