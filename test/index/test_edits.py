"""Edits of an index and its stages: numbers, provenance, exact undo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from worlds.nominal_world import (
    COARSE,
    COARSE_GRID,
    GRID,
    LEFT_HALF,
    PATCHES,
    POOLED,
    STAGES,
    build,
    make_frames,
    patches,
)

from semantic_anomaly.errors import IndexMismatchError, InputError
from semantic_anomaly.index import edits as index_edits
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.structures import Frame, PatchGrid

WHOLE = RegionOfInterest()


def added(index: NominalIndex, count: int = 2, seed: int = 7) -> NominalIndex:
    frames = make_frames(count, seed, [stage.stage for stage in index.stages])
    return index_edits.add_nominal(index, frames, roi=WHOLE, source="new", note="why")[0]


@pytest.fixture(scope="module")
def index() -> NominalIndex:
    return build()


@pytest.fixture(scope="module")
def staged() -> NominalIndex:
    return build(stages=STAGES)


def test_retracted_entries_explain_nothing_any_more(index: NominalIndex, tmp_path: Path) -> None:
    query = index.content.embeddings[5:6]
    edited = index_edits.retract(index, {0: [5, 9]}, note="a cow")
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
    edited = index_edits.retract(index_edits.retract(index, {0: [3]}), {0: [7]})
    row = index_edits.rows_of(edited.content, [8])[0]
    np.testing.assert_array_equal(edited.content.embeddings[row], index.content.embeddings[8])
    with pytest.raises(InputError, match="entry 7: it is retracted already, by edit 2"):
        index_edits.retract(edited, {0: [7]})


def test_added_frames_are_nominal_and_bring_their_pictures(index: NominalIndex) -> None:
    edited = added(index)
    queries = patches(2, seed=7)
    assert edited.exact_distances(queries, 1).max() <= 0.05 + 1e-6
    assert index.exact_distances(queries, 1).max() > 0.05
    [edit] = edited.edits
    assert (edit.kind, edit.frames, edit.source) == ("add", 2, "new")
    assert edit.entries == edited.count - index.count
    assert len(edited.content.frames) == len(index.content.frames) + 2
    with pytest.raises(InputError, match="expected new embeddings"):
        added(edited)


def test_undoing_returns_everything_exactly(index: NominalIndex, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for trial in range(3):
        states, edited = [index], index
        for step in range(4):
            if random.random() < 0.5:
                numbers = random.choice(edited.content.numbers, 5, replace=False).tolist()
                edited = index_edits.retract(edited, {0: numbers})
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
    edited = added(added(index_edits.retract(index, {0: [1, 2, 4]}), 1, 11), 1, 12)
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
    edited = index_edits.retract(edited, {0: [edited.count - 1]})
    with pytest.raises(InputError, match="edit 1 cannot be undone while edit 2"):
        index_edits.undo(edited, 1)
    edited, _ = index_edits.undo(index_edits.undo(edited)[0])
    assert edited.fingerprint == index.fingerprint


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ({}, "at least one"),
        ({0: [], 1: []}, "at least one"),
        ({0: [-1]}, "from 0 to"),
        ({0: [1], 1: [10**6]}, "entry 1000000"),
        ({3: [1]}, "stage 3: expected 0 to 2"),
        ({-1: [1]}, "stage -1: expected 0 to 2"),
        ({0: range(1000)}, "entry .*: expected a number"),
    ],
)
def test_entries_that_cannot_be_retracted(
    staged: NominalIndex, numbers: Mapping[int, Sequence[int]], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        index_edits.retract(staged, numbers)


def test_some_entries_of_each_stage_stay(staged: NominalIndex) -> None:
    for stage, index in enumerate(staged.stages):
        with pytest.raises(InputError, match=f"some entries of stage {stage} to stay"):
            index_edits.retract(staged, {stage: range(index.count)})
        last = index_edits.retract(staged, {stage: range(1, index.count)})
        assert last.stages[stage].count == 1


def test_what_else_is_refused(index: NominalIndex) -> None:
    with pytest.raises(InputError, match="found none"):
        index_edits.undo(index)
    with pytest.raises(InputError, match=r"edits \[1\], found 9"):
        index_edits.undo(index_edits.retract(index, {0: [0]}), 9)
    with pytest.raises(InputError, match="room"):
        added(build(max_entries=20))
    with pytest.raises(IndexMismatchError, match="region of interest"):
        added(build(roi=LEFT_HALF))
    full = index_edits.retract(build(max_entries=50), {0: [0]})
    with pytest.raises(InputError, match="undo an addition first"):
        index_edits.undo(added(full), 1)


def test_neighbours_and_frames_name_entries(index: NominalIndex) -> None:
    near = index_edits.near(index, 4, 0.3)
    embeddings = index.content.embeddings
    assert near == np.flatnonzero(embeddings @ embeddings[4] >= 0.7 - 1e-6).tolist()
    assert index_edits.near(index, 4, 0.0) == [4]
    of_frame = index_edits.of_frame(index, "drive/002")
    assert of_frame == {0: np.flatnonzero(index.content.entries[:, 0] == 2).tolist()}
    for distance in (-0.1, 2.1, float("nan")):
        with pytest.raises(InputError, match="expected a number in"):
            index_edits.near(index, 4, distance)
    with pytest.raises(InputError, match="unknown frame"):
        index_edits.of_frame(index, "drive/999")
    with pytest.raises(InputError, match="2 frames have this name"):
        index_edits.of_frame(added(index), "drive/000")


def test_frames_may_be_added_in_a_smaller_region(index: NominalIndex) -> None:
    edited, report = index_edits.add_nominal(index, make_frames(1, 7), roi=LEFT_HALF, source="new")
    assert report.seen == GRID[0] * GRID[1] // 2
    assert edited.content.entries[index.count :, 2].max() < GRID[1] // 2
    assert edited.roi_description == index.roi_description


def test_edits_of_several_stages_are_one_edit(staged: NominalIndex, tmp_path: Path) -> None:
    edited = index_edits.retract(staged, {0: [5, 9], 2: [1]}, note="a cow")
    changes = [new.count - old.count for new, old in zip(edited.stages, staged.stages, strict=True)]
    assert changes == [-2, 0, -1]
    [edit] = edited.edits
    assert (edit.number, edit.entries, edit.note) == (1, 3, "a cow")
    assert [stage.content.edits[0].entries for stage in edited.stages] == [2, 0, 1]
    gone = staged.stages[2].content.embeddings[1:2]
    assert edited.stages[2].exact_distances(gone, 1)[0] > 0.01
    grown = added(edited)
    for new, old in zip(grown.stages, edited.stages, strict=True):
        assert new.count > old.count and new.content.frames[-1].name == "drive/001"
    assert [(e.number, e.kind, e.frames) for e in grown.edits] == [(1, "retract", 0), (2, "add", 2)]
    total = sum(stage.count for stage in grown.stages) - sum(s.count for s in edited.stages)
    assert grown.edits[1].entries == total
    for stage in grown.stages:
        assert [(e.when, e.source) for e in stage.content.edits] == [
            (e.when, e.source) for e in grown.edits
        ]
    grown.save(tmp_path / "index")
    loaded = NominalIndex.load(tmp_path / "index")
    assert loaded.edits == grown.edits and loaded.fingerprint == grown.fingerprint
    loaded.configure_search("graph", 200)
    for of_stage, expected in zip(loaded.stages, grown.stages, strict=True):
        queries = expected.content.embeddings[:20]
        assert of_stage.distances(queries, 1).max() < 1e-5
    back, edit = index_edits.undo(loaded)
    assert edit == grown.edits[1] and back.fingerprint == edited.fingerprint
    assert index_edits.undo(back)[0].fingerprint == staged.fingerprint


def test_undoing_returns_every_stage_exactly(staged: NominalIndex) -> None:
    random = np.random.default_rng(1)
    states, edited = [staged], staged
    for step in range(5):
        if step % 2:
            edited = added(edited, 1, 100 + step)
        else:
            chosen = {
                stage: random.choice(index.content.numbers, 3, replace=False).tolist()
                for stage, index in enumerate(edited.stages)
                if stage != step // 2
            }
            edited = index_edits.retract(edited, chosen)
        states.append(edited)
    # In the middle first: the later edits stay.
    middle, _ = index_edits.undo(edited, 3)
    assert [edit.number for edit in middle.edits] == [1, 2, 4, 5]
    for before in reversed(states[:-1]):
        edited, _ = index_edits.undo(edited)
        assert edited.fingerprint == before.fingerprint
        for new, old in zip(edited.stages, before.stages, strict=True):
            np.testing.assert_array_equal(new.content.embeddings, old.content.embeddings)
            np.testing.assert_array_equal(new.content.entries, old.content.entries)


def rearranged(seed: int) -> tuple[Frame, PatchGrid]:
    """A frame of which every patch is in the first nominal frame, its instances in none."""
    frame, grid = next(make_frames(1, stages=(PATCHES, POOLED)))
    order = np.random.default_rng(seed).permutation(GRID[0] * GRID[1])
    features = grid.features.reshape(len(order), -1)[order].reshape(grid.features.shape)
    first, pooled = (replace(each, features=features, further=()) for each in grid.stages)
    return Frame(frame.image, name="rearranged"), replace(first, further=(pooled,))


def test_an_addition_may_bring_nothing_to_a_stage() -> None:
    index = build(stages=(PATCHES, POOLED))
    grown, report = index_edits.add_nominal(index, [rearranged(0)], roi=WHOLE, source="new")
    counts = [new.count - old.count for new, old in zip(grown.stages, index.stages, strict=True)]
    assert counts[0] == 0 < counts[1] == report.stored
    assert [(e.entries, e.frames) for stage in grown.stages for e in stage.content.edits] == [
        (0, 0),
        (counts[1], 1),
    ]
    assert (grown.edits[0].entries, grown.edits[0].frames) == (counts[1], 1)
    assert index_edits.of_frame(grown, "rearranged") == {
        1: list(range(index.stages[1].count, grown.stages[1].count))
    }
    later = added(grown, 1, 12)
    assert index_edits.undo(index_edits.undo(later, 1)[0])[0].fingerprint == index.fingerprint


def test_neighbours_and_frames_name_entries_of_each_stage(staged: NominalIndex) -> None:
    of_frame = index_edits.of_frame(staged, "drive/002")
    assert [*of_frame] == [0, 1, 2]
    for stage, index in enumerate(staged.stages):
        frames = [frame.name for frame in index.content.frames]
        rows = index.content.entries[:, 0] == frames.index("drive/002")
        assert of_frame[stage] == np.flatnonzero(rows).tolist()
        embeddings = index.content.embeddings
        near = index_edits.near(index_edits.stage_of(staged, stage), 4, 0.3)
        assert near == np.flatnonzero(embeddings @ embeddings[4] >= 0.7 - 1e-6).tolist()
    with pytest.raises(InputError, match="stage 3: expected 0 to 2"):
        index_edits.stage_of(staged, 3)
    with pytest.raises(InputError, match="2 frames have this name"):
        index_edits.of_frame(added(staged), "drive/000")
    # Numbers stay when entries of other stages go.
    edited = index_edits.retract(staged, {0: of_frame[0], 1: of_frame[1][:1]})
    later = index_edits.of_frame(edited, "drive/002")
    assert later == {0: [], 1: of_frame[1][1:], 2: of_frame[2]}


def test_the_stage_that_is_full_is_named() -> None:
    # The coarse stage has fewer entries, and room.
    index = build(1, stages=(PATCHES, COARSE), max_entries=COARSE_GRID[0] * COARSE_GRID[1] + 1)
    assert [stage.count for stage in index.stages] == [13, 12]
    with pytest.raises(InputError, match="stage 0: expected room for more than 13"):
        added(index)
    room = index_edits.retract(index, {0: [0, 1], 1: [0]})
    full = added(room)
    assert [stage.count for stage in full.stages] == [13, 13]
    with pytest.raises(InputError, match="undo an addition first"):
        index_edits.undo(full, 1)
    back, _ = index_edits.undo(index_edits.undo(full)[0])
    assert back.fingerprint == index.fingerprint


def test_an_addition_waits_for_entries_of_any_stage(staged: NominalIndex) -> None:
    grown = added(staged)
    for stage, index in enumerate(grown.stages):
        blocked = index_edits.retract(grown, {stage: [index.count - 1]})
        with pytest.raises(InputError, match="edit 1 cannot be undone while edit 2"):
            index_edits.undo(blocked, 1)


def test_frames_of_other_stages_cannot_be_added(staged: NominalIndex, index: NominalIndex) -> None:
    for own, stages in ((staged, (PATCHES,)), (index, STAGES)):
        with pytest.raises(IndexMismatchError, match="stages: expected"):
            index_edits.add_nominal(own, make_frames(1, 7, stages), roi=WHOLE, source="new")
