"""Measure what each part of the method earns: one row for each part, on held-out streets.

Two sets of drives, one for each family of anomalies, with anomalous and nominal frames. Index and
calibration come from other drives. Rows differ only in settings; "grid" and "instances" have no
score normalisation and no smoothing. Frames are embedded once. With the defaults it takes about
two hours on two CPU cores and 7 GB of memory; --data adds rendered and real data sets.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import carla_composites
import carla_drive
import numpy as np
from tqdm import tqdm

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.calibration.conformal import scores_needed
from semantic_anomaly.cli import main as command
from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.embedding.identity import EmbedderIdentity, SegmenterIdentity
from semantic_anomaly.evaluation.components import OBSTACLE_TRACK
from semantic_anomaly.evaluation.evaluate import evaluate
from semantic_anomaly.evaluation.layouts import Dataset, open_dataset
from semantic_anomaly.evaluation.measures import figure
from semantic_anomaly.evaluation.metrics import frame_auroc, frame_measures
from semantic_anomaly.evaluation.protocols import SelfNominal
from semantic_anomaly.index.build import INSTANCES
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.open import open_source
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.offline.calibrate import calibrate
from semantic_anomaly.offline.drives import embedded_frames, open_drives
from semantic_anomaly.scoring.normalisation import (
    CELLS_HW,
    PatchClasses,
    ScoreNormalisation,
    class_anchors,
)
from semantic_anomaly.segmentation.embedder import RunningEmbedder
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import PatchGrid
from semantic_anomaly.synthetic import KINDS, family

INDEX_DRIVES, CALIBRATION_DRIVES = 80, 60
TEST_DRIVES_A_KIND = 10


@dataclass(frozen=True)
class Trial:
    """Where index, calibration and tests come from; without an index, the test sets' own pixels.

    Attributes:
        index, calibration: sources.
        tests: labelled sources by name.
    """

    index: list[str]
    calibration: list[str]
    tests: dict[str, str]


def synthesise(folder: Path, first_seed: int) -> dict[str, Path]:
    """Write the drives of all sets and return their folders by name."""
    kinds = {name: [k for k in KINDS if family(k) == name] for name in map(family, KINDS)}
    plans = {
        "index": (INDEX_DRIVES, 48, 12, first_seed, "none"),
        "calibration": (CALIBRATION_DRIVES, 96, 24, first_seed + 500, "none"),
    }
    for number, (name, listed) in enumerate(kinds.items()):
        drives = TEST_DRIVES_A_KIND * len(listed)
        plans[name] = drives, 100, 10, first_seed + 1000 + 500 * number, ",".join(listed)
    for name, (drives, frames, stride, seed, anomalies) in plans.items():
        if (folder / name / "labels.json").exists():
            continue
        wanted = [] if anomalies == "none" else ["--anomalies", anomalies]
        numbers = [
            ("--drives", drives),
            ("--frames", frames),
            ("--stride", stride),
            ("--seed", seed),
        ]
        given = [str(part) for pair in numbers for part in pair]
        if command(["synth", str(folder / name), *given, *wanted]):
            raise SystemExit(1)
    return {name: folder / name for name in plans}


def street_trial(folder: Path, first_seed: int) -> Trial:
    """Return the trial of the street world, writing its drives where they are not yet."""
    sets = synthesise(folder, first_seed)
    tests = {n: str(p) for n, p in sets.items() if n not in ("index", "calibration")}
    return Trial([str(sets["index"])], [str(sets["calibration"])], tests)


def real_trials(data: Path, scratch: Path) -> list[Trial]:
    """Return the trials of the real and rendered sets that are there."""
    trials = []
    drive = data / "carla_drives/spawn_props"
    if drive.is_dir():
        tests = {"CARLA drive, box on the road": f"{drive}{carla_drive.TEST}"}
        trials.append(
            Trial([f"{drive}{carla_drive.INDEX}"], [f"{drive}{carla_drive.CALIBRATION}"], tests)
        )
    frames = data / "carla_frames"
    if frames.is_dir():
        made = scratch / "composites"
        carla_composites.write_composites(frames, made, 0)
        index, calibration = (
            carla_composites.slices(frames, towns)
            for towns in (carla_composites.INDEX, carla_composites.CALIBRATION)
        )
        tests = {"CARLA composites, lights and signs on vehicles": str(made)}
        trials.append(Trial(index, calibration, tests))
    for name, title in (("road_anomaly", "Road Anomaly"), ("road_obstacle21", "RoadObstacle21")):
        if (data / name).is_dir():
            trials.append(Trial([], [], {f"{title}, self-nominal": str(data / name)}))
    return trials


RATES = (0.01, 0.05)


def table(rows: dict[str, dict[str, dict[str, Any]]], name: str) -> str:
    """Return the Markdown table of a test set.

    Args:
        rows: what was measured, by row and test set, and the times as `ms`.
        name: of the test set; rows that lack it are left out.
    """
    heads = ["row", "frame AUROC", *(f"TPR, FPR at {100 * rate:g} %" for rate in RATES)]
    heads += ["drives found at 5 %", "AUROC small, middle, large", "pixel AP", "FPR95", "F1", "ms"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row, found in rows.items():
        if name not in found:
            continue
        m = found[name]
        cells = [figure(m["auroc"]) + _interval(m["auroc_interval"])]
        for rate in RATES:
            r = m["rates"].get(str(rate))
            told = f"{r['tpr']:.3f}, {r['fpr']:.3f}{_interval(r['fpr_interval'])}" if r else "-"
            cells.append(told)
        hit = m["drives"].get(str(RATES[-1]))
        cells.append(f"{hit[0]} of {hit[1]}" if hit else "-")
        cells.append(", ".join(figure(auroc) for _, auroc in m["sizes"]) or "-")
        cells += [figure(m[k]) for k in ("pixel_ap", "pixel_fpr95", "component_f1_oracle")]
        cells.append(figure(found.get("ms", {}).get("median"), 0))
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(ends: tuple[float, float] | None) -> str:
    return f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""


@dataclass(frozen=True)
class _Packed:
    """A grid whose instances, nearly all zeros, take no room."""

    bare: PatchGrid
    shape: tuple[int, ...]
    covered: np.ndarray
    shares: np.ndarray

    @classmethod
    def of(cls, grid: PatchGrid) -> _Packed:
        instances = np.zeros((0, *grid.grid_hw), np.float32)
        if grid.instances is not None:
            instances = grid.instances
        covered = np.flatnonzero(instances)
        bare = dataclasses.replace(grid, instances=None)
        return cls(bare, instances.shape, covered, instances.flat[covered])

    def unpacked(self) -> PatchGrid:
        instances = np.zeros(self.shape, np.float32)
        instances.flat[self.covered] = self.shares
        return dataclasses.replace(self.bare, instances=instances)


class Remembered:
    """Embeds each image once.

    Attributes:
        identity, segmenter: of what it gives.
    """

    def __init__(self, running: RunningEmbedder) -> None:
        self._running = running
        self._known: dict[str, _Packed] = {}
        self.identity: EmbedderIdentity = running.identity
        self.segmenter: SegmenterIdentity | None = running.segmenter

    def grid_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Return (rows, cols) of the grid that an image of (height, width) gives."""
        return self._running.grid_hw(image_hw)

    def embed(self, images: Sequence[np.ndarray]) -> list[PatchGrid]:
        """Return the patch embeddings of images, in order, with their instances."""
        keys = [hashlib.sha1(image.tobytes()).hexdigest() for image in images]
        for key, image in zip(keys, images, strict=True):
            if key not in self._known:
                self._known[key] = _Packed.of(self._running.embed([image])[0])
        return [self._known[key].unpacked() for key in keys]


