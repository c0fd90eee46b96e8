"""Parts of an index are saved, checked and edited with it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from worlds.nominal_world import DIM, IDENTITY, build, make_frames, unit

from semantic_anomaly.errors import ArtefactError, IndexFormatError, IndexMismatchError
from semantic_anomaly.index import edits as index_edits
from semantic_anomaly.index.build import NominalPlaces
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.offline import edit_index as edit_saving
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.settings import Settings

WHOLE = ImageRegion()


@pytest.fixture(scope="module")
def index() -> NominalIndex:
    return build()


def make_part(dim: int = 5, seed: int = 0) -> NominalIndex:
    random = np.random.default_rng(seed)
    frames = [
        NominalPlaces(
            frame, (6, 8), random.integers(0, 6, (3, 2)), unit(random.normal(size=(3, dim)))
        )
        for frame, _ in make_frames(4)
    ]
    identity = dataclasses.replace(IDENTITY, dim=dim)
    settings = Settings(dedup_distance=0.0)
    return NominalIndex.build(frames, identity=identity, region=WHOLE, settings=settings)


def test_parts_are_saved_checked_and_edited(index: NominalIndex, tmp_path: Path) -> None:
    folder, part = tmp_path / "index", make_part()
    whole = index.with_parts({"halves": part})
    assert whole.fingerprint != index.fingerprint and whole.count == index.count
    whole.save(folder)
    loaded = NominalIndex.load(folder)
    assert loaded.fingerprint == whole.fingerprint and list(loaded.parts) == ["halves"]
    found = loaded.parts["halves"]
    assert (found.count, found.dim, found.fingerprint) == (12, 5, part.fingerprint)
    found.configure_search("graph", 50)
    assert found.distances(part.content.embeddings, 1).max() < 1e-5
    edited = index_edits.retract(loaded, [0])
    edit_saving.save_edited(folder, loaded, edited)
    assert NominalIndex.load(folder).parts["halves"].count == 12
    smaller = edited.with_parts({"halves": index_edits.retract(found, [0, 1])})
    edit_saving.save_edited(folder, edited, smaller)
    assert NominalIndex.load(folder).parts["halves"].count == 10
    index.save(folder)
    assert not NominalIndex.load(folder).parts and not (folder / "halves").exists()


def test_parts_that_do_not_belong_are_refused(index: NominalIndex, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    index.with_parts({"halves": make_part()}).save(folder)
    kept = shutil.copytree(folder, tmp_path / "kept")
    make_part(seed=1).save(folder / "halves")
    with pytest.raises(IndexFormatError, match="part 'halves': expected fingerprint"):
        NominalIndex.load(folder)
    shutil.rmtree(folder / "halves")
    with pytest.raises(IndexFormatError, match="expected an index folder"):
        NominalIndex.load(folder)
    (folder / "halves").symlink_to(kept / "halves")
    with pytest.raises(IndexFormatError, match="a link"):
        NominalIndex.load(folder)
    make_part().save(kept / "other")
    with pytest.raises(IndexFormatError, match="only files of the manifest, found other"):
        NominalIndex.load(kept)


@pytest.mark.parametrize("name", ["frames", "", "../x", "A", "graph.hnsw"])
def test_part_names(index: NominalIndex, name: str) -> None:
    with pytest.raises(ArtefactError, match="name of lower-case"):
        index.with_parts({name: make_part()})


def test_parts_of_another_kind(index: NominalIndex) -> None:
    with pytest.raises(ArtefactError, match="no parts"):
        index.with_parts({"a": build(3).with_parts({"b": make_part()})})
    other = dataclasses.replace(IDENTITY, weights_sha256="3" * 64)
    frames, settings = make_frames(2), Settings(dedup_distance=0.0)
    strange = NominalIndex.build(frames, identity=other, region=WHOLE, settings=settings)
    with pytest.raises(IndexMismatchError, match="part 'a' of an index: weights_sha256"):
        index.with_parts({"a": strange})
    assert strange.dim == DIM
