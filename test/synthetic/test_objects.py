"""Rendered things: size, coverage, projection, and how they are blended in."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_anomaly.synthetic.objects import (
    ALL_KINDS,
    OBJECT_KINDS,
    USUAL_KINDS,
    Cutout,
    blend,
    object_at,
    object_of_size,
)


def longer_side(cutout: Cutout) -> int:
    x0, y0, x1, y1 = cutout.box_xyxy
    return max(x1 - x0, y1 - y0)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("size_px", [12, 60])
def test_things_have_the_size_that_is_asked_for(kind: str, size_px: int) -> None:
    cutout = object_of_size(kind, 1, size_px)
    # Thin ends of a ladder cover less than half of their pixels.
    assert 0.75 * size_px - 1 <= longer_side(cutout) <= size_px + 1
    assert cutout.alpha.min() >= 0 and 0.5 < cutout.alpha.max() <= 1
    assert 0 < cutout.shadow.max() <= 0.6
    x0, _, x1, y1 = cutout.box_xyxy
    foot_x, foot_y = cutout.foot_xy
    assert abs(foot_x - (x0 + x1) / 2) < 2 and abs(foot_y - y1) < 0.2 * size_px + 1


def test_looks_follow_from_the_seed() -> None:
    one, again, other = (object_of_size("cow", seed, 40) for seed in (1, 1, 2))
    assert np.array_equal(one.image, again.image) and np.array_equal(one.alpha, again.alpha)
    assert one.image.shape != other.image.shape or not np.array_equal(one.image, other.image)


def test_kinds_are_odd_or_usual() -> None:
    assert set(USUAL_KINDS).isdisjoint(OBJECT_KINDS)
    assert {"cow", "ladder", "bin"} <= set(OBJECT_KINDS)
    with pytest.raises(ValueError, match="unknown kind 'cows'; expected one of: cow"):
        object_of_size("cows", 0, 20)


def test_a_distance_gives_the_projected_size() -> None:
    near, far = (object_at("person", 0, distance, 500.0, 1.5) for distance in (10, 40))
    # A person is 1.79 m high.
    assert longer_side(near) == pytest.approx(500 * 1.79 / 10, abs=1.5)
    assert longer_side(far) == pytest.approx(500 * 1.79 / 40, abs=1.5)
    # Seen from 1.5 m the head is above the horizon: the foot is focal * 1.5 / distance below it.
    _, top, _, bottom = near.box_xyxy
    assert near.foot_xy[1] - top == pytest.approx(89.5, abs=1.5)
    assert bottom == pytest.approx(near.foot_xy[1], abs=1.5)
    with pytest.raises(ValueError, match=r"kind 'car': expected a distance of at least 3\.\d m"):
        object_at("car", 0, 2.0, 500.0, 1.5)


def test_resized_keeps_the_foot_in_place() -> None:
    cutout = object_of_size("sofa", 0, 80)
    half = cutout.resized(40)
    assert longer_side(half) == pytest.approx(40, abs=1)
    ratio = half.alpha.shape[0] / cutout.alpha.shape[0]
    assert half.foot_xy[1] == pytest.approx(cutout.foot_xy[1] * ratio, abs=1)


def test_a_cutout_shows_something() -> None:
    empty = np.zeros((4, 4), np.float32)
    with pytest.raises(ValueError, match="some alpha"):
        Cutout(np.zeros((4, 4, 3), np.uint8), empty, empty, (2.0, 4.0))


def test_blending_changes_the_thing_and_its_edges_only() -> None:
    image = np.full((40, 50, 3), 100, np.uint8)
    colours = np.full((10, 12, 3), 250, np.uint8)
    alpha, shadow = np.ones((10, 12), np.float32), np.zeros((10, 12), np.float32)
    result, mask = blend(image, colours, alpha, shadow, (20, 15), 0.6)
    assert np.array_equal(np.argwhere(mask)[[0, -1]], [[15, 20], [24, 31]])
    assert (result[17:23, 22:30] == 250).all(), "opaque inside"
    assert 100 < result[15, 25, 0] < 250, "soft at the edge"
    outside = np.ones(mask.shape, bool)
    outside[13:27, 18:34] = False
    assert (result[outside] == 100).all() and (image == 100).all()
    # Cut off at the border, and dark where there is a shadow alone.
    cut, corner = blend(image, colours, alpha, shadow, (-6, -5), 0.0)
    assert corner.sum() == 5 * 6 and (cut[:5, :6] == 250).all()
    dark, nothing = blend(image, colours, shadow, alpha * 0.5, (20, 15), 0.0)
    assert not nothing.any() and (dark[16:24, 21:31] == 50).all()
