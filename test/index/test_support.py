"""Entries know the recordings that support them, and an index can do without one of these."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from worlds.nominal_world import (
    COARSE,
    DIM,
    PATCHES,
    POOLED,
    build_of_drives,
    make_frames,
    patches,
    recorded,
    unit,
)

from semantic_anomaly.embedding.identity import StageIdentity
from semantic_anomaly.errors import ArtefactError
from semantic_anomaly.index import build as index_build
from semantic_anomaly.index import edits as index_edits
from semantic_anomaly.index.content import IndexContent, Support
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame, PatchGrid

WHOLE = RegionOfInterest()
DRIVES = {"a": 1, "b": 2, "c": 3}


@pytest.fixture(scope="module")
def index() -> NominalIndex:
    return build_of_drives(DRIVES)


def directions(*angles_deg: float) -> np.ndarray:
    """Return (n, DIM) unit vectors in one plane."""
    points = np.zeros((len(angles_deg), DIM), np.float32)
    points[:, 0] = np.cos(np.radians(angles_deg))
    points[:, 1] = np.sin(np.radians(angles_deg))
    return unit(points)


def in_plane(recording: str, *angles_deg: float) -> tuple[Frame, PatchGrid]:
    """Return a frame of a recording with a row of patches of these directions."""
    features = directions(*angles_deg)[None]
    image = np.zeros((20, 20 * len(angles_deg), 3), np.uint8)
    return Frame(image, name=f"{recording}/0", recording=recording), PatchGrid(features, (20, 20))


def by_hand(frames: Mapping[str, tuple[float, ...]]) -> NominalIndex:
    """Return the index of frames whose patches 5 degrees apart are near-duplicates."""
    return NominalIndex.build(
        (in_plane(recording, *angles_deg) for recording, angles_deg in frames.items()),
        stages=(PATCHES,),
        roi=WHOLE,
        settings=Settings(dedup_distance=float(1.0 - np.cos(np.radians(5.5)))),
    )


def supporters(content: IndexContent) -> dict[int, list[str]]:
    """Return the recordings besides its own that support each entry, by its number."""
    names: dict[int, list[str]] = {}
    for number, recording, _ in content.support.rows.tolist():
        names.setdefault(number, []).append(content.support.recordings[recording])
    return names


def test_an_entry_is_supported_by_the_recordings_whose_patches_it_suppressed() -> None:
    index = by_hand({"a": (0, 4, 40, 80), "b": (2, 44, 120), "c": (41, 41.5, 160)})
    content = index.content
    # 4 is suppressed by 0 of its own recording; entries are 0, 40, 80, 120 and 160 degrees.
    np.testing.assert_allclose(content.embeddings, directions(0, 40, 80, 120, 160), atol=1e-6)
    assert supporters(content) == {0: ["b"], 1: ["b", "c"]}
    assert index.recordings == content.recordings == ("a", "b", "c")
    for recording, kept in {"a": (0, 40, 120, 160), "b": (0, 40, 80, 160)}.items():
        without = index.without(recording)
        np.testing.assert_allclose(without.content.embeddings, directions(*kept), atol=1e-6)
    assert index.without("other").count == index.count


def test_a_patch_supports_the_nearest_of_the_entries() -> None:
    index = by_hand({"a": (0, 10), "b": (5.4, 90)})
    assert supporters(index.content) == {1: ["b"]}


def test_parts_of_one_recording_do_not_support_each_other() -> None:
    frames = [in_plane("a", 0, 40), in_plane("a", 1, 80), in_plane("b", 120, 160)]
    index = NominalIndex.build(
        frames, stages=(PATCHES,), roi=WHOLE, settings=Settings(dedup_distance=0.005)
    )
    assert not len(index.content.support.rows) and not index.content.support.recordings
    assert index.without("a").count == 2


@pytest.mark.parametrize("exact_up_to", [10**6, 10])
@pytest.mark.parametrize("stages", [(PATCHES,), (PATCHES, COARSE, POOLED)])
def test_without_a_drive_an_index_is_that_of_the_others_up_to_dedup_distance(
    monkeypatch: pytest.MonkeyPatch, stages: tuple[StageIdentity, ...], exact_up_to: int
) -> None:
    monkeypatch.setattr(index_build, "_EXACT_UP_TO", exact_up_to)
    dedup = 0.15
    index = build_of_drives(DRIVES, stages=stages, dedup_distance=dedup)
    for left_out in DRIVES:
        others = {name: seed for name, seed in DRIVES.items() if name != left_out}
        without = index.without(left_out)
        rebuilt = build_of_drives(others, stages=stages, dedup_distance=dedup)
        # Nearest entries that the graph missed only add entries.
        for kept, expected, whole in zip(without.stages, rebuilt.stages, index.stages, strict=True):
            stored = expected.content.embeddings
            assert kept.exact_distances(stored, 1).max() <= dedup + 1e-5
            # And each is an entry of the others, or near a patch of theirs.
            assert expected.exact_distances(kept.content.embeddings, 1).max() <= 2 * dedup
            assert 0 < kept.count < whole.count
        seen = np.concatenate([patches(4, seed) for seed in others.values()])
        assert without.exact_distances(seen, 1).max() <= dedup + 1e-5
        own = patches(4, DRIVES[left_out])
        gone = whole_only(index, left_out)
        assert len(gone) and (without.exact_distances(gone, 1) > 1e-4).all()
        assert without.exact_distances(own, 1).max() > dedup


def whole_only(index: NominalIndex, recording: str) -> np.ndarray:
    """Return the embeddings of entries of a recording that no other supports."""
    content = index.content
    own = [content.frames[frame].recording == recording for frame in content.entries[:, 0]]
    supported = supporters(content)
    return content.embeddings[[o and n not in supported for n, o in enumerate(own)]]


def test_searches_agree_without_a_drive(index: NominalIndex) -> None:
    without = index.without("b")
    queries = patches(4, DRIVES["b"])
    expected = 1.0 - (queries @ without.content.embeddings.T).max(axis=1)
    np.testing.assert_allclose(without.exact_distances(queries, 1), expected, atol=1e-5)
    for search in ("lists", "graph"):
        without.configure_search(search, 200)
        bounds = without.distances(queries, 1)
        assert (bounds >= expected - 1e-5).all()
        np.testing.assert_allclose(without.exact_distances(queries, 1, bounds), expected, atol=1e-5)
    assert index.count > without.count, "the index itself is unchanged"


def test_an_index_of_one_drive_cannot_do_without_it() -> None:
    index = build_of_drives({"a": 1})
    with pytest.raises(ArtefactError, match=r"stage '.*': expected entries of other .* than 'a'"):
        index.without("a")


def test_support_is_saved_and_loaded(index: NominalIndex, tmp_path: Path) -> None:
    assert len(index.content.support.rows) and index.content.support.recordings
    index.save(tmp_path / "index")
    loaded = NominalIndex.load(tmp_path / "index")
    assert loaded.fingerprint == index.fingerprint and loaded.recordings == index.recordings
    assert loaded.content.support.recordings == index.content.support.recordings
    np.testing.assert_array_equal(loaded.content.support.rows, index.content.support.rows)
    assert loaded.content.sources == index.content.sources
    np.testing.assert_array_equal(
        loaded.without("b").content.embeddings, index.without("b").content.embeddings
    )


def added(index: NominalIndex, recording: str, seed: int) -> NominalIndex:
    frames = recorded(make_frames(2, seed, [stage.stage for stage in index.stages]), recording)
    return index_edits.add_nominal(index, frames, roi=WHOLE, source="new")[0]


@pytest.mark.parametrize("stages", [(PATCHES,), (PATCHES, COARSE, POOLED)])
def test_added_frames_support_entries_until_they_are_undone(
    stages: tuple[StageIdentity, ...], tmp_path: Path
) -> None:
    index = build_of_drives(DRIVES, stages=stages)
    grown = added(index, "d", 4)
    assert "d" in grown.recordings and "d" in grown.content.support.recordings
    assert grown.fingerprint != index.fingerprint
    # What was added is of a drive of its own, and covers itself when others are left out.
    seen = patches(2, 4)
    assert grown.without("a").exact_distances(seen, 1).max() <= 0.15 + 1e-5
    assert grown.without("d").exact_distances(seen, 1).max() > 0.15
    assert grown.without("d").count == index.count
    grown.save(tmp_path / "index")
    loaded = NominalIndex.load(tmp_path / "index")
    for number in (None, 1):
        undone, _ = index_edits.undo(loaded, number)
        assert undone.fingerprint == index.fingerprint
        np.testing.assert_array_equal(undone.content.support.rows, index.content.support.rows)
        assert undone.recordings == index.recordings


def test_frames_without_a_recording_are_of_their_source(index: NominalIndex) -> None:
    grown, _ = index_edits.add_nominal(index, make_frames(2, 4), roi=WHOLE, source="road")
    assert "road" in grown.recordings
    assert {frame.recording for frame in grown.content.frames[-2:]} == {"road"}


def test_support_follows_the_numbers_of_retracted_entries(index: NominalIndex) -> None:
    supported = supporters(index.content)
    [*_, last] = supported
    edited = index_edits.retract(index, {0: [0, 1, 2]})
    assert supporters(edited.content) == supported, "numbers stay"
    row = index_edits.rows_of(edited.content, [last])[0]
    recording = edited.content.frames[edited.content.entries[row, 0]].recording
    without = edited.without(recording)
    distance = without.exact_distances(index.content.embeddings[last : last + 1], 1)[0]
    assert distance <= 1e-5, "still supported by others"
    assert index_edits.undo(edited)[0].fingerprint == index.fingerprint
    # An addition after it: its entries and those that it supports are named by number.
    grown = added(edited, "d", 4)
    assert supporters(grown.content).keys() >= supported.keys()
    assert grown.without("a").exact_distances(patches(2, 4), 1).max() <= 0.15 + 1e-5
    first, _ = index_edits.undo(grown, 1)
    assert supporters(first.content) == supporters(grown.content)
    assert index_edits.undo(first)[0].fingerprint == index.fingerprint


def test_an_edit_keeps_its_support_when_another_is_undone() -> None:
    index = by_hand({"a": (0, 40, 80), "b": (120, 160)})
    grown = index
    for angle in (200, 240):
        frames = [in_plane("c", 41, angle)]
        grown, _ = index_edits.add_nominal(grown, frames, roi=WHOLE, source="c")
    assert set(map(tuple, grown.content.support.rows.tolist())) == {(1, 0, 1), (1, 0, 2)}
    for number in (1, 2):
        undone, _ = index_edits.undo(grown, number)
        assert supporters(undone.content) == {1: ["c"]}
        assert undone.without("a").exact_distances(directions(41), 1)[0] < 0.001
    undone, _ = index_edits.undo(undone, 1)
    assert undone.fingerprint == index.fingerprint


def test_support_of_entries_that_an_edit_brought_goes_with_them() -> None:
    index = by_hand({"a": (0, 40)})
    for recording, angles_deg in (("b", (80, 120)), ("c", (81, 160)), ("d", (161, 200))):
        frames = [in_plane(recording, *angles_deg)]
        index, _ = index_edits.add_nominal(index, frames, roi=WHOLE, source=recording)
    # Numbers 2 and 3 of b, 4 of c, 5 of d.
    assert supporters(index.content) == {2: ["c"], 4: ["d"]}
    undone, _ = index_edits.undo(index, 1)
    assert supporters(undone.content) == {2: ["d"]}
    np.testing.assert_allclose(undone.content.embeddings[2:], directions(160, 200), atol=1e-6)


def test_support_has_one_form() -> None:
    rows = {"b": np.array([4, 1]), "a": np.array([4]), "unused": np.array([], int)}
    support = Support.of(rows)
    assert support.recordings == ("a", "b")
    assert support.rows.tolist() == [[1, 1, 0], [4, 0, 0], [4, 1, 0]]
    assert support.rows.dtype == np.int32 and support.rows.flags.c_contiguous
    other = Support.of({"a": np.array([4]), "b": np.array([1, 4])})
    np.testing.assert_array_equal(other.rows, support.rows)
    assert support.by_others("b").tolist() == [4] and support.by_others("a").tolist() == [1, 4]
    grown = support.with_added({"b": np.array([4, 6]), "c": np.array([1])}, 1)
    assert grown.recordings == ("a", "b", "c")
    assert grown.rows.tolist() == [[1, 1, 0], [1, 2, 1], [4, 0, 0], [4, 1, 0], [6, 1, 1]]
    undone = grown.without_addition(1, 7, 2)
    assert undone.recordings == support.recordings
    np.testing.assert_array_equal(undone.rows, support.rows)
