"""A calibration made on a real cluster is that made by one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.cli import main
from semantic_anomaly.errors import CalibrationError, InputError
from semantic_anomaly.fleet.calibrate import _read_sums, calibrate_on_cluster
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.offline.calibrate import calibrate
from semantic_anomaly.settings import Settings

pytest.importorskip("ray", reason="Ray is not installed: extra [fleet]")


@pytest.fixture(scope="module")
def folder(
    drives: list[str], options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return the folder of an index of three drives."""
    folder = tmp_path_factory.mktemp("calibrate") / "index"
    build_index(drives[:3], settings=Settings(**options), out=folder)
    return folder


def test_it_equals_that_of_one_process_and_damaged_drives_are_named(
    cluster: Any, drives: list[str], folder: Path, options: dict[str, Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    # The images of one cannot be read from the first on, those of the other in the middle.
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"no image")
    worse = Path(shutil.copytree(drives[4], tmp_path / "worse"))
    for image in sorted(worse.rglob("images/*.png"))[2:5]:
        image.write_bytes(b"no image")
    further = [drives[3], str(tmp_path / "bad"), str(worse)]
    settings = [f"--set={name}={value}" for name, value in options.items()]
    argv = ["calibrate", str(folder), *further, "--leave-one-drive-out", *settings]
    argv += ["--shards", str(tmp_path / "shards"), "--ray", cluster.address]
    assert main(argv) == 3
    printed = capsys.readouterr().out
    assert "not readable: bad: " in printed and "not readable: worse: " in printed
    expected = calibrate(
        NominalIndex.load(folder),
        drives[3],
        leave_one_drive_out=True,
        settings=Settings(**options),
    )
    found = Calibration.load(folder)
    assert found.sha256 == expected.sha256
    # Nothing is embedded again; only the damaged drive is tried.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "shards").glob("s*-*")}
    assert len(before) == 4 + 4 + 4, "sums, their numbers, and scores of four drives"
    assert main(argv) == 3
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "shards").glob("s*-*")} == before
    # What is damaged is refused.
    damaged = next((tmp_path / "shards").glob("sums-*.npz"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CalibrationError, match="damaged; remove it"):
        _read_sums(damaged.with_suffix(""), [None])


def test_an_index_is_built_and_calibrated_by_one_command(
    cluster: Any, drives: list[str], options: dict[str, Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "index"
    settings = [f"--set={name}={value}" for name, value in options.items()]
    ray = ["--calibrate", *settings, "--shards", str(tmp_path / "shards")]
    ray += ["--ray", cluster.address]
    assert main(["build-index", *drives[:2], "--out", str(out), *ray]) == 0
    found = Calibration.load(out)
    assert f"threshold {found.threshold:.4f}" in capsys.readouterr().out
    expected = calibrate(NominalIndex.load(out), settings=Settings(**options))
    assert found.sha256 == expected.sha256
    # Before the work.
    assert main(["build-index", drives[0], "--out", str(tmp_path / "one"), *ray]) == 2
    assert "expected at least 2 drives, found 1" in capsys.readouterr().err
    assert not (tmp_path / "one").exists()


def test_bad_input_is_refused(
    cluster: Any, drives: list[str], folder: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    def run(*sources: str) -> None:
        calibrate_on_cluster(
            folder,
            sources,
            address=cluster.address,
            shards=tmp_path / "shards",
            settings=Settings(**options),
        )

    with pytest.raises(CalibrationError, match="at least 2 drives with --ray, found 1"):
        run(drives[3])
    with pytest.raises(CalibrationError, match="found some given twice"):
        run(f"{drives[3]}[0:4]", f"{drives[3]}[2:]", drives[4])
    with pytest.raises(InputError, match="the index has seen frame"):
        run(drives[0], drives[4])
