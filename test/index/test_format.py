"""An index that was damaged or forged is not believed."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.nominal_world import (
    DIM,
    GRID,
    STAGES,
    build,
    build_of_drives,
    make_frames,
    patches,
    sign_again,
)

from semantic_anomaly.errors import ArtefactError, IndexFormatError, IndexMismatchError
from semantic_anomaly.index import format as format_module
from semantic_anomaly.index.edits import add_nominal, retract
from semantic_anomaly.index.format import fingerprint_of, is_calibration_file, refuse_existing
from semantic_anomaly.index.hnsw import check_graph_file
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import RegionOfInterest


@pytest.fixture(scope="module")
def index() -> NominalIndex:
    """Of two drives; two entries retracted by edit 1, two frames added by edit 2."""
    edited = retract(build_of_drives({"a": 0, "b": 1}), {0: [1, 5]})
    return add_nominal(edited, make_frames(2, 7), roi=RegionOfInterest(), source="s")[0]


@pytest.fixture(scope="module")
def saved(index: NominalIndex, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "index"
    index.save(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def flip(position: float) -> Callable[[Path], None]:
    def work(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(position * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return work


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "link": lambda path: path.symlink_to(path.rename(path.parent.parent.parent / "moved")),
    "flipped": flip(0.7),
    "flipped at the end": flip(1.0),
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, damage) for name in ("manifest.json", "graph.hnsw") for damage in DAMAGES),
        *((f"{name}.npy", "flipped") for name in ("embeddings", "entries", "centroids")),
        *(("lists.npy", damage) for damage in ("missing", "flipped at the end")),
        ("frames/000000.jpg", "missing"),
        *(("support.npy", damage) for damage in ("missing", "flipped at the end")),
        *(("radii.npy", damage) for damage in ("missing", "flipped at the end")),
        ("retracted_embeddings.npy", "missing"),
        ("retracted_entries.npy", "flipped at the end"),
    ],
)
def test_damage_is_noticed(copy: Path, name: str, damage: str) -> None:
    DAMAGES[damage](copy / name)
    with pytest.raises(IndexFormatError, match=rf"{copy}.*{name}"):
        NominalIndex.load(copy)


@pytest.mark.parametrize("name", ["other.txt", "frames/000999.jpg", "frames/x/y", "graph2.hnsw"])
def test_surplus_files_are_noticed(copy: Path, name: str) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"1")
    with pytest.raises(IndexFormatError, match="only files of the manifest"):
        NominalIndex.load(copy)


@pytest.mark.parametrize("what", ["nothing", "empty", "file"])
def test_what_is_no_index_is_named(tmp_path: Path, what: str) -> None:
    path = tmp_path / "place"
    if what == "empty":
        path.mkdir()
    elif what == "file":
        path.write_bytes(b"1")
    with pytest.raises(IndexFormatError, match=str(path)):
        NominalIndex.load(path)


def test_signing_again_without_a_change_is_harmless(copy: Path) -> None:
    before = (copy / "manifest.json").read_bytes()
    sign_again(copy)
    assert (copy / "manifest.json").read_bytes() == before
    NominalIndex.load(copy)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "format": lambda m: m.update(format="other"),
    "surplus key": lambda m: m.update(surplus=1),
    "dim": lambda m: m["content"].update(dim=DIM * 2),
    "count": lambda m: m["content"].update(count=5),
    "count of another type": lambda m: m["content"].update(count="5"),
    "identity without dim": lambda m: m["content"]["identity"].pop("dim"),
    "identity of another dim": lambda m: m["content"]["identity"].update(dim=DIM * 2),
    "no frames": lambda m: m["content"].update(frames=[]),
    "smaller grids": lambda m: m["content"].update(
        frames=[[n, 1, 1, r] for n, _, _, r in m["content"]["frames"]]
    ),
    "frames of another shape": lambda m: m["content"].update(frames=[1, 2]),
    "no content": lambda m: m.update(content={}),
    "no files": lambda m: m.update(files={}),
    "files of another type": lambda m: m.update(files=[1]),
    "file facts of another type": lambda m: m["files"].update({"graph.hnsw": 1}),
    "file outside": lambda m: m["files"].update({"../copy/graph.hnsw": m["files"]["graph.hnsw"]}),
    "other build": lambda m: m["content"]["build"].pop("seen"),
    "ef of another type": lambda m: m["content"].update(search_ef="many"),
    "ef of none": lambda m: m["content"].update(search_ef=0),
    "region of another type": lambda m: m["content"].update(roi=[1]),
    "region of no area": lambda m: m["content"]["roi"].update(polygon_xy=[[0, 0], [1, 1], [0, 0]]),
    "no lists": lambda m: m["content"].update(lists=0),
    "lists of another type": lambda m: m["content"].update(lists="many"),
    "no stride": lambda m: m["written"].pop("stride"),
    "sources of another type": lambda m: m["written"].update(sources=["drive"]),
    "a source without recordings": lambda m: m["written"]["sources"][0].pop("recordings"),
    "recordings of another type": lambda m: m["written"]["sources"][0].update(recordings=[1]),
    "fewer recordings": lambda m: m["content"]["recordings"].pop(),
    "fewer rows of support": lambda m: m["content"].update(support=1),
    "no support": lambda m: m["content"].pop("support"),
    "other graph": lambda m: m["content"]["graph"].update(m=8),
    "a further stage that is not there": lambda m: m["content"].update(further=["0" * 64]),
    "further stages of another type": lambda m: m["content"].update(further=1),
    "no weight": lambda m: m["content"].pop("weight"),
    "negative weight": lambda m: m["content"].update(weight=-1.0),
    "weight of another type": lambda m: m["content"].update(weight="much"),
    "average of another type": lambda m: m["content"]["identity"].update(average="3"),
    "even average": lambda m: m["content"]["identity"].update(average=2),
    "no backbone": lambda m: m["written"].update(backbone=""),
    "segmenter of another type": lambda m: m["content"].update(segmenter="tokens"),
    "nothing written": lambda m: m.update(written={}),
    "other space": lambda m: m["content"].update(space="l2"),
    "surplus content": lambda m: m["content"].update(surplus=1),
}


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_forged_manifests_are_refused(copy: Path, change: str) -> None:
    sign_again(copy, CHANGES[change])
    with pytest.raises(IndexFormatError):
        NominalIndex.load(copy)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("embeddings", lambda e: e * np.float32(1.1)),
        ("embeddings", lambda e: np.where(np.arange(len(e))[:, None] == 3, np.nan, e)),
        ("embeddings", lambda e: e.astype(np.float64)),
        ("embeddings", lambda e: np.asfortranarray(e)),
        ("embeddings", lambda e: e[:-1]),
        ("entries", lambda e: e.astype(np.int64)),
        ("entries", lambda e: e - 1),
        ("entries", lambda e: e + np.int32(8)),
        ("entries", lambda e: e[:, :2]),
        ("centroids", lambda c: c * np.float32(1.1)),
        ("centroids", lambda c: c[:-1]),
        ("centroids", lambda c: np.where(np.arange(len(c))[:, None] == 0, np.nan, c)),
        ("lists", lambda n: n - 1),
        ("lists", lambda n: n + np.int32(9999)),
        ("lists", lambda n: n[:-1]),
        ("lists", lambda n: n.astype(np.int64)),
        ("support", lambda s: s - 1),
        ("support", lambda s: s + np.array([9999, 0, 0], np.int32)),
        ("support", lambda s: s + np.array([0, 3, 0], np.int32)),
        ("support", lambda s: s[:-1]),
        ("support", lambda s: s[:, :2]),
        ("support", lambda s: s.astype(np.int64)),
    ],
)
def test_forged_arrays_are_refused(
    copy: Path, name: str, array: Callable[[np.ndarray], np.ndarray]
) -> None:
    path = copy / f"{name}.npy"
    np.save(path, array(np.load(path, allow_pickle=False)))
    sign_again(copy)
    with pytest.raises(IndexFormatError):
        NominalIndex.load(copy)


def test_pickled_arrays_are_not_read(copy: Path) -> None:
    np.save(copy / "entries.npy", np.array([{"a": 1}], dtype=object))
    sign_again(copy)
    with pytest.raises(IndexFormatError, match="Python objects"):
        NominalIndex.load(copy)


@pytest.mark.parametrize(
    "header",
    ["{'descr': (\n", "[" * 4000, "-" * 9000 + "1", "1" + "+1j" * 3000, "\0" * 64, "x" * 60000],
    ids=["unterminated", "brackets", "signs", "additions", "nulls", "long"],
)
def test_headers_of_arrays_that_are_no_headers_are_refused(copy: Path, header: str) -> None:
    path = copy / "entries.npy"
    size = len(header).to_bytes(2, "little")
    path.write_bytes(b"\x93NUMPY\x01\x00" + size + header.encode() + path.read_bytes()[128:])
    sign_again(copy)
    with pytest.raises(
        IndexFormatError, match=r"expected entries\.npy as an array, found \w+: "
    ) as e:
        NominalIndex.load(copy)
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("depth", [100, 900, 100_000])
def test_manifests_that_nest_deep_are_refused(copy: Path, depth: int) -> None:
    path = copy / "manifest.json"
    path.write_text(
        path.read_text().replace('"stride"', f'"deep": {"[" * depth + "]" * depth}, "s"')
    )
    with pytest.raises(IndexFormatError, match="nest too deep"):
        NominalIndex.load(copy)


def test_errors_of_identities_and_graphs_name_the_index(copy: Path) -> None:
    (copy / "graph.hnsw").write_bytes(b"1")
    sign_again(copy)
    with pytest.raises(IndexFormatError, match=rf"index '{copy}': graph\.hnsw: expected at least"):
        NominalIndex.load(copy).configure_search("graph", 10)
    sign_again(copy, lambda m: m["content"]["identity"].update(dim=-1))
    with pytest.raises(IndexFormatError, match=rf"index '{copy}': embedder identity: dim"):
        NominalIndex.load(copy)


def test_forged_graphs_are_refused_before_hnswlib_reads_them(copy: Path) -> None:
    path = copy / "graph.hnsw"
    data = bytearray(path.read_bytes())
    data[8:16] = (10).to_bytes(8, "little")
    path.write_bytes(data)
    sign_again(copy)
    index = NominalIndex.load(copy)
    with pytest.raises(IndexFormatError, match=r"graph\.hnsw"):
        index.configure_search("graph", 10)
    assert index.exact_distances(patches(1), 1).shape == (GRID[0] * GRID[1],)


def test_a_graph_swapped_after_loading_is_noticed(copy: Path) -> None:
    index = NominalIndex.load(copy)
    path = copy / "graph.hnsw"
    data = bytearray(path.read_bytes())
    # The first link of the first entry, to another entry: sound, but not what was saved.
    first = slice(96 + 4, 96 + 8)
    data[first] = (1 + int.from_bytes(data[first], "little") % 3).to_bytes(4, "little")
    assert data != path.read_bytes()
    path.write_bytes(data)
    check_graph_file(path, index.content.embeddings)
    with pytest.raises(IndexFormatError, match=r"graph\.hnsw"):
        index.configure_search("graph", 10)


def test_every_single_byte_of_the_manifest_counts(copy: Path) -> None:
    path = copy / "manifest.json"
    data = path.read_bytes()
    for position in itertools.islice(range(len(data)), 0, None, 29):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(IndexFormatError):
            NominalIndex.load(copy)


@pytest.mark.parametrize("version", [4, 6, "5", None])
def test_another_version_is_to_be_built_again(copy: Path, version: object) -> None:
    sign_again(copy, lambda m: m.update(format_version=version))
    with pytest.raises(IndexFormatError, match=f"version 5, found {version!r}; build it again"):
        NominalIndex.load(copy)


def test_fingerprints_are_read_from_the_manifest(copy: Path, index: NominalIndex) -> None:
    assert fingerprint_of(copy) == index.fingerprint
    with pytest.raises(IndexFormatError, match="an index folder"):
        fingerprint_of(copy / "none")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("calibration.json", True),
        ("calibration.front_left.json", True),
        ("calibration.json.tmp", False),
        ("calibration.a.b.json", False),
        ("my_calibration.json", False),
    ],
)
def test_calibrations_are_known_by_name(copy: Path, name: str, expected: bool) -> None:
    assert is_calibration_file(name) == expected
    (copy / name).write_text("{}")
    if expected:
        NominalIndex.load(copy)
        refuse_existing(copy, force=True)
        return
    with pytest.raises(IndexFormatError, match="only files of the manifest"):
        NominalIndex.load(copy)
    with pytest.raises(ArtefactError, match=f"is not an index: {name}"):
        refuse_existing(copy, force=True)


@pytest.mark.parametrize(
    "forge",
    [
        lambda m: m["content"]["edits"][0].__setitem__(2, 3),
        lambda m: m["content"]["edits"][0].__setitem__(2, "2"),
        lambda m: m["content"]["edits"][0].append(1),
        lambda m: m["content"]["edits"].pop(),
        lambda m: m["content"]["retracted"].update(count=1),
        lambda m: m["written"]["edits"][0].update(note=1),
        lambda m: m["written"]["edits"][0].update(surplus=""),
    ],
)
def test_forged_edits_are_refused(copy: Path, forge: Callable[[dict[str, Any]], object]) -> None:
    sign_again(copy, forge)
    with pytest.raises(IndexFormatError):
        NominalIndex.load(copy)


@pytest.fixture(scope="module")
def saved_stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages; an entry of the third is retracted."""
    folder = tmp_path_factory.mktemp("stages") / "index"
    retract(build(stages=STAGES), {2: [1]}).save(folder)
    return folder


