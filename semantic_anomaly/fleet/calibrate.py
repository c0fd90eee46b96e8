"""Calibrate an index on a cluster: one task per drive and pass."""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.calibration.leakage import overlaps
from semantic_anomaly.detection.detector import resolve_roi
from semantic_anomaly.errors import CalibrationError, ImageError, SourceError
from semantic_anomaly.evaluation.provenance import files_state
from semantic_anomaly.fleet.cluster import Cluster, connected, on_nodes
from semantic_anomaly.fleet.shards import Shards, open_shards, read_values, write_values
from semantic_anomaly.fleet.sources import open_on_node, open_readable
from semantic_anomaly.index.content import FailedSource
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.sources import FrameSource
from semantic_anomaly.offline.calibrate import (
    Drives,
    ScoredFrame,
    Scorers,
    SourceDrives,
    SourceSums,
    calibrate,
    scored_frames,
    source_sums,
    sums_by_fold,
)
from semantic_anomaly.scoring.normalisation import (
    NormalisationSums,
    ScoreNormalisation,
    class_anchors,
    normalisations_without,
)
from semantic_anomaly.segmentation.embedder import RunningEmbedder
from semantic_anomaly.settings import Settings
from semantic_anomaly.storage import atomic_write_bytes, canonical_json, sha256_bytes, sha256_file

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FleetCalibration:
    """A calibration made on a cluster.

    Attributes:
        calibration: not written yet.
        losses: what sources left out, one sentence each.
        failed: sources that could not be read.
    """

    calibration: Calibration
    losses: tuple[str, ...]
    failed: tuple[FailedSource, ...]


def calibrate_on_cluster(
    folder: str | Path,
    sources: Sequence[str] = (),
    *,
    address: str,
    shards: str | Path,
    settings: Settings,
    camera: str = "camera",
    leave_one_drive_out: bool = False,
    moved: Mapping[str, str] | None = None,
    topic: str | None = None,
    num_gpus: float = 0.0,
    progress: bool = False,
) -> FleetCalibration:
    """Calibrate an index on a Ray cluster; equal to `calibrate` in the same precision.

    Precision and execution that are not set are those of the index. A source that cannot be read is
    left out and named. The same call again reads only what is missing.

    Args:
        folder: of the index, on storage that all nodes share.
        sources: as `calibrate`; none: the drives of the index.
        address, shards, num_gpus: as `build_index_on_cluster`.
        settings, camera, leave_one_drive_out, moved, topic, progress: as `calibrate`.

    Raises:
        CalibrationError: fewer than two drives, or as `calibrate`.
        SourceError, InputError, ClusterError, TaskError, ArtefactError, MissingPackageError: as
            `calibrate` and `build_index_on_cluster`.
    """
    folder = Path(folder).expanduser().absolute()
    drives, failed = open_readable(sources, topic) if sources else ({}, [])
    for name, source in list(drives.items()):
        try:
            # Its first frame is compared with the index before the work.
            next(iter(source))
        except (SourceError, ImageError) as error:
            _log.warning("source '%s' is left out: %s", name, error)
            failed.append(FailedSource(name, str(error)))
            del drives[name]
    if sources and not drives:
        raise SourceError(f"no source can be read; the first one: {failed[0].reason}")
    index = NominalIndex.load(folder)
    with (
        open_shards(Path(shards)) as finished,
        connected(address, finished.folder, num_gpus) as cluster,
    ):
        scoring = _Scoring(folder, finished, cluster, camera, num_gpus, progress)
        calibration = calibrate(
            index,
            list(drives.values()) or None,
            leave_one_drive_out=leave_one_drive_out,
            moved=moved,
            settings=settings,
            camera=camera,
            scored=scoring,
            progress=progress,
        )
    return FleetCalibration(
        calibration, tuple(filter(None, scoring.losses)), (*failed, *scoring.failed)
    )


