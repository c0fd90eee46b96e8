"""What the fingerprint of an index depends on, and edits that agree with what they retracted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from worlds.nominal_world import COARSE, PATCHES, POOLED, build, make_frames, weighted

from semantic_anomaly.index.content import (
    ADD,
    RETRACT,
    Edit,
    IndexContent,
    RecordedSource,
    Support,
)
from semantic_anomaly.index.edits import add_nominal, retract
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import RegionOfInterest


@pytest.fixture(scope="module")
def index() -> NominalIndex:
    return build()


@pytest.fixture(scope="module")
def edited(index: NominalIndex) -> IndexContent:
    """Two entries retracted by edit 1, two frames added by edit 2."""
    retracted = retract(index, {0: [1, 5]})
    added, _ = add_nominal(retracted, make_frames(2, 7), roi=RegionOfInterest(), source="new")
    return added.content


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (Edit(1, RETRACT, 14), "retract 14 entries"),
        (Edit(1, RETRACT, 1), "retract 1 entry"),
        (Edit(1, ADD, 14, 2), "add 2 frames"),
        (Edit(1, ADD, 14, 1), "add 1 frame"),
    ],
)
def test_edits_in_words(edit: Edit, text: str) -> None:
    assert edit.what == text


def test_the_fingerprint_is_that_of_the_content(index: NominalIndex) -> None:
    content = index.content

    def fingerprint(**changes: object) -> str:
        return str(replace(content, **changes).manifest()["fingerprint"])

    assert index.fingerprint == fingerprint()
    named = replace(PATCHES, spec=replace(PATCHES.spec, backbone="/models/tiny"))
    elsewhere = {"sources": (RecordedSource("other", "/other"),), "stride": 2}
    assert fingerprint(stage=named, segmenter_model="m", **elsewhere) == index.fingerprint
    changes = [
        {"camera": "front"},
        {"embeddings": -content.embeddings},
        {"entries": content.entries[::-1].copy()},
        {"frames": content.frames[1:]},
        {"frames": (replace(content.frames[0], recording="x"), *content.frames[1:])},
        {"search_ef": 78},
        {"limits": {}},
        {"support": Support.of({"x": np.array([0])})},
        {"support": Support.of({"y": np.array([0])})},
        {"support": Support.of({"x": np.array([1])})},
        {"edits": (Edit(1, RETRACT, 1),)},
        {"stage": replace(PATCHES, embedder=replace(PATCHES.embedder, average=3))},
        {"stage": replace(PATCHES, embedder=replace(PATCHES.embedder, weights_sha256="3" * 64))},
        {"stage": weighted(PATCHES, 0.5)},
        {"stage": POOLED},
        {"further": ("0" * 64,)},
        {"further": ("1" * 64,)},
    ]
    assert len({index.fingerprint, *(fingerprint(**c) for c in changes)}) == 1 + len(changes)


def test_the_fingerprint_depends_on_all_stages(index: NominalIndex) -> None:
    stages = [
        (PATCHES, COARSE),
        (COARSE, PATCHES),
        (weighted(PATCHES, 0.5), COARSE),
        (PATCHES, weighted(COARSE, 0.5)),
        (PATCHES, COARSE, POOLED),
        (PATCHES, COARSE, weighted(POOLED, 0.25)),
    ]
    fingerprints = {build(3, stages=each).fingerprint for each in stages}
    assert len({index.fingerprint, *fingerprints}) == 1 + len(stages)
    two = build(3, stages=stages[0])
    assert two.content.further == (two.stages[1].fingerprint,)
    assert not two.stages[1].content.further


def test_retracted_entries_are_kept_as_they_were(index: NominalIndex, edited: IndexContent) -> None:
    assert index.content.numbers.tolist() == list(range(index.count))
    numbers = edited.numbers.tolist()
    assert numbers[:5] == [0, 2, 3, 4, 6] and len(numbers) == len(edited.embeddings)
    assert edited.retracted is not None
    np.testing.assert_array_equal(edited.retracted.embeddings, index.content.embeddings[[1, 5]])
    assert edited.retracted.entries[:, 3:].tolist() == [[1, 1], [5, 1]]


def renumbered(content: IndexContent, numbers: list[int]) -> IndexContent:
    """Keep only so many of the retracted entries, and number them so."""
    assert content.retracted is not None
    entries = content.retracted.entries[: len(numbers)].copy()
    entries[:, 3] = numbers
    return replace(content, retracted=replace(content.retracted, entries=entries))


def changed(content: IndexContent, position: int, **changes: object) -> IndexContent:
    edits = list(content.edits)
    edits[position] = replace(edits[position], **changes)  # type: ignore[arg-type]
    return replace(content, edits=tuple(edits))


@pytest.mark.parametrize(
    "forge",
    [
        lambda c: changed(c, 0, number=0),
        lambda c: changed(c, 0, kind="other"),
        lambda c: changed(c, 0, entries=3),
        lambda c: changed(c, 0, frames=1),
        lambda c: changed(c, 0, entries=-2),
        lambda c: changed(c, 1, entries=0),
        lambda c: changed(c, 1, entries=100_000),
        lambda c: changed(c, 1, frames=0),
        lambda c: changed(c, 1, frames=100_000),
        lambda c: replace(c, edits=c.edits[::-1]),
        lambda c: replace(c, edits=c.edits[:1] * 2),
        lambda c: replace(c, edits=c.edits[1:]),
        lambda c: replace(c, retracted=None),
        lambda c: renumbered(c, [1]),
        lambda c: renumbered(c, [5, 1]),
        lambda c: renumbered(c, [-1, 5]),
        lambda c: renumbered(c, [1, 100_000]),
    ],
)
def test_edits_that_do_not_agree(
    edited: IndexContent, forge: Callable[[IndexContent], IndexContent]
) -> None:
    assert edited.edits_agree()
    assert not forge(edited).edits_agree()


def test_edits_may_change_no_entry_of_a_stage(index: NominalIndex) -> None:
    edits = (Edit(1, RETRACT, 0), Edit(2, ADD, 0))
    assert replace(index.content, edits=edits).edits_agree()
