"""Foreign things pasted into pictures: random silhouettes of random material, in any place."""

from __future__ import annotations

import cv2
import numpy as np
from backbone_data import texture

LARGEST, SMALLEST = 0.28, 0.02


def paste_thing(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one thing of several parts, each filled by a made-up material or a piece of a picture.

    Self-supervised anomalies in the manner of CutPaste (Li et al. 2021, arXiv 2104.04015) and NSA
    (Schlueter et al. 2022, arXiv 2109.15222): nothing of them is drawn after a kind of anomaly.

    Args:
        image: (height, width, 3) uint8, changed in place.
        other: (h, w, 3) uint8, the picture that pieces are taken from.
        rng: source of chance.

    Returns:
        (height, width) uint8, 255 where the thing is, between at its soft edge.
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
    turn = rng.uniform(0, 2 * np.pi) if rng.random() < 0.6 else 0.0
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
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
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    piece = cv2.warpAffine(other, across, hw[::-1], flags=flags, borderMode=cv2.BORDER_REFLECT_101)
    tint = rng.uniform(0.75, 1.25, 3).astype(np.float32)
    if rng.random() < 0.5:
        tint[:] = 1
    return np.clip(piece.astype(np.float32) * tint, 0, 255)
