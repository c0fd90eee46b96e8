"""The figure of the concepts: drawn from results, with the words of the documentation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.colours import IMAGE_HW, ODD_BOX, make_detector, street

from semantic_anomaly.detection.rendering import draw_overlay
from semantic_anomaly.io.images import read_image
from semantic_anomaly.scoring.distances import FrameScorer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import draw_concepts  # noqa: E402


@pytest.fixture(scope="module")
def steps() -> draw_concepts.Steps:
    detector, frame = make_detector(), street(1, odd=True)
    assert detector.calibration is not None
    grid = detector.embedder.embed([frame.image])[0]
    score, result = detector.score(grid), detector.assess(frame, grid)
    mask = np.zeros(IMAGE_HW, bool)
    mask[ODD_BOX[1] : ODD_BOX[3], ODD_BOX[0] : ODD_BOX[2]] = True
    return draw_concepts.Steps(
        frame=frame,
        mask=mask,
        grid=grid,
        distances=FrameScorer(detector.index, detector.settings, detector.roi)
        .distance_maps(grid)[0]
        .values,
        score=score,
        z=score.stage_maps[0].values,
        calibration=detector.calibration,
        result=result,
        overlay=draw_overlay(frame, result),
        tail_percent=detector.settings.tail_percent,
    )


def test_the_figure_shows_the_values_in_deviations(
    steps: draw_concepts.Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    texts: list[str] = []
    save = Figure.savefig

    def recording(self: Figure, *args: Any, **options: Any) -> None:
        for axes in self.axes:
            texts.extend([*(t.get_text() for t in axes.texts), axes.get_xlabel()])
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", recording)
    draw_concepts.draw(steps, tmp_path / "concepts.png")
    picture = read_image(tmp_path / "concepts.png")
    assert picture.shape == (450, 1050, 3) and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    shown = " | ".join(texts)
    for expected in (
        *("8. Decision", "anomaly, 1 localization", "40 nominal frames of other drives"),
        *("anomaly score in deviations", f"score {steps.result.score:.2f} deviations"),
        f"threshold {steps.result.threshold:.2f}",
        f"mean of the largest {steps.tail_percent:g} %",
    ):
        assert expected in shown
    assert "units of distance" not in shown


def test_it_prints_what_the_page_quotes(
    steps: draw_concepts.Steps, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_concepts.report(steps)
    printed = capsys.readouterr().out
    assert f"distance: on the anomaly {steps.distances.max():.3f}, beside it 0.0" in printed
    assert f"score {steps.result.score:.3f}" in printed and "anomaly, boxes [(" in printed
