"""Measure the detector's stages, and its rate, on frames of a synthetic street.

Every figure is a median over frames of one run on one machine: compare rows of one run only.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import time

import cv2
import numpy as np
from tqdm import tqdm

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.scoring.normalisation import PlaceSums, anchors_of
from semantic_anomaly.segmentation.embedder import RunningEmbedder
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame
from semantic_anomaly.synthetic import StreetDrive


def make_detector(settings: Settings, drives: int, frames: int) -> AnomalyDetector:
    """Return a calibrated detector of synthetic nominal drives."""
    embedder = RunningEmbedder.from_settings(settings)
    region = ImageRegion()

    def embedded(seeds: range):  # type: ignore[no-untyped-def]
        for seed in tqdm(seeds, desc="drives", disable=None):
            for view in StreetDrive(seed, frames=frames):
                grid = embedder.embed([view.image])[0]
                yield Frame(view.image, name=view.name), grid

    index = NominalIndex.build(
        embedded(range(drives)), identity=embedder.identity, region=region, settings=settings
    )
    detector = AnomalyDetector(embedder, index, None, settings, region)
    scored: dict[str, list[float]] = {}
    lows = []
    nominal = list(embedded(range(1000, 1000 + max(2, drives // 2))))
    sums = PlaceSums(anchors_of(index.content.embeddings, settings.usual_kinds))
    for _, grid in nominal:
        found = detector.plain_distances(grid)["grid"]
        sums.add(found.values, found.inside, found.embeddings)
    detector = AnomalyDetector(embedder, index, None, settings, region, {"grid": sums.usual()})
    for frame, grid in nominal:
        score, distances = detector.score(grid)
        scored.setdefault(frame.name.rpartition("_")[0], []).append(score)
        lows.append(float(np.median(distances)))
    calibration = Calibration.fit(
        scored,
        heatmap_low=float(np.median(lows)),
        index=index,
        settings=settings.replace(target_false_alarm_rate=0.1),
        region=region,
        camera="camera",
        usual={"grid": sums.usual()},
    )
    return AnomalyDetector(
        embedder, index, calibration, settings.replace(target_false_alarm_rate=0.1), region
    )


def main() -> None:
    """Print a table of stage medians in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default="street_small")
    parser.add_argument("--drives", type=int, default=6)
    parser.add_argument("--frames", type=int, default=30, help="frames a drive")
    parser.add_argument("--measured", type=int, default=60, help="frames measured")
    parser.add_argument("--input-sizes", nargs="+", type=int, default=[640, Settings().input_size])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, backbone {args.backbone}, 1280x720 input")
    street = StreetDrive(2000, frames=args.measured)
    images = [
        cv2.resize(view.image, (1280, 720), interpolation=cv2.INTER_LINEAR)
        for view in tqdm(street, desc="render", disable=None)
    ]
    heads = "input size", "dtype", "search", "entries", "frames/s", "total ms", "stages ms"
    print(f"| {' | '.join(heads)} | outside the backbone |")
    print("|---|---|---|---|---|---|---|---|")
    for size, dtype in itertools.product(args.input_sizes, args.dtypes):
        settings = Settings(backbone=args.backbone, dtype=dtype, input_size=size)
        base = make_detector(settings, args.drives, args.frames)
        for search in ("exact", "graph"):
            base.index.configure_search(search, base.settings.search_ef)
            walls, stages = [], []
            for number, image in enumerate(images):
                begin = time.perf_counter()
                result = base.detect(Frame(image, stamp_ns=number, name=str(number)))
                walls.append((time.perf_counter() - begin) * 1e3)
                stages.append(dict(result.stage_ms))
            medians = {key: float(np.median([s.get(key, 0) for s in stages])) for key in stages[0]}
            total = float(np.median(walls[2:]))
            inside = medians.get("forward", medians["embed"])
            text = ", ".join(f"{key} {value:.1f}" for key, value in medians.items())
            print(
                f"| {size} | {dtype} | {search} | {base.index.count} | {1e3 / total:.1f} "
                f"| {total:.1f} | {text} | {100 * (1 - inside / total):.0f} % |"
            )


if __name__ == "__main__":
    main()
