"""Composites over real drives: things in places where no car has seen them.

Of the frames of CamVid (Brostow et al. 2008), with classes of every pixel, `write_composites` makes
a labelled folder. Nominal frames carry pasted cars, persons and cyclists too, at their place and
size (the control), so that finding the pasting earns nothing. Kinds of anomaly: an odd object on
the road, cut from images of Road Anomaly, and odd arrangements of ordinary things.

Needs a folder with camvid/DRIVE/images, camvid/DRIVE/classes and road_anomaly/. All choices follow
from a seed.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from semantic_anomaly.io.images import encode_png, read_image

SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PERSON, CYCLIST = range(11)
DRIVES = ("0001TP", "0006R0", "0016E5_train", "0016E5_val")
NOMINAL = "nominal"
LEAST_ANOMALY_PX = 400
ODD_OBJECT = "odd object"
ODD_ARRANGEMENTS = (
    "overturned car",
    "sign lying on the road",
    "car in a wall",
    "person on a car roof",
    "sign on a car",
)
KINDS = (ODD_OBJECT, *ODD_ARRANGEMENTS)
# Left, top, width and height in pixels.
Box = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Cutout:
    """A thing cut out of an image.

    Attributes:
        image: (h, w, 3) uint8.
        mask: (h, w) float32 in [0, 1].
        bottom: row of its lowest pixel in its own frame.
        light: mean brightness of its own frame.
    """

    image: np.ndarray
    mask: np.ndarray
    bottom: int
    light: float


def cutouts_of(
    image: np.ndarray, labels: np.ndarray, value: int, least_px: int, aspects: tuple[float, float]
) -> list[Cutout]:
    """Return the connected regions of a label, of suitable size and height by width."""
    count, numbers, stats, _ = cv2.connectedComponentsWithStats((labels == value).astype(np.uint8))
    height, width = labels.shape
    found = []
    for number in range(1, count):
        x, y, w, h, area = (int(v) for v in stats[number])
        inside = x > 2 and y > 2 and x + w < width - 2 and y + h < height - 2
        if not inside or area < least_px or not aspects[0] <= h / w <= aspects[1]:
            continue
        if area < (0.55 if value == CAR else 0.4) * w * h:
            continue
        cut = np.s_[y : y + h, x : x + w]
        mask = (numbers[cut] == number).astype(np.float32)
        found.append(Cutout(image[cut].copy(), mask, y + h, float(image.mean())))
    return found


class CompositeMaker:
    """Makes composites over the frames of one drive.

    Args:
        data: folder of the drives.
        drive: the drive whose frames are changed; cars and persons are cut from it where it has
            enough of them.
        odd: things that do not belong on a road.
        seed: of all choices.
    """

    def __init__(self, data: Path, drive: str, odd: Sequence[Cutout], seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._odd = list(odd)
        self.files = sorted((data / drive / "images").iterdir())
        self._things: dict[int, list[Cutout]] = defaultdict(list)
        plans = {CAR: (500, (0.4, 1.2)), PERSON: (180, (1.4, 4.5)), CYCLIST: (250, (0.8, 3.0))}
        plans[SIGN] = (90, (0.5, 3.0))
        for name in (drive, *(d for d in DRIVES if d != drive)):
            lacking = {value: p for value, p in plans.items() if len(self._things[value]) < 6}
            if not lacking:
                break
            for file in sorted((data / name / "images").iterdir()):
                image, labels = self.read(file)
                for value, plan in lacking.items():
                    self._things[value] += cutouts_of(image, labels, value, *plan)
        # Heights of cars rise with the distance of their lowest row from the horizon.
        bottoms = np.array([c.bottom for c in self._things[CAR]], float)
        heights = np.array([c.image.shape[0] for c in self._things[CAR]], float)
        slope, offset = np.polyfit(bottoms, heights, 1)
        self._horizon = float(np.clip(-offset / max(slope, 0.1), 110, 185))
        self._car_height = float(np.median(heights / np.maximum(bottoms - self._horizon, 5)))

    @staticmethod
    def read(file: Path) -> tuple[np.ndarray, np.ndarray]:
        """Return image and classes of a frame."""
        labels = cv2.imread(str(file.parent.parent / "classes" / f"{file.stem}.png"), 0)
        return read_image(file), np.asarray(labels)

    def make(self, file: Path, kind: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the frame with one or two pasted things, and the mask of the anomaly.

        Args:
            file: frame of the drive.
            kind: kind of the anomaly; nominal: things in their places alone.
        """
        image, labels = self.read(file)
        pasted = int(self._rng.integers(1, 3))
        for _ in range(40):
            canvas, mask, taken = image.copy(), np.zeros(labels.shape, bool), labels.copy()
            done = True
            if kind != NOMINAL:
                done = _MAKERS[kind](self, canvas, taken, mask)
            for _ in range(pasted - (kind != NOMINAL)):
                done = done and self._usual(canvas, taken)
            if done and (kind == NOMINAL or mask.sum() >= LEAST_ANOMALY_PX):
                return canvas, mask
        return None

    def _pick(self, value: int) -> Cutout:
        things = self._things[value]
        return things[int(self._rng.integers(len(things)))]

    def _usual(self, canvas: np.ndarray, taken: np.ndarray) -> bool:
        """Paste a car or cyclist on the road, or a person on the pavement."""
        value = int(self._rng.choice([CAR, CAR, PERSON, PERSON, CYCLIST]))
        ground = PAVEMENT if value == PERSON else ROAD
        return self._on_ground(canvas, taken, self._pick(value), ground, value) is not None

    def _on_ground(
        self,
        canvas: np.ndarray,
        taken: np.ndarray,
        thing: Cutout,
        ground: int,
        value: int,
        height: Callable[[float], float] | None = None,
    ) -> np.ndarray | None:
        """Paste a thing where its lowest rows are on the ground; return its mask."""
        for _ in range(40):
            bottom = float(self._rng.uniform(self._horizon + 40, 330))
            wanted = (
                thing.image.shape[0]
                * (bottom - self._horizon)
                / (max(thing.bottom - self._horizon, 12))
            )
            if height is not None:
                wanted = height(self._car_height * (bottom - self._horizon))
            scale = wanted / thing.image.shape[0]
            size = round(scale * thing.image.shape[1]), round(wanted)
            if not (0.2 <= scale <= 1.4 and size[0] >= 10 and 16 <= size[1] <= 190):
                continue
            left = int(self._rng.integers(2, max(3, 478 - size[0])))
            top = round(bottom) - size[1]
            if top < 2 or left + size[0] > 478:
                continue
            foot = taken[max(top, round(bottom) - 4) : round(bottom), left : left + size[0]]
            whole = taken[top : round(bottom), left : left + size[0]]
            busy = np.isin(whole, (CAR, PERSON, CYCLIST)).mean()
            if not foot.size or (foot == ground).mean() < 0.8 or busy > 0.15:
                continue
            return self._paste(canvas, taken, thing, (left, top), size, value)
        return None

    def _paste(
        self,
        canvas: np.ndarray,
        taken: np.ndarray,
        thing: Cutout,
        at: tuple[int, int],
        size: tuple[int, int],
        value: int,
    ) -> np.ndarray:
        """Paste a thing of (width, height) at (left, top) with soft edges; return its mask."""
        left, top = at
        gain = float(np.clip(canvas.mean() / max(thing.light, 1.0), 0.6, 1.5))
        patch = cv2.resize(thing.image, size, interpolation=cv2.INTER_AREA).astype(np.float32)
        soft = cv2.resize(thing.mask, size, interpolation=cv2.INTER_AREA)
        weight = np.zeros(taken.shape, np.float32)
        layer = canvas.astype(np.float32)
        cut = np.s_[top : top + size[1], left : left + size[0]]
        weight[cut], layer[cut] = soft, patch * gain
        weight = cv2.GaussianBlur(
            np.minimum(weight, cv2.erode(weight, np.ones((2, 2)))), (0, 0), 0.7
        )
        mixed = canvas + (layer - canvas) * weight[..., None]
        canvas[:] = np.clip(mixed, 0, 255).astype(np.uint8)
        mask = weight > 0.5
        taken[mask] = value
        return mask

    def _place_odd_object(self, canvas: np.ndarray, taken: np.ndarray, mask: np.ndarray) -> bool:
        thing = self._odd[int(self._rng.integers(len(self._odd)))]
        share = float(self._rng.uniform(0.5, 1.1))
        found = self._on_ground(canvas, taken, thing, ROAD, CAR, lambda car: share * car)
        return self._marked(mask, found)

    def _place_overturned(self, canvas: np.ndarray, taken: np.ndarray, mask: np.ndarray) -> bool:
        car = _turned(self._pick(CAR), 180 + float(self._rng.uniform(-12, 12)))
        return self._marked(mask, self._on_ground(canvas, taken, car, ROAD, CAR))

    def _place_sign(self, canvas: np.ndarray, taken: np.ndarray, mask: np.ndarray) -> bool:
        turn = float(self._rng.choice([-1, 1]) * self._rng.uniform(70, 110))
        share = float(self._rng.uniform(0.4, 0.8))
        sign = _turned(self._pick(SIGN), turn)
        found = self._on_ground(canvas, taken, sign, ROAD, SIGN, lambda car: share * car)
        return self._marked(mask, found)

    def _place_in_wall(self, canvas: np.ndarray, taken: np.ndarray, mask: np.ndarray) -> bool:
        car = self._pick(CAR)
        width, height = car.image.shape[1], car.image.shape[0]
        scale = float(np.clip(self._rng.uniform(35, 70) / height, 0.3, 1.2))
        size = round(width * scale), round(height * scale)
        for _ in range(60):
            left, top = (int(self._rng.integers(2, limit)) for limit in (478 - size[0], 200))
            wall = taken[top : top + size[1], left : left + size[0]]
            if (wall == BUILDING).mean() > 0.9:
                return self._marked(mask, self._paste(canvas, taken, car, (left, top), size, CAR))
        return False

    def _car_box(self, canvas: np.ndarray, taken: np.ndarray) -> Box | None:
        """Return left, top, width and height of a car that is there, or of one pasted now."""
        _, _, stats, _ = cv2.connectedComponentsWithStats((taken == CAR).astype(np.uint8))
        boxes = [
            (int(x), int(y), int(w), int(h))
            for x, y, w, h, area in stats[1:]
            if w >= 36 and h >= 26 and area > 0.5 * w * h and 0.4 <= h / w <= 1.2 and y > 60
        ]
        if boxes and self._rng.random() < 0.6:
            return boxes[int(self._rng.integers(len(boxes)))]
        mask = self._on_ground(canvas, taken, self._pick(CAR), ROAD, CAR)
        if mask is None or np.ptp(np.nonzero(mask)[1]) < 36:
            return None
        rows, cols = np.nonzero(mask)
        return int(cols.min()), int(rows.min()), int(np.ptp(cols)), int(np.ptp(rows))

    def _place_on_roof(self, canvas: np.ndarray, taken: np.ndarray, mask: np.ndarray) -> bool:
        def place(car_box: Box, width: int, height: int) -> tuple[int, int]:
            x, y, w, h = car_box
            left = x + round(w * float(self._rng.uniform(0.35, 0.65))) - width // 2
            return left, y + round(0.08 * h) - height

        return self._place_on_car(canvas, taken, mask, PERSON, (0.9, 1.2), place, 1.6, 0)

    def _place_sign_on_car(self, canvas: np.ndarray, taken: np.ndarray, mask: np.ndarray) -> bool:
        def place(car_box: Box, width: int, height: int) -> tuple[int, int]:
            x, y, w, h = car_box
            left = x + round((w - width) * float(self._rng.uniform(0.2, 0.8)))
            return left, y + round((h - height) * float(self._rng.uniform(0.1, 0.5)))

        return self._place_on_car(canvas, taken, mask, SIGN, (0.4, 0.65), place, 2.0, 6)

    def _place_on_car(
        self,
        canvas: np.ndarray,
        taken: np.ndarray,
        mask: np.ndarray,
        value: int,
        heights: tuple[float, float],
        place: Callable[[Box, int, int], tuple[int, int]],
        most_scale: float,
        least_width_px: int,
    ) -> bool:
        """Paste a thing on a car; its height is a share of the car's, `place` its left and top."""
        car_box, thing = self._car_box(canvas, taken), self._pick(value)
        if car_box is None:
            return False
        height = round(car_box[3] * float(self._rng.uniform(*heights)))
        width = round(thing.image.shape[1] * height / thing.image.shape[0])
        left, top = place(car_box, width, height)
        is_inside = top >= 2 and left >= 2 and left + width <= 478 and width >= least_width_px
        if not is_inside or height / thing.image.shape[0] > most_scale:
            return False
        found = self._paste(canvas, taken, thing, (left, top), (width, height), value)
        return self._marked(mask, found)

    @staticmethod
    def _marked(mask: np.ndarray, found: np.ndarray | None) -> bool:
        if found is None:
            return False
        mask |= found
        return True


