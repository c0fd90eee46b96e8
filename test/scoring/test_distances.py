"""Grid, instances, pairs and scenes: each by itself, together, and with parts that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.colours import IMAGE_HW, LEFT_HALF, ODD_BOX, PATCH, ColourEmbedder, said, street
from worlds.segmented_streets import ByRule, SegmentedColours, build, every_patch, halves, nothing

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.errors import (
    IndexMismatchError,
    MismatchError,
    ModelOutputError,
    SettingsError,
)
from semantic_anomaly.index.build import INSTANCES, PAIRS, SCENES
from semantic_anomaly.io.images import write_image
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.offline.calibrate import calibrate
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.scoring.distances import NO_INSTANCES
from semantic_anomaly.scoring.normalisation import CELLS_HW, UsualDistances
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Decision, PatchGrid

BASE = {"target_false_alarm_rate": 0.05, "dedup_distance": 0.0005, "smoothing": 0.0}
WHOLE = ImageRegion()
ODD = (
    slice(ODD_BOX[1] // PATCH, ODD_BOX[3] // PATCH),
    slice(ODD_BOX[0] // PATCH, ODD_BOX[2] // PATCH),
)


def made(**changes: Any) -> Settings:
    return Settings.from_parameters({**BASE, **changes})


def flat(mean: float, deviation: float) -> UsualDistances:
    return UsualDistances(
        np.full(CELLS_HW, mean, np.float32), np.full(CELLS_HW, deviation, np.float32)
    )


def detector(
    settings: Settings,
    embedder: SegmentedColours | None = None,
    usual: Mapping[str, UsualDistances] | None = None,
    region: ImageRegion = WHOLE,
) -> AnomalyDetector:
    embedder = embedder or SegmentedColours()
    index = build(embedder, settings, region=region)
    return AnomalyDetector(embedder, index, None, settings, region, usual)


@pytest.fixture(scope="module")
def drives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drives")
    for number, name in enumerate(("index", "a", "b", "c")):
        (folder / name).mkdir()
        for seed in range(14):
            image = street(1000 * number + seed).image
            write_image(folder / name / f"{seed:03d}.png", image)
    return folder


def test_instances_of_one_patch_each_are_the_grid() -> None:
    plain = {"place_normalisation": False}
    embedder = SegmentedColours(ByRule(every_patch))
    instances = detector(made(variant="instance", **plain), embedder)
    grid = AnomalyDetector(embedder, instances.index, None, made(**plain), WHOLE)
    for _, one in embedder.frames([40, 41], odd=True):
        for mine, other in zip(instances.score(one), grid.score(one), strict=True):
            np.testing.assert_allclose(mine, other, atol=1e-6)


def test_an_odd_instance_stands_out_as_a_whole() -> None:
    found = detector(made(variant="instance", place_normalisation=False),
                     SegmentedColours(ByRule(halves)))  # fmt: skip
    (_, odd), (_, nominal) = (found.embedder.frames([50], odd=o)[0] for o in (True, False))
    score, distances = found.score(odd)
    assert score > 10 * found.score(nominal)[0]
    inside = distances[ODD]
    assert np.ptp(inside) < 1e-6 and inside.min() == distances.max()
    outside = distances.copy()
    outside[ODD] = 0.0
    assert outside.max() < 0.1 * inside.min()


def test_no_instances_falls_to_the_grid_and_says_so() -> None:
    settings = made(variant="instance", place_normalisation=False)
    index = build(SegmentedColours(), settings)
    silent = SegmentedColours(ByRule(nothing))
    silent.segmenter = SegmentedColours().segmenter
    there = AnomalyDetector(silent, index, None, settings, WHOLE)
    grid = AnomalyDetector(silent, index, None, made(place_normalisation=False), WHOLE)
    frame = street(60, odd=True)
    result = there.detect(frame)
    assert result.note == NO_INSTANCES
    assert result.score == grid.detect(frame).score
    assert not grid.detect(frame).note


def test_uncovered_places_are_scored_by_the_grid() -> None:
    def sky_alone(image: np.ndarray, grid_hw: tuple[int, int]) -> np.ndarray:
        return halves(image, grid_hw)[:1]

    embedder = SegmentedColours(ByRule(sky_alone))
    settings = made(variant="instance", place_normalisation=False)
    found = detector(settings, embedder)
    grid = AnomalyDetector(embedder, found.index, None, made(place_normalisation=False), WHOLE)
    frame, one = embedder.frames([61], odd=True)[0]
    mixed, plain = found.score(one)[1], grid.score(one)[1]
    middle = IMAGE_HW[0] // PATCH // 2
    np.testing.assert_allclose(mixed[middle:], plain[middle:], atol=1e-6)
    assert np.ptp(mixed[:middle]) < 1e-6 < np.ptp(plain[:middle])
    assert not found.detect(frame).note


def test_branches_are_averaged_in_deviations() -> None:
    usual = {"grid": flat(0.1, 0.02), INSTANCES: flat(0.05, 0.01), PAIRS: flat(0.01, 0.005)}
    settings = made(variant="combined", surroundings_weight=0.3)
    embedder = SegmentedColours(ByRule(halves))
    found = detector(settings, embedder, usual)
    _, one = embedder.frames([62], odd=True)[0]
    plain = found.plain_distances(one)
    assert set(plain) == set(usual)
    mean = np.mean([(plain[b].values - u.typical[0]) / u.typical[1] for b, u in usual.items()], 0)
    wanted = np.clip(0.1 + 0.02 * mean, 0, 2)
    score, distances = found.score(one)
    np.testing.assert_allclose(distances, wanted, atol=1e-5)
    assert score == pytest.approx(wanted.max(), abs=1e-5)
    result = found.detect(street(62, odd=True))
    for branch, value in result.parts.items():
        top = ((plain[branch].values - usual[branch].typical[0]) / usual[branch].typical[1]).max()
        assert value == pytest.approx(top, rel=1e-3)


def test_the_pair_is_relative_to_its_surroundings() -> None:
    settings = made(variant="instance", surroundings_weight=0.4)
    embedder = SegmentedColours(ByRule(halves))
    found = detector(settings, embedder, {"grid": flat(0.1, 0.1), INSTANCES: flat(0.1, 0.1)})
    _, one = embedder.frames([63], odd=True)[0]
    pairs, instances = (found.plain_distances(one)[name].values for name in (PAIRS, INSTANCES))
    # Familiar surroundings explain nothing: the pair is as far as the instance, by its weight.
    assert pairs[ODD].max() == pytest.approx(0.6 * instances[ODD].max(), rel=0.05)
    assert (pairs >= 0).all()


def test_an_instance_counts_when_its_patches_agree() -> None:
    usual = {"grid": flat(0.002, 0.002), INSTANCES: flat(0.0001, 0.0001)}
    embedder = SegmentedColours(ByRule(halves))
    _, odd = embedder.frames([64], odd=True)[0]
    # An embedding that is odd although no patch of it is: all of its patches on one side.
    tinted = odd.features.copy()
    rows = tinted.shape[0] // 2
    tinted[:rows] += 0.02
    tinted /= np.linalg.norm(tinted, axis=2, keepdims=True)
    grid = replace(odd, features=tinted.astype(np.float32))
    maps = {}
    for agreement in (0.0, 0.5):
        settings = made(variant="instance", min_agreement=agreement)
        maps[agreement] = detector(settings, embedder, usual).score(grid)[1]
    np.testing.assert_array_equal(maps[0.0][ODD], maps[0.5][ODD])
    assert maps[0.5][:rows].max() < 0.5 * maps[0.0][:rows].max()


def test_scenes_compare_with_the_frames_that_look_alike() -> None:
    embedder = SegmentedColours()
    plain = {"place_normalisation": False, "dedup_distance": 0.0}
    every = made(scene_frames=1000, **plain)
    index = build(embedder, every)
    _, one = embedder.frames([70], odd=True)[0]
    exact = AnomalyDetector(embedder, index, None, made(search="exact", **plain), WHOLE).score(one)
    for mine, other in zip(
        AnomalyDetector(embedder, index, None, every, WHOLE).score(one), exact, strict=True
    ):
        np.testing.assert_allclose(mine, other, atol=1e-6)
    single = AnomalyDetector(embedder, index, None, made(scene_frames=1, **plain), WHOLE)
    scenes = index.parts[SCENES].content
    nearest = int(
        (scenes.embeddings @ (one.global_feature / np.linalg.norm(one.global_feature))).argmax()
    )
    rows = index.content.entries[:, 0] == nearest
    wanted = 1 - (one.features.reshape(-1, 4) @ index.content.embeddings[rows].T).max(axis=1)
    np.testing.assert_allclose(single.score(one)[1].ravel(), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("built", "wanted", "message"),
    [
        ({}, {"variant": "instance"}, "instances: expected a part of them, found none"),
        ({"variant": "instance"}, {"variant": "combined", "surroundings_weight": 0.3},
         "surroundings_weight: expected 0.0, found 0.3"),
        ({"variant": "instance", "surroundings_weight": 0.2},
         {"variant": "instance", "surroundings_weight": 0.3}, "expected 0.2, found 0.3"),
        ({}, {"scene_frames": 5}, "scenes: expected a part of them, found none"),
    ],
)  # fmt: skip
def test_an_index_without_what_is_needed_is_refused(
    built: dict[str, Any], wanted: dict[str, Any], message: str
) -> None:
    embedder = SegmentedColours()
    index = build(embedder, made(**built))
    with pytest.raises(IndexMismatchError, match=message):
        AnomalyDetector(embedder, index, None, made(**wanted), WHOLE)


def test_another_segmenter_or_none_is_refused() -> None:
    settings = made(variant="instance")
    index = build(SegmentedColours(), settings)
    with pytest.raises(IndexMismatchError, match="segmenter: expected tokens"):
        AnomalyDetector(SegmentedColours(ByRule(halves)), index, None, settings, WHOLE)
    with pytest.raises(SettingsError, match="needs a segmenter"):
        AnomalyDetector(ColourEmbedder(), index, None, settings, WHOLE)


@pytest.mark.parametrize(
    "parameters",
    [
        {"surroundings_weight": 0.3},
        {"min_agreement": 0.3},
        {"variant": "combined", "place_normalisation": False},
        {"variant": "instance", "min_agreement": 0.3, "place_normalisation": False},
        {"variant": "instance", "surroundings_weight": 1.0},
        {"variant": "instance", "surroundings_weight": -0.1},
        {"variant": "objects"},
        {"segmenter": "sam"},
        {"scene_frames": -1},
    ],
)
def test_settings_that_cannot_be_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        Settings.from_parameters(parameters)


def test_grids_without_instances_are_refused() -> None:
    found = detector(made(variant="instance", place_normalisation=False))
    _, one = found.embedder.frames([80])[0]
    bare = PatchGrid(one.features, one.global_feature, one.image_hw)
    with pytest.raises(ModelOutputError, match="segmented"):
        found.score(bare)


def test_the_region_of_interest_holds_for_all_branches() -> None:
    settings = made(variant="combined", surroundings_weight=0.3)
    usual = {"grid": flat(0.1, 0.02), INSTANCES: flat(0.05, 0.01), PAIRS: flat(0.01, 0.005)}
    found = detector(settings, SegmentedColours(), usual, LEFT_HALF)
    # The odd thing lies to the right.
    _, one = found.embedder.frames([81], odd=True)[0]
    assert not found.score(one)[1][:, 8:].any()
    assert found.score(one)[0] < 0.2


def test_built_calibrated_and_read_back_it_says_the_same(drives: Path, tmp_path: Path) -> None:
    settings = made(variant="combined", surroundings_weight=0.3, min_agreement=0.2, scene_frames=6)
    embedder = SegmentedColours()
    index = build_index(settings, "camera", [drives / "index"], embedder=embedder)
    assert set(index.parts) == {INSTANCES, PAIRS, SCENES}
    sources = [drives / name for name in "abc"]
    calibration = calibrate(settings, "camera", index, sources, embedder=embedder)
    assert set(calibration.usual) == {"grid", INSTANCES, PAIRS}
    assert calibration.scoring == settings.scoring
    index.save(tmp_path / "index")
    calibration.save(tmp_path / "index")
    running = settings.replace(index=str(tmp_path / "index"))
    loaded = AnomalyDetector.load(running, "camera", embedder=embedder)
    direct = AnomalyDetector(embedder, index, calibration, settings, WHOLE)
    for frame in (street(90), street(91, odd=True)):
        assert said(loaded.detect(frame)) == said(direct.detect(frame))
    assert loaded.detect(street(92, odd=True)).decision is Decision.ANOMALY
    assert loaded.detect(street(93)).decision is Decision.NOMINAL
    assert Calibration.load(tmp_path / "index").sha256 == calibration.sha256
    with pytest.raises(MismatchError, match="settings of the score"):
        AnomalyDetector.load(running.replace(min_agreement=0.4), "camera", embedder=embedder)
