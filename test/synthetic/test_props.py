"""Props: their height, on the ground, and their distinguishing parts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from semantic_anomaly.synthetic import props
from semantic_anomaly.synthetic.mesh import Mesh


def advertised(_: np.random.Generator) -> list[Mesh]:
    return props.billboard(np.zeros((110, 200, 3), np.uint8))


@pytest.mark.parametrize(
    ("make", "lowest", "highest"),
    [
        (props.person, 1.7, 1.85),
        (props.tree, 3.0, 8.5),
        (props.traffic_light, 3.35, 3.45),
        (props.stop_sign, 2.55, 2.65),
        (props.lamp_post, 5.9, 6.1),
        (props.bin_, 1.0, 1.1),
        (props.bench, 0.8, 0.9),
        (props.hedge, 1.05, 1.15),
        (advertised, 4.2, 4.4),
    ],
)
def test_props_stand_on_the_ground(
    make: Callable[[np.random.Generator], list[Mesh]], lowest: float, highest: float
) -> None:
    for seed in range(3):
        meshes = make(np.random.default_rng(seed))
        heights = np.concatenate([face.points for mesh in meshes for face in mesh.faces])[:, 1]
        assert abs(heights.min()) < 0.01
        assert lowest < heights.max() < highest


@pytest.mark.parametrize(("lit", "channel"), [(0, 0), (1, 0), (2, 1)])
def test_one_lamp_of_a_traffic_light_is_on(lit: int, channel: int) -> None:
    lamps = [f for f in props.traffic_light_head(lit).faces if len(f.points) > 4]
    bright = [face for face in lamps if max(face.colour) > 200]
    assert {int(np.argmax(face.colour)) for face in bright} == {channel}
    assert abs(np.mean([face.points[:, 1].mean() for face in bright]) - (0.84 - 0.31 * lit)) < 0.01


def test_colours_vary_around_the_palette() -> None:
    rng = np.random.default_rng(0)
    factors = {props.pick(rng, ((100.0, 50.0, 20.0),)) for _ in range(20)}
    assert len(factors) == 20
    assert all(85 <= red <= 115 and red == pytest.approx(2 * green) for red, green, _ in factors)
