"""What a report is written into, what it says of its making, and its pictures."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

from semantic_anomaly.errors import InputError, SemanticAnomalyError
from semantic_anomaly.evaluation import extras, figures, provenance
from semantic_anomaly.evaluation.album import Album, at_width, evenly, side_by_side
from semantic_anomaly.evaluation.figures import ScoredFrame
from semantic_anomaly.evaluation.reports import refuse_other_content, report_folder, write_json
from semantic_anomaly.io.images import read_image, write_image
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.structures import AnomalyResult, Decision, Frame, HeatmapScale

WRITTEN = frozenset({"results.json", "overlays", "curve.png"})


def contents(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("before", ["nothing", "empty", "report"])
def test_a_report_replaces_its_like_as_a_whole(tmp_path: Path, before: str) -> None:
    out = tmp_path / "out"
    if before != "nothing":
        out.mkdir()
    if before == "report":
        (out / "results.json").write_text("{}")
        (out / "curve.png").write_text("old")
    with report_folder(out, "results.json", WRITTEN) as folder:
        write_json(folder / "results.json", {"new": 1})
    assert contents(tmp_path) == ["out", "out/results.json"]
    assert json.loads((out / "results.json").read_text()) == {"new": 1}


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("thesis.tex",), "thesis.tex"),
        (("results.json", "thesis.tex"), "thesis.tex"),
        (("curve.png",), "curve.png"),
    ],
)
def test_other_content_is_never_replaced(tmp_path: Path, names: tuple, found: str) -> None:
    for name in names:
        (tmp_path / name).write_text("precious")
    with (
        pytest.raises(InputError, match=f"found {found}"),
        report_folder(tmp_path, "results.json", WRITTEN),
    ):
        pytest.fail("the block must not run")
    assert contents(tmp_path) == sorted(names)


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match="found a file"):
        refuse_other_content(tmp_path / "out", "results.json", WRITTEN)


def test_a_failure_leaves_an_earlier_report_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text("old")
    with (
        pytest.raises(KeyboardInterrupt),
        report_folder(out, "results.json", WRITTEN) as folder,
    ):
        (folder / "results.json").write_text("half")
        raise KeyboardInterrupt
    assert (out / "results.json").read_text() == "old"
    assert contents(tmp_path) == ["out", "out/results.json"]


def test_json_holds_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"auroc": math.nan})


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(SemanticAnomalyError, match=r"scikit-learn.*\[report\]") as caught:
        extras.require("sklearn.metrics")
    assert not isinstance(caught.value, InputError), "nothing is wrong with the input"
    assert isinstance(extras.load("matplotlib.figure"), ModuleType)


def test_versions_name_what_computes() -> None:
    assert {"semantic_anomaly", "python", "numpy", "torch"} <= set(provenance.versions())


def test_the_commit_is_of_the_package_or_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = provenance.git_commit()
    assert found is None or len(found.removesuffix("+changes")) == 40
    # Installed into somebody else's repository, theirs is not ours.
    elsewhere = tmp_path / "theirs" / "deep" / "semantic_anomaly" / "evaluation" / "provenance.py"
    elsewhere.parent.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(elsewhere))
    monkeypatch.setattr(provenance, "_git", lambda folder, *_: str(tmp_path / "theirs"))
    assert provenance.git_commit() is None


@pytest.mark.parametrize(
    ("numbers", "count", "expected"),
    [
        (list(range(10)), 3, [0, 4, 9]),
        (list(range(3)), 5, [0, 1, 2]),
        ([], 4, []),
        ([7, 8, 9], 1, [7]),
        ([1, 2], 0, []),
    ],
)
def test_evenly(numbers: list[int], count: int, expected: list[int]) -> None:
    assert evenly(numbers, count) == expected


def result_of(score: float, hw: tuple[int, int] = (36, 64)) -> AnomalyResult:
    decision = Decision.ANOMALY if score > 0.5 else Decision.NOMINAL
    heat = np.full(hw, score, np.float32)
    labels = np.zeros(hw, np.uint16)
    return AnomalyResult(score, decision, 0.5, 0.5, heat, HeatmapScale(0.1, 0.5), labels)


def fill(album: Album, scores: list[float], group: str = "highest_nominal") -> None:
    image = np.full((36, 64, 3), 90, np.uint8)
    for number, score in enumerate(scores):
        frame = Frame(image, number, name=f"d/{number}.png")
        album.add(
            number, frame, result_of(score), stem=str(number), caption="", ranks=[(group, score)]
        )
    album.finish()


def test_the_album_keeps_the_worst_in_order_and_every_nth(tmp_path: Path) -> None:
    scores = [0.10, 0.90, 0.30, 0.80, 0.20, 0.70, 0.60]
    fill(Album(tmp_path, ImageRegion(), 0.5, every=3, sheet=(0, 6)), scores)
    names = contents(tmp_path)
    assert [n for n in names if n.startswith("overlays/")] == [
        f"overlays/{n}.jpg" for n in (0, 3, 6)
    ]
    assert [n for n in names if n.startswith("panels/")] == [f"panels/{n}.jpg" for n in (0, 3, 6)]
    assert [n for n in names if n.startswith("worst/")] == [
        f"worst/highest_nominal_{place}_{number}.jpg"
        for place, number in enumerate((1, 3, 5, 6), start=1)
    ]
    assert read_image(tmp_path / "overlays/0.jpg").shape == (36, 64, 3)
    assert read_image(tmp_path / "contact_sheet.jpg").shape == (270 + 18, 2 * 480 + 4, 3)


def test_the_album_may_be_asked_for_nothing(tmp_path: Path) -> None:
    album = Album(tmp_path, ImageRegion(), 0.5, every=0)
    frame = Frame(np.zeros((36, 64, 3), np.uint8))
    album.add(0, frame, result_of(0.2), stem="0", caption="")
    album.finish()
    assert contents(tmp_path) == []
    album.add(1, frame, result_of(0.9), stem="1", caption="", always=True)
    assert contents(tmp_path) == ["overlays", "overlays/1.jpg", "panels", "panels/1.jpg"]


def test_ground_truth_is_outlined_on_the_image_alone() -> None:
    gray = np.full((360, 640, 3), 90, np.uint8)
    mask = np.zeros((360, 640), np.uint8)
    mask[100:200, 200:300] = 1
    mask[:50] = 255
    plain = side_by_side(gray, gray, gray, None, "x")
    marked = side_by_side(gray, gray, gray, mask, "x")
    rows, cols = np.nonzero((plain != marked).any(axis=2))
    assert set(map(tuple, marked[rows, cols])) == {(0, 220, 90)}
    top = plain.shape[0] - 360
    assert (rows.min() - top, rows.max() - top) == (100, 199)
    assert (cols.min(), cols.max()) == (200, 299)


def test_the_verdict_tints_the_caption() -> None:
    gray = np.full((36, 64, 3), 90, np.uint8)
    corners = [
        tuple(side_by_side(gray, gray, gray, None, f"a.png   {word}")[0, -1])
        for word in ("", "FOUND", "MISSED", "FALSE ALARM")
    ]
    assert corners[0] == (255, 255, 255)
    assert corners[1] != corners[2] == corners[3] != corners[0]


def test_pictures_are_brought_to_a_width() -> None:
    assert at_width(np.zeros((720, 1280, 3), np.uint8), 640).shape == (360, 640, 3)
    assert at_width(np.zeros((36, 64, 3), np.uint8), 640).shape == (360, 640, 3)


def drive(kinds: str, step_ns: int = 100_000_000) -> list[ScoredFrame]:
    """Return a frame a letter: '.' nominal, others kinds; capitals are alarms."""
    return [
        ScoredFrame(i * step_ns, 0.1 * (i % 5), k.isupper(), "" if k == "." else k.lower())
        for i, k in enumerate(kinds)
    ]


class _Axes:
    """Records what is drawn."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float, str | None]] = []

    def axvspan(self, left: float, right: float, label: str | None, **_: object) -> None:
        self.spans.append((round(left, 6), round(right, 6), label))


