"""The entries of an index that a user names: by number, by frame, by nearness to another one.

Edits of an index: nominal frames added, entries taken out, and either taken back exactly.

Entries have numbers. An edit leaves the numbers of the others as they are; only undoing an
addition moves the numbers of what was added after it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import NamedTuple

import numpy as np

from semantic_anomaly.errors import InputError, UnknownNameError
from semantic_anomaly.index.build import SCENES, BuildReport, FrameRecord, NominalFrame, Selection
from semantic_anomaly.index.content import ADD, RETRACT, Edit, IndexContent, Retracted
from semantic_anomaly.index.hnsw import GrowingGraph
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.linalg import inner_products
from semantic_anomaly.roi import ImageRegion


def rows_of(content: IndexContent, numbers: Sequence[int]) -> np.ndarray:
    """Return (n,) int64, the rows of the embeddings that have these numbers.

    Raises:
        InputError: no such entry, or one that is retracted.
    """
    live = content.numbers
    gone = content.retracted.entries if content.retracted is not None else np.zeros((0, 5), int)
    asked = np.asarray(list(numbers), np.int64)
    total = len(live) + len(gone)
    for number in asked[(asked < 0) | (asked >= total)][:1]:
        raise InputError(f"entry {number}: expected a number from 0 to {total - 1}")
    for number in asked[np.isin(asked, gone[:, 3])][:1]:
        edit = gone[gone[:, 3] == number, 4][0]
        raise InputError(f"entry {number}: it is taken out already, by edit {edit}")
    return np.searchsorted(live, asked)


def of_frame(index: NominalIndex, name: str) -> list[int]:
    """Return the numbers of the entries of a frame.

    Raises:
        UnknownNameError: the index has no such frame.
        InputError: several frames have the name.
    """
    places = [place for place, known in enumerate(index.frame_names) if known == name]
    if not places:
        raise UnknownNameError("frame of the index", name, index.frame_names[:20])
    if len(places) > 1:
        raise InputError(f"frame '{name}': {len(places)} frames have this name; name entries")
    content = index.content
    return [int(n) for n in content.numbers[content.entries[:, 0] == places[0]]]


def near(index: NominalIndex, number: int, within: float) -> list[int]:
    """Return the numbers of an entry and of those within a cosine distance of it.

    Args:
        index: has the entries.
        number: of the entry.
        within: in [0, 2].

    Raises:
        InputError: no such entry, or a distance that cannot be.
    """
    if not 0.0 <= within <= 2.0:
        raise InputError(f"distance: expected a number in [0, 2], found {within}")
    content = index.content
    row = int(rows_of(content, [number])[0])
    similar = inner_products(content.embeddings[row : row + 1], content.embeddings.T)[0]
    found = 1.0 - similar <= within
    found[row] = True
    return [int(n) for n in content.numbers[found]]


class _Ledger(NamedTuple):
    """Every entry there is, in the order of their numbers, and which edit took it out (0: none)."""

    embeddings: np.ndarray
    entries: np.ndarray
    edits: np.ndarray


def add_nominal(
    index: NominalIndex,
    frames: Iterable[NominalFrame],
    *,
    region: ImageRegion,
    source: str,
    note: str = "",
) -> tuple[NominalIndex, BuildReport]:
    """Return the index with nominal frames added as one edit, and what became of their patches.

    Its parts take what the frames have for them, by edits of their own that are undone with it;
    where nothing of the patches is new, they alone have edits. Near-duplicates of what there is
    are left out, as when it was built.

    Args:
        index: to be edited; stays as it is.
        frames: made by the index's own embedder.
        region: the index's own region.
        source: where the frames come from.
        note: why.

    Raises:
        IndexMismatchError: another region, or a grid of another dimension.
        InputError: the index is full, or has everything already.
        ModelOutputError: the index has instances, and the frames were not segmented.
    """
    index.check_region(region)
    plan, beside = index.plan, defaultdict[str, list[NominalFrame]](list)

    def watched() -> Iterator[NominalFrame]:
        for given in frames:
            for name, places in plan.places(given, region).items():
                beside[name].append(places)
            yield given

    edit = _edit(index.content, ADD, 0, note, 0, source)
    made, report = _grown("index", index, watched(), region, edit)
    parts = dict(index.parts)
    for name, given in beside.items():
        own = replace(edit, number=_edit(parts[name].content, ADD, 0, note).number)
        parts[name], _ = _grown(f"part '{name}' of the index", parts[name], given, region, own)
    # A scene is taken in whatever it resembles, so that it is no sign of anything new.
    grown = [n for n, part in index.parts.items() if n != SCENES and parts[n] is not part]
    if made is index and not grown:
        raise InputError(
            f"index: expected new patches, found all {report.seen} of {report.frames} frames "
            f"nearer than {index.content.limits['dedup_distance']:g} to entries of the index"
        )
    made = made.with_parts(parts) if parts else made
    return made, replace(report, stored=made.count - index.count)


def _grown(
    what: str, index: NominalIndex, frames: Iterable[NominalFrame], region: ImageRegion, edit: Edit
) -> tuple[NominalIndex, BuildReport]:
    """Return an index or a part after an addition, the same one if nothing was new."""
    content = index.content
    dedup, most = content.limits["dedup_distance"], int(content.limits["max_entries"])
    if index.count >= most:
        raise InputError(f"{what}: expected room for more than {most} entries, found none")
    graph = GrowingGraph(index.dim, content.graph["m"], content.graph["ef_construction"])
    selection = Selection(graph, index.dim, dedup, most)
    selection.resume(content.embeddings, content.entries, content.frames)
    selection.extend(frames, region)
    report = selection.finish()
    added = report.stored - index.count
    if not added:
        return index, report
    brought = len(selection.frames) - len(content.frames)
    changed = replace(
        content,
        embeddings=selection.embeddings.copy(),
        entries=selection.entries.copy(),
        frames=tuple(selection.frames),
        edits=(*content.edits, replace(edit, entries=added, frames=brought)),
    )
    return index.with_content(changed, graph), report


def retract(index: NominalIndex, numbers: Sequence[int], *, note: str = "") -> NominalIndex:
    """Return the index without some entries, as one edit.

    Args:
        index: to be edited; stays as it is.
        numbers: of the entries.
        note: why.

    Raises:
        InputError: no numbers, no such entry, one that is retracted already, or all of them.
    """
    content = index.content
    taken = np.unique(rows_of(content, numbers))
    if not len(taken):
        raise InputError("retract: expected at least one entry, found none")
    if len(taken) == index.count:
        raise InputError(f"retract: expected some entries to stay, found all {index.count} named")
    edit = _edit(content, RETRACT, len(taken), note)
    ledger = _ledger(content)
    ledger.edits[content.numbers[taken]] = edit.number
    return index.with_content(_content(content, ledger, (*content.edits, edit), content.frames))


def undo(index: NominalIndex, number: int | None = None) -> tuple[NominalIndex, Edit]:
    """Return the index without an edit, and the edit: what it took out is back, what it added gone.

    What an addition gave to the parts of the index goes with it.

    Args:
        index: to be edited; stays as it is.
        number: of the edit; None: the last one.

    Raises:
        InputError: no such edit, a later one took out entries that it added, or what returns
            does not fit into the index.
    """
    content = index.content
    if not content.edits:
        raise InputError("undo: expected an edit of the index, found none")
    known = {edit.number: edit for edit in content.edits}
    if number is not None and number not in known:
        raise InputError(f"undo: expected one of the edits {sorted(known)}, found {number}")
    edit = content.edits[-1] if number is None else known[number]
    others = tuple(each for each in content.edits if each is not edit)
    ledger, frames = _ledger(content), content.frames
    if edit.kind == RETRACT:
        room = int(content.limits["max_entries"]) - index.count
        if edit.entries > room:
            raise InputError(
                f"undo: expected room for the {edit.entries} entries of edit {edit.number}, found "
                f"{max(room, 0)}; undo an addition first"
            )
        ledger.edits[ledger.edits == edit.number] = 0
    else:
        ledger, frames = _without_addition(content, ledger, edit)
    undone = index.with_content(_content(content, ledger, others, frames))
    parts = {name: _undone_with(name, part, edit) for name, part in index.parts.items()}
    return (undone.with_parts(parts) if parts else undone), edit


def _undone_with(name: str, part: NominalIndex, edit: Edit) -> NominalIndex:
    """Return a part without what an addition to its index gave to it."""
    for own in part.edits:
        if edit.kind == own.kind == ADD and (own.when, own.source) == (edit.when, edit.source):
            try:
                return undo(part, own.number)[0]
            except InputError as error:
                raise InputError(f"part '{name}': {error}") from error
    return part


def _edit(
    content: IndexContent, kind: str, entries: int, note: str, frames: int = 0, source: str = ""
) -> Edit:
    number = 1 + max((edit.number for edit in content.edits), default=0)
    when = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    return Edit(number, kind, entries, frames, when, note, source)


def _ledger(content: IndexContent) -> _Ledger:
    gone = content.retracted
    if gone is None:
        edits = np.zeros(len(content.embeddings), np.int32)
        return _Ledger(content.embeddings, content.entries, edits)
    total, live, out = len(content.embeddings) + len(gone.entries), content.numbers, gone.entries
    ledger = _Ledger(
        np.empty((total, content.embeddings.shape[1]), np.float32),
        np.empty((total, 3), np.int32),
        np.zeros(total, np.int32),
    )
    ledger.embeddings[live], ledger.embeddings[out[:, 3]] = content.embeddings, gone.embeddings
    ledger.entries[live], ledger.entries[out[:, 3]] = content.entries, out[:, :3]
    ledger.edits[out[:, 3]] = out[:, 4]
    return ledger


def _content(
    content: IndexContent,
    ledger: _Ledger,
    edits: tuple[Edit, ...],
    frames: tuple[FrameRecord, ...],
) -> IndexContent:
    live, gone = ledger.edits == 0, np.flatnonzero(ledger.edits)
    retracted = None
    if len(gone):
        told = np.column_stack([ledger.entries[gone], gone, ledger.edits[gone]]).astype(np.int32)
        retracted = Retracted(ledger.embeddings[gone], np.ascontiguousarray(told))
    return replace(
        content,
        embeddings=ledger.embeddings[live],
        entries=ledger.entries[live],
        retracted=retracted,
        edits=edits,
        frames=frames,
    )


def _without_addition(
    content: IndexContent, ledger: _Ledger, edit: Edit
) -> tuple[_Ledger, tuple[FrameRecord, ...]]:
    """Return what is left without the entries and frames of an addition."""
    later = [e for e in content.edits if e.kind == ADD and e.number >= edit.number]
    first = len(ledger.edits) - sum(e.entries for e in later)
    added = slice(first, first + edit.entries)
    if takers := sorted({*ledger.edits[added].tolist()} - {0}):
        raise InputError(
            f"undo: edit {edit.number} cannot be undone while edit {takers[0]} takes out entries "
            "that it added; undo that one first"
        )
    start = len(content.frames) - sum(e.frames for e in later)
    entries = np.delete(ledger.entries, added, axis=0)
    entries[entries[:, 0] >= start, 0] -= edit.frames
    rest = _Ledger(
        np.delete(ledger.embeddings, added, axis=0), entries, np.delete(ledger.edits, added)
    )
    frames = content.frames[:start] + content.frames[start + edit.frames :]
    return rest, frames
