"""Scenes: light on colours and textures, and clipping at the near plane."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_anomaly.synthetic.mesh import polygon
from semantic_anomaly.synthetic.scene import NEAR_M, LitMesh, clip_near, clip_textured

QUAD = np.array([(-1.0, 1, 2), (1, 1, 2), (1, -1, 2), (-1, -1, 2)])


def test_light_changes_colours_and_textures() -> None:
    texture = np.full((32, 64, 3), 100, np.uint8)
    light = np.array([0.5, 1.0, 3.0])
    plain = LitMesh(polygon(QUAD, (100.0, 100.0, 100.0)), light, own_id=False)
    assert (plain.colours, plain.textures) == ([[50, 100, 255]], [None])
    (levels,) = LitMesh(polygon(QUAD, (0.0, 0.0, 0.0), texture), light, own_id=False).textures
    assert levels is not None
    assert [level.shape for level in levels] == [(32, 64, 3), (16, 32, 3), (8, 16, 3)]
    assert all((level == (50, 100, 255)).all() for level in levels)


def test_only_odd_faces_have_an_id_of_their_own() -> None:
    mesh = polygon(QUAD, (0.0, 0.0, 0.0))
    ids = [LitMesh(m, np.ones(3), own).own_id for m in (mesh, mesh.as_odd()) for own in (0, 1)]
    assert [bool(own_id) for (own_id,) in ids] == [False, False, False, True]


def test_polygons_are_clipped_at_the_near_plane() -> None:
    assert np.array_equal(clip_near(QUAD), QUAD)
    assert len(clip_near(QUAD - (0, 0, 2))) == 0
    clipped = clip_near(np.array([(0.0, 0, NEAR_M - 1), (0, 0, NEAR_M + 1), (1, 0, NEAR_M + 1)]))
    expected = [(0, 0, NEAR_M), (0, 0, NEAR_M + 1), (1, 0, NEAR_M + 1), (0.5, 0, NEAR_M)]
    np.testing.assert_allclose(clipped, expected)


@pytest.mark.parametrize(("depths", "columns"), [((0, 2, 2, 0), (6, 20)), ((2, 0, 0, 2), (0, 14))])
def test_a_textured_quad_is_clipped_with_its_texture(
    depths: tuple[float, ...], columns: tuple[int, int]
) -> None:
    texture = np.tile(np.arange(20, dtype=np.uint8)[None, :, None], (4, 1, 3))
    quad = QUAD.copy()
    quad[:, 2] = depths
    clipped, part = clip_textured(quad, texture)
    assert np.array_equal(part, texture[:, columns[0] : columns[1]])
    assert clipped[:, 2].min() >= NEAR_M
    behind = np.array(depths) == 0
    assert np.array_equal(clipped[~behind], quad[~behind])
    assert len(clip_textured(quad * (1, 1, 0), texture)[0]) == 0
