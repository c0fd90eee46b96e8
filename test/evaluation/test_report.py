"""Pictures of a report. The HTML is tested with whole evaluations and replays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from worlds.colours import make_detector
from worlds.nominal_world import COARSE, PATCHES, make_frames

from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.evaluation import report
from semantic_anomaly.evaluation.report import Album, outline_truth, side_by_side
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.images import read_image
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import AnomalyResult, Decision, Frame, HeatmapScale


def contents(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def result_of(score: float, hw: tuple[int, int] = (36, 64)) -> AnomalyResult:
    decision = Decision.ANOMALY if score > 0.5 else Decision.NOMINAL
    heat = np.full(hw, score, np.float32)
    labels = np.zeros(hw, np.uint16)
    return AnomalyResult(score, decision, 0.5, 0.5, heat, HeatmapScale(0.1, 0.5), labels)


def fill(album: Album, scores: list[float]) -> None:
    detector = make_detector()
    image = np.full((36, 64, 3), 90, np.uint8)
    for number, score in enumerate(scores):
        frame = Frame(image, number, name=f"d/{number}.png")
        result, ranks = result_of(score), [("highest_nominal", score)]
        album.add(number, frame, result, detector, stem=str(number), caption="", ranks=ranks)
    album.finish()


def test_the_album_keeps_the_worst_in_order_and_every_nth(tmp_path: Path) -> None:
    scores = [0.10, 0.90, 0.30, 0.80, 0.20, 0.70, 0.60]
    fill(Album(tmp_path, every=3, sheet=(0, 6)), scores)
    names = contents(tmp_path)
    assert [n for n in names if n.startswith("overlays/")] == [
        f"overlays/{n}.jpg" for n in (0, 3, 6)
    ]
    assert [n for n in names if n.startswith("panels/")] == [f"panels/{n}.jpg" for n in (0, 3, 6)]
    assert [n for n in names if n.startswith("worst/")] == [
        f"worst/highest_nominal_{rank}_{number}.jpg"
        for rank, number in enumerate((1, 3, 5, 6), start=1)
    ]
    assert read_image(tmp_path / "overlays/0.jpg").shape == (36, 64, 3)
    assert read_image(tmp_path / "contact_sheet.jpg").shape == (270 + 18, 2 * 480 + 4, 3)


def test_the_album_may_be_asked_for_nothing(tmp_path: Path) -> None:
    album, detector = Album(tmp_path, every=0), make_detector()
    frame = Frame(np.zeros((36, 64, 3), np.uint8))
    album.add(0, frame, result_of(0.2), detector, stem="0", caption="")
    album.finish()
    assert contents(tmp_path) == []
    album.add(1, frame, result_of(0.9), detector, stem="1", caption="", always=True)
    assert contents(tmp_path) == ["overlays", "overlays/1.jpg", "panels", "panels/1.jpg"]


def test_the_nearest_nominal_frame_is_of_the_stage_and_patch_that_are_most_anomalous(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stages = (COARSE, PATCHES)
    frames = list(make_frames(5, stages=stages))
    roi = {"camera.region_of_interest": [0.0, 0.5, 1.0, 0.5, 1.0, 1.0, 0.0, 1.0]}
    settings = Settings.from_parameters({"dedup_distance": 0.0, "smoothing": 0.0, **roi})
    index = NominalIndex.build(
        frames,
        stages=stages,
        roi=RegionOfInterest.from_settings(settings.camera_settings["camera"]),
        settings=settings,
    )
    frame, grid = frames[0]
    odd = grid.further[0].features.copy()
    # The only anomalies: one outside the region of interest, one that the coarse grid lacks.
    odd[0, 0] *= -1.0
    odd[5, 7] *= -1.0
    odd_grid = replace(grid, further=(replace(grid.further[0], features=odd),))
    embedder: Any = SimpleNamespace(device="cpu", stages=stages, embed=lambda images: [odd_grid])
    detector = AnomalyDetector(index, settings=settings, embedder=embedder)
    marked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(report, "mark_patch", lambda _, *where: marked.append(where))
    assert report.nearest_nominal(detector, frame) is not None
    expected = index.stages[1].nearest(odd[5, 7])
    assert marked == [(expected.grid_hw, expected.row, expected.col)]
    # All of the map is below 0, that is below the value outside the region of interest.
    monkeypatch.setattr(embedder, "embed", lambda images: [grid])
    assert detector.score(grid).anomaly_map.max() == 0.0
    assert report.nearest_nominal(detector, frame) is not None
    assert marked[1][1] >= marked[1][0][0] // 2, "inside the region of interest"


def test_ground_truth_is_outlined() -> None:
    gray = np.full((360, 640, 3), 90, np.uint8)
    mask = np.zeros((360, 640), np.uint8)
    mask[100:200, 200:300] = 1
    mask[:50] = 255
    marked = outline_truth(gray, mask)
    rows, cols = np.nonzero((gray != marked).any(axis=2))
    assert set(map(tuple, marked[rows, cols])) == {(0, 220, 90)}
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (100, 199, 200, 299)


def test_the_verdict_tints_the_caption() -> None:
    gray = np.full((36, 64, 3), 90, np.uint8)
    corners = [
        tuple(side_by_side([gray, gray], f"a.png   {word}")[0, -1])
        for word in ("", "FOUND", "MISSED", "FALSE ALARM")
    ]
    assert corners[0] == (255, 255, 255)
    assert corners[1] != corners[2] == corners[3] != corners[0]
