"""What limits instances: the masks, the embeddings, or how surroundings are compared.

Masks are the street world's own, so that no segmenter is to blame. Every form of comparison is told
by the AUROC of single instances (odd ones against all others) and of frames (mean of the two
largest), each value standardised by calibration instances of about the same size.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from tqdm import tqdm

from semantic_anomaly.evaluation.metrics import frame_auroc
from semantic_anomaly.linalg import inner_products
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.segmentation.embedder import RunningEmbedder
from semantic_anomaly.segmentation.masks import InstanceMasks, instances_of, patch_shares
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import PatchGrid
from semantic_anomaly.synthetic import KINDS, StreetDrive, StreetFrame, family

LEAST_PX = 40
SIZES = 8
# A tenth of the image up or down, a factor of two in size.
HEIGHT, SIZE = 0.1, math.log(2.0)
NEAREST_SURROUNDINGS, NEAREST_INSTANCES = 300, 30
# Width of the ring in sides of a square of the area of the instance.
RING_WIDTH, BELOW_WEIGHT = 0.5, 2.0
WHOLE = ImageRegion()


@dataclass(frozen=True, eq=False)
class Seen:
    """The instances of a frame.

    Attributes:
        own, around, layout: (n, dim) float32 unit vectors: the instance, its surroundings, and
            its quarters one after another.
        place: (n, 2) float32, lower edge as a share of the height, logarithm of the area's.
        odd: (n,) bool.
        kind: of the frame's anomaly, empty for none.
    """

    own: np.ndarray
    around: np.ndarray
    layout: np.ndarray
    place: np.ndarray
    odd: np.ndarray
    kind: str


def seen(embedder: RunningEmbedder, view: StreetFrame) -> Seen | None:
    """Return the instances of a rendered frame, None where there are none."""
    grid = embedder.embed([view.image])[0]
    rows, cols = grid.grid_hw
    masks = [view.instances == n for n in np.unique(view.instances) if n]
    masks = [mask for mask in masks if mask.sum() >= LEAST_PX]
    if not masks:
        return None
    found = InstanceMasks(np.stack(masks), np.ones(len(masks), np.float32), grid.image_hw)
    shares = patch_shares(found, grid.grid_hw)
    grid = PatchGrid(grid.features, grid.global_feature, grid.image_hw, shares)
    pooled = instances_of(grid, WHOLE)
    around = surroundings(grid, shares)
    lower = [np.flatnonzero(share.any(axis=1))[-1] / rows for share in shares]
    area = np.log(shares.sum(axis=(1, 2)) / (rows * cols))
    odd = np.array([(view.anomaly_mask.astype(bool) & m).sum() > m.sum() / 2 for m in masks])
    place = np.stack([np.array(lower), area], axis=1).astype(np.float32)
    return Seen(pooled.embeddings, around, quarters(grid, shares), place, odd, view.kind or "")


def surroundings(grid: PatchGrid, shares: np.ndarray) -> np.ndarray:
    """Return (n, dim) float32 unit vectors: a ring around each instance, twice the weight below."""
    vectors = []
    for share in shares:
        width = max(1, round(RING_WIDTH * math.sqrt(float(share.sum()))))
        ring = cv2.dilate(share, np.ones((2 * width + 1, 2 * width + 1), np.uint8))
        below = np.zeros_like(share)
        below[width:] = share[:-width]
        weights = np.maximum(ring, BELOW_WEIGHT * below) * (1.0 - share)
        mean = np.tensordot(weights if weights.any() else share, grid.features, axes=2)
        vectors.append(mean / max(float(np.linalg.norm(mean)), 1e-9))
    return np.array(vectors, np.float32)


def quarters(grid: PatchGrid, shares: np.ndarray) -> np.ndarray:
    """Return (n, 4 * dim) float32 unit vectors: upper left to lower right of each instance."""
    found = []
    for share in shares:
        ys, xs = np.nonzero(share)
        middle = (ys.min() + ys.max() + 1) / 2, (xs.min() + xs.max() + 1) / 2
        parts = []
        for down, along in np.ndindex(2, 2):
            rows = (np.arange(share.shape[0]) >= middle[0]) == bool(down)
            cols = (np.arange(share.shape[1]) >= middle[1]) == bool(along)
            weights = share * np.outer(rows, cols)
            pooled = np.tensordot(weights if weights.any() else share, grid.features, axes=2)
            parts.append(pooled / max(float(np.linalg.norm(pooled)), 1e-9))
        found.append(np.concatenate(parts) / 2)
    return np.array(found, np.float32)


def forms(one: Seen, index: Seen) -> dict[str, np.ndarray]:
    """Return (n,) how far each instance is from nominal, by each form of comparison."""
    own = 1 - inner_products(one.own, np.ascontiguousarray(index.own.T))
    around = 1 - inner_products(one.around, np.ascontiguousarray(index.around.T))
    apart = (one.place[:, None] - index.place[None]) / (HEIGHT, SIZE)
    place = (apart**2).sum(axis=2)
    pair = (own + around) / 2
    like = np.argpartition(around, NEAREST_SURROUNDINGS, axis=1)[:, :NEAREST_SURROUNDINGS]
    same = np.argpartition(own, NEAREST_INSTANCES, axis=1)[:, :NEAREST_INSTANCES]
    unit = float(np.median(own))
    return {
        "instance": own.min(axis=1),
        "layout within the instance": 1 - inner_products(one.layout, index.layout.T).max(axis=1),
        "surroundings": around.min(axis=1),
        "pair": pair.min(axis=1),
        "pair minus surroundings": pair.min(axis=1) - around.min(axis=1) / 2,
        "instance, surroundings alike": np.take_along_axis(own, like, 1).min(axis=1),
        "surroundings, instance alike": np.take_along_axis(around, same, 1).min(axis=1),
        "place, instance alike": np.take_along_axis(place, same, 1).min(axis=1),
        "instance and place": (own / unit + 0.1 * place).min(axis=1),
    }


def nominal(first: int, drives: int, each: int) -> Iterator[StreetFrame]:
    """Yield frames of nominal drives."""
    for seed in range(first, first + drives):
        drive = StreetDrive(seed, frames=12 * each)
        for number in range(each):
            yield drive.frame(12 * number + seed % 12)


def tests(first: int, drives: int, each: int) -> Iterator[StreetFrame]:
    """Yield anomalous frames, and as many of the same drives without."""
    for number, kind in enumerate(KINDS * drives):
        drive = StreetDrive(first + number, frames=100, anomalies=(kind,))
        views = [drive.frame(n) for n in range(0, 100, 6)]
        for odd in (True, False):
            chosen = [view for view in views if (view.kind is not None) == odd]
            places = np.linspace(0, len(chosen) - 1, min(each, len(chosen))).round().astype(int)
            yield from (chosen[place] for place in places)


def size_of(one: Seen) -> np.ndarray:
    """Return (n,) the class of size of each instance."""
    return np.clip(-one.place[:, 1], 0, SIZES - 1).astype(int)


def standardised(
    calibration: list[dict[str, np.ndarray]], seen_there: list[Seen], name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and deviation (SIZES,) of a form by size, of all where a size is rare."""
    values = np.concatenate([each[name] for each in calibration])
    sizes = np.concatenate([size_of(one) for one in seen_there])
    means, deviations = np.full(SIZES, values.mean()), np.full(SIZES, values.std())
    for size in range(SIZES):
        here = values[sizes == size]
        if len(here) > 8:
            means[size], deviations[size] = here.mean(), here.std() + 1e-9
    return means, deviations


