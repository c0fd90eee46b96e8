"""Drives along a street; every frame depends only on the seed and its number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from semantic_anomaly.synthetic import oddities
from semantic_anomaly.synthetic.canvas import Canvas
from semantic_anomaly.synthetic.scene import CameraModel, Scene
from semantic_anomaly.synthetic.world import VIEW_M, leaves_visible, make_oddity, make_world

ODD_OBJECTS = tuple(oddities.ODD_OBJECTS)
ODD_ARRANGEMENTS = tuple(oddities.ODD_ARRANGEMENTS)
KINDS = ODD_OBJECTS + ODD_ARRANGEMENTS
RATE_HZ = 10.0
# An anomaly is drawn only while its distance is in this range.
ANOMALY_NEAR_M, ANOMALY_FAR_M = 6.0, 40.0
# Nominal stretch before and after each anomaly.
LEAD_M = 4.0
# An anomaly with fewer visible pixels, in an image of 360x640, has no label.
MIN_ANOMALY_PX_AT_360 = 25


def family(kind: str) -> str:
    """Return the family of a kind of anomaly: 'odd object' or 'odd arrangement'.

    Raises:
        ValueError: an unknown kind.
    """
    if kind in ODD_OBJECTS:
        return "odd object"
    if kind in ODD_ARRANGEMENTS:
        return "odd arrangement"
    raise ValueError(f"unknown kind of anomaly '{kind}'; expected one of: {', '.join(KINDS)}")


@dataclass(frozen=True, eq=False)
class StreetFrame:
    """One rendered frame with its ground truth.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        depth_m: (H, W) float32, metres along the optical axis; 0 for the sky.
        instances: (H, W) int32 instance ids, 0 for ground and sky.
        classes: class name by instance id.
        anomaly_mask: (H, W) bool, visible pixels of the anomaly.
        kind: kind of the visible anomaly, None in a nominal frame.
        stamp_ns: stamp in nanoseconds.
        name: drive and frame number.
    """

    image: np.ndarray
    depth_m: np.ndarray
    instances: np.ndarray
    classes: dict[int, str]
    anomaly_mask: np.ndarray
    kind: str | None
    stamp_ns: int
    name: str


class StreetDrive:
    """A drive along the street of a seed at 10 frames/s, rendered on demand in any order.

    Args:
        seed: of street, day, traffic, speed and anomalies; >= 0.
        frames: number of frames.
        anomalies: kinds of anomaly, passed one after another with nominal sections between them.
        image_hw: (height, width) in pixels.
        start_ns: stamp of the first frame.

    Raises:
        ValueError: a value out of range, an unknown kind, or too few frames for the anomalies.
    """

    def __init__(
        self,
        seed: int,
        frames: int = 100,
        *,
        anomalies: Sequence[str] = (),
        image_hw: tuple[int, int] = (360, 640),
        start_ns: int = 0,
    ) -> None:
        if frames < 1 or seed < 0 or min(image_hw) < 32:
            raise ValueError(
                f"expected frames >= 1, seed >= 0 and sides >= 32 px, found {frames}, {seed}, "
                f"{image_hw}"
            )
        for kind in anomalies:
            family(kind)
        rng = np.random.default_rng(np.random.SeedSequence([seed, 5]))
        self.seed, self.name = seed, f"drive{seed:07d}"
        self._start_ns, self._anomalies = start_ns, tuple(anomalies)
        self._frames = frames
        self._speed = float(rng.uniform(5.5, 9.5))
        height, width = image_hw
        focal = width / (2 * np.tan(np.radians(float(rng.uniform(33, 37)))))
        horizon = height * float(rng.uniform(0.42, 0.48))
        camera_height = float(rng.uniform(1.35, 1.6))
        self.camera = CameraModel(focal, focal, width / 2, horizon, image_hw, camera_height)
        self._sway = rng.uniform(0, 2 * np.pi, 4)
        self._step_m = self._speed / RATE_HZ
        self._anomaly_zs = self._place_anomalies()

    @cached_property
    def _scene(self) -> Scene:
        # Built on first use: many drives can be constructed and validated with little memory.
        world = make_world(self.seed, self._frames * self._step_m)
        kept = np.ones(len(world.things), bool)
        anomalies = []
        for kind, z in zip(self._anomalies, self._anomaly_zs, strict=True):
            anomalies.append(make_oddity(kind, self.seed, z))
            camera_zs = np.arange(z - ANOMALY_FAR_M, z - ANOMALY_NEAR_M, 0.5)
            kept &= leaves_visible(world.things, anomalies[-1], camera_zs / self._speed)
        # Ids of nominal things do not depend on the anomalies; the odd part has the id after its
        # thing.
        numbered = [(n, thing) for n, thing in enumerate(world.things, start=1) if kept[n - 1]]
        first = len(world.things) + 1
        numbered += [(first + 2 * j, thing) for j, thing in enumerate(anomalies)]
        height, width = self.camera.image_hw
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, 9]))
        noise = rng.normal(0, world.day.noise, (height + 64, width + 64, 3))
        noise = np.clip(noise, -40, 40).astype(np.int16)
        return Scene(self.camera, world.day, world.ground, numbered, noise)

    def _place_anomalies(self) -> list[float]:
        """Return the position of each anomaly along the street in metres."""
        count = len(self._anomalies)
        if not count:
            return []
        section = self._frames * self._step_m / count
        # Each section has a nominal lead, the approach and a nominal rest.
        needed = ANOMALY_FAR_M - ANOMALY_NEAR_M + 2 * LEAD_M
        if section < needed:
            frames = int(np.ceil(count * needed / self._step_m))
            raise ValueError(
                f"{count} anomalies at {self._speed:.1f} m/s need at least {frames} frames, "
                f"found {self._frames}"
            )
        free = (section - needed) / 2
        return [i * section + free + LEAD_M + ANOMALY_FAR_M for i in range(count)]

    def __len__(self) -> int:
        """Return the number of frames."""
        return self._frames

    def __iter__(self) -> Iterator[StreetFrame]:
        """Yield the frames in order."""
        return (self.frame(i) for i in range(self._frames))

    def frame(self, i: int) -> StreetFrame:
        """Render frame i.

        Raises:
            IndexError: no such frame.
        """
        if not 0 <= i < self._frames:
            raise IndexError(f"frame {i}: expected 0 to {self._frames - 1}")
        t = i / RATE_HZ
        camera_z = self._speed * t
        a, b, c, d = self._sway
        camera_x = 0.12 * np.sin(0.5 * t + a) + 0.05 * np.sin(1.7 * t + b)
        camera_y = self.camera.height_m + 0.012 * np.sin(9 * t + c)
        yaw = 0.008 * np.sin(0.6 * t + d)
        canvas = Canvas(self._scene, (camera_x, camera_y, camera_z), yaw)
        visible = []
        for number, thing in self._scene.things:
            z = thing.z + thing.speed_z * t - camera_z
            near, far = (ANOMALY_NEAR_M, ANOMALY_FAR_M) if thing.kind else (-8.0, VIEW_M)
            if near - 0.01 <= z + thing.odd_z <= far:
                order = (thing.cls == "house", float(np.hypot(thing.x - camera_x, z)))
                visible.append((order, number, thing, z + camera_z))
        # Painter's order; behind houses there are only other houses.
        visible.sort(key=lambda item: item[0], reverse=True)
        canvas.draw_shadows([(thing, z) for _, _, thing, z in visible])
        classes = {}
        for _, number, thing, z in visible:
            classes[number] = thing.cls
            if thing.odd_part:
                classes[number + 1] = thing.odd_part
            canvas.draw(thing, number, z)
        height, width = self.camera.image_hw
        min_px = MIN_ANOMALY_PX_AT_360 * height * width / (360 * 640)
        kind, mask = None, np.zeros((height, width), bool)
        for number, thing in [(n, thing) for _, n, thing, _ in visible if thing.kind]:
            odd = canvas.ids == number + bool(thing.odd_part)
            if np.count_nonzero(odd) >= min_px:
                kind, mask = thing.kind, odd
        drawn = set(np.flatnonzero(np.bincount(canvas.ids.ravel())).tolist())
        return StreetFrame(
            image=canvas.camera_image(i),
            depth_m=canvas.depth(),
            instances=canvas.ids,
            classes={n: name for n, name in classes.items() if n in drawn},
            anomaly_mask=mask,
            kind=kind,
            stamp_ns=self._start_ns + round(i * 1e9 / RATE_HZ),
            name=f"{self.name}_{i:06d}",
        )
