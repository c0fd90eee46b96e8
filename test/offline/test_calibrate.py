"""Index and calibration from folders of images, by the code that runs on the vehicle."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.colours import ColourEmbedder, street
from worlds.nominal_drives import SETTINGS, Countdown, calibrated, write_drives

from semantic_anomaly.detection.detector import AnomalyDetector, load_detector
from semantic_anomaly.errors import (
    ArtefactError,
    IndexMismatchError,
    SourceError,
    UnknownNameError,
)
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.open import open_source
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.offline.calibrate import _fold, calibrate
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.normalisation import NormalisationSums, class_anchors
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Decision


@pytest.fixture(scope="module")
def drives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drives(tmp_path_factory.mktemp("drives"))


@pytest.fixture(scope="module")
def index(drives: Path) -> NominalIndex:
    return build_index([drives / "index"], settings=SETTINGS, embedder=ColourEmbedder())


def test_index_holds_the_drive_and_names_it(index: NominalIndex, drives: Path) -> None:
    assert index.report.frames == 10 and index.report.seen == 10 * 9 * 16
    assert index.frame_names[0] == "index/000.png"
    assert index.manifest["written"]["source"] == ["index"]
    assert str(drives) not in str(index.manifest), "no path of this machine"
    by_hand = NominalIndex.build(
        (
            (frame, ColourEmbedder().embed([frame.image])[0])
            for frame in open_source(drives / "index")
        ),
        identity=ColourEmbedder().identity,
        roi=RegionOfInterest(),
        settings=SETTINGS,
    )
    assert by_hand.fingerprint == index.fingerprint


@pytest.mark.parametrize(("stride", "frames"), [(1, 10), (2, 5), (3, 4), (10, 1), (99, 1)])
def test_stride_uses_every_nth_frame(drives: Path, stride: int, frames: int) -> None:
    built = build_index(
        [drives / "index"], settings=SETTINGS, embedder=ColourEmbedder(), stride=stride
    )
    assert built.report.frames == frames


def test_frames_go_through_the_backbone_in_batches_of_four(drives: Path) -> None:
    embedder = Countdown()
    build_index([drives / "index", drives / "b"], settings=SETTINGS, embedder=embedder)
    assert embedder.batches == [4, 4, 2, 4, 2]


def test_index_of_selections_names_them(drives: Path) -> None:
    sources = [f"{drives / 'a'}[0:2]", f"{drives / 'b'}[1:6:2]"]
    built = build_index(sources, settings=SETTINGS, embedder=ColourEmbedder())
    assert built.manifest["written"]["source"] == ["a[0:2]", "b[1:6:2]"]
    assert built.report.frames == 5


def test_predicted_size_is_reported_beforehand(
    drives: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="semantic_anomaly.offline"):
        build_index(
            [drives / "index"],
            settings=SETTINGS,
            max_entries=1000000,
            embedder=ColourEmbedder(),
            stride=2,
        )
    (record,) = caplog.records
    most = NominalIndex.predicted_bytes(1000000, 4) / 1e6
    assert f"at most {most:.0f} MB (1000000 entries)" in record.message
    assert "all patches of the 5 frames were stored (144 per frame)" in record.message


def test_progress_stays_off_what_is_no_terminal(
    drives: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build_index([drives / "b"], settings=SETTINGS, embedder=ColourEmbedder(), progress=True)
    assert capfd.readouterr() == ("", "")


def test_scores_are_standardised_by_the_other_drives(index: NominalIndex, drives: Path) -> None:
    made = calibrated(index, [drives / "a", drives / "b"])
    assert made.drives == (("a", 7), ("b", 6)) and made.dtype == "float32"
    plain = AnomalyDetector(index, settings=SETTINGS, embedder=ColourEmbedder())
    embedded = {
        name: [ColourEmbedder().embed([frame.image])[0] for frame in open_source(drives / name)]
        for name in ("a", "b")
    }
    anchors = class_anchors(index.content.embeddings)
    assert anchors is not None
    sums = {name: NormalisationSums(anchors) for name in embedded}
    for name, grids in embedded.items():
        for grid in grids:
            distance_map = plain.distance_maps(grid)["grid"]
            sums[name].add(distance_map.values, distance_map.inside, distance_map.embeddings)
    scores, medians = [], []
    for name, other in (("a", "b"), ("b", "a")):
        detector = AnomalyDetector(
            index,
            settings=SETTINGS,
            embedder=ColourEmbedder(),
            normalisations={"grid": sums[other].normalisation()},
        )
        results = [detector.score(grid) for grid in embedded[name]]
        scores += [result.score for result in results]
        medians += [np.median(result.anomaly_map) for result in results]
    np.testing.assert_array_equal(made.scores, sorted(scores))
    assert made.heatmap_low == pytest.approx(np.median(medians))
    assert set(made.normalisations) == {"grid"}
    whole, of_both = made.normalisations["grid"], (sums["a"] + sums["b"]).normalisation()
    np.testing.assert_array_equal(whole.mean, of_both.mean)
    assert whole.classes is not None and of_both.classes is not None
    np.testing.assert_array_equal(whole.classes.mean, of_both.classes.mean)
    np.testing.assert_array_equal(whole.classes.anchors, anchors)


def test_patch_grids_in_memory_give_the_same_calibration(index: NominalIndex, drives: Path) -> None:
    grids = {
        name: [ColourEmbedder().embed([frame.image])[0] for frame in open_source(drives / name)]
        for name in ("a", "b")
    }
    from_grids = calibrate(index, grids, settings=SETTINGS)
    from_files = calibrated(index, [drives / "a", drives / "b"])
    assert from_grids.sha256 == from_files.sha256


def test_arrays_and_lists_of_files_are_sources(drives: Path) -> None:
    files = sorted((drives / "index").iterdir())
    arrays = [frame.image for frame in open_source(drives / "index")]
    of_folder, of_files, of_arrays = (
        build_index(sources, settings=SETTINGS, embedder=ColourEmbedder())
        for sources in (drives / "index", files, arrays)
    )
    assert of_files.fingerprint == of_folder.fingerprint
    np.testing.assert_array_equal(of_arrays.content.embeddings, of_folder.content.embeddings)


def test_an_existing_index_is_replaced_only_with_force(
    index: NominalIndex, drives: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "index"
    build = {"settings": SETTINGS, "embedder": ColourEmbedder(), "out": folder}
    build_index(drives / "index", **build)
    calibrate(index, [drives / "a", drives / "b"], settings=SETTINGS, out=folder,
              embedder=ColourEmbedder())  # fmt: skip
    embedder = Countdown()
    with pytest.raises(ArtefactError, match=r"entries.*1 calibration.*force"):
        build_index(drives / "b", **{**build, "embedder": embedder})
    assert embedder.batches == [], "refused before the work"
    assert (folder / "calibration.json").is_file()
    build_index(drives / "b", force=True, **build)
    assert not (folder / "calibration.json").exists()


def test_a_single_drive_is_split_into_folds(index: NominalIndex, drives: Path) -> None:
    assert [_fold(["a"], "a", n) for n in (0, 9, 10, 49, 50)] == [0, 0, 1, 4, 0]
    # Too short for two folds: it is standardised by itself.
    made = calibrate(
        index,
        [drives / "a"],
        settings=SETTINGS,
        target_false_alarm_rate=0.2,
        embedder=ColourEmbedder(),
    )
    assert made.normalisations and made.count == 7


def test_calibrated_detector_finds_what_is_odd(index: NominalIndex, drives: Path) -> None:
    made = calibrated(index, [drives / "a", drives / "b", drives / "c"])
    detector = AnomalyDetector(index, made, settings=SETTINGS, embedder=ColourEmbedder())
    assert detector.detect(street(1, odd=True)).decision is Decision.ANOMALY


def test_typical_distance_ignores_what_takes_no_part(drives: Path) -> None:
    roi = {"camera.region_of_interest": [0.0, 0.0, 0.2, 0.0, 0.2, 1.0, 0.0, 1.0]}
    settings = Settings.from_parameters({**SETTINGS.to_parameters(), **roi})
    arguments: dict[str, Any] = {"embedder": ColourEmbedder()}
    built = build_index([drives / "index"], settings=settings, **arguments)
    made = calibrate(built, [drives / "a", drives / "b"], settings=settings, **arguments)
    # Four fifths of the patches lie outside, and count as 0 in the map.
    assert made.heatmap_low > 0


def build(sources: list[Any], camera: str = "camera", **more: Any) -> None:
    build_index(sources, settings=SETTINGS, camera=camera, embedder=ColourEmbedder(), **more)


@pytest.mark.parametrize(
    ("attempt", "error", "message"),
    [
        (lambda d: build([]), SourceError, "at least one drive"),
        (lambda d: build([d / "missing"]), SourceError, "does not exist"),
        (lambda d: build([d / "a", d / "." / "a"]), SourceError, "given twice"),
        (lambda d: build([d / "a"], stride=0), SourceError, "stride: expected at least 1"),
        (lambda d: build([d / "a"], camera="rear"), UnknownNameError, "unknown camera 'rear'"),
    ],
)
def test_refuses(
    drives: Path, attempt: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        attempt(drives)


def test_calibration_by_a_mismatching_backbone_is_refused(
    index: NominalIndex, drives: Path
) -> None:
    with pytest.raises(IndexMismatchError):
        calibrate(
            index,
            [drives / "a", drives / "b"],
            settings=SETTINGS,
            embedder=ColourEmbedder(weights="1" * 64),
        )


def test_the_real_backbone_is_made_from_the_settings(
    drives: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    settings = SETTINGS.replace(
        backbone=str(tiny_backbone), input_size=126, index=str(tmp_path / "index")
    )
    built = build_index([drives / "index"], settings=settings, out=tmp_path / "index")
    calibrate(built, [drives / "a", drives / "b"], settings=settings, out=tmp_path / "index")
    # Backbone, input size and rate come from the folder.
    only_folder = Settings(index=str(tmp_path / "index"))
    detector = load_detector(only_folder, "camera", need_calibration=True)
    assert detector.settings.backbone == str(tiny_backbone)
    assert detector.settings.input_size == 126
    assert detector.settings.target_false_alarm_rate == 0.1
    result = detector.detect(street(1))
    assert result.decision is not Decision.UNKNOWN and result.heatmap.shape == (72, 128)
