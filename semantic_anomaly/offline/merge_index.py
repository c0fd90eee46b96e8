"""Merge index folders into one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from semantic_anomaly.errors import InputError, SourceError
from semantic_anomaly.index.content import FailedSource, RecordedSource
from semantic_anomaly.index.format import manifests_of, read_source, refuse_existing
from semantic_anomaly.index.merge import check_conditions, merge
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.offline.drives import file_of_recording, without_selection

_log = logging.getLogger(__name__)


def merge_indexes(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    force: bool = False,
    max_entries: int | None = None,
    names_agree: bool = False,
    failed: Sequence[FailedSource] = (),
    progress: bool = False,
) -> NominalIndex:
    """Merge indexes of one camera, built with the same settings, into a new one, and write it.

    Every nominal patch that an index covers lies within the largest `dedup_distance` of the indexes
    of an entry of the new one, unless it is full. Recordings keep their entries and support, so
    that one of them can be left out. Calibrations are not merged.

    Args:
        folders: of the indexes; a single one is copied.
        out: folder of the new index.
        force: replace an index in `out`, with its calibrations and edits.
        max_entries: most entries of each stage; None: the largest limit of the indexes.
        names_agree: equal names of recordings in different indexes name the same recording. False:
            files decide where they are known.
        failed: sources that could not be read, for the manifest.
        progress: show a progress bar on a terminal.

    Raises:
        InputError: no indexes, one given twice, or `out` among them.
        SourceError: two indexes were built from the same source.
        IndexFormatError: an index is missing, damaged or of another version.
        IndexMismatchError: indexes differ in stages, backbone, region of interest, camera or
            stride.
        ArtefactError: `out` has an index and `force` is false, or it cannot be written.
    """
    out = Path(out).expanduser()
    paths = [Path(folder).expanduser() for folder in folders]
    if not paths:
        raise InputError("merge: expected indexes, found none")
    refuse_existing(out, force)
    manifests = [manifests_of(path) for path in paths]
    for number, path in enumerate(paths):
        if any(path.samefile(other) for other in paths[:number]):
            raise InputError(f"index '{path}' is given twice")
        if out.exists() and path.samefile(out):
            raise InputError(f"index '{path}': expected another folder for the result")
    check_conditions([str(path) for path in paths], manifests)
    sources = [[read_source(s) for s in m[0]["written"]["sources"]] for m in manifests]
    source_names = _source_names(paths, sources)
    recordings = None if names_agree else _recording_names(sources)
    counts = [[int(stage["content"]["count"]) for stage in m] for m in manifests]
    limits = [[stage["content"]["limits"] for stage in m] for m in manifests]
    distances = _dedup_distances(limits)
    largest = max(int(limit["max_entries"]) for of_part in limits for limit in of_part)
    total = sum(map(sum, counts))
    disable = None if progress else True
    # Entries are read once, and those that are stored are added to the graph.
    with tqdm(total=total, desc="merge", unit="entry", unit_scale=True, disable=disable) as bar:
        left = [len(paths) * len(manifests[0])]

        def advance(entries: int) -> None:
            left[0] -= 1
            bar.update(entries)
            if left[0] == 0:
                bar.set_description("graph")
                bar.reset(total=min(total, (max_entries or largest) * len(manifests[0])))

        index = merge(
            (NominalIndex.load(path) for path in paths),
            count=max(sum(of_stage) for of_stage in zip(*counts, strict=True)),
            max_entries=max_entries or largest,
            dedup_distances=distances,
            recordings=recordings,
            source_names=source_names,
            failed=failed,
            report_progress=advance,
        )
        bar.total = bar.n
    index.save(out, force=force)
    return index


def _dedup_distances(limits: Sequence[Sequence[Mapping[str, Any]]]) -> list[float]:
    """Return the largest distance of each stage, and warn where they differ."""
    largest = []
    for number, of_stage in enumerate(zip(*limits, strict=True)):
        distances = [float(limit["dedup_distance"]) for limit in of_stage]
        largest.append(max(distances))
        if min(distances) < max(distances):
            _log.warning(
                "stage %d: dedup_distance differs, %.4g to %.4g: the merged index has the largest",
                *(number, min(distances), max(distances)),
            )
    return largest


def _source_names(
    paths: Sequence[Path], sources: Sequence[Sequence[RecordedSource]]
) -> list[list[str]]:
    """Return distinct names of the sources of each index.

    Raises:
        SourceError: two indexes have the same source.
    """
    taken: dict[str, str] = {}
    read: dict[Any, Path] = {}
    names = []
    for path, of_part in zip(paths, sources, strict=True):
        new = []
        for source in of_part:
            key = source.opened, source.topic
            if source.opened and key in read:
                raise SourceError(
                    f"source '{source.name}' is in both '{read[key]}' and '{path}'; build one of "
                    "them without it"
                )
            read[key] = path
            name, number = source.name, 2
            while name in taken:
                name, number = f"{source.name} ({number})", number + 1
            taken[name] = name
            new.append(name)
        names.append(new)
    return names


def _recording_names(sources: Sequence[Sequence[RecordedSource]]) -> list[dict[str, str]]:
    """Return new names of the recordings of each index.

    Equal names of different files, such as of bags in folders of different days, become different;
    parts of the same files get the same name.
    """
    files: dict[str, set[Any]] = {}
    renamed = []
    for of_part in sources:
        own: dict[str, set[Any]] = {}
        given: set[str] = set()
        for source in of_part:
            paths = [source.opened] if isinstance(source.opened, str) else source.opened
            title = without_selection(source.name)
            for drive, recording in source.recordings.items():
                keys = {(file_of_recording(path), drive) for path in paths if path}
                own.setdefault(recording, set()).update(keys)
                # Named by `recording_pattern`, or of images in memory.
                if not keys or not recording.startswith(title):
                    given.add(recording)
        new: dict[str, str] = {}
        for recording, keys in own.items():
            same = [name for name, other in files.items() if keys & other]
            name, number = same[0] if same else recording, 2
            while not same and recording not in given and name in files:
                name, number = f"{recording} ({number})", number + 1
            new[recording] = name
        for recording, name in new.items():
            files.setdefault(name, set()).update(own[recording])
        renamed.append(new)
    return renamed
