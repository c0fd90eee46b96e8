"""Train a small dense backbone from images that the project makes itself, with or without teacher.

With a teacher, the student learns the teacher's features, projected on their main directions, by
squared distance and with other colours than the teacher sees (Hinton et al. 2015, arXiv 1503.02531;
FitNets, Romero et al. 2015, arXiv 1412.6550). Without one, it learns by dense contrast between two
views of an image with known geometry (DenseCL, Wang et al. 2021, arXiv 2011.09157). The result is a
Hugging Face folder with an exponential moving average of the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from transformers import AutoModel, ConvNextConfig, ConvNextModel

from semantic_anomaly.embedding.pretrained import fold_batch_norms
from semantic_anomaly.synthetic import StreetDrive

# Held-out evaluation draws its streets from seeds below 100 000.
FIRST_TRAINING_SEED = 1_000_000
IMAGE_HW = (360, 640)
FRAMES_BETWEEN = 12
_GLYPHS = "ABCDEFGHIKLMNOPRSTUVXYZ0123456789?&%#"
_SUFFIXES = {".jpg", ".jpeg", ".png"}


def render_drive(seed: int, frames: int) -> np.ndarray:
    """Return (frames, 360, 640, 3) uint8 nominal frames, spread over the drive of a seed."""
    cv2.setNumThreads(1)
    drive = StreetDrive(seed, frames=FRAMES_BETWEEN * frames, image_hw=IMAGE_HW)
    start = seed % FRAMES_BETWEEN
    return np.stack([drive.frame(start + FRAMES_BETWEEN * i).image for i in range(frames)])


def street_images(drives: int, frames: int, cache: Path | None, workers: int) -> np.ndarray:
    """Return (drives * frames, 360, 640, 3) uint8 nominal frames of the training seeds.

    Args:
        drives: number of streets, seeds from FIRST_TRAINING_SEED on.
        frames: frames of each.
        cache: folder in which the frames are kept for the next run; None: in memory alone.
        workers: processes that render.
    """
    path = cache / f"street_{FIRST_TRAINING_SEED}_{drives}x{frames}.npy" if cache else None
    if path is not None and path.is_file():
        return np.load(path, mmap_mode="r", allow_pickle=False)
    images = np.empty((drives * frames, *IMAGE_HW, 3), np.uint8)
    if not len(images):
        return images
    seeds = range(FIRST_TRAINING_SEED, FIRST_TRAINING_SEED + drives)
    # Fork would copy the threads of libraries already loaded in an undefined state.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        rendered = pool.map(render_drive, seeds, [frames] * drives)
        for i, drive in enumerate(tqdm(rendered, "render", drives, disable=None)):
            images[i * frames : (i + 1) * frames] = drive
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npy")
        np.save(part, images, allow_pickle=False)
        part.replace(path)
    return images


def folder_images(folders: Sequence[Path]) -> np.ndarray:
    """Return (n, 360, 640, 3) uint8 of all pictures in the folders, centre-cropped to the ratio.

    Raises:
        ValueError: a folder without pictures, or a file that is none.
    """
    images = []
    for folder in folders:
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not paths:
            raise ValueError(f"no pictures in '{folder}'")
        for path in tqdm(paths, f"read {folder.name}", disable=None):
            bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
            if bgr is None:
                raise ValueError(f"cannot read '{path}' as a picture")
            images.append(_fit(bgr[..., ::-1]))
    return np.stack(images) if images else np.empty((0, *IMAGE_HW, 3), np.uint8)


def procedural_images(count: int, seed: int) -> np.ndarray:
    """Return (count, 360, 640, 3) uint8 of textured shapes over each other ("dead leaves").

    Occlusion of random shapes of all sizes gives the edges and scales of natural pictures (Lee,
    Mumford and Huang 2001); as training data: Baradad et al. 2021.
    """
    images = np.empty((count, *IMAGE_HW, 3), np.uint8)
    for i in tqdm(range(count), "procedural", disable=None):
        rng = np.random.default_rng([seed, i])
        image = texture(rng, IMAGE_HW)
        for _ in range(int(rng.integers(5, 60))):
            paste_shape(image, texture(rng, IMAGE_HW), rng, largest=0.5)
        images[i] = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.0))
    return images


def texture(rng: np.random.Generator, hw: tuple[int, int]) -> np.ndarray:
    """Return (*hw, 3) uint8 of one plain, shaded, patterned, noisy or lettered material."""
    height, width = hw
    low, high = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    if rng.random() < 0.5:
        high = np.clip(low + rng.normal(0, 30, 3), 0, 255).astype(np.float32)
    kind = rng.choice(("plain", "gradient", "stripes", "checks", "noise", "noise", "glyphs"))
    if kind == "plain":
        return np.broadcast_to(low, (height, width, 3)).astype(np.uint8)
    if kind == "glyphs":
        return _lettered(rng, hw, low, high)
    if kind == "noise":
        weight = _noise(rng, hw)
    else:
        angle = rng.uniform(0, np.pi)
        y, x = np.mgrid[:height, :width].astype(np.float32)
        u = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
        v = y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle))
        period = float(np.exp(rng.uniform(np.log(4), np.log(80))))
        if kind == "gradient":
            weight = (u - u.min()) / (np.ptp(u) + 1)
        elif kind == "stripes":
            weight = (u % period < period * rng.uniform(0.2, 0.8)).astype(np.float32)
        else:
            weight = ((u // period + v // period) % 2).astype(np.float32)
    return (low + (high - low) * weight[..., None]).astype(np.uint8)


def paste_shape(
    image: np.ndarray, fill: np.ndarray, rng: np.random.Generator, largest: float
) -> None:
    """Draw one random polygon, ellipse, box or bar, filled from a picture of the same size.

    Args:
        image: (height, width, 3) uint8, changed in place.
        fill: (height, width, 3) uint8 that shows through the shape.
        rng: of all random draws.
        largest: radius of the largest shapes as a share of the height.
    """
    height, width = image.shape[:2]
    radius = height * float(np.exp(rng.uniform(np.log(0.02), np.log(largest))))
    centre = np.array([rng.uniform(0, width), rng.uniform(0, height)])
    corners = int(rng.choice((3, 4, 4, 5, 6, 8, 24)))
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    if corners in (4, 24) or rng.random() < 0.3:
        angles = np.linspace(0, 2 * np.pi, corners, endpoint=False) + rng.uniform(0, 1)
    stretch = np.exp(rng.normal(0, 0.5, 2))
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * stretch
    rotation = _rotation(rng.uniform(0, 2 * np.pi))
    outline = (centre + radius * points @ rotation).astype(np.int32)
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [outline], 255, cv2.LINE_AA)
    x, y, w, h = cv2.boundingRect(outline)
    box = np.s_[max(y, 0) : max(y + h + 1, 0), max(x, 0) : max(x + w + 1, 0)]
    weight = mask[box][..., None].astype(np.float32) / 255
    shade = rng.uniform(0.7, 1.1)
    painted = np.minimum(fill[box] * np.float32(shade), 255)
    image[box] = (image[box] * (1 - weight) + painted * weight).astype(np.uint8)


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _noise(rng: np.random.Generator, hw: tuple[int, int]) -> np.ndarray:
    total = np.zeros(hw, np.float32)
    slope = rng.uniform(0.3, 1.2)
    cells = int(rng.integers(2, 12))
    while cells < hw[0]:
        shape = (cells, max(2, int(cells * rng.uniform(0.5, 3))))
        small = rng.random(shape, np.float32)
        total += cells**-slope * cv2.resize(small, hw[::-1], interpolation=cv2.INTER_CUBIC)
        cells *= 2
    total -= total.min()
    return total / max(float(total.max()), 1e-6)


def _lettered(
    rng: np.random.Generator, hw: tuple[int, int], ground: np.ndarray, ink: np.ndarray
) -> np.ndarray:
    image = np.broadcast_to(ground, (*hw, 3)).astype(np.uint8).copy()
    size = rng.uniform(0.4, 3.0)
    step = int(32 * size)
    for y in range(step, hw[0] + step, step):
        letters = "".join(rng.choice(list(_GLYPHS), 40))
        thick = int(rng.integers(1, 2 + int(3 * size)))
        cv2.putText(image, letters, (0, y), int(rng.integers(0, 5)), size, ink.tolist(), thick)
    return image


def _fit(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    rows, cols = IMAGE_HW
    scale = max(rows / height, cols / width)
    size = (max(cols, round(width * scale)), max(rows, round(height * scale)))
    resized = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    top, left = (size[1] - rows) // 2, (size[0] - cols) // 2
    return np.ascontiguousarray(resized[top : top + rows, left : left + cols])


LARGEST, SMALLEST = 0.28, 0.02


def paste_thing(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one object of several parts, each filled by a texture or a piece of an image.

    Self-supervised anomalies in the manner of CutPaste (Li et al. 2021, arXiv 2104.04015) and NSA
    (Schlueter et al. 2022, arXiv 2109.15222); they imitate no class of anomalies.

    Args:
        image: (height, width, 3) uint8, changed in place.
        other: (h, w, 3) uint8, the image that pieces are taken from.
        rng: of all random draws.

    Returns:
        (height, width) uint8, 255 where the object is, between at its soft edge.
    """
    height, width = image.shape[:2]
    radius = height * float(np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST))))
    centre = np.array([rng.uniform(0, width), rng.uniform(0.1, 1) * height])
    x0, y0 = np.maximum(centre - 2.2 * radius, 0).astype(int)
    x1, y1 = np.minimum(centre + 2.2 * radius + 2, (width, height)).astype(int)
    mask = np.zeros((height, width), np.uint8)
    if x1 - x0 < 2 or y1 - y0 < 2:
        return mask
    part_hw = (y1 - y0, x1 - x0)
    window, seen = image[y0:y1, x0:x1], mask[y0:y1, x0:x1]
    fill = _material(other, rng, part_hw)
    for _ in range(int(rng.choice((1, 1, 2, 3, 5)))):
        if rng.random() < 0.3:
            fill = _material(other, rng, part_hw)
        shape = _silhouette(rng, centre - (x0, y0), radius, part_hw)
        shade = np.float32(rng.uniform(0.55, 1.15))
        weight = shape[..., None].astype(np.float32) / 255
        window[:] = window * (1 - weight) + np.minimum(fill * shade, 255) * weight
        np.maximum(seen, shape, out=seen)
    return mask


