"""What an index holds, what names it, and whether it belongs to what is running."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import numpy as np

from semantic_anomaly import __version__
from semantic_anomaly.embedding.identity import EmbedderIdentity
from semantic_anomaly.errors import ArtefactError, IndexMismatchError
from semantic_anomaly.index.build import GRAPH_SEED, BuildReport, FrameRecord, Selection
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.settings import Settings
from semantic_anomaly.storage import canonical_json, sha256_bytes

FORMAT = "semantic_anomaly.index"
FORMAT_VERSION = 2
ADD, RETRACT = "add", "retract"
_PART_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True)
class Edit:
    """A change of an index after it was built, which can be undone.

    Attributes:
        number: names the edit, from 1.
        kind: 'add' or 'retract'.
        entries: how many were added or taken out.
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
        count = self.frames if self.kind == ADD else self.entries
        noun = ("frame" if count == 1 else "frames", "entry" if count == 1 else "entries")
        return f"{self.kind} {count} {noun[self.kind != ADD]}"

    def describe(self) -> list[Any]:
        """Return what of the edit the fingerprint is made of."""
        return [self.number, self.kind, self.entries, self.frames]


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
    """Everything that an index holds, besides the graph made of it.

    Attributes:
        identity: the embedder.
        region: `ImageRegion.describe()` of the camera.
        camera: its name.
        source: names of the sources it was built from.
        embeddings: (count, dim) float32, unit norm.
        entries: (count, 3) int32: frame, row, col.
        frames: the frames that entries point to.
        report: what became of the patches.
        graph: 'm', 'ef_construction', 'seed' of the graph.
        search_ef: breadth of the graph search.
        limits: 'dedup_distance' and 'max_entries' of the build.
        edits: made since the build and not undone, by number.
        retracted: what they took out; None: nothing.
        parts: fingerprints of the parts, by name.
        made: what the embeddings are made with, besides the embedder; empty for patches.
    """

    identity: EmbedderIdentity
    region: Mapping[str, Any]
    camera: str
    source: tuple[str, ...]
    embeddings: np.ndarray
    entries: np.ndarray
    frames: tuple[FrameRecord, ...]
    report: BuildReport
    graph: Mapping[str, int]
    search_ef: int
    limits: Mapping[str, float]
    edits: tuple[Edit, ...] = ()
    retracted: Retracted | None = None
    parts: Mapping[str, str] = field(default_factory=dict)
    made: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_selection(
        cls,
        selection: Selection,
        identity: EmbedderIdentity,
        region: ImageRegion,
        settings: Settings,
        source: Sequence[str],
        camera: str,
        made: Mapping[str, Any] | None = None,
    ) -> IndexContent:
        """Return what a finished selection holds, without the room that it grew into."""
        return cls(
            identity=identity,
            region=region.describe(),
            camera=camera,
            source=tuple(source),
            embeddings=selection.embeddings.copy(),
            entries=selection.entries.copy(),
            frames=tuple(selection.frames),
            report=selection.report,
            graph={
                "m": settings.graph_m,
                "ef_construction": settings.graph_ef_construction,
                "seed": GRAPH_SEED,
            },
            search_ef=settings.search_ef,
            limits={
                "dedup_distance": settings.dedup_distance,
                "max_entries": settings.max_entries,
            },
            made=dict(made or {}),
        )

    @property
    def numbers(self) -> np.ndarray:
        """Return (count,) int64, the entries' numbers: ascending, without the retracted ones."""
        if self.retracted is None:
            return np.arange(len(self.embeddings))
        gone = self.retracted.entries[:, 3].astype(np.int64)
        every = np.arange(len(self.embeddings) + len(gone))
        return np.setdiff1d(every, gone, assume_unique=True)

    def describe(self) -> dict[str, Any]:
        """Return what the fingerprint is made of: no dates, versions or paths."""
        # What is empty is left out: an index whose edits are all undone is the one it was.
        optional: dict[str, Any] = {}
        if self.edits:
            optional["edits"] = [edit.describe() for edit in self.edits]
        if self.retracted is not None:
            optional["retracted"] = {
                "count": len(self.retracted.entries),
                "embeddings_sha256": _array_sha256(self.retracted.embeddings),
                "entries_sha256": _array_sha256(self.retracted.entries),
            }
        if self.parts:
            optional["parts"] = dict(self.parts)
        if self.made:
            optional["made"] = dict(self.made)
        return {
            **optional,
            "identity": self.identity.to_dict(),
            "region": dict(self.region),
            "camera": self.camera,
            "space": "ip",
            "dim": self.embeddings.shape[1],
            "count": len(self.embeddings),
            "embeddings_sha256": _array_sha256(self.embeddings),
            "entries_sha256": _array_sha256(self.entries),
            "frames": [[f.name, f.rows, f.cols] for f in self.frames],
            "build": self.report.to_dict(),
            "graph": dict(self.graph),
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
                "edits": [{"when": e.when, "note": e.note, "source": e.source} for e in self.edits],
            },
        }

    def check_embedder(self, identity: EmbedderIdentity, name: str) -> None:
        """Raise IndexMismatchError where the running embedder's space is another one."""
        found = self.identity.difference(identity)
        if found:
            raise IndexMismatchError(
                f"{name}: {found[0]} of the embedder",
                found[1],
                found[2],
                "use the settings it was built with, or build it again",
            )

    def check_region(self, region: ImageRegion, name: str) -> None:
        """Raise IndexMismatchError where region of interest or ego mask are others."""
        running = region.describe()
        for key in sorted(set(running) | set(self.region)):
            expected, found = self.region.get(key), running.get(key)
            if canonical_json(expected) != canonical_json(found):
                raise IndexMismatchError(f"{name}: {key}", expected, found, "build the index again")


