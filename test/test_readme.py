"""The README's quick start, line by line, in a folder of its own."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from semantic_anomaly.cli import main

README = Path(__file__).resolve().parents[1] / "README.md"


def quick_start() -> list[list[str]]:
    text = README.read_text(encoding="utf-8")
    block = re.search(r"<!-- quick-start:begin -->\s*```bash\n(.*?)```", text, re.S)
    assert block is not None, "README.md lost its quick start"
    return [shlex.split(line) for line in block.group(1).splitlines() if line.strip()]


def test_quick_start_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = quick_start()
    assert commands
    for command in commands:
        assert command[0] == "semantic-anomaly"
        assert main(command[1:]) == 0, " ".join(command)
    results = json.loads((tmp_path / "work/report/results.json").read_text())
    assert len(results["frames"]) == 160
    # How good the shipped backbone is, is measured elsewhere; here the path must be whole.
    assert results["frame_auroc"] is not None and results["tpr"] is not None
    assert set(results["by_kind"]) == {"cow", "stop_sign_on_billboard"}


def test_readme_names_only_files_that_exist() -> None:
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://|#)([^)]+)\)", text):
        assert (README.parent / target).exists(), target
