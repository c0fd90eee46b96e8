"""Calibration by nominal drives, with the code that runs on the vehicle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from worlds import nominal_world
from worlds.colours import ColourEmbedder, street
from worlds.nominal_drives import SETTINGS, CountingEmbedder, build, calibrated, write_drives
from worlds.nominal_world import COARSE, PATCHES

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.detection.detector import AnomalyDetector, load_detector
from semantic_anomaly.embedding.identity import StageIdentity
from semantic_anomaly.errors import CalibrationError, IndexMismatchError
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.open import open_source
from semantic_anomaly.io.sources import Arrays
from semantic_anomaly.offline.calibrate import DRIVE_FOLDS, _GridDrives, calibrate
from semantic_anomaly.offline.drives import EmbeddedFrame
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.distances import FrameScorer
from semantic_anomaly.scoring.normalisation import NormalisationSums, class_anchors
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Decision, PatchGrid


@pytest.fixture(scope="module")
def drives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drives(tmp_path_factory.mktemp("drives"))


@pytest.fixture(scope="module")
def index(drives: Path) -> NominalIndex:
    return build(drives / "index")


@pytest.fixture(scope="module")
def grids(drives: Path) -> dict[str, list[PatchGrid]]:
    embedder = ColourEmbedder()
    return {
        name: [embedder.embed([frame.image])[0] for frame in open_source(drives / name)]
        for name in ("a", "b")
    }


def test_scores_are_standardised_by_the_other_drives(
    index: NominalIndex,
    drives: Path,
    grids: dict[str, list[PatchGrid]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    calibration = calibrated(index, [drives / "a", drives / "b"])
    assert calibration.frames_by_drive == {"a": 7, "b": 6} and calibration.dtype == "float32"
    assert not any(drive.left_out for drive in calibration.drives)
    assert "2 calibration drives" in caplog.text and "fewer than the 10 frames" in caplog.text
    scorer = FrameScorer(index, SETTINGS, RegionOfInterest())
    anchors = class_anchors(index.content.embeddings)
    assert anchors is not None
    sums = {name: NormalisationSums(anchors) for name in grids}
    for name, grids_of_drive in grids.items():
        for grid in grids_of_drive:
            distance_map = scorer.distance_maps(grid)[0]
            sums[name].add(distance_map.values, distance_map.inside, distance_map.embeddings)
    medians = []
    for drive, (name, other) in zip(calibration.drives, (("a", "b"), ("b", "a")), strict=True):
        normalisations = [sums[other].normalisation()]
        results = [scorer.score(grid, normalisations, None) for grid in grids[name]]
        np.testing.assert_array_equal(drive.scores, sorted(result.score for result in results))
        medians += [np.median(result.anomaly_map) for result in results]
    assert calibration.heatmap_low == pytest.approx(np.median(medians))
    assert len(calibration.normalisations) == 1
    whole, of_both = calibration.normalisations[0], (sums["a"] + sums["b"]).normalisation()
    np.testing.assert_array_equal(whole.mean, of_both.mean)
    assert whole.classes is not None and of_both.classes is not None
    np.testing.assert_array_equal(whole.classes.mean, of_both.classes.mean)
    np.testing.assert_array_equal(whole.classes.anchors, anchors)


def test_patch_grids_in_memory_give_the_same_calibration(
    index: NominalIndex, drives: Path, grids: dict[str, list[PatchGrid]]
) -> None:
    from_files = calibrated(index, [drives / "a", drives / "b"])
    with_embedder = calibrate(index, grids, settings=SETTINGS, embedder=ColourEmbedder())
    assert with_embedder.sha256 == from_files.sha256
    # Without one there are no scores of stored frames to compare another precision with.
    without = calibrate(index, grids, settings=SETTINGS)
    assert len(from_files.probe_scores) == 8 and not without.probe_scores
    assert without.sha256 == replace(from_files, probe_scores=(), pattern_scores=()).sha256


UNIT = np.ones((1, 1, 1), np.float32)


def folds_of(recordings: list[str], frames: list[tuple[str, int]]) -> list[int]:
    """Return the folds of frames, by recording and number."""
    drives, grid = _GridDrives(dict.fromkeys(recordings, ())), PatchGrid(UNIT, (8, 8))
    return [drives.fold(EmbeddedFrame(name, name, n, 0, grid)) for name, n in frames]


def test_the_frames_of_a_drive_are_in_one_fold() -> None:
    names = [f"drive_{n}" for n in range(2 * DRIVE_FOLDS + 1)]
    for count in (2, 3, DRIVE_FOLDS, len(names)):
        frames = [(name, n) for name in names[:count] for n in (0, 17, 1000)]
        folds = np.array(folds_of(names[:count], frames)).reshape(count, 3)
        assert (folds == folds[:, :1]).all()
        assert len(set(folds[:, 0])) == min(count, DRIVE_FOLDS)


def test_a_single_drive_is_split_into_folds(index: NominalIndex, drives: Path) -> None:
    assert folds_of(["a"], [("a", n) for n in (0, 9, 10, 49, 50)]) == [0, 0, 1, 4, 0]
    # Too short for two folds: it is standardised by itself.
    calibration = calibrated(index, drives / "a", target_false_alarm_rate=0.2)
    assert calibration.normalisations and calibration.count == 7


def test_calibrated_detector_detects_an_anomaly(index: NominalIndex, drives: Path) -> None:
    calibration = calibrated(index, [drives / "a", drives / "b", drives / "c"])
    detector = AnomalyDetector(index, calibration, settings=SETTINGS, embedder=ColourEmbedder())
    assert detector.detect(street(1, odd=True)).decision is Decision.ANOMALY


def test_frames_that_show_nothing_are_named_once(
    index: NominalIndex, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Too little memory to keep frames: they are read twice.
    monkeypatch.setattr("semantic_anomaly.offline.drives._KEPT_BYTES", 0)
    drives = [np.stack([street(10 * drive + n).image for n in range(6)]) for drive in (5, 6)]
    drives[0][:2] = 3
    sources = [Arrays(list(images), f"drive {n}") for n, images in enumerate(drives)]
    calibrate(index, sources, settings=SETTINGS, embedder=ColourEmbedder())
    assert caplog.text.count("2 of 6 frames are taken as nominal although") == 1


def test_typical_value_ignores_patches_outside_the_roi(drives: Path) -> None:
    roi = {"camera.region_of_interest": [0.0, 0.0, 0.2, 0.0, 0.2, 1.0, 0.0, 1.0]}
    settings = Settings.from_parameters({**SETTINGS.to_parameters(), **roi})
    index = build(drives / "index", settings=settings)
    # Four fifths of the patches lie outside, and are 0 in the map.
    assert calibrated(index, [drives / "a", drives / "b"], settings=settings).heatmap_low != 0


@pytest.mark.parametrize("stages", [(PATCHES,), (PATCHES, COARSE)])
def test_episodes_of_scores_below_zero(stages: tuple[StageIdentity, ...], tmp_path: Path) -> None:
    index = nominal_world.build(6, stages=stages)
    index.save(tmp_path)
    grids = {
        name: [grid for _, grid in nominal_world.make_frames(12, seed, stages)]
        for seed, name in enumerate("abcde", start=1)
    }
    # Means over the whole map: about half of them are below 0.
    scoring = Settings(tail_percent=100.0, confidence=0.3)
    settings = scoring.replace(
        **dict.fromkeys(("target_false_alarm_rate", "target_episode_rate"), 0.5),
        **dict.fromkeys(("episode_s", "confirm_s", "silence_s"), 0.1),
    )
    frames = calibrate(index, grids, settings=settings, out=tmp_path)
    assert frames.episodes is not None and frames.threshold < 0.0 < frames.scores[-1]
    # Every frame is an episode, and every score is confirmed.
    of_episodes = frames.episodes.scores_by_drive
    for episode_scores, drive in zip(of_episodes, frames.drives, strict=True):
        np.testing.assert_array_equal(episode_scores, drive.scores)
    assert Calibration.load(tmp_path).sha256 == frames.sha256
    embedder: Any = SimpleNamespace(device="cpu", stages=stages)
    loaded = load_detector(scoring.replace(index=str(tmp_path)), "camera", embedder=embedder)
    assert loaded.threshold == frames.threshold
    # A frame that is not confirmed counts as the least of its drive, not as 0.
    settings = settings.replace(confirm_count=2)
    pairs = calibrate(index, grids, settings=settings)
    assert pairs.episodes is not None
    for episode_scores, drive in zip(pairs.episodes.scores_by_drive, frames.drives, strict=True):
        assert (episode_scores <= drive.scores).all() and episode_scores[0] == drive.scores[0]
    assert pairs.episodes.threshold(settings) < frames.threshold == pairs.threshold_of(settings)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["a", "index[9:]", "b"], "has seen frame 'index/"),
        (["a[0:5]", "a[4:7]", "b"], r"'a/004\.png' is given twice"),
    ],
)
def test_seen_and_repeated_frames_are_refused(
    index: NominalIndex, drives: Path, sources: list[str], message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibrated(index, [f"{drives / source}" for source in sources])


def test_too_few_drives_are_refused_before_any_frame_is_embedded(
    index: NominalIndex, drives: Path
) -> None:
    embedder = CountingEmbedder()
    parts = [f"{drives / 'a'}[0:4]", f"{drives / 'a'}[4:7]", drives / "b"]
    with pytest.raises(CalibrationError, match=r"0\.7 needs at least 3 .*found 2"):
        calibrated(index, parts, embedder=embedder, confidence=0.7)
    assert embedder.batches == []


def test_a_drive_of_one_frame_is_refused(index: NominalIndex, drives: Path) -> None:
    message = "calibration drive 'b': expected at least 2 frames, found 1"
    with pytest.raises(CalibrationError, match=message):
        calibrated(index, [drives / "a", f"{drives / 'b'}[3:4]"])
    embedder = ColourEmbedder()
    grids = {name: embedder.embed([street(n).image]) for n, name in enumerate("cb", start=500)}
    with pytest.raises(CalibrationError, match="drive 'c': expected at least 2 frames, found 1"):
        calibrate(index, grids, settings=SETTINGS)
    # Frames count by recording: a part of one may have a single frame.
    calibration = calibrated(index, [drives / "a", f"{drives / 'b'}[3:4]", f"{drives / 'b'}[4:]"])
    assert calibration.frames_by_drive == {"a": 7, "b": 3}


def test_no_frames_at_all_are_refused(index: NominalIndex) -> None:
    with pytest.raises(CalibrationError, match="expected frames of nominal drives, found none"):
        calibrate(index, {"a": []}, settings=SETTINGS)


def test_another_backbone_is_refused(index: NominalIndex, drives: Path) -> None:
    other = ColourEmbedder(weights="1" * 64)
    with pytest.raises(IndexMismatchError):
        calibrated(index, [drives / "a", drives / "b"], embedder=other)


def test_the_real_backbone_is_made_from_the_settings(
    drives: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "index"
    settings = SETTINGS.replace(backbone=str(tiny_backbone), input_size=126)
    index = build(drives / "index", settings=settings, embedder=None, out=folder)
    calibrated(index, [drives / "a", drives / "b"], settings=settings, embedder=None, out=folder)
    # Backbone, input size and rate come from the folder.
    detector = load_detector(Settings(index=str(folder)), "camera", need_calibration=True)
    [stage] = detector.settings.stage_specs
    assert (stage.backbone, stage.size) == (str(tiny_backbone), 126)
    assert detector.settings.target_false_alarm_rate == 0.1
    result = detector.detect(street(1))
    assert result.decision is not Decision.UNKNOWN and result.heatmap.shape == (72, 128)
