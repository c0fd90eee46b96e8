"""What an index holds, and the manifest and fingerprint made of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

import numpy as np

from semantic_anomaly import __version__
from semantic_anomaly.embedding.identity import StageIdentity
from semantic_anomaly.index.build import BuildReport, FrameRecord
from semantic_anomaly.index.hnsw import graph_parameters
from semantic_anomaly.index.partition import Partition
from semantic_anomaly.storage import canonical_json, sha256_bytes

FORMAT = "semantic_anomaly.index"
FORMAT_VERSION = 5
ADD, RETRACT = "add", "retract"


@dataclass(frozen=True)
class Edit:
    """A change of an index after it was built, which can be undone.

    Attributes:
        number: names the edit, from 1.
        kind: 'add' or 'retract'.
        entries: how many were added or taken out, may be 0 in one of several stages.
        frames: how many frames an addition brought, 0 for others.
        when: UTC, ISO 8601.
        note: why, in the user's words; may be empty.
        source: where added frames come from; empty for others.
    """

    number: int
    kind: str
    entries: int
    frames: int = 0
    when: str = ""
    note: str = ""
    source: str = ""

    @property
    def what(self) -> str:
        """Return what the edit does in words: 'retract 14 entries'."""
        if self.kind == ADD:
            return f"{self.kind} {self.frames} {'frame' if self.frames == 1 else 'frames'}"
        return f"{self.kind} {self.entries} {'entry' if self.entries == 1 else 'entries'}"


@dataclass(frozen=True, eq=False)
class Retracted:
    """Entries that edits took out, kept so that they can return exactly.

    Attributes:
        embeddings: (count, dim) float32, unit norm.
        entries: (count, 5) int32: frame, row, col, number of the entry, number of the edit; in
            the order of the entries' numbers.
    """

    embeddings: np.ndarray
    entries: np.ndarray


@dataclass(frozen=True)
class RecordedSource:
    """A source that an index was built from, as it can be opened again.

    Attributes:
        name: of the source, with its selection.
        opened: what `open_source` takes, with absolute paths; empty for images in memory.
        topic: image topic of a bag; empty for others.
        recordings: recording of each of its drives, by the name that the source gives them.
    """

    name: str
    opened: str | tuple[str, ...] = ""
    topic: str = ""
    recordings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class IndexPart:
    """An index that was merged into another one.

    Attributes:
        fingerprint: of the part.
        created: UTC, ISO 8601.
        package_version: that wrote it.
        entries: of all stages.
        sources: names of its sources.
    """

    fingerprint: str
    created: str
    package_version: str
    entries: int
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class FailedSource:
    """A source that an index was to be built from, and why it could not be read."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Support:
    """Which recordings support entries of other recordings.

    An entry is supported by the recording of its frame, and by those whose embeddings it
    suppressed as near-duplicates.

    Attributes:
        recordings: names.
        rows: (n, 3) int32: number of an entry, number of a recording in `recordings`, number of the
            edit that brought it, 0 for the build; ascending.
    """

    recordings: tuple[str, ...] = ()
    rows: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.int32))

    @classmethod
    def of(cls, entries_by_recording: Mapping[str, np.ndarray]) -> Support:
        """Make the support of a build, from (n,) entries by recording."""
        return cls().with_added(entries_by_recording, 0)

    def with_added(self, entries_by_recording: Mapping[str, np.ndarray], edit: int) -> Support:
        """Return the support with (n,) numbers of entries by recording, brought by an edit."""
        recordings, rows = list(self.recordings), [self.rows]
        for recording, numbers in entries_by_recording.items():
            if recording not in recordings:
                recordings.append(recording)
            number = recordings.index(recording)
            # Another edit may be undone, and its support with it.
            known = self.rows[(self.rows[:, 1] == number) & (self.rows[:, 2] == 0), 0]
            added = np.setdiff1d(numbers, known)
            rows.append(np.column_stack([added, np.full((len(added), 2), (number, edit))]))
        return Support(tuple(recordings), np.concatenate(rows))._canonical()

    def without_addition(self, edit: int, first: int, count: int) -> Support:
        """Return the support without an edit, which brought `count` entries from number `first`."""
        rows = self.rows[self.rows[:, 2] != edit].copy()
        rows = rows[(rows[:, 0] < first) | (rows[:, 0] >= first + count)]
        rows[rows[:, 0] >= first + count, 0] -= count
        return Support(self.recordings, rows)._canonical()

    def by_others(self, recording: str) -> np.ndarray:
        """Return (n,) int32: numbers of the entries that suppressed embeddings of others."""
        numbers = [n for n, name in enumerate(self.recordings) if name != recording]
        return np.unique(self.rows[np.isin(self.rows[:, 1], numbers), 0])

    def _canonical(self) -> Support:
        """Return the support with names in ascending order, without unused ones."""
        used = sorted({self.recordings[number] for number in np.unique(self.rows[:, 1])})
        numbers = {name: number for number, name in enumerate(used)}
        rows = self.rows.astype(np.int32)
        rows[:, 1] = [numbers[self.recordings[number]] for number in rows[:, 1].tolist()]
        order = np.lexsort((rows[:, 2], rows[:, 1], rows[:, 0]))
        return Support(tuple(used), np.ascontiguousarray(rows[order]))


