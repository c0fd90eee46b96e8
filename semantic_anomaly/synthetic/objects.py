"""Rendered things without a street: colours, coverage and shadow, to be pasted over any image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from semantic_anomaly.synthetic import props, vehicles
from semantic_anomaly.synthetic.canvas import Canvas
from semantic_anomaly.synthetic.mesh import Mesh
from semantic_anomaly.synthetic.oddities import ODD_ARRANGEMENTS, ODD_OBJECTS
from semantic_anomaly.synthetic.scene import CameraModel, Scene
from semantic_anomaly.synthetic.world import Day, Thing

# Half width and half length of the shadow.
_Footprint = tuple[float, float]
_ALONE = {
    **ODD_OBJECTS,
    "traffic_light_on_road": ODD_ARRANGEMENTS["traffic_light_on_road"],
}
_MAKERS: dict[str, tuple[Callable[[np.random.Generator], list[Mesh]], _Footprint]] = {
    **{kind: (oddity.make, oddity.footprint) for kind, oddity in _ALONE.items()},
    "bench": (props.bench, (0.8, 0.3)),
    "bin": (props.bin_, (0.3, 0.3)),
    "person": (props.person, (0.25, 0.2)),
    "car": (vehicles.car, (0.95, 2.15)),
}
# Road users that belong on a road; they show what the rendering alone does to a score.
USUAL_KINDS = ("person", "car")
OBJECT_KINDS = tuple(kind for kind in _MAKERS if kind not in USUAL_KINDS)
ALL_KINDS = (*OBJECT_KINDS, *USUAL_KINDS)
# The view of things that are made to a size in pixels.
VIEW_DISTANCE_M, VIEW_HEIGHT_M = 15.0, 1.4
_DAY = Day((1.0, 1.0, 1.0), (128, 128, 128), (128, 128, 128), 0.0, 1.0, 0.0, 0.3, 0.5)
_GREY = 128
# Edges are averages over so many pixels in each direction; large ones need fewer.
_OVERSAMPLING, _LARGE_OVERSAMPLING, _LARGE_PX = 4, 2, 200
_MARGIN_PX = 3
_NEAREST_M = 1.0


@dataclass(frozen=True, eq=False)
class Cutout:
    """A thing without its surroundings.

    Attributes:
        image: (h, w, 3) uint8 RGB.
        alpha: (h, w) float32 in [0, 1], the share of each pixel that shows the thing.
        shadow: (h, w) float32 in [0, 1], the share of its light that the ground loses.
        foot_xy: where it stands, in pixels of the cut-out.

    Raises:
        ValueError: arrays of another shape, or nothing to see.
    """

    image: np.ndarray
    alpha: np.ndarray
    shadow: np.ndarray
    foot_xy: tuple[float, float]

    def __post_init__(self) -> None:
        shape = self.alpha.shape
        if self.image.shape != (*shape, 3) or self.shadow.shape != shape or not self.alpha.any():
            raise ValueError(
                f"cut-out: expected image, alpha and shadow of one size and some alpha, found "
                f"{self.image.shape}, {shape}, {self.shadow.shape}"
            )

    @property
    def box_xyxy(self) -> tuple[int, int, int, int]:
        """Return the box of the thing without its shadow; right and bottom exclusive."""
        visible = self.alpha > 0.5 if (self.alpha > 0.5).any() else self.alpha > 0
        x, y, w, h = cv2.boundingRect(visible.astype(np.uint8))
        return x, y, x + w, y + h

    def resized(self, size_px: float) -> Cutout:
        """Return the cut-out with a longer side of its box of `size_px`."""
        x0, y0, x1, y1 = self.box_xyxy
        scale = size_px / max(x1 - x0, y1 - y0)
        size = tuple(max(1, round(n * scale)) for n in self.alpha.shape[::-1])
        image, alpha, shadow = (
            cv2.resize(part, size, interpolation=cv2.INTER_AREA)
            for part in (self.image, self.alpha, self.shadow)
        )
        foot_x, foot_y = self.foot_xy
        return Cutout(image, alpha, shadow, (foot_x * scale, foot_y * scale))


def object_of_size(kind: str, seed: int, size_px: float) -> Cutout:
    """Render a thing, seen from `VIEW_DISTANCE_M`.

    Args:
        kind: one of `ALL_KINDS`.
        seed: of its look.
        size_px: longer side of its box.

    Raises:
        ValueError: an unknown kind.
    """
    thing = _thing(kind, seed, VIEW_DISTANCE_M)
    x0, y0, x1, y1 = _extent(thing, 1.0, VIEW_HEIGHT_M)
    focal_px = size_px / max(x1 - x0, y1 - y0)
    return _render(thing, focal_px, VIEW_HEIGHT_M)


def object_at(
    kind: str, seed: int, distance_m: float, focal_px: float, camera_height_m: float
) -> Cutout:
    """Render a thing as a level camera sees it on a flat ground.

    Args:
        kind: one of `ALL_KINDS`.
        seed: of its look.
        distance_m: along the optical axis.
        focal_px: focal length.
        camera_height_m: above the ground.

    Raises:
        ValueError: an unknown kind, or a part of the thing less than `_NEAREST_M` away.
    """
    thing = _thing(kind, seed, distance_m)
    nearest = min(float(face.points[:, 2].min()) for mesh in thing.meshes for face in mesh.faces)
    nearest = min(nearest, -1.1 * thing.footprint[1])
    if distance_m + nearest < _NEAREST_M:
        raise ValueError(
            f"kind '{kind}': expected a distance of at least {_NEAREST_M - nearest:.1f} m, "
            f"found {distance_m:g}"
        )
    return _render(thing, focal_px, camera_height_m)


def _thing(kind: str, seed: int, distance_m: float) -> Thing:
    if kind not in _MAKERS:
        raise ValueError(f"unknown kind '{kind}'; expected one of: {', '.join(ALL_KINDS)}")
    make, footprint = _MAKERS[kind]
    rng = np.random.default_rng(np.random.SeedSequence([seed, sum(kind.encode()), 83]))
    meshes = make(rng)
    # On a street, lying branches reach into the ground.
    below = min(float(face.points[:, 1].min()) for mesh in meshes for face in mesh.faces)
    standing = tuple(mesh.moved(y=max(0.0, -below)) for mesh in meshes)
    return Thing(kind, standing, 0.0, distance_m, footprint=footprint)


def _extent(thing: Thing, focal_px: float, height_m: float) -> tuple[float, float, float, float]:
    """Return the box of a thing relative to the principal point, in pixels."""
    points = np.concatenate([face.points for mesh in thing.meshes for face in mesh.faces])
    depth = points[:, 2] + thing.z
    x, y = focal_px * points[:, 0] / depth, focal_px * (height_m - points[:, 1]) / depth
    return float(x.min()), float(y.min()), float(x.max()), float(y.max())


def _render(thing: Thing, focal_px: float, height_m: float) -> Cutout:
    x0, y0, x1, y1 = _extent(thing, focal_px, height_m)
    factor = _OVERSAMPLING if max(x1 - x0, y1 - y0) <= _LARGE_PX else _LARGE_OVERSAMPLING
    half_width, half_length = (1.2 * half for half in thing.footprint)
    shadow_depth = thing.z - half_length
    reach = focal_px * (half_width + 0.2) / shadow_depth
    # The canvas begins at the horizon or above it: it has a sky and a ground.
    left, top = (int(np.floor(v)) - _MARGIN_PX for v in (min(x0, -reach), min(y0, 0.0)))
    bottom = max(y1, focal_px * height_m / shadow_depth)
    right, bottom = (int(np.ceil(v)) + _MARGIN_PX for v in (max(x1, reach), bottom))
    hw = (bottom - top, right - left)
    focal = focal_px * factor
    camera = CameraModel(
        focal, focal, -left * factor, -top * factor, (hw[0] * factor, hw[1] * factor), height_m
    )
    ground = np.full((64, 64, 3), _GREY, np.uint8)
    scene = Scene(camera, _DAY, ground, [(1, thing)], np.zeros((1, 1, 3), np.int16))
    canvas = Canvas(scene, (0.0, height_m, 0.0), 0.0)
    canvas.draw_shadows([(thing, thing.z)])
    lost = np.float32(1) - canvas.image[..., 0].astype(np.float32) / np.float32(_GREY)
    canvas.draw(thing, 1, thing.z)
    shown = (canvas.ids == 1).astype(np.float32)
    size = hw[::-1]
    alpha = cv2.resize(shown, size, interpolation=cv2.INTER_AREA)
    colours = cv2.resize(
        canvas.image.astype(np.float32) * shown[..., None], size, interpolation=cv2.INTER_AREA
    )
    colours /= np.maximum(alpha, 1e-3)[..., None]
    shadow = cv2.GaussianBlur(
        cv2.resize(np.clip(lost, 0, 1), size, interpolation=cv2.INTER_AREA), (0, 0), 1.0
    )
    # Rounding leaves traces of shadow everywhere.
    shadow[shadow < 0.02] = 0
    foot = (x0 + x1) / 2 - left, focal_px * height_m / thing.z - top
    x, y, w, h = cv2.boundingRect(((alpha > 0) | (shadow > 0)).astype(np.uint8))
    cut = np.s_[y : y + h, x : x + w]
    image = np.clip(np.rint(colours[cut]), 0, 255).astype(np.uint8)
    return Cutout(image, alpha[cut].copy(), shadow[cut].copy(), (foot[0] - x, foot[1] - y))


def blend(
    image: np.ndarray,
    colours: np.ndarray,
    alpha: np.ndarray,
    shadow: np.ndarray,
    at_xy: tuple[int, int],
    softness_px: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return an image with something blended in with soft edges, and where it covers the image.

    Args:
        image: (height, width, 3) uint8 RGB.
        colours: (h, w, 3) uint8 RGB.
        alpha, shadow: (h, w) float32 in [0, 1], as of a cut-out.
        at_xy: column and row of its upper left corner; what lies outside the image is cut off.
        softness_px: standard deviation of the blur of edges.

    Returns:
        (height, width, 3) uint8 RGB and (height, width) bool.
    """
    height, width = image.shape[:2]
    h, w = alpha.shape
    left, top = at_xy
    weight = alpha
    if softness_px > 0:
        # Only inside: outside, the cut-out has no colours. These stay as sharp as they are.
        pad = int(np.ceil(3 * softness_px))
        padded = cv2.copyMakeBorder(alpha, pad, pad, pad, pad, cv2.BORDER_CONSTANT)
        blurred = cv2.GaussianBlur(padded, (0, 0), softness_px)[pad:-pad, pad:-pad]
        weight = np.minimum(alpha, blurred)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + w, width), min(top + h, height)
    canvas, mask = image.copy(), np.zeros((height, width), bool)
    if x0 < x1 and y0 < y1:
        cut = np.s_[y0 - top : y1 - top, x0 - left : x1 - left]
        share = weight[cut][..., None]
        under = image[y0:y1, x0:x1] * (1 - shadow[cut][..., None])
        mixed = under * (1 - share) + colours[cut] * share
        canvas[y0:y1, x0:x1] = np.clip(np.rint(mixed), 0, 255).astype(np.uint8)
        # Thin things cover less than half of any pixel.
        mask[y0:y1, x0:x1] = weight[cut] > min(0.5, 0.5 * float(weight.max()))
    return canvas, mask
