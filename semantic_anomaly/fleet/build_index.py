"""Build an index on a cluster: one shard per source, merged in a tree."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semantic_anomaly.embedding.identity import Embedder
from semantic_anomaly.errors import CalibrationError, SourceError
from semantic_anomaly.evaluation.provenance import files_state
from semantic_anomaly.fleet.calibrate import FleetCalibration, calibrate_on_cluster
from semantic_anomaly.fleet.cluster import Cluster, connected, on_nodes
from semantic_anomaly.fleet.shards import Shards, open_shards, read_values, write_values
from semantic_anomaly.fleet.sources import open_on_node, open_readable
from semantic_anomaly.index.build import MEASURED_FRAMES
from semantic_anomaly.index.content import FailedSource
from semantic_anomaly.index.format import refuse_existing
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.sources import FrameSource
from semantic_anomaly.offline.build_index import median_distances
from semantic_anomaly.offline.drives import (
    camera_roi,
    drive_name,
    embedded_frames,
    recorded_sources,
    recordings_of,
    sample_images,
)
from semantic_anomaly.offline.merge_index import merge_indexes
from semantic_anomaly.settings import Settings, setting_specs

# Indexes that one task merges: shards of a fleet are merged on many nodes at once.
FAN_IN = 8
# Settings that do not change what a shard holds.
_NOT_COMPARED = ("device", "threads", "dedup_distance")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FleetBuild:
    """An index built on a cluster.

    Attributes:
        index: as written.
        ran: sources that tasks have read; the shards of the others were finished before.
        losses: what sources left out, one sentence each.
        calibration: as written; None where none was asked for.
    """

    index: NominalIndex
    ran: int
    losses: tuple[str, ...]
    calibration: FleetCalibration | None = None


def build_index_on_cluster(
    sources: Sequence[str],
    *,
    address: str,
    shards: str | Path,
    out: str | Path,
    settings: Settings,
    camera: str = "camera",
    force: bool = False,
    topic: str | None = None,
    stride: int = 1,
    calibrated: bool = False,
    num_gpus: float = 0.0,
    progress: bool = False,
) -> FleetBuild:
    """Build the nominal index of a camera on a Ray cluster, one task per source.

    The index covers what that of `build_index` covers: every nominal patch lies within
    `dedup_distance` of an entry. Precision, execution and a `dedup_distance` of -1 are measured
    once, on the first source, and hold for all. A source that cannot be read is named in the
    manifest. The same call again reads only the sources whose shards are missing.

    Args:
        sources: folders, videos, bags or lists, on storage that all nodes share.
        address: of the cluster, or 'local': one is started on this machine.
        shards: folder on storage that all nodes share.
        out: folder to which the index is written.
        settings, camera, force, topic, stride, calibrated, progress: as in `build_index`.
        num_gpus: GPUs of each task, may be a part of one.

    Raises:
        SourceError: a source does not exist, is given twice, or none can be read.
        CalibrationError: `calibrated` with fewer than two drives.
        ClusterError: the cluster does not answer, or its nodes cannot do the work.
        TaskError: a task was lost again and again.
        ArtefactError: `out` has an index and `force` is false, or something cannot be written.
        MissingPackageError: Ray is not installed.
    """
    out = Path(out).expanduser()
    refuse_existing(out, force)
    drives, failed = open_readable(sources, topic)
    given = settings
    settings = on_nodes(settings.with_build_defaults(), num_gpus)
    recordings = recordings_of(drives, settings.recording_pattern)
    if calibrated and len(set(recordings.values())) < 2:
        raise CalibrationError("calibrated: expected at least 2 drives, found 1")
    with (
        open_shards(Path(shards)) as finished,
        connected(address, finished.folder, num_gpus) as cluster,
    ):
        common = {"camera": camera, "stride": stride}
        requests: list[dict[str, Any]] = [
            {
                **{"name": name, "opened": source.opened, "topic": source.topic},
                "recordings": {d: recordings[d] for d in _drive_names(name, source)},
                **common,
            }
            for name, source in drives.items()
        ]
        roi = camera_roi(settings, camera).describe()
        settings, distances = _measured(finished, cluster, requests, settings, roi)
        parameters = settings.to_parameters()
        folders = [
            finished.path(
                "shard",
                {
                    **request,
                    **{"settings": _compared(settings), "dedup_distances": distances, "roi": roi},
                    "files": files_state(*source.paths),
                },
            )
            for request, source in zip(requests, drives.values(), strict=True)
        ]
        missing = [number for number, folder in enumerate(folders) if not folder.exists()]
        if len(missing) < len(folders):
            _log.info("%d of %d shards are finished", len(folders) - len(missing), len(folders))
        outcomes = cluster.run(
            build_shard,
            [
                {
                    "request": requests[number],
                    "parameters": parameters,
                    "dedup_distances": distances,
                    "folder": str(folders[number]),
                }
                for number in missing
            ],
            [requests[number]["name"] for number in missing],
            description="shards",
            progress=progress,
        )
        unreadable = {
            requests[missing[number]]["name"]: outcome.unreadable
            for number, outcome in outcomes
            if outcome.unreadable
        }
        for name, reason in unreadable.items():
            _log.warning("source '%s' is left out: %s", name, reason)
        failed += [FailedSource(name, unreadable[name]) for name in drives if name in unreadable]
        kept = [
            folder
            for request, folder in zip(requests, folders, strict=True)
            if request["name"] not in unreadable
        ]
        if not kept:
            raise SourceError(f"no source can be read; the first one: {failed[0].reason}")
        losses = [(read_values(_losses_file(folder)) or {}).get("losses", "") for folder in kept]
        index = merge_indexes(
            _merged_in_tree(kept, finished, cluster, settings.max_entries, progress),
            out,
            force=force,
            max_entries=settings.max_entries,
            names_agree=True,
            failed=failed,
            progress=progress,
        )
    calibration = None
    if calibrated:
        calibration = calibrate_on_cluster(
            out,
            address=address,
            shards=shards,
            settings=given,
            camera=camera,
            num_gpus=num_gpus,
            progress=progress,
        )
        calibration.calibration.save(out)
    return FleetBuild(index, len(missing), tuple(filter(None, losses)), calibration)


def build_shard(
    request: Mapping[str, Any],
    parameters: Mapping[str, Any],
    dedup_distances: Sequence[float],
    folder: str,
) -> None:
    """Build and write the index of one source; a task.

    Args:
        request: name, opened, topic, recordings, camera and stride.
        parameters: all settings.
        dedup_distances: of each stage.
        folder: of the shard.

    Raises:
        SourceError, ImageError: the source is damaged.
        StorageError: this node does not see it.
    """
    path = Path(folder)
    # Another attempt at this task may have finished it before its node was lost.
    if path.exists():
        return
    settings = Settings.from_parameters(parameters)
    drives = {request["name"]: open_on_node(request["opened"], request["topic"])}
    embedder = _load_embedder(settings)
    with closing(embedder):
        index = _index_of(request, settings, drives, embedder, None, dedup_distances)
    # Before the index: its folder says that the shard is finished.
    write_values(_losses_file(path), {"losses": drives[request["name"]].losses})
    index.save(path, force=True)


def measure(request: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return precision, execution and `dedup_distances` of the stages, measured on a source."""
    from semantic_anomaly.embedding.precision import choose_precision

    settings = Settings.from_parameters(parameters)
    drives = {request["name"]: open_on_node(request["opened"], request["topic"])}
    settings = choose_precision(settings, sample_images(drives), median_distances)
    embedder = _load_embedder(settings)
    with closing(embedder):
        index = _index_of(request, settings, drives, embedder, MEASURED_FRAMES, None)
    distances = [float(stage.content.limits["dedup_distance"]) for stage in index.stages]
    return {
        "dtype": settings.dtype,
        "execution": settings.execution,
        "dedup_distances": distances,
    }


