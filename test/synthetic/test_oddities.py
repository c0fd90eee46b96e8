"""Anomalies: which part of them is odd, and what their nominal parts are."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_anomaly.synthetic.oddities import ODD_ARRANGEMENTS, ODDITIES
from semantic_anomaly.synthetic.world import World, make_world


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(3, 50.0)


@pytest.mark.parametrize("kind", ODDITIES)
def test_only_a_named_part_is_marked_as_odd(kind: str) -> None:
    for seed in range(3):
        meshes = ODDITIES[kind].make(np.random.default_rng(seed))
        odd = [face.odd for mesh in meshes for face in mesh.faces]
        assert any(odd) == bool(ODDITIES[kind].odd_part)
        assert not all(odd)


# The crown of the fallen tree reaches below the ground.
@pytest.mark.parametrize("kind", sorted(set(ODDITIES) - {"fallen_tree"}))
def test_an_anomaly_touches_the_ground(kind: str) -> None:
    meshes = ODDITIES[kind].make(np.random.default_rng(1))
    heights = np.concatenate([face.points for mesh in meshes for face in mesh.faces])[:, 1]
    assert -0.3 < heights.min() < 0.2


@pytest.mark.parametrize("kind", ODD_ARRANGEMENTS)
def test_the_parts_of_an_odd_arrangement_occur_in_the_nominal_world(
    kind: str, world: World
) -> None:
    oddity = ODD_ARRANGEMENTS[kind]
    assert {oddity.whole, oddity.odd_part} - {""} <= {thing.cls for thing in world.things}
