"""Sensitivity: what counts as found, and what the report holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from worlds.colours import ColourEmbedder, make_detector, street
from worlds.labelled_drive import make_dataset

from semantic_anomaly.errors import CalibrationError, InputError, SourceError
from semantic_anomaly.evaluation import figures
from semantic_anomaly.evaluation.composites import CompositePlan
from semantic_anomaly.evaluation.sensitivity import WRITTEN, sensitivity
from semantic_anomaly.io.images import write_image
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.offline.calibrate import calibrate
from semantic_anomaly.settings import Settings

PLAN = CompositePlan(kinds=("sofa", "bin"), sizes_px=(6, 40), composites=32, frames=12)


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return nominal streets that no detector has seen."""
    return make_dataset(tmp_path_factory.mktemp("drives") / "held_out", "." * 12)


def test_large_things_are_found_and_controls_are_not(drive: Path) -> None:
    found = sensitivity(make_detector(), drive, PLAN)
    detector = found["detectors"][0]
    assert detector["by_size"]["40"]["recall"] > 0.9
    assert detector["by_size"]["6"]["recall"] < detector["by_size"]["40"]["recall"]
    assert detector["control_rate"] < 0.1 and detector["pixel_ap"] > 0.5
    assert found["unit"] == "px" and found["sizes"] == [6, 40]
    low, high = detector["by_size"]["40"]["recall_interval"]
    assert low < detector["by_size"]["40"]["recall"] <= high


def test_results_and_report_agree(drive: Path, tmp_path: Path) -> None:
    out, strict = tmp_path / "seen", make_detector(threshold=0.5)
    found = sensitivity(make_detector(), drive, PLAN, compare=[strict], out=out)
    results = json.loads((out / "results.json").read_text())
    assert results == json.loads(json.dumps(found.results))
    assert {path.name for path in out.iterdir()} == WRITTEN
    assert results["plan"]["seed"] == 0 and len(results["frames"]) == 12
    assert [d["name"] for d in results["detectors"]] == ["detector_0", "detector_1"]
    rows = results["composites"]
    for detector in results["detectors"]:
        own = [row[detector["name"]] for row in rows]
        assert detector["composites"] == len(own) == 32
        assert detector["found"] == sum(row["found"] for row in own)
        assert detector["recall"] == detector["found"] / 32
        assert detector["control_rate"] == sum(row["control_found"] for row in own) / 32
        assert detector["untouched_rate"] == sum(row["untouched_found"] for row in own) / 32
        assert all(row["score"] > detector["threshold"] for row in own if row["found"])
        for group, key in (("by_size", "size"), ("by_kind", "kind")):
            for name, part in detector[group].items():
                chosen = [r for r, row in zip(own, rows, strict=True) if f"{row[key]}" == name]
                assert part["composites"] == len(chosen) == 16
                assert part["found"] == sum(row["found"] for row in chosen)
        for key, total in (("composites", 32), ("found", detector["found"])):
            assert sum(map(sum, detector["by_cell"][key])) == total
    [compared] = results["comparisons"]
    first, second = results["detectors"]
    assert first["found"] > second["found"], "a higher threshold finds less"
    assert compared["all"]["other_only"] == 0
    assert compared["all"]["both"] == second["found"]
    assert compared["all"]["first_only"] == first["found"] - second["found"]
    text = (out / "report.html").read_text()
    assert "What composites cannot show" in text and "only the other" in text
    assert text.count("data:image/jpeg") >= 5 and text.count("data:image/png") == 2


def test_the_same_seed_gives_the_same_figures(drive: Path) -> None:
    one, again = (sensitivity(make_detector(), drive, PLAN) for _ in range(2))
    assert one["composites"] == again["composites"]


def test_a_low_threshold_finds_everything_and_says_that_it_means_nothing(drive: Path) -> None:
    found = sensitivity(make_detector(threshold=-1.0), drive, PLAN)
    detector = found["detectors"][0]
    assert detector["recall"] == detector["control_rate"] == detector["untouched_rate"] == 1.0
    assert detector["untouched"]["alarms"] == 12 and detector["target_false_alarm_rate"] is None
    assert any("12 of the 12 untouched frames raise an alarm" in w for w in found["warnings"])


