"""Edits of an index and its instances: numbers, provenance, exact undo."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from worlds.nominal_world import GRID, LEFT_HALF, SEGMENTER, build, make_frames, patches

from semantic_anomaly.errors import IndexMismatchError, InputError, ModelOutputError
from semantic_anomaly.index import edits as index_edits
from semantic_anomaly.index.build import INSTANCES
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.structures import Frame, PatchGrid

WHOLE = RegionOfInterest()


def added(index: NominalIndex, count: int = 2, seed: int = 7) -> NominalIndex:
    frames = make_frames(count, seed)
    return index_edits.add_nominal(index, frames, roi=WHOLE, source="new", note="why")[0]


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
    row = index_edits.rows_of(edited.content, [8])[0]
    np.testing.assert_array_equal(edited.content.embeddings[row], index.content.embeddings[8])
    with pytest.raises(InputError, match="entry 7: it is retracted already, by edit 2"):
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
    for trial in range(3):
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
    assert edited.content.frames[-1].name == "drive/000"
    assert edited.content.entries[-1][0] == last[0] - 1
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
    with pytest.raises(IndexMismatchError, match="region of interest"):
        added(build(roi=LEFT_HALF))
    full = index_edits.retract(build(max_entries=50), [0])
    with pytest.raises(InputError, match="undo an addition first"):
        index_edits.undo(added(full), 1)


def test_neighbours_and_frames_name_entries(index: NominalIndex) -> None:
    near = index_edits.near(index, 4, 0.3)
    embeddings = index.content.embeddings
    assert near == np.flatnonzero(embeddings @ embeddings[4] >= 0.7 - 1e-6).tolist()
    assert index_edits.near(index, 4, 0.0) == [4]
    of_frame = index_edits.of_frame(index, "drive/002")
    assert of_frame == np.flatnonzero(index.content.entries[:, 0] == 2).tolist()
    with pytest.raises(InputError, match="unknown frame"):
        index_edits.of_frame(index, "drive/999")
    with pytest.raises(InputError, match="2 frames have this name"):
        index_edits.of_frame(added(index), "drive/000")


def test_frames_may_be_added_in_a_smaller_region(index: NominalIndex) -> None:
    edited, report = index_edits.add_nominal(index, make_frames(1, 7), roi=LEFT_HALF, source="new")
    assert report.seen == GRID[0] * GRID[1] // 2
    assert edited.content.entries[index.count :, 2].max() < GRID[1] // 2
    assert edited.roi_description == index.roi_description


@pytest.fixture(scope="module")
def segmented() -> NominalIndex:
    return build(segmenter=SEGMENTER)


def test_added_frames_reach_the_instances_and_leave_with_the_edit(
    segmented: NominalIndex, tmp_path: Path
) -> None:
    grown = added(segmented)
    part, before = grown.parts[INSTANCES], segmented.parts[INSTANCES]
    assert part.count > before.count and grown.count > segmented.count
    assert [(e.when, e.source) for e in part.edits] == [(e.when, e.source) for e in grown.edits]
    grown.save(tmp_path / "index")
    loaded = NominalIndex.load(tmp_path / "index")
    assert loaded.parts[INSTANCES].edits == part.edits
    assert index_edits.undo(loaded)[0].fingerprint == segmented.fingerprint
    with pytest.raises(InputError, match="expected new patches"):
        added(grown)
    bare = [(f, dataclasses.replace(g, instances=None)) for f, g in make_frames(1, 7)]
    with pytest.raises(ModelOutputError, match="segmented"):
        index_edits.add_nominal(segmented, bare, roi=WHOLE, source="new")


def test_two_additions_are_undone_one_by_one(segmented: NominalIndex) -> None:
    states = [segmented]
    for seed in (11, 12):
        states.append(added(states[-1], 1, seed))
    # The part has edits of its own, so that numbers differ.
    part = index_edits.retract(states[-1].parts[INSTANCES], [0])
    states.append(states[-1].with_parts({INSTANCES: part}))
    edited, _ = index_edits.undo(added(states[-1], 1, 13), 3)
    assert edited.fingerprint == states[-1].fingerprint
    edited = edited.with_parts({INSTANCES: index_edits.undo(edited.parts[INSTANCES])[0]})
    for expected in (states[1], states[0]):
        edited, _ = index_edits.undo(edited)
        assert edited.fingerprint == expected.fingerprint


def rearranged(seed: int) -> tuple[Frame, PatchGrid]:
    """A frame of which every patch is in the first nominal frame, its instances in none."""
    frame, grid = next(make_frames(1))
    order = np.random.default_rng(seed).permutation(GRID[0] * GRID[1])
    features = grid.features.reshape(len(order), -1)[order].reshape(grid.features.shape)
    return Frame(frame.image, name="rearranged"), dataclasses.replace(grid, features=features)


def test_a_new_arrangement_of_known_patches_can_be_added(segmented: NominalIndex) -> None:
    grown, report = index_edits.add_nominal(segmented, [rearranged(0)], roi=WHOLE, source="new")
    assert report.stored == 0 and grown.count == segmented.count and not grown.edits
    part = grown.parts[INSTANCES]
    assert part.count > segmented.parts[INSTANCES].count
    assert [e.kind for e in part.edits] == ["add"]
    back = grown.with_parts({INSTANCES: index_edits.undo(part)[0]})
    assert back.fingerprint == segmented.fingerprint


def test_the_part_that_is_full_is_named(segmented: NominalIndex) -> None:
    part = segmented.parts[INSTANCES]
    limits = {**part.content.limits, "max_entries": part.count}
    full = part.with_content(dataclasses.replace(part.content, limits=limits))
    with pytest.raises(InputError, match="part 'instances' of the index: expected room"):
        added(segmented.with_parts({INSTANCES: full}))


def test_undoing_names_the_part_that_stands_in_the_way(segmented: NominalIndex) -> None:
    grown = added(segmented)
    part = grown.parts[INSTANCES]
    blocked = grown.with_parts({INSTANCES: index_edits.retract(part, [part.count - 1])})
    with pytest.raises(InputError, match="part 'instances': undo: edit 1 cannot be undone while"):
        index_edits.undo(blocked)
