"""Build a nominal index from recorded drives."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from semantic_anomaly.embedding.identity import Embedder
from semantic_anomaly.errors import ArtefactError, CalibrationError, SourceError
from semantic_anomaly.index.format import refuse_existing
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.sources import FrameSource
from semantic_anomaly.linalg import inner_products
from semantic_anomaly.offline.calibrate import calibrate
from semantic_anomaly.offline.drives import (
    EmbeddedFrame,
    KeptFrames,
    Sources,
    camera_roi,
    embedded_frames,
    frame_total,
    open_drives,
    recorded_sources,
    recordings_of,
    sample_images,
    settings_of,
)
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.segmentation.embedder import RunningEmbedder
from semantic_anomaly.settings import Settings
from semantic_anomaly.storage import refuse_unwritable
from semantic_anomaly.structures import Frame, PatchGrid

_SAMPLE_PATCHES = 256
# Estimate of a JPEG of 320 pixels.
_THUMBNAIL_BYTES = 10_000
_log = logging.getLogger(__name__)


def build_index(
    sources: Sources,
    *,
    settings: Settings | None = None,
    camera: str = "camera",
    out: str | Path | None = None,
    force: bool = False,
    topic: str | None = None,
    embedder: Embedder | None = None,
    stride: int = 1,
    calibrated: bool = False,
    progress: bool = False,
    **overrides: Any,
) -> NominalIndex:
    """Build the nominal index of a camera from nominal drives, in bounded memory.

    Precision and execution that are not set are chosen by measurement, and recorded in the index.

    Example:
        >>> index = build_index("drives/nominal", backbone="dinov2_small", out="index")

    Args:
        sources: folders, videos, bags, image files or RGB arrays; see `open_drives`.
        settings: None: all defaults.
        camera: one of the cameras of the settings.
        out: folder to which the index is written; None: it is not written.
        force: replace an index in `out`, with its calibrations and edits.
        topic: image topic of bags that have several.
        embedder: already loaded; None: loaded from the settings.
        stride: use every stride-th frame.
        calibrated: calibrate the index in `out` too, by leaving one drive out; frames that fit into
            memory are not embedded again.
        progress: show a progress bar on a terminal.
        **overrides: values of single settings, such as `backbone` or `input_size`.

    Raises:
        UnknownNameError: no such camera or setting.
        SourceError: a source has no usable frames.
        CalibrationError: `calibrated` without `out`, or with fewer than two drives.
        ArtefactError: `out` has an index and `force` is false, or it cannot be written.
        SemanticAnomalyError: the backbone cannot be loaded, or returns values that are not finite.
    """
    if stride < 1:
        raise SourceError(f"stride: expected at least 1, found {stride}")
    if out is not None:
        # Before the work rather than after it.
        refuse_existing(Path(out).expanduser(), force)
        refuse_unwritable(Path(out))
    given = settings_of(settings, overrides)
    settings = given.with_build_defaults()
    roi = camera_roi(settings, camera)
    drives = open_drives(sources, topic)
    recordings = recordings_of(drives, settings.recording_pattern)
    if calibrated and (out is None or len(set(recordings.values())) < 2):
        raise CalibrationError(
            f"calibrated: expected an index folder and at least 2 drives, found {out} and "
            f"{len(set(recordings.values()))}"
        )
    kept = KeptFrames()
    with ExitStack() as stack:
        if embedder is None:
            # Other commands import no torch.
            from semantic_anomaly.embedding.precision import choose_precision

            settings = choose_precision(settings, sample_images(drives), median_distances)
            embedder = stack.enter_context(closing(RunningEmbedder.from_settings(settings)))
        _check_predicted_size(settings, roi, drives, embedder, stride, out)
        frames = embedded_frames(
            drives,
            embedder,
            recordings=recordings,
            stride=stride,
            description="index",
            progress=progress,
        )
        index = NominalIndex.build(
            _keeping(frames, kept if calibrated else None),
            stages=embedder.stages,
            roi=roi,
            settings=settings,
            sources=recorded_sources(drives, recordings),
            stride=stride,
            camera=camera,
        )
        if out is not None:
            index.save(Path(out), force=force)
        if calibrated:
            # Episodes need every frame.
            if settings.target_episode_rate and stride > 1:
                kept = KeptFrames()
            common: dict[str, Any] = {"camera": camera, "embedder": embedder, "kept": kept}
            calibrate(index, settings=given, out=out, progress=progress, **common)
    return index


def _keeping(
    frames: Iterable[tuple[str, FrameSource, Frame, PatchGrid]], kept: KeptFrames | None
) -> Iterator[tuple[Frame, PatchGrid]]:
    """Yield frames and embeddings, and keep what fits."""
    number = 0
    sources: list[FrameSource] = []
    for number, (drive, source, frame, grid) in enumerate(frames, start=1):
        if kept is not None:
            if not sources or sources[-1] is not source:
                sources.append(source)
            position = drive, frame.recording, number - 1, frame.stamp_ns
            kept.offer(EmbeddedFrame(*position, grid, len(sources) - 1))
        yield frame, grid
    if kept is not None:
        kept.are_all = len(kept.frames) == number


def median_distances(grids: Sequence[PatchGrid]) -> list[float]:
    """Return the median distance by stage of some patches to the nearest of the other frames.

    Before there is an index, a few frames stand for it.
    """
    rng = np.random.default_rng(0)
    medians = []
    for number in range(len(grids[0].stages)):
        frames = [
            grid.stages[number].features.reshape(-1, grid.stages[number].dim) for grid in grids
        ]
        distances = [0.0]
        for frame, rows in enumerate(frames):
            others = frames[:frame] + frames[frame + 1 :]
            if others:
                some = rng.choice(len(rows), min(len(rows), _SAMPLE_PATCHES), replace=False)
                similarities = inner_products(rows[some], np.concatenate(others).T)
                distances += (1 - similarities.max(axis=1)).tolist()
        medians.append(float(np.median(distances)))
    return medians


def _check_predicted_size(
    settings: Settings,
    roi: RegionOfInterest,
    drives: Mapping[str, FrameSource],
    embedder: Embedder,
    stride: int,
    out: str | Path | None,
) -> None:
    """Log how large the index may become, and compare it with the free space of the disk.

    Raises:
        ArtefactError: the disk has no space for the thumbnails.
    """
    image_hw = next(iter(next(iter(drives.values())))).image_hw
    patches = [
        int(roi.patch_mask(grid_hw, image_hw).sum()) for grid_hw in embedder.grids_hw(image_hw)
    ]
    dims = [stage.embedder.dim for stage in embedder.stages]
    largest = sum(NominalIndex.predicted_bytes(settings.max_entries, dim) for dim in dims)
    text = (
        f"predicted size: at most {largest / 1e6:.0f} MB ({settings.max_entries} entries"
        f"{' of each stage' * (len(dims) > 1)})"
    )
    frames = frame_total(drives, stride)
    if frames is not None:
        every = sum(
            NominalIndex.predicted_bytes(frames * count, dim)
            for count, dim in zip(patches, dims, strict=True)
        )
        text += (
            f"; {every / 1e6:.0f} MB if all patches of the {frames} frames were stored "
            f"({sum(patches)} per frame)"
        )
        largest = min(largest, every) + frames * _THUMBNAIL_BYTES
    _log.info("%s", text)
    if out is None:
        return
    refuse_unwritable(Path(out), (frames or 0) * _THUMBNAIL_BYTES)
    try:
        refuse_unwritable(Path(out), largest)
    except ArtefactError as error:
        _log.warning("the disk may become full, depending on how many patches are alike: %s", error)
