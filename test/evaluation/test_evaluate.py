"""Whole evaluations, with a backbone whose answers are known."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from worlds.colours import LEFT_HALF, ColourEmbedder, make_detector, street
from worlds.labelled_drive import DRIVE, make_dataset, odd_mask

from semantic_anomaly.errors import CalibrationError, ImageError, InputError, SourceError
from semantic_anomaly.evaluation.datasets import LabelledFolder
from semantic_anomaly.evaluation.evaluate import Evaluation, evaluate
from semantic_anomaly.evaluation.figures import FIGURES
from semantic_anomaly.evaluation.replay import replay
from semantic_anomaly.io.images import encode_png, read_image, write_image
from semantic_anomaly.io.open import open_source
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.offline.calibrate import calibrate
from semantic_anomaly.timing import DECODE, STAGES

PNG = b"\x89PNG"
Report: TypeAlias = tuple[Path, dict[str, Any]]


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "ms"} for row in rows]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Return the folder of an evaluation and what it returned."""
    root = tmp_path_factory.mktemp("evaluation")
    drive = make_dataset(root / "drive")
    evaluation = evaluate(make_detector(), drive, out=root / "out", every=4, save_maps=True)
    return root / "out", evaluation.results


def test_magenta_is_found(report: Report) -> None:
    out, results = report
    assert json.loads((out / "results.json").read_text()) == results
    assert results["frame_auroc"] == 1.0 and results["tpr"] == 1.0
    assert results["fpr"] == results["alarm_fpr"] <= 0.25
    assert results["pixel_auroc"] > 0.99 and results["pixel_ap"] > 0.8
    assert results["pixel_fpr95"] < 0.02
    assert results["localized"] == 1.0
    assert [f["localized"] for f in results["frames"] if f["anomaly"]].count(None) == 2
    assert (results["frames_counted"], results["frames_anomalous"]) == (11, 4)
    assert results["frames_ignored"] == 1
    assert results["threshold_from"] == "calibration"
    assert results["target_false_alarm_rate"] == 0.05


def test_components_are_measured_at_both_thresholds(report: Report) -> None:
    _, results = report
    assert results["component_limits"] == {"predicted_px": 500, "truth_px": 100}
    assert results["pixel_threshold_calibrated"] == results["threshold"]
    # Magenta is far from everything and its box is large: found as an object with any threshold.
    for name in ("oracle", "calibrated"):
        assert results[f"component_f1_{name}"] > 0.5
        assert 0.5 < results[f"component_siou_{name}"] <= 1
    assert results["component_siou_oracle"] >= results["component_siou_calibrated"]


def test_intervals_hold_their_figures(report: Report) -> None:
    _, results = report
    # One drive: its frames are no independent trials.
    assert results["sequences"] == {"anomalous": 1, "nominal": 1}
    assert results["frame_auroc_interval"] is None
    for name in ("tpr", "fpr"):
        low, high = results[f"{name}_interval"]
        assert 0 <= low <= results[name] <= high <= 1
        assert high - low > 0.9


def test_maps_are_kept_on_request(report: Report) -> None:
    out, _ = report
    dataset = LabelledFolder(out.with_name("drive"))
    stems = [truth.stem for truth in dataset.truths]
    assert sorted(f.stem for f in (out / "maps").iterdir()) == sorted(stems)
    frame = next(iter(dataset))[0]
    heatmap = np.load(out / "maps" / "00000.npy")
    assert heatmap.dtype == np.float32 and heatmap.shape == frame.image_hw
    np.testing.assert_array_equal(heatmap, make_detector().detect(frame).heatmap)


def test_only_pixels_with_a_truth_are_counted(report: Report) -> None:
    _, results = report
    odd = int(odd_mask((72, 128)).sum())
    counted = [letter for letter in DRIVE if letter in ".o"]
    assert results["pixels"]["anomalous"] == 3 * odd
    assert results["pixels"]["normal"] == len(counted) * 72 * 128 - 3 * odd
    assert results["pixels"]["frames_without_truth"] == 2
    assert results["pixels"]["roi"] == "whole image"


def test_kinds_are_measured_against_all_nominal_frames(report: Report) -> None:
    _, results = report
    box, crate = results["by_kind"]["box"], results["by_kind"]["crate"]
    assert (box["frames"], crate["frames"]) == (2, 1)
    assert box["auroc"] == crate["auroc"] == 1.0 and box["tpr"] == 1.0
    assert box["pixel_ap"] > 0.8 and box["family"] == "odd object"
    assert results["by_family"]["odd object"]["frames"] == 3


