"""Images to train a backbone with: street drives, procedural pictures, folders of photographs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

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
        rng: source of chance.
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
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    outline = (centre + radius * points @ rotation).astype(np.int32)
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [outline], 255, cv2.LINE_AA)
    x, y, w, h = cv2.boundingRect(outline)
    box = np.s_[max(y, 0) : max(y + h + 1, 0), max(x, 0) : max(x + w + 1, 0)]
    weight = mask[box][..., None].astype(np.float32) / 255
    shade = rng.uniform(0.7, 1.1)
    painted = np.minimum(fill[box] * np.float32(shade), 255)
    image[box] = (image[box] * (1 - weight) + painted * weight).astype(np.uint8)


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