@dataclass(frozen=True, eq=False)
class IndexContent:
    """Everything that one stage of an index holds, besides the graph made of it.

    Attributes:
        stage: how its embeddings are made; the fingerprint depends neither on the backbone's name
            in the settings nor on that of the segmenter's model.
        roi: `RegionOfInterest.describe()` of the camera.
        camera: its name.
        sources: that it was built from.
        stride: every so many frames of the sources were used.
        segmenter_model: of the settings of the build; empty without.
        embeddings: (count, dim) float32, unit norm.
        entries: (count, 3) int32: frame, row, col.
        radii: (count and retracted,) float32 by number of the entry: largest cosine distance of an
            embedding that it suppressed; a merge relies on it. The fingerprint does not depend on
            it, so that an edit can be undone.
        frames: the frames that entries point to.
        report: what became of the embeddings.
        search_ef: breadth of the graph search.
        limits: 'dedup_distance' and 'max_entries' of the build.
        partition: of the embeddings into lists; edits keep its centroids.
        edits: made since the build and not undone, by number; all stages have the same.
        retracted: entries that edits took out; None: no entries.
        further: of the first stage, fingerprints of the further ones.
        support: recordings that support entries of others.
        parts: indexes that were merged into it; empty: it was built at once.
        failed: sources that could not be read.
    """

    stage: StageIdentity
    roi: Mapping[str, Any]
    camera: str
    sources: tuple[RecordedSource, ...]
    segmenter_model: str
    embeddings: np.ndarray
    entries: np.ndarray
    radii: np.ndarray
    frames: tuple[FrameRecord, ...]
    report: BuildReport
    search_ef: int
    limits: Mapping[str, float]
    partition: Partition
    edits: tuple[Edit, ...] = ()
    retracted: Retracted | None = None
    further: tuple[str, ...] = ()
    support: Support = field(default_factory=Support)
    stride: int = 1
    parts: tuple[IndexPart, ...] = ()
    failed: tuple[FailedSource, ...] = ()

    @property
    def recordings(self) -> tuple[str, ...]:
        """Return the names of the recordings that support entries."""
        own = [frame.recording for frame in self.frames]
        return tuple(dict.fromkeys([*own, *self.support.recordings]))

    def supported_without(self, recording: str) -> np.ndarray:
        """Return (count,) bool: entries that other recordings support too."""
        own = np.array([frame.recording == recording for frame in self.frames], bool)
        is_supported = ~own[self.entries[:, 0]]
        is_supported |= np.isin(self.numbers, self.support.by_others(recording))
        return is_supported

    @property
    def numbers(self) -> np.ndarray:
        """Return (count,) int64, the entries' numbers: ascending, without the retracted ones."""
        if self.retracted is None:
            return np.arange(len(self.embeddings))
        retracted = self.retracted.entries[:, 3]
        return np.delete(np.arange(len(self.embeddings) + len(retracted)), retracted)

    def describe(self) -> dict[str, Any]:
        """Return what the fingerprint is made of: no dates, versions or paths."""
        # Empty values are left out: an index whose edits are all undone is the one it was.
        optional: dict[str, Any] = {}
        if self.edits:
            optional["edits"] = [[e.number, e.kind, e.entries, e.frames] for e in self.edits]
        if self.retracted is not None:
            optional["retracted"] = {
                "count": len(self.retracted.entries),
                "embeddings_sha256": _array_sha256(self.retracted.embeddings),
                "entries_sha256": _array_sha256(self.retracted.entries),
            }
        if self.stage.segmenter is not None:
            optional["segmenter"] = self.stage.segmenter.to_dict()
        if self.further:
            optional["further"] = list(self.further)
        return {
            **optional,
            "identity": self.stage.embedder.to_dict(),
            "weight": self.stage.spec.weight,
            "roi": dict(self.roi),
            "camera": self.camera,
            "space": "ip",
            "dim": self.embeddings.shape[1],
            "count": len(self.embeddings),
            "embeddings_sha256": _array_sha256(self.embeddings),
            "entries_sha256": _array_sha256(self.entries),
            "lists": len(self.partition.centroids),
            "centroids_sha256": _array_sha256(self.partition.centroids),
            "lists_sha256": _array_sha256(self.partition.lists),
            "frames": [[f.name, f.rows, f.cols, f.recording] for f in self.frames],
            "recordings": list(self.support.recordings),
            "support": len(self.support.rows),
            "support_sha256": _array_sha256(self.support.rows),
            "build": asdict(self.report),
            "graph": graph_parameters(),
            "search_ef": self.search_ef,
            "limits": dict(self.limits),
        }

    def manifest(self) -> dict[str, Any]:
        """Return the manifest, as far as it is known before files are written."""
        content = self.describe()
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fingerprint": sha256_bytes(canonical_json(content).encode()),
            "content": content,
            "written": {
                "package_version": __version__,
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "sources": [asdict(source) for source in self.sources],
                "stride": self.stride,
                "backbone": self.stage.spec.backbone,
                "segmenter_model": self.segmenter_model,
                "parts": [asdict(part) for part in self.parts],
                "failed": [asdict(source) for source in self.failed],
                "edits": [{"when": e.when, "note": e.note, "source": e.source} for e in self.edits],
            },
        }

    def edits_agree(self) -> bool:
        """Return whether edits and retracted entries agree; undoing relies on it."""
        retracted = np.zeros((0, 5), np.int32) if self.retracted is None else self.retracted.entries
        numbers = [edit.number for edit in self.edits]
        added = [edit for edit in self.edits if edit.kind == ADD]
        total = len(self.embeddings) + len(retracted)
        edits_valid = (
            numbers == sorted(set(numbers))
            and all(edit.number > 0 and edit.entries >= 0 for edit in self.edits)
            and all(edit.kind in (ADD, RETRACT) for edit in self.edits)
            and all((edit.frames > 0) == (edit.entries > 0) for edit in added)
            and not any(edit.frames for edit in self.edits if edit.kind == RETRACT)
            and sum(edit.entries for edit in added) <= total
            and sum(edit.frames for edit in added) <= len(self.frames)
        )
        retracting = (edit for edit in self.edits if edit.kind == RETRACT and edit.entries)
        expected = {edit.number: edit.entries for edit in retracting}
        counts_agree = Counter(retracted[:, 4].tolist()) == expected
        entry_numbers = retracted[:, 3]
        ordered = (np.diff(entry_numbers) > 0).all()
        inside = ((entry_numbers >= 0) & (entry_numbers < total)).all()
        return bool(edits_valid and counts_agree and ordered and inside)


def _array_sha256(array: np.ndarray) -> str:
    return sha256_bytes(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