@pytest.fixture
def stages_copy(saved_stages: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_stages, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("manifest.json", damage) for damage in DAMAGES if damage != "link"),
        *((f"{name}.npy", "flipped") for name in ("embeddings", "entries", "centroids")),
        *(("lists.npy", damage) for damage in ("missing", "flipped at the end")),
        ("graph.hnsw", "truncated"),
        ("frames/000000.jpg", "missing"),
        ("retracted_embeddings.npy", "missing"),
        ("retracted_entries.npy", "flipped at the end"),
    ],
)
def test_damage_of_a_further_stage_is_noticed(stages_copy: Path, name: str, damage: str) -> None:
    DAMAGES[damage](stages_copy / "stage_2" / name)
    with pytest.raises(IndexFormatError, match=rf"{stages_copy}/stage_2.*{name}"):
        NominalIndex.load(stages_copy)


def test_a_further_stage_that_is_missing_or_in_excess_is_noticed(stages_copy: Path) -> None:
    kept = Path(shutil.copytree(stages_copy, stages_copy.parent / "kept"))
    for name in ("stage_3", "stage_0", "stage_1/stage_1"):
        shutil.copytree(kept / "stage_1", stages_copy / name)
        with pytest.raises(IndexFormatError, match="only files of the manifest, found stage_"):
            NominalIndex.load(stages_copy)
        shutil.rmtree(stages_copy / name)
    NominalIndex.load(stages_copy)
    (stages_copy / "stage_2" / "other.txt").write_bytes(b"1")
    with pytest.raises(IndexFormatError, match=r"stage_2.*only files of the manifest, found other"):
        NominalIndex.load(stages_copy)
    shutil.rmtree(stages_copy / "stage_2")
    with pytest.raises(IndexFormatError, match=r"stage_2': expected an index folder"):
        NominalIndex.load(stages_copy)
    (stages_copy / "stage_2").symlink_to(kept / "stage_2")
    with pytest.raises(IndexFormatError, match="a link"):
        NominalIndex.load(stages_copy)


