"""Edits of an index: nominal frames added, entries retracted, and either undone exactly.

Entries have numbers in their stage. An edit leaves the numbers of the other entries as they are;
only undoing an addition moves the numbers of what was added after it. An edit has the same number
in all stages, and may change no entry of some.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone

import numpy as np

from semantic_anomaly.errors import InputError, UnknownNameError
from semantic_anomaly.index.build import (
    BuildReport,
    FrameRecord,
    NominalFrame,
    Selection,
    select,
)
from semantic_anomaly.index.content import ADD, RETRACT, Edit, IndexContent, Retracted, Support
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


def stage_of(index: NominalIndex, stage: int) -> NominalIndex:
    """Return the index of a stage.

    Raises:
        InputError: there is no such stage.
    """
    if not 0 <= stage < len(index.stages):
        raise InputError(f"stage {stage}: expected 0 to {len(index.stages) - 1}")
    return index.stages[stage]


def of_frame(index: NominalIndex, name: str) -> dict[int, list[int]]:
    """Return the numbers of the entries of a frame by stage.

    Raises:
        UnknownNameError: the index has no such frame.
        InputError: several frames have the name.
    """
    if name not in index.frame_names:
        raise UnknownNameError("frame of the index", name, index.frame_names[:20])
    numbers = {}
    for stage, of_stage in enumerate(index.stages):
        content = of_stage.content
        frames = [n for n, frame in enumerate(content.frames) if frame.name == name]
        if len(frames) > 1:
            raise InputError(f"frame '{name}': {len(frames)} frames have this name; name entries")
        if frames:
            entries = content.numbers[content.entries[:, 0] == frames[0]]
            numbers[stage] = [int(number) for number in entries]
    return numbers


def near(index: NominalIndex, number: int, within: float) -> list[int]:
    """Return the numbers of an entry and of those within a cosine distance of it in its stage.

    Args:
        index: one of the stages of an index.
        number: of the entry.
        within: in [0, 2].

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
    """Return the index with nominal frames added as one edit, and what became of their embeddings.

    Near-duplicates of entries are left out, as when the index was built.

    Args:
        index: stays as it is.
        frames: made by the index's own embedder.
        roi: patches outside take no part; a part of the region of interest of the index.
        source: where the frames come from.
        note: why.

    Raises:
        IndexMismatchError: an ROI outside that of the index, or grids of other stages.
        InputError: the index is full, or has everything already.
    """
    index.check_roi(roi)
    selections = [_resumed(number, stage, roi) for number, stage in enumerate(index.stages)]
    select((_of_recording(nominal_frame, source) for nominal_frame in frames), selections)
    reports = [
        replace(selection.report, stored=selection.count - stage.count)
        for selection, stage in zip(selections, index.stages, strict=True)
    ]
    counts = {f.name: sum(getattr(r, f.name) for r in reports) for f in fields(BuildReport)}
    report = BuildReport(**{**counts, "frames": reports[0].frames})
    if not report.stored:
        raise InputError(
            f"index: expected new embeddings, found all {report.seen} of {report.frames} frames "
            "nearer than dedup_distance to entries of the index"
        )
    edit = _new_edit(index, ADD, note=note, source=source)
    contents = [
        replace(
            stage.content,
            embeddings=selection.embeddings.copy(),
            entries=selection.entries.copy(),
            radii=_updated_radii(stage.content, selection.radii),
            partition=stage.content.partition.with_entries(selection.embeddings),
            frames=tuple(selection.frames),
            support=stage.content.support.with_added(
                _numbered(stage.content, selection.support), edit.number
            ),
            edits=(
                *stage.content.edits,
                replace(
                    edit,
                    entries=selection.count - stage.count,
                    frames=len(selection.frames) - len(stage.content.frames),
                ),
            ),
        )
        for selection, stage in zip(selections, index.stages, strict=True)
    ]
    return NominalIndex.of_stages(contents, [s.graph for s in selections]), report


def _updated_radii(content: IndexContent, radii: np.ndarray) -> np.ndarray:
    """Return the radii of an edited content by number, from (n,) radii by row."""
    updated = content.radii.copy()
    updated[content.numbers] = radii[: len(content.embeddings)]
    return np.concatenate([updated, radii[len(content.embeddings) :]])


def _of_recording(nominal_frame: NominalFrame, source: str) -> NominalFrame:
    """Return a frame that names a recording, else the source."""
    frame = replace(nominal_frame[0], recording=nominal_frame[0].recording or source)
    if len(nominal_frame) == 3:
        return frame, nominal_frame[1], nominal_frame[2]
    return frame, nominal_frame[1]


