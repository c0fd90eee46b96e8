"""Nominal things of the street, except vehicles.

Every function returns meshes around the origin, standing on y = 0 and facing the camera (-z). Odd
arrangements are made of the same parts.
"""

from __future__ import annotations

import numpy as np

from semantic_anomaly.synthetic.mesh import (
    Colour,
    Mesh,
    box,
    disc,
    flat,
    layers,
    polygon,
    rectangle,
    shade,
    solid,
)

CAR_COLOURS: tuple[Colour, ...] = (
    (150, 30, 32), (40, 60, 110), (190, 192, 195), (60, 62, 66), (225, 225, 220),
    (90, 110, 80), (150, 120, 70), (30, 32, 36), (120, 60, 40), (95, 130, 160),
)  # fmt: skip
CLOTHES: tuple[Colour, ...] = (
    (40, 45, 80), (120, 35, 40), (200, 195, 185), (60, 60, 60), (90, 110, 70), (160, 120, 60),
    (110, 70, 45), (180, 90, 60), (70, 100, 140),
)  # fmt: skip
SKIN: tuple[Colour, ...] = ((224, 180, 150), (190, 140, 105), (130, 90, 65), (90, 62, 46))
GLASS: Colour = (48, 62, 74)
RUBBER: Colour = (28, 28, 30)
STEEL: Colour = (120, 122, 124)
WOOD: tuple[Colour, ...] = ((120, 84, 52), (96, 66, 42), (140, 104, 66))
SIGN_RED: Colour = (178, 24, 30)
WHITE: Colour = (235, 235, 232)


def pick(rng: np.random.Generator, colours: tuple[Colour, ...]) -> Colour:
    """Return one of the colours, slightly varied."""
    base = colours[int(rng.integers(len(colours)))]
    return shade(base, float(rng.uniform(0.85, 1.15)))


def person(rng: np.random.Generator) -> list[Mesh]:
    """Return a person of about 1.75 m as flat layers."""
    top, legs, skin = pick(rng, CLOTHES), shade(pick(rng, CLOTHES), 0.7), pick(rng, SKIN)
    hair = pick(rng, ((40, 30, 24), (90, 60, 36), (120, 100, 70), (25, 25, 28)))
    step = float(rng.uniform(0.02, 0.22))
    swing = float(rng.uniform(-0.12, 0.18))
    parts = [
        flat([(-0.12, 0.85), (0.02, 0.85), (-step + 0.02, 0.05), (-step - 0.1, 0.05)], legs),
        flat(
            [(-0.02, 0.85), (0.12, 0.85), (step + 0.1, 0.05), (step - 0.02, 0.05)], shade(legs, 0.8)
        ),
        rectangle(-step - 0.13, 0.0, -step + 0.05, 0.08, RUBBER),
        rectangle(step - 0.04, 0.0, step + 0.14, 0.08, RUBBER),
        flat(
            [(-0.24, 1.4), (-0.16, 1.42), (-0.2 - swing, 0.85), (-0.28 - swing, 0.85)],
            shade(top, 0.8),
        ),
        flat(
            [(0.16, 1.42), (0.24, 1.4), (0.28 + swing, 0.85), (0.2 + swing, 0.85)], shade(top, 0.8)
        ),
        flat([(-0.2, 1.45), (0.2, 1.45), (0.16, 0.8), (-0.16, 0.8)], top),
        rectangle(-0.05, 1.42, 0.05, 1.52, shade(skin, 0.85)),
        disc(0, 1.62, 0.12, skin, n=12, squash=1.2),
        flat([(-0.13, 1.64), (-0.1, 1.74), (0, 1.79), (0.1, 1.74), (0.13, 1.64), (0, 1.7)], hair),
    ]
    return [layers(*parts)]


def tree(rng: np.random.Generator) -> list[Mesh]:
    """Return a tree of 4 to 8 m: a trunk and leaf masses as flat layers."""
    height = float(rng.uniform(4.0, 8.0))
    bark = shade(pick(rng, WOOD), 0.7)
    leaf = (float(rng.uniform(45, 95)), float(rng.uniform(85, 125)), float(rng.uniform(35, 60)))
    trunk = flat([(-0.12, height * 0.6), (0.12, height * 0.6), (0.2, 0), (-0.2, 0)], bark)
    crown = []
    for level in range(16):
        radius = height * float(rng.uniform(0.09, 0.17))
        x, y = rng.normal(0, height * 0.13), height * float(rng.uniform(0.5, 0.92))
        light = 0.7 + 0.45 * (y / height - 0.45) / 0.5 + 0.01 * level
        crown.append(disc(float(x), y, radius, shade(leaf, light), n=9, squash=0.8))
    return [layers(trunk, *crown)]


def pole(height: float, radius: float = 0.06, colour: Colour = STEEL) -> Mesh:
    """Return an upright pole as two layers."""
    return layers(
        rectangle(-radius, 0, radius, height, shade(colour, 0.8)),
        rectangle(-radius, 0, -radius * 0.2, height, shade(colour, 1.15)),
    )


