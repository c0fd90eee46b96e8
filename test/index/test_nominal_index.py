"""What an index answers, what it is compared with, and how it is saved."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds.files import file_size_limit
from worlds.nominal_world import (
    COARSE,
    COARSE_DIM,
    DIM,
    GRID,
    LEFT_HALF,
    PATCHES,
    POOLED,
    SEGMENTER,
    STAGES,
    build,
    make_frames,
    patches,
    weighted,
)

from semantic_anomaly.embedding.identity import StageIdentity
from semantic_anomaly.errors import (
    ArtefactError,
    IndexMismatchError,
    ModelOutputError,
)
from semantic_anomaly.index import hnsw, nominal_index
from semantic_anomaly.index.content import RecordedSource
from semantic_anomaly.index.edits import add_nominal, retract
from semantic_anomaly.index.hnsw import HnswGraph
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.images import encode_png
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.settings import Settings
from semantic_anomaly.stages import StageSpec
from semantic_anomaly.structures import Frame


@pytest.fixture(scope="module")
def index() -> NominalIndex:
    return build()


@pytest.fixture(scope="module")
def staged() -> NominalIndex:
    return build(stages=STAGES)


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
        stages=(PATCHES,),
        roi=RegionOfInterest(),
        settings=Settings(dedup_distance=0.0),
    )
    thumbnail = index.thumbnail("large")
    assert thumbnail is not None and thumbnail.shape == (180, 320, 3)


def changed(stage: StageIdentity, **changes: Any) -> StageIdentity:
    return dataclasses.replace(stage, embedder=dataclasses.replace(stage.embedder, **changes))


def test_another_embedder_is_refused(index: NominalIndex, staged: NominalIndex) -> None:
    index.check_embedder([changed(PATCHES, model_id="moved", dtype="bfloat16")])
    with pytest.raises(
        IndexMismatchError, match=r"layer of the embedder: expected 3, found 2; use"
    ):
        index.check_embedder([changed(PATCHES, layer=2)])
    staged.check_embedder([weighted(stage, 7.0) for stage in STAGES])
    for number, stage in enumerate(STAGES):
        stages = [*STAGES[:number], changed(stage, weights_sha256="3" * 64), *STAGES[number + 1 :]]
        what = re.escape(f", stage {number} ({stage.name}): weights_sha256 of the embedder")
        with pytest.raises(IndexMismatchError, match=f"{what}: expected 0+"):
            staged.check_embedder(stages)
    with pytest.raises(IndexMismatchError, match="average of the embedder: expected 3, found 1"):
        staged.check_embedder([PATCHES, changed(COARSE, average=1), POOLED])
    for own, stages in ((index, [*STAGES]), (staged, [*STAGES[:2]])):
        message = f"stages of the embedder: expected {len(own.stages)}, found {len(stages)}"
        with pytest.raises(IndexMismatchError, match=message):
            own.check_embedder(stages)


def test_another_segmenter_is_refused(index: NominalIndex, staged: NominalIndex) -> None:
    def segmented(**changes: str) -> StageIdentity:
        segmenter = dataclasses.replace(SEGMENTER, **changes)
        return dataclasses.replace(POOLED, segmenter=segmenter)

    staged.check_embedder([*STAGES[:2], segmented(model_id="moved")])
    message = r"stage 2 .*segmenter: expected tokens a+, found tokens b+"
    with pytest.raises(IndexMismatchError, match=message):
        staged.check_embedder([*STAGES[:2], segmented(digest="b" * 64)])
    with pytest.raises(IndexMismatchError, match=r"segmenter: expected tokens a+, found none"):
        staged.check_embedder([*STAGES[:2], PATCHES])
    with pytest.raises(IndexMismatchError, match=r"segmenter: expected none, found tokens a+"):
        index.check_embedder([POOLED])


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


def test_the_settings_that_an_index_fixes(staged: NominalIndex, tmp_path: Path) -> None:
    texts = (
        "tiny layer=3 size=112",
        "tiny layer=2 size=56 average=3 weight=2",
        "tiny layer=3 size=112 kind=instances weight=0.5",
    )
    expected = {"stages": texts, "place_weight": 0.0, "segmenter": "tokens", "segmenter_model": ""}
    assert staged.fixed_settings == expected
    staged.save(tmp_path / "stages")
    assert NominalIndex.load(tmp_path / "stages").fixed_settings == expected
    assert Settings(**expected).stage_specs == tuple(stage.spec for stage in STAGES)
    # The hidden state is that of the embedder where the settings leave it open.
    chosen = dataclasses.replace(PATCHES, spec=StageSpec("~/my models/tiny", None, 112))
    built = build(stages=(chosen,), segmenter_model="unused")
    assert built.fingerprint == build().fingerprint
    retract(built, {0: [0]}).save(tmp_path / "index")
    fixed = NominalIndex.load(tmp_path / "index").fixed_settings
    assert fixed == {"stages": ("~/my models/tiny layer=3 size=112",), "place_weight": 0.0}


def test_what_was_saved_is_what_is_loaded(index: NominalIndex, saved: Path, tmp_path: Path) -> None:
    loaded = NominalIndex.load(saved)
    assert loaded.fingerprint == index.fingerprint
    assert (loaded.stage, loaded.report) == (index.stage, index.report)
    assert loaded.stages == (loaded,)
    assert (loaded.count, loaded.dim, loaded.camera) == (index.count, DIM, "camera")
    assert loaded.frame_names == index.frame_names
    assert loaded.roi_description == RegionOfInterest().describe()
    assert loaded.content.sources == index.content.sources == (RecordedSource("drive"),)
    assert json.loads((saved / "manifest.json").read_text()) == loaded.manifest
    queries = patches(2, seed=3)
    np.testing.assert_array_equal(
        loaded.exact_distances(queries, 2), index.exact_distances(queries, 2)
    )
    loaded.save(tmp_path / "other")
    assert NominalIndex.load(tmp_path / "other").fingerprint == loaded.fingerprint


# Torch takes 'cpu:0' for the CPU; the package takes it for a GPU.
@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
@pytest.mark.parametrize("mode", ["auto", "exact", "lists", "graph"])
@pytest.mark.parametrize("k", [1, 4])
def test_distances_are_those_of_the_plain_product(
    saved: Path, mode: str, k: int, device: str
) -> None:
    index = NominalIndex.load(saved)
    index.configure_search(mode, 200, device)
    assert (index._on_device is not None) == (device != "cpu" and mode in ("auto", "exact"))
    assert index.search_is_exact == (mode in ("auto", "exact"))
    assert (index._graph is None) == (mode != "graph"), "the graph is read if it is needed"
    queries = patches(2, seed=5)
    products = np.sort(queries @ index.content.embeddings.T, axis=1)[:, -k:]
    distances = index.distances(queries, k)
    assert distances.dtype == np.float32 and distances.shape == (len(queries),)
    expected = 1 - products.mean(axis=1)
    if mode != "lists":
        np.testing.assert_allclose(distances, expected, atol=1e-5)
    assert (distances >= expected - 1e-6).all()
    for bounds in (None, distances):
        np.testing.assert_allclose(index.exact_distances(queries, k, bounds), expected, atol=1e-5)


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
    large.configure_search("auto", 10, "cpu:0")
    assert large.search_is_exact


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
    distances, exact = index.distances(queries, 3), index.exact_distances(queries, 3)
    np.testing.assert_allclose(distances, exact, atol=1e-6)


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
    names = ("graph.hnsw", "embeddings.npy", "entries.npy", "lists.npy", "centroids.npy")
    written = sum((tmp_path / "index" / name).stat().st_size for name in names)
    assert NominalIndex.predicted_bytes(index.count, DIM) == pytest.approx(written, rel=0.02)


def test_an_index_is_replaced_only_by_force(copy: Path) -> None:
    loaded = NominalIndex.load(copy)
    edited, _ = add_nominal(
        retract(loaded, {0: [0]}), make_frames(1, 7), roi=RegionOfInterest(), source=""
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


def test_all_stages_are_saved_loaded_and_replaced(staged: NominalIndex, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    staged.save(folder)
    assert sorted(p.name for p in folder.glob("stage_*")) == ["stage_1", "stage_2"]
    loaded = NominalIndex.load(folder)
    assert loaded.fingerprint == staged.fingerprint
    assert [stage.stage for stage in loaded.stages] == [*STAGES]
    assert [stage.dim for stage in loaded.stages] == [DIM, COARSE_DIM, DIM]
    assert loaded.frame_names == staged.frame_names
    for found, expected in zip(loaded.stages, staged.stages, strict=True):
        assert found.fingerprint == expected.fingerprint and found.manifest == expected.manifest
        np.testing.assert_array_equal(found.content.embeddings, expected.content.embeddings)
        np.testing.assert_array_equal(found.content.entries, expected.content.entries)
    # Saved over itself, with a stage less, and as one stage: nothing of the others is left.
    smaller = retract(loaded, {1: [0, 1]})
    smaller.save(folder, force=True)
    counts = [stage.count for stage in NominalIndex.load(folder).stages]
    assert counts == [staged.count, staged.stages[1].count - 2, staged.stages[2].count]
    build(stages=STAGES[:2]).save(folder, force=True)
    assert len(NominalIndex.load(folder).stages) == 2 and not (folder / "stage_2").exists()
    build().save(folder, force=True)
    assert len(NominalIndex.load(folder).stages) == 1 and not (folder / "stage_1").exists()


def test_the_search_is_chosen_for_each_stage_by_its_size(
    staged: NominalIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged.save(tmp_path / "index")
    loaded = NominalIndex.load(tmp_path / "index")
    sizes = [stage.content.embeddings.size for stage in loaded.stages]
    monkeypatch.setattr(nominal_index, "_AUTO_EXACT_UP_TO", sizes[1])
    assert sizes[1] < min(sizes[0], sizes[2])
    loaded.configure_search("auto", 50)
    assert [stage.search_is_exact for stage in loaded.stages] == [False, True, False]
    assert [stage._partitioned is None for stage in loaded.stages] == [False, True, False]
    loaded.configure_search("graph", 50)
    assert not any(stage.search_is_exact for stage in loaded.stages)
    for stage in loaded.stages:
        queries = stage.content.embeddings[:30]
        assert stage.distances(queries, 1).max() < 1e-5
        assert stage.recall(20, 1)["ef"] == 50


def test_thumbnails_and_names_of_all_stages(staged: NominalIndex) -> None:
    # Only the last stage brings a frame that the others have already.
    frame, grid = next(make_frames(1, stages=(PATCHES, POOLED)))
    order = np.random.default_rng(0).permutation(GRID[0] * GRID[1])
    mixed = grid.features.reshape(-1, DIM)[order].reshape(grid.features.shape)
    first, pooled = (dataclasses.replace(g, features=mixed, further=()) for g in grid.stages)
    added = dataclasses.replace(frame, name="mixed"), dataclasses.replace(first, further=(pooled,))
    grown, _ = add_nominal(
        build(stages=(PATCHES, POOLED)), [added], roi=RegionOfInterest(), source=""
    )
    assert "mixed" not in [f.name for f in grown.content.frames]
    assert grown.frame_names[-1] == "mixed"
    thumbnail = grown.thumbnail("mixed")
    assert thumbnail is not None and thumbnail.shape == (60, 80, 3)


def test_stages_that_do_not_belong_together_are_refused(staged: NominalIndex) -> None:
    contents = [stage.content for stage in staged.stages]
    again = NominalIndex.of_stages(contents, [None] * 3)
    assert again.fingerprint == staged.fingerprint
    others = {
        "region of interest": build(roi=LEFT_HALF).content,
        "edits": retract(build(), {0: [1]}).content,
    }
    for name, other in others.items():
        with pytest.raises(IndexMismatchError, match=f"stage 1 of an index: {name}"):
            NominalIndex.of_stages([contents[0], other], [None] * 2)


def test_a_disk_that_fills_up_at_a_further_stage_is_noticed(tmp_path: Path) -> None:
    index = build(20, stages=(COARSE, PATCHES), dedup_distance=0.0)
    index.save(tmp_path / "whole")
    sizes = [
        max(path.stat().st_size for path in folder.iterdir())
        for folder in (tmp_path / "whole", tmp_path / "whole" / "stage_1")
    ]
    assert 2 * sizes[0] < sizes[1]
    with file_size_limit(2 * sizes[0]), pytest.raises(ArtefactError, match="cannot write"):
        index.save(tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