def edits_agree(content: IndexContent) -> bool:
    """Return whether edits and what they took out agree; undoing relies on it."""
    gone = np.zeros((0, 5), np.int32) if content.retracted is None else content.retracted.entries
    numbers = [edit.number for edit in content.edits]
    adds = [edit for edit in content.edits if edit.kind == ADD]
    sound = (
        numbers == sorted({*numbers} - {0})
        and all(n > 0 and e.entries > 0 for n, e in zip(numbers, content.edits, strict=True))
        and all(edit.kind in (ADD, RETRACT) for edit in content.edits)
        and all(edit.frames > 0 if edit.kind == ADD else edit.frames == 0 for edit in content.edits)
        and sum(edit.entries for edit in adds) <= len(content.embeddings) + len(gone)
        and sum(edit.frames for edit in adds) <= len(content.frames)
    )
    taken = {
        int(n): int(c) for n, c in zip(*np.unique(gone[:, 4], return_counts=True), strict=True)
    }
    said = {edit.number: edit.entries for edit in content.edits if edit.kind == RETRACT}
    places = gone[:, 3]
    ordered = (np.diff(places) > 0).all() and (places >= 0).all()
    inside = (places < len(content.embeddings) + len(gone)).all()
    return bool(sound and taken == said and ordered and inside)


def check_part(content: IndexContent, name: str, part: IndexContent) -> None:
    """Refuse an index that cannot be a part of another one, or a name that none can have.

    Raises:
        ArtefactError: a name that is not lower-case letters, digits and underscores, or a part
            with parts.
        IndexMismatchError: another embedder, its dimension aside, or another region.
    """
    check_part_name(name)
    if part.parts:
        raise ArtefactError(f"part '{name}' of an index: expected no parts, found {[*part.parts]}")
    alike = replace(content.identity, dim=part.identity.dim)
    found = alike.difference(part.identity)
    if found:
        raise IndexMismatchError(f"part '{name}' of an index: {found[0]}", found[1], found[2])
    if canonical_json(dict(part.region)) != canonical_json(dict(content.region)):
        raise IndexMismatchError(
            f"part '{name}' of an index: region", dict(content.region), dict(part.region)
        )


def check_part_name(name: str) -> None:
    """Raise ArtefactError for a name that no part can have: it is that of a folder."""
    # 'frames' is the folder of the pictures.
    if not _PART_NAME.fullmatch(name) or name == "frames":
        raise ArtefactError(
            f"part of an index: expected a name of lower-case letters, digits and underscores "
            f"other than 'frames', found '{name}'"
        )


def _array_sha256(array: np.ndarray) -> str:
    return sha256_bytes(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
