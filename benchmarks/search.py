"""Measure the search of frames: bounds from lists or graph, and what a frame's score needs of them.

Clustered unit vectors stand for features; with --features and --frames, .npy files of embeddings
(n, dim) and of frames (frames, rows, cols, dim) do. Three kinds of frames: nominal ones, some with
an odd part, and frames in which every patch is anomalous. Modes take turns, frame by frame, so
that what else runs on the machine disturbs all of them alike.

python benchmarks/search.py --entries 100000 178000 1000000 --modes lists
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch

from semantic_anomaly.embedding.identity import EmbedderIdentity, StageIdentity
from semantic_anomaly.index.build import BuildReport, FrameRecord
from semantic_anomaly.index.content import IndexContent
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.index.partition import Partition
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.distances import FrameScorer
from semantic_anomaly.scoring.normalisation import constant_normalisation
from semantic_anomaly.settings import Settings
from semantic_anomaly.stages import StageSpec
from semantic_anomaly.structures import PatchGrid

CLUSTERS = 60
LOCAL_DIM = 16


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
        source=(),
        segmenter_model="",
        embeddings=embeddings,
        entries=np.zeros((count, 3), np.int32),
        frames=(FrameRecord("0", 1, 1, b""),),
        report=BuildReport(1, count, count, 0, 0),
        search_ef=16,
        limits={"dedup_distance": 0.0, "max_entries": count},
        partition=Partition.of(embeddings),
    )
    return NominalIndex(content)


def kinds_of_frames(frames: np.ndarray) -> dict[str, np.ndarray]:
    """Return frames (n, rows, cols, dim) by kind, made of nominal ones."""
    rng = np.random.default_rng(1)
    rows, cols, dim = frames.shape[1:]
    odd = frames.copy()
    # An object of 1 % of the patches, far from everything, with variation of its own.
    patch = odd[:, rows // 2 : rows // 2 + rows // 10, cols // 2 : cols // 2 + cols // 10]
    patch += 0.08 * rng.standard_normal(patch.shape).astype(np.float32)
    shifted = frames + 0.06 * rng.standard_normal(dim) + 0.03 * rng.standard_normal(frames.shape)
    noise = rng.standard_normal(frames.shape)
    return {
        "nominal": frames,
        "odd object": unit(odd),
        "all anomalous": unit(shifted),
        "all noise": unit(noise),
    }


def main() -> None:
    """Print a Markdown table with one row for each number of entries, mode and kind of frame."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", nargs="+", type=int, default=[100_000, 178_000])
    parser.add_argument("--dim", type=int, default=196)
    parser.add_argument("--grid", nargs=2, type=int, default=[54, 96], metavar=("ROWS", "COLS"))
    parser.add_argument("--modes", nargs="+", default=["lists", "graph"])
    parser.add_argument("--frame-count", type=int, default=8, help="frames of each kind")
    parser.add_argument("--features", type=Path, help="nominal embeddings, .npy")
    parser.add_argument("--frames", type=Path, help="nominal frames, .npy")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # Of one thread its own processor time: what else runs on the machine hardly disturbs it.
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    rows, cols = args.grid
    world = World(args.dim)
    if args.features is None:
        entries = world.draw(max(args.entries))
        patches = world.draw(args.frame_count * rows * cols)
        frames = patches.reshape(args.frame_count, rows, cols, args.dim)
    else:
        stored = np.load(args.features, mmap_mode="r", allow_pickle=False)
        entries = stored.reshape(-1, stored.shape[-1])
        frames = np.load(args.frames, allow_pickle=False)[: args.frame_count]
    kinds = kinds_of_frames(frames)
    print(
        f"{frames.shape[1]}x{frames.shape[2]} patches of {frames.shape[3]} dimensions, "
        f"{args.threads} threads on {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, "
        f"torch {torch.__version__}"
    )
    rng = np.random.default_rng(2)
    chosen = [np.sort(rng.choice(len(entries), n, replace=False)) for n in args.entries]
    scorers, names = [], []
    for rows_of_index in chosen:
        begin = time.perf_counter()
        index = make_index(np.ascontiguousarray(entries[rows_of_index]))
        print(f"{index.count} entries: lists made in {time.perf_counter() - begin:.1f} s")
        for mode in args.modes:
            # An index of its own for each mode, of the same arrays.
            own = NominalIndex(index.content, manifest=index.manifest)
            own.configure_search(mode, 16)
            scorers.append(FrameScorer(own, Settings(), RegionOfInterest()))
            names.append((index.count, mode))
    # As a calibration would: standardised by nominal distances, and a threshold above all of them.
    normalisations, thresholds = [], []
    for scorer in scorers:
        values = np.concatenate(
            [scorer.distance_maps(PatchGrid(f, (720, 1280)))[0].values.ravel() for f in frames[::3]]
        )
        normalisations.append([constant_normalisation(float(values.mean()), float(values.std()))])
        scores = [
            scorer.score(PatchGrid(f, (720, 1280)), normalisations[-1], None).score
            for f in frames[::3]
        ]
        thresholds.append(1.05 * max(scores))
    print("| entries | bounds | frames | search ms, median | p95 | least | coarse |")
    print("|---|---|---|---|---|---|---|")
    for kind, of_kind in kinds.items():
        times_ms = np.empty((len(scorers), len(of_kind)))
        coarse = np.zeros(len(scorers), int)
        for number, features in enumerate(of_kind):
            grid = PatchGrid(features, (720, 1280))
            for position, scorer in enumerate(scorers):
                threshold = thresholds[position]
                begin = clock()
                found = scorer.score(grid, normalisations[position], threshold, threshold / 2)
                times_ms[position, number] = 1e3 * (clock() - begin)
                coarse[position] += found.coarse
        for (count, mode), of_mode, is_coarse in zip(names, times_ms, coarse, strict=True):
            median, high = np.percentile(of_mode, [50, 95])
            print(
                f"| {count} | {mode} | {kind} | {median:.0f} | {high:.0f} | {of_mode.min():.0f} "
                f"| {is_coarse} of {len(of_mode)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
