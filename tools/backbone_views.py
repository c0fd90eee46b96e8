"""Pairs of views of one image: what they share is known, how they look differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from backbone_foreign import paste_thing

# Large views: what a place sees shall seldom end at the edge of its view, as in the vehicle.
VIEW_HW = (320, 560)


@dataclass(frozen=True, eq=False)
class ViewPairs:
    """A batch of view pairs.

    Attributes:
        clean: (n, *VIEW_HW, 3) uint8, the first views before their colours were changed.
        first, second: the views, same shape and dtype; without second ones, (n, 0).
        across: (n, 2, 3) float32, pixels of the first view -> pixels of the second.
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
        seed: of all chance.
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
        # Every batch has chance of its own, so that the threads that make them change nothing.
        rng = np.random.default_rng([self._seed, number])
        parts = []
        for _ in range(size):
            parts.append(make_pair(rng, self._image(rng), self._both))
        return ViewPairs(*(np.stack(part) for part in zip(*parts, strict=True)))

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


def make_pair(
    rng: np.random.Generator, image: np.ndarray, both: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return clean first view, first view, second view, map from first to second.

    Args:
        rng: source of chance.
        image: (height, width, 3) uint8, sides of VIEW_HW at least.
        both: whether a second view is wanted; else it is empty.
    """
    height, width = image.shape[:2]
    centre = (rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * height)
    maps = [_placement(rng, centre, (height, width)) for _ in range(2)]
    size = VIEW_HW[::-1]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    edge = cv2.BORDER_REFLECT_101
    first = cv2.warpAffine(image, maps[0][:2], size, flags=flags, borderMode=edge)
    second = np.empty(0, np.uint8)
    if both:
        second = photometric(
            rng, cv2.warpAffine(image, maps[1][:2], size, flags=flags, borderMode=edge)
        )
    across = (np.linalg.inv(maps[1]) @ maps[0])[:2].astype(np.float32)
    return first, photometric(rng, first), second, across


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
