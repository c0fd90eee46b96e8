"""Calibration by the drives of the index itself, each compared with the entries of the others."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from worlds.colours import ColourEmbedder, street
from worlds.nominal_drives import SETTINGS, CountingEmbedder, build, calibrated, write_drives

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.errors import CalibrationError, InputError, SourceError
from semantic_anomaly.index.edits import add_nominal
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.open import open_source
from semantic_anomaly.io.sources import Arrays
from semantic_anomaly.offline import drives as drives_module
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.offline.calibrate import _median_distances, calibrate
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.distances import FrameScorer
from semantic_anomaly.scoring.normalisation import NormalisationSums, class_anchors
from semantic_anomaly.structures import PatchGrid


@pytest.fixture(scope="module")
def drives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drives(tmp_path_factory.mktemp("drives"))


@pytest.fixture(scope="module")
def index(drives: Path) -> NominalIndex:
    return build([drives / name for name in "abc"])


@pytest.fixture(scope="module")
def calibration(index: NominalIndex) -> Calibration:
    return calibrated(index, None)


def grids_of(source: Path | str) -> list[PatchGrid]:
    embedder = ColourEmbedder()
    return [embedder.embed([frame.image])[0] for frame in open_source(source)]


def write_drive(folder: Path, first: int, count: int = 4) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        image = street(first + number).image[..., ::-1]
        cv2.imwrite(str(folder / f"{number:03d}.png"), image)
    return folder


def scored(
    index: NominalIndex, grids: dict[str, list[PatchGrid]], left_out: str
) -> dict[str, np.ndarray]:
    """Return the scores of drives, those of `left_out` compared with the entries of others."""
    scorers = {
        name: FrameScorer(
            index.without(name) if name in left_out else index, SETTINGS, RegionOfInterest()
        )
        for name in grids
    }
    anchors = class_anchors(index.content.embeddings)
    sums = {name: NormalisationSums(anchors) for name in grids}
    for name, of_drive in grids.items():
        for grid in of_drive:
            [distances] = scorers[name].distance_maps(grid)
            sums[name].add(distances.values, distances.inside, distances.embeddings)
    scores = {}
    for name, of_drive in grids.items():
        first, *rest = (sums[other] for other in grids if other != name)
        normalisation = sum(rest, start=first).normalisation()
        results = [scorers[name].score(grid, [normalisation], None) for grid in of_drive]
        scores[name] = np.sort([result.score for result in results])
    return scores


def check_scores(calibration: Calibration, expected: dict[str, np.ndarray]) -> None:
    assert [drive.name for drive in calibration.drives] == list(expected)
    for drive in calibration.drives:
        np.testing.assert_allclose(drive.scores, expected[drive.name], rtol=1e-5)


def test_each_drive_is_compared_with_the_others_and_standardised_by_them(
    index: NominalIndex, drives: Path, calibration: Calibration
) -> None:
    grids = {name: grids_of(drives / name) for name in "abc"}
    check_scores(calibration, scored(index, grids, left_out="abc"))
    assert calibration.frames_by_drive == {"a": 7, "b": 6, "c": 5}
    assert all(drive.left_out for drive in calibration.drives)
    assert calibration.promise.startswith("estimated by leaving one drive out: on a new drive")
    assert len(calibration.probe_scores) == len(calibration.pattern_scores) == 8
    assert calibration.pattern_scores != calibration.probe_scores
    # Frames of the index have lower scores where their own entries take part.
    seen = scored(index, grids, left_out="")
    assert all(seen[drive.name].mean() < drive.scores.mean() for drive in calibration.drives)


def test_further_drives_are_compared_with_all_entries(index: NominalIndex, drives: Path) -> None:
    calibration = calibrated(index, drives / "index", leave_one_drive_out=True)
    grids = {name: grids_of(drives / name) for name in ("a", "b", "c", "index")}
    check_scores(calibration, scored(index, grids, left_out="abc"))
    assert [drive.left_out for drive in calibration.drives] == [True, True, True, False]
    # Without it, the drives of the index take no part.
    calibration = calibrated(index, drives / "index")
    assert calibration.frames_by_drive == {"index": 10}


@pytest.mark.parametrize(("kept_bytes", "embedded"), [(0, 36), (20_000, 28), (2**30, 18)])
def test_frames_that_are_kept_give_the_same_as_those_read_again(
    index: NominalIndex,
    calibration: Calibration,
    monkeypatch: pytest.MonkeyPatch,
    kept_bytes: int,
    embedded: int,
) -> None:
    # A frame takes 9 x 16 x 4 numbers.
    monkeypatch.setattr(drives_module, "_KEPT_BYTES", kept_bytes)
    embedder = CountingEmbedder()
    again = calibrated(index, None, embedder=embedder)
    assert again.sha256 == calibration.sha256
    # Eight thumbnails are embedded for the probe scores, and once more with the test pattern.
    assert sum(embedder.batches) - 2 * 8 == embedded


@pytest.mark.parametrize(("kept_bytes", "embedded"), [(20_000, 18 + 2 * 10), (2**30, 18)])
def test_build_index_calibrates_without_embedding_again_what_it_kept(
    index: NominalIndex,
    calibration: Calibration,
    drives: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept_bytes: int,
    embedded: int,
) -> None:
    monkeypatch.setattr(drives_module, "_KEPT_BYTES", kept_bytes)
    embedder = CountingEmbedder()
    sources, options = [drives / name for name in "abc"], {"settings": SETTINGS}
    built = build_index(
        sources, **options, embedder=embedder, out=tmp_path / "index", calibrated=True
    )
    assert built.fingerprint == index.fingerprint
    written = Calibration.load(tmp_path / "index")
    check_scores(written, {drive.name: drive.scores for drive in calibration.drives})
    assert written.threshold == pytest.approx(calibration.threshold)
    assert sum(embedder.batches) - 2 * 8 == embedded


def test_build_index_calibrates_several_drives_only(drives: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"at least 2 drives, found .*index and 1"):
        build_index(
            drives / "a", embedder=ColourEmbedder(), out=tmp_path / "index", calibrated=True
        )
    assert not (tmp_path / "index").exists()


def test_another_part_of_a_recording_is_compared_without_it(drives: Path) -> None:
    index = build([f"{drives / 'a'}[0:4]", drives / "b"])
    further = [f"{drives / 'a'}[4:7]", drives / "c"]
    grids = {"a": grids_of(further[0]), "c": grids_of(further[1])}
    calibration = calibrated(index, further)
    check_scores(calibration, scored(index, grids, left_out="a"))
    assert [drive.left_out for drive in calibration.drives] == [True, False]
    # With the drives of the index, both parts are one drive.
    calibration = calibrated(index, further, leave_one_drive_out=True)
    grids = {"a": grids_of(drives / "a"), "b": grids_of(drives / "b"), "c": grids["c"]}
    check_scores(calibration, scored(index, grids, left_out="ab"))


def test_another_part_of_the_only_drive_is_compared_with_it_and_said(
    drives: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = build(f"{drives / 'a'}[0:4]")
    calibration = calibrated(index, [f"{drives / 'a'}[4:7]", drives / "b"])
    assert calibration.frames_by_drive == {"a": 3, "b": 6}
    assert not any(drive.left_out for drive in calibration.drives)
    assert "'a' is another part of the only drive of the index" in caplog.text


def test_an_index_of_one_drive_is_refused(drives: Path) -> None:
    parts = [f"{drives / 'a'}[0:3]", f"{drives / 'a'}[3:7]"]
    index = build(parts)
    message = "expected an index of at least 2 drives.* found 1; give calibration drives as sources"
    for sources in (None, drives / "b"):
        with pytest.raises(CalibrationError, match=message):
            calibrated(index, sources, leave_one_drive_out=True)
    # Added frames are no drive that can be read again.
    embedder = ColourEmbedder()
    frames = ((frame, embedder.embed([frame.image])[0]) for frame in open_source(drives / "c"))
    edited, _ = add_nominal(index, frames, roi=RegionOfInterest(), source="c")
    with pytest.raises(CalibrationError, match=message):
        calibrated(edited, None)


def test_drives_of_equal_names_are_told_apart(tmp_path: Path) -> None:
    first, second, third = (
        write_drive(tmp_path / name / "a", number)
        for number, name in ((600, "x"), (700, "y"), (800, "z"))
    )
    fourth = write_drive(tmp_path / "w" / "a", 900, count=3)
    index = build([first, second])
    assert index.recordings == ("a", "a (2)")
    one = build([first, write_drive(tmp_path / "x" / "b", 950)])
    counts = calibrated(one, [third, fourth], leave_one_drive_out=True).frames_by_drive
    assert counts == {"a": 4, "b": 4, "a (2)": 4, "a (3)": 3}
    calibration = calibrated(index, [third, fourth], leave_one_drive_out=True)
    left_out = {drive.name: drive.left_out for drive in calibration.drives}
    assert left_out == {"a": True, "a (2)": True, "a (3)": False, "a (4)": False}
    assert calibration.frames_by_drive == {"a": 4, "a (2)": 4, "a (3)": 4, "a (4)": 3}
    assert calibrated(index, third).frames_by_drive == {"a (3)": 4}
    # Of the second, no frame is stored: frames of its names are other images.
    index = build([first, second], dedup_distance=2.0)
    assert index.frame_names == ("a/000.png",)
    assert calibrated(index, None).frames_by_drive == {"a": 4, "a (2)": 4}


def test_a_pattern_joins_parts_of_a_recording(tmp_path: Path) -> None:
    for number, name in enumerate(("run_part1", "run_part2", "walk")):
        write_drive(tmp_path / name, 600 + 10 * number)
    write_drive(tmp_path / "run_part3", 690)
    parts = [tmp_path / name for name in ("run_part1", "run_part2", "walk")]
    settings = SETTINGS.replace(recording_pattern="(.+)_part")
    index = build(parts, settings=settings)
    assert index.recordings == ("run", "walk")
    # What the index remembers needs no pattern.
    assert calibrated(index, None).frames_by_drive == {"run": 8, "walk": 4}
    calibration = calibrated(index, tmp_path / "run_part3", settings=settings)
    assert [(drive.name, drive.left_out) for drive in calibration.drives] == [("run", True)]


def test_the_stride_of_the_index_is_used_unless_episodes_need_every_frame(drives: Path) -> None:
    index = build([drives / name for name in "abc"], stride=2)
    assert calibrated(index, None).frames_by_drive == {"a": 4, "b": 3, "c": 3}
    further = calibrated(index, drives / "index", leave_one_drive_out=True)
    assert further.frames_by_drive == {"a": 4, "b": 3, "c": 3, "index": 10}
    episodes = {"target_episode_rate": 0.4, "episode_s": 0.3, "confirm_s": 0.3}
    assert calibrated(index, None, **episodes).frames_by_drive == {"a": 7, "b": 6, "c": 5}


def test_episodes_are_those_of_the_parts(drives: Path) -> None:
    index = build(drives / "index")
    episodes = {"target_episode_rate": 0.4, "episode_s": 0.3, "confirm_s": 0.3}
    parts = [f"{drives / 'a'}[0:4]", f"{drives / 'a'}[4:7]", drives / "b", drives / "c"]
    calibration = calibrated(index, parts, **episodes)
    assert calibration.episodes is not None
    # One of each part of a; of the five frames of c, two are left.
    assert [len(scores) for scores in calibration.episodes.scores_by_drive] == [2, 2, 1]
    assert calibration.frames_by_drive == {"a": 7, "b": 6, "c": 5}


def test_drives_are_read_again_from_another_folder(
    drives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibration: Calibration
) -> None:
    monkeypatch.chdir(drives)
    build(["a", Path("b"), "c"], out=tmp_path / "index")
    monkeypatch.chdir(tmp_path)
    again = calibrated(NominalIndex.load("index"), None, out="index")
    assert again.sha256 == calibration.sha256
    assert Calibration.load(tmp_path / "index").sha256 == again.sha256


def test_moved_drives_are_read_where_they_are(drives: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(drives, tmp_path / "moved"))
    index = build([f"{moved / 'a'}[0:4]", moved / "b"])
    moved.rename(tmp_path / "later")
    with pytest.raises(SourceError, match=r"source 'a\[0:4\]' of the index: .*OLD=NEW"):
        calibrated(index, None)
    # Other parts are known by their new place.
    calibration = calibrated(
        index,
        f"{tmp_path / 'later' / 'a'}[4:7]",
        leave_one_drive_out=True,
        moved={str(moved): str(tmp_path / "later")},
    )
    assert calibration.frames_by_drive == {"a": 7, "b": 6}


def test_drives_in_memory_are_refused() -> None:
    index = build([Arrays([street(n).image for n in range(m, m + 3)]) for m in (0, 10)])
    assert index.recordings == ("array", "array (2)")
    with pytest.raises(SourceError, match="source 'array' of the index was in memory"):
        calibrated(index, None)


def test_a_changed_image_is_refused(tmp_path: Path) -> None:
    folders = [write_drive(tmp_path / name, 600 + 10 * n) for n, name in enumerate("xy")]
    index = build(folders)
    cv2.imwrite(str(folders[1] / "000.png"), 255 - street(610).image)
    with pytest.raises(CalibrationError, match=r"y' of the index: expected the frame 'y/000\.png'"):
        calibrated(index, None)


def test_options_without_drives_of_the_index_are_refused(index: NominalIndex, drives: Path) -> None:
    with pytest.raises(InputError, match=r"leave_one_drive_out: .* found patch grids"):
        calibrate(index, {"a": []}, leave_one_drive_out=True)
    with pytest.raises(InputError, match="moved sources: expected leave_one_drive_out"):
        calibrated(index, drives / "index", moved={"/old": "/new"})


def test_stored_patches_do_not_lower_the_distances_that_precision_is_judged_by(
    drives: Path,
) -> None:
    index = build(f"{drives / 'a'}[0:2]", dedup_distance=0.0)
    seen, new = grids_of(f"{drives / 'a'}[0:2]"), grids_of(f"{drives / 'a'}[2:4]")
    assert _median_distances(index, seen) == [0.0]
    [expected] = _median_distances(index, new)
    [mixed] = _median_distances(index, [*seen, *new])
    assert mixed == pytest.approx(expected, rel=0.2) and expected > 1e-4
