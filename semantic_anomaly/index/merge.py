"""Merging of indexes of one camera into one, with bounded memory.

Each part is read once, one after another. What is kept of all of them are the entries of the
merged index, and numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from semantic_anomaly.errors import IndexMismatchError
from semantic_anomaly.index.build import FrameRecord, Selection, TakenEntries
from semantic_anomaly.index.content import (
    ADD,
    Edit,
    FailedSource,
    IndexContent,
    IndexPart,
    RecordedSource,
    Retracted,
    Support,
)
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.index.partition import Partition
from semantic_anomaly.roi import RegionOfInterest

# Of an identity, what does not change the embeddings.
_NOT_COMPARED = ("model_id", "revision", "dtype", "execution")


def conditions(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be equal in the manifests of a stage of two indexes to merge them."""
    content = manifest["content"]
    described = {key: content[key] for key in ("weight", "roi", "camera", "graph")}
    described |= {key: v for key, v in content["identity"].items() if key not in _NOT_COMPARED}
    segmenter = content.get("segmenter")
    described["segmenter"] = segmenter and [segmenter["family"], segmenter["digest"]]
    described["stride"] = manifest["written"]["stride"]
    described["stages"] = len(content.get("further", ())) + 1
    return described


def check_conditions(
    names: Sequence[str], manifests_of_parts: Sequence[Sequence[Mapping[str, Any]]]
) -> None:
    """Check that indexes can be merged.

    Args:
        names: of the indexes, for messages.
        manifests_of_parts: the manifests of all stages of each index.

    Raises:
        IndexMismatchError: two differ in stages, backbone, region of interest, camera or stride.
    """
    first = manifests_of_parts[0]
    for name, manifests in zip(names[1:], manifests_of_parts[1:], strict=True):
        # The number of stages is compared with the first manifests.
        for number, (expected, found) in enumerate(zip(first, manifests, strict=False)):
            own, other = conditions(expected), conditions(found)
            for key in ("stages", *own):
                if own[key] != other[key]:
                    raise IndexMismatchError(
                        f"index '{name}', stage {number}: {key.replace('_', ' ')}",
                        f"{own[key]} as '{names[0]}' has",
                        other[key],
                        "only indexes built with the same settings can be merged",
                    )


def merge(
    parts: Iterable[NominalIndex],
    *,
    count: int,
    max_entries: int,
    dedup_distances: Sequence[float],
    recordings: Sequence[Mapping[str, str]] | None = None,
    source_names: Sequence[Sequence[str]] | None = None,
    failed: Sequence[FailedSource] = (),
    report_progress: Callable[[int], object] | None = None,
) -> NominalIndex:
    """Return the index of all parts; near-duplicates among them are suppressed.

    Every embedding that a part covers lies within `dedup_distance` of an entry of the merged index,
    unless `max_entries` is reached. Entries are supported by all recordings that supported them, or
    an entry that they suppressed. Edits get new numbers and can be undone.

    Args:
        parts: that passed `check_conditions`; read one after another.
        count: entries of all parts and stages together, for memory; a smaller one costs copies.
        max_entries: most that are stored of each stage.
        dedup_distances: of each stage, at least those of all parts.
        recordings: new names of the recordings of each part; None: names stay.
        source_names: new names of the sources of each part; None: names stay.
        failed: sources that could not be read, besides those of the parts.
        report_progress: called with numbers of entries: each of a part once, and each that is
            stored once more.

    Raises:
        IndexMismatchError: parts of another number of stages.
    """
    merged: list[_MergedStage] = []
    described: list[IndexPart] = []
    sources: list[RecordedSource] = []
    all_failed = [*failed]
    template: list[IndexContent] = []
    edits = 0
    with _one_thread() as executor:
        for number, part in enumerate(parts):
            renamed = recordings[number] if recordings else {}
            if not template:
                template = [_without_arrays(stage.content) for stage in part.stages]
                merged = [
                    _MergedStage.of(stage, stage_number, max_entries, dedup_distance, count)
                    for stage_number, (stage, dedup_distance) in enumerate(
                        zip(part.stages, dedup_distances, strict=True)
                    )
                ]
            for stage, of_part in zip(merged, part.stages, strict=True):
                stage.add(of_part.content, renamed, edits, report_progress)
                stage.selection.grow_graph(executor)
            edits += max((edit.number for edit in part.edits), default=0)
            content = part.content
            written = part.manifest["written"]
            described += content.parts or (
                IndexPart(
                    part.fingerprint,
                    str(written["created"]),
                    str(written["package_version"]),
                    sum(stage.count for stage in part.stages),
                    tuple(source.name for source in content.sources),
                ),
            )
            names = source_names[number] if source_names else [s.name for s in content.sources]
            sources += [
                replace(
                    source,
                    name=name,
                    recordings={d: renamed.get(r, r) for d, r in source.recordings.items()},
                )
                for source, name in zip(content.sources, names, strict=True)
            ]
            all_failed += content.failed
        contents = [
            replace(
                stage.content(of_template, report_progress),
                sources=tuple(sources),
                parts=tuple(described),
                failed=tuple(all_failed),
            )
            for stage, of_template in zip(merged, template, strict=True)
        ]
        return NominalIndex.of_stages(contents, [stage.selection.graph for stage in merged])


