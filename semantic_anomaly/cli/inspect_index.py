"""Check an index folder and print what it contains."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from semantic_anomaly.cli.options import positive
from semantic_anomaly.cli.tables import drives_listed, folder_size, listed, table

if TYPE_CHECKING:
    from semantic_anomaly.calibration.calibration import Calibration
    from semantic_anomaly.index.nominal_index import NominalIndex

_RECALL_QUERIES = 2000
_EDIT_COLUMNS = ("edit", "kind", "when (UTC)", "entries", "frames", "source", "note")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly inspect-index`."""
    parser.add_argument("index", type=Path, metavar="INDEX", help="folder of the index")
    parser.add_argument(
        "--recall", action="store_true", help="compare the graph search with the exact one"
    )
    parser.add_argument(
        "--neighbours", type=positive, default=1, metavar="K", help="for --recall (default 1)"
    )


def run(args: argparse.Namespace) -> int:
    """Check everything that an index folder holds and print a summary."""
    from semantic_anomaly.index.nominal_index import NominalIndex
    from semantic_anomaly.offline.edit_index import calibrations_of

    folder = args.index.expanduser()
    index = NominalIndex.load(folder)
    # The graph is read and checked only when it is used.
    index.configure_search("graph", index.content.search_ef)
    calibrations = calibrations_of(folder, index.fingerprint)
    print(table(_index_rows(folder, index)))
    for number, stage in enumerate(index.stages):
        print(f"\nstage {number}")
        print(table(_stage_rows(stage)))
    if index.edits:
        rows = [
            (f"{e.number}", e.kind, e.when[:19], f"{e.entries}", f"{e.frames}", e.source, e.note)
            for e in index.edits
        ]
        print("\nedits")
        print(table(rows, _EDIT_COLUMNS))
    if not calibrations:
        print("\n" + table([("calibration", "none; decisions will be 'unknown'")]))
    for calibration in calibrations:
        print("\n" + table(_calibration_rows(calibration)))
    if args.recall:
        for number, stage in enumerate(index.stages):
            recall = stage.recall(_RECALL_QUERIES, args.neighbours)
            print(f"\nstage {number}: graph search against the exact one")
            print(table([(k.replace("_", " "), f"{value:.6g}") for k, value in recall.items()]))
    return 0


def _index_rows(folder: Path, index: NominalIndex) -> list[tuple[str, str]]:
    written = index.manifest["written"]
    drives = Counter(name.rpartition("/")[0] for name in index.frame_names)
    polygon = index.roi_description["polygon_xy"]
    mask = index.roi_description["ego_mask_sha256"]
    whole = "whole image" if not polygon and not mask else ""
    change = "last edited" if index.edits else "built"
    return [
        ("index", f"{folder}"),
        ("fingerprint", index.fingerprint[:16]),
        (change, f"{written['created']} by version {written['package_version']}"),
        ("size on disk", folder_size(folder)),
        ("camera", index.camera),
        ("region of interest", whole or ", ".join(
            [*[f"polygon of {len(polygon)} corners"] * bool(polygon), *["ego mask"] * bool(mask)]
        )),
        ("sources", listed([source.name for source in index.content.sources])),
        ("frames", f"{index.report.frames} read, {len(index.frame_names)} contributed: "
         + drives_listed(drives.items())),
        *([("merged from", f"{len(index.content.parts)} indexes")] if index.content.parts else []),
        *(("not readable", f"{s.name}: {s.reason}") for s in index.content.failed),
    ]  # fmt: skip


def _stage_rows(index: NominalIndex) -> list[tuple[str, str]]:
    stage, report, limits = index.stage, index.report, index.content.limits
    embedder, segmenter = stage.embedder, stage.segmenter
    rows = [
        ("stage", f"{stage.spec}"),
        ("entries", f"{index.count} of dimension {index.dim}"),
        ("backbone", f"{embedder.model_id} ({embedder.architecture}), hidden state "
         f"{embedder.layer}"),
        ("weights", f"sha256 {embedder.weights_sha256[:16]}"),
        ("computed", f"in {embedder.dtype} by {embedder.execution}"),
        ("input", f"long side {embedder.input_size} px, grid of {embedder.patch_px} px"),
        ("embeddings", f"{report.seen} seen, {report.suppressed} suppressed as nearer than "
         f"{limits['dedup_distance']:g}, {report.dropped} dropped at {limits['max_entries']} "
         "entries"),
    ]  # fmt: skip
    if segmenter is not None:
        rows.append(("segmenter", f"{segmenter.family} {segmenter.model_id}".strip()))
    return rows


def _calibration_rows(calibration: Calibration) -> list[tuple[str, str]]:
    return [
        ("calibration of camera", calibration.camera),
        ("created", calibration.created or "unknown"),
        ("threshold", f"{calibration.threshold:.4f}"),
        ("target rate", f"{calibration.target_false_alarm_rate:g}"),
        ("nominal frames", f"{calibration.count}"),
        ("drives", drives_listed(calibration.frames_by_drive.items())),
        ("promise", calibration.promise),
        *((name, f"{value}") for name, value in calibration.scoring.items()),
        *_episode_rows(calibration),
        *(("warning", sentence) for sentence in calibration.warnings),
    ]


def _episode_rows(calibration: Calibration) -> list[tuple[str, str]]:
    episodes = calibration.episodes
    if episodes is None:
        return []
    rate = episodes.target_episode_rate
    threshold = episodes.threshold_for(rate, calibration.confidence)
    count = f"{episodes.count} of {episodes.episode_s:g} s, target {rate:g}"
    return [("threshold of episodes", f"{threshold:.4f}"), ("nominal episodes", count)]
