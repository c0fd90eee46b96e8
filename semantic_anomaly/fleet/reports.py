"""Evaluate datasets and replay drives on a cluster: one task and one report per source."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semantic_anomaly.errors import SourceError
from semantic_anomaly.fleet.cluster import connected
from semantic_anomaly.fleet.shards import open_shards, read_values, write_values
from semantic_anomaly.fleet.sources import open_on_node, refuse_missing
from semantic_anomaly.settings import Settings
from semantic_anomaly.storage import sha256_file

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FleetReports:
    """Reports written on a cluster.

    Attributes:
        finished: names of the sources with a report, in order.
        ran: names of those that tasks have read; the reports of the others were finished before.
        losses: what sources left out, by name.
        unreadable: why sources cannot be read, by name.
    """

    finished: tuple[str, ...]
    ran: tuple[str, ...]
    losses: Mapping[str, str]
    unreadable: Mapping[str, str]


def reports_on_cluster(
    task: Callable[..., str],
    requests: Mapping[str, Mapping[str, Any]],
    *,
    keys: Mapping[str, str],
    folders: Mapping[str, Path],
    summary: str,
    address: str,
    shards: Path,
    num_gpus: float = 0.0,
    progress: bool = False,
) -> FleetReports:
    """Write one report per source on a Ray cluster.

    The same call again reads only the sources whose reports are missing, changed or interrupted.

    Args:
        task: `evaluate_dataset` or `replay_drive`.
        requests: its arguments besides `out`, by name of the source.
        keys: digests of the files that the arguments name, by name of the source.
        folders: of the reports, by name, on storage that all nodes share.
        summary: file that a finished report has.
        address, shards, num_gpus, progress: as in `build_index_on_cluster`.

    Raises:
        SourceError: no source can be read.
        ClusterError, TaskError, ArtefactError, MissingPackageError: as `build_index_on_cluster`.
    """
    with (
        open_shards(shards) as finished,
        connected(address, finished.folder, num_gpus) as cluster,
    ):
        kind = task.__name__.partition("_")[0]
        records = {
            name: finished.path(
                kind, {**request, "files": keys[name], "out": str(folders[name].absolute())}
            ).with_suffix(".json")
            for name, request in requests.items()
        }
        done = {
            name: record
            for name, path in records.items()
            if (record := read_values(path)) is not None
            and _digest(folders[name] / summary) == record["summary_sha256"]
        }
        if done:
            _log.info("%d of %d reports are finished", len(done), len(requests))
        missing = [name for name in requests if name not in done]
        tasks = [{**requests[name], "out": str(folders[name].absolute())} for name in missing]
        unreadable = {}
        for number, outcome in cluster.run(
            task, tasks, missing, description=kind, progress=progress
        ):
            name = missing[number]
            if outcome.unreadable:
                unreadable[name] = outcome.unreadable
                _log.warning("source '%s' is left out: %s", name, outcome.unreadable)
                continue
            digest = _digest(folders[name] / summary)
            done[name] = {"losses": outcome.value, "summary_sha256": digest}
            write_values(records[name], done[name])
    if not done:
        raise SourceError(
            f"no source can be read; the first one: {next(iter(unreadable.values()))}"
        )
    return FleetReports(
        tuple(name for name in requests if name in done),
        tuple(name for name in missing if name in done),
        {name: record["losses"] for name, record in done.items() if record["losses"]},
        unreadable,
    )


def replay_drive(
    opened: str,
    topic: str,
    parameters: Mapping[str, Any],
    camera: str,
    every: int | None,
    labels: str,
    out: str,
) -> str:
    """Replay one drive and write its report; a task. Return what the drive left out."""
    from semantic_anomaly.detection.detector import load_detector
    from semantic_anomaly.evaluation.events import read_events
    from semantic_anomaly.evaluation.replay import replay

    source = open_on_node(opened, topic)
    detector = load_detector(Settings.from_parameters(parameters), camera)
    events = read_events(Path(labels)) if labels else None
    replay(detector, source, Path(out), every=every, events=events)
    return source.losses


def evaluate_dataset(
    dataset: str,
    layout: str,
    protocol: str,
    references: list[str],
    parameters: Mapping[str, Any],
    camera: str,
    options: Mapping[str, Any],
    limits: list[int],
    out: str,
) -> str:
    """Evaluate one dataset and write its report; a task. Return what the dataset left out."""
    from semantic_anomaly.detection.detector import load_detector
    from semantic_anomaly.evaluation.components import SizeLimits
    from semantic_anomaly.evaluation.evaluate import evaluate
    from semantic_anomaly.evaluation.layouts import open_dataset
    from semantic_anomaly.evaluation.protocols import open_protocol

    refuse_missing(dataset)
    settings = Settings.from_parameters(parameters)
    labelled = open_dataset(dataset, layout)
    detector: Any = (
        load_detector(settings, camera)
        if protocol == "drive"
        else open_protocol(protocol, settings, camera, labelled, references)
    )
    evaluate(detector, labelled, out=out, limits=SizeLimits(*limits), **options)
    return labelled.losses


def _digest(path: Path) -> str:
    """Return the digest of a file, empty if there is none."""
    try:
        return sha256_file(path)
    except OSError:
        return ""
