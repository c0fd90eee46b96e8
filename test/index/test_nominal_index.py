"""What an index answers, what it is compared with, and how it is saved."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from worlds.files import file_size_limit
from worlds.nominal_world import (
    DIM,
    IDENTITY,
    LEFT_HALF,
    SEGMENTER,
    build,
    make_frames,
    patches,
)

from semantic_anomaly.errors import (
    ArtefactError,
    IndexFormatError,
    IndexMismatchError,
    ModelOutputError,
)
from semantic_anomaly.index import hnsw, nominal_index
from semantic_anomaly.index.build import INSTANCES
from semantic_anomaly.index.edits import add_nominal, retract
from semantic_anomaly.index.hnsw import HnswGraph
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.images import encode_png
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame


@pytest.fixture(scope="module")
def index() -> NominalIndex:
    return build()


@pytest.fixture(scope="module")
def segmented() -> NominalIndex:
    return build(segmenter=SEGMENTER, variant="combined")


@pytest.fixture(scope="module")
def saved(index: NominalIndex, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "index"
    index.save(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_thumbnails_show_the_frames_and_are_small(saved: Path) -> None:
    index = NominalIndex.load(saved)
    frame, grid = next(make_frames(1))
    thumbnail = index.thumbnail(frame.name)
    assert thumbnail is not None and thumbnail.shape == (60, 80, 3)
    # Noise survives JPEG roughly; another frame's noise would be uncorrelated.
    assert np.corrcoef(thumbnail.ravel(), frame.image.ravel())[0, 1] > 0.5
    assert index.thumbnail("drive/999") is None
    large = Frame(np.zeros((900, 1600, 3), np.uint8), name="large")
    index = NominalIndex.build(
        [(large, dataclasses.replace(grid, image_hw=(900, 1600)))],
        identity=IDENTITY,
        roi=RegionOfInterest(),
        settings=Settings(dedup_distance=0.0),
    )
    thumbnail = index.thumbnail("large")
    assert thumbnail is not None and thumbnail.shape == (180, 320, 3)


def test_another_embedder_is_refused(index: NominalIndex) -> None:
    index.check_embedder(dataclasses.replace(IDENTITY, model_id="moved", dtype="bfloat16"))
    with pytest.raises(IndexMismatchError, match=r"layers.*expected \(3,\), found \(2,\); use the"):
        index.check_embedder(dataclasses.replace(IDENTITY, layers=(2,)))


def test_another_segmenter_is_refused(index: NominalIndex, segmented: NominalIndex) -> None:
    assert (index.segmenter, segmented.segmenter) == (None, SEGMENTER)
    for built in (index, segmented):
        built.check_segmenter(None)
    segmented.check_segmenter(dataclasses.replace(SEGMENTER, model_id="moved"))
    with pytest.raises(IndexMismatchError, match="instances: expected a part of them, found none"):
        index.check_segmenter(SEGMENTER)
    with pytest.raises(IndexMismatchError, match=r"segmenter: expected tokens a+, found tokens b+"):
        segmented.check_segmenter(dataclasses.replace(SEGMENTER, digest="b" * 64))


def test_the_region_of_interest_may_be_a_part_of_the_index_s_own(index: NominalIndex) -> None:
    quarter = RegionOfInterest(((0.1, 0.1), (0.4, 0.1), (0.4, 0.6), (0.1, 0.6)))
    bonnet = np.zeros((4, 4, 3), np.uint8)
    bonnet[3] = 255
    mask = encode_png(bonnet)
    for roi in (RegionOfInterest(), LEFT_HALF, RegionOfInterest(ego_mask_png=mask)):
        index.check_roi(roi)
    half = build(roi=dataclasses.replace(LEFT_HALF, ego_mask_png=mask))
    for roi in (LEFT_HALF, quarter):
        half.check_roi(dataclasses.replace(roi, ego_mask_png=mask))
        with pytest.raises(
            IndexMismatchError, match=r"ego mask: expected [0-9a-f]{64}, found none"
        ):
            half.check_roi(roi)
    right = RegionOfInterest(((0.4, 0.0), (0.7, 0.0), (0.7, 1.0)), mask)
    for roi in (right, RegionOfInterest(ego_mask_png=mask)):
        with pytest.raises(
            IndexMismatchError, match="region of interest: expected a part of the index's own"
        ):
            half.check_roi(roi)


def test_the_settings_that_an_index_fixes(segmented: NominalIndex, tmp_path: Path) -> None:
    expected = {
        "backbone": "tiny",
        "layers": (3,),
        "input_size": 112,
        "place_weight": 0.0,
        "variant": "combined",
    }
    assert segmented.fixed_settings == {**expected, "segmenter": "tokens", "segmenter_model": ""}
    chosen = build(backbone="~/models/tiny")
    assert chosen.fingerprint == build().fingerprint
    edited = retract(chosen, [0])
    edited.save(tmp_path / "index")
    fixed = NominalIndex.load(tmp_path / "index").fixed_settings
    assert fixed == {**expected, "backbone": "~/models/tiny", "variant": "grid"}


def test_what_was_saved_is_what_is_loaded(index: NominalIndex, saved: Path, tmp_path: Path) -> None:
    loaded = NominalIndex.load(saved)
    assert loaded.fingerprint == index.fingerprint
    assert (loaded.identity, loaded.report) == (index.identity, index.report)
    assert (loaded.count, loaded.dim, loaded.camera) == (index.count, DIM, "camera")
    assert loaded.frame_names == index.frame_names
    assert loaded.roi_description == RegionOfInterest().describe()
    assert loaded.manifest["written"]["source"] == ["drive"]
    assert json.loads((saved / "manifest.json").read_text()) == loaded.manifest
    queries = patches(2, seed=3)
    np.testing.assert_array_equal(
        loaded.exact_distances(queries, 2), index.exact_distances(queries, 2)
    )
    loaded.save(tmp_path / "other")
    assert NominalIndex.load(tmp_path / "other").fingerprint == loaded.fingerprint


@pytest.mark.parametrize("mode", ["auto", "exact", "graph"])
@pytest.mark.parametrize("k", [1, 4])
def test_distances_are_those_of_the_plain_product(saved: Path, mode: str, k: int) -> None:
    index = NominalIndex.load(saved)
    index.configure_search(mode, 200)
    assert index.search_is_exact == (mode != "graph")
    assert (index._graph is None) == index.search_is_exact, "the graph is read if it is needed"
    queries = patches(2, seed=5)
    products = np.sort(queries @ index.content.embeddings.T, axis=1)[:, -k:]
    distances = index.distances(queries, k)
    assert distances.dtype == np.float32 and distances.shape == (len(queries),)
    np.testing.assert_allclose(distances, 1 - products.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(index.exact_distances(queries, k), distances, atol=1e-5)


def test_large_indexes_use_the_graph_by_themselves(
    index: NominalIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nominal_index, "_AUTO_EXACT_UP_TO", index.count * DIM - 1)
    large = NominalIndex(index.content)
    assert not large.search_is_exact
    large.configure_search("exact", 10)
    assert large.search_is_exact
    large.configure_search("auto", 10)
    assert not large.search_is_exact


@pytest.fixture
def thin_graph(monkeypatch: pytest.MonkeyPatch) -> NominalIndex:
    """An index whose graph is so thin that its search misses much."""
    monkeypatch.setattr(hnsw, "M", 2)
    monkeypatch.setattr(hnsw, "EF_CONSTRUCTION", 8)
    index = build(dedup_distance=0.0)
    index.configure_search("graph", 1)
    return index


def test_a_graph_search_gives_upper_bounds(thin_graph: NominalIndex) -> None:
    queries = patches(4, seed=5)
    exact, bounds = thin_graph.exact_distances(queries, 1), thin_graph.distances(queries, 1)
    assert (bounds >= exact - 1e-5).all()
    assert (bounds > exact + 0.01).sum() > 50, "the graph must be thin for this to show anything"


def test_recall_tells_a_thin_graph_from_a_good_one(
    thin_graph: NominalIndex, index: NominalIndex
) -> None:
    queries = patches(2, seed=5)
    index.configure_search("auto", 200)
    good, thin = index.recall(queries, 3), thin_graph.recall(queries, 3)
    assert good["recall"] > 0.99 and abs(good["mean_error"]) < 1e-4
    assert thin["recall"] < 0.9 and thin["max_error"] > 0.1
    assert (good["queries"], good["k"], good["ef"]) == (len(queries), 3, 200)
    assert index.recall(50, 1)["queries"] == 50


def test_a_graph_in_pieces_is_replaced_by_the_product(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_pieces(graph: HnswGraph, queries: np.ndarray, k: int, ef: int) -> np.ndarray:
        raise RuntimeError("fewer than k")

    monkeypatch.setattr(HnswGraph, "similarities", in_pieces)
    index = NominalIndex.load(copy)
    index.configure_search("graph", 10)
    queries = patches(1, seed=5)
    np.testing.assert_array_equal(index.distances(queries, 3), index.exact_distances(queries, 3))


@pytest.mark.parametrize(
    ("queries", "k", "error"),
    [
        (np.eye(3, DIM - 1, dtype=np.float32), 1, IndexMismatchError),
        (np.eye(1, DIM, dtype=np.float32)[0], 1, IndexMismatchError),
        (np.eye(3, DIM, dtype=np.float32), 0, IndexMismatchError),
        (np.eye(3, DIM, dtype=np.float32), 100_000, IndexMismatchError),
        (np.full((2, DIM), np.nan, np.float32), 1, ModelOutputError),
        (np.full((2, DIM), np.inf, np.float32), 1, ModelOutputError),
        (np.zeros((2, DIM), np.float32), 1, ModelOutputError),
    ],
)
@pytest.mark.parametrize("search", ["exact", "graph"])
def test_queries_that_hnswlib_would_take_are_refused(
    index: NominalIndex, queries: np.ndarray, k: int, error: type[Exception], search: str
) -> None:
    index.configure_search(search, 10)
    with pytest.raises(error):
        index.distances(queries, k)


def test_size_is_predicted(tmp_path: Path) -> None:
    index = build(20, dedup_distance=0.0)
    index.save(tmp_path / "index")
    files = [tmp_path / "index" / n for n in ("graph.hnsw", "embeddings.npy", "entries.npy")]
    written = sum(file.stat().st_size for file in files)
    assert NominalIndex.predicted_bytes(index.count, DIM) == pytest.approx(written, rel=0.02)


def test_an_index_is_replaced_only_by_force(copy: Path) -> None:
    loaded = NominalIndex.load(copy)
    edited, _ = add_nominal(
        retract(loaded, [0]), make_frames(1, 7), roi=RegionOfInterest(), source=""
    )
    edited.save(copy, force=True)
    for name in ("calibration.json", "calibration.front.json"):
        (copy / name).write_text("{}")
    (copy / ".calibration.json.tmp").write_text("left by an interrupted write")
    lost = f"with {edited.count} entries of 9 frames, 2 calibrations and 2 edits; pass --force"
    with pytest.raises(ArtefactError, match=lost):
        build(3).save(copy)
    assert NominalIndex.load(copy).fingerprint == edited.fingerprint
    build(3).save(copy, force=True)
    assert NominalIndex.load(copy).frame_names == ("drive/000", "drive/001", "drive/002")
    assert not (copy / "calibration.json").exists()
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]
    NominalIndex.load(copy).save(copy)


def test_a_damaged_index_is_replaced_by_force(copy: Path, index: NominalIndex) -> None:
    (copy / "manifest.json").write_text("{")
    (copy / "graph.hnsw").unlink()
    with pytest.raises(ArtefactError, match="exists and cannot be read; pass --force"):
        build().save(copy)
    build().save(copy, force=True)
    assert NominalIndex.load(copy).fingerprint == index.fingerprint


def test_saving_replaces_nothing_else(tmp_path: Path, index: NominalIndex) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "frames_only" / "frames").mkdir(parents=True)
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("photos", "frames_only", "file", "link"):
        with pytest.raises(ArtefactError, match=name):
            index.save(tmp_path / name, force=True)
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"
    build().save(tmp_path / "empty")
    assert NominalIndex.load(tmp_path / "empty").count == index.count


@pytest.mark.parametrize("limit", [0, 20_000, 40_000])
def test_a_full_disk_is_noticed_and_leaves_the_old_index(copy: Path, limit: int) -> None:
    before = NominalIndex.load(copy).fingerprint
    larger = build(12)
    for folder in (copy, copy.parent / "new"):
        with file_size_limit(limit), pytest.raises(ArtefactError, match="cannot write"):
            larger.save(folder, force=True)
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]
    assert NominalIndex.load(copy).fingerprint == before


def test_a_graph_cut_short_is_noticed_even_if_everything_else_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build()
    save = HnswGraph.save

    def cut(graph: HnswGraph, path: Path) -> None:
        # On a full disk hnswlib writes less, and raises nothing.
        save(graph, path)
        os.truncate(path, index.count * 100)

    monkeypatch.setattr(HnswGraph, "save", cut)
    with pytest.raises(ArtefactError, match=r"cannot write.*graph\.hnsw"):
        index.save(tmp_path / "index")
    assert not list(tmp_path.iterdir())


def test_parts_are_saved_checked_and_edited(segmented: NominalIndex, tmp_path: Path) -> None:
    folder, bare = tmp_path / "index", build()
    assert segmented.fingerprint != bare.fingerprint and segmented.count == bare.count
    segmented.save(folder)
    loaded = NominalIndex.load(folder)
    assert loaded.fingerprint == segmented.fingerprint and list(loaded.parts) == [INSTANCES]
    part = loaded.parts[INSTANCES]
    assert part.fingerprint == segmented.parts[INSTANCES].fingerprint
    part.configure_search("graph", 50)
    assert part.distances(part.content.embeddings, 1).max() < 1e-5
    smaller = retract(loaded, [0]).with_parts({INSTANCES: retract(part, [0, 1])})
    smaller.save(folder, force=True)
    assert NominalIndex.load(folder).parts[INSTANCES].count == part.count - 2
    bare.save(folder, force=True)
    assert not NominalIndex.load(folder).parts and not (folder / INSTANCES).exists()


def test_parts_in_the_folder_that_do_not_belong_are_refused(
    segmented: NominalIndex, tmp_path: Path
) -> None:
    folder = tmp_path / "index"
    segmented.save(folder)
    kept = shutil.copytree(folder, tmp_path / "kept")
    build(5, segmenter=SEGMENTER).parts[INSTANCES].save(folder / INSTANCES, force=True)
    with pytest.raises(IndexFormatError, match="part 'instances': expected fingerprint"):
        NominalIndex.load(folder)
    shutil.rmtree(folder / INSTANCES)
    with pytest.raises(IndexFormatError, match="expected an index folder"):
        NominalIndex.load(folder)
    (folder / INSTANCES).symlink_to(kept / INSTANCES)
    with pytest.raises(IndexFormatError, match="a link"):
        NominalIndex.load(folder)
    build().save(kept / "other")
    with pytest.raises(IndexFormatError, match="only files of the manifest, found other"):
        NominalIndex.load(kept)


def test_parts_that_do_not_belong_are_refused(index: NominalIndex, segmented: NominalIndex) -> None:
    part = segmented.parts[INSTANCES]
    for name, other in (("frames", part), (INSTANCES, index), (INSTANCES, segmented)):
        with pytest.raises(ArtefactError, match=f"part '{name}' of an index: expected 'instances'"):
            index.with_parts({name: other})
    content = dataclasses.replace(
        part.content, identity=dataclasses.replace(IDENTITY, weights_sha256="3" * 64)
    )
    with pytest.raises(IndexMismatchError, match="part 'instances' of an index: weights_sha256"):
        index.with_parts({INSTANCES: part.with_content(content)})
    with pytest.raises(IndexMismatchError, match="region of interest"):
        build(roi=LEFT_HALF).with_parts({INSTANCES: part})