TIMED_FRAMES = 40
SHOWN = "auroc", "pixel_ap", "rates", "sizes", "kinds"
COMMON: dict[str, Any] = {"place_weight": 0.0}
INSTANCE: dict[str, Any] = {"variant": "instance"}
PLACE: dict[str, Any] = {"place_weight": 0.2}
COMBINED: dict[str, Any] = {"variant": "combined"}
# Plain distances: the calibration of these rows has no score normalisation.
BARE: dict[str, Any] = {"smoothing": 0.0}
ROWS: dict[str, dict[str, Any]] = {
    "grid": BARE,
    "grid + filters": {},
    "grid + filters + place": PLACE,
    "instances": {**INSTANCE, **BARE},
    "instances + filters": INSTANCE,
    "instances + filters + place": {**INSTANCE, **PLACE},
    "grid and instances + filters": COMBINED,
}


def measure(
    trial: Trial,
    settings: Settings,
    embedder: Remembered,
    out: Path,
    indexes: dict[Any, NominalIndex],
) -> dict[str, dict[str, Any]]:
    """Build, calibrate and evaluate one row; return its figures by test set."""
    protocol, calibration = None, None
    if trial.index:
        key = _index_key(trial, settings)
        if key not in indexes:
            indexes[key] = build_index(trial.index, settings=settings, embedder=embedder)
        calibrate_row = bare_calibration if is_bare(settings) else calibrate
        calibration = calibrate_row(
            indexes[key], trial.calibration, settings=settings, embedder=embedder
        )
        detector = AnomalyDetector(indexes[key], calibration, settings=settings, embedder=embedder)
    found: dict[str, dict[str, Any]] = {}
    for name, source in trial.tests.items():
        dataset = open_dataset(source, "")
        if not trial.index:
            protocol = SelfNominal(settings, "camera", dataset, embedder)
            detector = protocol.detector_of(dataset.truths[0])
        results = evaluate(
            protocol or detector, dataset, out=out / name, every=0, limits=OBSTACLE_TRACK
        )
        counted = [row for row in results["frames"] if not row["ignored"]]
        rates = {}
        for rate in RATES if calibration else ():
            if calibration is not None and calibration.count >= scores_needed(rate):
                m = frame_measures(counted, calibration.threshold_for(rate))
                rates[str(rate)] = {k: m[k] for k in ("tpr", "fpr", "fpr_interval")}
        keys = "pixel_ap", "pixel_fpr95", "component_f1_calibrated", "component_f1_oracle"
        found[name] = {
            **{key: results[key] for key in (*keys, "frames_counted", "frames_anomalous")},
            "auroc": results["frame_auroc"],
            "auroc_interval": results["frame_auroc_interval"],
            "rates": rates,
            "kinds": {kind: m["auroc"] for kind, m in results["by_kind"].items()},
            "sizes": by_size(dataset, counted),
            "drives": drives_found(counted, calibration),
            "entries": detector.index.count,
            "parts": {part: each.count for part, each in detector.index.parts.items()},
        }
    return found