_MAKERS = {
    ODD_OBJECT: CompositeMaker._place_odd_object,
    "overturned car": CompositeMaker._place_overturned,
    "sign lying on the road": CompositeMaker._place_sign,
    "car in a wall": CompositeMaker._place_in_wall,
    "person on a car roof": CompositeMaker._place_on_roof,
    "sign on a car": CompositeMaker._place_sign_on_car,
}


def _turned(thing: Cutout, degrees: float) -> Cutout:
    """Return a thing turned around its centre."""
    height, width = thing.mask.shape
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1.0)
    cos, sin = abs(matrix[0, 0]), abs(matrix[0, 1])
    size = math.ceil(height * sin + width * cos), math.ceil(height * cos + width * sin)
    matrix[:, 2] += (size[0] - width) / 2, (size[1] - height) / 2
    image = cv2.warpAffine(thing.image, matrix, size, borderMode=cv2.BORDER_REPLICATE)
    mask = cv2.warpAffine(thing.mask, matrix, size)
    rows, cols = np.nonzero(mask > 0.5)
    cut = np.s_[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1]
    return Cutout(image[cut], mask[cut], thing.bottom, thing.light)


def odd_things(folder: Path, half: int) -> list[Cutout]:
    """Return the anomalies of every second image of Road Anomaly: those of half 0 or 1."""
    files = sorted((folder / "images").iterdir(), key=lambda file: int(file.stem))
    things = []
    for file in files[half::2]:
        labels = np.asarray(cv2.imread(str(folder / "labels_masks" / f"{file.stem}.png"), 0))
        things += cutouts_of(read_image(file), labels, 1, 2500, (0.3, 3.0))
    return things


