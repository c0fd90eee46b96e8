"""Anomalies: odd objects, and odd arrangements of nominal parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from semantic_anomaly.synthetic.mesh import (
    Colour,
    Mesh,
    box,
    disc,
    flat,
    layers,
    prism,
    rectangle,
    shade,
    solid,
)
from semantic_anomaly.synthetic.props import (
    CAR_COLOURS,
    STEEL,
    WOOD,
    billboard,
    person,
    pick,
    pole,
    stop_sign_face,
    traffic_light,
    traffic_light_head,
    tree,
)
from semantic_anomaly.synthetic.textures import advert
from semantic_anomaly.synthetic.vehicles import car, truck


def cow(rng: np.random.Generator) -> list[Mesh]:
    """Return a cow of 1.5 m, seen from the side."""
    hide: Colour = pick(rng, ((120, 84, 60), (215, 208, 198), (60, 48, 42), (150, 110, 74)))
    patch = (45.0, 40.0, 38.0) if sum(hide) > 400 else shade(hide, 1.5)
    facing = float(rng.choice([-1.0, 1.0]))
    legs = [
        flat([(x, 0.75), (x + 0.16, 0.75), (x + 0.13, 0.0), (x + 0.03, 0.0)], shade(hide, light))
        for x, light in ((-0.62, 0.7), (0.42, 0.7), (-0.8, 0.9), (0.6, 0.9))
    ]
    body = flat(
        [(-0.95, 1.3), (-0.7, 1.42), (0.7, 1.4), (0.85, 1.25), (0.82, 0.75), (0.3, 0.62),
         (-0.5, 0.6), (-0.9, 0.75)], hide)  # fmt: skip
    spots = [
        disc(float(rng.uniform(-0.6, 0.6)), float(rng.uniform(0.85, 1.25)), 0.17, patch, n=7)
        for _ in range(4)
    ]
    neck = flat([(0.6, 1.38), (1.05, 1.55), (1.15, 1.2), (0.78, 0.95)], hide)
    head = flat(
        [(0.98, 1.62), (1.2, 1.6), (1.48, 1.25), (1.38, 1.12), (1.05, 1.25)], shade(hide, 0.95)
    )
    muzzle = flat([(1.36, 1.32), (1.5, 1.25), (1.4, 1.1), (1.3, 1.14)], (200, 150, 140))
    ear = flat([(0.98, 1.62), (0.86, 1.7), (0.9, 1.56)], shade(hide, 0.7))
    horn = flat([(1.08, 1.61), (1.12, 1.78), (1.16, 1.6)], (205, 198, 180))
    tail = flat([(-0.95, 1.28), (-0.9, 1.25), (-1.0, 0.65), (-1.06, 0.65)], shade(hide, 0.8))
    udder = disc(-0.45, 0.62, 0.13, (205, 160, 150), n=8)
    mesh = layers(*legs, tail, udder, body, *spots, neck, ear, horn, head, muzzle)
    return [mesh.moved(yaw=0.0 if facing > 0 else np.pi)]


def sofa(rng: np.random.Generator) -> list[Mesh]:
    """Return a sofa, 2 m wide, facing the camera or turned from it."""
    colour = pick(rng, CAR_COLOURS)
    hulls = [
        box((2.0, 0.9, 0.25), colour, at=(0, 0.05, 0.35)),
        box((1.7, 0.42, 0.8), shade(colour, 0.85), at=(0, 0.05, -0.1)),
        *(box((0.8, 0.16, 0.75), shade(colour, 1.15), at=(x, 0.47, -0.12)) for x in (-0.42, 0.42)),
        *(box((0.22, 0.62, 0.95), shade(colour, 0.95), at=(x, 0.05, -0.02)) for x in (-0.95, 0.95)),
    ]
    yaw = float(rng.uniform(-0.7, 0.7))
    return [solid(hull).moved(yaw=yaw) for hull in hulls]


def ladder(rng: np.random.Generator) -> list[Mesh]:
    """Return a ladder of 4 m, lying on its side across the road."""
    colour = pick(rng, (*WOOD, STEEL))
    rails = [
        rectangle(-2.0, y, 2.0, y + 0.09, shade(colour, light))
        for y, light in ((0.0, 0.8), (0.62, 1.2))
    ]
    rungs = [rectangle(x, 0.05, x + 0.07, 0.66, colour) for x in np.arange(-1.85, 1.9, 0.33)]
    tilt = float(rng.uniform(-0.06, 0.06))
    return [layers(*rungs, *rails).moved(y=2.0 * abs(np.sin(tilt)), roll=tilt)]


def fallen_tree(rng: np.random.Generator) -> list[Mesh]:
    """Return a tree lying across the road, its crown to one side."""
    side = float(rng.choice([-1.0, 1.0]))
    lying = [
        part.moved(x=side * 2.5, y=0.45, roll=side * np.pi / 2, scale=0.75) for part in tree(rng)
    ]
    bark = shade(pick(rng, WOOD), 0.7)
    trunk = solid(prism([(-0.25, 0), (-0.25, 0.5), (0.25, 0.5), (0.25, 0)], 3.4, bark))
    root = layers(
        disc(side * 2.6, 0.5, 0.5, shade(bark, 0.6), n=8),
        disc(side * 2.62, 0.5, 0.2, shade(bark, 1.4), n=8),
    )
    return [*lying, trunk.moved(x=side * 0.9), root]


def overturned_car(rng: np.random.Generator) -> list[Mesh]:
    """Return a car on its roof, its chassis to the sky."""
    yaw = float(rng.uniform(-1.3, 1.3))
    wheels = [
        solid(box((0.24, 0.6, 0.62), (30, 30, 32), at=(x, 0.02, z)))
        for x in (-0.78, 0.78)
        for z in (-1.3, 1.3)
    ]
    parts = [solid(box((1.7, 0.05, 3.9), (50, 50, 52), at=(0, 0.3, 0))), *wheels, *car(rng)]
    # Upside down, the cabin is drawn first.
    return [part.moved(y=1.42, roll=np.pi).moved(yaw=yaw) for part in reversed(parts)]


def stop_sign_on_billboard(rng: np.random.Generator) -> list[Mesh]:
    """Return a billboard whose advert shows a stop sign."""
    *posts, board = billboard(advert(rng))
    x, y = float(rng.uniform(-0.9, 0.9)), float(rng.uniform(2.95, 3.25))
    sign = stop_sign_face(float(rng.uniform(0.55, 0.8))).moved(x=x, y=y, z=-0.1)
    # One solid: the sign is drawn after the board.
    return [*posts, solid(board, sign.as_odd())]


def traffic_lights_on_truck(rng: np.random.Generator) -> list[Mesh]:
    """Return a truck that carries two to four traffic lights."""
    count = int(rng.integers(2, 5))
    load = []
    for number in range(count):
        x = (number - (count - 1) / 2) * 0.6
        head = traffic_light_head(int(rng.integers(3)))
        post = pole(0.8, 0.07, (70, 72, 72)).moved(x=x, y=1.1, z=-2.5)
        load += [post.as_odd(), head.moved(x=x, y=1.75, z=-2.5).as_odd()]
    return truck(rng, load)


def person_on_car_roof(rng: np.random.Generator) -> list[Mesh]:
    """Return a car with a person standing on its roof."""
    return [*car(rng), *(part.moved(y=1.4, z=-0.4).as_odd() for part in person(rng))]


def car_across_sidewalk(rng: np.random.Generator) -> list[Mesh]:
    """Return a car turned crosswise."""
    yaw = float(rng.choice([-1.0, 1.0])) * (np.pi / 2 + float(rng.uniform(-0.25, 0.25)))
    return [part.moved(yaw=yaw) for part in car(rng)]


def traffic_light_on_road(rng: np.random.Generator) -> list[Mesh]:
    """Return a traffic light lying on its side with its pole."""
    side = float(rng.choice([-1.0, 1.0]))
    return [part.moved(x=side * 1.6, y=0.2, roll=side * np.pi / 2) for part in traffic_light(rng)]


@dataclass(frozen=True)
class Oddity:
    """How to make and place a kind of anomaly.

    Attributes:
        make: returns the meshes.
        lateral: range of x in metres.
        footprint: half width and half length of the shadow.
        whole: class of the thing if it is a nominal class, else empty.
        odd_part: class of the odd part if only a part is odd, else empty.
    """

    make: Callable[[np.random.Generator], list[Mesh]]
    lateral: tuple[float, float]
    footprint: tuple[float, float]
    whole: str = ""
    odd_part: str = ""


ODD_OBJECTS: dict[str, Oddity] = {
    "cow": Oddity(cow, (-3.6, 1.2), (1.1, 0.35)),
    "sofa": Oddity(sofa, (-3.6, 1.2), (1.1, 0.7)),
    "ladder": Oddity(ladder, (-3.2, 0.6), (2.0, 0.2)),
    "fallen_tree": Oddity(fallen_tree, (-2.6, 0.6), (2.4, 0.8)),
    "overturned_car": Oddity(overturned_car, (-3.6, 1.2), (1.6, 2.0)),
}
ODD_ARRANGEMENTS: dict[str, Oddity] = {
    "stop_sign_on_billboard": Oddity(
        stop_sign_on_billboard, (8.6, 9.4), (2.0, 0.2), "billboard", "stop_sign"
    ),
    "traffic_lights_on_truck": Oddity(
        traffic_lights_on_truck, (2.9, 3.2), (1.2, 3.4), "truck", "traffic_light"
    ),
    "person_on_car_roof": Oddity(person_on_car_roof, (2.9, 3.2), (0.95, 2.15), "car", "person"),
    "car_across_sidewalk": Oddity(car_across_sidewalk, (5.4, 6.2), (2.1, 1.0), "car"),
    "traffic_light_on_road": Oddity(
        traffic_light_on_road, (-3.4, 1.0), (1.5, 0.2), "traffic_light"
    ),
}
ODDITIES = ODD_OBJECTS | ODD_ARRANGEMENTS
