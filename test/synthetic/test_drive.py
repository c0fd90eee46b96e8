"""Synthetic drives: deterministic, correctly labelled, and odd only at the anomaly."""

from __future__ import annotations

import subprocess
import sys
from functools import lru_cache

import cv2
import numpy as np
import pytest

from semantic_anomaly.synthetic import (
    KINDS,
    ODD_ARRANGEMENTS,
    ODD_OBJECTS,
    StreetDrive,
    StreetFrame,
    family,
)

PARTS = {
    "stop_sign_on_billboard": "stop_sign",
    "traffic_lights_on_truck": "traffic_light",
    "person_on_car_roof": "person",
    "car_across_sidewalk": "car",
    "traffic_light_on_road": "traffic_light",
}


@lru_cache(maxsize=len(KINDS))
def frames_of(kind: str) -> tuple[list[StreetFrame], list[StreetFrame]]:
    """Return frames with an anomaly, and frames before and after it."""
    drive = StreetDrive(40 + KINDS.index(kind), 100, anomalies=[kind])
    seen = [f for f in (drive.frame(i) for i in range(32, 70, 9)) if f.kind]
    return seen, [drive.frame(0), drive.frame(99)]


def grown(mask: np.ndarray, side: int) -> np.ndarray:
    return cv2.dilate(mask.astype(np.uint8), np.ones((side, side), np.uint8)).astype(bool)


def same(one: StreetFrame, other: StreetFrame) -> bool:
    arrays = ("image", "depth_m", "instances", "anomaly_mask")
    equal = all(np.array_equal(getattr(one, a), getattr(other, a)) for a in arrays)
    return equal and one.classes == other.classes and one.stamp_ns == other.stamp_ns


def test_frames_depend_only_on_seed_and_number() -> None:
    one, other = (StreetDrive(3, 80, anomalies=["cow"]) for _ in range(2))
    assert [f.name for f in map(other.frame, (50, 2))] == [
        "drive0000003_000050",
        "drive0000003_000002",
    ]
    assert same(one.frame(2), other.frame(2))
    assert same(one.frame(50), other.frame(50))
    assert not np.array_equal(one.frame(50).image, StreetDrive(4, 80).frame(50).image)


def test_a_nominal_drive_has_no_anomaly() -> None:
    drive = StreetDrive(8, 8, image_hw=(180, 320), rate_hz=10.0, start_ns=5)
    frames = list(drive)
    assert len(frames) == len(drive) == 8
    assert not any(f.kind or f.anomaly_mask.any() for f in frames)
    assert np.diff([f.stamp_ns for f in frames]).tolist() == [100_000_000] * 7
    assert frames[0].stamp_ns == 5


def test_frames_have_consistent_ground_truth() -> None:
    drive = StreetDrive(9, 30, image_hw=(240, 424))
    frame = drive.frame(10)
    assert drive.camera.image_hw == (240, 424)
    assert (frame.image.shape, frame.image.dtype) == ((240, 424, 3), np.uint8)
    assert (frame.depth_m.shape, frame.depth_m.dtype) == ((240, 424), np.float32)
    assert (frame.instances.shape, frame.instances.dtype) == ((240, 424), np.int32)
    assert (frame.anomaly_mask.shape, frame.anomaly_mask.dtype) == ((240, 424), bool)
    assert set(np.unique(frame.instances)) - {0} == set(frame.classes)
    assert {"house", "car", "tree", "person"} <= set(frame.classes.values())
    assert np.isfinite(frame.depth_m).all()
    # The sky has no depth; the ground has that of its ray.
    assert frame.depth_m[0].min() == 0
    ground = (frame.instances == 0) & (frame.depth_m > 0)
    rows = np.nonzero(ground)[0]
    expected = drive.camera.fy * drive.camera.height_m / (rows - drive.camera.cy)
    assert np.median(np.abs(frame.depth_m[ground] / expected - 1)) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_anomaly_is_shown(kind: str) -> None:
    frames, around = frames_of(kind)
    assert len(frames) >= 3
    assert not any(frame.kind or frame.anomaly_mask.any() for frame in around)
    for frame in frames:
        assert frame.kind == kind
        assert frame.anomaly_mask.sum() >= 25
        (number,) = np.unique(frame.instances[frame.anomaly_mask])
        assert np.array_equal(frame.instances == number, frame.anomaly_mask)
        assert frame.classes[int(number)] == PARTS.get(kind, kind)
        assert 4.5 < np.median(frame.depth_m[frame.anomaly_mask]) < 42
    distances = [float(np.median(f.depth_m[f.anomaly_mask])) for f in frames]
    assert distances == sorted(distances, reverse=True)


