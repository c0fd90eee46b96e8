"""Compare backbones on held-out drives of the synthetic street.

Every backbone gets the same index frames, the same number of entries, the same calibration and test
frames and exact search, so that rows differ by their features alone. Two baselines show what
training is worth: the same architecture untrained, and a hand-crafted descriptor. Needs no data.
With the defaults it takes 15 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModel

from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.detection.localization import heatmap
from semantic_anomaly.embedding.identity import Embedder, EmbedderIdentity, StageIdentity
from semantic_anomaly.embedding.pretrained import SHIPPED
from semantic_anomaly.evaluation.metrics import PixelScores, frame_auroc
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.offline.calibrate import calibrate
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.segmentation.embedder import RunningEmbedder
from semantic_anomaly.settings import Settings
from semantic_anomaly.stages import StageSpec
from semantic_anomaly.structures import Frame, PatchGrid
from semantic_anomaly.synthetic import KINDS, StreetDrive, StreetFrame, family

FAMILIES = ("odd object", "odd arrangement")
# The same for learnt and hand-crafted features.
INPUT_SIZE, PATCH_PX = 640, 10
ORIENTATIONS = 8


class HandCrafted:
    """Mean and deviation of LAB colours, and a histogram of gradient directions, of each patch."""

    def __init__(self) -> None:
        digest = hashlib.sha256(b"LAB moments and gradient orientations").hexdigest()
        dim = 6 + ORIENTATIONS
        names = "hand-crafted", "hand-crafted", "", digest, digest
        identity = EmbedderIdentity(*names, 0, INPUT_SIZE, 1, PATCH_PX, dim, "float32")
        self.stages = (StageIdentity(StageSpec("hand-crafted", 0, INPUT_SIZE), identity),)

    def grids_hw(self, image_hw: tuple[int, int]) -> list[tuple[int, int]]:
        """Return (rows, cols) of the only grid, of an image of (height, width)."""
        scale = INPUT_SIZE / max(image_hw) / PATCH_PX
        return [(max(1, round(image_hw[0] * scale)), max(1, round(image_hw[1] * scale)))]

    def embed(self, images: Sequence[np.ndarray]) -> list[PatchGrid]:
        """Return the descriptors of (height, width, 3) uint8 RGB images, in order."""
        return [self._embed(image) for image in images]

    def _embed(self, image: np.ndarray) -> PatchGrid:
        hw = (image.shape[0], image.shape[1])
        [(rows, cols)] = self.grids_hw(hw)

        def pooled(values: np.ndarray) -> np.ndarray:
            return cv2.resize(values, (cols, rows), interpolation=cv2.INTER_AREA)

        lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB).astype(np.float32) / 255
        mean = pooled(lab)
        deviation = np.sqrt(np.maximum(pooled(lab * lab) - mean * mean, 0))
        light = np.ascontiguousarray(lab[..., 0])
        dx, dy = cv2.Sobel(light, cv2.CV_32F, 1, 0), cv2.Sobel(light, cv2.CV_32F, 0, 1)
        strength = np.hypot(dx, dy)
        angle = (np.arctan2(dy, dx) % np.pi) * (ORIENTATIONS / np.pi)
        bins = []
        for i in range(ORIENTATIONS):
            offset = np.abs(angle - i)
            weight = np.clip(1 - np.minimum(offset, ORIENTATIONS - offset), 0, 1)
            bins.append(np.sqrt(pooled(strength * weight)))
        features = np.concatenate([mean - 0.5, deviation, np.stack(bins, -1)], -1)
        # Mid grey without texture is the zero vector, which has no direction.
        features[..., 0] += 1e-6
        features /= np.linalg.norm(features, axis=-1, keepdims=True)
        return PatchGrid(features.astype(np.float32), hw)


@dataclass
class Scores:
    """Scores of the test frames in one row."""

    frame: list[float] = field(default_factory=list)
    pixels: dict[str, PixelScores] = field(default_factory=dict)
    embed_ms: list[float] = field(default_factory=list)
    dim: int = 0


def nominal_frames(seeds: range, count: int) -> list[Frame]:
    """Render `count` frames, twelve apart, of each nominal drive."""
    frames = []
    for seed in tqdm(seeds, desc="nominal drives", disable=None):
        drive = StreetDrive(seed, frames=12 * count)
        views = [drive.frame(12 * i + seed % 12) for i in range(count)]
        frames += [Frame(view.image, view.stamp_ns, name=view.name) for view in views]
    return frames


def test_frames(first_seed: int, drives: int) -> list[StreetFrame]:
    """Render drives with one anomaly each: at most four frames with it and four without."""
    frames: list[StreetFrame] = []
    jobs = [(first_seed + i, kind) for i, kind in enumerate(KINDS * drives)]
    for seed, kind in tqdm(jobs, desc="test drives", disable=None):
        drive = StreetDrive(seed, frames=100, anomalies=(kind,))
        views = [drive.frame(i) for i in range(0, 100, 6)]
        for odd in (True, False):
            group = [view for view in views if (view.kind is not None) == odd]
            rows = np.linspace(0, len(group) - 1, min(4, len(group))).round().astype(int)
            frames += [group[row] for row in rows]
    return frames


def sampled(
    frames: Sequence[Frame], embedder: Embedder, patches: int
) -> Iterator[tuple[Frame, PatchGrid]]:
    """Embed frames and keep some patches of each, the same for all grids of the same size."""
    for number, frame in enumerate(tqdm(frames, desc="embed", disable=None)):
        grid = embedder.embed([frame.image])[0]
        flat = grid.features.reshape(-1, grid.dim)
        rows = np.random.default_rng(number).permutation(len(flat))[:patches]
        yield frame, PatchGrid(flat[rows][None], grid.image_hw)


def measure(
    embedder: Embedder,
    settings: Settings,
    nominal: Sequence[Frame],
    calibration: Sequence[Frame],
    tests: Sequence[StreetFrame],
    patches: int,
) -> dict[str, Scores]:
    """Score the test frames against an index of the nominal frames.

    Returns:
        Scores by suffix of the row's name: normalised by image cell, and plain distances.
    """
    roi = RegionOfInterest()
    index = NominalIndex.build(
        sampled(nominal, embedder, patches),
        stages=embedder.stages,
        roi=roi,
        settings=settings,
    )
    settings = settings.replace(search="exact")
    plain = AnomalyDetector(index, settings=settings, embedder=embedder)
    grids = [
        embedder.embed([frame.image])[0]
        for frame in tqdm(calibration, desc="calibration", disable=None)
    ]
    # Its threshold is not used: the largest rate needs the fewest frames.
    calibrated = calibrate(
        index, {"nominal": grids}, settings=settings, target_false_alarm_rate=0.5
    )
    # Without patch classes, which depend on the backbone's own entries.
    by_cell = dataclasses.replace(calibrated.normalisations[0], classes=None)
    normalised = AnomalyDetector(
        index, settings=settings, embedder=embedder, normalisations=[by_cell]
    )
    detectors = {"": normalised, ", plain distances": plain}
    rows = {suffix: Scores(dim=index.dim) for suffix in detectors}
    for scores in rows.values():
        scores.pixels = {name: PixelScores() for name in ("nominal", *FAMILIES)}
    for view in tqdm(tests, desc="test", disable=None):
        begin = time.perf_counter()
        grid = embedder.embed([view.image])[0]
        embed_ms = (time.perf_counter() - begin) * 1e3
        name = family(view.kind) if view.kind else "nominal"
        for suffix, detector in detectors.items():
            frame_score = detector.score(grid)
            rows[suffix].embed_ms.append(embed_ms)
            rows[suffix].frame.append(frame_score.score)
            heat = heatmap(frame_score.anomaly_map, roi, grid.image_hw)
            rows[suffix].pixels[name].add(heat.ravel(), view.anomaly_mask.ravel())
    return rows


def untrained(folder: Path, out: Path) -> Path:
    """Write the architecture of a backbone's folder with random weights and return its folder."""
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.from_pretrained(folder)).eval().save_pretrained(out)
    name = "preprocessor_config.json"
    (out / name).write_bytes((folder / name).read_bytes())
    return out


