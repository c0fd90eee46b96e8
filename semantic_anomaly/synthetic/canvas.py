"""Rasteriser of one frame: faces in painter's order over a textured ground, with depth and ids."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from semantic_anomaly.synthetic.mesh import yaw_matrix
from semantic_anomaly.synthetic.scene import NEAR_M, LitMesh, Scene, clip_near, clip_textured
from semantic_anomaly.synthetic.textures import (
    GROUND_HALF_WIDTH_M,
    GROUND_M_PER_PX,
    GROUND_PERIOD_M,
)
from semantic_anomaly.synthetic.world import Thing

# Smaller faces are not drawn.
SMALLEST_FACE_PX = 0.8


class _Projected(NamedTuple):
    """One face in camera axes and in the image.

    Attributes:
        points: (n, 3) in camera axes, metres.
        pixels: (n, 2) float64.
        corners: (n, 2) int32, in sixteenths of a pixel.
        box: x0, y0, x1, y1 in pixels.
        inverse_depth: of its mean depth.
    """

    points: np.ndarray
    pixels: np.ndarray
    corners: np.ndarray
    box: list[float]
    inverse_depth: float


class Canvas:
    """Image, inverse depth and instance ids of one frame while it is drawn.

    Args:
        scene: data shared by all frames.
        position: of the camera in world axes, metres.
        yaw: heading in radians.
    """

    def __init__(self, scene: Scene, position: tuple[float, float, float], yaw: float) -> None:
        self._scene, self._camera, self._day = scene, scene.camera, scene.day
        self._position, self._yaw = np.array(position), yaw
        self._to_camera = yaw_matrix(yaw).T
        height, width = self._camera.image_hw
        self.ids = np.zeros((height, width), np.int32)
        self._inverse = np.zeros((height, width), np.float32)
        self.image = np.empty((height, width, 3), np.uint8)
        self._draw_background()

    def _draw_background(self) -> None:
        camera, day = self._camera, self._day
        height, width = camera.image_hw
        first = int(np.ceil(camera.cy + 1))
        ramp = np.linspace(0, 1, first)[:, None]
        sky = np.array(day.sky_top) * (1 - ramp) + np.array(day.sky_low) * ramp
        self.image[:first] = np.clip(sky, 0, 255).astype(np.uint8)[:, None]
        rows = (np.arange(first, height, dtype=np.float32) - camera.cy)[:, None] / camera.fy
        distance = (float(self._position[1]) / rows).astype(np.float32)
        sides = ((np.arange(width) - camera.cx) / camera.fx).astype(np.float32)[None]
        c, s = float(np.cos(self._yaw)), float(np.sin(self._yaw))
        u = distance * (sides * c - s) + float(self._position[0] + GROUND_HALF_WIDTH_M)
        v = distance * (sides * s + c)
        u *= 1 / GROUND_M_PER_PX
        # The offset is wrapped in double precision: float32 is too coarse far along the street.
        v += float(self._position[2] % GROUND_PERIOD_M)
        v -= GROUND_PERIOD_M * np.floor(v * (1 / GROUND_PERIOD_M))
        v *= 1 / GROUND_M_PER_PX
        # Mipmaps: far rows take coarser levels against aliasing.
        footprint = (distance[:, 0] ** 2 / (camera.fy * self._position[1])) / GROUND_M_PER_PX
        level = np.clip(np.log2(np.maximum(footprint, 1)) * 0.75, 0, 3).astype(int)
        for number, texture in enumerate(self._scene.ground):
            level_rows = np.flatnonzero(level == number)
            if len(level_rows):
                a, b = int(level_rows[0]), int(level_rows[-1]) + 1
                scale = np.float32(0.5**number)
                self.image[first + a : first + b] = cv2.remap(
                    texture,
                    np.clip(u[a:b] * scale, 0, texture.shape[1] - 1),
                    v[a:b] * scale,
                    cv2.INTER_LINEAR,
                    borderMode=cv2.BORDER_REPLICATE,
                )
        self._inverse[first:] = 1.0 / distance

    def _project(self, points: np.ndarray) -> np.ndarray:
        camera = self._camera
        x, y, z = points.T
        scale = camera.fx / z
        return np.column_stack([camera.cx + x * scale, camera.cy - y * scale])

    def draw_shadows(self, things: list[tuple[Thing, float]]) -> None:
        """Darken the ground under things, given with their current z."""
        height, width = self._camera.image_hw
        low = int(self._camera.cy)
        mask = np.zeros((height - low, width), np.uint8)
        ring = np.arange(10) * 2 * np.pi / 10
        circle = np.stack([np.cos(ring), np.zeros(10), np.sin(ring)], axis=1)
        for thing, z in things:
            if thing.cls == "house":
                continue
            size = np.array([thing.footprint[0] * 1.15, 0, thing.footprint[1] * 1.1])
            centre = np.array([thing.x + 0.15, 0.0, z])
            points = (circle * size + centre - self._position) @ self._to_camera
            if points[:, 2].min() > NEAR_M:
                outline = np.round(self._project(points)).astype(np.int32) - (0, low)
                cv2.fillConvexPoly(mask, outline, 255)
        dark = cv2.blur(mask, (5, 3)).astype(np.float32) * ((1 - self._day.shadow) / 255)
        black = np.zeros((height - low, width, 3), np.uint8)
        self.image[low:] = cv2.blendLinear(self.image[low:], black, 1 - dark, dark)

    def draw(self, thing: Thing, number: int, z: float) -> None:
        """Draw a thing over the image.

        Args:
            thing: the thing.
            number: its instance id; its odd part has the next one.
            z: its current position along the street in metres.
        """
        shift = np.array([thing.x, 0.0, z]) - self._position
        meshes = self._scene.meshes(number, thing)
        for mesh in sorted(meshes, key=lambda mesh: -float(((mesh.centre + shift) ** 2).sum())):
            points = (mesh.points + shift) @ self._to_camera
            if points[:, 2].min() > NEAR_M:
                self._draw_mesh(mesh, points, number)
            else:
                self._draw_clipped(mesh, points, number)

    def _draw_mesh(self, mesh: LitMesh, points: np.ndarray, number: int) -> None:
        height, width = self._camera.image_hw
        pixels = self._project(points)
        low = np.minimum.reduceat(pixels, mesh.begins)
        high = np.maximum.reduceat(pixels, mesh.begins)
        shown = (high[:, 0] >= 0) & (high[:, 1] >= 0) & (low[:, 0] < width) & (low[:, 1] < height)
        shown &= (high - low).max(axis=1) >= SMALLEST_FACE_PX
        if mesh.solid:
            a, b, c = (pixels[mesh.begins + i] for i in range(3))
            first, second = b - a, c - b
            # Outward faces turn clockwise on the screen, whose y axis points down.
            shown &= first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0] > 0
        corners = _sixteenths(pixels)
        inverse = (mesh.counts / np.add.reduceat(points[:, 2], mesh.begins)).tolist()
        boxes = np.concatenate([low, high], axis=1).tolist()
        for i in np.flatnonzero(shown).tolist():
            span = slice(mesh.begins[i], mesh.ends[i])
            face = _Projected(points[span], pixels[span], corners[span], boxes[i], inverse[i])
            self._draw_face(mesh, i, face, number, mesh.textures[i])

    def _draw_clipped(self, mesh: LitMesh, points: np.ndarray, number: int) -> None:
        for i, levels in enumerate(mesh.textures):
            clipped = points[mesh.begins[i] : mesh.ends[i]]
            if mesh.solid and float(_normal(clipped) @ clipped[0]) >= 0:
                continue
            if levels is None or clipped[:, 2].min() > NEAR_M:
                clipped = clip_near(clipped)
            else:
                clipped, texture = clip_textured(clipped, levels[0])
                levels = [texture]
            if len(clipped) >= 3:
                pixels = self._project(clipped)
                box = [*pixels.min(axis=0).tolist(), *pixels.max(axis=0).tolist()]
                inverse = 1.0 / float(clipped[:, 2].mean())
                face = _Projected(clipped, pixels, _sixteenths(pixels), box, inverse)
                self._draw_face(mesh, i, face, number, levels)

    def _draw_face(
        self,
        mesh: LitMesh,
        i: int,
        face: _Projected,
        number: int,
        levels: list[np.ndarray] | None,
    ) -> None:
        x0, y0, x1, y1 = face.box
        area = (x1 - x0) * (y1 - y0)
        if levels is not None and len(face.corners) == 4 and area > 60:
            self._draw_texture(levels, face)
        else:
            cv2.fillConvexPoly(self.image, face.corners, mesh.colours[i], cv2.LINE_AA, 4)
        cv2.fillConvexPoly(self.ids, face.corners, number + mesh.own_id[i], cv2.LINE_8, 4)
        if area < 1500:
            cv2.fillConvexPoly(self._inverse, face.corners, face.inverse_depth, cv2.LINE_8, 4)
        else:
            self._draw_depth(face.corners, face.points)

    def _draw_depth(self, corners: np.ndarray, points: np.ndarray) -> None:
        normal = _normal(points)
        offset = float(normal @ points[0])
        if abs(offset) < 1e-6:
            return
        camera = self._camera
        height, width = camera.image_hw
        x0, y0 = np.maximum(corners.min(axis=0) // 16 - 1, 0)
        x1, y1 = np.minimum(corners.max(axis=0) // 16 + 2, (width, height))
        if x0 >= x1 or y0 >= y1:
            return
        # On a plane the inverse depth is affine in pixel coordinates.
        across = (np.arange(x0, x1) - camera.cx) * (normal[0] / (camera.fx * offset))
        down = (np.arange(y0, y1) - camera.cy) * (-normal[1] / (camera.fy * offset))
        values = (across[None] + (down + normal[2] / offset)[:, None]).astype(np.float32)
        mask = _mask(corners, x0, y0, x1, y1)
        cv2.copyTo(np.maximum(values, 1e-4), mask, self._inverse[y0:y1, x0:x1])

    def _draw_texture(self, levels: list[np.ndarray], face: _Projected) -> None:
        box = face.box
        height, width = self._camera.image_hw
        x0, y0 = max(0, int(box[0]) - 1), max(0, int(box[1]) - 1)
        x1, y1 = min(width, int(box[2]) + 2), min(height, int(box[3]) + 2)
        if x0 >= x1 or y0 >= y1:
            return
        texture = levels[0]
        for level in levels[1:]:
            if texture.shape[0] > 2.2 * (box[3] - box[1]):
                texture = level
        h, w = texture.shape[:2]
        source = np.array([[0, 0], [w, 0], [w, h], [0, h]], np.float32) - 0.5
        target = (face.pixels - (x0, y0)).astype(np.float32)
        matrix = cv2.getPerspectiveTransform(source, target)
        size = (x1 - x0, y1 - y0)
        drawn = cv2.warpPerspective(texture, matrix, size, borderMode=cv2.BORDER_REPLICATE)
        cv2.copyTo(drawn, _mask(face.corners, x0, y0, x1, y1), self.image[y0:y1, x0:x1])

    def camera_image(self, i: int) -> np.ndarray:
        """Return the image with haze, lens blur, exposure and the sensor noise of frame i."""
        day = self._day
        clear = cv2.exp(-day.haze_per_m / np.maximum(self._inverse, 1 / 300.0))
        clear[self._inverse <= 0] = 1.0
        haze = np.empty_like(self.image)
        haze[:] = np.clip(day.sky_low, 0, 255).astype(np.uint8)
        hazy = cv2.blendLinear(self.image, haze, clear, 1 - clear)
        blurred = cv2.GaussianBlur(hazy, (3, 3), day.blur)
        height, width = self._camera.image_hw
        dy, dx = (i * 37) % 64, (i * 53) % 64
        noise = self._scene.noise[dy : dy + height, dx : dx + width]
        exposed = cv2.convertScaleAbs(blurred, alpha=day.gain)
        return cv2.add(exposed, noise, dtype=cv2.CV_8U)

    def depth(self) -> np.ndarray:
        """Return (H, W) float32 metres, 0 for the sky."""
        safe = np.maximum(self._inverse, 1e-6)
        return np.where(self._inverse > 2e-4, 1.0 / safe, 0.0).astype(np.float32)


def _sixteenths(pixels: np.ndarray) -> np.ndarray:
    """Return pixels as the int32 fixed-point numbers of OpenCV."""
    return np.round(np.clip(pixels, -8000, 8000) * 16).astype(np.int32)


def _mask(corners: np.ndarray, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    """Return (y1 - y0, x1 - x0) uint8, 255 within a polygon in sixteenths of a pixel."""
    mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
    shifted = (corners - (x0 * 16, y0 * 16)).astype(np.int32)
    cv2.fillConvexPoly(mask, shifted, 255, cv2.LINE_8, 4)
    return mask


def _normal(points: np.ndarray) -> np.ndarray:
    # np.cross is slow for single vectors.
    a, b, c = points[:3].tolist()
    x, y, z = (q - p for p, q in zip(a, b, strict=True))
    u, v, w = (q - p for p, q in zip(b, c, strict=True))
    return np.array([y * w - z * v, z * u - x * w, x * v - y * u])
