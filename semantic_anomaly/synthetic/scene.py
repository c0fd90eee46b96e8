"""Data shared by all frames of a drive: camera, lit ground, and lit meshes of the things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from semantic_anomaly.synthetic.mesh import Mesh
from semantic_anomaly.synthetic.world import Day, Thing

NEAR_M = 0.6


@dataclass(frozen=True)
class CameraModel:
    """A pinhole camera; optical frame: x right, y down, z forward.

    Attributes:
        fx, fy, cx, cy: in pixels.
        image_hw: (height, width) in pixels.
        height_m: above the ground.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    image_hw: tuple[int, int]
    height_m: float


class LitMesh:
    """The faces of a mesh as arrays, with colours and textures under the light of the day.

    Attributes:
        solid: whether faces turned away from the camera are skipped.
        points: (n, 3) float64 corners of all faces in metres.
        begins, ends, counts: rows of `points` by face.
        centre: (3,) mean of the corners.
        own_id: by face, whether it has the instance id after that of its thing.
        colours: RGB by face.
        textures: mipmaps by face, finest first; None without texture.
    """

    def __init__(self, mesh: Mesh, light: np.ndarray, own_id: bool) -> None:
        self.solid = mesh.solid
        self.points = np.concatenate([face.points for face in mesh.faces])
        self.counts = np.array([len(face.points) for face in mesh.faces])
        self.ends = np.cumsum(self.counts)
        self.begins = self.ends - self.counts
        self.centre = self.points.mean(axis=0)
        self.own_id = [own_id and face.odd for face in mesh.faces]
        self.textures: list[list[np.ndarray] | None] = []
        self.colours: list[list[float]] = []
        for face in mesh.faces:
            levels, colour = None, np.asarray(face.colour)
            if face.texture is not None:
                levels = _mipmaps(face.texture, light)
                colour = face.texture.mean(axis=(0, 1))
            self.textures.append(levels)
            self.colours.append(np.clip(colour * light, 0, 255).tolist())


class Scene:
    """Everything a drive shows, under the light of its day.

    Args:
        camera: the camera of the drive.
        day: light, haze and sensor.
        ground: (z, x, 3) uint8, one period of the ground from above.
        things: things with their instance ids.
        noise: (height + 64, width + 64, 3) int16 sensor noise.
    """

    def __init__(
        self,
        camera: CameraModel,
        day: Day,
        ground: np.ndarray,
        things: Sequence[tuple[int, Thing]],
        noise: np.ndarray,
    ) -> None:
        self.camera, self.day, self.things, self.noise = camera, day, things, noise
        self._light = np.array(day.light)
        self.ground = _mipmaps(ground, self._light, levels=4)
        self._meshes: dict[int, list[LitMesh]] = {}

    def meshes(self, number: int, thing: Thing) -> list[LitMesh]:
        """Return the lit meshes of a thing; cached by its instance id."""
        if number not in self._meshes:
            own_id = bool(thing.odd_part)
            self._meshes[number] = [LitMesh(m, self._light, own_id) for m in thing.meshes]
        return self._meshes[number]


def _mipmaps(texture: np.ndarray, light: np.ndarray, levels: int = 16) -> list[np.ndarray]:
    """Return the lit texture, halved until a side has at most 8 pixels."""
    lit = [np.clip(texture * light, 0, 255).astype(np.uint8)]
    while len(lit) < levels and min(lit[-1].shape[:2]) > 8:
        lit.append(cv2.resize(lit[-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))
    return lit


def clip_near(points: np.ndarray) -> np.ndarray:
    """Return an (n, 3) polygon in camera axes, clipped at the near plane: (m, 3), or empty."""
    kept = []
    for a, b in zip(points, np.roll(points, -1, axis=0), strict=True):
        if a[2] > NEAR_M:
            kept.append(a)
        if (a[2] > NEAR_M) != (b[2] > NEAR_M):
            kept.append(a + (NEAR_M - a[2]) / (b[2] - a[2]) * (b - a))
    return np.array(kept)


def clip_textured(points: np.ndarray, texture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a (4, 3) quad in camera axes and its texture, both clipped at the near plane.

    A quad without exactly one vertical side behind the plane becomes empty.
    """
    depth = points[:, 2]
    left, right = (0, 3), (1, 2)
    behind = [side for side in (left, right) if depth[list(side)].min() <= NEAR_M]
    if len(behind) != 1:
        return points[:0], texture
    away, here = behind[0], right if behind[0] is left else left
    share = (NEAR_M - depth[away[0]]) / (depth[here[0]] - depth[away[0]]) + 1e-3
    clipped = points.copy()
    for a, b in zip(away, here, strict=True):
        clipped[a] = points[a] + share * (points[b] - points[a])
    w = texture.shape[1]
    column = min(int(share * w), w - 2)
    part = texture[:, column:] if away is left else texture[:, : w - column]
    return clipped, np.ascontiguousarray(part)
