"""Measure what a second worker gains, what merging costs, and what a plan for a fleet needs.

workers: `build-index --ray` of drives of the synthetic street by one worker and by two, each of one
    thread, in turn in one run. `seconds` are of the whole call with connection, start of workers
    and merge; `drives_per_minute` is the rate once every worker has finished its first drive.
merge: ten shards of --entries become one index on disk: time, processor time, peak memory. Shards
    are drawn in memory, which is not counted; reading them from a disk is not either.
growth: entries of the merged index by number of drives, from the shards of the workers.
equality: five drives, built at once and merged, each in three orders: entries, frame AUROC and
    thresholds of the calibration that leaves one drive out.

Load of the machine is in every row: processor time is comparable, seconds only where it was idle.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from speed import DIM, World, cpu_name, make_index
from tqdm import tqdm

from semantic_anomaly import NominalIndex, Settings, build_index, calibrate, evaluate
from semantic_anomaly.fleet.build_index import build_index_on_cluster
from semantic_anomaly.index.content import RecordedSource
from semantic_anomaly.index.merge import merge
from semantic_anomaly.offline.merge_index import merge_indexes
from semantic_anomaly.synthetic import StreetDrive
from semantic_anomaly.synthetic.export import write_folder

STAGE, IMAGE_HW, STRIDE = "efficientnet_lite2 layer=20 size=640", (360, 640), 3
SMALL, ORDERS = "mobilenet_v1 layer=21 size=480", ("01234", "43210", "20413")
TEST_SEEDS, TEST_FRAMES, TEST_STRIDE = range(50, 56), 300, 15
TEST_KINDS = ("cow", "sofa", "ladder")
SECTIONS = ("workers", "merge", "equality")
TARGETS = (0.05, 0.1, 0.2)
SHARDS, ENTRIES = 10, 100_000
DEDUP_DISTANCE = 0.02
_STORE_BYTES = 80 * 2**20


def write_drives(root: Path, count: int, frames: int) -> list[str]:
    """Write drives of the synthetic street and return their folders."""
    folders = []
    for seed in range(count):
        folders.append(str(root / f"drive_{seed}"))
        drive = StreetDrive(seed, frames * STRIDE, image_hw=IMAGE_HW)
        write_folder([drive], Path(folders[-1]), stride=STRIDE, progress=False)
    return folders


def worker_rows(
    root: Path, drives: Sequence[str], frames: int, rounds: int
) -> list[dict[str, Any]]:
    """Time one worker and two, of one thread each, in turn."""
    rows = []
    settings = Settings(
        stages=(STAGE,),
        device="cpu",
        threads=1,
        dtype="float32",
        execution="torch",
        dedup_distance=0.05,
    )
    for number in range(rounds):
        for workers in (1, 2):
            shards = root / f"shards_{workers}_{number}"
            with _cluster(workers) as address:
                begin_s = time.perf_counter()
                build_index_on_cluster(
                    drives,
                    address=address,
                    shards=shards,
                    out=root / f"index_{workers}_{number}",
                    settings=settings,
                )
                end_s = time.perf_counter()
            row = {
                "round": number,
                "workers": workers,
                "drives": len(drives),
                "frames_per_drive": frames,
                "seconds": round(end_s - begin_s, 1),
                "drives_per_minute": round(drives_per_minute(shards, workers), 2),
                "load_1min": round(os.getloadavg()[0], 2),
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def drives_per_minute(shards: Path, workers: int) -> float:
    """Return the rate of shards, without the start of workers: by the times of their folders."""
    folders = [path for path in shards.glob("shard-*") if path.is_dir()]
    times_s = sorted(path.stat().st_mtime for path in folders)
    return 60 * (len(times_s) - workers) / (times_s[-1] - times_s[workers - 1])


class _cluster:  # noqa: N801
    """A cluster of so many one-CPU nodes."""

    def __init__(self, workers: int) -> None:
        from ray.cluster_utils import Cluster

        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        head = {"num_cpus": 1, "object_store_memory": _STORE_BYTES, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(workers - 1):
            self._cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES)

    def __enter__(self) -> str:
        return str(self._cluster.address)

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()


class Parts:
    """Indexes of so many embeddings each, drawn when they are read; all see the same things.

    Attributes:
        seconds, cpu_s: spent on drawing.
    """

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self.seconds = self.cpu_s = 0.0

    def __iter__(self) -> Iterator[NominalIndex]:
        world = World(DIM)
        for number in range(SHARDS):
            begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
            content = make_index(world.draw(self._entries)).content
            name = f"drive_{number}"
            content = replace(
                content,
                frames=(replace(content.frames[0], name=f"{name}/0", recording=name),),
                sources=(RecordedSource(name, f"/drives/{name}", "", {"": name}),),
            )
            index = NominalIndex(content)
            self.seconds += time.perf_counter() - begin_s
            self.cpu_s += time.process_time() - begin_cpu_s
            yield index


def merge_row(root: Path, entries: int) -> dict[str, Any]:
    """Merge in a process of its own, so that its peak memory is that of nothing else."""
    load = os.getloadavg()[0]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        measured = executor.submit(_merged, entries, root / "merged").result()
    return {
        "shards": SHARDS,
        "entries": SHARDS * entries,
        "dim": DIM,
        **measured,
        "merged_mb": round(_bytes(root / "merged") / 1e6, 1),
        "load_1min": round(load, 2),
    }


def _merged(entries: int, out: Path) -> dict[str, Any]:
    """Return seconds, processor seconds, peak memory in MB and entries of a merge and its write."""
    parts, total = Parts(entries), SHARDS * entries
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    with tqdm(total=2 * total, desc="merge", unit="entry", unit_scale=True) as bar:
        index = merge(
            parts,
            count=total,
            max_entries=total,
            dedup_distances=[DEDUP_DISTANCE],
            report_progress=bar.update,
        )
    index.save(out)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": round(time.perf_counter() - begin_s - parts.seconds, 1),
        "cpu_s": round(time.process_time() - begin_cpu_s - parts.cpu_s, 1),
        "peak_memory_mb": round(peak_kib * 1024 / 1e6),
        "stored": index.count,
    }


def growth_rows(shards: Sequence[Path], out: Path) -> list[dict[str, Any]]:
    """Return entries and bytes of the merged index by number of drives."""
    rows = []
    for count in (1, 2, 4, 8):
        if count <= len(shards):
            index = merge_indexes(shards[:count], out, force=True, names_agree=True)
            rows.append(
                {
                    "drives": count,
                    "frames": index.report.frames,
                    "patches": index.report.seen,
                    "entries": index.count,
                    "bytes_per_entry": round(_bytes(out) / index.count),
                }
            )
    return rows


def equality_rows(root: Path, frames: int) -> list[dict[str, Any]]:
    """Compare indexes built at once and merged ones, of the same drives in several orders."""
    test = root / "test"
    drives = [
        StreetDrive(seed, TEST_FRAMES, anomalies=TEST_KINDS, image_hw=IMAGE_HW)
        for seed in TEST_SEEDS
    ]
    write_folder(drives, test, stride=TEST_STRIDE, progress=False)
    folders = write_drives(root, len(ORDERS[0]), frames)
    settings = Settings(
        stages=(SMALL,),
        device="cpu",
        dtype="float32",
        execution="torch",
        target_false_alarm_rate=TARGETS[0],
    )
    first = build_index(folders, settings=settings)
    settings = settings.replace(dedup_distance=float(first.content.limits["dedup_distance"]))
    shards = [root / f"shard_{number}" for number in range(len(folders))]
    for folder, shard in zip(folders, shards, strict=True):
        build_index([folder], settings=settings, out=shard)
    rows = []
    for how in ("built at once", "merged"):
        for order in ORDERS:
            numbers, out = [int(number) for number in order], root / f"{how} {order}"
            if how == "merged":
                index = merge_indexes([shards[n] for n in numbers], out, names_agree=True)
            else:
                index = build_index([folders[n] for n in numbers], settings=settings, out=out)
            calibration = calibrate(index, settings=settings, out=out)
            evaluation = evaluate(out, test, settings=settings)
            row = {
                "index": how,
                "order": order,
                "entries": index.count,
                "frame_auroc": round(evaluation["frame_auroc"], 4),
                "thresholds": [round(calibration.threshold_for(rate), 2) for rate in TARGETS],
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Run everything and write fleet.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--quick", action="store_true", help="small: whether it runs at all")
    parser.add_argument("--entries", type=int, default=ENTRIES, help="of each shard")
    parser.add_argument("--only", choices=SECTIONS, help="default: all")
    parser.add_argument("--rounds", type=int, default=2, help="of one and two workers")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    drives, frames = (3, 4) if args.quick else (8, 40)
    path = args.out / "fleet.json"
    figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    figures["machine"] = {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "stage": STAGE,
        "image_hw": list(IMAGE_HW),
    }
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        if args.only in (None, "workers"):
            folders = write_drives(root, drives, frames)
            rows = figures["workers"] = worker_rows(root, folders, frames, args.rounds)
            rates = [
                median(row["drives_per_minute"] for row in rows if row["workers"] == n)
                for n in (1, 2)
            ]
            figures["gain_of_two_workers"] = round(rates[1] / rates[0], 2)
            shards = sorted(p for p in root.glob("shards_2_0/shard-*") if p.is_dir())
            figures["growth"] = growth_rows(shards, root / "growth")
        if args.only in (None, "merge"):
            figures["merge"] = merge_row(root, args.entries)
        if args.only in (None, "equality"):
            (root / "equality").mkdir()
            figures["equality"] = equality_rows(root / "equality", 4 if args.quick else 24)
    text = json.dumps(figures, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
