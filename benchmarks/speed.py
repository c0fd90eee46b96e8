"""Measure where the time of a frame goes on this machine: forward, search, cameras and memory.

Median and, in brackets, 95th percentile. What is compared takes turns, frame by frame, so that what
else runs on the machine disturbs all of it alike. Writes speed.json, speed.md and speed.png.

The detector sees frames of the synthetic street at 1280x720; its index stores every patch. The node
gets such frames from another process on the same machine. The search sees clustered unit vectors in
place of features, in frames of three kinds. Needs no data. With --quick it takes 5 minutes on two
CPU cores; run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import yaml
from tqdm import tqdm

from semantic_anomaly import AnomalyDetector, Frame, Settings, build_index, calibrate
from semantic_anomaly.demo.demo import play_to_node
from semantic_anomaly.detection.detector import load_detector
from semantic_anomaly.embedding.backbone import Backbone
from semantic_anomaly.embedding.execution import candidates
from semantic_anomaly.embedding.identity import EmbedderIdentity, StageIdentity
from semantic_anomaly.embedding.pretrained import choose_device
from semantic_anomaly.evaluation import extras
from semantic_anomaly.evaluation.provenance import git_commit, versions
from semantic_anomaly.index.build import BuildReport, FrameRecord
from semantic_anomaly.index.content import IndexContent
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.index.partition import Partition
from semantic_anomaly.io.images import encode_jpeg
from semantic_anomaly.io.sources import Arrays
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.distances import FrameScorer
from semantic_anomaly.scoring.normalisation import constant_normalisation
from semantic_anomaly.stages import StageSpec
from semantic_anomaly.structures import PatchGrid
from semantic_anomaly.synthetic import StreetDrive
from semantic_anomaly.synthetic.export import write_folder
from semantic_anomaly.timing import SEARCH, STAGES, elapsed_ms, stage_times

IMAGE_HW = 720, 1280
STRIDE = 8
SMALL = "mobilenet_v1 layer=21 size=480"
CLUSTERS, LOCAL_DIM = 60, 16
DIM, GRID_HW = 196, (54, 96)
Rows = list[dict[str, Any]]


def quantiles(times_ms: Sequence[float]) -> dict[str, float]:
    """Return median and 95th percentile of milliseconds."""
    median, high = np.percentile(times_ms, [50, 95])
    return {"median_ms": round(float(median), 1), "p95_ms": round(float(high), 1)}


def in_turn(calls: Sequence[Callable[[int], Any]], rounds: int, what: str) -> list[list[float]]:
    """Return the milliseconds of each call in each round; a round before them is not counted."""
    times_ms: list[list[float]] = [[] for _ in calls]
    for number in tqdm(range(-1, rounds), what, disable=None):
        for call, of_call in zip(calls, times_ms, strict=True):
            begin_s = time.perf_counter()
            call(max(number, 0))
            if number >= 0:
                of_call.append(elapsed_ms(begin_s))
    return times_ms


def forward_rows(rounds: int) -> Rows:
    """Time every precision and execution of the default backbones, at their sizes."""
    rows: Rows = []
    calls: list[Callable[[int], Any]] = []
    device = choose_device("auto")
    default = Settings().stage_specs
    for name in dict.fromkeys(spec.backbone for spec in default):
        own = [spec for spec in default if spec.backbone == name]
        size, layers = own[0].size, [int(spec.layer or 0) for spec in own]
        for dtype, execution in candidates(device):
            backbone = Backbone(name, "auto", dtype, execution)
            backbone.truncate(max(layers))
            multiple = backbone.coarsest_px
            input_hw = round(size * 9 / 16 / multiple) * multiple, size
            batch = np.zeros((1, *input_hw, 3), np.uint8)
            calls.append(partial(_forward, backbone, batch, input_hw, layers))
            rows.append(
                {
                    "backbone": name,
                    "layers": layers,
                    "width": size,
                    "dtype": dtype,
                    "execution": execution,
                }
            )
    for row, times_ms in zip(rows, in_turn(calls, rounds, "forward"), strict=True):
        row |= quantiles(times_ms)
    return rows


def _forward(
    backbone: Backbone, batch: np.ndarray, input_hw: tuple[int, int], layers: list[int], _: int
) -> list[float]:
    # A GPU is waited for only when a value is read.
    return [float(values.sum()) for values in backbone.embed(batch, input_hw, layers)]


def street(seeds: Sequence[int], frames: int) -> dict[str, list[np.ndarray]]:
    """Return frames of synthetic drives by drive, (720, 1280, 3) uint8 RGB."""
    drives = {seed: StreetDrive(seed, frames=STRIDE * frames, image_hw=IMAGE_HW) for seed in seeds}
    return {
        f"drive {seed}": [drive.frame(STRIDE * number).image for number in range(frames)]
        for seed, drive in drives.items()
    }


def make_detector(folder: Path, stages: Sequence[str], frames: int) -> AnomalyDetector:
    """Make an index of every patch of so many frames of eleven drives; return its detector."""
    settings = Settings(
        stages=tuple(stages), dedup_distance=0.0, target_false_alarm_rate=0.05
    ).with_build_defaults()
    nominal = [Arrays(images, name) for name, images in street(range(100, 111), frames).items()]
    index = build_index(nominal, settings=settings, out=folder, force=True, progress=True)
    unseen = [Arrays(images, name) for name, images in street(range(200, 203), 8).items()]
    calibrate(index, unseen, settings=settings, out=folder, progress=True)
    return load_detector(Settings(index=str(folder)), "camera")


def detector_rows(detectors: dict[str, AnomalyDetector], frames: int) -> Rows:
    """Time the stages of every detector, on nominal frames and on frames that are all anomalous."""
    nominal = [image for images in street([300, 301], frames // 2).values() for image in images]
    rng = np.random.default_rng(0)
    strange = [
        cv2.resize(rng.integers(0, 256, (90, 160, 3), dtype=np.uint8), IMAGE_HW[::-1])
        for _ in range(max(3, frames // 4))
    ]
    rows: Rows = []
    for kind, images in (("nominal", nominal), ("all anomalous", strange)):
        results: dict[str, list[Any]] = {name: [] for name in detectors}
        for number, image in enumerate(tqdm([images[0], *images], kind, disable=None)):
            for name, detector in detectors.items():
                result = detector.detect(Frame(image, stamp_ns=number))
                if number:
                    results[name].append(result)
        for name, of_detector in results.items():
            row: dict[str, Any] = {
                "detector": name,
                "frames": kind,
                "entries": [stage.count for stage in detectors[name].index.stages],
                "execution": detectors[name].embedder.stages[0].embedder.execution,
                "dtype": detectors[name].embedder.stages[0].embedder.dtype,
                "coarse": sum(result.coarse for result in of_detector),
                "of": len(of_detector),
            }
            for stage in STAGES:
                row[stage] = quantiles([result.stage_ms[stage] for result in of_detector])
            rows.append(row)
    return rows


def camera_rows(detector: AnomalyDetector, cameras: Sequence[int], rounds: int) -> Rows:
    """Time a newest frame of several cameras: embedded together, then assessed one by one."""
    images = [image for images in street([300], max(cameras)).values() for image in images]
    frames = [Frame(image) for image in images]

    def together(count: int) -> None:
        grids = detector.embedder.embed(images[:count])
        for frame, grid in zip(frames[:count], grids, strict=True):
            detector.assess(frame, grid)

    calls = [lambda _, n=count: together(n) for count in cameras]
    return [
        {"cameras": count, **quantiles(times_ms)}
        for count, times_ms in zip(cameras, in_turn(calls, rounds, "cameras"), strict=True)
    ]


def node_rows(out: Path, runs: Sequence[tuple[str, float, int, bool]], frames: int) -> Rows:
    """Time the node, which another process sends frames to: detector, rate, threads, pictures."""
    drive = out / "drive"
    shutil.rmtree(drive, ignore_errors=True)
    write_folder([StreetDrive(400, frames=frames, image_hw=IMAGE_HW)], drive, progress=True)
    rows: Rows = []
    for name, rate_hz, threads, pictures in runs:
        parameters = {
            "index": str((out / name).absolute()),
            "threads": threads,
            "camera": {"image_topic": "/camera/image_raw"},
        }
        document = {"/**": {"ros__parameters": parameters}}
        (out / "settings.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
        records = play_to_node(out, drive, rate_hz, pictures)["frames"]
        # The first frames compile the networks.
        records = records[len(records) // 5 :]
        scored = [record for record in records if "score" in record.get("status", {})]
        seconds = (records[-1]["stamp_ns"] - records[0]["stamp_ns"]) / 1e9
        rows.append(
            {
                "detector": name,
                "sent_hz": rate_hz,
                "threads": threads or "all",
                "overlay listened to": pictures,
                "scored_hz": round(len(scored) / seconds, 1),
                "latency": quantiles([record["latency_ms"] for record in scored] or [np.nan]),
            }
        )
        print(rows[-1], flush=True)
    return rows


def memory_rows(out: Path, frames: int) -> Rows:
    """Return the resident memory of the node of the small preset, while it gets many frames."""
    drive = out / "long_drive"
    shutil.rmtree(drive, ignore_errors=True)
    drive.mkdir()
    images = street([300], 16)["drive 300"]
    for number in range(frames):
        path = drive / f"{number:06d}.jpg"
        if number < len(images):
            path.write_bytes(encode_jpeg(images[number]))
        else:
            os.link(drive / f"{number % len(images):06d}.jpg", path)
    parameters = {
        "index": str((out / "small").absolute()),
        "camera": {"image_topic": "/camera/image_raw"},
    }
    document = {"/**": {"ros__parameters": parameters}}
    (out / "settings.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    resident_mib: list[int] = []
    ended = threading.Event()
    watch = threading.Thread(target=_watch_node, args=(resident_mib, ended))
    watch.start()
    try:
        records = play_to_node(out, drive, 20.0, overlays=False)["frames"]
    finally:
        ended.set()
        watch.join()
    scored = sum("score" in record.get("status", {}) for record in records)
    print(f"memory: {scored} of {frames} frames scored", flush=True)
    # Not the seconds in which the node loads, nor those after it has stopped.
    shares = np.linspace(0.05, 0.95, 10)
    return [
        {
            "sent": int(share * frames),
            "scored": f"{scored} of {frames} in all",
            "resident_mib": resident_mib[int(share * len(resident_mib))],
        }
        for share in shares
    ]


def _watch_node(resident_mib: list[int], ended: threading.Event) -> None:
    """Append the resident memory of the node every half second, while there is a node."""
    while not ended.wait(0.5):
        for children in Path("/proc/self/task").glob("*/children"):
            for pid in children.read_text(encoding="ascii").split():
                with contextlib.suppress(OSError):
                    of_child = Path("/proc", pid)
                    if b"semantic_anomaly.ros.node" in (of_child / "cmdline").read_bytes():
                        pages = (of_child / "statm").read_text(encoding="ascii").split()[1]
                        size = int(pages) * os.sysconf("SC_PAGE_SIZE")
                        resident_mib.append(round(size / 2**20))


class World:
    """Unit vectors around cluster centres, each with a local plane of variation."""

    def __init__(self, dim: int) -> None:
        self._generator = np.random.default_rng(0)
        self._centres = self._generator.standard_normal((CLUSTERS, dim))
        self._planes = self._generator.standard_normal((CLUSTERS, LOCAL_DIM, dim))

    def draw(self, count: int) -> np.ndarray:
        """Return (count, dim) float32 unit vectors."""
        points = np.empty((count, self._centres.shape[1]), np.float32)
        for start in range(0, count, 65536):
            rows = slice(start, min(start + 65536, count))
            cluster = self._generator.integers(0, CLUSTERS, rows.stop - start)
            local = 0.15 * self._generator.standard_normal((rows.stop - start, LOCAL_DIM))
            for number in range(CLUSTERS):
                own = np.flatnonzero(cluster == number)
                points[start + own] = self._centres[number] + local[own] @ self._planes[number]
        return unit(points)

    def frame(self, grid_hw: tuple[int, int]) -> np.ndarray:
        """Return a nominal frame, (rows, cols, dim) float32."""
        return self.draw(grid_hw[0] * grid_hw[1]).reshape(*grid_hw, -1)


def unit(points: np.ndarray) -> np.ndarray:
    """Return float32 vectors of unit norm."""
    points = points.astype(np.float32)
    return points / np.linalg.norm(points, axis=-1, keepdims=True)


def make_index(embeddings: np.ndarray) -> NominalIndex:
    """Return an index of (count, dim) embeddings; its graph is built when it is first needed."""
    count, dim = embeddings.shape
    identity = EmbedderIdentity(
        "none", "none", "", "0" * 64, "0" * 64, 0, 960, 1, 10, dim, "float32"
    )
    content = IndexContent(
        stage=StageIdentity(StageSpec("none", 0, 960), identity),
        roi=RegionOfInterest().describe(),
        camera="camera",
        sources=(),
        segmenter_model="",
        embeddings=embeddings,
        entries=np.zeros((count, 3), np.int32),
        radii=np.zeros(count, np.float32),
        frames=(FrameRecord("0", *GRID_HW, b""),),
        report=BuildReport(1, count, count, 0, 0),
        search_ef=16,
        limits={"dedup_distance": 0.0, "max_entries": count},
        partition=Partition.of(embeddings),
    )
    return NominalIndex(content)


def with_odd_object(frame: np.ndarray) -> np.ndarray:
    """Return a frame in which 1 % of the patches are far from everything."""
    rows, cols, _ = frame.shape
    odd = frame.copy()
    patch = odd[rows // 2 : rows // 2 + rows // 10, cols // 2 : cols // 2 + cols // 10]
    patch += 0.08 * np.random.default_rng(1).standard_normal(patch.shape).astype(np.float32)
    return unit(odd)


def all_shifted(frame: np.ndarray) -> np.ndarray:
    """Return a frame in which every patch is anomalous."""
    rng = np.random.default_rng(2)
    shift = 0.06 * rng.standard_normal(frame.shape[2]) + 0.03 * rng.standard_normal(frame.shape)
    return unit(frame + shift)


KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "nominal": lambda frame: frame,
    "odd object": with_odd_object,
    "all anomalous": all_shifted,
}

COLOURS = dict(zip(KINDS, ("tab:blue", "tab:orange", "tab:red"), strict=True))
MARKERS = {"lists": "o", "graph": "^", "exact": "s"}


def search_rows(world: World, cases: Sequence[tuple[int, str, tuple[int, int]]], n: int) -> Rows:
    """Time the search of frames for each case: number of entries, mode, and (rows, cols)."""
    entries = world.draw(max(count for count, _, _ in cases))
    contents: dict[int, NominalIndex] = {}
    rows: Rows = []
    for count, mode, grid_hw in cases:
        if count not in contents:
            contents[count] = make_index(entries[:count])
        # An index of its own for each mode, of the same arrays.
        index = NominalIndex(contents[count].content, manifest=contents[count].manifest)
        index.configure_search(mode, 16)
        scorer = FrameScorer(index, Settings(), RegionOfInterest())
        frames = [world.frame(grid_hw) for _ in range(n + 1)]
        # As a calibration would: standardised by nominal distances, above all of these scores.
        values = scorer.distance_maps(PatchGrid(frames[0], IMAGE_HW))[0].values
        normalisation = [constant_normalisation(float(values.mean()), float(values.std()))]
        scores = [
            scorer.score(PatchGrid(frame, IMAGE_HW), normalisation, None).score
            for frame in frames[:2]
        ]
        for kind, made_of in KINDS.items():
            times_ms, coarse = [], 0
            for frame in frames[1:]:
                grid = PatchGrid(made_of(frame), IMAGE_HW)
                with stage_times() as spent_ms:
                    coarse += scorer.score(grid, normalisation, 1.2 * max(scores)).coarse
                times_ms.append(spent_ms[SEARCH])
            rows.append(
                {
                    "entries": count,
                    "mode": mode,
                    "patches": grid_hw[0] * grid_hw[1],
                    "frames": kind,
                    **quantiles(times_ms),
                    "coarse": f"{coarse} of {n}",
                }
            )
            print(rows[-1], flush=True)
    return rows


def markdown(name: str, rows: Rows) -> str:
    """Return rows as a Markdown table; stages have median and 95th percentile."""

    def cell(value: Any) -> str:
        if isinstance(value, dict):
            return f"{value['median_ms']:.0f} ({value['p95_ms']:.0f})"
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    lines = [f"## {name}", "", "| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    lines += ["| " + " | ".join(cell(value) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draw stages of the detectors, search by entries and patches, and cameras."""
    pyplot = extras.load("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, 4, figsize=(17, 4), layout="constrained")
    bottoms: dict[str, float] = {}
    bars = [f"{row['detector']}\n{row['frames']}" for row in figures["detector"]]
    for stage in STAGES[:-1]:
        heights = [row[stage]["median_ms"] for row in figures["detector"]]
        axes[0].bar(bars, heights, bottom=[bottoms.get(bar, 0.0) for bar in bars], label=stage)
        bottoms = {bar: bottoms.get(bar, 0.0) + h for bar, h in zip(bars, heights, strict=True)}
    axes[0].tick_params(axis="x", labelsize=7)
    axes[0].set(title="Detector", ylabel="median ms")
    for axis, key in zip(axes[1:3], ("entries", "patches"), strict=True):
        for kind in KINDS:
            of_kind = [r for r in figures[f"search by {key}"] if r["frames"] == kind]
            for mode in dict.fromkeys(row["mode"] for row in of_kind):
                line = [r for r in of_kind if r["mode"] == mode]
                axis.plot(
                    [row[key] for row in line],
                    [row["median_ms"] for row in line],
                    color=COLOURS[kind],
                    marker=MARKERS[mode],
                    label=f"{kind}, {mode}",
                )
        axis.set(title=f"Search by {key}", xlabel=key, ylabel="median ms", xscale="log")
        axis.set_yscale("log")
    cameras = figures["cameras"]
    rates = [1e3 * row["cameras"] / row["median_ms"] for row in cameras]
    axes[3].plot([row["cameras"] for row in cameras], rates, marker="o")
    axes[3].set(title="Cameras", xlabel="cameras", ylabel="frames/s of all")
    axes[3].set(ylim=(0, 1.2 * max(rates)), xticks=[row["cameras"] for row in cameras])
    for axis in axes[:3]:
        axis.legend(fontsize=6, loc="upper left", framealpha=0.6)
        low, high = axis.get_ylim()
        # Room for the legend.
        axis.set_ylim(low, high * (1.4 if low <= 0 else (high / low) ** 0.7))
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print tables, and write them with a picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="fewer frames, smaller indexes")
    args = parser.parse_args()
    quick = args.quick
    args.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capabilities": [
                name for name, has in torch.cpu.get_capabilities().items() if has is True
            ],
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "load_at_start": round(os.getloadavg()[0], 2),
            "commit": git_commit(),
            "versions": versions(),
            "quick": quick,
        }
    }
    figures["forward"] = forward_rows(5 if quick else 20)
    detectors = {
        name: make_detector(args.out / name, stages, 1 if quick else 10)
        for name, stages in (
            ("default", tuple(map(str, Settings().stage_specs))),
            ("small", (SMALL,)),
        )
    }
    figures["detector"] = detector_rows(detectors, 8 if quick else 60)
    cameras = (1, 2) if quick else (1, 2, 4, 8)
    figures["cameras"] = camera_rows(detectors["default"], cameras, 2 if quick else 6)
    figures["memory"] = memory_rows(args.out, 300 if quick else 10_000)
    detectors.clear()
    runs = [("default", 10.0, 0, False), ("default", 10.0, 0, True), ("small", 20.0, 0, False)]
    if not quick:
        runs += [("default", 10.0, 1, False), ("small", 20.0, 1, False), ("small", 20.0, 0, True)]
    figures["node"] = node_rows(args.out, runs, 60 if quick else 200)
    world = World(DIM)
    counts = (10_000, 30_000) if quick else (10_000, 100_000, 178_000, 1_000_000)
    frames = 3 if quick else 6
    cases = [(count, "lists", GRID_HW) for count in counts]
    cases += [(counts[1], mode, GRID_HW) for mode in ("graph", "exact")]
    figures["search by entries"] = search_rows(world, cases, frames)
    shapes = ((18, 32), (54, 96)) if quick else ((18, 30), (27, 48), (54, 96), (60, 100))
    figures["search by patches"] = search_rows(
        world, [(counts[1], "lists", shape) for shape in shapes], frames
    )
    (args.out / "speed.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    tables = [markdown(name, rows) for name, rows in figures.items() if name != "machine"]
    (args.out / "speed.md").write_text("\n".join(tables), encoding="utf-8")
    draw(figures, args.out / "speed.png")
    print("\n".join(tables))


def cpu_name() -> str:
    """Return the name of the processor."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
