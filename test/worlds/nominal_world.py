"""Nominal frames of a small invented world, and indexes built of them, for the tests of indexes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from semantic_anomaly.embedding.identity import EmbedderIdentity, SegmenterIdentity, StageIdentity
from semantic_anomaly.index.build import NominalFrame
from semantic_anomaly.index.content import RecordedSource
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.settings import Settings
from semantic_anomaly.stages import GRID as GRID_KIND
from semantic_anomaly.stages import INSTANCES, StageSpec
from semantic_anomaly.storage import canonical_json, sha256_bytes, sha256_file
from semantic_anomaly.structures import Frame, PatchGrid

DIM, COARSE_DIM = 16, 12
GRID, COARSE_GRID = (6, 8), (3, 4)
IMAGE_HW = (60, 80)
IDENTITY = EmbedderIdentity(
    "tiny", "dinov2", "", "0" * 64, "1" * 64, 3, 112, 1, 14, DIM, "float32", 0.0
)
SEGMENTER = SegmenterIdentity("tokens", "", "a" * 64)
LEFT_HALF = RegionOfInterest(((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0)))

PATCHES = StageIdentity(StageSpec("tiny", 3, 112), IDENTITY)
POOLED = StageIdentity(StageSpec("tiny", 3, 112, kind=INSTANCES, weight=0.5), IDENTITY, SEGMENTER)
COARSE = StageIdentity(
    StageSpec("tiny", 2, 56, average=3, weight=2.0),
    replace(IDENTITY, layer=2, input_size=56, average=3, dim=COARSE_DIM),
)
STAGES = (PATCHES, COARSE, POOLED)


def weighted(stage: StageIdentity, weight: float) -> StageIdentity:
    return replace(stage, spec=replace(stage.spec, weight=weight))


def unit(points: np.ndarray) -> np.ndarray:
    points = points.astype(np.float32)
    return points / np.linalg.norm(points, axis=-1, keepdims=True)


def make_frames(
    count: int, seed: int = 0, stages: Sequence[StageIdentity] = (PATCHES,)
) -> Iterator[tuple[Frame, PatchGrid]]:
    """Frames of patches around five directions; of POOLED with instances: two halves and a patch.

    Patches of the first four columns belong to no instance.
    """
    rng, coarse_rng = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    centres = np.random.default_rng(99).standard_normal((5, DIM))
    instances = np.zeros((3, *GRID), np.float32)
    instances[0, :3, 4:] = instances[1, 3:, 4:] = instances[2, 0, 4] = 1.0
    for number in range(count):
        around = centres[rng.integers(0, 5, GRID)]
        features = unit(around + 0.4 * rng.standard_normal((*GRID, DIM)))
        image = rng.integers(0, 256, (*IMAGE_HW, 3), dtype=np.uint8)
        around = centres[coarse_rng.integers(0, 5, COARSE_GRID), :COARSE_DIM]
        coarse = unit(around + 0.4 * coarse_rng.standard_normal((*COARSE_GRID, COARSE_DIM)))
        grids = {
            (DIM, GRID_KIND): PatchGrid(features, IMAGE_HW),
            (COARSE_DIM, GRID_KIND): PatchGrid(coarse, IMAGE_HW),
            (DIM, INSTANCES): PatchGrid(features, IMAGE_HW, instances),
        }
        first, *further = (grids[stage.embedder.dim, stage.spec.kind] for stage in stages)
        yield Frame(image, name=f"drive/{number:03d}"), replace(first, further=tuple(further))


def build(
    count: int = 8,
    roi: RegionOfInterest | None = None,
    stages: Sequence[StageIdentity] = (PATCHES,),
    **changes: Any,
) -> NominalIndex:
    return NominalIndex.build(
        make_frames(count, stages=stages),
        stages=stages,
        roi=roi or RegionOfInterest(),
        settings=Settings(**{"dedup_distance": 0.05, "search_ef": 77, **changes}),
        sources=[RecordedSource("drive")],
    )


def recorded(frames: Iterable[NominalFrame], recording: str) -> list[NominalFrame]:
    """Return frames that are a part of a recording, named after it."""
    return [
        (replace(frame, recording=recording, name=f"{recording}/{frame.name[-3:]}"), *rest)
        for frame, *rest in frames
    ]


def build_of_drives(
    seeds: Mapping[str, int],
    count: int = 4,
    stages: Sequence[StageIdentity] = (PATCHES,),
    **changes: Any,
) -> NominalIndex:
    """Return the index of drives of so many frames each, by name and seed."""
    return NominalIndex.build(
        itertools.chain.from_iterable(
            recorded(make_frames(count, seed, stages), name) for name, seed in seeds.items()
        ),
        stages=stages,
        roi=RegionOfInterest(),
        settings=Settings(**{"dedup_distance": 0.15, **changes}),
        sources=[RecordedSource(name, f"/{name}", "", {"": name}) for name in seeds],
    )


def patches(count: int, seed: int = 0) -> np.ndarray:
    return np.concatenate([g.features.reshape(-1, DIM) for _, g in make_frames(count, seed)])


def sign_again(folder: Path, change: Callable[[dict[str, Any]], object] = lambda m: None) -> None:
    """Change a manifest, and make all digests of an index folder fit again, as a forger would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, facts in manifest["files"].items():
        path = folder / name
        facts.update(bytes=path.stat().st_size, sha256=sha256_file(path))
    for name in ("embeddings", "entries", "centroids", "lists", "support"):
        # What is no array keeps the digest of the array before it.
        with suppress(Exception):
            array = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            manifest["content"][f"{name}_sha256"] = sha256_bytes(array.tobytes())
    change(manifest)
    del manifest["sha256"]
    manifest["fingerprint"] = sha256_bytes(canonical_json(manifest["content"]).encode())
    manifest["sha256"] = sha256_bytes(canonical_json(manifest).encode())
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