@dataclass
class _Scoring:
    """Scores the drives of a calibration by tasks."""

    folder: Path
    shards: Shards
    cluster: Cluster
    camera: str
    num_gpus: float
    progress: bool
    losses: list[str] = field(default_factory=list)
    failed: list[FailedSource] = field(default_factory=list)

    def __call__(
        self, drives: Drives, scorers: Scorers
    ) -> tuple[dict[int, list[NormalisationSums]], Iterator[ScoredFrame]]:
        assert isinstance(drives, SourceDrives)
        if len(drives.recordings) < 2:
            raise CalibrationError(
                f"calibration: expected at least 2 drives with --ray, found "
                f"{len(drives.recordings)}; calibrate with one drive without it"
            )
        _refuse_overlaps(drives.further)
        settings = on_nodes(scorers.settings, self.num_gpus)
        common: dict[str, Any] = {
            "index": str(self.folder),
            "fingerprint": scorers.index.fingerprint,
            "parameters": settings.to_parameters(),
            "camera": self.camera,
            "recordings": list(drives.of_drive.items()),
            "stride": drives.stride,
        }
        # The device does not change what is computed.
        key = {**common, "parameters": settings.replace(device="auto", threads=0).to_parameters()}
        requests = {
            name: {"name": name, "opened": s.opened, "topic": s.topic, "own": name in drives.own}
            for name, s in drives.sources.items()
        }
        keys = {
            name: {**key, **requests[name], "files": files_state(*source.paths)}
            for name, source in drives.sources.items()
        }
        files = {name: self.shards.path("sums", keys[name]) for name in requests}
        unreadable = self._run(sum_distances, common, requests, files)
        self.failed += [FailedSource(*item) for item in unreadable.items()]
        kept = [name for name in requests if name not in unreadable]
        if not kept:
            raise SourceError(f"no source can be read; the first one: {self.failed[0].reason}")
        self.losses += [str((_read(files[name]))["losses"]) for name in kept]
        anchors = [class_anchors(stage.content.embeddings) for stage in scorers.index.stages]
        sums = sums_by_fold(_read_sums(files[name], anchors) for name in kept)
        folds = {str(fold): normalisations_without(sums, fold) for fold in sums}
        described = {fold: [n.to_dict() for n in of_stages] for fold, of_stages in folds.items()}
        digest = sha256_bytes(canonical_json(described).encode())
        normalisations = self.shards.folder / f"normalisations-{digest[:24]}.json"
        write_values(normalisations, described)
        common |= {"normalisations": str(normalisations)}
        files = {
            name: self.shards.path("scores", {**keys[name], "normalisations": digest})
            for name in kept
        }
        lost = self._run(score_frames, common, {name: requests[name] for name in kept}, files)
        if lost:
            name, reason = next(iter(lost.items()))
            raise SourceError(f"source '{name}' was read once, and cannot be read again: {reason}")
        rows = [_read(files[name])["frames"] for name in kept]
        return sums, ((r, d, s, t, m) for of_source in rows for r, d, s, t, m in of_source)

    def _run(
        self,
        task: Any,
        common: Mapping[str, Any],
        requests: Mapping[str, Mapping[str, Any]],
        files: Mapping[str, Path],
    ) -> dict[str, str]:
        """Run a task for each source that is not finished; return why sources cannot be read."""
        missing = [name for name in requests if not files[name].with_suffix(".json").exists()]
        if len(missing) < len(requests):
            _log.info("%d of %d drives are finished", len(requests) - len(missing), len(requests))
        tasks = [
            {"common": common, "source": requests[name], "out": str(files[name])}
            for name in missing
        ]
        outcomes = self.cluster.run(
            task,
            tasks,
            missing,
            description=task.__name__.replace("_", " "),
            progress=self.progress,
        )
        unreadable = {missing[n]: outcome.unreadable for n, outcome in outcomes}
        for name, reason in unreadable.items():
            if reason:
                _log.warning("source '%s' is left out: %s", name, reason)
        return {name: unreadable[name] for name in missing if unreadable[name]}


