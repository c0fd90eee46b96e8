"""The README's quick start, line by line, in a folder of its own."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from semantic_anomaly.cli import main

README = Path(__file__).resolve().parents[1] / "README.md"


def commands(name: str) -> list[list[str]]:
    text = README.read_text(encoding="utf-8")
    block = re.search(rf"<!-- {name}:begin -->\s*```bash\n(.*?)```", text, re.S)
    assert block is not None, f"README.md lost its {name}"
    return [shlex.split(line) for line in block.group(1).splitlines() if line.strip()]


def run(name: str) -> None:
    listed = commands(name)
    assert listed
    for command in listed:
        assert command[0] == "semantic-anomaly"
        assert main(command[1:]) == 0, " ".join(command)


def test_commands_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("quick-start")
    results = json.loads((tmp_path / "work/report/results.json").read_text())
    assert len(results["frames"]) == 40
    # How good the shipped backbone is, is measured elsewhere; here the path must be whole.
    assert results["frame_auroc"] is not None and results["tpr"] is not None
    assert set(results["by_kind"]) == {"cow", "stop_sign_on_billboard"}
    [events] = re.findall(r"`(events: \[\{.*?\}\])`", README.read_text(encoding="utf-8"))
    (tmp_path / "events.yaml").write_text(events)
    run("evaluation")
    again, scored, one = (
        json.loads((tmp_path / f"work/{name}/results.json").read_text())
        for name in ("report", "scored", "one")
    )
    for measure in ("frame_auroc", "tpr", "fpr", "pixel_ap"):
        assert again[measure] == results[measure]
    assert scored["pixel_ap"] == again["pixel_ap"] and one["protocol"] == "one-reference"
    assert again["component_limits"] == {"predicted_px": 50, "truth_px": 10}
    replayed = json.loads((tmp_path / "work/replayed/summary.json").read_text())
    assert [event["kind"] for event in replayed["against_events"]["events"]] == ["cow"]
    run("instances")
    parts = json.loads((tmp_path / "work/parts_report/results.json").read_text())
    assert parts["settings"]["variant"] == "combined" and parts["frame_auroc"] is not None
    run("cure")
    assert (tmp_path / "work/why.jpg").is_file()


def test_readme_names_only_files_that_exist() -> None:
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://|#)([^)]+)\)", text):
        assert (README.parent / target).exists(), target