def _silhouette(
    rng: np.random.Generator, centre: np.ndarray, radius: float, hw: tuple[int, int]
) -> np.ndarray:
    # A polygon, ellipse, box or bar within 2 radii of the centre; soft edges as a lens makes them.
    middle = centre + rng.normal(0, 0.4, 2) * radius
    size = radius * float(rng.uniform(0.35, 1.0))
    corners = int(rng.choice((3, 4, 4, 4, 5, 7, 24, 24)))
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    if corners in (4, 24):
        angles = np.linspace(0, 2 * np.pi, corners, endpoint=False) + np.pi / 4
    stretch = np.exp(rng.normal(0, 0.55, 2))
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * np.minimum(stretch, 2.0)
    rotation = _rotation(rng.uniform(0, 2 * np.pi) if rng.random() < 0.6 else 0.0)
    outline = np.round((middle + size * points @ rotation) * 16).astype(np.int32)
    shape = np.zeros(hw, np.uint8)
    cv2.fillPoly(shape, [outline], 255, cv2.LINE_AA, 4)
    if rng.random() < 0.5:
        shape = cv2.GaussianBlur(shape, (0, 0), float(rng.uniform(0.4, 1.2)))
    return shape


def _material(other: np.ndarray, rng: np.random.Generator, hw: tuple[int, int]) -> np.ndarray:
    if rng.random() < 0.55:
        made = texture(rng, hw).astype(np.float32)
        # Things are lit from one side.
        ramp = np.linspace(rng.uniform(0.7, 1.2), rng.uniform(0.7, 1.2), hw[0]).astype(np.float32)
        return np.clip(made * ramp[:, None, None], 0, 255)
    # Pixels of the part -> pixels of the other picture: any piece, scale, direction.
    scale = float(np.exp(rng.uniform(np.log(0.5), np.log(3.0))))
    turn = rng.uniform(0, 2 * np.pi) if rng.random() < 0.5 else 0.0
    cosine, sine = scale * np.cos(turn), scale * np.sin(turn)
    start = rng.uniform(0, 1, 2) * (other.shape[1], other.shape[0])
    across = np.array([[cosine, -sine, start[0]], [sine, cosine, start[1]]])
    piece = _warped(other, across, hw)
    tint = rng.uniform(0.75, 1.25, 3).astype(np.float32)
    if rng.random() < 0.5:
        tint[:] = 1
    return np.clip(piece.astype(np.float32) * tint, 0, 255)


