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

from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.errors import IndexMismatchError, MismatchError, SourceError, UnknownNameError
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.open import open_source
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.offline.calibrate import _fold, calibrate
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.scoring.normalisation import PlaceSums, anchors_of
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Decision, Frame


@pytest.fixture(scope="module")
def drives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drives(tmp_path_factory.mktemp("drives"))


@pytest.fixture(scope="module")
def index(drives: Path) -> NominalIndex:
    return build_index(SETTINGS, "camera", [drives / "index"], embedder=ColourEmbedder())


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
        region=ImageRegion(),
        settings=SETTINGS,
    )
    assert by_hand.fingerprint == index.fingerprint


@pytest.mark.parametrize(("stride", "frames"), [(1, 10), (2, 5), (3, 4), (10, 1), (99, 1)])
def test_stride_takes_every_so_manieth_frame(drives: Path, stride: int, frames: int) -> None:
    built = build_index(
        SETTINGS, "camera", [drives / "index"], embedder=ColourEmbedder(), stride=stride
    )
    assert built.report.frames == frames


def test_frames_go_through_the_backbone_in_batches_of_four(drives: Path) -> None:
    embedder = Countdown()
    build_index(SETTINGS, "camera", [drives / "index", drives / "b"], embedder=embedder)
    assert embedder.batches == [4, 4, 2, 4, 2]


def test_index_of_selections_names_them(drives: Path) -> None:
    sources = [f"{drives / 'a'}[0:2]", f"{drives / 'b'}[1:6:2]"]
    built = build_index(SETTINGS, "camera", sources, embedder=ColourEmbedder())
    assert built.manifest["written"]["source"] == ["a[0:2]", "b[1:6:2]"]
    assert built.report.frames == 5


def test_predicted_size_is_reported_beforehand(
    drives: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="semantic_anomaly.offline"):
        build_index(
            SETTINGS.replace(max_entries=1000000),
            "camera",
            [drives / "index"],
            embedder=ColourEmbedder(),
            stride=2,
        )
    (record,) = caplog.records
    most = NominalIndex.predicted_bytes(1000000, 4, SETTINGS.graph_m) / 1e6
    assert f"at most {most:.0f} MB (1000000 entries)" in record.message
    assert "every patch of the 5 frames were stored (144 a frame)" in record.message


