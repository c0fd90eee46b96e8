"""Meshes: moving, and the orientation of solids."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_anomaly.synthetic.mesh import box, flat, layers, prism, shade, solid

GREY = (100.0, 100.0, 100.0)


@pytest.mark.parametrize(
    "hull", [box((2, 1, 4), GREY), prism([(-1, 0), (-1, 1), (1, 1), (1, 0)], 2.0, GREY)]
)
def test_faces_of_a_solid_point_outwards(hull: object) -> None:
    mesh = solid(hull)  # type: ignore[arg-type]
    centre = np.concatenate([face.points for face in mesh.faces]).mean(axis=0)
    for face in mesh.faces:
        a, b, c = face.points[:3]
        assert np.cross(b - a, c - a) @ (face.points.mean(axis=0) - centre) > 0


def test_meshes_are_scaled_turned_and_shifted() -> None:
    mesh = layers(flat([(0, 0), (1, 0), (1, 1)], GREY))
    (moved,) = mesh.moved(x=5.0, yaw=np.pi / 2, scale=2.0).faces
    np.testing.assert_allclose(moved.points, [(5, 0, 0), (5, 0, -2), (5, 2, -2)], atol=1e-12)
    (rolled,) = mesh.moved(roll=np.pi / 2).faces
    np.testing.assert_allclose(rolled.points[1], (0, 1, 0), atol=1e-12)


def test_colours_are_clipped() -> None:
    assert shade((200, 100, 0), 2.0) == (255.0, 200.0, 0.0)
