"""Edits of an index: provenance, exact undo, calibrations that are carried over, parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from worlds.nominal_world import build, make_frames, patches

from semantic_anomaly.errors import IndexFormatError, IndexMismatchError, InputError
from semantic_anomaly.index import edits as entry_numbers
from semantic_anomaly.index import edits as index_edits
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.storage import canonical_json, sha256_bytes

WHOLE = ImageRegion()


def added(index: NominalIndex, count: int = 2, seed: int = 7) -> NominalIndex:
    frames = make_frames(count, seed)
    return index_edits.add_nominal(index, frames, region=WHOLE, source="new", note="why")[0]


@pytest.fixture(scope="module")
def index() -> NominalIndex:
    return build()


def test_retracted_entries_explain_nothing_any_more(index: NominalIndex, tmp_path: Path) -> None:
    query = index.content.embeddings[5:6]
    edited = index_edits.retract(index, [5, 9], note="a cow")
    assert edited.count == index.count - 2 and edited.fingerprint != index.fingerprint
    assert edited.exact_distances(query, 1)[0] > 0.01 > index.exact_distances(query, 1)[0]
    [edit] = edited.edits
    assert (edit.number, edit.kind, edit.entries, edit.note) == (1, "retract", 2, "a cow")
    assert edit.when.endswith("+00:00") and edit.what == "retract 2 entries"
    edited.save(tmp_path / "index")
    loaded = NominalIndex.load(tmp_path / "index")
    assert loaded.edits == edited.edits and loaded.fingerprint == edited.fingerprint
    loaded.configure_search("graph", 200)
    np.testing.assert_allclose(
        loaded.distances(query, 1), edited.exact_distances(query, 1), atol=1e-5
    )


def test_numbers_stay_while_entries_go(index: NominalIndex) -> None:
    edited = index_edits.retract(index_edits.retract(index, [3]), [7])
    row = entry_numbers.rows_of(edited.content, [8])[0]
    np.testing.assert_array_equal(edited.content.embeddings[row], index.content.embeddings[8])
    with pytest.raises(InputError, match="entry 7: it is taken out already, by edit 2"):
        index_edits.retract(edited, [7])


def test_added_frames_are_nominal_and_bring_their_pictures(index: NominalIndex) -> None:
    edited = added(index)
    queries = patches(2, seed=7)
    assert edited.exact_distances(queries, 1).max() <= 0.05 + 1e-6
    assert index.exact_distances(queries, 1).max() > 0.05
    [edit] = edited.edits
    assert (edit.kind, edit.frames, edit.source) == ("add", 2, "new")
    assert edit.entries == edited.count - index.count
    assert len(edited.content.frames) == len(index.content.frames) + 2
    with pytest.raises(InputError, match="expected new patches"):
        added(edited)


def test_undoing_returns_everything_exactly(index: NominalIndex, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for trial in range(6):
        states, edited = [index], index
        for step in range(4):
            if random.random() < 0.5:
                numbers = random.choice(edited.content.numbers, 5, replace=False).tolist()
                edited = index_edits.retract(edited, numbers)
            else:
                edited = added(edited, 1, 100 * trial + step + 1)
            states.append(edited)
        for before in reversed(states[:-1]):
            edited, _ = index_edits.undo(edited)
            assert edited.fingerprint == before.fingerprint
            np.testing.assert_array_equal(edited.content.embeddings, before.content.embeddings)
    index.save(tmp_path / "a")
    edited.save(tmp_path / "b")
    for name in ("graph.hnsw", "embeddings.npy", "entries.npy"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_edits_are_undone_in_any_order(index: NominalIndex) -> None:
    edited = added(added(index_edits.retract(index, [1, 2, 4]), 1, 11), 1, 12)
    last = edited.content.entries[-1].copy()
    edited, edit = index_edits.undo(edited, 2)
    assert edit.number == 2 and [e.number for e in edited.edits] == [1, 3]
    assert (
        edited.content.frames[-1].name == "drive/000"
        and edited.content.entries[-1][0] == last[0] - 1
    )
    edited, _ = index_edits.undo(edited, 1)
    assert edited.fingerprint != index.fingerprint
    edited, _ = index_edits.undo(edited)
    assert edited.fingerprint == index.fingerprint


def test_an_addition_that_was_retracted_from_waits(index: NominalIndex) -> None:
    edited = added(index, 1)
    edited = index_edits.retract(edited, [edited.count - 1])
    with pytest.raises(InputError, match="edit 1 cannot be undone while edit 2"):
        index_edits.undo(edited, 1)
    edited, _ = index_edits.undo(index_edits.undo(edited)[0])
    assert edited.fingerprint == index.fingerprint


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [([], "at least one"), ([-1], "from 0 to"), ([10**6], "entry 1000000"), (None, "to stay")],
)
def test_entries_that_cannot_be_retracted(
    index: NominalIndex, numbers: list[int] | None, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        index_edits.retract(index, range(index.count) if numbers is None else numbers)


def test_what_else_is_refused(index: NominalIndex) -> None:
    with pytest.raises(InputError, match="found none"):
        index_edits.undo(index)
    with pytest.raises(InputError, match=r"edits \[1\], found 9"):
        index_edits.undo(index_edits.retract(index, [0]), 9)
    with pytest.raises(InputError, match="room"):
        added(build(max_entries=20))
    half = ImageRegion(((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0)))
    with pytest.raises(IndexMismatchError, match="polygon"):
        index_edits.add_nominal(index, make_frames(1, 7), region=half, source="")
    full = index_edits.retract(build(max_entries=50), [0])
    with pytest.raises(InputError, match="undo an addition first"):
        index_edits.undo(added(full), 1)


def test_neighbours_and_frames_name_entries(index: NominalIndex) -> None:
    found = entry_numbers.near(index, 4, 0.3)
    embeddings = index.content.embeddings
    assert found == np.flatnonzero(embeddings @ embeddings[4] >= 0.7 - 1e-6).tolist()
    assert entry_numbers.near(index, 4, 0.0) == [4]
    of_frame = entry_numbers.of_frame(index, "drive/002")
    assert of_frame == np.flatnonzero(index.content.entries[:, 0] == 2).tolist()
    with pytest.raises(InputError, match="unknown frame"):
        entry_numbers.of_frame(index, "drive/999")


FILES = ("retracted_embeddings.npy", "retracted_entries.npy")


@pytest.mark.parametrize("name", FILES)
def test_damage_to_what_was_retracted_is_noticed(
    index: NominalIndex, name: str, tmp_path: Path
) -> None:
    index_edits.retract(index, [1, 5]).save(tmp_path / "index")
    file = tmp_path / "index" / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(IndexFormatError, match=name):
        NominalIndex.load(tmp_path / "index")
    file.unlink()
    with pytest.raises(IndexFormatError, match=name):
        NominalIndex.load(tmp_path / "index")


@pytest.mark.parametrize(
    "forge",
    [
        lambda c: c["edits"][0].__setitem__(0, 0),
        lambda c: c["edits"][0].__setitem__(1, "other"),
        lambda c: c["edits"][0].__setitem__(2, 3),
        lambda c: c["edits"][1].__setitem__(2, 100_000),
        lambda c: c["edits"][1].__setitem__(3, 100_000),
        lambda c: c["edits"].reverse(),
        lambda c: c["edits"].pop(),
        lambda c: c["retracted"].update(count=1),
    ],
)
def test_forged_edits_are_refused(index: NominalIndex, forge: object, tmp_path: Path) -> None:
    added(index_edits.retract(index, [1, 5])).save(tmp_path / "index")
    path = tmp_path / "index" / "manifest.json"
    manifest = json.loads(path.read_text())
    forge(manifest["content"])  # type: ignore[operator]
    del manifest["sha256"]
    manifest["fingerprint"] = sha256_bytes(canonical_json(manifest["content"]).encode())
    manifest["sha256"] = sha256_bytes(canonical_json(manifest).encode())
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    with pytest.raises(IndexFormatError):
        NominalIndex.load(tmp_path / "index")


def test_indexes_of_version_1_are_read(index: NominalIndex, tmp_path: Path) -> None:
    index.save(tmp_path / "index")
    path = tmp_path / "index" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"], manifest["written"]["edits"]
    manifest["format_version"] = 1
    manifest["sha256"] = sha256_bytes(canonical_json(manifest).encode())
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    assert NominalIndex.load(tmp_path / "index").fingerprint == index.fingerprint