def test_progress_stays_off_what_is_no_terminal(
    drives: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build_index(SETTINGS, "camera", [drives / "b"], embedder=ColourEmbedder())
    assert capfd.readouterr() == ("", "")


def test_calibration_scores_frames_as_the_detector_does(index: NominalIndex, drives: Path) -> None:
    plain = SETTINGS.replace(place_normalisation=False)
    made = calibrate(
        plain, "camera", index, [drives / "a", drives / "b"], embedder=ColourEmbedder()
    )
    assert made.drives == (("a", 7), ("b", 6)) and made.dtype == "float32"
    assert not made.usual
    detector = AnomalyDetector(ColourEmbedder(), index, None, plain, ImageRegion())
    frames: list[Frame] = [*open_source(drives / "a"), *open_source(drives / "b")]
    results = [detector.detect(frame) for frame in frames]
    np.testing.assert_array_equal(made.scores, sorted(result.score for result in results))
    grids = [ColourEmbedder().embed([frame.image])[0] for frame in frames]
    medians = [np.median(detector.score(grid)[1]) for grid in grids]
    assert made.heatmap_low == pytest.approx(np.median(medians))
    made.check(index.fingerprint, plain, ImageRegion())
    with pytest.raises(MismatchError, match="place_normalisation"):
        made.check(index.fingerprint, SETTINGS, ImageRegion())


def test_scores_are_relative_to_what_is_usual_in_other_drives(
    index: NominalIndex, drives: Path
) -> None:
    made = calibrated(index, [drives / "a", drives / "b"])
    plain = AnomalyDetector(ColourEmbedder(), index, None, SETTINGS, ImageRegion())
    embedded = {
        name: [ColourEmbedder().embed([frame.image])[0] for frame in open_source(drives / name)]
        for name in ("a", "b")
    }
    anchors = anchors_of(index.content.embeddings, SETTINGS.usual_kinds)
    assert anchors is not None
    sums = {name: PlaceSums(anchors) for name in embedded}
    for name, grids in embedded.items():
        for grid in grids:
            found = plain.plain_distances(grid)["grid"]
            sums[name].add(found.values, found.inside, found.embeddings)
    scores = []
    for name, other in (("a", "b"), ("b", "a")):
        relative = AnomalyDetector(
            ColourEmbedder(), index, None, SETTINGS, ImageRegion(), {"grid": sums[other].usual()}
        )
        scores += [relative.score(grid)[0] for grid in embedded[name]]
    np.testing.assert_array_equal(made.scores, sorted(scores))
    assert set(made.usual) == {"grid"}
    whole, of_both = made.usual["grid"], (sums["a"] + sums["b"]).usual()
    np.testing.assert_array_equal(whole.mean, of_both.mean)
    assert whole.kinds is not None and of_both.kinds is not None
    np.testing.assert_array_equal(whole.kinds.mean, of_both.kinds.mean)
    np.testing.assert_array_equal(whole.kinds.anchors, anchors)


def test_a_single_drive_is_parted_into_stretches(index: NominalIndex, drives: Path) -> None:
    assert [_fold(["a"], "a", n) for n in (0, 9, 10, 49, 50)] == [0, 0, 1, 4, 0]
    # Too short for two stretches: what is usual is taken from itself.
    made = calibrate(
        SETTINGS.replace(target_false_alarm_rate=0.2),
        "camera",
        index,
        [drives / "a"],
        embedder=ColourEmbedder(),
    )
    assert made.usual and made.count == 7


def test_calibrated_detector_finds_what_is_odd(index: NominalIndex, drives: Path) -> None:
    made = calibrated(index, [drives / "a", drives / "b", drives / "c"])
    detector = AnomalyDetector(ColourEmbedder(), index, made, SETTINGS, ImageRegion())
    assert detector.detect(street(1, odd=True)).decision is Decision.ANOMALY


def test_typical_distance_ignores_what_takes_no_part(drives: Path) -> None:
    roi = {"camera.region_of_interest": [0.0, 0.0, 0.2, 0.0, 0.2, 1.0, 0.0, 1.0]}
    settings = Settings.from_parameters({**SETTINGS.to_parameters(), **roi})
    arguments: dict[str, Any] = {"embedder": ColourEmbedder()}
    built = build_index(settings, "camera", [drives / "index"], **arguments)
    made = calibrate(settings, "camera", built, [drives / "a", drives / "b"], **arguments)
    # Four fifths of the patches lie outside, and count as 0 in the map.
    assert made.heatmap_low > 0


def build(sources: list[Any], camera: str = "camera", **more: Any) -> None:
    build_index(SETTINGS, camera, sources, embedder=ColourEmbedder(), **more)


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
            SETTINGS,
            "camera",
            index,
            [drives / "a", drives / "b"],
            embedder=ColourEmbedder(weights="1" * 64),
        )


def test_the_real_backbone_is_made_from_the_settings(
    drives: Path, tiny_backbone: Path, tmp_path: Path
) -> None:
    settings = SETTINGS.replace(
        backbone=str(tiny_backbone), input_size=126, index=str(tmp_path / "index")
    )
    built = build_index(settings, "camera", [drives / "index"])
    built.save(tmp_path / "index")
    made = calibrate(settings, "camera", built, [drives / "a", drives / "b"])
    made.save(tmp_path / "index")
    detector = AnomalyDetector.load(settings, "camera", need_calibration=True)
    result = detector.detect(street(1))
    assert result.decision is not Decision.UNKNOWN and result.heatmap.shape == (72, 128)
