"""Choose the default settings by measurement: stages, input sizes, smoothing and the rest.

From a start, one factor is varied at a time, twice (coordinate-wise). The value with the best mean
rank over the data sets stays. Then every data set is left out once, and the choice and its
first stage alone are measured on data that took no part in choosing.

    street      drives of the synthetic street
    camvid      composites over CamVid with a control (camvid.py), every drive left out once
    composites  CARLA: traffic lights and signs on vehicles of another town (carla.py)
    drive       CARLA: a box on the road, within a region of interest (carla.py)
    anomaly     Road Anomaly, self-nominal and one-reference
    obstacle    RoadObstacle21, self-nominal

Choosing uses one half of the images of Road Anomaly and RoadObstacle21, also for the odd objects of
camvid; the report uses the other half and other seeds. The CARLA drive exists only once.

Distances are those of four lists of entries, too large by .0001 on average, with the package's
deduplication, normalisation, smoothing and score. Where a drive calibrates that the index has, its
frames are compared with the entries of the other drives. Features and distances are kept in
--cache; a second run begins with them.

Needs a folder with camvid/, carla_drives/, carla_frames/, road_anomaly/ and road_obstacle21/. On
two CPU cores under two hours; --quick takes a quarter of the frames and varies fewer factors, once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import camvid
import carla
import cv2
import matplotlib
import numpy as np
import torch
from tqdm import tqdm

from semantic_anomaly.embedding.backbone import PatchEmbedder, averaged, with_positions
from semantic_anomaly.evaluation.metrics import PixelScores, frame_auroc
from semantic_anomaly.index.build import FrameEmbeddings, nominal_patches
from semantic_anomaly.io.images import encode_png, read_image
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.scoring.anomaly_map import smoothed, tail_mean
from semantic_anomaly.scoring.normalisation import (
    NormalisationSums,
    ScoreNormalisation,
    class_anchors,
    constant_normalisation,
)
from semantic_anomaly.stages import StageSpec
from semantic_anomaly.structures import Frame
from semantic_anomaly.synthetic import KINDS, StreetDrive, family

NOMINAL = "nominal"
# Patches of one group of frames that may become entries; more are left out by a fixed seed.
MOST_CANDIDATES = 16_000
# Pixel measures count a raster of about so many points of each image.
RASTER = 10_000
_CHUNK = 2_048
_PROBES = 4


# --- data sets ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sample:
    """An image of a data set.

    Attributes:
        group: frames that are used together: a drive, a part of it, or a fold.
        file: the image.
        kind: kind of the anomaly, or nominal.
        mask: image of labels, 0 normal, 1 anomaly, 255 not counted; None: all normal.
    """

    group: str
    file: Path
    kind: str = NOMINAL
    mask: Path | None = None

    def labels(self) -> np.ndarray:
        """Return (height, width) uint8 labels."""
        if self.mask is None:
            return np.zeros(read_image(self.file).shape[:2], np.uint8)
        return np.asarray(cv2.imread(str(self.mask), cv2.IMREAD_GRAYSCALE))


@dataclass(frozen=True)
class Trial:
    """Which groups make the index, calibrate it and test it.

    Attributes:
        index: groups whose nominal patches are entries.
        calibration: groups by the groups of entries that they are compared with; empty: none.
        test: groups of test frames.
    """

    index: tuple[str, ...]
    calibration: Mapping[str, tuple[str, ...]]
    test: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class DataSet:
    """Images with the trials made of them.

    Attributes:
        samples: the images, all of one size.
        trials: by protocol; the measures of a protocol are means over its trials.
        measures: that rank configurations: protocol and measure.
        roi: patches outside are ignored.
        pooled: whether pixels of all trials are measured at once, as for folds.
    """

    samples: Sequence[Sample]
    trials: Mapping[str, Sequence[Trial]]
    measures: Sequence[tuple[str, str]]
    roi: RegionOfInterest = field(default_factory=RegionOfInterest)
    pooled: bool = False


def _render(folder: Path, frames: int, kinds: tuple[str, ...], seed: int) -> dict[str, Any]:
    """Render frames of one drive of the street and return their labels."""
    length = 100 if kinds else 24
    step = length // frames
    drive = StreetDrive(seed, frames=length, anomalies=kinds)
    labels = {}
    for number in range(seed % step, length, step):
        view = drive.frame(number)
        name = f"{view.name}.png"
        (folder / "images" / name).write_bytes(encode_png(view.image))
        labels[name] = view.kind or NOMINAL
        if view.kind:
            (folder / "masks" / name).write_bytes(encode_png(view.anomaly_mask.astype(np.uint8)))
    return labels


def street(data: Path, cache: Path, half: int, size: float) -> DataSet:
    """Return drives of the synthetic street; each test drive has one anomaly."""
    folder = cache / f"street_{half}"
    if not (folder / "labels.json").exists():
        for name in ("images", "masks"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        first = 30_000 + 5_000 * half
        jobs: list[tuple[str, Callable[[int], dict[str, Any]], int]] = []
        for group, start, count, frames in (
            ("index", 0, round(60 * size), 2),
            ("calibration", 1000, round(30 * size), 2),
        ):
            render = partial(_render, folder, frames, ())
            jobs += [(group, render, first + start + n) for n in range(count)]
        for n in range(round(60 * size)):
            render = partial(_render, folder, 4, (KINDS[n % len(KINDS)],))
            jobs.append(("test", render, first + 2000 + n))
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            futures = [(group, pool.submit(render, seed)) for group, render, seed in jobs]
            labels = {
                name: [group, kind]
                for group, future in tqdm(futures, folder.name, disable=None)
                for name, kind in future.result().items()
            }
        (folder / "labels.json").write_text(json.dumps(labels))
    samples = []
    for name, (group, kind) in json.loads((folder / "labels.json").read_text()).items():
        mask = folder / "masks" / name if kind != NOMINAL else None
        samples.append(Sample(group, folder / "images" / name, kind, mask))
    trial = Trial(("index",), {"calibration": ("index",)}, ("test",))
    measures = [("", "AUROC"), ("", "AP"), ("", "odd arrangement")]
    return DataSet(samples, {"": [trial]}, measures)


def camvid_composites(data: Path, cache: Path, half: int, size: float) -> DataSet:
    """Return three real drives; each is tested by composites while the others are the index."""
    drives = {"0001TP": 2, "0006R0": 3, "0016E5_val": 4, "0016E5_train": 6}
    tests = list(drives)[:3]
    folder = cache / f"camvid_{half}"
    if not (folder / "labels.json").exists():
        camvid.write_composites(data, folder, tests, half, 100 + half, max(2, round(5 * size)))
    samples, early = [], dict[str, set[str]]()
    for drive, step in drives.items():
        files = sorted((data / "camvid" / drive / "images").iterdir())
        early[drive] = {file.name for file in files[: len(files) // 2]}
        for file in files[:: round(step / size)]:
            samples.append(Sample(_part(drive, file.name in early[drive]), file))
    for name, label in _labels(folder):
        group = f"test {_part(label['drive'], label['frame'] in early[label['drive']])}"
        mask = folder / "masks" / name if label["anomaly"] else None
        kind = label.get("kind", NOMINAL)
        samples.append(Sample(group, folder / "images" / name, kind, mask))
    # Two recordings are of one drive.
    parts = {
        "0001TP": _parts("0001TP"),
        "0006R0": _parts("0006R0"),
        "0016E5": (*_parts("0016E5_train"), *_parts("0016E5_val")),
    }
    other, same = [], []
    for test in tests:
        drive = test[:6]
        index = {name: groups for name, groups in parts.items() if name != drive}
        other.append(_left_out(index, tuple(f"test {part}" for part in _parts(test))))
        # The first half of the drive, or its other recording, is in the index as well.
        seen = _parts("0016E5_train") if drive == "0016E5" else (f"{test} early",)
        same.append(_left_out({**index, drive: seen}, (f"test {test} late",)))
    measures = [("", "AUROC"), ("", "AP"), ("", "odd arrangement")]
    return DataSet(samples, {"": other, "same route": same}, measures)


def _part(drive: str, is_early: bool) -> str:
    return f"{drive} {'early' if is_early else 'late'}"


def _parts(drive: str) -> tuple[str, str]:
    return _part(drive, True), _part(drive, False)


def _left_out(index: Mapping[str, tuple[str, ...]], test: tuple[str, ...]) -> Trial:
    """Return a trial in which each drive of the index calibrates against the others."""
    groups = tuple(group for of_drive in index.values() for group in of_drive)
    calibration = {
        group: tuple(g for g in groups if g not in of_drive)
        for of_drive in index.values()
        for group in of_drive
    }
    return Trial(groups, calibration, test)


def _labels(folder: Path) -> Iterable[tuple[str, Any]]:
    labels: dict[str, Any] = json.loads((folder / "labels.json").read_text())
    return labels.items()


def carla_composites(data: Path, cache: Path, half: int, size: float) -> DataSet:
    """Return frames of CARLA towns, and composites over another town."""
    frames = data / carla.FRAMES
    folder = cache / f"composites_{half}"
    if not (folder / "labels.json").exists():
        carla.write_composites(frames, folder, half)
    images = sorted((frames / "images").iterdir())
    samples = []
    for group, towns, count in (
        ("index", carla.INDEX_TOWNS, 120),
        ("calibration", (carla.CALIBRATION_TOWN,), 50),
    ):
        files = [file for file in images if file.name.startswith(towns)]
        samples += [Sample(group, file) for file in _spread(files, round(count * size))]
    tests: dict[bool, list[Sample]] = {False: [], True: []}
    for name, label in _labels(folder):
        mask = folder / "masks" / name if label["anomaly"] else None
        kind = label.get("kind", NOMINAL)
        tests[label["anomaly"]].append(Sample("test", folder / "images" / name, kind, mask))
    for of_class in tests.values():
        # Halves share no image.
        samples += _spread(of_class[half::2], round(50 * size))
    trial = Trial(("index",), {"calibration": ("index",)}, ("test",))
    return DataSet(samples, {"": [trial]}, [("", "AUROC"), ("", "AP")])


def carla_drive(data: Path, cache: Path, half: int, size: float) -> DataSet:
    """Return the CARLA drive with a box on the road, within a region of interest."""
    folder = data / carla.DRIVE
    files = sorted((folder / "images").iterdir())
    labels = dict(_labels(folder))
    samples = []
    for group, first, end in (("index", 0, 56), ("calibration", 65, 88), ("test", 89, 140)):
        for file in files[first : end : round(1 / size)]:
            is_odd = bool(labels[file.name]["anomaly"])
            mask = folder / "masks" / f"{file.stem}.png" if is_odd else None
            samples.append(Sample(group, file, "box" if is_odd else NOMINAL, mask))
    trial = Trial(("index",), {"calibration": ("index",)}, ("test",))
    polygon = tuple(zip(carla.ROAD[::2], carla.ROAD[1::2], strict=True))
    measures = [("", "AUROC"), ("", "AP")]
    return DataSet(samples, {"": [trial]}, measures, RegionOfInterest(polygon, carla.ego_mask()))


def real_images(name: str, data: Path, cache: Path, half: int, size: float) -> DataSet:
    """Return one half of the images of a published set, in folds."""
    folder = data / name
    files = sorted((folder / "images").iterdir(), key=lambda file: int(file.stem))
    # Every second one of Road Anomaly, as for the odd objects; scenes of the other stay together.
    middle = len(files) // 2
    is_anomaly = name == "road_anomaly"
    files = files[half::2] if is_anomaly else (files[:middle] if half == 0 else files[middle:])
    files = files[: max(5, round(len(files) * size))]
    samples = []
    for number, file in enumerate(files):
        mask = folder / "labels_masks" / f"{file.stem}.png"
        samples.append(Sample(str(number * 5 // len(files)), file, "object", mask))
    folds = tuple(dict.fromkeys(sample.group for sample in samples))
    trials = {"": [Trial(tuple(f for f in folds if f != fold), {}, (fold,)) for fold in folds]}
    measures = [("", "AP")]
    if is_anomaly:
        reference = data / "road_obstacle21" / "images"
        files = sorted(reference.iterdir(), key=lambda file: int(file.stem))
        # All of it counts as nominal, as in the protocol.
        samples.append(Sample("reference", files[0]))
        trials["one reference"] = [Trial(("reference",), {}, folds)]
        measures.append(("one reference", "AP"))
    return DataSet(samples, trials, measures, pooled=True)


SETS: Mapping[str, Callable[[Path, Path, int, float], DataSet]] = {
    "street": street,
    "camvid": camvid_composites,
    "composites": carla_composites,
    "drive": carla_drive,
    "anomaly": partial(real_images, "road_anomaly"),
    "obstacle": partial(real_images, "road_obstacle21"),
}


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    rows = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[row] for row in rows]


# --- features, distances and maps -----------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """One configuration of the detector.

    Attributes:
        stages: with their weights.
        smoothing, tail_percent, place_weight: as the settings.
        frame_level: share and quantile of the map that is subtracted.
        normalisation: none, cell, class or both.
        dedup_share: `dedup_distance` as a share of the median distance inside images.
    """

    stages: tuple[str, ...]
    smoothing: float = 0.8
    tail_percent: float = 0.2
    frame_level: tuple[float, float] = (0.0, 0.5)
    normalisation: str = "both"
    place_weight: float = 0.2
    dedup_share: float = 1.0


NORMALISATIONS = ("none", "cell", "class", "both")


class Maps:
    """Features, distances and standardised maps of a data set, in a cache folder.

    Args:
        name: of the data set, for files.
        data_set: the images.
        cache: the folder.
        device: of networks and products.
    """

    def __init__(self, name: str, data_set: DataSet, cache: Path, device: str) -> None:
        self.data_set, self._folder, self._device = data_set, cache / name, device
        self._folder.mkdir(parents=True, exist_ok=True)
        self._remembered: dict[Any, Any] = {}
        self.rows: dict[str, list[int]] = defaultdict(list)
        for row, sample in enumerate(data_set.samples):
            self.rows[sample.group].append(row)
        trials = [t for of_protocol in data_set.trials.values() for t in of_protocol]
        self._against: dict[str, set[str]] = defaultdict(set)
        for trial in trials:
            for group in trial.test:
                self._against[group].update(trial.index)
            for group, others in trial.calibration.items():
                self._against[group].update(others)
        self.entry_groups = tuple(dict.fromkeys(g for t in trials for g in t.index))
        self._labels = [sample.labels() for sample in data_set.samples]

    def compute_features(self, stages: Iterable[StageSpec]) -> None:
        """Compute the hidden states that stages need, in one forward for each image."""
        wanted: dict[tuple[str, int], set[int | None]] = defaultdict(set)
        for stage in stages:
            if not self._feature_file(stage).exists():
                # Averaging comes later.
                wanted[stage.backbone, stage.size].add(stage.layer)
        for (backbone, size), layers in wanted.items():
            specs = [StageSpec(backbone, layer, size) for layer in layers]
            embedder = PatchEmbedder(specs, device=self._device, dtype="float32")
            features: list[list[np.ndarray]] = [[] for _ in specs]
            title = f"{self._folder.name} {backbone} {size}"
            for sample in tqdm(self.data_set.samples, title, disable=None):
                grid = embedder.embed([read_image(sample.file)])[0]
                for of_stage, stage_grid in zip(features, grid.stages, strict=True):
                    of_stage.append(stage_grid.features.astype(np.float16))
            embedder.close()
            for spec, of_stage in zip(specs, features, strict=True):
                # The reference of another set may have another shape: its own list.
                np.savez(self._feature_file(spec), *of_stage)

    def _feature_file(self, stage: StageSpec) -> Path:
        layer = "last" if stage.layer is None else stage.layer
        return self._folder / f"features_{stage.backbone}_{layer}_{stage.size}.npz"

    def embeddings(self, stage: StageSpec, place_weight: float) -> list[np.ndarray]:
        """Return (rows, cols, dim) float32 unit vectors of each image."""
        key = "embeddings", str(_unweighted(stage)), place_weight
        if key not in self._remembered:
            for other in [k for k in self._remembered if k[0] == "embeddings"]:
                del self._remembered[other]
            with np.load(self._feature_file(stage), allow_pickle=False) as stored:
                grids = [torch.from_numpy(stored[name].astype(np.float32)) for name in stored.files]
            self._remembered[key] = [
                with_positions(averaged(grid[None], stage.average)[0].numpy(), place_weight)
                for grid in grids
            ]
        result: list[np.ndarray] = self._remembered[key]
        return result

    def inside(self, row: int, grid_hw: tuple[int, int]) -> np.ndarray:
        """Return (rows, cols) bool, the patches in the region of interest."""
        return self.data_set.roi.patch_mask(grid_hw, self._labels[row].shape)

    def nominal(self, row: int, grid_hw: tuple[int, int]) -> np.ndarray:
        """Return (rows, cols) bool, the patches in the region of interest without an anomaly."""
        return self.inside(row, grid_hw) & nominal_patches(self._labels[row] == 0, grid_hw)

    def entries(self, stage: StageSpec, config: Config) -> dict[str, torch.Tensor]:
        """Return (n, dim) entries of each group on the device."""
        key = "entries", *_key(stage, config)
        if key not in self._remembered:
            for other in [k for k in self._remembered if k[0] == "entries"]:
                del self._remembered[other]
            grids = self.embeddings(stage, config.place_weight)
            distance = config.dedup_share * self._typical_distance(grids)
            self._remembered[key] = {
                group: self._deduplicated(grids, self.rows[group], distance)
                for group in self.entry_groups
            }
        result: dict[str, torch.Tensor] = self._remembered[key]
        return result

    def _typical_distance(self, grids: Sequence[np.ndarray]) -> float:
        rows = [row for group in self.entry_groups for row in self.rows[group]][:8]
        distances = []
        for row in rows:
            grid = grids[row]
            cells = np.argwhere(np.ones(grid.shape[:2], bool))
            frame = Frame(np.zeros((1, 1, 3), np.uint8))
            flat = grid.reshape(len(cells), -1)
            distances.append(
                FrameEmbeddings(frame, grid.shape[:2], cells, flat).nearest_distances(5)
            )
        return float(np.median(np.concatenate(distances)))

    def _deduplicated(
        self, grids: Sequence[np.ndarray], rows: Sequence[int], distance: float
    ) -> torch.Tensor:
        """Return candidates of a group that are far enough from those before them."""
        kept = [grids[row][self.nominal(row, grids[row].shape[:2])] for row in rows]
        candidates = torch.from_numpy(np.concatenate(kept))
        if len(candidates) > MOST_CANDIDATES:
            generator = torch.Generator().manual_seed(0)
            chosen = torch.randperm(len(candidates), generator=generator)[:MOST_CANDIDATES]
            candidates = candidates[chosen]
        limit = 1.0 - distance
        stored = torch.empty_like(candidates[:0]).to(self._device)
        for new in candidates.to(self._device).split(_CHUNK):
            if len(stored):
                new = new[(new @ stored.T).amax(1) <= limit]
            far = (new @ new.T <= limit).cpu().numpy()
            is_new = np.ones(len(new), bool)
            for position in range(len(new)):
                if is_new[position]:
                    is_new[position + 1 :] &= far[position, position + 1 :]
            stored = torch.cat([stored, new[torch.from_numpy(is_new).to(self._device)]])
        return stored

    def entry_counts(self, stage: StageSpec, config: Config) -> tuple[int, int]:
        """Return the number of entries of all groups, and of the frames that they come from."""
        frames = sum(len(self.rows[group]) for group in self.entry_groups)
        return sum(map(len, self.entries(stage, config).values())), frames

    def distances(self, stage: StageSpec, config: Config) -> dict[tuple[int, str], np.ndarray]:
        """Return (rows, cols) float32 distances of images to groups of entries."""
        file = self._folder / f"distances_{_digest(*_key(stage, config))}.npz"
        if not file.exists():
            entries = self.entries(stage, config)
            searches = {group: Lists(of_group) for group, of_group in entries.items()}
            grids = self.embeddings(stage, config.place_weight)
            result = {}
            title = f"{self._folder.name} {_unweighted(stage)}"
            for group in tqdm(list(self._against), title, disable=None):
                rows = self.rows[group]
                if not rows:
                    continue
                joined = np.concatenate([grids[r].reshape(-1, grids[r].shape[-1]) for r in rows])
                queries = torch.from_numpy(joined).to(self._device)
                ends = np.cumsum([math.prod(grids[r].shape[:2]) for r in rows])[:-1]
                for other in self._against[group]:
                    values = searches[other].distances(queries)
                    for row, part in zip(rows, np.split(values, ends), strict=True):
                        result[f"{row}/{other}"] = part.reshape(grids[row].shape[:2])
            np.savez(file, **result)  # type: ignore[arg-type]
        with np.load(file, allow_pickle=False) as stored:
            content = {name: stored[name] for name in stored.files}
        return {
            (int(name.split("/")[0]), name.split("/", 1)[1]): values
            for name, values in content.items()
        }

    def maps(self, stage: StageSpec, config: Config, protocol: str) -> list[dict[int, np.ndarray]]:
        """Return (rows, cols) float32 standardised distances of the test images of each trial."""
        key = "maps", *_key(stage, config), config.normalisation, protocol
        if key not in self._remembered:
            file = self._folder / f"maps_{_digest(*key)}.npz"
            if not file.exists():
                self._write_maps(stage, config, protocol)
            with np.load(file, allow_pickle=False) as stored:
                content = {name: stored[name] for name in stored.files}
            result: list[dict[int, np.ndarray]] = [{} for _ in self.data_set.trials[protocol]]
            for name, values in content.items():
                number, row = map(int, name.split("/"))
                result[number][row] = values
            self._remembered[key] = result
        maps: list[dict[int, np.ndarray]] = self._remembered[key]
        return maps

    def _write_maps(self, stage: StageSpec, config: Config, protocol: str) -> None:
        """Write the maps of all normalisations at once: the distances are the expensive part."""
        distances = self.distances(stage, config)
        grids = self.embeddings(stage, config.place_weight)
        entries = self.entries(stage, config)
        written: dict[str, dict[str, np.ndarray]] = {name: {} for name in NORMALISATIONS}
        for number, trial in enumerate(self.data_set.trials[protocol]):
            joined = torch.cat([entries[group] for group in trial.index])
            normalisations = self._normalisations(trial, joined, grids, distances)
            for row in (row for group in trial.test for row in self.rows[group]):
                values = np.min([distances[row, group] for group in trial.index], axis=0)
                inside = self.inside(row, values.shape)
                for name, normalisation in normalisations.items():
                    mean, deviation = normalisation.parameters(inside, grids[row][inside])
                    standardised = np.zeros_like(values)
                    standardised[inside] = (values[inside] - mean) / deviation
                    written[name][f"{number}/{row}"] = standardised
        for name, maps in written.items():
            key = "maps", *_key(stage, config), name, protocol
            file = self._folder / f"maps_{_digest(*key)}.npz"
            np.savez(file, **maps)  # type: ignore[arg-type]

    def _normalisations(
        self,
        trial: Trial,
        entries: torch.Tensor,
        grids: Sequence[np.ndarray],
        distances: Mapping[tuple[int, str], np.ndarray],
    ) -> dict[str, ScoreNormalisation]:
        if not trial.calibration:
            # As `DistancesInside` of the detector.
            generator = torch.Generator().manual_seed(0)
            chosen = torch.randperm(len(entries), generator=generator)[:_CHUNK].to(self._device)
            products = entries[chosen] @ entries.T
            products[torch.arange(len(chosen)), chosen] = -1.0
            inside = (1.0 - products.amax(1)).clamp(0.0, 2.0).cpu().numpy()
            median, largest = float(np.median(inside)), float(inside.max())
            constant = constant_normalisation(median, max(largest - median, 1e-6))
            return dict.fromkeys(NORMALISATIONS, constant)
        by_kind = {}
        sums = NormalisationSums(class_anchors(entries.cpu().numpy()))
        cells = NormalisationSums()
        values = []
        for group, against in trial.calibration.items():
            for row in self.rows[group]:
                nearest = np.min([distances[row, other] for other in against], axis=0)
                inside_map = self.inside(row, nearest.shape)
                for total in (sums, cells):
                    total.add(nearest, inside_map, grids[row][inside_map])
                values.append(nearest[inside_map])
        joined = np.concatenate(values)
        constant = constant_normalisation(float(joined.mean()), float(joined.std()))
        by_kind["none"], by_kind["cell"] = constant, cells.normalisation()
        by_kind["both"] = sums.normalisation()
        flat = [constant.mean.astype(np.float64), constant.deviation.astype(np.float64)]
        classes = sums._classes(sums._anchors, *flat) if sums._anchors is not None else None
        by_kind["class"] = ScoreNormalisation(constant.mean, constant.deviation, classes)
        return by_kind

    def measures(self, configs: Sequence[Config]) -> list[dict[str, float]]:
        """Return the measures of configurations by all protocols; they are kept in a file."""
        file = self._folder / "measures.json"
        known: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
        missing = [config for config in configs if repr(config) not in known]
        self.compute_features(StageSpec.parse(text) for c in missing for text in c.stages)
        for config in missing:
            known[repr(config)] = {
                " ".join(filter(None, (protocol, key))): value
                for protocol in self.data_set.trials
                for key, value in measure(self, config, protocol).items()
            }
            file.write_text(json.dumps(known, indent=1))
        return [known[repr(config)] for config in configs]

    def raster(self, row: int) -> np.ndarray:
        """Return labels of an image on a coarser raster; 255 outside the region of interest."""
        key = "raster", row
        if key not in self._remembered:
            labels = self._labels[row]
            roi = self.data_set.roi.pixel_mask(labels.shape)
            labels = np.where(roi, labels, 255).astype(np.uint8)
            step = max(1.0, math.sqrt(labels.size / RASTER))
            size = round(labels.shape[1] / step), round(labels.shape[0] / step)
            self._remembered[key] = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
        result: np.ndarray = self._remembered[key]
        return result


class Lists:
    """Nearest entries by the nearest lists around centroids.

    Distances are too large by .0001 on average; an exact search takes ten times as long.

    Args:
        entries: (n, dim) float32, unit norm.
    """

    def __init__(self, entries: torch.Tensor) -> None:
        count = max(1, round(math.sqrt(len(entries))))
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(entries), generator=generator)[:count]
        centres = entries[chosen.to(entries.device)]
        for _ in range(3):
            nearest = (entries @ centres.T).argmax(1)
            sums = torch.zeros_like(centres).index_add_(0, nearest, entries)
            empty = sums.norm(dim=1) == 0
            sums[empty] = centres[empty]
            centres = torch.nn.functional.normalize(sums, dim=1)
        nearest = (entries @ centres.T).argmax(1)
        self._centres = centres
        self._lists = [entries[nearest == number] for number in range(count)]

    def distances(self, queries: torch.Tensor) -> np.ndarray:
        """Return (n,) float32 cosine distances of (n, dim) queries."""
        products = torch.cat([chunk @ self._centres.T for chunk in queries.split(_CHUNK)])
        probes = products.topk(min(_PROBES, len(self._lists)), dim=1).indices
        best = torch.full((len(queries),), -1.0, device=queries.device)
        order = probes.flatten().argsort(stable=True)
        owners = order // probes.shape[1]
        counts = probes.flatten().bincount(minlength=len(self._lists)).tolist()
        for rows, entries in zip(owners.split(counts), self._lists, strict=True):
            if len(rows) and len(entries):
                nearest = (queries[rows] @ entries.T).amax(1)
                best[rows] = torch.maximum(best[rows], nearest)
        return np.asarray((1.0 - best).clamp(min=0.0).cpu().numpy())


def _unweighted(stage: StageSpec) -> StageSpec:
    return replace(stage, weight=1.0)


def _key(stage: StageSpec, config: Config) -> tuple[Any, ...]:
    return str(_unweighted(stage)), config.place_weight, config.dedup_share


def _digest(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


# --- measures -------------------------------------------------------------------------------------


def measure(maps: Maps, config: Config, protocol: str = "") -> dict[str, float]:
    """Return the measures of a configuration on a data set by one protocol."""
    data_set = maps.data_set
    stages = [StageSpec.parse(text) for text in config.stages]
    total_weight = sum(stage.weight for stage in stages)
    collected: dict[str, list[float]] = defaultdict(list)
    pixels: list[PixelScores] = []
    of_stages = [maps.maps(stage, config, protocol) for stage in stages]
    for number, trial in enumerate(data_set.trials[protocol]):
        scores, kinds, of_trial = [], [], PixelScores()
        for row in (row for group in trial.test for row in maps.rows[group]):
            parts = [of_stage[number][row] for of_stage in of_stages]
            grid_hw = max((part.shape for part in parts), key=math.prod)
            inside = maps.inside(row, grid_hw)
            total = np.zeros(grid_hw, np.float32)
            for part, stage in zip(parts, stages, strict=True):
                resized = cv2.resize(part, grid_hw[::-1], interpolation=cv2.INTER_LINEAR)
                total += np.float32(stage.weight / total_weight) * resized
            total = smoothed(np.where(inside, total, np.float32(0)), inside, config.smoothing)
            share, quantile = config.frame_level
            total -= np.float32(share * np.quantile(total[inside], quantile))
            scores.append(tail_mean(total[inside], config.tail_percent))
            kinds.append(data_set.samples[row].kind)
            labels = maps.raster(row)
            heat = cv2.resize(total, labels.shape[::-1], interpolation=cv2.INTER_LINEAR)
            of_trial.add(heat[labels < 2], labels[labels < 2] == 1)
        pixels.append(of_trial)
        kind, score = np.array(kinds), np.array(scores)
        nominal = kind == NOMINAL
        if not nominal.any():
            continue
        for name, members in _kinds(kind).items():
            chosen = nominal | np.isin(kind, members)
            auroc = frame_auroc(score[chosen], ~nominal[chosen])
            if auroc is not None:
                collected[name].append(auroc)
    if data_set.pooled:
        pixels = [reduce(add, pixels)]
    collected["AP"] = [of_trial.metrics().average_precision or 0.0 for of_trial in pixels]
    return {name: float(np.mean(values)) for name, values in collected.items()}


def _kinds(kind: np.ndarray) -> dict[str, list[str]]:
    """Return kinds of anomaly that are measured together, by name."""
    kinds = [name for name in dict.fromkeys(kind.tolist()) if name != NOMINAL]
    groups = {"AUROC": kinds, **{name: [name] for name in kinds}}
    for group in ("odd object", "odd arrangement"):
        members = [k for k in kinds if k in KINDS and family(k) == group]
        if group == "odd arrangement":
            members += [k for k in kinds if k in camvid.ODD_ARRANGEMENTS]
        if members:
            groups[group] = members
    return groups


class Choice:
    """Measures configurations on data sets and ranks them.

    Args:
        stores: maps of each data set.
    """

    def __init__(self, stores: Mapping[str, Maps]) -> None:
        self.stores = stores
        self._measured: dict[Config, dict[str, float]] = {}

    @property
    def columns(self) -> list[str]:
        """Return names of the measures that rank, such as 'street AUROC'."""
        return [
            " ".join(filter(None, (name, *measure)))
            for name, store in self.stores.items()
            for measure in store.data_set.measures
        ]

    def measure(self, configs: Sequence[Config]) -> None:
        """Measure configurations, the data sets side by side."""
        missing = [config for config in configs if config not in self._measured]
        # Threads: most of the work is outside of the interpreter.
        with ThreadPoolExecutor(min(len(self.stores), os.cpu_count() or 1)) as pool:
            by_store = list(pool.map(lambda store: store.measures(missing), self.stores.values()))
        for number, config in enumerate(missing):
            self._measured[config] = {
                f"{name} {key}": value
                for name, measures in zip(self.stores, by_store, strict=True)
                for key, value in measures[number].items()
            }

    def measured(self, config: Config) -> dict[str, float]:
        """Return all measures of a configuration, by data set, protocol and measure."""
        self.measure([config])
        return self._measured[config]

    def mean_ranks(self, configs: Sequence[Config], without: str = "") -> np.ndarray:
        """Return the mean rank of each: over the measures of a set, then over sets.

        Figures that differ by less than .01 count as equal.
        """
        ranks = np.zeros(len(configs))
        names = [name for name in self.stores if name != without]
        for name in names:
            measures = self.stores[name].data_set.measures
            for protocol, key in measures:
                column = " ".join(filter(None, (name, protocol, key)))
                values = np.array([self.measured(config)[column] for config in configs])
                better = (values[None] > values[:, None] + 0.01).sum(1)
                worse = (values[None] < values[:, None] - 0.01).sum(1)
                equal = len(configs) - better - worse
                ranks += (better + (equal + 1) / 2) / len(measures)
        result: np.ndarray = ranks / max(1, len(names))
        return result

    def best(self, configs: Sequence[Config], without: str = "") -> Config:
        """Return the configuration of best mean rank; of equals the first."""
        return configs[int(self.mean_ranks(configs, without).argmin())]


# --- choosing -------------------------------------------------------------------------------------

_E, _M = "efficientnet_lite2", "mobilenet_v1"
START = Config((f"{_M} layer=21 size=800 average=3", f"{_E} layer=20"))
STAGES = (
    (f"{_M} layer=21 size=800",),
    (f"{_M} layer=21 size=800 average=3",),
    (f"{_M} layer=23 size=800",),
    (f"{_E} layer=15",),
    (f"{_E} layer=20",),
    (f"{_M} layer=21 size=800", f"{_M} layer=23 size=800"),
    (f"{_M} layer=21 size=800", f"{_E} layer=20"),
    (f"{_M} layer=21 size=800 average=3", f"{_E} layer=20"),
    (f"{_M} layer=23 size=800", f"{_E} layer=20"),
    (f"{_E} layer=15", f"{_E} layer=20"),
    (f"{_M} layer=21 size=800", f"{_M} layer=23 size=800", f"{_E} layer=20"),
    (f"{_M} layer=21 size=800 average=3", f"{_M} layer=23 size=800", f"{_E} layer=20"),
    (f"{_M} layer=21 size=800", f"{_E} layer=15", f"{_E} layer=20"),
)
SIZES = (640,)


def _with_stage(config: Config, number: int, **values: Any) -> Config:
    stages = list(config.stages)
    stages[number] = str(replace(StageSpec.parse(stages[number]), **values))
    return replace(config, stages=tuple(stages))


def _each_stage(config: Config, name: str, values: Sequence[Any]) -> list[Config]:
    found = [
        _with_stage(config, number, **{name: value})
        for number in range(len(config.stages))
        for value in values
    ]
    return list(dict.fromkeys([config, *found]))


def _each_backbone_size(config: Config) -> list[Config]:
    """Return the configuration with other sizes: stages of a backbone share a forward pass."""
    stages = [StageSpec.parse(text) for text in config.stages]
    found = [config]
    for backbone in dict.fromkeys(stage.backbone for stage in stages):
        for size in SIZES:
            resized = (replace(s, size=size) if s.backbone == backbone else s for s in stages)
            found.append(replace(config, stages=tuple(map(str, resized))))
    return list(dict.fromkeys(found))


LEVELS = ((0.0, 0.5), (0.5, 0.5), (1.0, 0.5), (1.0, 0.75))
FACTORS: Mapping[str, Callable[[Config], Sequence[Config]]] = {
    "stages": lambda c: [replace(c, stages=stages) for stages in STAGES],
    "normalisation": lambda c: [replace(c, normalisation=n) for n in NORMALISATIONS],
    "smoothing": lambda c: [replace(c, smoothing=s) for s in (0.0, 0.5, 0.8, 1.2)],
    "tail": lambda c: [replace(c, tail_percent=t) for t in (0.2, 0.5, 1.0, 2.0, 5.0)],
    "weight": lambda c: _each_stage(c, "weight", (1.0, 2.0)) if len(c.stages) > 1 else [c],
    "frame level": lambda c: [replace(c, frame_level=level) for level in LEVELS],
    "place weight": lambda c: [replace(c, place_weight=w) for w in (0.0, 0.2, 0.4)],
    "averaging": lambda c: _each_stage(c, "average", (1, 3)),
    "deduplication": lambda c: [replace(c, dedup_share=s) for s in (0.5, 1.0, 2.0)],
    "input size": _each_backbone_size,
}
# For machines that the chosen stages are too slow for.
SMALL = (f"{_M} layer=21 size=480",)
QUICK = ("stages", "normalisation", "smoothing", "tail", "frame level")


def choose(choice: Choice, start: Config, factors: Sequence[str], rounds: int) -> list[Any]:
    """Vary one factor at a time; return for each step its name, candidates and best."""
    steps = []
    current = start
    for number in range(rounds):
        for name in factors:
            candidates = list(dict.fromkeys([current, *FACTORS[name](current)]))
            choice.measure(candidates)
            best = choice.best(candidates)
            steps.append((f"{name}, round {number + 1}", candidates, best))
            print(time.strftime("%H:%M:%S"), best)
            print(table(choice, candidates, f"{name}, round {number + 1}"), flush=True)
            current = best
    return steps


def short(config: Config) -> str:
    """Return the stages of a configuration for tables."""
    letters = {_E: "E", _M: "M"}
    parts = []
    for stage in map(StageSpec.parse, config.stages):
        weight = "" if stage.weight == 1 else f"{stage.weight:g} x "
        layer = "" if stage.layer is None else f"[{stage.layer}]"
        average = f" {stage.average}x{stage.average}" if stage.average > 1 else ""
        parts.append(f"{weight}{letters.get(stage.backbone, stage.backbone)}{layer}")
        parts[-1] += f" @{stage.size}{average}"
    return " + ".join(parts)


def labels(configs: Sequence[Config]) -> list[str]:
    """Return what each configuration has that others have not."""
    names = [
        field.name
        for field in fields(Config)
        if len({getattr(config, field.name) for config in configs}) > 1
    ]
    result = []
    for config in configs:
        values = {name: getattr(config, name) for name in names}
        if "stages" in values:
            values["stages"] = short(config)
        if "frame_level" in values:
            share, quantile = config.frame_level
            values["frame_level"] = f"{share:g} of quantile {quantile:g}" if share else "none"
        result.append(", ".join(map(str, values.values())))
    return result


def table(choice: Choice, configs: Sequence[Config], title: str) -> str:
    """Return a Markdown table of configurations, best mean rank first."""
    ranks, names = choice.mean_ranks(configs), labels(configs)
    lines = [f"### {title}", "", f"| | mean rank | {' | '.join(choice.columns)} |"]
    lines.append("|---" * (len(choice.columns) + 2) + "|")
    for row in np.argsort(ranks, kind="stable"):
        values = choice.measured(configs[row])
        cells = (f"{values[column]:.3f}".removeprefix("0") for column in choice.columns)
        lines.append(f"| {names[row]} | {ranks[row]:.2f} | {' | '.join(cells)} |")
    best_without: dict[str, list[str]] = defaultdict(list)
    for name in choice.stores:
        best = choice.best(configs, without=name)
        best_without[names[configs.index(best)]].append(name)
    found = "; ".join(f"{name} (without {', '.join(n)})" for name, n in best_without.items())
    return "\n".join([*lines, "", f"Best with one set left out: {found}."]) + "\n"


def draw(steps: Sequence[Any], choice: Choice, file: Path) -> None:
    """Draw the mean ranks of the first round."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [step for step in steps if step[0].endswith("round 1")]
    figure, axes = pyplot.subplots(math.ceil(len(rows) / 2), 2, figsize=(14, 16), squeeze=False)
    for axis, (title, configs, best) in zip(axes.flat, rows, strict=False):
        colours = ["tab:orange" if config == best else "tab:blue" for config in configs]
        bars = axis.barh(labels(configs), choice.mean_ranks(configs), color=colours)
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axis.set_title(title.split(",")[0])
        axis.set_xlabel("mean rank, lower is better")
        axis.tick_params(labelsize=8)
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(file, dpi=80)
    pyplot.close(figure)