def row(name: str, scores: Scores, tests: Sequence[StreetFrame]) -> str:
    """Return a row of the table: AUROC and pixel AP of all anomalies and of each family."""
    frame = np.array(scores.frame)
    names = np.array([family(view.kind) if view.kind else "nominal" for view in tests])
    cells = []
    for families in (FAMILIES, *((name,) for name in FAMILIES)):
        keep = np.isin(names, ("nominal", *families))
        auroc = frame_auroc(frame[keep], names[keep] != "nominal")
        pixels = scores.pixels["nominal"]
        for name_of_family in families:
            pixels = pixels + scores.pixels[name_of_family]
        cells.append(f"{auroc:.3f} / {pixels.metrics().average_precision:.3f}")
    speed = f"{np.median(scores.embed_ms):.0f}"
    return f"| {name} | {scores.dim} | " + " | ".join(cells) + f" | {speed} |"


def by_kind(scores: Scores, tests: Sequence[StreetFrame]) -> dict[str, float]:
    """Return the frame AUROC of every kind of anomaly."""
    frame = np.array(scores.frame)
    kinds = np.array([view.kind or "" for view in tests])
    aurocs = {}
    for kind in KINDS:
        keep = (kinds == kind) | (kinds == "")
        auroc = frame_auroc(frame[keep], kinds[keep] == kind)
        if auroc is not None:
            aurocs[kind] = round(auroc, 3)
    return aurocs


