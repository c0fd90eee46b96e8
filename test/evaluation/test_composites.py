"""Composites: what a plan refuses, and what is pasted where."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.labelled_drive import make_dataset

from semantic_anomaly.errors import InputError, UnknownNameError
from semantic_anomaly.evaluation.composites import CompositeMaker, CompositePlan, cutouts_of
from semantic_anomaly.evaluation.layouts import open_dataset
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.structures import Frame
from semantic_anomaly.synthetic.objects import OBJECT_KINDS

HW = (120, 160)
METRES = {"distances_m": (8.0, 20.0), "focal_px": 100.0, "camera_height_m": 1.5}


def noisy_frames(count: int = 12) -> list[Frame]:
    rng = np.random.default_rng(3)
    return [
        Frame(rng.integers(90 + n, 110 + n, (*HW, 3)).astype(np.uint8), name=f"{n}")
        for n in range(count)
    ]


def maker(roi: RegionOfInterest | None = None, **plan: Any) -> CompositeMaker:
    frames = noisy_frames()
    names = ["a"] * 6 + ["b"] * 6
    return CompositeMaker(frames, names, CompositePlan(**plan), roi or RegionOfInterest())


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"kinds": ()}, "kinds: expected at least one"),
        ({"kinds": ("cow", "cow")}, "kinds: expected each once, found cow, cow"),
        ({"sizes_px": (20,), "distances_m": (5.0,)}, "expected one of them"),
        ({"sizes_px": (2,)}, "sizes: expected at least 4 px"),
        ({"places_xyxy": (0.0, 0.9, 1.0, 0.5)}, "places: expected left < right"),
        ({"frames": 3}, "frames: expected at least 10, found 3"),
        ({"cells": (0, 4)}, "row and column"),
        ({**METRES, "focal_px": 0.0}, r"'camera_height_m', found 0 px and 1\.5 m"),
        ({**METRES, "camera_height_m": 0.0}, r"found 100 px and 0 m"),
        ({**METRES, "distances_m": (-1.0,)}, "distances: expected > 0 m"),
    ],
)
def test_a_plan_refuses_what_cannot_be(changes: dict[str, Any], pattern: str) -> None:
    with pytest.raises(InputError, match=pattern):
        CompositePlan(**changes)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        (
            {"composites": 31},
            "composites: expected at least 32, one of each kind and size, found 31",
        ),
        ({"sizes_px": (20, 121)}, r"at most 120 px, the shorter side .* 160x120, found 121"),
        ({**METRES, "distances_m": (1.9,)}, r"ground at 1\.9 m .* 120 rows, found it in row 138"),
        ({**METRES, "kinds": ("car",), "distances_m": (3.0,)}, r"distance of at least 3\.\d m"),
        ({"sizes_px": (115,), "kinds": ("sofa",)}, "places inside the region of interest"),
    ],
)
def test_a_plan_that_does_not_fit_the_images(changes: dict[str, Any], pattern: str) -> None:
    left_half = RegionOfInterest(((0.0, 0.0), (0.4, 0.0), (0.4, 1.0), (0.0, 1.0)))
    with pytest.raises(InputError, match=pattern):
        maker(left_half, **changes)


def test_unknown_kinds_and_drives_of_one_frame() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown kind 'cows' \(did you mean 'cow'\?\)"):
        maker(kinds=("cows",))
    frames, plan = noisy_frames(), CompositePlan()
    with pytest.raises(InputError, match="drive: expected at least 10 frames, found 9"):
        CompositeMaker(frames[:9], ["a"] * 9, plan, RegionOfInterest())
    with pytest.raises(InputError, match="drive 'b': expected at least two"):
        CompositeMaker(frames, ["a"] * 11 + ["b"], plan, RegionOfInterest())


def test_kinds_sizes_and_frames_are_balanced_and_follow_from_the_seed() -> None:
    made, again, other = (
        maker(composites=96, sizes_px=(10, 20, 30), seed=s).pastes for s in (1, 1, 2)
    )
    assert made == again and made != other
    assert set(Counter(p.kind for p in made).values()) == {12}
    assert set(Counter(p.size for p in made).values()) == {32}
    assert set(Counter((p.kind, p.size) for p in made).values()) == {4}
    assert set(Counter(p.frame for p in made).values()) == {8}
    assert {p.kind for p in made} == set(OBJECT_KINDS)
    # Controls show another frame of the same drive: frames 0 to 5 are of drive a.
    assert all(p.donor != p.frame and (p.donor < 6) == (p.frame < 6) for p in made)


def test_things_stand_in_the_places_asked_for() -> None:
    right = RegionOfInterest(((0.5, 0.0), (1.0, 0.0), (1.0, 1.0), (0.5, 1.0)))
    made = maker(right, composites=60, sizes_px=(12,), places_xyxy=(0.0, 0.5, 1.0, 0.75))
    for paste in made.pastes:
        x0, y0, x1, y1 = paste.box_xyxy
        assert x0 >= 76 and x1 <= 160 and y0 >= 0
        # What lies in front of the foot may be lower.
        assert 58 <= y1 <= 96
        row, col = paste.cell
        assert row * 20 <= y1 - 1 < (row + 1) * 20 and col * 20 <= (x0 + x1) / 2 < (col + 1) * 20


def test_the_composite_shows_the_thing_and_the_control_another_frame() -> None:
    made = maker(composites=16, sizes_px=(30,), kinds=("bin", "cow"))
    for paste in made.pastes:
        plain = made.frames[paste.frame].image
        image, mask = made.composite(paste)
        x0, y0, x1, y1 = paste.box_xyxy
        rows, cols = np.nonzero(mask)
        assert abs(rows.min() - y0) <= 1 and abs(cols.max() + 1 - x1) <= 1
        changed = (image.astype(int) - plain).any(axis=2)
        assert changed[mask].mean() > 0.95
        assert np.array_equal(image, made.composite(paste)[0]), "the noise is seeded"
        control = made.control(paste)
        donor = made.frames[paste.donor].image
        inside = np.s_[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3]
        assert np.array_equal(control[inside], donor[inside])
        outside = np.ones(HW, bool)
        outside[max(0, y0 - 3) : y1 + 3, max(0, x0 - 3) : x1 + 3] = False
        assert np.array_equal(control[outside], plain[outside])


def test_distances_put_things_on_the_ground_in_their_true_size() -> None:
    made = maker(**METRES, kinds=("person",), horizon_px=50.0, composites=12)
    assert made.unit == "m" and made.sizes == (8.0, 20.0)
    for paste in made.pastes:
        _, y0, _, y1 = paste.box_xyxy
        assert y1 == pytest.approx(50 + 100 * 1.5 / paste.size, abs=2)
        assert y1 - y0 == pytest.approx(100 * 1.79 / paste.size, abs=2)


def test_things_are_cut_from_labelled_images(tmp_path: Path) -> None:
    dataset = open_dataset(make_dataset(tmp_path / "labelled"))
    cutouts = cutouts_of(dataset)
    assert set(cutouts) == {"box", "crate"}
    [first, *_] = cutouts["box"]
    frame, _, labels = next(item for item in dataset if item[1].kind == "box")
    rows, cols = np.nonzero(labels == 1)
    assert first.image.shape[:2] == (np.ptp(rows) + 1, np.ptp(cols) + 1)
    assert np.array_equal(first.image[0, 0], frame.image[rows.min(), cols.min()])
    plan = CompositePlan(kinds=("box", "cow"), sizes_px=(20,), composites=20)
    made = CompositeMaker(noisy_frames(), ["a"] * 12, plan, RegionOfInterest(), cutouts)
    box = next(paste for paste in made.pastes if paste.kind == "box")
    x0, y0, x1, y1 = box.box_xyxy
    assert max(x1 - x0, y1 - y0) == pytest.approx(20, abs=1)
    plan = CompositePlan(kinds=("box",), composites=20, **METRES)
    with pytest.raises(InputError, match="distances: expected rendered kinds"):
        CompositeMaker(noisy_frames(), ["a"] * 12, plan, RegionOfInterest(), cutouts)
    with pytest.raises(InputError, match="masked things of at least 200 px"):
        cutouts_of(open_dataset(make_dataset(tmp_path / "nominal", "....")))
