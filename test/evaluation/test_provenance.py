"""Provenance of a report."""

from __future__ import annotations

from pathlib import Path

import pytest

from semantic_anomaly.evaluation import provenance


def test_versions_name_what_computes() -> None:
    assert {"semantic_anomaly", "python", "numpy", "torch"} <= set(provenance.versions())


def test_the_commit_is_of_the_package_or_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = provenance.git_commit()
    assert commit is None or len(commit.removesuffix("+changes")) == 40
    # Installed into somebody else's repository, theirs is not ours.
    elsewhere = tmp_path / "theirs" / "deep" / "semantic_anomaly" / "evaluation" / "provenance.py"
    elsewhere.parent.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(elsewhere))
    monkeypatch.setattr(provenance, "_git", lambda folder, *_: str(tmp_path / "theirs"))
    assert provenance.git_commit() is None


def test_the_state_of_a_folder_is_of_its_visible_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    state = provenance.files_state(tmp_path)
    (tmp_path / ".hidden").write_text("x")
    assert provenance.files_state(tmp_path) == state
    (tmp_path / "a").write_text("ab")
    assert provenance.files_state(tmp_path) != state
