"""Requirements on results: measures, limits, comparisons, and input that is refused."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from worlds.colours import make_detector, street
from worlds.labelled_drive import make_dataset, odd_mask

from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.acceptance import (
    MEASURES,
    Acceptance,
    Requirement,
    Verdict,
    accept,
    read_requirements,
    read_results,
)
from semantic_anomaly.evaluation.evaluate import evaluate
from semantic_anomaly.evaluation.events import Event
from semantic_anomaly.evaluation.metrics import rate_interval
from semantic_anomaly.evaluation.replay import replay
from semantic_anomaly.io.images import write_image
from semantic_anomaly.io.open import open_source

EXAMPLE = Path(__file__).resolve().parents[2] / "config" / "acceptance.yaml"
THRESHOLD = 1.0


def frame(drive: str, number: int, score: float, **labels: Any) -> dict[str, Any]:
    """Return a row of results.json: nominal, unless it has a kind; an alarm above 1."""
    anomaly = "kind" in labels
    return {
        **{"name": f"{drive}_{number}.png", "sequence": drive, "sha256": f"{drive}{number}"},
        **{"anomaly": anomaly, "ignored": False, "kind": None, "family": None, "tags": []},
        **{"score": score, "decision": "anomaly" if score > THRESHOLD else "nominal"},
        "localized": True if anomaly and score > THRESHOLD else None,
        "anomaly_px": 100 if anomaly else 0,
        **labels,
    }


def write(folder: Path, frames: list[dict[str, Any]], **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        **{"dataset": "town", "threshold": THRESHOLD, "frames_seen": 0, "warnings": []},
        **{"index": {"fingerprint": "a" * 64}, "calibration_sha256": "b" * 64},
        "versions": {"semantic_anomaly": "1.2.3"},
        "frames": frames,
        **changes,
    }
    (folder / "results.json").write_text(json.dumps(content))
    return folder


# Two drives by day, one by night: one false alarm in six nominal frames, one of four anomalies
# missed.
FRAMES = [
    frame("a", 0, 0.1),
    frame("a", 1, 1.2),
    frame("a", 2, 3.0, kind="cow", family="odd object", anomaly_px=900),
    frame("b", 0, 0.2),
    frame("b", 1, 0.3),
    frame("b", 2, 2.0, kind="crate", family="odd object"),
    frame("c", 0, 0.4, tags=["night", "rain"]),
    frame("c", 1, 0.5, tags=["night"]),
    frame("c", 2, 0.6, tags=["night"], kind="crate", family="odd object"),
    frame("c", 3, 1.5, tags=["night"], kind="cow", localized=False),
    frame("c", 4, 9.0, ignored=True),
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write(tmp_path / "results", FRAMES)


def only(results: Path, *against: Path, **fields: Any) -> Verdict:
    """Return the verdict on one requirement."""
    (verdict,) = accept([results], [Requirement(**fields)], against).verdicts
    return verdict


@pytest.mark.parametrize(
    ("fields", "value", "count", "drives"),
    [
        ({"measure": "fpr", "at_most": 1}, 1 / 6, 6, 3),
        ({"measure": "fpr", "at_most": 1, "tag": ("night",)}, 0.0, 2, 1),
        ({"measure": "fpr", "at_most": 1, "tag": ("night", "rain")}, 0.0, 1, 1),
        ({"measure": "alarm_fpr", "at_most": 1, "drive": "town/a"}, 1 / 2, 2, 1),
        ({"measure": "tpr", "at_least": 0}, 3 / 4, 4, 3),
        ({"measure": "tpr", "at_least": 0, "kind": "crate"}, 1 / 2, 2, 2),
        ({"measure": "tpr", "at_least": 0, "family": "odd object"}, 2 / 3, 3, 3),
        ({"measure": "tpr", "at_least": 0, "tag": ("night",), "kind": "cow"}, 1.0, 1, 1),
        ({"measure": "tpr", "at_least": 0, "anomaly_px": (400, None)}, 1.0, 1, 1),
        ({"measure": "alarm_tpr", "at_least": 0, "anomaly_px": (100, 900)}, 2 / 3, 3, 2),
        ({"measure": "localized", "at_least": 0}, 2 / 3, 3, 3),
    ],
)
def test_rates_of_all_frames_and_of_some(
    fields: dict[str, Any], value: float, count: int, drives: int, results: Path
) -> None:
    verdict = only(results, **fields)
    assert (verdict.value, verdict.count, verdict.drives) == (pytest.approx(value), count, drives)
    assert verdict.interval == rate_interval(verdict.value, drives)
    assert verdict.met


def test_a_kind_is_measured_against_all_nominal_frames(results: Path) -> None:
    fields = {"measure": "frame_auroc", "at_least": 0.1}
    # 24 pairs; of the alarms, 1.5 and the missed crate have the false alarm or nothing below them.
    assert only(results, **fields).value == pytest.approx(23 / 24)
    verdict = only(results, **fields, kind="cow")
    assert (verdict.value, verdict.count) == (1.0, 8)


def test_the_bound_of_the_interval_must_keep_the_limit_by_default(results: Path) -> None:
    low, high = rate_interval(1 / 6, 3) or (0.0, 0.0)
    assert only(results, measure="fpr", at_most=high).met
    refused = only(results, measure="fpr", at_most=high - 0.01)
    assert not refused.met and "the estimate keeps the limit" in refused.remark
    assert only(results, measure="fpr", at_most=high - 0.01, by="estimate").met
    assert not only(results, measure="fpr", at_most=0.1, by="estimate").met
    low, high = rate_interval(3 / 4, 3) or (0.0, 0.0)
    assert only(results, measure="tpr", at_least=low).met
    assert not only(results, measure="tpr", at_least=low + 0.01).met
    assert only(results, measure="tpr", at_least=0.75, by="estimate").met


def test_too_few_drives_are_named_with_the_number_needed(results: Path) -> None:
    remark = only(results, measure="fpr", at_most=0.05, tag=("night",)).remark
    assert "1 drives are too few for it, at least 72 are needed" in remark
    assert (rate_interval(0.0, 72) or (0, 1))[1] <= 0.05 < (rate_interval(0.0, 71) or (0, 1))[1]
    never = only(results, measure="tpr", at_least=1.0, kind="cow").remark
    assert "no number of drives" in never


def test_each_makes_a_requirement_for_every_group(results: Path) -> None:
    def names(**fields: Any) -> list[str]:
        requirement = Requirement(**fields, by="estimate")
        return [v.requirement.name for v in accept([results], [requirement]).verdicts]

    assert names(measure="tpr", at_least=0, each="kind") == ["tpr, kind cow", "tpr, kind crate"]
    assert names(measure="fpr", at_most=1, each="tag") == ["fpr, tag night", "fpr, tag rain"]
    # No anomaly is in the rain.
    assert names(measure="tpr", at_least=0, each="tag") == ["tpr, tag night"]
    assert len(names(measure="fpr", at_most=1, each="drive")) == 3
    assert len(names(measure="frame_auroc", at_least=0, each="kind")) == 2


def test_results_of_one_index_are_taken_together(results: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", [frame("a", 0, 0.1)], dataset="village")
    (verdict,) = accept([results, other], [Requirement("fpr", at_most=1)]).verdicts
    assert (verdict.value, verdict.count, verdict.drives) == (pytest.approx(1 / 7), 7, 4)


def worse(results: Path, folder: Path, change: Callable[[dict[str, Any]], float]) -> Path:
    rows = [{**row, "score": change(row)} for row in FRAMES]
    return write(folder, rows, index={"fingerprint": "c" * 64})


def test_a_comparison_limits_the_loss_on_the_same_frames(results: Path, tmp_path: Path) -> None:
    # The baseline finds every anomaly, and gives no false alarm.
    better = worse(results, tmp_path / "better", lambda row: 2.0 if row["anomaly"] else 0.0)
    for measure, difference in (("tpr", -0.25), ("fpr", 1 / 6), ("frame_auroc", -1 / 24)):
        fields = {"measure": measure, "by": "estimate"}
        verdict = only(results, better, worse_by_at_most=0.3, **fields)
        assert verdict.value == pytest.approx(difference) and verdict.met
        assert "of the baseline" in verdict.remark
        assert not only(results, better, worse_by_at_most=0.01, **fields).met
        low, high = verdict.interval or (1.0, 0.0)
        assert low <= difference <= high
        # The bound of the interval is stricter than the estimate.
        assert only(results, better, measure=measure, worse_by_at_most=max(-low, high)).met
        assert not only(results, better, measure=measure, worse_by_at_most=abs(difference)).met
    # The other way round it is a gain.
    gain = only(better, results, measure="tpr", worse_by_at_most=0.0)
    assert gain.value == pytest.approx(0.25) and gain.met


def test_an_index_is_not_worse_than_itself(results: Path) -> None:
    verdict = only(results, results, measure="tpr", worse_by_at_most=0.0)
    assert (verdict.value, verdict.interval, verdict.met) == (0.0, (0.0, 0.0), True)


def test_the_difference_is_drawn_by_drive(tmp_path: Path) -> None:
    # Both miss half of the anomalies of every drive, but not the same ones: paired by drive, the
    # difference is 0 in every draw.
    def rows(first: float, second: float) -> list[dict[str, Any]]:
        return [frame(d, n, (first, second)[n], kind="x") for d in "abcdef" for n in (0, 1)]

    new, old = write(tmp_path / "new", rows(2, 0)), write(tmp_path / "old", rows(0, 2))
    verdict = only(new, old, measure="tpr", worse_by_at_most=0.0)
    assert verdict.interval == (0.0, 0.0) and verdict.met


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"measure": "tprr", "at_least": 1}, r"unknown measure 'tprr' \(did you mean 'tpr'\?\)"),
        ({"measure": "tpr"}, r"tpr: expected one limit, at_least or worse_by_at_most; found none"),
        ({"measure": "tpr", "at_most": 0.1}, r"tpr: expected one limit, at_least.*found at_most"),
        ({"measure": "fpr", "at_most": 0.1, "worse_by_at_most": 0.1}, r".*found at_most and worse"),
        ({"measure": "fpr", "at_most": 5}, r"fpr: at_most: expected a number from 0 to 1, found 5"),
        ({"measure": "fpr", "at_most": "1e-3"}, r"at_most: expected a number, found '1e-3'"),
        ({"measure": "fpr", "at_mots": 0.1}, r"unknown key 'at_mots' \(did you mean 'at_most'\?\)"),
        ({"measure": "fpr", "at_most": 0.1, "by": "bound"}, r"unknown value of 'by' 'bound'"),
        ({"measure": "fpr", "at_most": 0.1, "each": "size"}, r"unknown value of 'each' 'size'"),
        ({"measure": "fpr", "at_most": 0.1, "kind": "cow"}, r"fpr: expected no kind"),
        ({"measure": "fpr", "at_most": 0.1, "each": "kind"}, r"fpr: expected no kind"),
        ({"measure": "tpr", "at_least": 1, "kind": 3}, r"kind: expected a text, found 3"),
        ({"measure": "tpr", "at_least": 1, "kind": "a\x07"}, r"kind: expected a text"),
        ({"measure": "tpr", "at_least": 1, "tag": []}, r"tag: expected a text or a list of texts"),
        ({"measure": "tpr", "at_least": 1, "tag": "x", "each": "tag"}, r".*'tag' or 'each'"),
        ({"measure": "tpr", "at_least": 1, "anomaly_px": [9, 3]}, r"anomaly_px: expected \[from"),
        (
            {"measure": "false_alarms_per_hour", "at_most": 3},
            r".*has no interval, expected 'by: estim",
        ),
        ({"at_most": 3}, r"expected a mapping with 'measure'"),
    ],
)
def test_requirements_that_are_refused(
    fields: dict[str, Any], pattern: str, tmp_path: Path
) -> None:
    file = tmp_path / "requirements.yaml"
    good = {"measure": "fpr", "at_most": 0.1}
    file.write_text(yaml.safe_dump({"requirements": [good, fields]}))
    with pytest.raises(InputError, match=rf"requirements\.yaml': number 2: {pattern}"):
        read_requirements(file)


@pytest.mark.parametrize(
    "text", ["", "requirements: []", "- a", "a: [", "{requirements: [a], b: 1}"]
)
def test_other_yaml_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "requirements.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=r"requirements '.*requirements\.yaml'"):
        read_requirements(file)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"measure": "fpr", "at_most": 1, "tag": ("nigth",)}, r"unknown tag.*mean 'night'\?"),
        ({"measure": "tpr", "at_least": 0, "kind": "cov"}, r"unknown kind.*mean 'cow'\?.*crate"),
        ({"measure": "fpr", "at_most": 1, "drive": "a"}, r"unknown drive.*expected one of: town/a"),
        (
            {"measure": "tpr", "at_least": 0, "tag": ("rain",)},
            r"tpr, tag rain: expected anomalous frames, found none",
        ),
        (
            {"measure": "tpr", "at_least": 0, "anomaly_px": (5000, None)},
            r"tpr, 5000 px and more: expected anomalous frames, found none",
        ),
        ({"measure": "event_recall", "at_least": 0}, r"expected events of a replay with --labels"),
        (
            {"measure": "frame_auroc", "at_least": 0, "drive": "town/c"},
            r"needs at least 2 drives, found 1; 'by: estimate' does without",
        ),
        ({"measure": "tpr", "worse_by_at_most": 0.1}, r"--against: expected results .*found none"),
    ],
)
def test_requirements_that_the_results_cannot_answer(
    fields: dict[str, Any], pattern: str, results: Path
) -> None:
    with pytest.raises(InputError, match=pattern):
        only(results, **fields)


def test_an_uncalibrated_index_has_no_rates(tmp_path: Path) -> None:
    results = write(tmp_path / "r", FRAMES, threshold=None, calibration_sha256=None)
    assert only(results, measure="frame_auroc", at_least=0).met
    for measure, limit in (("fpr", "at_most"), ("alarm_tpr", "at_least")):
        with pytest.raises(InputError, match=rf"{measure}: .*the index is not calibrated"):
            only(results, measure=measure, **{limit: 1})


def without(key: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != key} for row in FRAMES]


@pytest.mark.parametrize(
    ("frames", "changes", "pattern"),
    [
        ([], {}, r"expected frames of at least one drive, found none"),
        ([FRAMES[-1]], {}, r"expected frames of at least one drive, found none"),
        (FRAMES, {"frames_seen": 2}, r"not built from, found 2"),
        (FRAMES, {"index": None}, r"expected what evaluate or replay writes"),
        (FRAMES, {"threshold": "high"}, r"found 'high' in place of a number"),
        (without("sha256"), {}, r"found none under 'sha256'; evaluate again"),
        (without("tags"), {}, r"found none under 'tags'; evaluate again"),
        # An unknown frame takes no part.
        ([{**FRAMES[0], "score": None}], {}, r"expected frames of at least one drive, found none"),
        ([{**FRAMES[0], "score": "1"}], {}, r"found '1' in place of a number"),
        ([{**FRAMES[0], "anomaly": 1}], {}, r"found 1 in place of true or false"),
        ([FRAMES[0], FRAMES[0]], {}, r"found twice frame 'a_0\.png' of drive 'town/a'"),
    ],
)
def test_damaged_results_are_refused(
    frames: list[dict[str, Any]], changes: dict[str, Any], pattern: str, tmp_path: Path
) -> None:
    results = write(tmp_path / "results", frames, **changes)
    with pytest.raises(InputError, match=pattern):
        only(results, measure="fpr", at_most=1)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"alarms": []}', '{"frame_auroc": 1}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=r"results '.*results\.json'"):
        read_results(tmp_path)
    (tmp_path / "results.json").unlink()
    with pytest.raises(InputError, match=r"expected results\.json or summary\.json in it"):
        read_results(tmp_path)


def test_results_of_several_indexes_are_refused(results: Path, tmp_path: Path) -> None:
    frames = [frame("z", 0, 0.0)]
    for number, (changes, name) in enumerate(
        [
            ({"index": {"fingerprint": "c" * 64}}, "index"),
            ({"calibration_sha256": "c" * 64}, "calibration"),
            ({"threshold": 3.0}, "threshold"),
            ({"versions": {"semantic_anomaly": "2.0.0"}}, "version"),
        ]
    ):
        other = write(tmp_path / f"{number}", frames, **changes)
        with pytest.raises(InputError, match=rf"expected the {name} of '.*results"):
            accept([results, other], [Requirement("fpr", at_most=1)])


@pytest.mark.parametrize(
    ("frames", "pattern"),
    [
        (FRAMES[1:], r"--against: expected the frames of the results.*no frame 'a_0\.png'"),
        (
            [*FRAMES, frame("z", 0, 0.0)],
            r"results: expected the frames of the baseline.*'z_0\.png'",
        ),
        ([{**FRAMES[0], "sha256": "other"}, *FRAMES[1:]], r"same content; found no frame 'a_0\.pn"),
        (
            [{**FRAMES[0], "tags": ["day"]}, *FRAMES[1:]],
            r"same labels, found others of.*'a_0\.png'",
        ),
    ],
)
def test_a_baseline_of_other_frames_is_refused(
    frames: list[dict[str, Any]], pattern: str, results: Path, tmp_path: Path
) -> None:
    other = write(tmp_path / "other", frames)
    with pytest.raises(InputError, match=pattern):
        only(results, other, measure="fpr", worse_by_at_most=1.0)
    with pytest.raises(InputError, match=r"--against: expected .*found no such requirement"):
        only(results, other, measure="fpr", at_most=1.0)


def test_junit_has_a_case_for_each_requirement(results: Path) -> None:
    acceptance = accept(
        [results], [Requirement("tpr", at_least=0, each="kind"), Requirement("fpr", at_most=0.1)]
    )
    assert not acceptance.met
    root = ElementTree.fromstring(acceptance.junit())
    (suite,) = root.findall("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == [
        "tpr, kind cow: at least 0 (interval)",
        "tpr, kind crate: at least 0 (interval)",
        "fpr: at most 0.1 (interval)",
    ]
    assert [case.find("failure") is not None for case in cases] == [False, False, True]
    message = cases[2].find("failure").get("message")  # type: ignore[union-attr]
    assert message is not None and message.startswith("0.1667, 95 % ")
    assert message.endswith("6 frames of 3 drives")
    properties = {p.get("name"): p.get("value") for p in suite.iter("property")}
    assert properties["index"] == "a" * 64


def make_tagged(root: Path) -> Path:
    """Write 40 nominal drives and 16 with an anomaly, of one frame each."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    labels: dict[str, dict[str, Any]] = {}
    for number in range(56):
        odd = number >= 40
        picture = street(7000 + number, odd=odd)
        name = f"{number:03d}.png"
        write_image(root / "images" / name, picture.image)
        labels[name] = {"drive": f"d{number}", "tags": [["day"], ["night", "rain"]][number % 2]}
        if odd:
            write_image(root / "masks" / name, odd_mask(picture.image_hw))
            labels[name] |= {"kind": ("box", "crate")[number % 3 == 0]}
    (root / "labels.json").write_text(json.dumps(labels))
    return root


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results of an evaluation, as `evaluate` writes them."""
    root = tmp_path_factory.mktemp("tagged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("semantic_anomaly.evaluation.figures.draw_evaluation", lambda *_: None)
        detector = make_detector(threshold=0.05, target_false_alarm_rate=0.05)
        evaluate(detector, make_tagged(root / "town"), out=root / "out", every=0)
    return root / "out"


def test_the_example_accepts_a_good_index(tagged: Path) -> None:
    acceptance: Acceptance = accept([tagged], read_requirements(EXAMPLE))
    assert acceptance.met
    names = [verdict.requirement.name for verdict in acceptance.verdicts]
    assert {"fpr", "fpr, tag day", "fpr, tag rain", "tpr, tag night", "tpr, kind box"} <= set(names)
    assert {verdict.requirement.measure for verdict in acceptance.verdicts} <= set(MEASURES)


def test_the_example_explains_every_measure_and_key() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert all(name in text for name in MEASURES)
    # The comparison is a comment, because it needs a baseline.
    lines = [line.partition("# - ")[2] for line in text.splitlines() if "# - {" in line]
    paired = [Requirement(**yaml.safe_load(line)) for line in lines]
    assert len(paired) == 2 and all(requirement.paired for requirement in paired)


def test_results_of_evaluate_have_what_tells_frames_apart(tagged: Path) -> None:
    frames = json.loads((tagged / "results.json").read_text())["frames"]
    assert frames[1]["tags"] == ["night", "rain"] and frames[1]["sequence"] == "d1"
    assert len({row["sha256"] for row in frames}) == len(frames) == 56
    odd = int(odd_mask((72, 128)).sum())
    assert [row["anomaly_px"] for row in frames] == [0] * 40 + [odd] * 16
    assert len(read_results(tagged).outcomes) == 56


@pytest.mark.usefixtures("no_figures")
def test_replays_have_rates_events_and_false_alarms(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "drive", "....oo" + 14 * ".")
    detector, source = make_detector(threshold=0.05), open_source(folder)
    events = [Event(0.4, 0.5, "box")]
    summary = replay(detector, source, tmp_path / "out", every=0, events=events)
    verdict = only(tmp_path / "out", measure="event_recall", at_least=0, kind="box")
    assert (verdict.value, verdict.count, verdict.drives) == (1.0, 1, 1)
    assert only(tmp_path / "out", measure="tpr", at_least=0).count == 2
    # Frames up to one second after the event are left out: 0.6 to 1.5 s.
    assert only(tmp_path / "out", measure="fpr", at_most=1).count == 8
    hourly = only(tmp_path / "out", measure="false_alarms_per_hour", at_most=9, by="estimate")
    assert hourly.value == summary["against_events"]["false_per_hour"]
    same = only(tmp_path / "out", tmp_path / "out", measure="alarm_fpr", worse_by_at_most=0,
                by="estimate")  # fmt: skip
    assert same.value == 0.0 and same.interval is None
    replay(detector, source, tmp_path / "unlabelled", every=0)
    with pytest.raises(InputError, match=r"expected a calibrated replay with --labels"):
        read_results(tmp_path / "unlabelled")
    (tmp_path / "out" / "scores.csv").write_text("stamp_ns,score,p_value,decision\n")
    with pytest.raises(InputError, match=r"0 rows in scores\.csv for 20 frames"):
        read_results(tmp_path / "out")
