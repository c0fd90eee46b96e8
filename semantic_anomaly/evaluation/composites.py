"""Composites: things pasted over nominal frames at planned sizes and places, with controls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np

from semantic_anomaly.errors import InputError, UnknownNameError
from semantic_anomaly.evaluation.datasets import ANOMALY
from semantic_anomaly.evaluation.layouts import Dataset
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.structures import Frame
from semantic_anomaly.synthetic.objects import (
    ALL_KINDS,
    OBJECT_KINDS,
    Cutout,
    blend,
    object_at,
    object_of_size,
)

MIN_FRAMES = 10
# Default sizes as shares of the image's height.
_DEFAULT_SIZES = (1 / 24, 1 / 12, 1 / 6, 1 / 3)
_SMALLEST_PX = 4
# Different looks of a kind at one size or distance.
_LOOKS = 4
_SOFTNESS_PX = 0.6
_TRIES = 40
# The control shows that of so many frames which fits best around the box.
_DONORS, _LEAST_RING_PX = 5, 4
# Share of a thing that must lie inside the region of interest.
_INSIDE = 0.8
# Mean brightness of the lower half of frames for which the colours of the library are made.
_LIGHT = 100.0
_LIGHT_RANGE = (0.35, 1.1)
_LEAST_CUTOUT_PX = 200
_MOST_CUTOUTS = 64
# A cut-out that is enlarged more than this is blurred.
_MOST_SCALE = 1.5


@dataclass(frozen=True)
class CompositePlan:
    """What is pasted where.

    Attributes:
        kinds: of `ALL_KINDS`, or kinds of the cut-outs.
        sizes_px: longer sides of the things; empty: by the height of the image.
        distances_m: distances along the optical axis instead of sizes; empty: sizes.
        places_xyxy: where things stand, relative image coordinates [0, 1].
        cells: rows and columns of the cells of the image for which recall is reported.
        composites: number of composites; kinds, sizes and cells are balanced.
        frames: number of frames that are used, evenly spaced over the drive.
        focal_px: focal length; needed by distances.
        horizon_px: row of the horizon; None: the middle.
        camera_height_m: above a flat ground; needed by distances.
        seed: of all choices.

    Raises:
        InputError: a value out of range, or distances without focal length and camera height.
        UnknownNameError: an unknown kind.
    """

    kinds: tuple[str, ...] = OBJECT_KINDS
    sizes_px: tuple[int, ...] = ()
    distances_m: tuple[float, ...] = ()
    places_xyxy: tuple[float, float, float, float] = (0.0, 0.55, 1.0, 1.0)
    cells: tuple[int, int] = (6, 8)
    composites: int = 240
    frames: int = 40
    focal_px: float = 0.0
    horizon_px: float | None = None
    camera_height_m: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("kinds", "sizes_px", "distances_m"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise InputError(f"{name}: expected each once, found {', '.join(map(str, values))}")
        if not self.kinds:
            raise InputError("kinds: expected at least one, found none")
        if self.sizes_px and self.distances_m:
            raise InputError("sizes and distances: expected one of them, found both")
        if any(size < _SMALLEST_PX for size in self.sizes_px):
            raise InputError(f"sizes: expected at least {_SMALLEST_PX} px, found {self.sizes_px}")
        x0, y0, x1, y1 = self.places_xyxy
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise InputError(
                "places: expected left < right and top < bottom in relative image coordinates "
                f"[0, 1], found {self.places_xyxy}"
            )
        if min(self.cells) < 1 or self.seed < 0:
            raise InputError(
                f"expected at least one row and column of cells and a seed >= 0, found "
                f"{self.cells} and {self.seed}"
            )
        if self.frames < MIN_FRAMES:
            raise InputError(f"frames: expected at least {MIN_FRAMES}, found {self.frames}")
        if self.distances_m:
            if not (math.isfinite(self.focal_px) and self.focal_px > 0 < self.camera_height_m):
                raise InputError(
                    "distances: expected the focal length in px and the setting "
                    f"'camera_height_m', found {self.focal_px:g} px and {self.camera_height_m:g} m"
                )
            if not all(math.isfinite(d) and d > 0 for d in self.distances_m):
                raise InputError(f"distances: expected > 0 m, found {self.distances_m}")

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Paste:
    """One composite.

    Attributes:
        number: of the composite.
        frame, donor: numbers of the frame, and of the one that the control shows in the box.
        kind: of the thing.
        size: as planned, in px or m.
        look: number of its look.
        at_xy: column and row of the upper left corner of its cut-out.
        box_xyxy: of the thing, in pixels.
        cell: row and column of the cell in which it stands.
    """

    number: int
    frame: int
    donor: int
    kind: str
    size: float
    look: int
    at_xy: tuple[int, int]
    box_xyxy: tuple[int, int, int, int]
    cell: tuple[int, int]


class CompositeMaker:
    """Makes the composites of a plan; they depend on frames, plan and region of interest alone.

    Args:
        frames: nominal frames of one size.
        drives: name of the drive of each frame; controls show pixels of the same drive.
        plan: what is pasted where.
        roi: things lie inside it.
        cutouts: things by kind that are used beside the rendered ones.

    Raises:
        InputError: too few frames, a size larger than the image, a distance that the camera does
            not see, or no place inside the region of interest.
        UnknownNameError: an unknown kind.
    """

    def __init__(
        self,
        frames: Sequence[Frame],
        drives: Sequence[str],
        plan: CompositePlan,
        roi: RegionOfInterest,
        cutouts: Mapping[str, Sequence[Cutout]] | None = None,
    ) -> None:
        if len(frames) < MIN_FRAMES:
            raise InputError(
                f"drive: expected at least {MIN_FRAMES} frames, found {len(frames)}: controls show "
                "other frames of the drive"
            )
        members = {name: [n for n, d in enumerate(drives) if d == name] for name in drives}
        alone = [name for name, numbers in members.items() if len(numbers) < 2]
        if alone:
            raise InputError(
                f"drive '{alone[0]}': expected at least two of the frames that are used, for the "
                "controls, found one"
            )
        self._others = [[n for n in members[d] if n != i] for i, d in enumerate(drives)]
        self.frames, self.plan, self._cutouts = tuple(frames), plan, dict(cutouts or {})
        self.image_hw = frames[0].image_hw
        check_kinds(plan.kinds, self._cutouts)
        height, width = self.image_hw
        sizes = tuple(max(_SMALLEST_PX, round(share * height)) for share in _DEFAULT_SIZES)
        self.sizes = plan.distances_m or plan.sizes_px or tuple(dict.fromkeys(sizes))
        self.unit = "m" if plan.distances_m else "px"
        needed = len(plan.kinds) * len(self.sizes)
        if plan.composites < needed:
            raise InputError(
                f"composites: expected at least {needed}, one of each kind and size, found "
                f"{plan.composites}"
            )
        if self.unit == "px" and max(self.sizes) > min(self.image_hw):
            raise InputError(
                f"sizes: expected at most {min(self.image_hw)} px, the shorter side of the images "
                f"of {width}x{height}, found {max(self.sizes):g}"
            )
        if self.unit == "m" and not set(plan.kinds).isdisjoint(self._cutouts):
            raise InputError("distances: expected rendered kinds, found cut-outs of unknown size")
        self._cutout = lru_cache(maxsize=None)(self._made)
        for size, kind in itertools.product(self.sizes, plan.kinds):
            self._check_fits(kind, size)
        self._light = [_light(frame.image) for frame in frames]
        self._noise = [_noise(frame.image) for frame in frames]
        self._roi_mask = roi.pixel_mask(self.image_hw)
        self.pastes = tuple(self._planned())

    def composite(self, paste: Paste) -> tuple[np.ndarray, np.ndarray]:
        """Return the frame with the thing, (height, width, 3) uint8, and its mask, bool."""
        cutout, image = self._cutout(paste.kind, paste.size, paste.look), self._image(paste.frame)
        rng = np.random.default_rng([self.plan.seed, paste.number, 1])
        noise = rng.normal(0, self._noise[paste.frame], cutout.image.shape)
        light = 1.0 if paste.kind in self._cutouts else self._light[paste.frame]
        colours = np.clip(cutout.image * light + noise, 0, 255).astype(np.uint8)
        return blend(image, colours, cutout.alpha, cutout.shadow, paste.at_xy, _SOFTNESS_PX)

    def control(self, paste: Paste) -> np.ndarray:
        """Return the frame with the box of the thing from another frame, at its own place.

        Edges are blended as those of the thing.
        """
        x0, y0, x1, y1 = paste.box_xyxy
        colours = self._image(paste.donor)[y0:y1, x0:x1]
        alpha = np.ones((y1 - y0, x1 - x0), np.float32)
        shadow = np.zeros_like(alpha)
        image = self._image(paste.frame)
        return blend(image, colours, alpha, shadow, (x0, y0), _SOFTNESS_PX)[0]

    def _image(self, frame: int) -> np.ndarray:
        return self.frames[frame].image

    def _made(self, kind: str, size: float, look: int) -> Cutout:
        seed = 100 * self.plan.seed + look
        if kind in self._cutouts:
            things = self._cutouts[kind]
            # Enlarged things are blurred: the largest is taken where no other suffices.
            longer = [max(np.diff(np.reshape(c.box_xyxy, (2, 2)), axis=0)[0]) for c in things]
            sharp = [c for c, px in zip(things, longer, strict=True) if size <= _MOST_SCALE * px]
            sharp = sharp or [things[int(np.argmax(longer))]]
            return sharp[seed % len(sharp)].resized(size)
        if self.unit == "m":
            plan = self.plan
            try:
                return object_at(kind, seed, size, plan.focal_px, plan.camera_height_m)
            except ValueError as error:
                raise InputError(f"distances: {error}") from None
        return object_of_size(kind, seed, size)

    def _ground_row(self, distance_m: float) -> float:
        height = self.image_hw[0]
        horizon = (height - 1) / 2 if self.plan.horizon_px is None else self.plan.horizon_px
        return horizon + self.plan.focal_px * self.plan.camera_height_m / distance_m

    def _check_fits(self, kind: str, size: float) -> None:
        height, width = self.image_hw
        if self.unit == "m":
            row = self._ground_row(size)
            if not 0 < row < height:
                raise InputError(
                    f"distances: expected ground at {size:g} m in the image of {height} rows, "
                    f"found it in row {row:.0f}"
                )
        for look in range(_LOOKS):
            x0, y0, x1, y1 = self._cutout(kind, size, look).box_xyxy
            if x1 - x0 > width or y1 - y0 > height:
                raise InputError(
                    f"kind '{kind}' at {size:g} {self.unit}: expected at most the image of "
                    f"{width}x{height} px, found {x1 - x0}x{y1 - y0}"
                )

    def _planned(self) -> list[Paste]:
        plan, count = self.plan, self.plan.composites
        rng = np.random.default_rng([plan.seed, 7])
        pairs = list(itertools.product(plan.kinds, self.sizes))
        frames, boxes = len(self.frames), self._cell_boxes()
        orders = (rng.permutation(count) for _ in range(3))
        # Kinds, sizes, cells and frames are balanced, each independently of the others.
        pair_of, box_of, frame_of = (
            order % n for order, n in zip(orders, (len(pairs), len(boxes), frames), strict=True)
        )
        pastes = []
        for number in range(count):
            kind, size = pairs[pair_of[number]]
            frame = int(frame_of[number])
            look = int(rng.integers(_LOOKS))
            cutout = self._cutout(kind, size, look)
            wanted = int(box_of[number])
            at_xy, box = self._place(cutout, size, boxes, wanted, rng)
            donor = self._donor(frame, box, rng)
            pastes.append(
                Paste(number, frame, donor, kind, size, look, at_xy, box, self._cell(box))
            )
        return pastes

    def _cell_boxes(self) -> list[np.ndarray]:
        """Return the parts of cells in which things may stand, x0, y0, x1, y1 in px."""
        height, width = self.image_hw
        rows, cols = self.plan.cells
        scale = np.array([width, height, width, height])
        places = np.array(self.plan.places_xyxy) * scale
        boxes = []
        for row, col in itertools.product(range(rows), range(cols)):
            cell = np.array([col / cols, row / rows, (col + 1) / cols, (row + 1) / rows]) * scale
            low, high = np.maximum(cell[:2], places[:2]), np.minimum(cell[2:], places[2:])
            x0, y0, x1, y1 = (int(v) for v in np.rint([*low, *high]))
            if x0 < x1 and y0 < y1 and self._roi_mask[y0:y1, x0:x1].mean() >= 0.5:
                boxes.append(np.array([x0, y0, x1, y1]))
        if not boxes:
            raise InputError(
                f"places {self.plan.places_xyxy}: expected a place inside the region of interest, "
                "found none"
            )
        return boxes

    def _place(
        self,
        cutout: Cutout,
        size: float,
        boxes: list[np.ndarray],
        wanted: int,
        rng: np.random.Generator,
    ) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
        """Return where the cut-out is pasted, and the box of its thing."""
        height, width = self.image_hw
        x0, y0, x1, y1 = cutout.box_xyxy
        for attempt in range(_TRIES):
            # Another cell, if the thing does not fit into the wanted one.
            number = wanted if attempt < _TRIES // 2 else int(rng.integers(len(boxes)))
            left, top, right, bottom = boxes[number]
            foot_x, foot_y = rng.uniform(left, right), rng.uniform(top, bottom)
            if self.unit == "m":
                foot_y = self._ground_row(size)
            at_x, at_y = round(foot_x - cutout.foot_xy[0]), round(foot_y - cutout.foot_xy[1])
            # Things that the border would cut are moved.
            at_x = min(max(at_x, -x0), width - x1)
            if self.unit == "px":
                at_y = min(max(at_y, -y0), height - y1)
            box = at_x + x0, max(0, at_y + y0), at_x + x1, min(height, at_y + y1)
            if box[1] < box[3]:
                inside = self._roi_mask[box[1] : box[3], box[0] : box[2]]
                if inside.mean() >= _INSIDE:
                    return (at_x, at_y), box
        raise InputError(
            f"places {self.plan.places_xyxy}: expected places inside the region of interest for "
            f"{x1 - x0}x{y1 - y0} px, found none"
        )

    def _donor(self, frame: int, box: tuple[int, int, int, int], rng: np.random.Generator) -> int:
        """Return the one of some frames of the drive that fits best around a box."""
        others = self._others[frame]
        candidates = rng.choice(others, min(_DONORS, len(others)), replace=False)
        margin = max(_LEAST_RING_PX, max(box[2] - box[0], box[3] - box[1]) // 5)
        height, width = self.image_hw
        around = np.s_[
            max(0, box[1] - margin) : min(height, box[3] + margin),
            max(0, box[0] - margin) : min(width, box[2] + margin),
        ]
        ring = np.ones(self.image_hw, bool)
        ring[box[1] : box[3], box[0] : box[2]] = False
        ring = ring[around]
        own = self._image(frame)[around]
        # A box as wide and high as the image has no ring.
        ring = ring if ring.any() else np.ones_like(ring)
        misfits = [cv2.absdiff(own, self._image(int(n))[around])[ring].mean() for n in candidates]
        return int(candidates[int(np.argmin(misfits))])

    def _cell(self, box_xyxy: tuple[int, int, int, int]) -> tuple[int, int]:
        (height, width), (rows, cols) = self.image_hw, self.plan.cells
        x, y = (box_xyxy[0] + box_xyxy[2]) / 2, box_xyxy[3] - 1
        return min(int(y * rows / height), rows - 1), min(int(x * cols / width), cols - 1)


def check_kinds(kinds: Sequence[str], cutouts: Mapping[str, Sequence[Cutout]]) -> None:
    """Refuse kinds that are neither rendered nor cut out.

    Raises:
        UnknownNameError: naming the first one.
    """
    for kind in kinds:
        if kind not in ALL_KINDS and kind not in cutouts:
            raise UnknownNameError("kind", kind, (*ALL_KINDS, *cutouts))


def cutouts_of(dataset: Dataset) -> dict[str, list[Cutout]]:
    """Return the things that the masks of labelled images mark, by kind.

    A thing is a connected region of anomalous pixels that the border does not cut. Images without
    a kind give the kind 'cutout'.

    Raises:
        InputError: no image has a usable thing.
    """
    found: dict[str, list[Cutout]] = {}
    for frame, truth, labels in dataset:
        if not truth.anomaly or not truth.has_pixels:
            continue
        height, width = frame.image_hw
        mask = (labels == ANOMALY).astype(np.uint8)
        count, numbers, stats, _ = cv2.connectedComponentsWithStats(mask)
        for number in range(1, count):
            x, y, w, h, area = (int(v) for v in stats[number])
            if area < _LEAST_CUTOUT_PX or x < 1 or y < 1 or x + w >= width or y + h >= height:
                continue
            cut = np.s_[y : y + h, x : x + w]
            alpha = (numbers[cut] == number).astype(np.float32)
            things = found.setdefault(truth.kind or "cutout", [])
            if len(things) < _MOST_CUTOUTS:
                image = frame.image[cut].copy()
                things.append(Cutout(image, alpha, np.zeros_like(alpha), (w / 2, float(h))))
    if not found:
        raise InputError(
            f"cut-outs '{dataset.name}': expected masked things of at least {_LEAST_CUTOUT_PX} px "
            "that the border does not cut, found none"
        )
    return found


def _light(image: np.ndarray) -> float:
    """Return the factor that makes the colours of the library as bright as a frame."""
    low, high = _LIGHT_RANGE
    # A bright sky says little about the light on the ground.
    return float(np.clip(image[len(image) // 2 :].mean() / _LIGHT, low, high))


def _noise(image: np.ndarray) -> float:
    """Return the standard deviation of the noise of a frame, after Immerkaer (1996), robust."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    second = cv2.filter2D(grey, cv2.CV_32F, kernel)
    # The kernel multiplies the deviation of white noise by 6; the median ignores edges.
    return min(float(np.median(np.abs(second))) / (6 * 0.6745), 10.0)
