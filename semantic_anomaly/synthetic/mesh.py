"""Meshes of coloured planar faces, in metres: convex solids and flat layers.

Axes: x right, y up, z forward (along the street).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

Colour = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Face:
    """One convex planar polygon.

    Attributes:
        points: (n, 3) float64 corners in metres.
        colour: RGB in 0..255.
        texture: (h, w, 3) uint8 over the corners of a quad (top left, top right, bottom right,
            bottom left), or None.
        odd: whether the face belongs to an anomaly.
    """

    points: np.ndarray
    colour: Colour
    texture: np.ndarray | None = None
    odd: bool = False


@dataclass(frozen=True, eq=False)
class Mesh:
    """Faces in drawing order.

    Attributes:
        faces: the hull of a convex solid and what is painted on it, or flat layers.
        solid: whether faces turned away from the camera are skipped.
    """

    faces: tuple[Face, ...]
    solid: bool = False

    def moved(
        self,
        x: float = 0.0,
        y: float = 0.0,
        z: float = 0.0,
        *,
        yaw: float = 0.0,
        roll: float = 0.0,
        scale: float = 1.0,
    ) -> Mesh:
        """Return the mesh scaled, rolled (about z), yawed (about y) and then shifted."""
        c, s = np.cos(roll), np.sin(roll)
        rotation = yaw_matrix(yaw) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
        transposed, shift = (rotation * scale).T, np.array([x, y, z])
        faces = (replace(face, points=face.points @ transposed + shift) for face in self.faces)
        return Mesh(tuple(faces), self.solid)

    def as_odd(self) -> Mesh:
        """Return the mesh with all faces marked as odd."""
        return Mesh(tuple(replace(face, odd=True) for face in self.faces), self.solid)


def solid(*meshes: Mesh) -> Mesh:
    """Return a convex solid with all faces turned outwards.

    Args:
        *meshes: the hull, then what is painted on it.
    """
    centre = np.concatenate([face.points for face in meshes[0].faces]).mean(axis=0)
    turned = []
    for face in layers(*meshes).faces:
        normal = np.cross(face.points[1] - face.points[0], face.points[2] - face.points[0])
        inwards = normal @ (face.points.mean(axis=0) - centre) < 0
        # The corners of a texture have a fixed order, so its quad is mirrored.
        if inwards and face.texture is not None:
            face = replace(face, points=face.points[[1, 0, 3, 2]])
        elif inwards:
            face = replace(face, points=face.points[::-1])
        turned.append(face)
    return Mesh(tuple(turned), solid=True)


def layers(*meshes: Mesh) -> Mesh:
    """Return flat layers, visible from both sides, in drawing order."""
    return Mesh(tuple(face for mesh in meshes for face in mesh.faces))


def yaw_matrix(angle: float) -> np.ndarray:
    """Return the (3, 3) rotation about y by an angle in radians."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def shade(colour: Colour, factor: float) -> Colour:
    """Return the colour times a factor, clipped to 0..255."""
    r, g, b = (float(min(255.0, max(0.0, channel * factor))) for channel in colour)
    return r, g, b


def polygon(
    points: Sequence[Sequence[float]], colour: Colour, texture: np.ndarray | None = None
) -> Mesh:
    """Return a mesh of one face."""
    return Mesh((Face(np.asarray(points, float), colour, texture),))


def flat(points_xy: Sequence[Sequence[float]], colour: Colour, z: float = 0.0) -> Mesh:
    """Return one face in a plane of constant z."""
    return polygon([(x, y, z) for x, y in points_xy], colour)


def rectangle(x0: float, y0: float, x1: float, y1: float, colour: Colour, z: float = 0.0) -> Mesh:
    """Return an upright rectangle facing along z."""
    return flat([(x0, y1), (x1, y1), (x1, y0), (x0, y0)], colour, z)


def disc(
    x: float,
    y: float,
    radius: float,
    colour: Colour,
    *,
    n: int = 12,
    z: float = 0.0,
    squash: float = 1.0,
) -> Mesh:
    """Return an upright ellipse as a polygon of n corners."""
    angles = (np.arange(n) + 0.5) * 2 * np.pi / n
    xs, ys = x + radius * np.cos(angles), y + radius * squash * np.sin(angles)
    return flat(np.stack([xs, ys], 1).tolist(), colour, z)


def box(
    size: tuple[float, float, float],
    colour: Colour,
    *,
    at: tuple[float, float, float] = (0.0, 0.0, 0.0),
    textures: dict[str, np.ndarray] | None = None,
) -> Mesh:
    """Return the hull of a box, lit from above and the left.

    Args:
        size: width (x), height (y), length (z).
        colour: RGB.
        at: centre of its bottom.
        textures: by side: back (towards the camera), front, left, right.
    """
    (w, h, d), (x, y, z) = size, at
    x0, x1, y1, z0, z1 = x - w / 2, x + w / 2, y + h, z - d / 2, z + d / 2
    quads = {
        "back": ([(x0, y1, z0), (x1, y1, z0), (x1, y, z0), (x0, y, z0)], 0.88),
        "front": ([(x1, y1, z1), (x0, y1, z1), (x0, y, z1), (x1, y, z1)], 0.8),
        "left": ([(x0, y1, z1), (x0, y1, z0), (x0, y, z0), (x0, y, z1)], 1.0),
        "right": ([(x1, y1, z0), (x1, y1, z1), (x1, y, z1), (x1, y, z0)], 0.72),
        "top": ([(x0, y1, z1), (x1, y1, z1), (x1, y1, z0), (x0, y1, z0)], 1.15),
        "bottom": ([(x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)], 0.45),
    }
    textures = textures or {}
    faces = (
        Face(np.array(points), shade(colour, light), textures.get(name))
        for name, (points, light) in quads.items()
    )
    return Mesh(tuple(faces))


def prism(profile_zy: Sequence[Sequence[float]], width: float, colour: Colour) -> Mesh:
    """Return the hull of a convex profile in the z-y plane extruded over a width in x."""
    profile = np.asarray(profile_zy, float)
    left = np.column_stack([np.full(len(profile), -width / 2), profile[:, 1], profile[:, 0]])
    right = left * (-1, 1, 1)
    middle = profile[:, 1].mean()
    faces = [Face(left, shade(colour, 1.0)), Face(right, shade(colour, 0.75))]
    for i in range(len(profile)):
        j = (i + 1) % len(profile)
        slope = abs(profile[j, 0] - profile[i, 0]) / (np.hypot(*(profile[j] - profile[i])) + 1e-9)
        above = (profile[i, 1] + profile[j, 1]) / 2 > middle
        light = 0.85 + 0.3 * slope if above else 0.85 - 0.4 * slope
        faces.append(Face(np.array([left[i], left[j], right[j], right[i]]), shade(colour, light)))
    return Mesh(tuple(faces))
