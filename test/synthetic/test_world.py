"""The world of a seed: reproducible, with a free lane, and with room for anomalies."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_anomaly.synthetic.world import Thing, leaves_visible, make_oddity, make_world


def test_a_world_follows_its_seed() -> None:
    first, again, other = (make_world(seed, 10.0) for seed in (5, 5, 6))
    positions = [[(thing.cls, thing.x, thing.z) for thing in w.things] for w in (first, again)]
    assert positions[0] == positions[1]
    assert np.array_equal(first.ground, again.ground)
    assert first.day == again.day != other.day


def test_the_lane_is_free_and_houses_stand_on_both_sides() -> None:
    things = make_world(5, 60.0).things
    assert all(abs(thing.x) - thing.footprint[0] > 1.2 for thing in things)
    sides = {np.sign(thing.x) for thing in things if thing.cls == "house"}
    assert sides == {-1, 1}
    assert {thing.cls for thing in things if thing.speed_z < -5} == {"car", "truck"}


@pytest.mark.parametrize("kind", ["cow", "traffic_lights_on_truck"])
def test_the_odd_part_of_an_anomaly_is_at_its_position(kind: str) -> None:
    oddity = make_oddity(kind, 7, 50.0)
    faces = [face for mesh in oddity.meshes for face in mesh.faces if face.odd]
    mean_z = np.concatenate([face.points for face in faces])[:, 2].mean()
    assert oddity.z + mean_z == pytest.approx(oddity.z + oddity.odd_z) == pytest.approx(50.0)
    assert oddity.kind == kind


def test_things_that_overlap_or_hide_an_anomaly_are_removed() -> None:
    anomaly = Thing("sofa", (), 6.0, 50.0, footprint=(1.0, 1.0), kind="sofa")
    things = {
        "overlaps": Thing("bench", (), 6.5, 50.0),
        "hides": Thing("car", (), 3.0, 40.0),
        "passes in front": Thing("car", (), 3.0, 140.0, -10.0),
        "other side": Thing("car", (), -6.5, 50.0),
        "behind": Thing("tree", (), 9.0, 60.0),
        "house": Thing("house", (), 6.0, 50.0),
    }
    kept = leaves_visible(list(things.values()), anomaly, np.linspace(0, 10, 50))
    removed = [name for name, keep in zip(things, kept, strict=True) if not keep]
    assert removed == ["overlaps", "hides", "passes in front"]
