"""Fixtures of the tests of reports."""

from __future__ import annotations

import pytest

from semantic_anomaly.evaluation import figures


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures out of reports: drawing them takes most of the time of a small run."""
    for name in ("draw_evaluation", "score_curve"):
        monkeypatch.setattr(figures, name, lambda *_: None)