def merge_group(folders: Sequence[str], out: str, max_entries: int) -> None:
    """Merge some shards into one; a task."""
    if not Path(out).exists():
        merge_indexes(folders, out, force=True, max_entries=max_entries, names_agree=True)


def _index_of(
    request: Mapping[str, Any],
    settings: Settings,
    drives: Mapping[str, FrameSource],
    embedder: Embedder,
    most_frames: int | None,
    dedup_distances: Sequence[float] | None,
) -> NominalIndex:
    frames = embedded_frames(
        drives, embedder, recordings=request["recordings"], stride=request["stride"]
    )
    return NominalIndex.build(
        ((frame, grid) for _, _, frame, grid in itertools.islice(frames, most_frames)),
        stages=embedder.stages,
        roi=camera_roi(settings, request["camera"]),
        settings=settings,
        sources=recorded_sources(drives, request["recordings"]),
        stride=request["stride"],
        camera=request["camera"],
        dedup_distances=dedup_distances,
    )


def _load_embedder(settings: Settings) -> Any:
    from semantic_anomaly.segmentation.embedder import RunningEmbedder

    return RunningEmbedder.from_settings(settings)


def _measured(
    shards: Shards,
    cluster: Cluster,
    requests: Sequence[Mapping[str, Any]],
    settings: Settings,
    roi: Mapping[str, Any],
) -> tuple[Settings, list[float]]:
    """Return settings with precision and execution, and `dedup_distances`, equal for all shards.

    They are measured once and kept with the shards: another measurement would differ.
    """
    stages = len(settings.stage_specs)
    if "auto" not in (settings.dtype, settings.execution) and settings.dedup_distance >= 0:
        return settings, [settings.dedup_distance] * stages
    common = {key: requests[0][key] for key in ("camera", "stride")}
    key = {"settings": _compared(settings), "dedup_distance": settings.dedup_distance, "roi": roi}
    path = shards.path("measured", {**key, **common}).with_suffix(".json")
    values = read_values(path)
    reasons = []
    parameters = settings.to_parameters()
    for request in requests:
        if values is not None:
            break
        task = {"request": request, "parameters": parameters}
        [(_, outcome)] = cluster.run(measure, [task], [request["name"]], description="measure")
        values = outcome.value
        reasons.append(outcome.unreadable)
    if values is None:
        raise SourceError(f"no source can be read; the first one: {reasons[0]}")
    write_values(path, values)
    settings = settings.replace(dtype=values["dtype"], execution=values["execution"])
    return settings, [float(distance) for distance in values["dedup_distances"]]


