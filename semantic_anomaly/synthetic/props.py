"""The things of the street, each drawn by one routine wherever it stands.

Every function returns meshes around the origin, standing on y = 0 and facing the camera (-z),
so that an odd arrangement is made of exactly the parts that are familiar elsewhere.
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
    prism,
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


def _side_disc(x: float, y: float, z: float, radius: float, colour: Colour) -> Mesh:
    angles = np.arange(14) * 2 * np.pi / 14
    points = [(x, y + radius * np.sin(a), z + radius * np.cos(a)) for a in angles]
    return polygon(points, colour)


def _wheel(x: float, y: float, z: float, radius: float) -> Mesh:
    side = 1 if x > 0 else -1
    return layers(
        _side_disc(x, y, z, radius, RUBBER),
        _side_disc(x + 0.01 * side, y, z, radius * 0.55, (150, 152, 155)),
        _side_disc(x + 0.02 * side, y, z, radius * 0.2, (70, 72, 75)),
    )


def car(rng: np.random.Generator) -> list[Mesh]:
    """Return a car, 4.2 m long, its rear towards the camera."""
    colour = pick(rng, CAR_COLOURS)
    tall = float(rng.choice([0.0, 0.0, 0.25]))
    rear = float(rng.choice([-1.95, -1.5]))
    body = prism(
        [(-2.1, 0.35), (-2.12, 0.8), (-1.95, 0.92), (1.3, 0.9), (2.05, 0.74), (2.1, 0.35)],
        1.8,
        colour,
    )
    details = [
        flat([(-0.88, 0.78), (-0.55, 0.78), (-0.55, 0.62), (-0.88, 0.62)], (190, 30, 28), -2.13),
        flat([(0.88, 0.78), (0.55, 0.78), (0.55, 0.62), (0.88, 0.62)], (190, 30, 28), -2.13),
        rectangle(-0.28, 0.5, 0.28, 0.64, WHITE, -2.14),
        rectangle(-0.9, 0.35, 0.9, 0.45, (45, 46, 48), -2.14),
        flat([(-0.85, 0.72), (-0.5, 0.72), (-0.5, 0.56), (-0.85, 0.56)], (240, 238, 215), 2.12),
        flat([(0.85, 0.72), (0.5, 0.72), (0.5, 0.56), (0.85, 0.56)], (240, 238, 215), 2.12),
        rectangle(-0.45, 0.5, 0.45, 0.66, (35, 36, 38), 2.13),
    ]
    for x in (-0.91, 0.91):
        details += [_wheel(x, 0.32, z, 0.34) for z in (-1.3, 1.3)]
        door = [(x, 0.88, -0.05), (x, 0.88, 0.0), (x, 0.42, 0.0), (x, 0.42, -0.05)]
        details.append(polygon(door, shade(colour, 0.5)))
    lower = solid(body, *details)
    top = 1.42 + tall
    hull = prism([(rear - 0.35, 0.9), (rear, top), (0.35, top), (1.1, 0.9)], 1.6, colour)
    panes = []
    for x in (-0.81, 0.81):
        for z0, z1, z2, z3 in (
            (rear + 0.05, -0.45, -0.45, rear - 0.12),
            (-0.35, 0.3, 0.78, -0.35),
        ):
            corners = [(x, top - 0.07, z0), (x, top - 0.07, z1), (x, 0.98, z2), (x, 0.98, z3)]
            panes.append(polygon(corners, GLASS))
    back = [(-0.68, top - 0.08, rear - 0.04), (0.68, top - 0.08, rear - 0.04)]
    back += [(0.72, 0.98, rear - 0.34), (-0.72, 0.98, rear - 0.34)]
    front = [(-0.68, top - 0.08, 0.44), (0.68, top - 0.08, 0.44), (0.72, 0.96, 1.09)]
    front += [(-0.72, 0.96, 1.09)]
    return [lower, solid(hull, polygon(back, GLASS), polygon(front, GLASS), *panes)]


def truck(rng: np.random.Generator, load: list[Mesh] | None = None) -> list[Mesh]:
    """Return a flat-bed truck, 7 m long, its rear towards the camera.

    Args:
        rng: of its colours and its harmless load.
        load: meshes standing on the bed (y = 1.1, z from -3.2 to 1.2) instead of a harmless one.
    """
    colour = pick(rng, CAR_COLOURS)
    details = [
        rectangle(-1.1, 0.75, -0.75, 0.95, (190, 30, 28), -3.42),
        rectangle(0.75, 0.75, 1.1, 0.95, (190, 30, 28), -3.42),
        rectangle(-0.3, 0.74, 0.3, 0.9, WHITE, -3.42),
    ]
    wheels = [_wheel(x, 0.48, z, 0.48) for x in (-1.19, 1.19) for z in (-2.4, -1.2, 2.4)]
    chassis = solid(box((2.36, 0.45, 6.8), (66, 66, 70), at=(0, 0.6, 0)), *details, *wheels)
    cab_hull = box((2.3, 2.0, 1.7), colour, at=(0, 0.9, 2.4))
    cab_panes = [rectangle(-1.0, 1.9, 1.0, 2.7, GLASS, 3.27)]
    cab_panes += [rectangle(-0.8, 1.9, 0.8, 2.6, shade(GLASS, 0.8), 1.53)]
    for x in (-1.16, 1.16):
        window = [(x, 2.65, 1.9), (x, 2.65, 3.0), (x, 1.9, 3.1), (x, 1.9, 1.9)]
        cab_panes.append(polygon(window, GLASS))
    cab = solid(cab_hull, *cab_panes)
    board = shade(colour, 0.8)
    bed = [
        solid(box((2.36, 0.12, 4.8), shade(WOOD[0], 0.9), at=(0, 1.02, -0.95))),
        solid(box((0.06, 0.35, 4.8), board, at=(-1.16, 1.1, -0.95))),
        solid(box((0.06, 0.35, 4.8), board, at=(1.16, 1.1, -0.95))),
    ]
    tailboard = solid(box((2.36, 0.3, 0.06), board, at=(0, 1.1, -3.36)))
    return [chassis, cab, *bed, *(load if load is not None else harmless_load(rng)), tailboard]


def harmless_load(rng: np.random.Generator) -> list[Mesh]:
    """Return boxes, logs, pipes, a container or nothing for a truck's bed."""
    kind = int(rng.integers(5))
    if kind == 0:
        return [
            solid(
                box(
                    (float(rng.uniform(0.6, 1.0)), float(rng.uniform(0.5, 1.1)), 0.9),
                    shade(pick(rng, WOOD), 1.25),
                    at=(x, 1.14, z),
                )
            )
            for z in (0.6, -0.6, -1.8, -2.8)
            for x in (-0.55, 0.5)
            if rng.random() < 0.8
        ]
    if kind in (1, 2):
        colour = pick(rng, WOOD) if kind == 1 else STEEL
        rods = []
        for level, xs in enumerate(((-0.8, -0.3, 0.2, 0.7), (-0.55, -0.05, 0.45), (-0.3, 0.2))):
            for x in xs:
                y = 1.4 + 0.42 * level
                hull = box((0.44, 0.44, 4.2), shade(colour, 0.9), at=(x, y - 0.22, -1.0))
                end = disc(x, y, 0.22, shade(colour, 1.35 if kind == 1 else 0.8), z=-3.12)
                inner = disc(x, y, 0.15, shade(colour, 1.1 if kind == 1 else 0.3), z=-3.13)
                rods.append(solid(hull, end, inner))
        return rods
    if kind == 3:
        colour = pick(rng, CAR_COLOURS)
        ribs = [
            rectangle(x, 1.2, x + 0.06, 3.1, shade(colour, 0.75), -3.22)
            for x in np.arange(-1.05, 1.1, 0.35)
        ]
        return [solid(box((2.3, 2.1, 4.4), colour, at=(0, 1.14, -1.0)), *ribs)]
    return []


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
    """Return the head of a traffic light, 1 m high, its lamps towards the camera.

    Args:
        lit: the lamp that is on: 0 red, 1 amber, 2 green.
    """
    colours = ((225, 40, 30), (240, 170, 40), (60, 210, 110))
    lamps = []
    for place, colour in enumerate(colours):
        y = 0.83 - 0.31 * place
        on = place == lit
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
    """Return a billboard of 4 x 2.2 m on two posts, its advert towards the camera.

    Args:
        advert: (h, w, 3) uint8 picture.
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