@contextmanager
def _one_thread() -> Iterator[Executor]:
    """Yield an executor on which graphs grow while the next parts are compared."""
    executor = ThreadPoolExecutor(1)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _without_arrays(content: IndexContent) -> IndexContent:
    """Return a content whose arrays and frames do not occupy memory."""
    none = np.empty(0, np.float32)
    return replace(
        content,
        embeddings=none,
        entries=none,
        radii=none,
        frames=(),
        further=(),
        retracted=None,
        support=Support(),
        partition=Partition(none, none),
    )


@dataclass(frozen=True, eq=False)
class _Segment:
    """Entries of a part that the build or one addition brought.

    Attributes:
        part: its number.
        edit: new number of the addition, 0 for the build.
        numbers: (n,) int64 of the entries in the part, retracted ones too.
        rows: (n,) int64 in `embeddings` of the live ones among them; -1: retracted.
        embeddings, entries, radii: of the live ones.
        retracted: (m, dim) float32 of the others, and `retracted_entries`: (m, 4) int32 frame, row,
            col, new number of the edit.
        frames: of the part.
    """

    part: int
    edit: int
    numbers: np.ndarray
    rows: np.ndarray
    embeddings: np.ndarray
    entries: np.ndarray
    radii: np.ndarray
    retracted: np.ndarray
    retracted_entries: np.ndarray
    frames: tuple[FrameRecord, ...]


