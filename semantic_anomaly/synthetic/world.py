"""The world of a seed: things along the street, traffic, and the look of the day."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from semantic_anomaly.synthetic import props, vehicles
from semantic_anomaly.synthetic.mesh import Mesh, box, layers, polygon, shade, solid
from semantic_anomaly.synthetic.oddities import ODDITIES
from semantic_anomaly.synthetic.textures import advert, facade, ground

VIEW_M = 95.0
# Length before an anomaly beside the lane in which nothing hides it.
CLEAR_BEFORE_M = 20.0


@dataclass(frozen=True, eq=False)
class Thing:
    """One object of the street.

    Attributes:
        cls: class name.
        meshes: in axes of the object, already turned.
        x, z: position of the origin in metres, at time 0.
        speed_z: metres per second along the street.
        footprint: half width and half length of the shadow.
        kind: kind of anomaly, empty for nominal things.
        odd_part: class name of the odd part if only a part is odd, else empty.
        odd_z: position of the odd part along the street, relative to the origin.
    """

    cls: str
    meshes: tuple[Mesh, ...]
    x: float
    z: float
    speed_z: float = 0.0
    footprint: tuple[float, float] = (0.3, 0.3)
    kind: str = ""
    odd_part: str = ""
    odd_z: float = 0.0


@dataclass(frozen=True)
class Day:
    """Light, haze and sensor of a drive.

    Attributes:
        light: RGB factors on every colour.
        sky_top, sky_low: RGB of the sky.
        haze_per_m: extinction coefficient.
        gain: exposure factor.
        noise: standard deviation of the sensor noise in grey levels.
        blur: standard deviation of the lens blur in pixels.
        shadow: light factor in shadows.
    """

    light: tuple[float, float, float]
    sky_top: tuple[float, float, float]
    sky_low: tuple[float, float, float]
    haze_per_m: float
    gain: float
    noise: float
    blur: float
    shadow: float


@dataclass(frozen=True, eq=False)
class World:
    """The nominal things of a street, its ground texture, and light and sensor of the drive."""

    things: tuple[Thing, ...]
    ground: np.ndarray
    day: Day


def make_day(rng: np.random.Generator) -> Day:
    """Return a random day: warm or cool, bright or dim, clear or hazy."""
    warm = float(rng.uniform(-0.1, 0.12))
    level = float(rng.uniform(0.72, 1.08))
    blue = rng.uniform(0.0, 1.0)
    top = np.array((150, 165, 185)) * (1 - blue) + np.array((86, 132, 196)) * blue
    low = np.array((205, 208, 210)) * (1 - 0.4 * blue) + np.array((215, 190, 160)) * 0.4 * blue
    return Day(
        light=(level * (1 + warm), level, level * (1 - warm)),
        sky_top=tuple((top * level).tolist()),
        sky_low=tuple((low * min(1.0, level * 1.05)).tolist()),
        haze_per_m=float(rng.choice([0.001, 0.004, 0.008, 0.013]) * rng.uniform(0.7, 1.3)),
        gain=float(rng.uniform(0.88, 1.14)),
        noise=float(rng.uniform(1.0, 4.5)),
        blur=float(rng.uniform(0.3, 0.75)),
        shadow=float(rng.uniform(0.5, 0.85)),
    )


def make_world(seed: int, length_m: float) -> World:
    """Return the nominal world of a seed.

    Args:
        seed: of layout, looks and traffic.
        length_m: length of the drive in metres.
    """
    root = np.random.SeedSequence(seed)
    layout, looks, traffic = (np.random.default_rng(s) for s in root.spawn(3))
    things: list[Thing] = []
    end = length_m + VIEW_M
    for side in (-1, 1):
        _line_with_houses(things, layout, side, end)
        _line_with_furniture(things, layout, side, end)
    _add_traffic(things, traffic, end)
    return World(tuple(things), ground(looks), make_day(looks))


def _yawed(meshes: list[Mesh], yaw: float) -> tuple[Mesh, ...]:
    return tuple(mesh.moved(yaw=yaw) for mesh in meshes) if yaw else tuple(meshes)


def _vehicle(
    cls: str, meshes: list[Mesh], yaw: float, x: float, z: float, speed: float = 0.0
) -> Thing:
    footprint = (1.2, 3.4) if cls == "truck" else (0.95, 2.15)
    return Thing(cls, _yawed(meshes, yaw), x, z, speed, footprint)


def _house(rng: np.random.Generator, side: int) -> tuple[list[Mesh], float]:
    width, length = float(rng.uniform(7, 12)), float(rng.uniform(7, 15))
    height = float(rng.choice([3.2, 6.0, 6.4, 9.2])) * float(rng.uniform(0.95, 1.1))
    wall = facade(rng, length, height)
    gable = facade(rng, width, height)
    sides = {"left" if side > 0 else "right": wall, "back": gable}
    hull = solid(box((width, height, length), (170, 160, 150), textures=sides))
    roof = shade(
        (128, 70, 54) if rng.random() < 0.5 else (84, 84, 90), float(rng.uniform(0.7, 1.2))
    )
    rise, a, b = float(rng.uniform(1.2, 3.0)), width / 2 + 0.3, length / 2 + 0.3
    top = height + rise
    roof_faces = [
        polygon([(-a, height, z), (a, height, z), (0, top, z)], shade(roof, 0.8)) for z in (-b, b)
    ] + [
        polygon([(x, height, -b), (0, top, -b), (0, top, b), (x, height, b)], roof) for x in (-a, a)
    ]
    return [hull, solid(layers(*roof_faces))], length


def _line_with_houses(things: list[Thing], rng: np.random.Generator, side: int, end: float) -> None:
    z = -15.0
    while z < end:
        meshes, length = _house(rng, side)
        z += length / 2
        edge = 10.2 if side > 0 else 13.2
        x = side * (edge + float(rng.uniform(5.5, 8.0)))
        things.append(Thing("house", tuple(meshes), x, z, footprint=(0.1, 0.1)))
        gap = float(rng.choice([1.5, 3.0, 9.0]))
        if gap > 5 and rng.random() < 0.7:
            parked = _yawed(vehicles.car(rng), side * np.pi / 2)
            driveway_x = side * (edge + float(rng.uniform(1.0, 2.5)))
            things.append(Thing("car", parked, driveway_x, z + length / 2 + 4.5, 0.0, (2.1, 0.9)))
        z += length / 2 + gap


_Maker = Callable[[np.random.Generator], list[Mesh]]
_Range = tuple[float, float]
# class, maker, metres between two, lateral range on the right and on the left, footprint
_FURNITURE: tuple[tuple[str, _Maker, float, _Range, _Range, _Range], ...] = (
    ("tree", props.tree, 11.0, (7.6, 9.6), (-12.8, -11.0), (1.2, 1.2)),
    ("hedge", props.hedge, 19.0, (8.0, 9.4), (-12.6, -11.4), (0.5, 1.5)),
    ("lamp_post", props.lamp_post, 31.0, (4.6, 4.9), (-8.4, -8.0), (0.1, 0.1)),
    ("bin", props.bin_, 37.0, (6.7, 7.1), (-10.6, -10.2), (0.3, 0.3)),
    ("bench", props.bench, 43.0, (6.6, 7.0), (-10.6, -10.2), (0.8, 0.3)),
    ("person", props.person, 9.0, (4.9, 6.9), (-10.4, -8.2), (0.25, 0.2)),
    ("traffic_light", props.traffic_light, 41.0, (4.4, 4.7), (-8.2, -7.9), (0.1, 0.1)),
    ("stop_sign", props.stop_sign, 38.0, (4.5, 4.9), (-8.4, -8.0), (0.1, 0.1)),
)  # fmt: skip


def _line_with_furniture(
    things: list[Thing], rng: np.random.Generator, side: int, end: float
) -> None:
    for cls, maker, spacing, right, left, footprint in _FURNITURE:
        z = float(rng.uniform(2.0, spacing))
        while z < end:
            x = float(rng.uniform(*(right if side > 0 else left)))
            walks = float(rng.uniform(-1.2, 1.2)) if cls == "person" else 0.0
            things.append(Thing(cls, tuple(maker(rng)), x, z, walks, footprint))
            z += spacing * float(rng.uniform(0.5, 1.6))
    z = float(rng.uniform(5, 40))
    while z < end:
        x = float(rng.uniform(8.6, 9.4)) if side > 0 else float(rng.uniform(-12.6, -11.8))
        board = tuple(props.billboard(advert(rng)))
        things.append(Thing("billboard", board, x, z, 0.0, (2.0, 0.2)))
        z += float(rng.uniform(28, 60))
    z = float(rng.uniform(-8, 6))
    while z < end:
        x = (3.05 if side > 0 else -6.5) + float(rng.uniform(-0.15, 0.15))
        yaw = 0.0 if side > 0 or rng.random() < 0.2 else np.pi
        if rng.random() < 0.16:
            things.append(_vehicle("truck", vehicles.truck(rng), yaw, x, z))
            z += 5.0
        elif rng.random() < 0.55:
            car = vehicles.car(rng)
            things.append(_vehicle("car", car, yaw + float(rng.normal(0, 0.02)), x, z))
        z += float(rng.uniform(5.4, 8.0))


def _add_traffic(things: list[Thing], rng: np.random.Generator, end: float) -> None:
    z = float(rng.uniform(20, 60))
    while z < 2.2 * end:
        x, speed = float(rng.uniform(-3.8, -3.3)), -float(rng.uniform(6, 11))
        if rng.random() < 0.25:
            things.append(_vehicle("truck", vehicles.truck(rng), np.pi, x, z, speed))
        else:
            things.append(_vehicle("car", vehicles.car(rng), np.pi, x, z, speed))
        z += float(rng.uniform(25, 90))


def make_oddity(kind: str, seed: int, z: float) -> Thing:
    """Return an anomaly with its odd part at z metres along the street.

    Args:
        kind: kind of anomaly.
        seed: of its look and lateral position.
        z: position along the street in metres.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, sum(kind.encode()), 77]))
    oddity = ODDITIES[kind]
    x = float(rng.uniform(*oddity.lateral))
    meshes = tuple(oddity.make(rng))
    if not oddity.odd_part:
        meshes = tuple(mesh.as_odd() for mesh in meshes)
    cls, part = oddity.whole or kind, oddity.odd_part
    points = [face.points for mesh in meshes for face in mesh.faces if face.odd]
    middle = float(np.concatenate(points)[:, 2].mean())
    return Thing(cls, meshes, x, z - middle, 0.0, oddity.footprint, kind, part, middle)


def leaves_visible(things: Sequence[Thing], oddity: Thing, times: np.ndarray) -> list[bool]:
    """Return for each thing whether it neither overlaps nor hides the anomaly.

    Args:
        things: the nominal things.
        oddity: the anomaly.
        times: (n,) seconds at which the anomaly is visible.
    """
    kept = []
    for thing in things:
        beside = abs(thing.x - oddity.x) < thing.footprint[0] + oddity.footprint[0] + 0.4
        reach = thing.footprint[1] + oddity.footprint[1]
        ahead = thing.z + thing.speed_z * times - oddity.z
        overlaps = beside and bool(np.any((-reach - 5.0 < ahead) & (ahead < reach + 0.5)))
        # A thing between the lane and the anomaly hides it from the camera.
        between = 2.0 < thing.x < oddity.x + 0.8
        hides = between and bool(np.any((ahead > -CLEAR_BEFORE_M) & (ahead < reach)))
        kept.append(thing.cls == "house" or not (overlaps or hides))
    return kept
