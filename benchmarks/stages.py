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

from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.offline.calibrate import calibrate
from semantic_anomaly.segmentation.embedder import RunningEmbedder
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame
from semantic_anomaly.synthetic import StreetDrive


def make_detector(settings: Settings, drives: int, frames: int) -> AnomalyDetector:
    """Return a calibrated detector of synthetic nominal drives."""
    embedder = RunningEmbedder.from_settings(settings)

    def drive_images(seed: int) -> list[np.ndarray]:
        return [view.image for view in StreetDrive(seed, frames=frames)]

    images = [
        image
        for seed in tqdm(range(drives), desc="drives", disable=None)
        for image in drive_images(seed)
    ]
    index = build_index(images, settings=settings, embedder=embedder)
    nominal = {
        f"drive {seed}": embedder.embed(drive_images(seed))
        for seed in range(1000, 1000 + max(2, drives // 2))
    }
    calibration = calibrate(index, nominal, settings=settings, target_false_alarm_rate=0.1)
    return AnomalyDetector(index, calibration, settings=settings, embedder=embedder)


def main() -> None:
    """Print a table of stage medians in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default="street_small")
    parser.add_argument("--drives", type=int, default=6)
    parser.add_argument("--frames", type=int, default=30, help="frames a drive")
    parser.add_argument("--measured", type=int, default=60, help="frames measured")
    parser.add_argument("--input-sizes", nargs="+", type=int, default=[640, 960])
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