def test_rows_hold_the_results_of_their_frames(report: Report) -> None:
    _, results = report
    frames = results["frames"]
    assert [frame["name"] for frame in frames] == [f"{n:05d}.png" for n in range(len(DRIVE))]
    assert [frame["anomaly"] for frame in frames] == [letter != "." for letter in DRIVE]
    assert [frame["stamp_ns"] for frame in frames] == [n * 100_000_000 for n in range(len(DRIVE))]
    for frame in frames:
        assert set(frame["ms"]) == set(STAGES) and frame["ms"][DECODE] > 0
        assert 0 <= frame["p_value"] <= 1
        if not frame["ignored"]:
            above = frame["score"] > results["threshold"]
            assert frame["decision"] == ("anomaly" if above else "nominal")


def test_the_results_hold_their_provenance(report: Report) -> None:
    _, results = report
    assert len(results["index"]["fingerprint"]) == 64
    assert results["stages"][0]["architecture"] == "colours"
    assert results["settings"]["tail_percent"] == 2.0
    assert "numpy" in results["versions"]
    warnings = results["calibration"]["warnings"]
    promise = results["calibration"]["promise"]
    assert "on a new drive like these 2, at most 5 % of the frames" in promise
    assert results["calibration"] == {"frames": 40, "promise": promise, "warnings": warnings}
    nominal = [row for row in results["frames"] if not row["anomaly"] and not row["ignored"]]
    above = sum(row["score"] > results["threshold"] for row in nominal)
    [of_drive] = results["false_alarms_by_drive"].values()
    assert of_drive == {"frames": len(nominal), "rate": pytest.approx(above / len(nominal))}
    assert any("2 calibration drives" in sentence for sentence in warnings)


def test_pictures_are_written(report: Report) -> None:
    out, _ = report
    for folder in ("overlays", "panels"):
        names = sorted(path.name for path in (out / folder).iterdir())
        assert names == ["00000.jpg", "00004.jpg", "00008.jpg"]
    worst = sorted(path.name for path in (out / "worst").iterdir())
    groups = ("highest_anomaly", "highest_nominal", "lowest_anomaly")
    assert [name[: name.index("_0")] for name in worst] == [
        f"{group}_{i}" for group in groups for i in range(1, 5)
    ]
    # The fourth picture is the nearest nominal frame.
    widths = [read_image(out / name).shape[1] for name in (f"worst/{worst[0]}", "panels/00000.jpg")]
    assert widths[0] > 1.3 * widths[1]
    for name in FIGURES:
        assert (out / name).read_bytes()[:4] == PNG
    assert (out / "contact_sheet.jpg").is_file()


