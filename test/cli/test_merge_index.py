"""`merge-index`: what it prints and writes, and indexes that do not fit together."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds.cli import World, refused, row

from semantic_anomaly.cli import main
from semantic_anomaly.index.nominal_index import NominalIndex


@pytest.fixture(scope="module")
def parts(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("parts")
    for name in ("index_1", "index_2"):
        argv = ["build-index", world.at(name), "--out", str(root / name), *world.detector]
        assert main([*argv, "--set", "dedup_distance=0.05"]) == 0
    return [str(root / name) for name in ("index_1", "index_2")]


def test_merge_index(
    world: World, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "index")
    capsys.readouterr()
    assert main(["merge-index", *parts, "--out", out]) == 0
    printed = capsys.readouterr().out
    index = NominalIndex.load(out)
    assert row(printed, "indexes merged") == "2" and row(printed, "recordings") == "2"
    assert row(printed, "stored") == str(index.count)
    assert row(printed, "suppressed as near-duplicates") == str(index.report.suppressed)
    assert main(["inspect-index", out]) == 0
    assert row(capsys.readouterr().out, "merged from") == "2 indexes"
    rate = ["--target-false-alarm-rate", "0.1"]
    assert main(["calibrate", out, *rate, *world.detector]) == 0
    one = ["merge-index", parts[0], "--out", str(tmp_path / "one")]
    refused(one, "at least two indexes, found 1", capsys, tmp_path)
    refused(["merge-index", *parts, "--out", out], r"exists .*--force", capsys, tmp_path)
    assert main(["merge-index", *parts, "--out", out, "--force", "--max-entries", "9"]) == 0
    assert NominalIndex.load(out).count == 9


def test_indexes_of_other_settings_are_refused(
    world: World, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["merge-index", parts[0], world.at("index_with_instances")]
    argv += ["--out", str(tmp_path / "out")]
    refused(argv, "index_with_instances', stage 0: stages: expected 1", capsys, tmp_path)
