"""The documentation builds without a warning, and its worked example runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from semantic_anomaly.cli import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_documentation_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "true"}
    build = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert build.returncode == 0, build.stderr
    assert (tmp_path / "architecture" / "index.html").is_file()


@pytest.mark.slow
def test_worked_example_of_sensitivity_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "sensitivity.md").read_text(encoding="utf-8")
    pattern = r"<!-- worked-example:begin -->\s*```bash\n(.*?)```\s*<!-- worked-example:end -->"
    match = re.search(pattern, page, re.S)
    assert match is not None
    monkeypatch.chdir(tmp_path)
    for line in match[1].splitlines():
        command = shlex.split(line)
        assert command[0] == "semantic-anomaly" and main(command[1:]) == 0, line
    results = json.loads((tmp_path / "work" / "seen" / "results.json").read_text())
    for detector in results["detectors"]:
        # The figures of the page are of one machine; large things are seen on every one.
        *_, large = detector["by_size"].values()
        assert large["recall"] > 0.4 > detector["control_rate"]