def _merged_in_tree(
    folders: Sequence[Path], shards: Shards, cluster: Cluster, max_entries: int, progress: bool
) -> Sequence[Path]:
    """Return at most `FAN_IN` indexes of all shards; groups are merged by tasks."""
    while len(folders) > FAN_IN:
        groups = [list(map(str, folders[i : i + FAN_IN])) for i in range(0, len(folders), FAN_IN)]
        names = [[Path(folder).name for folder in group] for group in groups]
        merged = [shards.path("merged", {"of": n, "max_entries": max_entries}) for n in names]
        tasks = [
            {"folders": group, "out": str(path), "max_entries": max_entries}
            for group, path in zip(groups, merged, strict=True)
        ]
        missing = [number for number, path in enumerate(merged) if not path.exists()]
        for _ in cluster.run(
            merge_group,
            [tasks[number] for number in missing],
            [merged[number].name for number in missing],
            description="merge",
            on_gpu=False,
            progress=progress,
        ):
            pass
        folders = merged
    return folders


def _losses_file(shard: Path) -> Path:
    """Return the file beside a shard that says what its source left out."""
    return shard.with_suffix(".json")


def _compared(settings: Settings) -> dict[str, Any]:
    specs = setting_specs()
    return {
        name: value
        for name, value in settings.to_parameters().items()
        if name in specs and not specs[name].live and name not in _NOT_COMPARED
    }


def _drive_names(name: str, source: FrameSource) -> list[str]:
    return [drive_name(name, source, drive) for drive in source.drives]