def backbone_parameters(text: str) -> dict[str, Any]:
    """Return the parameters that NAME-OR-FOLDER[:LAYER,LAYER] names."""
    backbone, _, layers = text.partition(":")
    if not layers:
        return {"backbone": backbone}
    return {"backbone": backbone, "layers": [int(layer) for layer in layers.split(",")]}


def _embedder(backbone: str) -> Embedder:
    # place_weight 0: the position in the image is not a feature of the backbone.
    common = {"input_size": INPUT_SIZE, "place_weight": 0.0}
    settings = Settings.from_parameters({**backbone_parameters(backbone), **common})
    return RunningEmbedder.from_settings(settings)


def main() -> None:
    """Print the table, and the frame AUROC by kind as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="street_small", help="shipped name or folder")
    parser.add_argument(
        "--also", nargs="*", default=[], metavar="NAME-OR-FOLDER[:LAYER,LAYER]", help="more rows"
    )
    parser.add_argument("--only", action="store_true", help="without the two baselines")
    parser.add_argument("--first-seed", type=int, default=20000, help="seed of the first drive")
    parser.add_argument("--index-drives", type=int, default=60)
    parser.add_argument("--index-frames", type=int, default=4, help="frames of each index drive")
    parser.add_argument("--calibration-drives", type=int, default=40, help="three frames of each")
    parser.add_argument("--patches", type=int, default=100, help="index entries from each frame")
    parser.add_argument("--test-drives", type=int, default=4, help="drives with each anomaly")
    parser.add_argument("--tail-percent", type=float, default=Settings().tail_percent)
    parser.add_argument("--neighbours", type=int, default=Settings().neighbours)
    args = parser.parse_args()
    nominal = nominal_frames(
        range(args.first_seed, args.first_seed + args.index_drives), args.index_frames
    )
    calibration = nominal_frames(
        range(args.first_seed + 500, args.first_seed + 500 + args.calibration_drives), 3
    )
    tests = test_frames(args.first_seed + 1000, args.test_drives)
    odd = sum(view.kind is not None for view in tests)
    print(
        f"{len(nominal)} index frames, {len(calibration)} calibration frames, "
        f"{odd} anomalous and {len(tests) - odd} nominal test frames"
    )
    print("| features | dim | all: AUROC / pixel AP | odd object | odd arrangement | embed ms |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        shipped = SHIPPED / args.backbone
        folder = shipped if shipped.is_dir() else Path(args.backbone)
        embedders = [(folder.name, _embedder(str(folder)))]
        if not args.only:
            random = untrained(folder, Path(scratch) / "untrained")
            embedders.append((f"{folder.name}, untrained", _embedder(str(random))))
            embedders.append(("LAB and gradient orientations", HandCrafted()))
        embedders += [(Path(other).name, _embedder(other)) for other in args.also]
        # All entries are stored: near-duplicate removal would favour features of high contrast.
        settings = Settings(
            tail_percent=args.tail_percent,
            neighbours=args.neighbours,
            dedup_distance=0.0,
            smoothing=0.0,
        )
        kinds = {}
        for name, embedder in embedders:
            rows = measure(embedder, settings, nominal, calibration, tests, args.patches)
            for suffix, scores in rows.items():
                print(row(name + suffix, scores, tests), flush=True)
                kinds[name + suffix] = by_kind(scores, tests)
    print(json.dumps(kinds, indent=1))


if __name__ == "__main__":
    main()