def _warped(image: np.ndarray, across: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    # By a (2, 3) map from pixels of the result to pixels of the image.
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, across, hw[::-1], flags=flags, borderMode=cv2.BORDER_REFLECT_101)


# Large views: the receptive field of a patch seldom reaches beyond its view, as in the vehicle.
VIEW_HW = (320, 560)


class ViewPairs(NamedTuple):
    """One pair of views, or a batch of n with a leading axis.

    Attributes:
        clean: (*VIEW_HW, 3) uint8, the first view before its colours were changed.
        first, second: the views, same shape and dtype; without a second one, (0,).
        across: (2, 3) float32, pixels of the first view -> pixels of the second.
    """

    clean: np.ndarray
    first: np.ndarray
    second: np.ndarray
    across: np.ndarray


class PairSampler:
    """Draws batches from groups of images; a batch depends on seed and number alone.

    Args:
        groups: (n, height, width, 3) uint8 arrays with sides of VIEW_HW at least.
        shares: probability of each group; those of empty groups go to the others.
        seed: of all random draws.
        pasted: share of the images into which foreign material is pasted.
        both: whether second views are wanted.

    Raises:
        ValueError: no image at all.
    """

    def __init__(
        self,
        groups: Sequence[np.ndarray],
        shares: Sequence[float],
        seed: int,
        pasted: float = 0.5,
        both: bool = True,
    ) -> None:
        kept = [(g, s) for g, s in zip(groups, shares, strict=True) if len(g) and s > 0]
        if not kept:
            raise ValueError("no images to train on: every group is empty")
        self._groups = [group for group, _ in kept]
        weights = np.array([share for _, share in kept])
        self._shares = weights / weights.sum()
        self._seed, self._pasted, self._both = seed, pasted, both

    @property
    def count(self) -> int:
        """Return the number of images."""
        return sum(len(group) for group in self._groups)

    def batch(self, number: int, size: int) -> ViewPairs:
        """Return batch `number` of `size` pairs."""
        # Every batch has a generator of its own, so that the order of threads changes nothing.
        rng = np.random.default_rng([self._seed, number])
        pairs = [make_pair(rng, self._image(rng), self._both) for _ in range(size)]
        return ViewPairs(*(np.stack(part) for part in zip(*pairs, strict=True)))

    def _image(self, rng: np.random.Generator) -> np.ndarray:
        image = self._pick(rng)
        if rng.random() < self._pasted:
            image = image.copy()
            for _ in range(int(rng.integers(1, 6))):
                paste_thing(image, self._pick(rng), rng)
        return image

    def _pick(self, rng: np.random.Generator) -> np.ndarray:
        group = self._groups[int(rng.choice(len(self._groups), p=self._shares))]
        return np.asarray(group[int(rng.integers(len(group)))])


