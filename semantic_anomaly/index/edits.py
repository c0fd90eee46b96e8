"""Edits of an index: nominal frames added, entries retracted, and either undone exactly.

Entries have numbers. An edit leaves the numbers of the other entries as they are; only undoing an
addition moves the numbers of what was added after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone

import numpy as np

from semantic_anomaly.errors import InputError, UnknownNameError
from semantic_anomaly.index.build import (
    INSTANCE_STAGE,
    INSTANCES,
    PATCH_STAGE,
    BuildReport,
    FrameRecord,
    NominalFrame,
    Selection,
    Stage,
    select,
)
from semantic_anomaly.index.content import ADD, RETRACT, Edit, IndexContent, Retracted
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.linalg import inner_products
from semantic_anomaly.roi import RegionOfInterest


def rows_of(content: IndexContent, numbers: Sequence[int]) -> np.ndarray:
    """Return (n,) int64, the rows of the embeddings that have these numbers.

    Raises:
        InputError: no such entry, or one that is retracted.
    """
    requested = np.array(numbers, np.int64)
    edits = _retracting_edits(content)
    for number in requested[(requested < 0) | (requested >= len(edits))][:1]:
        raise InputError(f"entry {number}: expected a number from 0 to {len(edits) - 1}")
    for number in requested[edits[requested] > 0][:1]:
        raise InputError(f"entry {number}: it is retracted already, by edit {edits[number]}")
    return np.searchsorted(content.numbers, requested)


def of_frame(index: NominalIndex, name: str) -> list[int]:
    """Return the numbers of the entries of a frame.

    Raises:
        UnknownNameError: the index has no such frame.
        InputError: several frames have the name.
    """
    frames = [number for number, known in enumerate(index.frame_names) if known == name]
    if not frames:
        raise UnknownNameError("frame of the index", name, index.frame_names[:20])
    if len(frames) > 1:
        raise InputError(f"frame '{name}': {len(frames)} frames have this name; name entries")
    content = index.content
    return [int(n) for n in content.numbers[content.entries[:, 0] == frames[0]]]


def near(index: NominalIndex, number: int, within: float) -> list[int]:
    """Return the numbers of an entry and of those within a cosine distance in [0, 2] of it.

    Raises:
        InputError: no such entry, or a distance out of range.
    """
    if not 0.0 <= within <= 2.0:
        raise InputError(f"distance: expected a number in [0, 2], found {within}")
    content = index.content
    row = int(rows_of(content, [number])[0])
    products = inner_products(content.embeddings[row : row + 1], content.embeddings.T)[0]
    is_near = 1.0 - products <= within
    is_near[row] = True
    return [int(n) for n in content.numbers[is_near]]


def add_nominal(
    index: NominalIndex,
    frames: Iterable[NominalFrame],
    *,
    roi: RegionOfInterest,
    source: str,
    note: str = "",
) -> tuple[NominalIndex, BuildReport]:
    """Return the index with nominal frames added as one edit, and what became of their patches.

    The part of instances gets the instances of the frames, by an edit of its own that is undone
    with it; if no patch is new, it alone has an edit. Near-duplicates of entries are left out, as
    when the index was built.

    Args:
        index: stays as it is.
        frames: made by the index's own embedder.
        roi: patches outside take no part; a part of the region of interest of the index.
        source: where the frames come from.
        note: why.

    Raises:
        IndexMismatchError: an ROI outside that of the index, or a grid of another dimension.
        InputError: the index is full, or has everything already.
        ModelOutputError: the index has instances, and the frames were not segmented.
    """
    index.check_roi(roi)
    patches = _resumed("index", index, PATCH_STAGE, roi)
    part, selections = index.parts.get(INSTANCES), [patches]
    if part is not None:
        name = f"part '{INSTANCES}' of the index"
        selections.append(_resumed(name, part, INSTANCE_STAGE, roi))
    select(frames, selections)
    report = replace(patches.report, stored=patches.count - index.count)
    edit = _new_edit(index.content, ADD, note=note, source=source)
    edited = _with_addition(index, patches, edit)
    if part is not None:
        number = _new_edit(part.content, ADD).number
        edited_part = _with_addition(part, selections[1], replace(edit, number=number))
        if edited_part is not part:
            return edited.with_parts({INSTANCES: edited_part}), report
    if edited is index:
        raise InputError(
            f"index: expected new patches, found all {report.seen} of {report.frames} frames "
            f"nearer than {index.content.limits['dedup_distance']:g} to entries of the index"
        )
    return edited, report


def retract(index: NominalIndex, numbers: Sequence[int], *, note: str = "") -> NominalIndex:
    """Return the index without the entries of these numbers, as one edit.

    Raises:
        InputError: no numbers, no such entry, one that is retracted already, or all of them.
    """
    content = index.content
    rows = np.unique(rows_of(content, numbers))
    if not len(rows):
        raise InputError("retract: expected at least one entry, found none")
    if len(rows) == index.count:
        raise InputError(f"retract: expected some entries to stay, found all {index.count} named")
    edit = _new_edit(content, RETRACT, entries=len(rows), note=note)
    ledger = _Ledger.of(content)
    ledger.edits[content.numbers[rows]] = edit.number
    return index.with_content(ledger.to_content(content, (*content.edits, edit)))


def undo(index: NominalIndex, number: int | None = None) -> tuple[NominalIndex, Edit]:
    """Return the index without an edit, and the edit.

    What the edit retracted is back and what it added is gone, from the part of instances too.

    Args:
        index: stays as it is.
        number: of the edit; None: the last one.

    Raises:
        InputError: no such edit, a later one retracted entries that it added, or what returns
            does not fit into the index.
    """
    content = index.content
    if not content.edits:
        raise InputError("undo: expected an edit of the index, found none")
    by_number = {edit.number: edit for edit in content.edits}
    if number is not None and number not in by_number:
        raise InputError(f"undo: expected one of the edits {sorted(by_number)}, found {number}")
    edit = content.edits[-1] if number is None else by_number[number]
    others = tuple(other for other in content.edits if other is not edit)
    ledger = _Ledger.of(content)
    if edit.kind == ADD:
        ledger = ledger.without_addition(content.edits, edit)
    else:
        room = max(int(content.limits["max_entries"]) - index.count, 0)
        if edit.entries > room:
            raise InputError(
                f"undo: expected room for the {edit.entries} entries of edit {edit.number}, found "
                f"{room}; undo an addition first"
            )
        ledger.edits[ledger.edits == edit.number] = 0
    undone = index.with_content(ledger.to_content(content, others))
    for name, part in index.parts.items():
        for own in part.edits:
            if edit.kind == own.kind == ADD and (own.when, own.source) == (edit.when, edit.source):
                try:
                    undone_part = undo(part, own.number)[0]
                    undone = undone.with_parts({**undone.parts, name: undone_part})
                except InputError as error:
                    raise InputError(f"part '{name}': {error}") from error
    return undone, edit


def _resumed(name: str, index: NominalIndex, stage: Stage, roi: RegionOfInterest) -> Selection:
    """Return a selection that begins with the entries of an index or a part."""
    content, limits = index.content, index.content.limits
    max_entries = int(limits["max_entries"])
    if index.count >= max_entries:
        raise InputError(f"{name}: expected room for more than {max_entries} entries, found none")
    selection = Selection(stage, index.dim, roi, limits["dedup_distance"], max_entries)
    selection.resume(content.embeddings, content.entries, content.frames)
    return selection


def _with_addition(index: NominalIndex, selection: Selection, edit: Edit) -> NominalIndex:
    """Return an index with a resumed selection as one edit, itself if nothing was new."""
    content, added = index.content, selection.count - index.count
    if not added:
        return index
    frames = len(selection.frames) - len(content.frames)
    changed = replace(
        content,
        embeddings=selection.embeddings.copy(),
        entries=selection.entries.copy(),
        frames=tuple(selection.frames),
        edits=(*content.edits, replace(edit, entries=added, frames=frames)),
    )
    return index.with_content(changed, selection.graph)


def _new_edit(
    content: IndexContent, kind: str, entries: int = 0, note: str = "", source: str = ""
) -> Edit:
    number = 1 + max((edit.number for edit in content.edits), default=0)
    when = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    return Edit(number, kind, entries, 0, when, note, source)


def _retracting_edits(content: IndexContent) -> np.ndarray:
    """Return (total,) int32, number of the edit that retracted each entry, 0 for none."""
    if content.retracted is None:
        return np.zeros(len(content.embeddings), np.int32)
    retracted = content.retracted.entries
    edits = np.zeros(len(content.embeddings) + len(retracted), np.int32)
    edits[retracted[:, 3]] = retracted[:, 4]
    return edits


@dataclass(frozen=True, eq=False)
class _Ledger:
    """All entries, the retracted ones too, in the order of their numbers.

    Attributes:
        embeddings: (total, dim) float32.
        entries: (total, 3) int32: frame, row, col.
        edits: (total,) int32, number of the edit that retracted each entry, 0 for none.
        frames: the frames that entries point to.
    """

    embeddings: np.ndarray
    entries: np.ndarray
    edits: np.ndarray
    frames: tuple[FrameRecord, ...]

    @classmethod
    def of(cls, content: IndexContent) -> _Ledger:
        embeddings, entries, retracted = content.embeddings, content.entries, content.retracted
        if retracted is not None:
            order = np.argsort(np.concatenate([content.numbers, retracted.entries[:, 3]]))
            embeddings = np.concatenate([embeddings, retracted.embeddings])[order]
            entries = np.concatenate([entries, retracted.entries[:, :3]])[order]
        return cls(embeddings, entries, _retracting_edits(content), content.frames)

    def to_content(self, content: IndexContent, edits: tuple[Edit, ...]) -> IndexContent:
        """Return a content with these entries, frames and edits."""
        live, numbers = self.edits == 0, np.flatnonzero(self.edits)
        retracted = None
        if len(numbers):
            columns = self.entries[numbers], numbers, self.edits[numbers]
            rows = np.column_stack(columns).astype(np.int32, order="C")
            retracted = Retracted(self.embeddings[numbers], rows)
        return replace(
            content,
            embeddings=self.embeddings[live],
            entries=self.entries[live],
            retracted=retracted,
            edits=edits,
            frames=self.frames,
        )

    def without_addition(self, edits: Sequence[Edit], edit: Edit) -> _Ledger:
        """Return the ledger without the entries and frames of an addition."""
        from_here = [e for e in edits if e.kind == ADD and e.number >= edit.number]
        start = len(self.edits) - sum(e.entries for e in from_here)
        added = slice(start, start + edit.entries)
        if retracting := sorted({*self.edits[added].tolist()} - {0}):
            raise InputError(
                f"undo: edit {edit.number} cannot be undone while edit {retracting[0]} takes out "
                "entries that it added; undo that one first"
            )
        first_frame = len(self.frames) - sum(e.frames for e in from_here)
        entries = np.delete(self.entries, added, axis=0)
        entries[entries[:, 0] >= first_frame, 0] -= edit.frames
        return _Ledger(
            np.delete(self.embeddings, added, axis=0),
            entries,
            np.delete(self.edits, added),
            self.frames[:first_frame] + self.frames[first_frame + edit.frames :],
        )