def is_bare(settings: Settings) -> bool:
    """Return whether a row has neither score normalisation nor smoothing."""
    return not settings.smoothing


def bare_calibration(
    index: NominalIndex, sources: list[str], *, settings: Settings, embedder: Remembered
) -> Calibration:
    """Return a calibration of plain distances, without score normalisation."""
    detector = AnomalyDetector(index, settings=settings, embedder=embedder)
    drives = open_drives(sources)
    scores: dict[str, list[float]] = {}
    for drive, _, _, grid in embedded_frames(drives, embedder):
        scores.setdefault(drive, []).append(detector.score(grid).score)
    return Calibration.fit(
        scores,
        heatmap_low=0.0,
        index=index,
        settings=detector.settings,
        roi=detector.roi,
        camera="camera",
    )


def _index_key(trial: Trial, settings: Settings) -> tuple[Any, ...]:
    """Return what an index depends on and rows may differ in."""
    limits = settings.dedup_distance, settings.max_entries
    return (*trial.index, *_embedded_by(settings), settings.variant, *limits)


def _embedded_by(settings: Settings) -> tuple[Any, ...]:
    """Return what embeddings and instances depend on that rows may differ in."""
    names = "place_weight", "segmenter", "segmenter_model", "backbone", "layers", "input_size"
    return tuple(getattr(settings, name) for name in names)


def by_size(dataset: Dataset, rows: list[dict[str, Any]]) -> list[tuple[float, float | None]]:
    """Return the largest share of the image, and the frame AUROC, by thirds of the anomalies."""
    shares = {t.file: float((m == 1).mean()) for _, t, m in dataset if t.anomaly and t.has_pixels}
    nominal = [row["score"] for row in rows if not row["anomaly"]]
    odd = sorted((shares[row["name"]], row["score"]) for row in rows if row["name"] in shares)
    if not nominal or len(odd) < 3:
        return []
    found: list[tuple[float, float | None]] = []
    for part in np.array_split(np.array(odd), 3):
        truth = np.repeat([True, False], [len(part), len(nominal)])
        found.append((float(part[-1, 0]), frame_auroc(np.append(part[:, 1], nominal), truth)))
    return found


