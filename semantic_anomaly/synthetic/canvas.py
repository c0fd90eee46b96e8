"""Rasteriser of one frame: faces in painter's order over a textured ground, with depth and ids."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from semantic_anomaly.synthetic.stage import NEAR_M, Sheet, Stage, clip_near, cut_texture
from semantic_anomaly.synthetic.textures import (
    GROUND_HALF_WIDTH_M,
    GROUND_M_PER_PX,
    GROUND_PERIOD_M,
)
from semantic_anomaly.synthetic.world import Thing

# Smaller faces are not drawn.
SMALLEST_FACE_PX = 0.8


class _Shape(NamedTuple):
    """One projected face: points in camera axes, pixels, fixed-point corners and box."""

    seen: np.ndarray
    pixels: np.ndarray
    corners: np.ndarray
    box: list[float]
    inverse_depth: float


class Canvas:
    """Image, inverse depth and instance ids of one frame while it is drawn.

    Args:
        stage: data shared by all frames.
        eye: position of the camera in world axes, metres.
        yaw: heading in radians.
    """

    def __init__(self, stage: Stage, eye: tuple[float, float, float], yaw: float) -> None:
        self._stage, self._camera, self._day = stage, stage.camera, stage.day
        self._eye = np.array(eye)
        self._yaw = yaw
        c, s = np.cos(yaw), np.sin(yaw)
        self._turn = np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]).T
        height, width = self._camera.image_hw
        self.ids = np.zeros((height, width), np.int32)
        self._inverse = np.zeros((height, width), np.float32)
        self.image = np.empty((height, width, 3), np.uint8)
        self._backdrop()

    def _backdrop(self) -> None:
        camera, day = self._camera, self._day
        height, width = camera.image_hw
        first = int(np.ceil(camera.cy + 1))
        ramp = np.linspace(0, 1, first)[:, None]
        sky = np.array(day.sky_top) * (1 - ramp) + np.array(day.sky_low) * ramp
        self.image[:first] = np.clip(sky, 0, 255).astype(np.uint8)[:, None]
        rows = (np.arange(first, height, dtype=np.float32) - camera.cy)[:, None] / camera.fy
        distance = (float(self._eye[1]) / rows).astype(np.float32)
        sides = ((np.arange(width) - camera.cx) / camera.fx).astype(np.float32)[None]
        c, s = float(np.cos(self._yaw)), float(np.sin(self._yaw))
        u = distance * (sides * c - s) + float(self._eye[0] + GROUND_HALF_WIDTH_M)
        v = distance * (sides * s + c)
        u *= 1 / GROUND_M_PER_PX
        # The offset is wrapped in double precision: float32 is too coarse far along the street.
        v += float(self._eye[2] % GROUND_PERIOD_M)
        v -= GROUND_PERIOD_M * np.floor(v * (1 / GROUND_PERIOD_M))
        v *= 1 / GROUND_M_PER_PX
        # Mipmaps: far rows take coarser levels against aliasing.
        footprint = (distance[:, 0] ** 2 / (camera.fy * self._eye[1])) / GROUND_M_PER_PX
        level = np.clip(np.log2(np.maximum(footprint, 1)) * 0.75, 0, 3).astype(int)
        for number, texture in enumerate(self._stage.ground):
            picked = np.flatnonzero(level == number)
            if len(picked):
                a, b = int(picked[0]), int(picked[-1]) + 1
                scale = np.float32(0.5**number)
                self.image[first + a : first + b] = cv2.remap(
                    texture,
                    np.clip(u[a:b] * scale, 0, texture.shape[1] - 1),
                    v[a:b] * scale,
                    cv2.INTER_LINEAR,
                    borderMode=cv2.BORDER_REPLICATE,
                )
        self._inverse[first:] = 1.0 / distance

    def _project(self, seen: np.ndarray) -> np.ndarray:
        camera = self._camera
        scale = camera.fx / seen[:, 2]
        pixels = np.empty((len(seen), 2))
        pixels[:, 0] = camera.cx + seen[:, 0] * scale
        pixels[:, 1] = camera.cy - seen[:, 1] * scale
        return pixels

    def shadows(self, things: list[tuple[Thing, float]]) -> None:
        """Darken the ground under things, given with their current z."""
        height, width = self._camera.image_hw
        low = int(self._camera.cy)
        cover = np.zeros((height - low, width), np.uint8)
        ring = np.arange(10) * 2 * np.pi / 10
        circle = np.stack([np.cos(ring), np.zeros(10), np.sin(ring)], axis=1)
        for thing, z in things:
            if thing.cls == "house":
                continue
            size = np.array([thing.footprint[0] * 1.15, 0, thing.footprint[1] * 1.1])
            seen = (circle * size + np.array([thing.x + 0.15, 0.0, z]) - self._eye) @ self._turn
            if seen[:, 2].min() > NEAR_M:
                outline = np.round(self._project(seen)).astype(np.int32) - (0, low)
                cv2.fillConvexPoly(cover, outline, 255)
        dark = cv2.blur(cover, (5, 3)).astype(np.float32) * ((1 - self._day.shadow) / 255)
        black = np.zeros((height - low, width, 3), np.uint8)
        self.image[low:] = cv2.blendLinear(self.image[low:], black, 1 - dark, dark)

    def draw(self, thing: Thing, number: int, z: float) -> None:
        """Draw a thing over the image.

        Args:
            thing: the thing.
            number: its instance id; its odd part has the next one.
            z: its current position along the street in metres.
        """
        shift = np.array([thing.x, 0.0, z]) - self._eye
        sheets = self._stage.sheets(number, thing)
        for sheet in sorted(sheets, key=lambda s: -float(((s.centre + shift) ** 2).sum())):
            seen = (sheet.points + shift) @ self._turn
            if seen[:, 2].min() > NEAR_M:
                self._draw_sheet(sheet, seen, number)
            else:
                self._draw_cut(sheet, seen, number)

    def _draw_sheet(self, sheet: Sheet, seen: np.ndarray, number: int) -> None:
        height, width = self._camera.image_hw
        pixels = self._project(seen)
        low = np.minimum.reduceat(pixels, sheet.begins)
        high = np.maximum.reduceat(pixels, sheet.begins)
        shown = (high[:, 0] >= 0) & (high[:, 1] >= 0) & (low[:, 0] < width) & (low[:, 1] < height)
        shown &= (high - low).max(axis=1) >= SMALLEST_FACE_PX
        if sheet.solid:
            a, b, c = (pixels[sheet.begins + i] for i in range(3))
            first, second = b - a, c - b
            # Outward faces turn clockwise on the screen, whose y axis points down.
            shown &= first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0] > 0
        corners = np.round(np.clip(pixels, -8000, 8000) * 16).astype(np.int32)
        inverse = (sheet.counts / np.add.reduceat(seen[:, 2], sheet.begins)).tolist()
        boxes = np.concatenate([low, high], axis=1).tolist()
        for i in np.flatnonzero(shown).tolist():
            span = slice(sheet.begins[i], sheet.ends[i])
            shape = _Shape(seen[span], pixels[span], corners[span], boxes[i], inverse[i])
            self._fill(sheet, i, shape, number, sheet.textures[i])

    def _draw_cut(self, sheet: Sheet, seen: np.ndarray, number: int) -> None:
        for i in range(len(sheet.ends)):
            face = seen[sheet.begins[i] : sheet.ends[i]]
            if face[:, 2].max() <= NEAR_M:
                continue
            normal = _normal(face)
            if sheet.solid and float(normal @ face[0]) >= 0:
                continue
            levels = sheet.textures[i]
            if levels is None or face[:, 2].min() > NEAR_M:
                cut = clip_near(face)
            else:
                cut, levels = cut_texture(face, levels[0])
            if len(cut) >= 3:
                pixels = self._project(cut)
                corners = np.round(np.clip(pixels, -8000, 8000) * 16).astype(np.int32)
                box = [*pixels.min(axis=0).tolist(), *pixels.max(axis=0).tolist()]
                shape = _Shape(cut, pixels, corners, box, 1.0 / float(cut[:, 2].mean()))
                self._fill(sheet, i, shape, number, levels)

    def _fill(
        self,
        sheet: Sheet,
        i: int,
        shape: _Shape,
        number: int,
        levels: list[np.ndarray] | None,
    ) -> None:
        x0, y0, x1, y1 = shape.box
        area = (x1 - x0) * (y1 - y0)
        corners = shape.corners
        if levels is not None and len(corners) == 4 and area > 60:
            self._stretch(levels, shape)
        else:
            cv2.fillConvexPoly(self.image, corners, sheet.colours[i], cv2.LINE_AA, 4)
        identity = number + 1 if sheet.own_id[i] else number
        cv2.fillConvexPoly(self.ids, corners, identity, cv2.LINE_8, 4)
        if area < 1500:
            cv2.fillConvexPoly(self._inverse, corners, shape.inverse_depth, cv2.LINE_8, 4)
        else:
            self._fill_plane(corners, shape.seen)

    def _fill_plane(self, corners: np.ndarray, seen: np.ndarray) -> None:
        normal = _normal(seen)
        offset = float(normal @ seen[0])
        if abs(offset) < 1e-6:
            return
        camera = self._camera
        height, width = camera.image_hw
        x0, y0 = np.maximum(corners.min(axis=0) // 16 - 1, 0)
        x1, y1 = np.minimum(corners.max(axis=0) // 16 + 2, (width, height))
        if x0 >= x1 or y0 >= y1:
            return
        inside = np.zeros((y1 - y0, x1 - x0), np.uint8)
        shifted = (corners - (x0 * 16, y0 * 16)).astype(np.int32)
        cv2.fillConvexPoly(inside, shifted, 1, cv2.LINE_8, 4)
        # On a plane the inverse depth is affine in pixel coordinates.
        across = (np.arange(x0, x1) - camera.cx) * (normal[0] / (camera.fx * offset))
        down = (np.arange(y0, y1) - camera.cy) * (-normal[1] / (camera.fy * offset))
        values = (across[None] + (down + normal[2] / offset)[:, None]).astype(np.float32)
        cv2.copyTo(np.maximum(values, 1e-4), inside, self._inverse[y0:y1, x0:x1])

    def _stretch(self, levels: list[np.ndarray], shape: _Shape) -> None:
        pixels, corners, box = shape.pixels, shape.corners, shape.box
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
        matrix = cv2.getPerspectiveTransform(source, (pixels - (x0, y0)).astype(np.float32))
        size = (x1 - x0, y1 - y0)
        drawn = cv2.warpPerspective(texture, matrix, size, borderMode=cv2.BORDER_REPLICATE)
        cover = np.zeros((y1 - y0, x1 - x0), np.uint8)
        shifted = (corners - (x0 * 16, y0 * 16)).astype(np.int32)
        cv2.fillConvexPoly(cover, shifted, 255, cv2.LINE_8, 4)
        cv2.copyTo(drawn, cover, self.image[y0:y1, x0:x1])

    def develop(self, noise: np.ndarray, i: int) -> np.ndarray:
        """Return the image with haze, lens blur, exposure and sensor noise.

        Args:
            noise: (H + 64, W + 64, 3) int16 noise of the drive.
            i: frame number, shifts the noise.
        """
        day = self._day
        clear = cv2.exp(-day.haze_per_m / np.maximum(self._inverse, 1 / 300.0))
        clear[self._inverse <= 0] = 1.0
        haze = np.empty_like(self.image)
        haze[:] = np.clip(day.sky_low, 0, 255).astype(np.uint8)
        hazy = cv2.blendLinear(self.image, haze, clear, 1 - clear)
        soft = cv2.GaussianBlur(hazy, (3, 3), day.blur)
        height, width = self._camera.image_hw
        dy, dx = (i * 37) % 64, (i * 53) % 64
        grain = noise[dy : dy + height, dx : dx + width]
        exposed = cv2.convertScaleAbs(soft, alpha=day.gain)
        return cv2.add(exposed, grain, dtype=cv2.CV_8U)

    def depth(self) -> np.ndarray:
        """Return (H, W) float32 metres, 0 for the sky."""
        safe = np.maximum(self._inverse, 1e-6)
        return np.where(self._inverse > 2e-4, 1.0 / safe, 0.0).astype(np.float32)


def _normal(points: np.ndarray) -> np.ndarray:
    # np.cross is slow for single vectors.
    a, b, c = points[:3].tolist()
    x, y, z = (q - p for p, q in zip(a, b, strict=True))
    u, v, w = (q - p for p, q in zip(b, c, strict=True))
    return np.array([y * w - z * v, z * u - x * w, x * v - y * u])
