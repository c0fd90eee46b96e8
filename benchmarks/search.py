"""Measure exact against graph search on grids of clustered embeddings; medians in milliseconds.

python benchmarks/search.py --entries 10000 20000 30000 --dim 160 --queries 2304
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from semantic_anomaly.embedding.identity import EmbedderIdentity, StageIdentity
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.settings import Settings
from semantic_anomaly.stages import StageSpec
from semantic_anomaly.structures import Frame, PatchGrid

SIDE = 50
CLUSTERS = 60
LOCAL_DIM = 16


class World:
    """Unit vectors around cluster centres, each with a local plane of variation."""

    def __init__(self, dim: int) -> None:
        self._generator = np.random.default_rng(0)
        self._centres = self._generator.standard_normal((CLUSTERS, dim))
        self._planes = self._generator.standard_normal((CLUSTERS, LOCAL_DIM, dim))

    def draw(self, count: int, outlier_share: float = 0.0) -> np.ndarray:
        """Return (count, dim) float32 unit vectors."""
        cluster = self._generator.integers(0, CLUSTERS, count)
        local = 0.15 * self._generator.standard_normal((count, 1, LOCAL_DIM))
        points = self._centres[cluster] + (local @ self._planes[cluster])[:, 0]
        outliers = self._generator.random(count) < outlier_share
        points[outliers] = self._generator.standard_normal((outliers.sum(), points.shape[1]))
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        return points.astype(np.float32)


def build(world: World, entries: int, dim: int) -> NominalIndex:
    """Return an index of a number of entries, without near-duplicate removal."""
    names = "none", "none", "", "0" * 64, "0" * 64
    identity = EmbedderIdentity(*names, 0, 640, 1, 14, dim, "float32")
    stage = StageIdentity(StageSpec("none", 0, 640), identity)
    frames = []
    for start in range(0, entries, SIDE * SIDE):
        rows = min(SIDE, -(-(entries - start) // SIDE))
        grid = world.draw(rows * SIDE).reshape(rows, SIDE, dim)
        image = np.zeros((rows, SIDE, 3), np.uint8)
        frames.append((Frame(image, name=str(start)), PatchGrid(grid, image.shape[:2])))
    settings = Settings(dedup_distance=0.0, max_entries=entries)
    return NominalIndex.build(frames, stages=[stage], roi=RegionOfInterest(), settings=settings)


def largest_exact(index: NominalIndex, queries: np.ndarray, k: int, top: int) -> np.ndarray:
    """Return distances of a graph search, with the `top` largest replaced by exact ones."""
    distances = index.distances(queries, k)
    largest = np.argpartition(distances, len(distances) - top)[-top:]
    distances[largest] = index.exact_distances(queries[largest], k)
    return distances


def median_ms(work: Callable[[], object], repeats: int) -> float:
    """Return the median milliseconds of some calls, after a warm-up call."""
    work()
    times_ms = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times_ms.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times_ms)


def main() -> None:
    """Print a Markdown table with one row for each number of entries and `ef`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, nargs="+", default=[10_000, 20_000, 30_000])
    parser.add_argument("--dim", type=int, default=160)
    parser.add_argument("--queries", type=int, default=2304)
    parser.add_argument("--neighbours", type=int, default=1)
    parser.add_argument("--ef", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--outliers", type=float, default=0.01, help="share of random queries")
    args = parser.parse_args()
    k = args.neighbours
    print(
        f"{args.queries} queries of {args.dim} dimensions, {100 * args.outliers:g} % outliers, "
        f"k = {k}, {os.cpu_count()} CPUs; 'checked': with exact distances of the largest 1 %"
    )
    print("| entries | exact ms | ef | graph ms | checked ms | recall | max error | build s |")
    print("|---|---|---|---|---|---|---|---|")
    for entries in args.entries:
        world = World(args.dim)
        start = time.perf_counter()
        index = build(world, entries, args.dim)
        build_s = time.perf_counter() - start
        queries = world.draw(args.queries, args.outliers)
        top = -(-args.queries // 100)
        with tempfile.TemporaryDirectory() as folder:
            index.save(Path(folder) / "index")
            index = NominalIndex.load(Path(folder) / "index")
            index.configure_search("graph", args.ef[0])
        exact = median_ms(partial(index.exact_distances, queries, k), args.repeats)
        for ef in args.ef:
            index.configure_search("graph", ef)
            graph = median_ms(partial(index.distances, queries, k), args.repeats)
            checked = median_ms(partial(largest_exact, index, queries, k, top), args.repeats)
            recall = index.recall(queries, k)
            print(
                f"| {entries} | {exact:.1f} | {ef} | {graph:.1f} | {checked:.1f} "
                f"| {recall['recall']:.3f} | {recall['max_error']:.2g} | {build_s:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