def drives_found(
    rows: list[dict[str, Any]], calibration: Calibration | None
) -> dict[str, tuple[int, int]]:
    """Return by rate how many drives with an anomaly have a frame of it above, and of how many."""
    if calibration is None:
        return {}
    found = {}
    for rate in RATES:
        if calibration.count < scores_needed(rate):
            continue
        limit = calibration.threshold_for(rate)
        drives = {row["sequence"] for row in rows if row["anomaly"]}
        hit = {row["sequence"] for row in rows if row["anomaly"] and row["score"] > limit}
        found[str(rate)] = len(hit), len(drives)
    return found


def milliseconds(settings: Settings, index: NominalIndex, folder: str) -> float:
    """Return the median milliseconds of a frame, embedding and segmentation included."""
    frames = list(itertools.islice(open_source(folder), TIMED_FRAMES))
    normalisations: dict[str, ScoreNormalisation] = {}
    if not is_bare(settings):
        flat = _flat(class_anchors(index.content.embeddings))
        normalisations = dict.fromkeys(("grid", INSTANCES), flat)
    detector = AnomalyDetector(index, settings=settings, normalisations=normalisations)
    times_ms = []
    for frame in frames:
        begin = time.perf_counter()
        detector.detect(frame)
        times_ms.append((time.perf_counter() - begin) * 1e3)
    return float(np.median(times_ms[len(times_ms) // 4 :]))


def _flat(anchors: np.ndarray | None) -> ScoreNormalisation:
    classes = None
    if anchors is not None:
        zeros, ones = np.zeros(len(anchors), np.float32), np.ones(len(anchors), np.float32)
        classes = PatchClasses(anchors, zeros, ones)
    cells = np.full(CELLS_HW, 0.1, np.float32), np.full(CELLS_HW, 0.05, np.float32)
    return ScoreNormalisation(*cells, classes)


def main() -> None:
    """Print the tables of all test sets, and write all figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--backbone", default="street_small", help="shipped name or folder")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="given")
    parser.add_argument("--first-seed", type=int, default=70000, help="first of the drives")
    parser.add_argument("--row", action="append", help="only this one; may be repeated")
    parser.add_argument(
        "--try", action="append", default=[], dest="tried", metavar="JSON", help="a row of settings"
    )
    parser.add_argument("--drives", type=Path, help="keep the drives here, or take those there")
    parser.add_argument("--data", type=Path, help="folder with carla_drives/, road_anomaly/, ...")
    parser.add_argument("--no-street", action="store_true", help="the sets of --data alone")
    parser.add_argument(
        "--times", action="store_true", help="measure milliseconds, on an idle machine"
    )
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    args = parser.parse_args()
    given = {key: json.loads(value) for key, value in (g.split("=", 1) for g in args.given)}
    common = {"backbone": args.backbone, "target_false_alarm_rate": 0.05, **COMMON, **given}
    chosen = {name: ROWS[name] for name in args.row} if args.row else {} if args.tried else ROWS
    chosen = {**chosen, **{text: json.loads(text) for text in args.tried}}
    rows: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    indexes: dict[Any, NominalIndex] = {}
    made = {
        name: Settings.from_parameters({**common, **chosen[name]}).with_build_defaults()
        for name in chosen
    }
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        trials = real_trials(args.data, scratch) if args.data else []
        if not args.no_street:
            trials.insert(0, street_trial(args.drives or scratch / "drives", args.first_seed))
        # Grids are large: those of one trial and one way of embedding are kept at a time.
        groups: dict[Any, list[str]] = {}
        for name, settings in made.items():
            groups.setdefault(_embedded_by(settings), []).append(name)
        for alike, trial in itertools.product(groups.values(), trials):
            segmenting = made[alike[0]].replace(variant="instance")
            embedder = Remembered(RunningEmbedder.from_settings(segmenting))
            for name in tqdm(alike, "rows", disable=None):
                out = scratch / "report"
                rows[name] |= measure(trial, made[name], embedder, out, indexes)
                shutil.rmtree(out)
                for test in trial.tests:
                    shown = (rows[name][test][k] for k in SHOWN)
                    print(name, test, *shown, sep=" | ", flush=True)
                if args.out:
                    args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        # At the end, one row after the other, so that nothing else runs beside it.
        for name, settings in made.items() if args.times and trials[0].index else ():
            index = indexes[_index_key(trials[0], settings)]
            first = next(iter(trials[0].tests.values()))
            rows[name]["ms"] = {"median": milliseconds(settings, index, first)}
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for test in dict.fromkeys(test for found in rows.values() for test in found if test != "ms"):
        print(f"\n### {test}\n\n{table(rows, test)}")


if __name__ == "__main__":
    main()
