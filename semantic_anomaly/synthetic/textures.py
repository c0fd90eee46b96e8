"""Textures: facades, adverts, and the ground from above."""

from __future__ import annotations

import cv2
import numpy as np

from semantic_anomaly.synthetic.mesh import shade

GROUND_M_PER_PX = 0.05
GROUND_HALF_WIDTH_M = 16.0
GROUND_PERIOD_M = 24.0
# Lateral layout in metres from the camera: the camera keeps to the right lane.
ROAD_X = (-5.25, 1.75)
PARKING_X = (-7.7, 4.2)
SIDEWALK_X = (-10.7, 7.2)

_WALLS = (
    (176, 128, 104), (150, 92, 76), (196, 184, 160), (168, 170, 172), (214, 206, 190),
    (140, 132, 120), (188, 160, 120), (120, 104, 96), (170, 182, 186),
)  # fmt: skip


def _noise(rng: np.random.Generator, shape: tuple[int, int], grain: int) -> np.ndarray:
    coarse = rng.normal(0, 1, (max(2, shape[0] // grain), max(2, shape[1] // grain)))
    return cv2.resize(coarse.astype(np.float32), shape[::-1], interpolation=cv2.INTER_CUBIC)


def facade(rng: np.random.Generator, width_m: float, height_m: float) -> np.ndarray:
    """Return a facade with windows and a door, (h, w, 3) uint8 at 12 px per metre."""
    scale = 12
    h, w = int(height_m * scale), int(width_m * scale)
    wall = np.array(shade(_WALLS[int(rng.integers(len(_WALLS)))], float(rng.uniform(0.8, 1.1))))
    image = np.empty((h, w, 3), np.float32)
    image[:] = wall
    image *= 1 + 0.05 * _noise(rng, (h, w), 9)[..., None]
    style = int(rng.integers(3))
    if style == 0:
        image[::4] *= 0.9
        image[::8, ::6] *= 0.9
    elif style == 1:
        image[::7] *= 0.86
    floors = max(1, int(height_m // 3))
    columns = max(2, int(width_m // float(rng.uniform(2.0, 3.2))))
    glass = np.array((62, 76, 90), np.float32) * float(rng.uniform(0.7, 1.4))
    frame = tuple(float(c) for c in np.array((222, 220, 212)) * rng.uniform(0.4, 1.05))
    for floor in range(floors):
        top = h - int((floor + 1) * h / floors) + int(0.18 * h / floors)
        bottom = top + int(0.5 * h / floors)
        for column in range(columns):
            left = int((column + 0.25) * w / columns)
            right = int((column + 0.75) * w / columns)
            if floor == 0 and column == columns // 2:
                door = tuple(float(c) for c in rng.uniform(40, 130, 3))
                cv2.rectangle(image, (left, top), (right, h), door, -1)
                cv2.rectangle(image, (left, top), (right, h), frame, 1)
                continue
            lit = 1.9 if rng.random() < 0.12 else float(rng.uniform(0.8, 1.2))
            cv2.rectangle(image, (left, top), (right, bottom), tuple(map(float, glass * lit)), -1)
            cv2.rectangle(image, (left, top), (right, bottom), frame, 1)
            middle = (left + right) // 2
            cv2.line(image, (middle, top), (middle, bottom), frame, 1)
    return np.clip(image, 0, 255).astype(np.uint8)


def advert(rng: np.random.Generator) -> np.ndarray:
    """Return an advert of colour gradient, shapes and text, (110, 200, 3) uint8."""
    h, w = 110, 200
    base, ink = rng.uniform(40, 235, 3), rng.uniform(20, 250, 3)
    ramp = np.linspace(0.75, 1.2, w, dtype=np.float32)[None, :, None]
    image = np.clip(np.ones((h, w, 3)) * base * ramp, 0, 255).astype(np.uint8)
    for _ in range(int(rng.integers(1, 4))):
        colour = tuple(float(c) for c in rng.uniform(20, 240, 3))
        centre = (int(rng.integers(20, w - 20)), int(rng.integers(20, h - 20)))
        size = int(rng.integers(10, 38))
        shape = int(rng.integers(3))
        if shape == 0:
            cv2.circle(image, centre, size, colour, -1, cv2.LINE_AA)
        elif shape == 1:
            corner = (centre[0] + 2 * size, centre[1] + size)
            cv2.rectangle(image, centre, corner, colour, -1)
        else:
            angles = rng.uniform(0, 2 * np.pi) + np.arange(3) * 2 * np.pi / 3
            points = np.array(centre) + size * np.stack([np.cos(angles), np.sin(angles)], 1)
            cv2.fillPoly(image, [points.astype(np.int32)], colour, cv2.LINE_AA)
    words = ("SALE", "FRESH", "DRIVE", "COLA", "RADIO 7", "TOURS", "HOTEL", "PIZZA", "BANK", "TEA")
    for line in range(int(rng.integers(1, 4))):
        word = words[int(rng.integers(len(words)))]
        corner = (int(rng.integers(5, 80)), 28 + 32 * line)
        cv2.putText(
            image, word, corner, cv2.FONT_HERSHEY_DUPLEX, float(rng.uniform(0.7, 1.3)),
            tuple(float(c) for c in ink), 2, cv2.LINE_AA,
        )  # fmt: skip
    return image


def ground(rng: np.random.Generator) -> np.ndarray:
    """Return one period of the ground from above, (z, x, 3) uint8."""
    h, w = int(GROUND_PERIOD_M / GROUND_M_PER_PX), int(2 * GROUND_HALF_WIDTH_M / GROUND_M_PER_PX)
    x = (np.arange(w) + 0.5) * GROUND_M_PER_PX - GROUND_HALF_WIDTH_M
    z = (np.arange(h) + 0.5) * GROUND_M_PER_PX
    image = np.empty((h, w, 3), np.float32)
    lawn = np.array((92, 112, 62)) * rng.uniform(0.7, 1.15) + rng.normal(0, 8, 3)
    asphalt = np.array((1.0, 1.0, 1.02)) * rng.uniform(72, 118)
    paving = np.array((1.0, 0.98, 0.94)) * rng.uniform(120, 168)
    image[:] = lawn
    image[:, (x > SIDEWALK_X[0]) & (x < SIDEWALK_X[1])] = paving
    image[:, (x > PARKING_X[0]) & (x < PARKING_X[1])] = asphalt * 0.93
    image[:, (x > ROAD_X[0]) & (x < ROAD_X[1])] = asphalt
    walk = ((x > SIDEWALK_X[0]) & (x < PARKING_X[0])) | ((x > PARKING_X[1]) & (x < SIDEWALK_X[1]))
    size = float(rng.choice([0.6, 1.0, 1.5]))
    image[np.ix_((z % size) < 0.06, walk)] *= 0.82
    image[:, walk & ((x % size) < 0.06)] *= 0.82
    for curb in PARKING_X:
        image[:, np.abs(x - curb) < 0.12] = np.array((168, 166, 160)) * rng.uniform(0.8, 1.1)
    image *= (
        1 + 0.035 * _noise(rng, (h, w), 3)[..., None] + 0.06 * _noise(rng, (h, w), 40)[..., None]
    )
    for _ in range(int(rng.integers(3, 9))):
        centre = (int(rng.integers(200, 360)), int(rng.integers(0, h)))
        axes = (int(rng.integers(6, 30)), int(rng.integers(6, 40)))
        tone = tuple(float(c) for c in asphalt * rng.uniform(0.72, 0.92))
        angle = float(rng.uniform(0, 180))
        # The texture is periodic along the street.
        for shift in (-h, 0, h):
            middle = (centre[0], centre[1] + shift)
            cv2.ellipse(image, middle, axes, angle, 0, 360, tone, -1)
    paint = np.array((222, 222, 214)) * rng.uniform(0.75, 1.05)
    centre_x = (ROAD_X[0] + ROAD_X[1]) / 2
    dashes = (z % float(rng.choice([6.0, 8.0, 12.0]))) < 3.0
    image[np.ix_(dashes, np.abs(x - centre_x) < 0.08)] = paint
    if rng.random() < 0.6:
        for edge in ROAD_X:
            image[:, np.abs(x - edge) < 0.06] = paint
    return np.clip(image, 0, 255).astype(np.uint8)