def write_composites(
    data: Path, out: Path, drives: Sequence[str], half: int, seed: int, of_each_kind: int
) -> None:
    """Write composites over drives as a labelled folder.

    Args:
        data: see the module.
        out: new folder.
        drives: whose frames are changed.
        half: of the images of Road Anomaly that odd objects are cut from.
        seed: of all choices.
        of_each_kind: composites of each kind of anomaly and drive; nominal ones are as many as all
            anomalies together.
    """
    odd = odd_things(data / "road_anomaly", half)
    (out / "images").mkdir(parents=True)
    (out / "masks").mkdir()
    labels: dict[str, dict[str, object]] = {}
    for number, drive in enumerate(drives):
        maker = CompositeMaker(data / "camvid", drive, odd, seed + number)
        rng = np.random.default_rng([seed, number])
        plan = [*KINDS, *[NOMINAL] * len(KINDS)] * of_each_kind
        order = np.resize(rng.permutation(len(maker.files)), len(plan))
        # All kinds of frames are spread over the whole drive.
        for position, kind in zip(order, rng.permutation(plan), strict=True):
            files = np.roll(np.array(maker.files, object), -int(position))
            attempts = ((file, maker.make(file, str(kind))) for file in files)
            file, made = next((a for a in attempts if a[1] is not None), (None, None))
            if file is None or made is None:
                continue
            name = f"{drive}_{len(labels):04d}.png"
            (out / "images" / name).write_bytes(encode_png(made[0]))
            described = {"anomaly": kind != NOMINAL, "drive": drive, "frame": file.name}
            if kind != NOMINAL:
                (out / "masks" / name).write_bytes(encode_png(made[1].astype(np.uint8)))
                described["kind"] = str(kind)
                described["family"] = "odd object" if kind == ODD_OBJECT else "odd arrangement"
            labels[name] = described
    (out / "labels.json").write_text(json.dumps(labels, indent=1))
