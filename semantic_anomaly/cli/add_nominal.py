"""Add nominal frames to an index, to remove false alarms."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from semantic_anomaly.cli.edits import after_rows, numbers
from semantic_anomaly.cli.options import add_detector_options, settings_of
from semantic_anomaly.cli.tables import report_losses, table
from semantic_anomaly.errors import CalibrationError, InputError, SourceError

if TYPE_CHECKING:
    from semantic_anomaly.index.nominal_index import NominalIndex
    from semantic_anomaly.io.sources import FrameSource
    from semantic_anomaly.structures import Frame


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly add-nominal`."""
    parser.add_argument("index", type=Path, metavar="INDEX", help="folder of the index")
    parser.add_argument("source", metavar="SOURCE", help="folder of images, video or rosbag2 bag")
    parser.add_argument(
        "--frames", metavar="12,15-20", help="frames of the source, counted from 0; default: all"
    )
    parser.add_argument("--note", default="", metavar="TEXT", help="why, kept with the edit")
    add_detector_options(parser)


def run(args: argparse.Namespace) -> int:
    """Embed the frames and add them as one edit."""
    from semantic_anomaly.detection.detector import load_embedder, resolve_roi, resolve_settings
    from semantic_anomaly.index import edits as index_edits
    from semantic_anomaly.index.nominal_index import NominalIndex
    from semantic_anomaly.offline.edit_index import save_edited
    from semantic_anomaly.storage import folder_bytes, refuse_unwritable

    settings, camera = settings_of(args, args.index)
    source, first = _opened(args)
    index = NominalIndex.load(args.index)
    refuse_unwritable(args.index, folder_bytes(args.index))
    given = settings
    settings = resolve_settings(settings, index)
    roi = resolve_roi(settings.camera_settings[camera], index, None)
    index.check_roi(roi)
    chosen = list(_chosen(args, source, first, index))
    if not chosen:
        raise SourceError(f"source '{source.path}': expected frames, found bad ones only")
    embedder = load_embedder(settings, given)
    try:
        index.check_embedder(embedder.stages)
        frames = ((frame, embedder.embed([frame.image])[0]) for frame in chosen)
        edited, report = index_edits.add_nominal(
            index, frames, roi=roi, source=args.source, note=args.note
        )
    finally:
        embedder.close()
    calibration = save_edited(args.index, index, edited)
    rows = [
        ("edit", f"{edited.edits[-1].number}: {edited.edits[-1].what}"),
        ("embeddings seen", f"{report.seen}"),
        ("added", f"{report.stored}"),
        ("suppressed as near-duplicates", f"{report.suppressed}"),
        ("dropped, index full", f"{report.dropped}"),
    ]
    print(table([*rows, *after_rows(edited, calibration)]))
    return report_losses([source])


def _wanted(args: argparse.Namespace) -> set[int] | None:
    return None if args.frames is None else set(numbers("--frames", args.frames))


def _opened(args: argparse.Namespace) -> tuple[FrameSource, int]:
    """Return the source from the first wanted frame to the last, and the number of the first."""
    from semantic_anomaly.io.open import open_source, split_selection
    from semantic_anomaly.io.sources import MAX_BAD_SHARE

    wanted = _wanted(args)
    path, selection = split_selection(args.source)
    if wanted is not None and selection != slice(None):
        raise InputError("--frames: expected a SOURCE without [START:STOP], found both")
    part = f"{path}[{min(wanted)}:{max(wanted) + 1}]" if wanted else args.source
    source = open_source(part, topic=args.topic)
    source.max_bad_share = MAX_BAD_SHARE
    return source, min(wanted) if wanted else 0


def _chosen(
    args: argparse.Namespace, source: FrameSource, first: int, index: NominalIndex
) -> Iterator[Frame]:
    from semantic_anomaly.calibration.leakage import refuse_seen
    from semantic_anomaly.io.sources import BadFrame
    from semantic_anomaly.offline.drives import BlindFrames, recorded_recording

    wanted, read, blind_frames = _wanted(args), set(), BlindFrames(args.source)
    for number, frame in enumerate(source.read(), start=first):
        if wanted is not None and number not in wanted:
            continue
        read.add(number)
        if isinstance(frame, BadFrame):
            continue
        try:
            refuse_seen(index, frame)
        except CalibrationError:
            raise InputError(f"frame '{frame.name}': the index was built from it already") from None
        blind_frames.add(frame)
        drive = source.drive_of(frame)
        recording = recorded_recording(index.content.sources, source, drive)
        yield replace(frame, recording=recording or "")
    if missing := sorted((wanted or set()) - read):
        raise SourceError(f"source '{source.path}': frame {missing[0]}: there is no such frame")
    blind_frames.warn()
