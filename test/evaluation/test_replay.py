"""A whole replay, with a backbone whose answers are known."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from worlds.bags import RAW, raw, write_bag
from worlds.colours import make_detector
from worlds.labelled_drive import make_dataset

from semantic_anomaly.errors import ArtefactError, InputError, SourceError
from semantic_anomaly.evaluation.evaluate import evaluate
from semantic_anomaly.evaluation.events import Event
from semantic_anomaly.evaluation.replay import replay
from semantic_anomaly.io.images import read_image, write_image
from semantic_anomaly.io.open import open_source

PNG = b"\x89PNG"


def test_replay_writes_what_the_detector_states(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "drive", "..oo..o...")
    detector, source = make_detector(), open_source(root)
    summary = replay(detector, source, tmp_path / "out", every=0)
    with (tmp_path / "out/scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["stamp_ns", "score", "p_value", "decision"]
    detector.reset()
    stated = [detector.detect(frame) for frame in source]
    for row, frame, result in zip(rows, source, stated, strict=True):
        assert int(row["stamp_ns"]) == frame.stamp_ns
        assert (float(row["score"]), float(row["p_value"])) == (result.score, result.p_value)
        assert row["decision"] == result.decision.value
    assert json.loads((tmp_path / "out/summary.json").read_text()) == summary
    decisions = [result.decision.value for result in stated]
    assert [decisions[n] for n in (2, 3, 6)] == ["anomaly"] * 3
    begins = [n for n in range(10) if decisions[n] == "anomaly" != (["x", *decisions])[n]]
    assert [alarm["first_frame"] for alarm in summary["alarms"]] == [
        f"drive/{n:05d}.png" for n in begins
    ]
    assert sum(alarm["frames"] for alarm in summary["alarms"]) == decisions.count("anomaly")
    first = next(a for a in summary["alarms"] if a["first_frame"] == "drive/00002.png")
    assert first["frames"] >= 2 and first["peak_score"] >= stated[3].score
    # With no regular pictures, those of the first frame of every alarm are there all the same.
    assert sorted(p.name for p in (tmp_path / "out/overlays").iterdir()) == [
        f"{n:05d}.jpg" for n in begins
    ]
    again = replay(detector, source, tmp_path / "again", every=1)
    assert again["data_sha256"] == summary["data_sha256"] and len(summary["data_sha256"]) == 64
    other = replay(detector, open_source(f"{root}[0:9]"), tmp_path / "other")
    assert other["data_sha256"] != summary["data_sha256"]
    assert summary["frames"] == 10 and summary["latency_ms"]["total"]["p95"] > 0
    assert (tmp_path / "out/score_curve.png").read_bytes()[:4] == PNG


@pytest.mark.usefixtures("no_figures")
def test_replay_without_a_calibration_is_unknown(tmp_path: Path) -> None:
    source = open_source(make_dataset(tmp_path / "drive", ".o."))
    detector = make_detector(calibrated=False)
    summary = replay(detector, source, tmp_path / "out")
    assert summary["decisions"] == {"nominal": 0, "anomaly": 0, "unknown": 3}
    assert summary["alarms"] == [] and summary["threshold"] is None
    lines = (tmp_path / "out/scores.csv").read_text().splitlines()
    assert all(line.endswith(",,unknown") for line in lines[1:])
    assert len(list((tmp_path / "out/panels").iterdir())) == 3


def test_a_replay_that_fails_leaves_nothing(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "drive", "....")
    (root / "images/00001.png").write_bytes(PNG)
    (root / "images/00002.png").write_bytes(PNG)
    with pytest.raises(SourceError, match=r"at most 1 bad frames.*00002"):
        replay(make_detector(), open_source(root), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["drive"]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("bad", [0, 3, 9])
def test_a_bad_frame_is_unknown_and_the_rest_is_scored(tmp_path: Path, bad: int) -> None:
    root = make_dataset(tmp_path / "drive", "......oo..")
    whole = replay(make_detector(), open_source(root), tmp_path / "whole")
    (root / f"images/{bad:05d}.png").write_bytes(PNG)
    summary = replay(make_detector(), open_source(root), tmp_path / "out")
    rows = [
        list(csv.DictReader((tmp_path / name / "scores.csv").read_text().splitlines()))
        for name in ("whole", "out")
    ]
    assert rows[1].pop(bad)["decision"] == "unknown" and summary["frames"] == 10
    del rows[0][bad]
    assert rows[0] == rows[1]
    (named,) = summary["bad_frames"]
    assert named["name"] == f"drive/{bad:05d}.png" and "found bytes" in named["reason"]
    assert whole["bad_frames"] == [] and whole["frames_missing"] == 0


@pytest.mark.usefixtures("no_figures")
def test_a_jump_back_in_a_drive_with_events_is_refused_at_once(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "drive", "." * 20)
    labels = json.loads((root / "labels.json").read_text())
    for number, row in enumerate(labels.values()):
        row["stamp_s"] = number / 4 if number != 12 else 0.0
    (root / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(InputError, match=r"step back of 2\.750 s"):
        replay(make_detector(), open_source(root), tmp_path / "out", events=[Event(0.5, 0.75)])
    assert replay(make_detector(), open_source(root), tmp_path / "out")["frames"] == 20


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("kind", ["folder", "bag", "cut bag"])
def test_events_outside_the_drive_are_refused_before_a_frame_is_assessed(
    tmp_path: Path, kind: str
) -> None:
    drive = tmp_path / "drive"
    if kind == "folder":
        make_dataset(drive, "." * 6)
    else:
        write_bag(drive, {RAW: [raw(number) for number in range(6)]}, "sqlite3")
    if kind == "cut bag":
        (drive / "metadata.yaml").unlink()
    detector = make_detector()
    detector.detect = lambda frame: pytest.fail("a frame was assessed")
    with pytest.raises(InputError, match=r"from 9 to 10 s: expected frames in it, found .* to 5|0"):
        replay(detector, open_source(drive), tmp_path / "out", events=[Event(9, 10)])
    assert [path.name for path in tmp_path.iterdir()] == ["drive"]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("work", ["replay", "evaluate"])
def test_a_disk_that_is_nearly_full_ends_the_work_at_its_first_frame(
    tmp_path: Path, work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_dataset(tmp_path / "drive", "." * 6)
    detector, assessed = make_detector(), []
    detect = detector.detect
    detector.detect = lambda frame: assessed.append(frame) or detect(frame)
    # Enough for the figures alone.
    free = shutil.disk_usage(tmp_path)._replace(free=10_000_100)
    monkeypatch.setattr("semantic_anomaly.storage.shutil.disk_usage", lambda path: free)
    with pytest.raises(ArtefactError, match="about 10 MB of free disk space"):
        if work == "replay":
            replay(detector, open_source(root), tmp_path / "out")
        else:
            evaluate(detector, root, out=tmp_path / "out")
    assert not assessed and [path.name for path in tmp_path.iterdir()] == ["drive"]


@pytest.mark.usefixtures("no_figures")
def test_replay_is_measured_against_events(tmp_path: Path) -> None:
    source = open_source(make_dataset(tmp_path / "drive", "......oo..............."))
    events = [Event(0.5, 0.75, "box"), Event(1.5, 1.7)]
    detector = make_detector(threshold=0.1)
    summary = replay(detector, source, tmp_path / "out", events=events)
    against = summary["against_events"]
    assert against["events"][0] == {
        "start_s": 0.5, "end_s": 0.75, "kind": "box", "delay_s": pytest.approx(0.1)
    }  # fmt: skip
    assert against["missed"] == 1 and against["events"][1]["delay_s"] is None
    assert against["delay_s_median"] == pytest.approx(0.1)
    assert against["false_alarms"] == 0 and against["false_per_hour"] == 0.0
    with pytest.raises(InputError, match=r"from 9 to 10 s.*found frames from 0 to 2\.2 s"):
        replay(detector, source, tmp_path / "o", events=[Event(9, 10)])
    assert not (tmp_path / "o").exists()
    unknown = replay(make_detector(calibrated=False), source, tmp_path / "u", events=events)
    assert unknown["against_events"] is None


@pytest.mark.usefixtures("no_figures")
def test_drift_is_in_the_report(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "drive", "o" * 40)
    detector = make_detector(drift_window=10)
    summary = replay(detector, open_source(root), tmp_path / "out")
    [stretch] = summary["drift"]
    assert stretch["first_frame"] == "drive/00029.png" and stretch["frames"] == 11
    assert "Recalibrate with drives like this one" in (tmp_path / "out/report.html").read_text()
    usual = replay(detector, open_source(f"{root}[0:5]"), tmp_path / "usual")
    assert usual["drift"] == []


@pytest.mark.usefixtures("no_figures")
def test_frames_of_a_covered_camera_are_unknown_and_counted(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "drive", "....")
    file = root / "images/00002.png"
    write_image(file, np.zeros_like(read_image(file)))
    summary = replay(make_detector(), open_source(root), tmp_path / "out")
    assert summary["frames_blind"] == 1 and summary["decisions"]["unknown"] == 1
