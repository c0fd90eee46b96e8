"""Synthetic drives: deterministic, correctly labelled, and odd only at the anomaly."""

from __future__ import annotations

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

SIZE = (180, 320)
PARTS = {
    "stop_sign_on_billboard": "stop_sign",
    "traffic_lights_on_truck": "traffic_light",
    "person_on_car_roof": "person",
    "car_across_sidewalk": "car",
    "traffic_light_on_road": "traffic_light",
}


@pytest.fixture(scope="module")
def frames() -> list[StreetFrame]:
    """Return every seventh frame of a drive with all kinds of anomalies."""
    drive = StreetDrive(41, 500, anomalies=KINDS, image_hw=SIZE)
    return [drive.frame(i) for i in range(0, 500, 7)]


def grown(mask: np.ndarray, side: int) -> np.ndarray:
    return cv2.dilate(mask.astype(np.uint8), np.ones((side, side), np.uint8)).astype(bool)


def same(one: StreetFrame, other: StreetFrame) -> bool:
    arrays = ("image", "depth_m", "instances", "anomaly_mask")
    equal = all(np.array_equal(getattr(one, a), getattr(other, a)) for a in arrays)
    return equal and one.classes == other.classes and one.stamp_ns == other.stamp_ns


def test_frames_depend_only_on_seed_and_number() -> None:
    one, other = (StreetDrive(41, 46, anomalies=["cow"], image_hw=SIZE) for _ in range(2))
    names = [frame.name for frame in map(other.frame, (30, 2))]
    assert names == ["drive0000041_000030", "drive0000041_000002"]
    assert same(one.frame(2), other.frame(2))
    assert same(one.frame(30), other.frame(30))
    assert one.frame(30).kind == "cow"
    other_seed = StreetDrive(4, 1, image_hw=SIZE)
    assert not np.array_equal(one.frame(0).image, other_seed.frame(0).image)


def test_a_nominal_drive_has_no_anomaly() -> None:
    drive = StreetDrive(8, 4, image_hw=SIZE, start_ns=5)
    frames = list(drive)
    assert len(frames) == len(drive) == 4
    assert not any(f.kind or f.anomaly_mask.any() for f in frames)
    assert np.diff([f.stamp_ns for f in frames]).tolist() == [100_000_000] * 3
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


def test_all_kinds_come_in_order_with_nominal_sections_between(frames: list[StreetFrame]) -> None:
    labels = [frame.kind for frame in frames]
    runs = [label for i, label in enumerate(labels) if i == 0 or label != labels[i - 1]]
    assert runs == [None, *(label for kind in KINDS for label in (kind, None))]
    assert not any(frame.anomaly_mask.any() for frame in frames if frame.kind is None)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_anomaly_is_shown(kind: str, frames: list[StreetFrame]) -> None:
    odd = [frame for frame in frames if frame.kind == kind]
    assert len(odd) >= 3
    distances = []
    for frame in odd:
        assert frame.anomaly_mask.sum() >= 25 / 4
        (number,) = np.unique(frame.instances[frame.anomaly_mask])
        assert np.array_equal(frame.instances == number, frame.anomaly_mask)
        assert frame.classes[int(number)] == PARTS.get(kind, kind)
        distances.append(float(np.median(frame.depth_m[frame.anomaly_mask])))
    assert 4.5 < min(distances) <= max(distances) < 42
    assert distances == sorted(distances, reverse=True)


def test_the_world_is_the_same_with_and_without_anomalies() -> None:
    kinds = ("sofa", "person_on_car_roof", "stop_sign_on_billboard")
    drive = StreetDrive(41, 150, anomalies=kinds, image_hw=SIZE)
    nominal = StreetDrive(41, 150, image_hw=SIZE)
    shown = set()
    for i in range(10, 150, 11):
        odd, plain = drive.frame(i), nominal.frame(i)
        shown.add(odd.kind)
        new = np.isin(odd.instances, list(odd.classes.keys() - plain.classes.keys()))
        # A few things are removed for the anomaly, which shows what is behind them.
        gone = np.isin(plain.instances, list(plain.classes.keys() - odd.classes.keys()))
        changed = grown(new | gone, 9)
        shadows = grown((plain.instances == 0) & (odd.instances == 0) & (plain.depth_m > 0), 3)
        differs = (plain.image != odd.image).any(axis=2)
        # Things too thin for a pixel of their own still change colours.
        assert (differs & ~changed & ~shadows).sum() < 20
        assert (differs & ~changed).mean() < 0.1
    assert shown >= set(kinds)


def test_colour_histograms_do_not_separate_anomalies(frames: list[StreetFrame]) -> None:
    def histogram(frame: StreetFrame) -> np.ndarray:
        counts = cv2.calcHist([frame.image], [0, 1, 2], None, [6] * 3, [0, 256] * 3).ravel()
        return counts / counts.sum()

    drives = (StreetDrive(seed, 1, image_hw=SIZE) for seed in range(600, 605))
    index = [histogram(drive.frame(0)) for drive in drives]
    histograms = np.array([histogram(frame) for frame in frames])[:, None]
    chi = ((histograms - index) ** 2 / (histograms + index + 1e-9)).sum(axis=2)
    scores = np.stack([chi.mean(axis=1), chi.min(axis=1)], axis=1)
    odd = np.array([frame.kind is not None for frame in frames])
    auroc = (scores[odd][:, None] > scores[~odd][None]).mean(axis=(0, 1))
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
