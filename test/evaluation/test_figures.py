"""Figures of scores and measures."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from unittest.mock import MagicMock

import cv2
import numpy as np
import pytest

from semantic_anomaly.evaluation import figures
from semantic_anomaly.evaluation.figures import ScoredFrame, at_width, evenly
from semantic_anomaly.io.images import read_image, write_image


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


def test_pictures_are_brought_to_a_width() -> None:
    assert at_width(np.zeros((720, 1280, 3), np.uint8), 640).shape == (360, 640, 3)
    assert at_width(np.zeros((36, 64, 3), np.uint8), 640).shape == (360, 640, 3)


def drive(kinds: str, step_ns: int = 100_000_000) -> list[ScoredFrame]:
    """Return a frame a letter: '.' nominal, others kinds; capitals are alarms."""
    return [
        ScoredFrame(i * step_ns, 0.1 * (i % 5), k.isupper(), "" if k == "." else k.lower())
        for i, k in enumerate(kinds)
    ]


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """Return the axes on which `score_curve` draws, which record the calls."""
    recorder = MagicMock()
    monkeypatch.setattr(figures, "_figure", lambda *_: nullcontext((MagicMock(), [recorder])))
    return recorder


def test_ground_truth_is_shaded_where_it_was(axes: MagicMock) -> None:
    figures.score_curve(Path("curve.png"), drive(".cc.S.c"), None, "a drive")
    assert axes.set.call_args.kwargs["xlabel"].endswith("[s]")
    assert axes.set.call_args.kwargs["ylabel"] == "frame score [deviations]"
    spans = [(*call.args, call.kwargs["label"]) for call in axes.axvspan.call_args_list]
    expected = [(0.05, 0.25, "c"), (0.35, 0.45, "s"), (0.55, 0.65, None)]
    assert spans == [pytest.approx(span) for span in expected]


def test_several_drives_are_drawn_by_frame_with_a_gap(axes: MagicMock) -> None:
    figures.score_curve(Path("curve.png"), drive("..") * 2, None, "a drive")
    assert axes.set.call_args.kwargs["xlabel"] == "frame"
    np.testing.assert_array_equal(axes.plot.call_args_list[0].args[0], [0, 1, np.nan, 2, 3])


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


def test_frames_without_stamps_are_drawn_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: list[str] = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.set", lambda axes, **given: labels.append(given.get("xlabel", ""))
    )
    frames = [figures.ScoredFrame(0, float(n), False, "") for n in range(5)]
    figures.score_curve(tmp_path / "curve.png", frames, 3.0, "title")
    assert labels == ["frame"]
