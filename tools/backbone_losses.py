"""What a backbone is trained for: alike places alike, others apart, as the teacher sees them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import AutoModel

TEMPERATURE = 0.15
PLACES = 48
# The next places show partly the same; they are neither the same place nor another one.
NEAR_PLACES = 2.5
# A place that the teacher finds so alike is no negative example.
ALIKE = 0.5
TEACHER_ENLARGE = 1.25


# Nominal places that foreign ones are compared with, and how sharply the nearest counts.
QUEUE = 24576
NEAREST = 0.05
RANK_MARGIN, RANK_TEMPERATURE = 0.2, 0.1


class Teacher:
    """A frozen convolutional Hugging Face backbone whose hidden states are imitated.

    Args:
        folder: config, preprocessor config and safetensors.
        layers: hidden states, each normalised, brought to one grid and concatenated.
        device: where it runs.
    """

    def __init__(self, folder: Path, layers: tuple[int, ...], device: torch.device) -> None:
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        self._model = model.eval().to(device)
        self._layers = layers
        processor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        self._mean = torch.tensor(processor["image_mean"], device=device).view(3, 1, 1)
        self._std = torch.tensor(processor["image_std"], device=device).view(3, 1, 1)
        self._centre = torch.zeros(1, device=device)

    @property
    def dim(self) -> int:
        """Return the length of its features."""
        probe = torch.zeros(1, 3, 64, 64, device=self._mean.device)
        return int(self._features(probe, (2, 2)).shape[1])

    def centre_on(self, images: Tensor, grid_hw: tuple[int, int]) -> None:
        """Take the mean feature of (n, 3, h, w) images away from now on.

        Features share a large common direction; without it a cosine tells places apart.
        """
        self._centre = self._features(images, grid_hw).mean(dim=(0, 2, 3)).view(1, -1, 1, 1)

    def __call__(self, images: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        """Return (n, dim, *grid_hw) unit features of (n, 3, h, w) images in [0, 1]."""
        return functional.normalize(self._features(images, grid_hw) - self._centre, dim=1)

    @torch.no_grad()
    def _features(self, images: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        large = functional.interpolate(images, scale_factor=TEACHER_ENLARGE, mode="bilinear")
        states = self._model((large - self._mean) / self._std, output_hidden_states=True)
        parts = [functional.normalize(states.hidden_states[i].float(), dim=1) for i in self._layers]
        resized = [functional.interpolate(p, grid_hw, mode="bilinear") for p in parts]
        return torch.cat(resized, dim=1)


def corresponding(across: Tensor, xy: Tensor, stride: float, side_px: int) -> Tensor:
    """Return where places of the first view lie in the second, for `grid_sample`.

    Args:
        across: (n, 2, 3) pixels of the first view -> pixels of the second.
        xy: (n, p, 2) column and row of places in the first grid.
        stride: pixels a place.
        side_px: side of the second view in pixels.

    Returns:
        (n, p, 2) x, y; the view spans [-1, 1].
    """
    pixels = (xy + 0.5) * stride - 0.5
    moved = torch.cat([pixels, torch.ones_like(pixels[..., :1])], -1) @ across.transpose(1, 2)
    return (moved + 0.5) * 2 / side_px - 1


def taught_losses(features: Tensor, taught: Tensor, head: nn.Module) -> dict[str, Tensor]:
    """Return what the features of one view lack of the teacher's.

    relation: mean squared difference of the cosines between places of the whole batch to the
    teacher's (relational knowledge distillation, Park et al. 2019).
    imitation: cosine distance of a linear map of the features to the teacher's.

    Args:
        features: (n, dim, rows, cols) of the views.
        taught: (n, teacher dim, rows, cols) unit features of the teacher there.
        head: (n, dim, rows, cols) -> (n, teacher dim, rows, cols).
    """
    order = _some_places(features)
    ours, known = _at(features, order), _at(taught, order)
    imitated = functional.normalize(cast(Tensor, head(features)), dim=1)
    return {
        "relation": (ours @ ours.T - known @ known.T).square().mean(),
        "imitation": 1 - (imitated * taught).sum(1).mean(),
    }


def contrast_loss(
    first: Tensor, second: Tensor, across: Tensor, side_px: int, taught: Tensor | None
) -> Tensor:
    """Return InfoNCE of the same place in two views against other places (DenseCL).

    Args:
        first, second: (n, dim, rows, cols) features of the two views.
        across: (n, 2, 3) pixels of the first view -> pixels of the second.
        side_px: side of a view in pixels.
        taught: (n, teacher dim, rows, cols) of the first views: what it finds alike is no
            negative example; None: all other places are.
    """
    cols = first.shape[3]
    order = _some_places(first)
    xy = torch.stack([order % cols, order // cols], -1).float()
    target = corresponding(across, xy, side_px / cols, side_px)
    seen = (target.abs() <= 1).all(-1).flatten()
    sampled = functional.grid_sample(second, target[:, :, None], align_corners=False)[..., 0]
    keys = functional.normalize(sampled.transpose(1, 2).flatten(0, 1), dim=-1)
    image = torch.arange(len(order), device=first.device).repeat_interleave(order.shape[1])
    flat = xy.flatten(0, 1)
    near = torch.cdist(flat, flat) < NEAR_PLACES
    ignored = (near & (image[:, None] == image)) | ~seen
    if taught is not None:
        known = _at(taught, order)
        ignored = ignored | (known @ known.T > ALIKE)
    itself = torch.eye(len(seen), dtype=torch.bool, device=first.device)
    logits = _at(first, order) @ keys.T / TEMPERATURE
    logits = logits.masked_fill(ignored & ~itself, -1e4)
    labels = torch.arange(len(seen), device=first.device)
    lost = functional.cross_entropy(logits, labels, reduction="none")
    return (lost * seen).sum() / seen.sum().clamp(min=1)


class ForeignLoss:
    """Ranks foreign places above nominal ones by their distance to nominal places seen before.

    Outlier exposure (Hendrycks et al. 2019, arXiv 1812.04606) with pasted shapes in the manner of
    CutPaste (Li et al. 2021, arXiv 2104.04015), for the score that will be used: the cosine
    distance to the nearest entry of an index, here a queue of places of the last batches.
    """

    def __init__(self) -> None:
        self._queue: Tensor | None = None

    def __call__(self, features: Tensor, foreign: Tensor, nominal: Tensor) -> Tensor:
        """Return a smooth share of the pairs (foreign, nominal) in the wrong order.

        Args:
            features: (n, dim, rows, cols) of the views.
            foreign: (n, height, width) in [0, 1], where foreign material shows.
            nominal: (n,) bool, views of nominal images apart from what was pasted.
        """
        grid_hw = (features.shape[2], features.shape[3])
        covered = functional.interpolate(foreign[:, None], grid_hw, mode="area")[:, 0]
        unit = functional.normalize(features, dim=1).permute(0, 2, 3, 1)
        # Places beside it see it too: neither nominal nor foreign.
        touched = functional.max_pool2d(covered[:, None], 3, stride=1, padding=1)[:, 0]
        clean = unit[(touched == 0) & nominal[:, None, None]]
        pasted = unit[(covered > 0.7) & nominal[:, None, None]]
        before, self._queue = self._queue, self._pushed(clean.detach())
        if before is None or not len(pasted) or not len(clean):
            return features.sum() * 0.0
        near = [
            NEAREST * torch.logsumexp(_drawn(places, count) @ before.T / NEAREST, dim=1)
            for places, count in ((clean, 512), (pasted, 256))
        ]
        apart = (near[1][:, None] - near[0][None] + RANK_MARGIN) / RANK_TEMPERATURE
        return functional.softplus(apart).mean() * RANK_TEMPERATURE

    def _pushed(self, clean: Tensor) -> Tensor:
        some = _drawn(clean, QUEUE // 24)
        return some if self._queue is None else torch.cat([some, self._queue])[:QUEUE]


def _drawn(places: Tensor, count: int) -> Tensor:
    return places[torch.randperm(len(places))[:count].to(places.device)]


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