def _numbered(
    content: IndexContent, rows_by_recording: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the numbers of entries given by rows, of which those beyond the content are new."""
    numbers = content.numbers
    total = len(_retracting_edits(content))
    numbered = {}
    for recording, rows in rows_by_recording.items():
        is_old = rows < len(numbers)
        new = rows[~is_old] - len(numbers) + total
        numbered[recording] = np.concatenate([numbers[rows[is_old]], new])
    return numbered


def retract(
    index: NominalIndex, numbers: Mapping[int, Sequence[int]], *, note: str = ""
) -> NominalIndex:
    """Return the index without some entries, as one edit.

    Args:
        index: to be edited; stays as it is.
        numbers: of the entries by stage.
        note: why.

    Raises:
        InputError: no numbers, no such stage or entry, one that is retracted already, or all of a
            stage.
    """
    if not any(len(of_stage) for of_stage in numbers.values()):
        raise InputError("retract: expected at least one entry, found none")
    for stage in numbers:
        stage_of(index, stage)
    edit = _new_edit(index, RETRACT, note=note)
    contents = []
    for stage, of_stage in enumerate(index.stages):
        content = of_stage.content
        rows = np.unique(rows_of(content, numbers.get(stage, ())))
        if len(rows) == of_stage.count:
            raise InputError(
                f"retract: expected some entries of stage {stage} to stay, found all "
                f"{of_stage.count} named"
            )
        ledger = _Ledger.of(content)
        ledger.edits[content.numbers[rows]] = edit.number
        edits = (*content.edits, replace(edit, entries=len(rows)))
        contents.append(ledger.to_content(content, edits))
    return NominalIndex.of_stages(contents, [None] * len(contents))


def undo(index: NominalIndex, number: int | None = None) -> tuple[NominalIndex, Edit]:
    """Return the index without an edit, and the edit.

    What the edit retracted is back, and what it added is gone.

    Args:
        index: stays as it is.
        number: of the edit; None: the last one.

    Raises:
        InputError: no such edit, a later one retracted entries that it added, or what returns
            does not fit into the index.
    """
    by_number = {edit.number: edit for edit in index.edits}
    if not by_number:
        raise InputError("undo: expected an edit of the index, found none")
    if number is None:
        number = max(by_number)
    if number not in by_number:
        raise InputError(f"undo: expected one of the edits {sorted(by_number)}, found {number}")
    contents = [_undone(stage.content, number) for stage in index.stages]
    return NominalIndex.of_stages(contents, [None] * len(contents)), by_number[number]


def _undone(content: IndexContent, number: int) -> IndexContent:
    """Return what a stage holds without an edit."""
    [edit] = (edit for edit in content.edits if edit.number == number)
    ledger = _Ledger.of(content)
    if edit.kind == ADD:
        ledger = ledger.without_addition(content.edits, edit)
    else:
        room = max(int(content.limits["max_entries"]) - len(content.embeddings), 0)
        if edit.entries > room:
            raise InputError(
                f"undo: expected room for the {edit.entries} entries of edit {edit.number}, found "
                f"{room}; undo an addition first"
            )
        ledger.edits[ledger.edits == edit.number] = 0
    return ledger.to_content(content, tuple(e for e in content.edits if e is not edit))


def _resumed(number: int, index: NominalIndex, roi: RegionOfInterest) -> Selection:
    """Return a selection that begins with the entries of a stage."""
    content, limits = index.content, index.content.limits
    max_entries = int(limits["max_entries"])
    if index.count >= max_entries:
        raise InputError(
            f"index: stage {number}: expected room for more than {max_entries} entries, found none"
        )
    selection = Selection(number, index.stage, roi, limits["dedup_distance"], max_entries)
    radii = content.radii[content.numbers]
    selection.resume(content.embeddings, content.entries, radii, content.frames)
    return selection


def _new_edit(index: NominalIndex, kind: str, *, note: str = "", source: str = "") -> Edit:
    number = 1 + max((edit.number for edit in index.edits), default=0)
    when = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    return Edit(number, kind, 0, 0, when, note, source)


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
        support: of the entries.
        radii: (total,) float32.
    """

    embeddings: np.ndarray
    entries: np.ndarray
    edits: np.ndarray
    frames: tuple[FrameRecord, ...]
    support: Support
    radii: np.ndarray

    @classmethod
    def of(cls, content: IndexContent) -> _Ledger:
        embeddings, entries, retracted = content.embeddings, content.entries, content.retracted
        if retracted is not None:
            order = np.argsort(np.concatenate([content.numbers, retracted.entries[:, 3]]))
            embeddings = np.concatenate([embeddings, retracted.embeddings])[order]
            entries = np.concatenate([entries, retracted.entries[:, :3]])[order]
        edits = _retracting_edits(content)
        return cls(embeddings, entries, edits, content.frames, content.support, content.radii)

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
            partition=content.partition.with_entries(self.embeddings[live]),
            retracted=retracted,
            edits=edits,
            frames=self.frames,
            support=self.support,
            radii=self.radii,
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
            self.support.without_addition(edit.number, start, edit.entries),
            np.delete(self.radii, added),
        )
