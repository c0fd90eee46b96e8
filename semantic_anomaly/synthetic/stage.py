"""Data shared by all frames of a drive: camera, lit ground, and lit faces of the things."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from semantic_anomaly.synthetic.mesh import Mesh
from semantic_anomaly.synthetic.oddities import ANOMALY
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


class Sheet:
    """The lit faces of one mesh as arrays."""

    def __init__(self, mesh: Mesh, light: np.ndarray, own_id: bool) -> None:
        faces, solid = mesh.faces, mesh.solid
        self.solid = solid
        self.points = np.concatenate([face.points for face in faces])
        counts = np.array([len(face.points) for face in faces])
        self.ends = np.cumsum(counts)
        self.begins = self.ends - counts
        self.counts = counts
        self.centre = self.points.mean(axis=0)
        self.own_id = [own_id and face.part == ANOMALY for face in faces]
        self.textures: list[list[np.ndarray] | None] = []
        self.colours: list[list[float]] = []
        for face in faces:
            levels = None
            colour = np.asarray(face.colour)
            if face.texture is not None:
                levels = [np.clip(face.texture * light, 0, 255).astype(np.uint8)]
                while min(levels[-1].shape[:2]) > 8:
                    half = cv2.resize(
                        levels[-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA
                    )
                    levels.append(half)
                colour = face.texture.mean(axis=(0, 1))
            self.textures.append(levels)
            self.colours.append(np.clip(colour * light, 0, 255).tolist())


class Stage:
    """The lit ground and the lit faces of every thing of a drive."""

    def __init__(self, camera: CameraModel, day: Day, ground: np.ndarray) -> None:
        self.camera, self.day = camera, day
        self._light = np.array(day.light)
        self.ground = [np.clip(ground * self._light, 0, 255).astype(np.uint8)]
        for _ in range(3):
            half = cv2.resize(self.ground[-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
            self.ground.append(half)
        self._sheets: dict[int, list[Sheet]] = {}

    def sheets(self, number: int, thing: Thing) -> list[Sheet]:
        """Return the lit meshes of a thing; cached by its instance id."""
        if number not in self._sheets:
            own_id = bool(thing.odd_part)
            self._sheets[number] = [Sheet(m, self._light, own_id) for m in thing.meshes]
        return self._sheets[number]


def clip_near(points: np.ndarray) -> np.ndarray:
    """Return an (n, 3) polygon in camera axes, clipped at the near plane: (m, 3), or empty."""
    kept = []
    for i in range(len(points)):
        a, b = points[i], points[(i + 1) % len(points)]
        if a[2] > NEAR_M:
            kept.append(a)
        if (a[2] > NEAR_M) != (b[2] > NEAR_M):
            kept.append(a + (NEAR_M - a[2]) / (b[2] - a[2]) * (b - a))
    return np.array(kept)


def cut_texture(seen: np.ndarray, texture: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return a (4, 3) textured quad and its texture, both clipped at the near plane.

    Only quads with one vertical side behind the plane are drawn; others become empty.
    """
    depth = seen[:, 2]
    left, right = (0, 3), (1, 2)
    behind = [side for side in (left, right) if depth[list(side)].min() <= NEAR_M]
    if len(behind) != 1:
        return seen[:0], [texture]
    away, here = behind[0], right if behind[0] is left else left
    share = (NEAR_M - depth[away[0]]) / (depth[here[0]] - depth[away[0]]) + 1e-3
    cut = seen.copy()
    for a, b in zip(away, here, strict=True):
        cut[a] = seen[a] + share * (seen[b] - seen[a])
    w = texture.shape[1]
    column = min(int(share * w), w - 2)
    part = texture[:, column:] if away is left else texture[:, : w - column]
    return cut, [np.ascontiguousarray(part)]