def main() -> None:
    """Print one table row a form of comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--backbone", default="street_small", help="NAME-OR-FOLDER[:LAYER,LAYER]")
    parser.add_argument("--input-size", type=int, default=640)
    parser.add_argument("--first-seed", type=int, default=60000)
    args = parser.parse_args()
    backbone, _, layers = args.backbone.partition(":")
    chosen = tuple(int(layer) for layer in layers.split(",") if layer)
    settings = Settings(backbone=backbone, layers=chosen, input_size=args.input_size)
    embedder = RunningEmbedder.from_settings(settings)

    def embedded(views: Iterator[StreetFrame], what: str) -> list[Seen]:
        found = (seen(embedder, view) for view in tqdm(views, what, disable=None))
        return [one for one in found if one is not None]

    kept = embedded(nominal(args.first_seed, 80, 4), "index")
    index = Seen(
        np.concatenate([one.own for one in kept]),
        np.concatenate([one.around for one in kept]),
        np.concatenate([one.layout for one in kept]),
        np.concatenate([one.place for one in kept]),
        np.zeros(0, bool),
        "",
    )
    calibration = embedded(nominal(args.first_seed + 500, 30, 3), "calibration")
    frames = embedded(tests(args.first_seed + 1000, 4, 4), "test")
    usual = [forms(one, index) for one in calibration]
    found = [forms(one, index) for one in tqdm(frames, "compare", disable=None)]
    print(f"{len(index.own)} nominal instances, {len(frames)} test frames")
    print("| compared | odd object: instances, frames | odd arrangement: instances, frames |")
    print("|---|---|---|")
    for name in found[0]:
        means, deviations = standardised(usual, calibration, name)
        values = [
            (each[name] - means[size_of(one)]) / deviations[size_of(one)]
            for each, one in zip(found, frames, strict=True)
        ]
        cells = []
        for wanted in dict.fromkeys(map(family, KINDS)):
            here = [not one.kind or family(one.kind) == wanted for one in frames]
            some = [(v, one) for v, one, keep in zip(values, frames, here, strict=True) if keep]
            tops = np.array([np.sort(v)[-2:].mean() for v, _ in some])
            by_frame = frame_auroc(tops, np.array([bool(one.kind) for _, one in some]))
            truth = np.concatenate([one.odd for _, one in some])
            by_instance = frame_auroc(np.concatenate([v for v, _ in some]), truth)
            cells.append(f"{by_instance:.3f}, {by_frame:.3f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
