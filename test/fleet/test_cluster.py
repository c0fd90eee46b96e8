"""The cluster itself: addresses, versions, storage, and Ray that is not there."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from worlds.cli import refused
from worlds.fleet import NODE

from semantic_anomaly.fleet.cluster import (
    ClusterError,
    StorageError,
    connected,
    node_problem,
    run_task,
    versions,
)
from semantic_anomaly.fleet.sources import open_on_node


def argv(drives: list[str], tmp_path: Path) -> list[str]:
    return ["build-index", drives[0], "--out", str(tmp_path / "index")]


def test_addresses_that_do_not_answer_are_named(
    drives: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("ray", reason="Ray is not installed: extra [fleet]")
    command = argv(drives, tmp_path)
    pattern = r"Ray cluster '127\.0\.0\.1:1' does not answer: Connection refused"
    refused([*command, "--ray", "127.0.0.1:1"], pattern, capsys)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("semantic_anomaly.fleet.cluster._ANSWER_S", 0.2)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        pattern = f"Ray cluster '{address}' does not answer: timed out"
        refused([*command, "--ray", address], pattern, capsys)
    # Taken for an address.
    pattern = rf"--ray: expected HOST:PORT.* found '{drives[1]}'.*put --ray after the sources"
    refused([*command, "--ray", drives[1]], pattern, capsys)
    assert not (tmp_path / "index").exists()


def test_options_of_a_fleet_need_ray(
    drives: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = argv(drives, tmp_path)
    refused([*command, "--num-gpus", "1"], "--num-gpus: expected --ray", capsys)
    refused([*command, "--shards", str(tmp_path)], "--shards: expected --ray", capsys)


def test_without_the_extra_ray_is_asked_for(drives: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['ray'] = None; from semantic_anomaly.cli import main; "
        f"sys.exit(main({[*argv(drives, tmp_path), '--ray']!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    [line] = [s for s in done.stderr.splitlines() if s.startswith("semantic-anomaly: error")]
    assert "pip install 'semantic_anomaly[fleet]'" in line


def test_nodes_of_another_version_are_refused(cluster: Any, tmp_path: Path) -> None:
    patch = "import semantic_anomaly\nsemantic_anomaly.__version__ = '0.0.1'\n"
    (tmp_path / "sitecustomize.py").write_text(patch)
    root = Path(__file__).resolve().parents[2]
    environment = {"PYTHONPATH": f"{tmp_path}:{root}"}
    node = cluster.add_node(**NODE, env_vars=environment)
    try:
        with (
            pytest.raises(
                ClusterError, match=r"node .*: expected semantic_anomaly .* found 0\.0\.1"
            ),
            connected(cluster.address, tmp_path),
        ):
            pass
    finally:
        cluster.remove_node(node, allow_graceful=True)


def test_nodes_without_the_storage_are_named(tmp_path: Path) -> None:
    (tmp_path / ".nodes").write_text("abc")
    assert node_problem(versions(), str(tmp_path), "abc") == ""
    assert "is another folder there" in node_problem(versions(), str(tmp_path), "def")
    problem = node_problem(versions(), str(tmp_path / "missing"), "abc")
    assert problem.startswith(f"cannot read '{tmp_path / 'missing'}': No such file")
    with pytest.raises(StorageError, match="expected storage that all nodes share"):
        open_on_node(str(tmp_path / "missing" / "drive[0:5]"), "")
    answer = run_task(open_on_node, {"opened": str(tmp_path / "no" / "bag"), "topic": ""}, "/")
    assert "storage" in answer and "cannot read" in answer["storage"]