@dataclass(eq=False)
class _MergedStage:
    """A stage of the merged index so far."""

    selection: Selection
    parts: int = 0
    # By part: support with new names, and the new number of each entry.
    supports: list[tuple[tuple[str, ...], np.ndarray]] = field(default_factory=list)
    numbers: list[np.ndarray] = field(default_factory=list)
    additions: list[_Segment] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    # New numbers of the rows of the selection; retracted entries; by segment, entries that have
    # near-duplicates, with their recordings.
    row_numbers: list[np.ndarray] = field(default_factory=list)
    retracted: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    near: list[tuple[np.ndarray, np.ndarray, int]] = field(default_factory=list)
    total: int = 0

    @classmethod
    def of(
        cls, stage: NominalIndex, number: int, max_entries: int, dedup_distance: float, count: int
    ) -> _MergedStage:
        selection = Selection(number, stage.stage, RegionOfInterest(), dedup_distance, max_entries)
        selection.reserve(count)
        return cls(selection)

    def add(
        self,
        content: IndexContent,
        renamed: Mapping[str, str],
        first_edit: int,
        report_progress: Callable[[int], object] | None,
    ) -> None:
        """Take in what the build of a part brought, and keep its additions for the end."""
        frames = tuple(
            replace(frame, recording=renamed.get(frame.recording, frame.recording))
            for frame in content.frames
        )
        support = content.support
        rows = support.rows.copy()
        rows[rows[:, 2] > 0, 2] += first_edit
        self.supports.append((tuple(renamed.get(r, r) for r in support.recordings), rows))
        total = len(content.radii)
        self.numbers.append(np.full(total, -1, np.int64))
        added = [edit for edit in content.edits if edit.kind == ADD]
        end = total - sum(edit.entries for edit in added)
        self._take(_segment(content, frames, self.parts, 0, 0, end, first_edit))
        for edit in added:
            begin, end = end, end + edit.entries
            number = edit.number + first_edit
            segment = _segment(content, frames, self.parts, number, begin, end, first_edit)
            self.additions.append(segment)
        self.edits += [replace(edit, number=edit.number + first_edit) for edit in content.edits]
        self.selection.add_report(content.report)
        self.parts += 1
        if report_progress is not None:
            report_progress(len(content.embeddings))

    def content(
        self, template: IndexContent, report_progress: Callable[[int], object] | None
    ) -> IndexContent:
        """Return what the merged stage holds."""
        edits = {edit.number: edit for edit in self.edits}
        for segment in self.additions:
            before = self.total
            frames = self._take(segment)
            edit = edits[segment.edit]
            edits[segment.edit] = replace(edit, entries=self.total - before, frames=frames)
        self.additions.clear()
        selection = self.selection
        selection.finish(report_progress)
        numbers = np.concatenate(self.row_numbers)
        radii = np.zeros(self.total, np.float32)
        radii[numbers] = selection.radii
        retracted = None
        if self.retracted:
            embeddings, entries = map(np.concatenate, zip(*self.retracted, strict=True))
            retracted = Retracted(embeddings, np.ascontiguousarray(entries, np.int32))
        return replace(
            template,
            embeddings=selection.embeddings,
            entries=selection.entries,
            radii=radii,
            frames=tuple(selection.frames),
            report=selection.report,
            limits={
                "dedup_distance": selection.dedup_distance,
                "max_entries": selection.max_entries,
            },
            partition=Partition.of(selection.embeddings),
            edits=tuple(edits[number] for number in sorted(edits)),
            retracted=retracted,
            support=self._support(numbers, retracted),
        )

    def _take(self, segment: _Segment) -> int:
        """Take in a segment; return the number of frames that it brought."""
        selection, before = self.selection, len(self.selection.frames)
        taken = selection.add_entries(
            segment.embeddings,
            segment.entries,
            segment.radii,
            segment.frames,
            segment.retracted_entries[:, 0],
        )
        is_live = segment.rows >= 0
        is_new = np.ones(len(segment.numbers), bool)
        is_new[is_live] = taken.is_stored[segment.rows[is_live]]
        new_numbers = self.total + np.cumsum(is_new) - 1
        self.total += int(is_new.sum())
        self.row_numbers.append(new_numbers[is_live & is_new])
        numbers_of_rows = np.concatenate(self.row_numbers)
        own = self.numbers[segment.part]
        own[segment.numbers[~is_live]] = new_numbers[~is_live]
        live_numbers = segment.numbers[is_live]
        own[live_numbers] = _numbers_at(numbers_of_rows, taken.rows[segment.rows[is_live]])
        if len(segment.retracted):
            entries = segment.retracted_entries
            columns = (
                taken.frame_numbers[entries[:, 0]],
                entries[:, 1:3],
                new_numbers[~is_live],
                entries[:, 3],
            )
            self.retracted.append((segment.retracted, np.column_stack(columns)))
        self._note_near(segment, taken, numbers_of_rows)
        return len(selection.frames) - before

    def _note_near(
        self, segment: _Segment, taken: TakenEntries, numbers_of_rows: np.ndarray
    ) -> None:
        """Note the entries that have a near-duplicate in another part, and its recording."""
        is_near = taken.nearest >= 0
        numbers = _numbers_at(numbers_of_rows, taken.nearest[is_near])
        frames = segment.entries[is_near, 0]
        names = np.array([frame.recording for frame in segment.frames], object)
        self.near.append((numbers, names[frames], segment.edit))

    def _support(self, numbers: np.ndarray, retracted: Retracted | None) -> Support:
        """Return the support of all entries, by those of the parts and by near-duplicates."""
        own = np.full(self.total, -1, np.int64)
        own[numbers] = self.selection.entries[:, 0]
        if retracted is not None:
            own[retracted.entries[:, 3]] = retracted.entries[:, 0]
        recording_of_frame = np.array([f.recording for f in self.selection.frames], object)
        by_edit: dict[int, dict[str, list[np.ndarray]]] = {}

        def note(edit: int, recording: str, supported: np.ndarray) -> None:
            supported = np.unique(supported[supported >= 0])
            supported = supported[recording_of_frame[own[supported]] != recording]
            if len(supported):
                by_edit.setdefault(edit, {}).setdefault(recording, []).append(supported)

        for (names, rows), new_numbers in zip(self.supports, self.numbers, strict=True):
            for recording, name in enumerate(names):
                of_recording = rows[rows[:, 1] == recording]
                for edit in np.unique(of_recording[:, 2]).tolist():
                    note(edit, name, new_numbers[of_recording[of_recording[:, 2] == edit, 0]])
        for near, recordings, edit in self.near:
            for name in dict.fromkeys(recordings.tolist()):
                note(edit, name, near[recordings == name])
        support = Support()
        for edit in sorted(by_edit):
            of_edit = {name: np.concatenate(rows) for name, rows in by_edit[edit].items()}
            support = support.with_added(of_edit, edit)
        return support


def _numbers_at(numbers_of_rows: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return (n,) int64, the numbers of rows; -1 where a row is -1."""
    numbers: np.ndarray = np.where(rows >= 0, numbers_of_rows[rows], -1)
    return numbers


def _segment(
    content: IndexContent,
    frames: tuple[FrameRecord, ...],
    part: int,
    edit: int,
    begin: int,
    end: int,
    first_edit: int,
) -> _Segment:
    """Return the entries of numbers `begin` to `end` of a part."""
    numbers = np.arange(begin, end)
    live = content.numbers
    first, last = np.searchsorted(live, [begin, end])
    rows = np.full(len(numbers), -1, np.int64)
    rows[live[first:last] - begin] = np.arange(last - first)
    dim = content.embeddings.shape[1]
    retracted, retracted_entries = np.empty((0, dim), np.float32), np.empty((0, 4), np.int32)
    if content.retracted is not None:
        of_entries = content.retracted.entries
        inside = (of_entries[:, 3] >= begin) & (of_entries[:, 3] < end)
        retracted = content.retracted.embeddings[inside]
        retracted_entries = of_entries[inside][:, [0, 1, 2, 4]].copy()
        retracted_entries[:, 3] += first_edit
    return _Segment(
        part,
        edit,
        numbers,
        rows,
        content.embeddings[first:last].copy() if edit else content.embeddings[first:last],
        content.entries[first:last].copy(),
        content.radii[live[first:last]],
        retracted,
        retracted_entries,
        frames,
    )
