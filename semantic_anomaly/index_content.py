"""What an index holds, what names it, and whether it belongs to what is running."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np

from semantic_anomaly import __version__
from semantic_anomaly.errors import IndexMismatchError
from semantic_anomaly.identity import EmbedderIdentity
from semantic_anomaly.index_build import GRAPH_SEED, BuildReport, FrameRecord, Selection
from semantic_anomaly.regions import ImageRegion
from semantic_anomaly.settings import Settings
from semantic_anomaly.storage import canonical_json, sha256_bytes

FORMAT = "semantic_anomaly.index"
FORMAT_VERSION = 1


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

    @classmethod
    def of_selection(
        cls,
        selection: Selection,
        identity: EmbedderIdentity,
        region: ImageRegion,
        settings: Settings,
        source: Sequence[str],
        camera: str,
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
        )

    def describe(self) -> dict[str, Any]:
        """Return what the fingerprint is made of: no dates, versions or paths."""
        return {
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


def _array_sha256(array: np.ndarray) -> str:
    return sha256_bytes(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