def traffic_light_head(lit: int) -> Mesh:
    """Return the head of a traffic light, 1 m high, facing the camera.

    Args:
        lit: lamp that is on: 0 red, 1 amber, 2 green.
    """
    colours = ((225, 40, 30), (240, 170, 40), (60, 210, 110))
    lamps = []
    for number, colour in enumerate(colours):
        y = 0.83 - 0.31 * number
        on = number == lit
        lamps.append(disc(0, y, 0.14, (18, 18, 18), z=-0.13))
        lamps.append(disc(0, y, 0.12, colour if on else shade(colour, 0.28), z=-0.14))
        if on:
            lamps.append(disc(0, y + 0.02, 0.05, shade(colour, 1.5), z=-0.15))
    return solid(box((0.38, 1.0, 0.24), (38, 40, 38)), *lamps)


def traffic_light(rng: np.random.Generator) -> list[Mesh]:
    """Return a traffic light on its pole, 3.4 m high."""
    return [pole(2.6, 0.07, (70, 72, 72)), traffic_light_head(int(rng.integers(3))).moved(y=2.4)]


def stop_sign_face(radius: float = 0.42) -> Mesh:
    """Return the octagon of a stop sign with its letters, centred at the origin."""
    parts = [
        disc(0, 0, radius, WHITE, n=8, z=-0.01),
        disc(0, 0, radius * 0.92, SIGN_RED, n=8, z=-0.02),
    ]
    unit = radius * 0.115
    glyphs = {
        "S": ((0, 4, 3, 5), (0, 2.2, 1, 5), (0, 2, 3, 3), (2, 0, 3, 3), (0, 0, 3, 1)),
        "T": ((0, 4, 3, 5), (1, 0, 2, 5)),
        "O": ((0, 4, 3, 5), (0, 0, 3, 1), (0, 0, 1, 5), (2, 0, 3, 5)),
        "P": ((0, 4, 3, 5), (0, 0, 1, 5), (2, 2, 3, 5), (0, 2, 3, 3)),
    }
    for number, letter in enumerate("STOP"):
        left = (number * 3.8 - 7.2) * unit
        for x0, y0, x1, y1 in glyphs[letter]:
            corners = (left + x0 * unit, (y0 - 2.5) * unit, left + x1 * unit, (y1 - 2.5) * unit)
            parts.append(rectangle(*corners, WHITE, -0.03))
    return layers(*parts)


def stop_sign(_: np.random.Generator) -> list[Mesh]:
    """Return a stop sign on its pole, 2.6 m high."""
    return [pole(2.3), stop_sign_face().moved(y=2.2)]


def billboard(advert: np.ndarray) -> list[Mesh]:
    """Return a billboard of 4 x 2.2 m on two posts, facing the camera.

    Args:
        advert: (h, w, 3) uint8 RGB.
    """
    board = box((4.2, 2.4, 0.16), (92, 92, 90), at=(0, 1.9, 0))
    corners = [(-2.0, 4.2, -0.09), (2.0, 4.2, -0.09), (2.0, 2.0, -0.09), (-2.0, 2.0, -0.09)]
    return [
        pole(2.0, 0.1, (84, 80, 76)).moved(x=-1.6),
        pole(2.0, 0.1, (84, 80, 76)).moved(x=1.6),
        solid(board, polygon(corners, (200, 200, 200), advert)),
    ]


def lamp_post(_: np.random.Generator) -> list[Mesh]:
    """Return a street lamp, 6 m high."""
    arm = rectangle(-0.05, 5.9, 1.2, 6.0, shade(STEEL, 0.8))
    return [pole(6.0, 0.07), layers(arm, rectangle(0.8, 5.78, 1.3, 5.92, (215, 212, 195)))]


def bin_(rng: np.random.Generator) -> list[Mesh]:
    """Return a wheeled refuse bin, 1 m high."""
    colour = pick(rng, ((60, 80, 60), (60, 64, 80), (70, 62, 50)))
    lid = box((0.62, 0.1, 0.66), shade(colour, 0.7), at=(0, 0.95, 0))
    return [solid(box((0.55, 0.95, 0.6), colour)), solid(lid)]


def bench(rng: np.random.Generator) -> list[Mesh]:
    """Return a wooden bench, 1.6 m wide, facing the camera."""
    colour = pick(rng, WOOD)
    legs = [solid(box((0.1, 0.42, 0.4), STEEL, at=(x, 0, 0))) for x in (-0.65, 0.65)]
    back = [rectangle(-0.8, y, 0.8, y + 0.12, shade(colour, 1.1), 0.2) for y in (0.55, 0.72)]
    return [layers(*back), *legs, solid(box((1.6, 0.07, 0.45), colour, at=(0, 0.42, 0)))]


def hedge(rng: np.random.Generator) -> list[Mesh]:
    """Return a clipped hedge, 3 m wide."""
    leaf = (float(rng.uniform(40, 80)), float(rng.uniform(75, 110)), float(rng.uniform(35, 55)))
    spots = []
    for _ in range(14):
        x, y = float(rng.uniform(-0.4, 0.4)), float(rng.uniform(0.1, 0.9))
        light = float(rng.uniform(0.75, 1.25))
        spots.append(disc(x, y, 0.12, shade(leaf, light), n=7, z=-1.51))
    return [solid(box((1.0, 1.1, 3.0), leaf), *spots)]