def test_stages_that_were_swapped_are_noticed(stages_copy: Path) -> None:
    first, second = stages_copy / "stage_1", stages_copy / "stage_2"
    first.rename(stages_copy.parent / "moved")
    second.rename(first)
    (stages_copy.parent / "moved").rename(second)
    with pytest.raises(IndexFormatError, match="stage 1: expected fingerprint"):
        NominalIndex.load(stages_copy)


def forge_stage(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of stage 2, and make that of the index fit again."""
    sign_again(folder / "stage_2", change)
    fingerprint = json.loads((folder / "stage_2" / "manifest.json").read_text())["fingerprint"]
    sign_again(folder, lambda m: m["content"]["further"].__setitem__(1, fingerprint))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["content"]["roi"].update(ego_mask_sha256="1"), "stage 2 .*region of interest"),
        (lambda m: m["content"]["edits"][0].__setitem__(0, 7), "edits"),
        (lambda m: m["content"].update(weight=-0.5), "weight: expected"),
        (lambda m: m.update(format_version=1), "stage_2.*build it again"),
    ],
)
def test_forged_stages_are_refused(
    stages_copy: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    forge_stage(stages_copy, lambda m: None)
    NominalIndex.load(stages_copy)
    forge_stage(stages_copy, change)
    with pytest.raises((IndexFormatError, IndexMismatchError), match=message):
        NominalIndex.load(stages_copy)


def test_an_index_larger_than_memory_is_refused(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(format_module, "_read_content", lambda folder, _: read.append(folder.name))
    monkeypatch.setattr(format_module, "available_memory_bytes", lambda: 1000)
    with pytest.raises(IndexFormatError, match=r"expected \d+ bytes of memory .* 1000 bytes avail"):
        NominalIndex.load(copy)
    assert not read