def test_the_report_is_one_file_without_a_network(report: Report) -> None:
    out, results = report
    text = (out / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 4 + 12
    assert all(source.startswith("data:image/") for source in sources)
    assert "http:" not in text and "https:" not in text and "<script" not in text
    for key in ("pixel_ap", "component_f1_oracle", "frame_auroc"):
        assert f"{results[key]:.3f}" in text
    for kind in results["by_kind"]:
        assert f"<td>{kind}</td>" in text
    assert results["calibration"]["warnings"][0] in unescape(text)
    assert results["calibration"]["promise"] in unescape(text)
    assert "False alarms by drive" in text
    assert results["index"]["fingerprint"] in text


def test_names_cannot_break_the_report(tmp_path: Path) -> None:
    drive = make_dataset(tmp_path / "<b>&drive", ".o")
    evaluate(make_detector(calibrated=False), drive, out=tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<h1>&lt;b&gt;&amp;drive</h1>" in text
    assert not (tmp_path / "out" / "calibration.png").exists()


def test_only_the_roi_is_measured(tmp_path: Path) -> None:
    """The odd box lies in the right half, so the left half knows nothing of it."""
    results = evaluate(make_detector(roi=LEFT_HALF), make_dataset(tmp_path / "drive"))
    assert results["pixels"]["roi"] == "region of interest"
    inside = int(LEFT_HALF.pixel_mask((72, 128)).sum())
    assert results["pixels"]["normal"] == 10 * inside and results["pixels"]["anomalous"] == 0
    assert (results["pixel_ap"], results["pixel_auroc"], results["pixel_fpr95"]) == (None,) * 3
    assert results["frame_auroc"] < 0.9


def test_an_alarm_elsewhere_has_not_detected_the_anomaly(tmp_path: Path) -> None:
    """What is masked lies in the left half, what is odd in the right one."""
    root = make_dataset(tmp_path / "drive", ".o")
    write_image(root / "masks/00001.png", odd_mask((72, 128))[:, ::-1].copy())
    results = evaluate(make_detector(), root)
    assert (results["tpr"], results["localized"]) == (1.0, 0.0)


def test_without_a_calibration_rates_are_not_defined(tmp_path: Path) -> None:
    results = evaluate(make_detector(calibrated=False), make_dataset(tmp_path / "drive", "..o"))
    for name in ("tpr", "fpr", "alarm_tpr", "threshold", "target_false_alarm_rate", "calibration"):
        assert results[name] is None
    assert results["frame_auroc"] == 1.0 and results["by_kind"]["box"]["tpr"] is None
    assert {frame["decision"] for frame in results["frames"]} == {"unknown"}


def test_without_anomalies_only_the_false_alarm_rate_is_defined(tmp_path: Path) -> None:
    results = evaluate(make_detector(), make_dataset(tmp_path / "drive", "...."))
    for name in ("frame_auroc", "tpr", "pixel_ap", "pixel_auroc", "pixel_fpr95"):
        assert results[name] is None
    assert 0.0 <= results["fpr"] <= 1.0 and results["by_kind"] == {}


def test_a_threshold_set_by_hand_has_no_target_rate(tmp_path: Path) -> None:
    results = evaluate(make_detector(threshold=1.9), make_dataset(tmp_path / "drive", ".o"))
    assert (results["threshold"], results["threshold_from"]) == (1.9, "setting")
    assert results["target_false_alarm_rate"] is None
    assert (results["tpr"], results["fpr"]) == (0.0, 0.0)


def test_confirmation_moves_alarms_but_not_scores(tmp_path: Path) -> None:
    detector = make_detector(confirm_count=2, confirm_s=1.0)
    results = evaluate(detector, make_dataset(tmp_path / "drive", "..oo.."))
    assert results["tpr"] == 1.0 and results["alarm_tpr"] == 0.5


def test_a_bad_image_leaves_nothing(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "drive", "...")
    write_image(root / "images/00002.png", street(1, image_hw=(80, 128)).image)
    with pytest.raises(ImageError, match="one size"):
        evaluate(make_detector(), root, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["drive"]


@pytest.mark.usefixtures("no_figures")
def test_an_evaluation_replaces_an_earlier_one_only(tmp_path: Path) -> None:
    drive = make_dataset(tmp_path / "drive", ".o")
    detector, out = make_detector(), tmp_path / "out"
    evaluate(detector, drive, out=out, every=0, save_maps=True)
    evaluate(detector, drive, out=out, every=1)
    assert sorted(p.name for p in (out / "panels").iterdir()) == ["00000.jpg", "00001.jpg"]
    assert not (out / "maps").exists()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        evaluate(detector, drive, out=out)
    assert (out / "notes.txt").read_text() == "mine"


def test_without_a_folder_nothing_is_written(report: Report, tmp_path: Path) -> None:
    drive = make_dataset(tmp_path / "drive")
    evaluation = evaluate(make_detector(), drive)
    assert evaluation.out is None and [path.name for path in tmp_path.iterdir()] == ["drive"]
    changing = ("latency_ms", "frames", "git_commit")
    expected = {name: value for name, value in report[1].items() if name not in changing}
    assert {name: evaluation[name] for name in expected} == expected
    with pytest.raises(InputError, match="save_maps: expected a folder"):
        evaluate(make_detector(), drive, save_maps=True)


def test_an_index_is_evaluated(tmp_path: Path) -> None:
    nominal = make_dataset(tmp_path / "nominal", "." * 15)
    drive, embedder = make_dataset(tmp_path / "drive", "..oo"), ColourEmbedder()
    index = build_index(f"{nominal}[0:5]", embedder=embedder, out=tmp_path / "index")
    evaluation = evaluate(index, drive, embedder=embedder)
    assert evaluation["threshold"] is None and evaluation["frame_auroc"] == 1.0
    assert evaluate(index, drive, embedder=embedder, threshold=0.1)["tpr"] == 1.0
    folder = tmp_path / "index"
    calibrate(index, f"{nominal}[5:15]", embedder=embedder, out=folder, target_false_alarm_rate=0.2)
    for path in (folder, str(folder)):
        evaluation = evaluate(path, str(drive), embedder=embedder)
        assert evaluation["threshold_from"] == "calibration" and evaluation["tpr"] == 1.0
    with pytest.raises(InputError, match="for an index only"):
        evaluate(make_detector(), drive, camera="camera")


@pytest.mark.usefixtures("no_figures")
def test_seen_frames_are_refused_or_reported(tmp_path: Path) -> None:
    root, embedder = make_dataset(tmp_path / "set", "..oo"), ColourEmbedder()
    index = build_index(f"{root}[1:2]", embedder=embedder)
    out = tmp_path / "out"
    expected = r"has seen frame 'set/00001\.png'.*--allow-seen"
    with pytest.raises(CalibrationError, match=expected):
        evaluate(index, root, out=out, embedder=embedder)
    assert not out.exists()
    evaluation = evaluate(index, root, out=out, embedder=embedder, allow_seen=True)
    assert evaluation["frames_seen"] == 1
    assert [row["seen"] for row in evaluation["frames"]] == [False, True, False, False]
    assert "the index was built from 1 of the 4 frames" in evaluation["warnings"][0]
    assert evaluation["warnings"][0] in unescape((out / "report.html").read_text(encoding="utf-8"))
    assert evaluate(index, f"{root}[2:]", embedder=embedder, allow_seen=True)["warnings"] == []


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("number", "content", "found"),
    [
        (0, b"", "found no bytes"),
        (3, PNG, "found bytes"),
        (11, encode_png(np.zeros((72, 128, 3), np.uint8))[:-20], "truncated"),
    ],
)
def test_a_bad_frame_is_unknown_and_takes_no_part_in_the_measures(
    tmp_path: Path, number: int, content: bytes, found: str
) -> None:
    root = make_dataset(tmp_path / "drive", "...o..oo....")
    whole = evaluate(make_detector(), root)
    (root / f"images/{number:05d}.png").write_bytes(content)
    results = evaluate(make_detector(), root, out=tmp_path / "out", save_maps=True)
    rows = {"whole": [*whole["frames"]], "left": [*results["frames"]]}
    bad = rows["left"].pop(number)
    assert (bad["decision"], bad["score"]) == ("unknown", None) and found in bad["reason"]
    anomalous = rows["whole"].pop(number)["anomaly"]
    assert untimed(rows["left"]) == untimed(rows["whole"])
    (named,) = results["bad_frames"]
    assert named["name"] == f"drive/{number:05d}.png" and named["stamp_ns"] == number * 10**8
    assert (results["frames_unknown"], results["frames_ignored"]) == (1, 0)
    assert results["frames_counted"] == 11 and results["frames_anomalous"] == 3 - anomalous
    assert (
        f"1 of the 12 frames are unknown, bad or of a blind camera, {int(anomalous)} of"
        in (results["warnings"][-1])
    )
    assert results["warnings"][-1] in unescape((tmp_path / "out/report.html").read_text())
    assert len(list((tmp_path / "out/maps").iterdir())) == 11
    assert (whole["bad_frames"], whole["frames_unknown"]) == ([], 0)
    assert whole["warnings"] == results["warnings"][:-1]


@pytest.mark.usefixtures("no_figures")
def test_too_many_bad_frames_end_an_evaluation(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "drive", "..o...")
    for number in (1, 4):
        (root / f"images/{number:05d}.png").write_bytes(PNG)
    with pytest.raises(SourceError, match=r"at most 1 bad frames.*00004"):
        evaluate(make_detector(), root, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["drive"]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("drive", ["...o..", "......"])
def test_a_covered_camera_adds_no_nominal_score(tmp_path: Path, drive: str) -> None:
    root = make_dataset(tmp_path / "drive", drive)
    for number in (1, 3):
        write_image(root / f"images/{number:05d}.png", np.zeros((72, 128, 3), np.uint8))
    results = evaluate(make_detector(), root, out=tmp_path / "out")
    rows = [results["frames"][number] for number in (1, 3)]
    assert all(row["blind"] and row["score"] is row["p_value"] is None for row in rows)
    assert (results["frames_blind"], results["frames_unknown"]) == (2, 2)
    assert results["frames_counted"] == results["pixels"]["normal"] / (72 * 128) == 4
    assert results["fpr"] == share_above(results) and results["tpr"] is None


def share_above(results: Evaluation) -> float:
    scores = [row["score"] for row in results["frames"] if row["score"] is not None]
    return sum(score > results["threshold"] for score in scores) / len(scores)


@pytest.mark.usefixtures("no_figures")
def test_a_dataset_of_a_covered_camera_alone_has_no_measures(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "drive", "....")
    for file in (root / "images").iterdir():
        write_image(file, np.zeros((72, 128, 3), np.uint8))
    results = evaluate(make_detector(), root, out=tmp_path / "out")
    assert results["frames_counted"] == 0 and results["fpr"] is results["frame_auroc"] is None


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("drives", ["aaaabb", "aaabbb", "aaaaab"])
def test_tracks_end_with_a_drive(tmp_path: Path, drives: str) -> None:
    """The same box in the frames 3 and 4 is confirmed unless another drive begins between them."""
    root = make_dataset(tmp_path / "drive", "...oo.")
    labels = json.loads((root / "labels.json").read_text())
    for row, drive in zip(labels.values(), drives, strict=True):
        row["drive"] = drive
    (root / "labels.json").write_text(json.dumps(labels))
    one_drive = drives[3] == drives[4]
    settings = {"threshold": 0.1, "confirm_count": 2, "confirm_s": 1.0}
    results = evaluate(make_detector(**settings), root)
    alarms = [row["decision"] == "anomaly" for row in results["frames"]]
    assert alarms == [False] * 4 + [one_drive, False]
    summary = replay(make_detector(**settings), open_source(root), tmp_path / "out")
    assert summary["decisions"]["anomaly"] == one_drive