def test_a_high_threshold_finds_nothing(drive: Path) -> None:
    found = sensitivity(make_detector(threshold=3.0), drive, PLAN)
    assert found["detectors"][0]["recall"] == 0.0 and found["warnings"] == []


def test_confirmation_over_time_does_not_hide_things(drive: Path) -> None:
    usual, slow = (
        sensitivity(make_detector(**changes), drive, PLAN)["detectors"][0]["recall"]
        for changes in ({}, {"confirm_count": 3, "confirm_s": 1.0})
    )
    assert usual == slow > 0


def test_cutouts_are_pasted_beside_the_rendered_things(drive: Path, tmp_path: Path) -> None:
    cut = make_dataset(tmp_path / "cut", "oo.oo")
    found = sensitivity(make_detector(), drive, PLAN, cutouts=cut)
    assert list(found["detectors"][0]["by_kind"]) == ["sofa", "bin", "box"]
    assert found["detectors"][0]["by_kind"]["box"]["by_size"]["40"] == 1.0, "magenta"


def test_seen_drives_are_refused_or_reported(drive: Path, tmp_path: Path) -> None:
    settings = Settings(target_false_alarm_rate=0.1, dedup_distance=0.001)
    options = {"settings": settings, "embedder": ColourEmbedder()}
    for first, name in ((0, "nominal"), (100, "calibration")):
        (tmp_path / name).mkdir()
        for n in range(12):
            write_image(tmp_path / name / f"{n:02d}.png", street(first + n).image)
    index = build_index(tmp_path / "nominal", out=tmp_path / "index", **options)  # type: ignore[arg-type]
    calibrate(index, tmp_path / "calibration", out=tmp_path / "index", **options)  # type: ignore[arg-type]
    for name, pattern in (
        ("nominal", r"the index has seen frame 'nominal/00\.png'.*--allow-seen"),
        ("calibration", r"the calibration has seen a drive 'calibration'.*--allow-seen"),
    ):
        with pytest.raises(CalibrationError, match=pattern):
            sensitivity(tmp_path / "index", tmp_path / name, PLAN, **options)  # type: ignore[arg-type]
        found = sensitivity(
            tmp_path / "index",
            tmp_path / name,
            PLAN,
            allow_seen=True,
            **options,  # type: ignore[arg-type]
        )
        assert "data leakage: index or calibration have seen" in found["warnings"][0]
    other = sensitivity(tmp_path / "index", drive, PLAN, **options)  # type: ignore[arg-type]
    assert not any("leakage" in warning for warning in other["warnings"])


def test_what_is_missing_is_said_before_the_work(drive: Path, tmp_path: Path) -> None:
    detector = make_detector()
    with pytest.raises(SourceError, match="expected at least 10 frames, found 4"):
        sensitivity(detector, f"{drive}[0:4]", PLAN)
    with pytest.raises(CalibrationError, match="calibrated detector, found no threshold"):
        sensitivity(make_detector(calibrated=False), drive, PLAN)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        sensitivity(detector, drive, PLAN, out=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_nothing_is_left_of_a_report_that_fails(
    drive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise InputError("no figure")

    monkeypatch.setattr(figures, "recall_curve", fail)
    with pytest.raises(InputError, match="no figure"):
        sensitivity(make_detector(), drive, PLAN, out=tmp_path / "seen")
    assert list(tmp_path.iterdir()) == []


def test_a_bad_frame_of_the_drive_is_named(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "held_out", "." * 12)
    for number, bad in enumerate((3, 11)):
        (root / f"images/{bad:05d}.png").write_bytes(b"\x89PNG")
        if number == 0:
            found = sensitivity(make_detector(), root, PLAN)
            assert [row["name"] for row in found["bad_frames"]] == ["held_out/00003.png"]
            assert len(found["frames"]) == 11 and found["frames_missing"] == 0
            assert "left out: source" in found["warnings"][-1]
    with pytest.raises(SourceError, match=r"at most 1 bad frames.*00011"):
        sensitivity(make_detector(), root, PLAN)
