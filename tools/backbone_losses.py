"""What a backbone is trained for: the features of a teacher, or places that know themselves."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import AutoModel

from semantic_anomaly.embedding.pretrained import fold_batch_norms

TEMPERATURE = 0.15
PLACES = 48
# The next places show partly the same; they are neither the same place nor another one.
NEAR_PLACES = 2.5
TEACHER_ENLARGE = 1.25


class Teacher:
    """A frozen convolutional Hugging Face backbone whose hidden states are imitated.

    Args:
        folder: config, preprocessor config and safetensors.
        layers: hidden states, each normalised, brought to one grid and concatenated.
        device: where it runs.
    """

    def __init__(self, folder: Path, layers: tuple[int, ...], device: torch.device) -> None:
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        fold_batch_norms(model.eval())
        self._model = model.to(device, memory_format=torch.channels_last)
        self._layers = layers
        processor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        self._mean = torch.tensor(processor["image_mean"], device=device).view(3, 1, 1)
        self._std = torch.tensor(processor["image_std"], device=device).view(3, 1, 1)
        self._basis: Tensor | None = None

    def project_on(self, images: Tensor, grid_hw: tuple[int, int], dim: int) -> float:
        """Reduce the features to `dim` numbers from now on; distances between them stay.

        The basis is that of the greatest second moments, not of the covariance: the mean is not
        taken away, because cosines without it magnify places without content.

        Args:
            images: (n, 3, h, w) in [0, 1].
            grid_hw: rows and columns of the grid.
            dim: numbers a place; those beyond the teacher's own are zero.

        Returns:
            The share of the energy that is kept, in [0, 1].
        """
        moments = torch.zeros(1, device=self._mean.device)
        for image in images:
            flat = self(image[None], grid_hw)[0].flatten(1).double()
            moments = moments + flat @ flat.T
        energy, vectors = torch.linalg.eigh(moments)
        basis = vectors.flip(1)[:, :dim].float()
        self._basis = functional.pad(basis, (0, dim - basis.shape[1]))
        return float(energy[-dim:].sum() / energy.sum())

    @torch.no_grad()
    def __call__(self, images: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        """Return (n, dim, *grid_hw) features, norm 1 or less, of images in [0, 1]."""
        large = functional.interpolate(images, scale_factor=TEACHER_ENLARGE, mode="bilinear")
        states = self._model((large - self._mean) / self._std, output_hidden_states=True)
        picked = [states.hidden_states[i].float() for i in self._layers]
        parts = [functional.normalize(p, dim=1) / len(picked) ** 0.5 for p in picked]
        if self._basis is None:
            return torch.cat([_resized(part, grid_hw) for part in parts], dim=1)
        # The small grids are projected before they are enlarged: the same, for less.
        bases = self._basis.T[:, :, None, None].split([part.shape[1] for part in parts], dim=1)
        pairs = zip(parts, bases, strict=True)
        return torch.stack([_resized(functional.conv2d(p, b), grid_hw) for p, b in pairs]).sum(0)


def corresponding(across: Tensor, xy: Tensor, stride: float, view_hw: tuple[int, int]) -> Tensor:
    """Return where places of the first view lie in the second, for `grid_sample`.

    Args:
        across: (n, 2, 3) pixels of the first view -> pixels of the second.
        xy: (n, p, 2) column and row of places in the first grid.
        stride: pixels a place.
        view_hw: height and width of the second view in pixels.

    Returns:
        (n, p, 2) x, y; the view spans [-1, 1].
    """
    pixels = (xy + 0.5) * stride - 0.5
    moved = torch.cat([pixels, torch.ones_like(pixels[..., :1])], -1) @ across.transpose(1, 2)
    return (moved + 0.5) * 2 / moved.new_tensor(view_hw[::-1]) - 1


def imitation_loss(features: Tensor, taught: Tensor) -> Tensor:
    """Return the mean squared distance of places to the teacher's: (n, dim, rows, cols) both.

    No linear map lies between them, so that what is learnt are the teacher's own distances, by
    which an index is searched.
    """
    return (features - taught).square().sum(1).mean()


def contrast_loss(
    first: Tensor, second: Tensor, across: Tensor, view_hw: tuple[int, int]
) -> Tensor:
    """Return InfoNCE of the same place in two views against other places (DenseCL).

    Args:
        first, second: (n, dim, rows, cols) features of the two views.
        across: (n, 2, 3) pixels of the first view -> pixels of the second.
        view_hw: height and width of a view in pixels.
    """
    cols = first.shape[3]
    order = _some_places(first)
    xy = torch.stack([order % cols, order // cols], -1).float()
    target = corresponding(across, xy, view_hw[1] / cols, view_hw)
    seen = (target.abs() <= 1).all(-1).flatten()
    sampled = functional.grid_sample(second, target[:, :, None], align_corners=False)[..., 0]
    keys = functional.normalize(sampled.transpose(1, 2).flatten(0, 1), dim=-1)
    image = torch.arange(len(order), device=first.device).repeat_interleave(order.shape[1])
    flat = xy.flatten(0, 1)
    near = torch.cdist(flat, flat) < NEAR_PLACES
    ignored = (near & (image[:, None] == image)) | ~seen
    itself = torch.eye(len(seen), dtype=torch.bool, device=first.device)
    logits = _at(first, order) @ keys.T / TEMPERATURE
    logits = logits.masked_fill(ignored & ~itself, -1e4)
    labels = torch.arange(len(seen), device=first.device)
    lost = functional.cross_entropy(logits, labels, reduction="none")
    return (lost * seen).sum() / seen.sum().clamp(min=1)


def _resized(grid: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    return functional.interpolate(grid, grid_hw, mode="bilinear")


def _some_places(features: Tensor) -> Tensor:
    # (n, p) flat places, as many in every image, drawn on the CPU for the same draw everywhere.
    n, _, rows, cols = features.shape
    places = min(PLACES, rows * cols)
    order = torch.stack([torch.randperm(rows * cols)[:places] for _ in range(n)])
    return order.to(features.device)


def _at(features: Tensor, order: Tensor) -> Tensor:
    # (n, dim, rows, cols) at (n, p) flat places -> (n * p, dim) unit vectors.
    index = order[:, None].expand(-1, features.shape[1], -1)
    picked = torch.gather(features.flatten(2), 2, index)
    return functional.normalize(picked.transpose(1, 2).flatten(0, 1), dim=-1)
