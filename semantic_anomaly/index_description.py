"""What an index says of itself, and whether it belongs to what is running."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from semantic_anomaly.graph_file import predicted_graph_bytes
from semantic_anomaly.identity import EmbedderIdentity
from semantic_anomaly.images import decode_compressed
from semantic_anomaly.index_build import BuildReport
from semantic_anomaly.index_content import Edit, IndexContent
from semantic_anomaly.regions import ImageRegion


class DescribedIndex:
    """What an index says of itself; made by `NominalIndex` alone."""

    _content: IndexContent
    _manifest: dict[str, Any]
    _folder: Path | None

    @property
    def content(self) -> IndexContent:
        """Return all that it holds, besides the graph; not to be changed."""
        return self._content

    @property
    def identity(self) -> EmbedderIdentity:
        """Return the embedder that made the entries."""
        return self._content.identity

    @property
    def region_description(self) -> dict[str, Any]:
        """Return `ImageRegion.describe()` of the build."""
        return dict(self._content.region)

    @property
    def camera(self) -> str:
        """Return the name of the camera."""
        return self._content.camera

    @property
    def fingerprint(self) -> str:
        """Return the digest of the content; equal builds have equal ones."""
        return str(self._manifest["fingerprint"])

    @property
    def manifest(self) -> dict[str, Any]:
        """Return the manifest; it names files and digests once the index was saved."""
        return self._manifest

    @property
    def report(self) -> BuildReport:
        """Return what became of the patches that it was built from."""
        return self._content.report

    @property
    def edits(self) -> tuple[Edit, ...]:
        """Return the edits since the build that are not undone."""
        return self._content.edits

    @property
    def count(self) -> int:
        """Return the number of entries."""
        return len(self._content.embeddings)

    @property
    def dim(self) -> int:
        """Return the length of an embedding."""
        return int(self._content.embeddings.shape[1])

    @property
    def frame_names(self) -> tuple[str, ...]:
        """Return the names of the frames that contributed entries."""
        return tuple(frame.name for frame in self._content.frames)

    def thumbnail(self, frame_name: str) -> np.ndarray | None:
        """Return (height, width, 3) uint8 RGB of a contributing frame, or None."""
        for frame in self._content.frames:
            if frame.name == frame_name:
                return decode_compressed(frame.thumbnail, "jpeg")
        return None

    def check_embedder(self, identity: EmbedderIdentity) -> None:
        """Raise IndexMismatchError where the running embedder's space is another one."""
        self._content.check_embedder(identity, self._name)

    def check_region(self, region: ImageRegion) -> None:
        """Raise IndexMismatchError where region of interest or ego mask are others."""
        self._content.check_region(region, self._name)

    @staticmethod
    def predicted_bytes(count: int, dim: int, m: int) -> int:
        """Return about how many bytes an index takes on disk, thumbnails and manifest aside."""
        return predicted_graph_bytes(count, dim, m) + count * (4 * dim + 12)

    @property
    def _name(self) -> str:
        return f"index '{self._folder}'" if self._folder else "index"