@pytest.mark.parametrize("kind", ODD_ARRANGEMENTS)
def test_the_parts_of_an_odd_arrangement_occur_in_nominal_drives(kind: str) -> None:
    drive = StreetDrive(40 + KINDS.index(kind), 100)
    seen = {name for i in (0, 50, 99) for name in drive.frame(i).classes.values()}
    assert {PARTS[kind], "billboard", "truck", "car", "person"} <= seen


@pytest.mark.parametrize("kind", ["sofa", "person_on_car_roof", "stop_sign_on_billboard"])
def test_the_world_is_the_same_with_and_without_an_anomaly(kind: str) -> None:
    frames, _ = frames_of(kind)
    drive = StreetDrive(40 + KINDS.index(kind), 100)
    for odd in frames[::2]:
        plain = drive.frame(int(odd.name[-6:]))
        new = np.isin(odd.instances, list(odd.classes.keys() - plain.classes.keys()))
        # A few things are removed for the anomaly, which shows what is behind them.
        gone = np.isin(plain.instances, list(plain.classes.keys() - odd.classes.keys()))
        changed = grown(new | gone, 9)
        shadows = grown((plain.instances == 0) & (odd.instances == 0) & (plain.depth_m > 0), 3)
        differs = (plain.image != odd.image).any(axis=2)
        # Things too thin for a pixel of their own still change colours.
        assert (differs & ~changed & ~shadows).sum() < 20
        assert (differs & ~changed).mean() < 0.1


def test_several_kinds_come_in_order_with_nominal_sections_between() -> None:
    kinds = ("cow", "traffic_light_on_road", "sofa")
    drive = StreetDrive(12, 260, anomalies=kinds, image_hw=(90, 160))
    labels = [drive.frame(i).kind for i in range(0, 260, 9)]
    runs = [label for i, label in enumerate(labels) if i == 0 or label != labels[i - 1]]
    assert runs == [None, "cow", None, "traffic_light_on_road", None, "sofa", None]


def test_colour_histograms_do_not_separate_anomalies() -> None:
    def histogram(frame: StreetFrame) -> np.ndarray:
        counts = cv2.calcHist([frame.image], [0, 1, 2], None, [6] * 3, [0, 256] * 3).ravel()
        return counts / counts.sum()

    index = [
        histogram(drive.frame(i))
        for drive in (StreetDrive(600 + seed, 100) for seed in range(7))
        for i in (10, 80)
    ]

    def scores(frames: list[StreetFrame]) -> np.ndarray:
        histograms = np.array([histogram(frame) for frame in frames])[:, None]
        chi = ((histograms - index) ** 2 / (histograms + index + 1e-9)).sum(axis=2)
        return np.stack([chi.mean(axis=1), chi.min(axis=1)], axis=1)

    odd = scores([frame for kind in KINDS for frame in frames_of(kind)[0]])
    plain = scores([frame for kind in KINDS for frame in frames_of(kind)[1]])
    auroc = (odd[:, None] > plain[None]).mean(axis=(0, 1))
    assert auroc.max() < 0.8


def test_families() -> None:
    assert len(ODD_OBJECTS) >= 5
    assert len(ODD_ARRANGEMENTS) >= 5
    assert {family(k) for k in ODD_OBJECTS} == {"odd object"}
    assert {family(k) for k in ODD_ARRANGEMENTS} == {"odd arrangement"}


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"kind of anomaly 'unicorn'.*cow.*sofa"):
        StreetDrive(1, 100, anomalies=["unicorn"])
    with pytest.raises(ValueError, match=r"need at least (\d+) frames, found 100") as caught:
        StreetDrive(1, 100, anomalies=KINDS)
    count = int(str(caught.value).split("at least ")[1].split()[0])
    assert len(StreetDrive(1, count, anomalies=KINDS)) == count
    with pytest.raises(ValueError, match="expected frames >= 1"):
        StreetDrive(1, 0)
    with pytest.raises(IndexError, match="expected 0 to 9"):
        StreetDrive(1, 10).frame(10)


def test_importing_is_cheap() -> None:
    code = "import sys, semantic_anomaly.synthetic; print([m for m in sys.modules])"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not any(f"'{name}'" in names.stdout for name in ("rosbags", "torch", "rclpy", "ray"))
