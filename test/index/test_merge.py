"""Merged indexes: everything is covered, supported and edited as in the parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from worlds.nominal_world import (
    PATCHES,
    STAGES,
    build_of_drives,
    make_frames,
    recorded,
    unit,
)

from semantic_anomaly.errors import IndexMismatchError
from semantic_anomaly.index import build as index_build
from semantic_anomaly.index.build import BuildReport, FrameEmbeddings
from semantic_anomaly.index.content import FailedSource
from semantic_anomaly.index.edits import add_nominal, retract, undo
from semantic_anomaly.index.merge import check_conditions, merge
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.index.partition import Partition, nearest_in_lists
from semantic_anomaly.index.search import nearest_entries
from semantic_anomaly.roi import RegionOfInterest

DISTANCE = 0.15
DRIVES = {"a": 1, "b": 2, "c": 3, "d": 4}
WHOLE = RegionOfInterest()


def merged(*parts: NominalIndex, **more: object) -> NominalIndex:
    count = sum(part.count for part in parts)
    options = {"max_entries": 500_000, "dedup_distances": [DISTANCE] * len(parts[0].stages)}
    return merge(parts, **{"count": count, **options, **more})  # type: ignore[arg-type]


def farthest(index: NominalIndex, stage: int, recording: str, seed: int) -> float:
    """Return the largest distance of the patches of a drive to the entries of a stage."""
    stages = [s.stage for s in index.stages]
    frames = recorded(make_frames(4, seed, stages), recording)
    embeddings = [FrameEmbeddings.of(frame, stage, WHOLE).embeddings for frame in frames]
    return float(index.stages[stage].exact_distances(np.concatenate(embeddings), 1).max())


@pytest.fixture(scope="module")
def parts() -> list[NominalIndex]:
    return [build_of_drives({name: seed}, stages=STAGES) for name, seed in DRIVES.items()]


@pytest.mark.parametrize("exact_up_to", [20_000, 50])
def test_every_patch_is_covered_and_every_recording_supports_its_own(
    parts: list[NominalIndex], exact_up_to: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_build, "_EXACT_UP_TO", exact_up_to)
    together = build_of_drives(DRIVES, stages=STAGES)
    index = merged(*parts)
    tree = merged(merged(*parts[:2]), merged(*parts[2:]))
    for found in (index, tree):
        assert set(found.recordings) == set(DRIVES)
        for stage, at_once in enumerate(together.stages):
            count, total = found.stages[stage].count, sum(p.stages[stage].count for p in parts)
            assert at_once.count <= count < total, "near-duplicates are suppressed"
            report = found.stages[stage].report
            assert report.stored == count and report.seen == at_once.report.seen
            assert report.seen == report.stored + report.suppressed
            for name, seed in DRIVES.items():
                assert farthest(found, stage, name, seed) <= DISTANCE + 1e-5
                # What the others have shown is covered without a recording, too.
                others = found.without(name)
                for other in DRIVES.keys() - {name}:
                    assert farthest(others, stage, other, DRIVES[other]) <= DISTANCE + 1e-5


def test_one_part_more_than_once_adds_nothing_but_support() -> None:
    one, two = build_of_drives({"a": 1}), build_of_drives({"b": 1})
    index = merged(one, two)
    # The radius of an entry counts too: only entries that are equal are certainly covered.
    np.testing.assert_array_equal(index.content.embeddings, one.content.embeddings)
    assert index.without("a").count == index.without("b").count == one.count
    assert index.content.support.recordings == ("b",)
    assert len(index.content.frames) == len(one.content.frames)
    expected = BuildReport(8, 2 * one.report.seen, one.count, index.report.suppressed, 0)
    assert index.report == expected


def test_an_entry_is_suppressed_only_with_all_that_it_covers() -> None:
    def part(name: str, *angles_deg: float) -> NominalIndex:
        from semantic_anomaly.settings import Settings
        from semantic_anomaly.structures import Frame, PatchGrid

        points = np.zeros((1, len(angles_deg), 16), np.float32)
        points[0, :, 0] = np.cos(np.radians(angles_deg))
        points[0, :, 1] = np.sin(np.radians(angles_deg))
        image = np.zeros((20, 20 * len(angles_deg), 3), np.uint8)
        frame = Frame(image, name=f"{name}/0", recording=name)
        distance = float(1 - np.cos(np.radians(10)))
        return NominalIndex.build(
            [(frame, PatchGrid(unit(points), (20, 20 * len(angles_deg))))],
            stages=(PATCHES,),
            roi=WHOLE,
            settings=Settings(dedup_distance=distance),
        )

    distance = float(1 - np.cos(np.radians(10)))
    # 50 covers 58: not within 10 degrees of 46. 100 covers 102: within 10 degrees of 95.
    one, two = part("a", 46, 95), part("b", 50, 58, 100, 102)
    index = merged(one, two, dedup_distances=[distance])
    degrees = np.degrees(np.arccos(index.content.embeddings[:, 0]))
    np.testing.assert_allclose(degrees, [46, 95, 50], atol=1e-3)
    radii = np.degrees(np.arccos(1 - index.content.radii))
    np.testing.assert_allclose(radii, [0, 7, 8], atol=0.05)
    # 46 has a near-duplicate in b, and so has 95, which stands for 100.
    assert sorted(index.content.support.rows[:, 0].tolist()) == [0, 1]
    assert index.without("a").count == 3 and index.without("b").count == 2


def test_edits_are_kept_renumbered_and_undone_one_by_one(tmp_path: Path) -> None:
    one = retract(build_of_drives({"a": 1}, stages=STAGES), {0: [1, 5], 2: [0]}, note="a cow")
    one, _ = add_nominal(one, make_frames(2, 11, STAGES), roi=WHOLE, source="x")
    two, _ = add_nominal(
        build_of_drives({"b": 2}, stages=STAGES), make_frames(2, 12, STAGES), roi=WHOLE, source="y"
    )
    two = retract(two, {0: [two.count - 1], 1: [2]}, note="a sofa")
    index = merged(one, two, build_of_drives({"c": 3}, stages=STAGES))
    index.save(tmp_path / "index")
    index = NominalIndex.load(tmp_path / "index")
    what = [(edit.number, edit.kind, edit.note or edit.source) for edit in index.edits]
    expected = [(1, "retract", "a cow"), (2, "add", "x"), (3, "add", "y"), (4, "retract", "a sofa")]
    assert what == expected
    assert set(index.recordings) == {"a", "b", "c", "x", "y"}
    retracted = one.content.retracted
    assert retracted is not None and index.content.retracted is not None
    np.testing.assert_array_equal(index.content.retracted.embeddings[:2], retracted.embeddings)
    count = index.count
    for number, more in ((4, 1), (1, 2)):
        index, _ = undo(index, number)
        assert index.count == count + more
        count = index.count
    for number in (2, 3):
        index, _ = undo(index, number)
    assert not index.edits and index.recordings == ("a", "b", "c")
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        assert farthest(index, 0, name, seed) <= DISTANCE + 1e-5
    index.save(tmp_path / "again")


def test_parts_and_failed_sources_are_named_in_the_manifest(
    parts: list[NominalIndex], tmp_path: Path
) -> None:
    failed = FailedSource("e", "cut off")
    tree = merged(merged(*parts[:2], failed=[failed]), merged(*parts[2:]))
    tree.save(tmp_path / "index")
    content = NominalIndex.load(tmp_path / "index").content
    assert [part.fingerprint for part in content.parts] == [part.fingerprint for part in parts]
    assert [part.sources for part in content.parts] == [("a",), ("b",), ("c",), ("d",)]
    assert content.failed == (failed,)
    assert [source.name for source in content.sources] == list(DRIVES)


def test_a_full_index_drops_and_counts() -> None:
    one, two = build_of_drives({"a": 1}), build_of_drives({"b": 2})
    index = merged(one, two, max_entries=one.count + 3)
    assert index.count == one.count + 3 and index.report.dropped > 0
    assert index.content.limits["max_entries"] == one.count + 3


@pytest.mark.parametrize(
    ("other", "pattern"),
    [
        ({"stages": STAGES[:2]}, "stages: expected 1 as 'one' has, found 2"),
        ({"stages": STAGES[1:2]}, "weight: expected 1.0 as 'one' has, found 2.0"),
    ],
)
def test_indexes_of_other_stages_are_refused(other: dict[str, object], pattern: str) -> None:
    one, two = build_of_drives({"a": 1}), build_of_drives({"b": 2}, **other)  # type: ignore[arg-type]
    manifests = [[stage.manifest for stage in index.stages] for index in (one, two)]
    with pytest.raises(IndexMismatchError, match=f"index 'two', stage 0: {pattern}"):
        check_conditions(["one", "two"], manifests)


def test_lists_find_nearly_all_nearest_entries(rng: np.random.Generator) -> None:
    centres = rng.standard_normal((40, 16))
    points = unit(centres[rng.integers(0, 40, 3000)] + 0.3 * rng.standard_normal((3000, 16)))
    entries, queries = points[:2000], points[2000:]
    rows, similarities = nearest_in_lists(queries, entries, Partition.of(entries))
    exact_rows, exact = nearest_entries(queries, entries)
    assert (rows == exact_rows).mean() > 0.97
    np.testing.assert_allclose((queries * entries[rows]).sum(axis=1), similarities, atol=1e-5)
    assert (similarities <= exact + 1e-5).all()
