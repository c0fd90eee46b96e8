"""Measure the time of the detector's stages, and its frame rate, on synthetic street frames.

For each input size and precision: exact and graph search, then the grouping of patches into
instances (`tokens`) beside the backbone. Every figure is a median over the frames of one run on one
machine: compare rows of one run only. Needs no data. With the defaults it takes 10 minutes on two
CPU cores; run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import time

import cv2
import numpy as np
from tqdm import tqdm

from semantic_anomaly import AnomalyDetector, Frame, Settings, build_index, calibrate
from semantic_anomaly.segmentation.embedder import RunningEmbedder, load_segmenter
from semantic_anomaly.synthetic import StreetDrive

WARM_UP_FRAMES = 2


def make_detector(settings: Settings, drives: int, frames: int) -> AnomalyDetector:
    """Return a detector with index and calibration from synthetic nominal drives."""
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
        for seed in range(1000, 1000 + max(3, drives // 2))
    }
    calibration = calibrate(index, nominal, settings=settings, target_false_alarm_rate=0.1)
    return AnomalyDetector(index, calibration, settings=settings, embedder=embedder)


def detector_row(detector: AnomalyDetector, images: list[np.ndarray]) -> str:
    """Return frame rate and stage medians of a detector as table cells."""
    walls_ms, stages = [], []
    for number, image in enumerate(images):
        begin = time.perf_counter()
        result = detector.detect(Frame(image, stamp_ns=number, name=str(number)))
        walls_ms.append((time.perf_counter() - begin) * 1e3)
        stages.append(result.stage_ms)
    medians = {
        stage: float(np.median([ms[stage] for ms in stages[WARM_UP_FRAMES:]]))
        for stage in ("forward", "search", "localize")
    }
    total = float(np.median(walls_ms[WARM_UP_FRAMES:]))
    times = " | ".join(f"{ms:.1f}" for ms in (total, *medians.values()))
    outside = 100 * (1 - medians["forward"] / total)
    return f"{detector.index.count} | {1e3 / total:.1f} | {times} | {outside:.0f} %"


def instances_row(detector: AnomalyDetector, images: list[np.ndarray]) -> str:
    """Return the medians of backbone and `tokens` segmenter as table cells."""
    segmenter = load_segmenter("tokens")
    rows = []
    for image in images:
        begin = time.perf_counter()
        grid = detector.embedder.embed([image])[0]
        embedded = time.perf_counter()
        masks = segmenter.segment(image, grid)
        segmented = time.perf_counter()
        rows.append(((embedded - begin) * 1e3, (segmented - embedded) * 1e3, len(masks)))
    embed_ms, segment_ms, count = np.median(rows[WARM_UP_FRAMES:], axis=0)
    return f"{embed_ms:.1f} | {segment_ms:.1f} | {100 * segment_ms / embed_ms:.0f} % | {count:.0f}"


def main() -> None:
    """Print the tables of stages and of instances."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="mobilenet_v1", help="shipped name or folder")
    parser.add_argument("--drives", type=int, default=6, help="drives of the index")
    parser.add_argument("--frames", type=int, default=30, help="frames of each drive")
    parser.add_argument("--measured", type=int, default=60, help="frames measured")
    parser.add_argument("--input-sizes", nargs="+", type=int, default=[640, 960])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    if args.measured <= WARM_UP_FRAMES:
        parser.error(f"--measured: expected more than {WARM_UP_FRAMES}, found {args.measured}")
    print(f"{platform.processor() or platform.machine()}, backbone {args.backbone}, 1280x720 input")
    street = StreetDrive(2000, frames=args.measured)
    images = [
        cv2.resize(view.image, (1280, 720), interpolation=cv2.INTER_LINEAR)
        for view in tqdm(street, desc="render", disable=None)
    ]
    print(
        "| input size | dtype | search | entries | frames/s | total ms | embed ms | search ms "
        "| localize ms | outside the backbone |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    instances = []
    for size, dtype in itertools.product(args.input_sizes, args.dtypes):
        settings = Settings(backbone=args.backbone, dtype=dtype, input_size=size)
        detector = make_detector(settings, args.drives, args.frames)
        for search in ("exact", "graph"):
            detector.index.configure_search(search, detector.settings.search_ef)
            row = detector_row(detector, images)
            print(f"| {size} | {dtype} | {search} | {row} |", flush=True)
        instances.append(f"| {size} | {dtype} | {instances_row(detector, images)} |")
    print("\n| input size | dtype | backbone ms | tokens ms | of the backbone | instances |")
    print("|---|---|---|---|---|---|")
    print("\n".join(instances))


if __name__ == "__main__":
    main()
