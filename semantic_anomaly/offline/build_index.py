"""Build a nominal index from recorded drives."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from semantic_anomaly.embedding.identity import Embedder
from semantic_anomaly.errors import SourceError
from semantic_anomaly.io.sources import FrameSource
from semantic_anomaly.offline.drives import (
    camera_roi,
    embedded_frames,
    given_or_loaded_embedder,
    open_drives,
)
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.settings import Settings

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from semantic_anomaly.index.nominal_index import NominalIndex


def build_index(
    settings: Settings,
    camera: str,
    sources: Sequence[str | Path],
    *,
    topic: str | None = None,
    embedder: Embedder | None = None,
    stride: int = 1,
    progress: bool = True,
) -> NominalIndex:
    """Build the nominal index of a camera from nominal drives, in bounded memory.

    Args:
        settings: backbone, region and how the index is made.
        camera: one of `settings.cameras`.
        sources: folders, videos or bags, each with or without a selection ('drive[0:56]').
        topic: image topic of bags that have several.
        embedder: one already loaded.
        stride: take every so manieth frame.
        progress: show a progress bar on a terminal.

    Raises:
        UnknownNameError: no such camera.
        SourceError: a source has no usable frames.
        SemanticAnomalyError: the backbone cannot be loaded, or what it gives is not finite.
    """
    from semantic_anomaly.index.nominal_index import NominalIndex

    region = camera_roi(settings, camera)
    opened = open_drives(sources, topic)
    if stride < 1:
        raise SourceError(f"stride: expected at least 1, found {stride}")
    embedder, own = given_or_loaded_embedder(settings, embedder)
    try:
        _log_predicted_size(settings, region, opened, embedder, stride)
        frames = (pair for _, pair in embedded_frames(opened, embedder, "index", stride, progress))
        return NominalIndex.build(
            frames,
            identity=embedder.identity,
            region=region,
            settings=settings,
            source=list(opened),
            camera=camera,
            segmenter=embedder.segmenter if settings.segments else None,
        )
    finally:
        if own:
            own.close()


def _log_predicted_size(
    settings: Settings,
    region: ImageRegion,
    sources: dict[str, FrameSource],
    embedder: Embedder,
    stride: int,
) -> None:
    """Say beforehand how large the index may become."""
    from semantic_anomaly.index.nominal_index import NominalIndex

    image_hw = next(iter(next(iter(sources.values())))).image_hw
    patches = int(region.patch_mask(embedder.grid_hw(image_hw), image_hw).sum())
    dim = embedder.identity.dim
    counts = [source.count for source in sources.values()]
    most = NominalIndex.predicted_bytes(settings.max_entries, dim, settings.graph_m)
    text = f"predicted size: at most {most / 1e6:.0f} MB ({settings.max_entries} entries)"
    if all(count is not None for count in counts):
        frames = sum(-(-(count or 0) // stride) for count in counts)
        every = NominalIndex.predicted_bytes(frames * patches, dim, settings.graph_m)
        text += (
            f"; {every / 1e6:.0f} MB if every patch of the {frames} frames were stored "
            f"({patches} a frame)"
        )
    _log.info("%s", text)
