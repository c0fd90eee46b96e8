"""An index built on a real cluster: equal coverage, lost nodes, damage, restarts, full disks."""

from __future__ import annotations

import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from worlds.fleet import NODE

from semantic_anomaly.cli import main
from semantic_anomaly.errors import ArtefactError, InputError, SourceError
from semantic_anomaly.fleet import build_index as fleet_build
from semantic_anomaly.fleet.build_index import FleetBuild, build_index_on_cluster, build_shard
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.settings import Settings

pytest.importorskip("ray", reason="Ray is not installed: extra [fleet]")


def on_cluster(
    cluster: Any, sources: list[str], out: Path, options: Any, **more: Any
) -> FleetBuild:
    return build_index_on_cluster(
        sources,
        **{"address": cluster.address, "shards": out.with_name("shards"), **more},
        out=out,
        settings=Settings(**options),
    )


def shards(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("shard-*") if p.is_dir()) if folder.exists() else []


def wait_for_shard(folder: Path, process: subprocess.Popen[bytes] | None = None) -> None:
    while not shards(folder):
        assert process is None or process.poll() is None, "the command has ended before"
        time.sleep(0.02)


def test_it_covers_what_the_index_built_at_once_covers_even_if_a_node_is_lost(
    cluster: Any, drives: list[str], options: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # Five shards need a tree of two levels then.
    monkeypatch.setattr(fleet_build, "FAN_IN", 2)
    node = cluster.add_node(**NODE)

    def lose_node() -> None:
        wait_for_shard(tmp_path / "shards")
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=lose_node)
    thread.start()
    built = on_cluster(cluster, drives, tmp_path / "index", options)
    thread.join()
    assert built.ran == 5 and not built.losses
    index = NominalIndex.load(tmp_path / "index")
    at_once = build_index(drives, settings=Settings(**options))
    assert index.report.seen == at_once.report.seen and index.report.frames == 30
    assert set(index.recordings) == set(at_once.recordings)
    assert [s.name for s in index.content.sources] == [s.name for s in at_once.content.sources]
    assert len(index.content.parts) == 5
    # Everything seen lies within the distance of an entry of either one; so do their entries.
    for one, other in ((index, at_once), (at_once, index)):
        distances = one.exact_distances(other.content.embeddings, 1)
        assert distances.max() <= options["dedup_distance"] + 1e-5


def test_a_killed_command_goes_on_and_damaged_sources_are_named(
    cluster: Any, drives: list[str], options: dict[str, Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    # One cannot be opened, the images of the other cannot be read.
    (tmp_path / "cut_off.mcap").write_bytes(b"\x89MCAP0\r\n cut")
    (tmp_path / "bad").mkdir()
    for name in ("0.png", "1.png", "2.png"):
        (tmp_path / "bad" / name).write_bytes(b"no image")
    sources = [drives[0], str(tmp_path / "cut_off.mcap"), str(tmp_path / "bad"), *drives[1:]]
    settings = [f"--set={name}={value}" for name, value in options.items()]
    argv = ["build-index", *sources, "--out", str(tmp_path / "index"), *settings]
    argv += ["--shards", str(tmp_path / "shards"), "--ray", cluster.address]
    with subprocess.Popen([sys.executable, "-m", "semantic_anomaly", *argv]) as process:
        wait_for_shard(tmp_path / "shards", process)
        process.kill()
    assert not (tmp_path / "index").exists()
    finished = [(path, path.stat().st_mtime_ns) for path in shards(tmp_path / "shards")]
    capsys.readouterr()
    assert main(argv) == 3
    printed = capsys.readouterr().out
    assert "not readable: cut_off.mcap: " in printed and "not readable: bad: " in printed
    ran = int(printed.partition(" were read by this run")[0].rpartition(" ")[2])
    assert 1 <= ran <= 6 - len(finished)
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in finished)
    assert not list((tmp_path / "shards").glob(".*.tmp"))
    content = NominalIndex.load(tmp_path / "index").content
    assert [source.name for source in content.failed] == ["cut_off.mcap", "bad"]
    assert [source.name for source in content.sources] == [f"drive_{n}" for n in range(5)]
    assert main(["inspect-index", str(tmp_path / "index")]) == 0
    assert "bad: " in capsys.readouterr().out


@pytest.mark.slow
def test_only_changed_sources_run_again(
    cluster: Any, drives: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    options = {**options, "dedup_distance": -1.0, "execution": "auto"}
    first = on_cluster(cluster, drives[:2], tmp_path / "index", options)
    [measured] = (tmp_path / "shards").glob("measured-*.json")
    content = measured.read_bytes()
    more = on_cluster(cluster, drives[:3], tmp_path / "index", options, force=True)
    assert (first.ran, more.ran) == (2, 1) and measured.read_bytes() == content
    # One value holds for all: that of the first drive alone.
    [alone] = build_index(drives[0], settings=Settings(**options)).stages
    found = more.index.content.limits["dedup_distance"]
    assert found == pytest.approx(alone.content.limits["dedup_distance"], rel=0.01)
    other = {**options, "max_entries": 1000}
    assert on_cluster(cluster, drives[:1], tmp_path / "index", other, force=True).ran == 1


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_no_part_of_a_shard(
    drives: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    request = {"name": "drive_0", "opened": drives[0], "topic": "", "camera": "camera"}
    request |= {"recordings": {"drive_0": "drive_0"}, "stride": 1}
    parameters = Settings(**options).with_build_defaults().to_parameters()
    arguments = request, parameters, [0.05], str(tmp_path / "shard-0")
    with small_files(4096), pytest.raises(ArtefactError, match="cannot write"):
        build_shard(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-0.json"]
    build_shard(*arguments)
    assert NominalIndex.load(tmp_path / "shard-0").report.frames == 6


def test_bad_input_is_refused(
    cluster: Any, drives: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="is not an index"):
        on_cluster(cluster, drives, tmp_path / "out", options)
    with pytest.raises(InputError, match=r"expected a node with 1 GPUs .* found 0 in all nodes"):
        on_cluster(cluster, drives, tmp_path / "index", options, num_gpus=1.0)
    with pytest.raises(SourceError, match="missing' does not exist"):
        on_cluster(cluster, [drives[0], str(tmp_path / "missing")], tmp_path / "index", options)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"no image")
    with pytest.raises(SourceError, match=r"no source can be read; the first one: .*bad"):
        on_cluster(cluster, [str(tmp_path / "bad")], tmp_path / "index", options)
    with fleet_build.open_shards(tmp_path / "shards"), pytest.raises(
        InputError, match="another run is using it"
    ):  # fmt: skip
        on_cluster(cluster, drives, tmp_path / "index", options)
    other = {**options, "backbone": str(tmp_path)}
    with pytest.raises(InputError, match=r"'drive_0' on node .*config\.json"):
        on_cluster(cluster, drives[:1], tmp_path / "index", other)
    assert not (tmp_path / "index").exists() and not shards(tmp_path / "shards")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["notes.txt"]
