"""Cars and trucks, standing on y = 0 with the rear towards the camera (-z)."""

from __future__ import annotations

import itertools

import numpy as np

from semantic_anomaly.synthetic.mesh import (
    Colour,
    Mesh,
    box,
    disc,
    layers,
    polygon,
    prism,
    rectangle,
    shade,
    solid,
)
from semantic_anomaly.synthetic.props import CAR_COLOURS, GLASS, RUBBER, STEEL, WHITE, WOOD, pick

TAIL_LIGHT: Colour = (190, 30, 28)


def _wheel(x: float, y: float, z: float, radius: float) -> Mesh:
    def disc_of(offset: float, share: float, colour: Colour) -> Mesh:
        r, angles = radius * share, np.arange(14) * 2 * np.pi / 14
        side = x + offset * np.sign(x)
        return polygon([(side, y + r * np.sin(a), z + r * np.cos(a)) for a in angles], colour)

    tyre, rim = disc_of(0.0, 1.0, RUBBER), disc_of(0.01, 0.55, (150, 152, 155))
    return layers(tyre, rim, disc_of(0.02, 0.2, (70, 72, 75)))


def car(rng: np.random.Generator) -> list[Mesh]:
    """Return a car, 4.3 m long, its rear towards the camera."""
    colour = pick(rng, CAR_COLOURS)
    tall = float(rng.choice([0.0, 0.0, 0.25]))
    rear = float(rng.choice([-1.95, -1.5]))
    body = prism(
        [(-2.1, 0.35), (-2.12, 0.8), (-1.95, 0.92), (1.3, 0.9), (2.05, 0.74), (2.1, 0.35)],
        1.8,
        colour,
    )
    details = [
        *(rectangle(s * 0.88, 0.62, s * 0.55, 0.78, TAIL_LIGHT, -2.13) for s in (-1, 1)),
        rectangle(-0.28, 0.5, 0.28, 0.64, WHITE, -2.14),
        rectangle(-0.9, 0.35, 0.9, 0.45, (45, 46, 48), -2.14),
        *(rectangle(s * 0.85, 0.56, s * 0.5, 0.72, (240, 238, 215), 2.12) for s in (-1, 1)),
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
        rng: of its colours and its nominal load.
        load: meshes on the bed (y = 1.1, z from -3.2 to 1.2) instead of a random nominal load.
    """
    colour = pick(rng, CAR_COLOURS)
    details = [
        rectangle(-1.1, 0.75, -0.75, 0.95, TAIL_LIGHT, -3.42),
        rectangle(0.75, 0.75, 1.1, 0.95, TAIL_LIGHT, -3.42),
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
        *(solid(box((0.06, 0.35, 4.8), board, at=(x, 1.1, -0.95))) for x in (-1.16, 1.16)),
    ]
    tailboard = solid(box((2.36, 0.3, 0.06), board, at=(0, 1.1, -3.36)))
    return [chassis, cab, *bed, *(_nominal_load(rng) if load is None else load), tailboard]


def _nominal_load(rng: np.random.Generator) -> list[Mesh]:
    """Return boxes, logs, pipes, a container or nothing."""
    kind = int(rng.integers(5))
    if kind == 0:
        crates = []
        for z, x in itertools.product((0.6, -0.6, -1.8, -2.8), (-0.55, 0.5)):
            if rng.random() < 0.8:
                size = float(rng.uniform(0.6, 1.0)), float(rng.uniform(0.5, 1.1)), 0.9
                crates.append(solid(box(size, shade(pick(rng, WOOD), 1.25), at=(x, 1.14, z))))
        return crates
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