def deduplication_curve(choice: Choice, stages: Sequence[str], names: Sequence[str]) -> str:
    """Return a Markdown table: entries and bytes by `dedup_distance` against quality."""
    lines = [
        "| stage | share | set | entries | MB per 1000 frames | AUROC | AP |",
        "|---" * 7 + "|",
    ]
    for text in stages:
        stage = StageSpec.parse(text)
        for share in (0.5, 1.0, 2.0):
            config = Config((text,), dedup_share=share)
            choice.measure([config])
            for name in names:
                store = choice.stores[name]
                values = measure(store, config)
                count, frames = store.entry_counts(stage, config)
                dim = store.embeddings(stage, config.place_weight)[0].shape[-1]
                size_mb = count / frames * 1000 * dim * 4 / 1e6
                lines.append(
                    f"| {short(config)} | {share} | {name} | {count} | {size_mb:.0f} "
                    f"| {values['AUROC']:.3f} | {values['AP']:.3f} |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of the data sets")
    parser.add_argument("--cache", type=Path, required=True, help="folder of features, kept")
    parser.add_argument("--out", type=Path, required=True, help="folder of tables and picture")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="a quarter of the frames, one round")
    arguments = parser.parse_args()
    size = 0.25 if arguments.quick else 1.0
    cache = arguments.cache / ("quick" if arguments.quick else "full")
    arguments.out.mkdir(parents=True, exist_ok=True)

    def open_sets(half: int) -> Choice:
        stores = {}
        for name in arguments.sets:
            data_set = SETS[name](arguments.data, cache, half, size)
            stores[name] = Maps(f"{name}_{half}_maps", data_set, cache, arguments.device)
        return Choice(stores)

    choice = open_sets(0)
    factors = QUICK if arguments.quick else tuple(FACTORS)
    steps = choose(choice, START, factors, 1 if arguments.quick else 2)
    chosen = steps[-1][2]
    sections = [table(choice, candidates, title) for title, candidates, _ in steps]
    draw(steps, choice, arguments.out / "defaults.png")
    report = open_sets(1)
    compared = [chosen, replace(chosen, stages=chosen.stages[:1]), replace(chosen, stages=SMALL)]
    report.measure(compared)
    sections.append(table(report, compared, "not used for choosing"))
    if not arguments.quick:
        sections.append("### deduplication\n")
        curve_sets = [name for name in ("street", "camvid") if name in choice.stores]
        stages = f"{_M} layer=21 size=800", f"{_E} layer=20"
        sections.append(deduplication_curve(choice, stages, curve_sets))
    measured = {
        "chosen": vars(chosen),
        "choosing": [
            {"config": vars(c), "measures": choice.measured(c)}
            for c in dict.fromkeys(c for _, candidates, _ in steps for c in candidates)
        ],
        "report": [{"config": vars(c), "measures": report.measured(c)} for c in compared],
    }
    (arguments.out / "defaults.json").write_text(json.dumps(measured, indent=1))
    (arguments.out / "defaults.md").write_text("\n".join(sections))
    print(sections[-1])
    print(f"chosen: {chosen}")


if __name__ == "__main__":
    main()
