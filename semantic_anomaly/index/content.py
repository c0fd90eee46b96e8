"""What an index holds, and the manifest and fingerprint made of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np

from semantic_anomaly import __version__
from semantic_anomaly.embedding.identity import StageIdentity
from semantic_anomaly.index.build import BuildReport, FrameRecord
from semantic_anomaly.index.hnsw import graph_parameters
from semantic_anomaly.storage import canonical_json, sha256_bytes

FORMAT = "semantic_anomaly.index"
FORMAT_VERSION = 3
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


@dataclass(frozen=True, eq=False)
class IndexContent:
    """Everything that one stage of an index holds, besides the graph made of it.

    Attributes:
        stage: how its embeddings are made; the fingerprint depends neither on the backbone's name
            in the settings nor on that of the segmenter's model.
        roi: `RegionOfInterest.describe()` of the camera.
        camera: its name.
        source: names of the sources it was built from.
        segmenter_model: of the settings of the build; empty without.
        embeddings: (count, dim) float32, unit norm.
        entries: (count, 3) int32: frame, row, col.
        frames: the frames that entries point to.
        report: what became of the embeddings.
        search_ef: breadth of the graph search.
        limits: 'dedup_distance' and 'max_entries' of the build.
        edits: made since the build and not undone, by number; all stages have the same.
        retracted: entries that edits took out; None: no entries.
        further: of the first stage, fingerprints of the further ones.
    """

    stage: StageIdentity
    roi: Mapping[str, Any]
    camera: str
    source: tuple[str, ...]
    segmenter_model: str
    embeddings: np.ndarray
    entries: np.ndarray
    frames: tuple[FrameRecord, ...]
    report: BuildReport
    search_ef: int
    limits: Mapping[str, float]
    edits: tuple[Edit, ...] = ()
    retracted: Retracted | None = None
    further: tuple[str, ...] = ()

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
            "frames": [[f.name, f.rows, f.cols] for f in self.frames],
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
                "source": list(self.source),
                "backbone": self.stage.spec.backbone,
                "segmenter_model": self.segmenter_model,
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
