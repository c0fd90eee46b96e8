"""Vehicles: size, position of the wheels, and the load of a truck."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_anomaly.synthetic.mesh import Mesh, box, solid
from semantic_anomaly.synthetic.props import RUBBER
from semantic_anomaly.synthetic.vehicles import car, truck


def corners(meshes: list[Mesh]) -> np.ndarray:
    return np.concatenate([face.points for mesh in meshes for face in mesh.faces])


@pytest.mark.parametrize(("make", "length", "wheels"), [(car, 4.35, 4), (truck, 6.82, 6)])
def test_a_vehicle_stands_on_its_wheels(make: object, length: float, wheels: int) -> None:
    for seed in range(5):
        meshes = make(np.random.default_rng(seed))  # type: ignore[operator]
        extent = np.ptp(corners(meshes), axis=0)
        assert extent[2] == pytest.approx(length, abs=0.1)
        assert extent[0] < 2.6
        tyres = [f for mesh in meshes for f in mesh.faces if f.colour == RUBBER]
        assert len(tyres) == wheels
        assert all(abs(face.points[:, 1].min()) < 0.03 for face in tyres)


def test_a_load_replaces_the_random_one() -> None:
    load = [solid(box((1, 1, 1), (255, 0, 255), at=(0, 1.1, -1)))]
    empty, loaded = (truck(np.random.default_rng(0), meshes) for meshes in ([], load))
    assert len(loaded) == len(empty) + 1
    assert load[0] in loaded
    counts = {len(truck(np.random.default_rng(seed))) for seed in range(20)}
    assert len(counts) > 3