def test_ground_truth_is_shaded_where_it_was() -> None:
    axes = _Axes()
    frames = drive(".cc.S.c")
    x, label = figures._axis(frames)
    figures._shade_truth(axes, x, frames)
    assert label.endswith("[s]")
    assert axes.spans == [(0.05, 0.25, "c"), (0.35, 0.45, "s"), (0.55, 0.65, None)]


def test_several_drives_are_drawn_by_frame() -> None:
    frames = drive("..") + drive("..")
    x, label = figures._axis(frames)
    assert label == "frame" and x.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("frames", "threshold"), [(drive(".cC.A.") * 2, 0.25), (drive("."), None)])
def test_curves_and_histograms_are_drawn(
    tmp_path: Path, frames: list[ScoredFrame], threshold: float | None
) -> None:
    figures.score_curve(tmp_path / "curve.png", frames, threshold, "a drive")
    scores = {"nominal": [0.1, 0.2], "odd object": [0.4], "odd arrangement": []}
    figures.score_histogram(tmp_path / "spread.png", scores, [0.1, 0.15], threshold, "a drive")
    for name in ("curve", "spread"):
        picture = read_image(tmp_path / f"{name}.png")
        assert min(picture.shape[:2]) > 200
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10, "something is drawn"


def test_the_demo_gets_curve_sheet_and_film(tmp_path: Path) -> None:
    overlays = tmp_path / "live/overlays"
    overlays.mkdir(parents=True)
    rows = []
    for number in range(6):
        anomaly = number in (3, 4)
        if number != 2:
            shade = np.full((90, 160, 3), 40 * number, np.uint8)
            write_image(overlays / f"{number:06d}.jpg", shade)
        rows.append(
            {"score": 0.1 * number, "decision": "anomaly" if anomaly else "nominal",
             "anomaly": anomaly, "kind": "cow" if anomaly else None}
        )  # fmt: skip
    rows[2]["score"] = None
    figures.demo_pictures(tmp_path, rows, 0.25)
    assert read_image(tmp_path / "contact_sheet.jpg").shape == (2 * 270 + 4, 4 * 480 + 3 * 4, 3)
    assert read_image(tmp_path / "score_curve.png").shape[1] > 500
    film = cv2.VideoCapture(str(tmp_path / "drive.gif"))
    count = 0
    while film.read()[0]:
        count += 1
    assert count == 5
