"""`accept`: what it prints and writes, its exit codes, and input that it refuses."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from worlds.cli import refused, row

from semantic_anomaly.cli import main


def write_results(folder: Path, found: int, **changes: Any) -> str:
    """Write results of four drives with a nominal and an anomalous frame each."""
    folder.mkdir()
    frames = [
        {
            **{"name": f"{drive}{number}.png", "sequence": drive, "sha256": f"{drive}{number}"},
            **{"anomaly": number == 1, "ignored": False, "kind": "cow" if number else None},
            **{"family": None, "tags": ["night"], "localized": None, "anomaly_px": 9 * number},
            "score": 2.0 if number == 1 and "abcd".index(drive) < found else 0.0,
            "decision": "nominal",
        }
        for drive in "abcd"
        for number in (0, 1)
    ]
    content = {
        **{"versions": {"semantic_anomaly": "1.2.3"}},
        **{"dataset": "town", "threshold": 1.0, "frames_seen": 0, "warnings": ["stale"]},
        **{"index": {"fingerprint": f"{found}" * 64}, "calibration_sha256": "b" * 64},
        "frames": frames,
        **changes,
    }
    (folder / "results.json").write_text(json.dumps(content))
    return str(folder)


@pytest.fixture
def requirements(tmp_path: Path) -> str:
    file = tmp_path / "requirements.yaml"
    file.write_text(
        "requirements:\n"
        "  - {measure: tpr, tag: night, at_least: 0.7, by: estimate}\n"
        "  - {measure: fpr, at_most: 0.61}\n"
    )
    return str(file)


def test_accepted(tmp_path: Path, requirements: str, capsys: pytest.CaptureFixture[str]) -> None:
    results, junit = write_results(tmp_path / "r", 3), tmp_path / "ci" / "accept.xml"
    argv = ["accept", results, "--requirements", requirements, "--junit", str(junit)]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert text.startswith("index 333333333333 (version 1.2.3)\n")
    cells = row(text, "tpr, tag night").split()
    assert cells[-7:] == ["0.750", "0.194", "to", "0.994", "4", "4", "met"]
    assert row(text, "fpr").startswith("at most 0.61 (interval)  0.000  0.000 to 0.602")
    assert "warning: stale" in text and "2 of 2 requirements met" in text
    suite = ElementTree.parse(junit).getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("2", "0")


def test_refused_with_exit_code_3(
    tmp_path: Path, requirements: str, capsys: pytest.CaptureFixture[str]
) -> None:
    results, junit = write_results(tmp_path / "r", 2), tmp_path / "accept.xml"
    argv = ["accept", results, "--requirements", requirements, "--junit", str(junit)]
    assert main(argv) == 3
    text = capsys.readouterr().out
    assert row(text, "tpr, tag night").endswith("NOT MET") and row(text, "fpr").endswith("  met")
    assert "1 of 2 requirements met" in text
    assert ElementTree.parse(junit).getroot()[0].get("failures") == "1"


def test_against_a_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, old = write_results(tmp_path / "new", 2), write_results(tmp_path / "old", 4)
    file = tmp_path / "paired.yaml"
    file.write_text("requirements: [{measure: tpr, worse_by_at_most: 0.1}]")
    assert main(["accept", old, "--requirements", str(file), "--against", new]) == 0
    assert main(["accept", new, "--requirements", str(file), "--against", old]) == 3
    text = capsys.readouterr().out
    assert "index 222222222222 (version 1.2.3), compared with index 444444444444" in text
    assert "tpr: 0.500, of the baseline 1.000" in text
    assert any(" -0.500 " in line and "NOT MET" in line for line in text.splitlines())


def test_bad_input_writes_nothing(
    tmp_path: Path, requirements: str, capsys: pytest.CaptureFixture[str]
) -> None:
    results = write_results(tmp_path / "r", 3)
    junit = ["--junit", str(tmp_path / "accept.xml")]
    Path(junit[1]).write_text("earlier")
    good = ["accept", results, "--requirements", requirements, *junit]
    absent = str(tmp_path / "absent")
    refused(["accept", absent, *good[2:]], r"results '.*absent'.*found none", capsys, tmp_path)
    refused(["accept", results, "--requirements", absent], r"absent", capsys, tmp_path)
    refused([*good, "--against", results], r"no such requirement", capsys, tmp_path)
    Path(requirements).write_text("requirements: [{measure: fpr, tag: nite, at_most: 1}]")
    refused(good, r"unknown tag of the results 'nite'.*did you mean 'night'", capsys, tmp_path)
    Path(requirements).write_text("requirements: [{measure: recall, at_least: 1}]")
    refused(good, r"number 1: unknown measure 'recall'.*localized.*tpr", capsys, tmp_path)