def make_pair(rng: np.random.Generator, image: np.ndarray, both: bool = True) -> ViewPairs:
    """Return two overlapping views of an image.

    Args:
        rng: of all random draws.
        image: (height, width, 3) uint8, sides of VIEW_HW at least.
        both: whether a second view is wanted; else it is empty.
    """
    height, width = image.shape[:2]
    centre = (rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * height)
    maps = [_placement(rng, centre, (height, width)) for _ in range(2)]
    clean = _warped(image, maps[0][:2], VIEW_HW)
    second = np.empty(0, np.uint8)
    if both:
        second = photometric(rng, _warped(image, maps[1][:2], VIEW_HW))
    across = (np.linalg.inv(maps[1]) @ maps[0])[:2].astype(np.float32)
    return ViewPairs(clean, photometric(rng, clean), second, across)


def photometric(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Return the image under another light and camera: exposure, tint, haze, blur, noise."""
    out = image.astype(np.float32)
    out *= np.float32(rng.uniform(0.65, 1.35)) * rng.uniform(0.9, 1.1, 3).astype(np.float32)
    mean = out.mean()
    out = mean + (out - mean) * np.float32(rng.uniform(0.7, 1.3))
    grey = out.mean(axis=2, keepdims=True)
    out = grey + (out - grey) * np.float32(rng.uniform(0.6, 1.3))
    if rng.random() < 0.4:
        out = cv2.GaussianBlur(out, (5, 5), rng.uniform(0.3, 1.3))
    if rng.random() < 0.25:
        haze = np.float32(rng.uniform(150, 230))
        out += (haze - out) * np.float32(rng.uniform(0.05, 0.4))
    out += np.float32(rng.uniform(0, 6)) * rng.standard_normal(out.shape, np.float32)
    return np.clip(out, 0, 255).astype(np.uint8)


def _placement(
    rng: np.random.Generator, centre: tuple[float, float], hw: tuple[int, int]
) -> np.ndarray:
    # View pixels -> image pixels; both views lie around one centre, so that they overlap.
    scale = float(np.exp(rng.uniform(np.log(0.7), np.log(1.15))))
    corner = []
    for middle, view, side in zip(centre, VIEW_HW[::-1], hw[::-1], strict=True):
        span = view * scale
        start = middle - span / 2 + rng.uniform(-0.2, 0.2) * span
        corner.append(float(np.clip(start, min(0, side - span), max(0, side - span))))
    flip = rng.random() < 0.5
    left = corner[0] + (VIEW_HW[1] * scale - scale if flip else 0.0)
    return np.array([[-scale if flip else scale, 0, left], [0, scale, corner[1]], [0, 0, 1]])


TEMPERATURE = 0.15
PLACES = 48
# Neighbouring patches overlap in content; they count neither as the same nor as another one.
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

        The basis is that of the largest second moments. The mean is not subtracted, because cosines
        without it magnify patches without content.

        Args:
            images: (n, 3, h, w) in [0, 1].
            grid_hw: rows and columns of the grid.
            dim: numbers per patch; those beyond the teacher's own are zero.

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
    """Return where patches of the first view lie in the second, for `grid_sample`.

    Args:
        across: (n, 2, 3) pixels of the first view -> pixels of the second.
        xy: (n, p, 2) column and row of patches in the first grid.
        stride: pixels per patch.
        view_hw: height and width of the second view in pixels.

    Returns:
        (n, p, 2) x, y; the view spans [-1, 1].
    """
    pixels = (xy + 0.5) * stride - 0.5
    moved = torch.cat([pixels, torch.ones_like(pixels[..., :1])], -1) @ across.transpose(1, 2)
    return (moved + 0.5) * 2 / moved.new_tensor(view_hw[::-1]) - 1


def imitation_loss(features: Tensor, taught: Tensor) -> Tensor:
    """Return the mean squared distance of patches to the teacher's: (n, dim, rows, cols) both.

    Without a linear map between them, the student learns the teacher's own distances.
    """
    return (features - taught).square().sum(1).mean()


def contrast_loss(
    first: Tensor, second: Tensor, across: Tensor, view_hw: tuple[int, int]
) -> Tensor:
    """Return InfoNCE of the same patch in two views against other patches (DenseCL).

    Args:
        first, second: (n, dim, rows, cols) features of the two views.
        across: (n, 2, 3) pixels of the first view -> pixels of the second.
        view_hw: height and width of a view in pixels.
    """
    n, _, rows, cols = first.shape
    # (n, p) patch numbers, drawn on the CPU for the same draw everywhere.
    order = torch.stack([torch.randperm(rows * cols)[:PLACES] for _ in range(n)]).to(first.device)
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
    index = order[:, None].expand(-1, first.shape[1], -1)
    queries = torch.gather(first.flatten(2), 2, index).transpose(1, 2).flatten(0, 1)
    logits = functional.normalize(queries, dim=-1) @ keys.T / TEMPERATURE
    logits = logits.masked_fill(ignored & ~itself, -1e4)
    labels = torch.arange(len(seen), device=first.device)
    lost = functional.cross_entropy(logits, labels, reduction="none")
    return (lost * seen).sum() / seen.sum().clamp(min=1)


def _resized(grid: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    return functional.interpolate(grid, grid_hw, mode="bilinear")


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Probabilities of street frames, photographs and procedural pictures.
SHARES = (0.55, 0.25, 0.2)
WARM_UP_STEPS = 100
AVERAGE_DECAY = 0.997
BASIS_BATCHES = 12


def make_student() -> ConvNextModel:
    """Return the untrained architecture: one descriptor of 192 numbers every 10 pixels."""
    config = ConvNextConfig(
        patch_size=5,
        num_stages=2,
        hidden_sizes=[48, 192],
        depths=[1, 6],
        hidden_act="relu",
        image_size=640,
        layer_scale_init_value=0.1,
    )
    return ConvNextModel(config)


def save_backbone(model: ConvNextModel, out: Path) -> None:
    """Write config, weights and preprocessor config; files there are replaced one by one."""
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    processor = {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 384},
        "crop_pct": 1.0,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    text = json.dumps(processor, indent=2) + "\n"
    (part / "preprocessor_config.json").write_text(text, encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(part.iterdir()):
        # safetensors makes files that only their owner may read.
        path.chmod(0o644)
        path.replace(out / path.name)
    part.rmdir()


class Trainer:
    """The student, its moving average, the teacher if there is one, and the optimiser.

    Args:
        args: as `parser` makes them.
        sampler: gives the batches.
    """

    def __init__(self, args: argparse.Namespace, sampler: PairSampler) -> None:
        torch.manual_seed(args.seed)
        cuda = args.device == "auto" and torch.cuda.is_available()
        self._device = torch.device("cuda" if cuda else args.device.replace("auto", "cpu"))
        self._args, self._sampler = args, sampler
        student = ConvNextModel.from_pretrained(args.init) if args.init else make_student()
        self.student = student.to(self._device, memory_format=torch.channels_last).train()
        self.average = AveragedModel(self.student, multi_avg_fn=_move_average)
        if self._device.type == "cpu":
            _keep_depthwise_float32(self.student)
        self._teacher: Teacher | None = None
        if args.teacher:
            self._teacher = Teacher(args.teacher, tuple(args.teacher_layers), self._device)
        self._parameters = list(self.student.parameters())
        self._optimiser = torch.optim.AdamW(
            self._parameters, args.lr, weight_decay=args.weight_decay
        )

    def run(self) -> Iterator[float]:
        """Train, and yield the loss of every step."""
        args = self._args
        begin, step = time.monotonic(), 0
        with ThreadPoolExecutor(1) as pool:
            self._find_basis()
            following = pool.submit(self._sampler.batch, 0, args.batch)
            while True:
                minutes = (time.monotonic() - begin) / 60
                done = max(step / args.steps, minutes / args.minutes if args.minutes else 0.0)
                if done >= 1:
                    return
                pairs = following.result()
                following = pool.submit(self._sampler.batch, step + 1, args.batch)
                rate = args.lr * 0.5 * (1 + np.cos(np.pi * done))
                for group in self._optimiser.param_groups:
                    group["lr"] = rate * min(1.0, (step + 1) / WARM_UP_STEPS)
                yield self._step(pairs)
                step += 1

    def _step(self, pairs: ViewPairs) -> float:
        views = pairs.first if self._teacher else np.concatenate([pairs.first, pairs.second])
        taught = None
        mean, std = (torch.tensor(v, device=self._device).view(3, 1, 1) for v in (MEAN, STD))
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._args.bfloat16):
            pixels = (_inputs(views, self._device) - mean) / std
            features = self.student(pixels).last_hidden_state
            if self._teacher is not None:
                grid_hw = (features.shape[2], features.shape[3])
                taught = self._teacher(_inputs(pairs.clean, self._device), grid_hw)
        features = features.float()
        if taught is not None:
            loss = imitation_loss(features, taught)
        else:
            across = torch.from_numpy(pairs.across).to(self._device)
            first, second = features.chunk(2)
            loss = contrast_loss(first, second, across, VIEW_HW)
        self._optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimiser.step()
        self.average.update_parameters(self.student)
        return float(loss.detach())

    def _find_basis(self) -> None:
        if self._teacher is None:
            return
        # Numbers below zero are no seeds; these batches lie beyond those of any training.
        numbers = range(2**31, 2**31 + BASIS_BATCHES)
        clean = np.concatenate([self._sampler.batch(i, self._args.batch).clean for i in numbers])
        dim = self.student.config.hidden_sizes[-1]
        grid_hw = (VIEW_HW[0] // 10, VIEW_HW[1] // 10)
        kept = self._teacher.project_on(_inputs(clean, self._device), grid_hw, dim)
        tqdm.write(f"{dim} numbers keep {kept:.1%} of the teacher's energy")


def train(args: argparse.Namespace) -> dict[str, float]:
    """Train as the arguments say, write the folder, and return mean loss, steps and images."""
    workers = args.workers or os.cpu_count() or 1
    groups = (
        street_images(args.street_drives, args.street_frames, args.cache, workers),
        folder_images(args.images),
        procedural_images(args.textures, args.seed),
    )
    sampler = PairSampler(groups, SHARES, args.seed, args.pasted, both=not args.teacher)
    trainer = Trainer(args, sampler)
    mean, steps = 0.0, 0
    with tqdm(total=args.steps, desc="train", disable=None) as bar:
        for loss in trainer.run():
            steps += 1
            mean += (loss - mean) / min(steps, 50)
            bar.update()
            if steps % args.save_every == 0:
                save_backbone(trainer.average.module, args.out)
            if steps % 25 == 0:
                bar.set_postfix(loss=f"{mean:.4f}")
                if args.log:
                    with args.log.open("a", encoding="utf-8") as log:
                        log.write(f"{steps} {mean:.4f}\n")
    save_backbone(trainer.average.module, args.out)
    return {"loss": mean, "steps": float(steps), "images": float(sampler.count)}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--init", type=Path, help="continue from this folder")
    p.add_argument("--teacher", type=Path, help="Hugging Face folder of a convolutional backbone")
    p.add_argument("--teacher-layers", type=int, nargs="+", default=[21, 23])
    p.add_argument("--images", type=Path, action="append", default=[], help="more pictures")
    p.add_argument("--street-drives", type=int, default=360)
    p.add_argument("--street-frames", type=int, default=8, help="frames of each drive")
    p.add_argument("--textures", type=int, default=400, help="procedural pictures")
    p.add_argument("--cache", type=Path, help="folder that keeps rendered frames")
    p.add_argument("--steps", type=int, default=6000)
    p.add_argument("--minutes", type=float, default=0.0, help="end after so long; 0: by steps")
    p.add_argument("--batch", type=int, default=8, help="views (or pairs of views) a step")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--weight-decay", type=float, default=0.02)
    p.add_argument("--pasted", type=float, default=0.5, help="share of images with pasted things")
    p.add_argument("--bfloat16", action="store_true", help="faster where the hardware has it")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--workers", type=int, default=0, help="processes that render; 0: one a core")
    p.add_argument("--save-every", type=int, default=250)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--log", type=Path, help="append the losses to this file")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Train from the command line and print the summary as JSON."""
    args = parser().parse_args(argv)
    print(json.dumps(train(args)))
    return 0


def _move_average(
    averages: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int
) -> None:
    # The early average forgets faster, or it would keep the random start for long.
    decay = min(AVERAGE_DECAY, (1 + int(count)) / (10 + int(count)))
    torch._foreach_lerp_(list(averages), list(current), 1 - decay)


def _keep_depthwise_float32(model: nn.Module) -> None:
    # On CPUs the gradient of depthwise convolutions is three times slower in bfloat16.
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.register_forward_pre_hook(lambda _, inputs: inputs[0].float())
            module.forward = torch.autocast("cpu", enabled=False)(module.forward)


def _inputs(views: np.ndarray, device: torch.device) -> Tensor:
    # (n, h, w, 3) uint8 -> (n, 3, h, w) float32 in [0, 1]; the memory stays channels last.
    return torch.from_numpy(views).to(device).permute(0, 3, 1, 2).float() / 255


if __name__ == "__main__":
    raise SystemExit(main())
