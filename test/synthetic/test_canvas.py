"""Canvas: occlusion, depth, instance ids, shadows and the camera image of small scenes."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_anomaly.synthetic.canvas import Canvas
from semantic_anomaly.synthetic.mesh import Mesh, box, rectangle, solid
from semantic_anomaly.synthetic.scene import CameraModel, Scene
from semantic_anomaly.synthetic.world import Day, Thing

CAMERA = CameraModel(80.0, 80.0, 80.0, 40.0, (96, 160), 1.5)
DAY = Day((1.0, 1.0, 1.0), (90, 130, 190), (200, 200, 200), 0.01, 1.0, 0.0, 0.5, 0.5)
RED, BLUE = (200.0, 20.0, 20.0), (20.0, 20.0, 200.0)


def canvas() -> Canvas:
    ground = np.full((480, 640, 3), 100, np.uint8)
    noise = np.zeros((160, 224, 3), np.int16)
    return Canvas(Scene(CAMERA, DAY, ground, [], noise), (0.0, 1.5, 0.0), 0.0)


def wall(z: float, colour: tuple[float, float, float]) -> tuple[Thing, float]:
    return Thing("wall", (solid(box((2.0, 3.0, 0.5), colour, at=(0, 0, 0.25))),), 0.0, z), z


def test_an_empty_scene_has_ground_below_the_horizon() -> None:
    empty = canvas()
    depth = empty.depth()
    assert (depth[:40] == 0).all()
    assert depth[60] == pytest.approx(CAMERA.fy * CAMERA.height_m / 20)
    assert (empty.image[60:] == 100).all()
    assert not empty.ids.any()


@pytest.mark.parametrize("z", [5.0, 9.0])
def test_a_near_thing_hides_a_far_one(z: float) -> None:
    drawn = canvas()
    drawn.draw(*_numbered(wall(12.0, BLUE), 1))
    drawn.draw(*_numbered(wall(z, RED), 3))
    assert drawn.ids[38, 80] == 3
    assert drawn.depth()[38, 80] == pytest.approx(z, rel=1e-3)
    assert drawn.image[38, 80, 0] > 150
    assert (drawn.ids == 3).sum() == pytest.approx(2 * 3 * (80 / z) ** 2, rel=0.1)


def _numbered(placed: tuple[Thing, float], number: int) -> tuple[Thing, int, float]:
    return placed[0], number, placed[1]


def test_an_odd_part_has_the_next_id() -> None:
    parts: tuple[Mesh, ...] = (rectangle(-1, 0, 0, 2, RED), rectangle(0, 0, 1, 2, BLUE).as_odd())
    for odd_part, ids in (("sign", {0, 5, 6}), ("", {0, 5})):
        drawn = canvas()
        drawn.draw(Thing("board", parts, 0.0, 6.0, odd_part=odd_part), 5, 6.0)
        assert set(np.unique(drawn.ids)) == ids


def test_a_thing_beside_the_camera_is_clipped() -> None:
    drawn = canvas()
    long_box = (solid(box((1.0, 1.0, 8.0), RED)),)
    drawn.draw(Thing("car", long_box, 2.0, 0.0), 7, 0.0)
    rows, columns = np.nonzero(drawn.ids == 7)
    assert columns.min() > 80
    assert columns.max() == 159
    assert drawn.depth()[rows, columns].min() > 0.6


def test_shadows_darken_the_ground_under_things() -> None:
    drawn = canvas()
    drawn.draw_shadows([wall(4.0, RED)])
    changed = drawn.image != 100
    assert changed[41:].any()
    assert drawn.image[41:].min() == pytest.approx(100 * DAY.shadow, abs=1)
    untouched = canvas()
    untouched.draw_shadows([(Thing("house", (), 0.0, 4.0), 4.0)])
    assert (untouched.image[41:] == 100).all()


def test_haze_grows_with_distance() -> None:
    image = canvas().camera_image(0).astype(int)
    assert image[44, 80, 0] > image[60, 80, 0] > image[94, 80, 0] > 100
    assert image[94, 80, 0] < 105
