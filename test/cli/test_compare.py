"""The comparison of reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from semantic_anomaly.cli import main


def report(folder: Path, **values: object) -> str:
    folder.mkdir()
    content = {"dataset": "d", "frame_auroc": 0.75, "pixel_ap": 0.5, "tpr": None, **values}
    (folder / "results.json").write_text(json.dumps(content))
    return str(folder)


def test_measures_and_differences_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = report(tmp_path / "one", latency_ms={"total": {"p50": 20.0}})
    two = report(tmp_path / "two", frame_auroc=0.8, pixel_ap=None)
    assert main(["compare", one, two]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["measure", "one", "two", "difference"]
    assert lines[2:] == [
        ["frame_auroc", "0.750", "0.800", "+0.050"],
        ["pixel_ap", "0.500", "-", "-"],
        ["ms", "a", "frame", "(median)", "20.0", "-", "-"],
    ]


def test_different_data_give_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [report(tmp_path / "one"), report(tmp_path / "two", dataset="e")]
    assert main(["compare", *folders]) == 0
    assert 'warning: dataset differs (one: "d", two: "e")' in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "{", "[]", '{"alarms": []}'])
def test_other_folders_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    good = report(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    if content is not None:
        (tmp_path / "bad" / "results.json").write_text(content)
    assert main(["compare", good, str(tmp_path / "bad")]) == 2
    assert f"report '{tmp_path / 'bad'}" in capsys.readouterr().err
    assert main(["compare", good]) == 2
    assert "at least two folders, found 1" in capsys.readouterr().err