def sum_distances(common: Mapping[str, Any], source: Mapping[str, Any], out: str) -> None:
    """Write the sums of the score normalisation of a source; a task."""
    opened = open_on_node(source["opened"], source["topic"])
    with closing(_Node(common, source, opened)) as node:
        sums = source_sums(node.drives.frames(""), node.drives, node.scorers)
    arrays = {
        f"{fold}/{stage}/{name}": array
        for fold, of_stages in sums.sums.items()
        for stage, of_stage in enumerate(of_stages)
        for name, array in of_stage.to_arrays().items()
    }
    buffer = io.BytesIO()
    # Arrays by names as keyword arguments.
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    path = Path(out).with_suffix(".npz")
    atomic_write_bytes(path, buffer.getvalue())
    values = {
        "losses": opened.losses,
        "counts": dict(sums.counts),
        "largest": sums.largest,
        "sha256": sha256_file(path),
    }
    # After the arrays: it says that the source is finished.
    write_values(Path(out).with_suffix(".json"), values)


def score_frames(common: Mapping[str, Any], source: Mapping[str, Any], out: str) -> None:
    """Write the scores of the frames of a source; a task."""
    opened = open_on_node(source["opened"], source["topic"])
    normalisations = {
        int(fold): [ScoreNormalisation.from_dict(values) for values in of_stages]
        for fold, of_stages in (read_values(Path(common["normalisations"])) or {}).items()
    }
    with closing(_Node(common, source, opened)) as node:
        frames = node.drives.frames("")
        rows = list(scored_frames(frames, node.drives, node.scorers, normalisations))
    write_values(Path(out).with_suffix(".json"), {"frames": rows})


class _Node:
    """What a task needs of index, embedder and one source."""

    def __init__(
        self, common: Mapping[str, Any], source: Mapping[str, Any], opened: FrameSource
    ) -> None:
        index = NominalIndex.load(common["index"])
        if index.fingerprint != common["fingerprint"]:
            raise CalibrationError(
                f"index '{common['index']}': expected fingerprint {common['fingerprint']}, found "
                f"{index.fingerprint}: it was changed meanwhile"
            )
        settings = Settings.from_parameters(common["parameters"])
        roi = resolve_roi(settings.camera_settings[common["camera"]], index, None)
        self._embedder = RunningEmbedder.from_settings(settings)
        index.check_embedder(self._embedder.stages)
        device = self._embedder.device
        index.configure_search(settings.search, settings.search_ef, device)
        self.scorers = Scorers(index, settings, roi, device)
        mine = {source["name"]: opened}
        own, further = (mine, {}) if source["own"] else ({}, mine)
        recordings = dict(common["recordings"])
        self.drives = SourceDrives(index, own, further, recordings, common["stride"])
        self.drives.embedder = self._embedder

    def close(self) -> None:
        self._embedder.close()


def _read(path: Path) -> dict[str, Any]:
    path = path.with_suffix(".json")
    values = read_values(path)
    if values is None:
        raise CalibrationError(f"'{path}': expected a finished drive, found none")
    return values


def _read_sums(path: Path, anchors: Sequence[np.ndarray | None]) -> SourceSums:
    """Return the sums that `sum_distances` has written.

    Raises:
        CalibrationError: they are damaged.
    """
    values, arrays = _read(path), path.with_suffix(".npz")
    try:
        if sha256_file(arrays) != values["sha256"]:
            raise CalibrationError(f"'{arrays}': damaged; remove it and '{path}.json'")
        with np.load(arrays, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except OSError as error:
        raise CalibrationError(f"'{arrays}': {error.strerror}; remove '{path}.json'") from error
    sums = {
        fold: [
            NormalisationSums.from_arrays(
                of_stage,
                {
                    name.rpartition("/")[2]: array
                    for name, array in found.items()
                    if name.startswith(f"{fold}/{stage}/")
                },
            )
            for stage, of_stage in enumerate(anchors)
        ]
        for fold in dict.fromkeys(int(name.partition("/")[0]) for name in found)
    }
    return SourceSums(sums, Counter(values["counts"]), float(values["largest"]))


def _refuse_overlaps(sources: Mapping[str, FrameSource]) -> None:
    """Raise CalibrationError if two sources select the same frames of a file."""
    names = list(sources)
    for number, name in enumerate(names):
        for other in names[:number]:
            same = sources[name].path.resolve() == sources[other].path.resolve()
            if same and sources[name].files and overlaps(sources[name], [other]):
                raise CalibrationError(
                    f"calibration drives '{other}' and '{name}': expected different frames, found "
                    "some given twice"
                )
