"""Measure what grouping patch embeddings into instances costs, beside the backbone that made them.

Both are timed in turn on the same frames of one run: compare rows of one run only.
"""

from __future__ import annotations

import argparse
import platform
import time

import cv2
import numpy as np
import torch

from semantic_anomaly.embedding.backbone import PatchEmbedder
from semantic_anomaly.segmentation.embedder import load_segmenter
from semantic_anomaly.segmentation.tokens import token_regions
from semantic_anomaly.synthetic import StreetDrive


def main() -> None:
    """Print medians in milliseconds, and their ratio to the backbone's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default="street_small")
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    embedder = PatchEmbedder(args.backbone)
    segmenter = load_segmenter("tokens")
    rows = []
    for view in StreetDrive(2000, frames=args.frames):
        image = cv2.resize(view.image, (1280, 720), interpolation=cv2.INTER_LINEAR)
        begin = time.perf_counter()
        grid = embedder.embed([image])[0]
        embedded = time.perf_counter()
        found = segmenter.segment(image, grid)
        segmented = time.perf_counter()
        token_regions(grid.features)
        grouped = time.perf_counter()
        rows.append((embedded - begin, segmented - embedded, grouped - segmented, len(found)))
    # The first frames warm up caches and kernels.
    backbone, tokens, grouping, count = np.median(np.array(rows[3:]), axis=0)
    name = platform.processor() or platform.machine()
    print(f"{name}, {args.threads} threads, backbone {args.backbone}, 1280x720")
    print("| part | ms | of the backbone |")
    print("|---|---|---|")
    for part, value in (("backbone", backbone), ("tokens", tokens), ("its grouping", grouping)):
        print(f"| {part} | {value * 1e3:.1f} | {100 * value / backbone:.0f} % |")
    ratios = [tokens / backbone for backbone, tokens, _, _ in rows[3:]]
    print(f"median of the frames' ratios {100 * np.median(ratios):.0f} %, {count:.0f} instances")


if __name__ == "__main__":
    main()
