"""Measure what each part of the method contributes, on held-out synthetic streets.

One test set for each family of anomalies, with anomalous and nominal frames; index and calibration
come from other drives. Rows differ in settings alone, except that the rows "grid" and "instances"
have neither score normalisation nor smoothing. Frames are embedded once. --data adds a CARLA drive,
CARLA composites (see carla.py), Road Anomaly and RoadObstacle21, as far as they are in the folder.

With the defaults it takes two hours on two CPU cores and 7 GB of memory; --data with --no-street
one hour. Needs no data without --data.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import carla
import numpy as np
from tqdm import tqdm

from semantic_anomaly import (
    AnomalyDetector,
    Calibration,
    NominalIndex,
    PatchGrid,
    Settings,
    build_index,
    calibrate,
    evaluate,
    open_source,
)
from semantic_anomaly.calibration.conformal import scores_needed
from semantic_anomaly.cli import main as command
from semantic_anomaly.embedding.identity import StageIdentity
from semantic_anomaly.evaluation.components import OBSTACLE_TRACK
from semantic_anomaly.evaluation.layouts import Dataset, open_dataset
from semantic_anomaly.evaluation.measures import figure
from semantic_anomaly.evaluation.metrics import frame_auroc, frame_measures
from semantic_anomaly.evaluation.protocols import SelfNominal
from semantic_anomaly.offline.drives import embedded_frames, open_drives
from semantic_anomaly.segmentation.embedder import RunningEmbedder
from semantic_anomaly.synthetic import KINDS, family

INDEX_DRIVES, CALIBRATION_DRIVES, TEST_DRIVES_PER_KIND = 80, 60, 10
RATES = (0.01, 0.05)
TIMED_FRAMES = 40
# "normalised": false leaves out the score normalisation; all other keys are settings.
BARE: dict[str, Any] = {"normalised": False, "smoothing": 0.0}
INSTANCE: dict[str, Any] = {"variant": "instance"}
POSITION: dict[str, Any] = {"place_weight": 0.2}
COMMON: dict[str, Any] = {"target_false_alarm_rate": RATES[-1], "place_weight": 0.0}
ROWS: dict[str, dict[str, Any]] = {
    "grid": BARE,
    "grid, normalised": {},
    "grid, normalised, position": POSITION,
    "instances": {**INSTANCE, **BARE},
    "instances, normalised": INSTANCE,
    "instances, normalised, position": {**INSTANCE, **POSITION},
    "grid and instances, normalised": {"variant": "combined"},
}


@dataclass(frozen=True)
class Trial:
    """Sources of index, calibration and tests.

    Attributes:
        index, calibration: sources; empty: self-nominal, the normal pixels of the test set.
        tests: labelled sources by name.
    """

    index: list[str]
    calibration: list[str]
    tests: dict[str, str]


@dataclass(frozen=True)
class Row:
    """One row of the tables: its settings, and whether distances are normalised."""

    settings: Settings
    normalised: bool

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Row:
        """Make a row from settings and `normalised`."""
        parameters = {key: value for key, value in values.items() if key != "normalised"}
        settings = Settings.from_parameters(parameters).with_build_defaults()
        return cls(settings, values.get("normalised", True))

    @property
    def embedding(self) -> tuple[Any, ...]:
        """Return the settings on which embeddings and instances depend."""
        names = "place_weight", "segmenter", "segmenter_model", "stages"
        return tuple(getattr(self.settings, name) for name in names)

    def index_key(self, trial: Trial) -> tuple[Any, ...]:
        """Return all on which an index depends."""
        names = "dedup_distance", "max_entries"
        settings = (getattr(self.settings, name) for name in names)
        return (*trial.index, *self.embedding, *settings)


def street_trial(folder: Path, first_seed: int) -> Trial:
    """Return the trial of the synthetic street, rendering the drives that the folder lacks."""
    # Number of drives, frames, stride, first seed, anomalies.
    plans: dict[str, tuple[int, int, int, int, list[str]]] = {
        "index": (INDEX_DRIVES, 48, 12, first_seed, []),
        "calibration": (CALIBRATION_DRIVES, 96, 24, first_seed + 500, []),
    }
    for number, name in enumerate(dict.fromkeys(map(family, KINDS))):
        kinds = [kind for kind in KINDS if family(kind) == name]
        drives = TEST_DRIVES_PER_KIND * len(kinds)
        plans[name] = drives, 100, 10, first_seed + 1000 + 500 * number, kinds
    for name, (drives, frames, stride, seed, kinds) in plans.items():
        if (folder / name / "labels.json").exists():
            continue
        numbers = {"--drives": drives, "--frames": frames, "--stride": stride, "--seed": seed}
        options = [str(part) for pair in numbers.items() for part in pair]
        options += ["--anomalies", ",".join(kinds)] if kinds else []
        code = command(["synth", str(folder / name), *options])
        if code:
            raise SystemExit(code)
    tests = {name: str(folder / name) for name, plan in plans.items() if plan[4]}
    return Trial([str(folder / "index")], [str(folder / "calibration")], tests)


def real_trials(data: Path, scratch: Path) -> list[Trial]:
    """Return the trials of the rendered and real sets in a folder."""
    trials = []
    drive, frames = data / carla.DRIVE, data / carla.FRAMES
    if drive.is_dir():
        index, calibration = f"{drive}{carla.INDEX_FRAMES}", f"{drive}{carla.CALIBRATION_FRAMES}"
        tests = {"CARLA drive, box on the road": f"{drive}{carla.TEST_FRAMES}"}
        trials.append(Trial([index], [calibration], tests))
    if frames.is_dir():
        composites = scratch / "composites"
        carla.write_composites(frames, composites, 0)
        tests = {"CARLA composites, lights and signs on vehicles": str(composites)}
        trials.append(Trial(*carla.composite_sources(frames), tests))
    for name, title in (("road_anomaly", "Road Anomaly"), ("road_obstacle21", "RoadObstacle21")):
        if (data / name).is_dir():
            trials.append(Trial([], [], {f"{title}, self-nominal": str(data / name)}))
    return trials


class CachedEmbedder:
    """Embeds and segments each image once.

    Attributes:
        stages: of the embedder behind it.
    """

    def __init__(self, embedder: RunningEmbedder) -> None:
        self._embedder = embedder
        self._cache: dict[str, list[tuple[PatchGrid, SparseInstances | None]]] = {}
        self.stages: tuple[StageIdentity, ...] = embedder.stages

    def grids_hw(self, image_hw: tuple[int, int]) -> list[tuple[int, int]]:
        """Return (rows, cols) of the grid of each stage, of an image of (height, width)."""
        return self._embedder.grids_hw(image_hw)

    def embed(self, images: Sequence[np.ndarray]) -> list[PatchGrid]:
        """Return the patch embeddings of images, in order, with their instances."""
        return [self._embed(image) for image in images]

    def _embed(self, image: np.ndarray) -> PatchGrid:
        key = hashlib.sha1(image.tobytes()).hexdigest()
        if key not in self._cache:
            grid = self._embedder.embed([image])[0]
            self._cache[key] = [
                (
                    dataclasses.replace(stage, instances=None, further=()),
                    None if stage.instances is None else SparseInstances.of(stage.instances),
                )
                for stage in grid.stages
            ]
        first, *further = (
            bare if sparse is None else dataclasses.replace(bare, instances=sparse.dense())
            for bare, sparse in self._cache[key]
        )
        return dataclasses.replace(first, further=tuple(further))


class SparseInstances(NamedTuple):
    """Shares of instances, nearly all zero: dense ones of a trial would fill the memory."""

    shape: tuple[int, ...]
    at: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, shares: np.ndarray) -> SparseInstances:
        """Return (n, rows, cols) shares without zeros."""
        at = np.flatnonzero(shares)
        return cls(shares.shape, at, shares.flat[at])

    def dense(self) -> np.ndarray:
        """Return (n, rows, cols) float32."""
        shares = np.zeros(self.shape, np.float32)
        shares.flat[self.at] = self.values
        return shares


def bare_calibration(
    index: NominalIndex, sources: list[str], *, settings: Settings, embedder: CachedEmbedder
) -> Calibration:
    """Return a calibration whose normalisation is the same for all patches of a stage."""
    detector = AnomalyDetector(index, settings=settings, embedder=embedder)
    scores: dict[str, list[float]] = {}
    for drive, _, _, grid in embedded_frames(open_drives(sources), embedder):
        scores.setdefault(drive, []).append(detector.score(grid).score)
    return Calibration.fit(
        scores,
        heatmap_low=0.0,
        index=index,
        settings=detector.settings,
        roi=detector.roi,
        camera="camera",
        normalisations=detector.normalisations,
    )


def calibrated_detector(
    trial: Trial, row: Row, embedder: CachedEmbedder, indexes: dict[Any, NominalIndex]
) -> AnomalyDetector:
    """Return the detector of a row; indexes are built once."""
    key, settings = row.index_key(trial), row.settings
    if key not in indexes:
        indexes[key] = build_index(trial.index, settings=settings, embedder=embedder)
    calibrate_row = calibrate if row.normalised else bare_calibration
    calibration = calibrate_row(
        indexes[key], trial.calibration, settings=settings, embedder=embedder
    )
    return AnomalyDetector(indexes[key], calibration, settings=settings, embedder=embedder)


def measures_of(
    detector: AnomalyDetector | SelfNominal, dataset: Dataset, calibration: Calibration | None
) -> dict[str, Any]:
    """Return the measures of one row on one test set."""
    evaluation = evaluate(detector, dataset, limits=OBSTACLE_TRACK)
    rows = [row for row in evaluation["frames"] if not row["ignored"]]
    rates, drives = {}, {}
    for rate in RATES:
        if calibration is None or calibration.count < scores_needed(rate):
            continue
        threshold = calibration.threshold_for(rate)
        measures = frame_measures(rows, threshold)
        rates[str(rate)] = {key: measures[key] for key in ("tpr", "fpr", "fpr_interval")}
        anomalous = {row["sequence"] for row in rows if row["anomaly"]}
        detected = {r["sequence"] for r in rows if r["anomaly"] and r["score"] > threshold}
        drives[str(rate)] = len(detected), len(anomalous)
    names = "pixel_ap", "pixel_fpr95", "component_f1_calibrated", "component_f1_oracle"
    return {
        **{name: evaluation[name] for name in (*names, "frames_counted", "frames_anomalous")},
        "auroc": evaluation["frame_auroc"],
        "auroc_interval": evaluation["frame_auroc_interval"],
        "rates": rates,
        "kinds": {kind: measures["auroc"] for kind, measures in evaluation["by_kind"].items()},
        "sizes": auroc_by_size(dataset, rows),
        "drives": drives,
        "entries": detector.index.count if isinstance(detector, AnomalyDetector) else None,
    }


def auroc_by_size(dataset: Dataset, rows: list[dict[str, Any]]) -> list[tuple[float, float | None]]:
    """Return the frame AUROC by thirds of the anomalies' areas, smallest first.

    Returns:
        Largest share of the image in the third, and frame AUROC; empty for less than 3 anomalies.
    """
    shares = {t.file: float((m == 1).mean()) for _, t, m in dataset if t.anomaly and t.has_pixels}
    nominal = [row["score"] for row in rows if not row["anomaly"]]
    anomalous = sorted((shares[r["name"]], r["score"]) for r in rows if r["name"] in shares)
    if not nominal or len(anomalous) < 3:
        return []
    thirds: list[tuple[float, float | None]] = []
    for third in np.array_split(np.array(anomalous), 3):
        truth = np.repeat([True, False], [len(third), len(nominal)])
        auroc = frame_auroc(np.append(third[:, 1], nominal), truth)
        thirds.append((float(third[-1, 0]), auroc))
    return thirds


def milliseconds(detector: AnomalyDetector, source: str) -> float:
    """Return the median milliseconds of a frame, embedding and segmentation included."""
    times_ms = []
    for frame in itertools.islice(open_source(source), TIMED_FRAMES):
        begin = time.perf_counter()
        detector.detect(frame)
        times_ms.append((time.perf_counter() - begin) * 1e3)
    return float(np.median(times_ms[len(times_ms) // 4 :]))


def table(measures: Mapping[str, Mapping[str, Any]], times_ms: Mapping[str, float]) -> str:
    """Return the Markdown table of a test set.

    Args:
        measures: as of `measures_of`, by row.
        times_ms: median milliseconds of a frame by row.
    """
    heads = ["row", "frame AUROC", *(f"TPR, FPR at {100 * rate:g} %" for rate in RATES)]
    heads += [f"drives detected at {100 * RATES[-1]:g} %", "AUROC small, middle, large"]
    heads += ["pixel AP", "FPR95", "F1", "ms"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, m in measures.items():
        cells = [figure(m["auroc"]) + _interval(m["auroc_interval"])]
        for rate in map(str, RATES):
            r = m["rates"].get(rate)
            cells.append(
                f"{figure(r['tpr'])}, {figure(r['fpr'])}{_interval(r['fpr_interval'])}"
                if r
                else "-"
            )
        drives = m["drives"].get(str(RATES[-1]))
        cells.append(f"{drives[0]} of {drives[1]}" if drives else "-")
        cells.append(", ".join(figure(auroc) for _, auroc in m["sizes"]) or "-")
        cells += [figure(m[key]) for key in ("pixel_ap", "pixel_fpr95", "component_f1_oracle")]
        lines.append(f"| {name} | {' | '.join(cells)} | {figure(times_ms.get(name), 0)} |")
    return "\n".join(lines)


def _interval(ends: tuple[float, float] | None) -> str:
    return f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""


def main() -> None:
    """Print the tables of all test sets, and write all figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="street_small", help="shipped name or folder")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=JSON",
        dest="overrides",
        help="setting of all rows; may be repeated",
    )
    parser.add_argument("--first-seed", type=int, default=70000, help="seed of the first drive")
    parser.add_argument(
        "--row",
        action="append",
        choices=ROWS,
        metavar="NAME",
        help=f"only this row; may be repeated: {'; '.join(ROWS)}",
    )
    parser.add_argument(
        "--try",
        action="append",
        default=[],
        dest="tried",
        metavar="JSON",
        help="a row of settings, such as '{\"neighbours\": 3}'; may be repeated",
    )
    parser.add_argument("--drives", type=Path, help="folder that keeps the drives for another run")
    parser.add_argument("--data", type=Path, help="folder with carla_drives/, road_anomaly/, ...")
    parser.add_argument("--no-street", action="store_true", help="only the sets of --data")
    parser.add_argument(
        "--times", action="store_true", help="measure milliseconds, on an idle machine"
    )
    parser.add_argument("--out", type=Path, help="JSON file of all figures")
    args = parser.parse_args()
    if args.no_street and not args.data:
        parser.error("--no-street: needs --data")
    common = {"backbone": args.backbone, **COMMON}
    common |= {key: json.loads(value) for key, value in (o.split("=", 1) for o in args.overrides)}
    chosen = {name: ROWS[name] for name in args.row or ([] if args.tried else ROWS)}
    chosen |= {text: json.loads(text) for text in args.tried}
    rows = {name: Row.of({**common, **values}) for name, values in chosen.items()}
    measures: dict[str, dict[str, dict[str, Any]]] = {}  # by test set and row
    indexes: dict[Any, NominalIndex] = {}
    calibrations: dict[str, Calibration | None] = {}
    times_ms: dict[str, float] = {}

    def write() -> None:
        if args.out:
            figures = {"measures": measures, "ms": times_ms}
            args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as scratch:
        trials = real_trials(args.data, Path(scratch)) if args.data else []
        if not args.no_street:
            drives = args.drives or Path(scratch) / "drives"
            trials.insert(0, street_trial(drives, args.first_seed))
        if not trials:
            parser.error(f"--data: expected a folder with data sets, found none in '{args.data}'")
        # Grids are large: those of one trial and one way of embedding are in memory at a time.
        groups: dict[Any, list[str]] = {}
        for name, row in rows.items():
            groups.setdefault(row.embedding, []).append(name)
        for names, trial in itertools.product(groups.values(), trials):
            settings = rows[names[0]].settings
            embedder = CachedEmbedder(RunningEmbedder.from_settings(settings))
            for name in tqdm(names, "rows", disable=None):
                detector: AnomalyDetector | SelfNominal | None = None
                calibration = None
                if trial.index:
                    detector = calibrated_detector(trial, rows[name], embedder, indexes)
                    calibration = detector.calibration
                    if trial is trials[0]:
                        calibrations[name] = calibration
                for test, source in trial.tests.items():
                    dataset = open_dataset(source, "")
                    tested = detector or SelfNominal(
                        rows[name].settings, "camera", dataset, embedder
                    )
                    m = measures_of(tested, dataset, calibration)
                    measures.setdefault(test, {})[name] = m
                    shown = (m[key] for key in ("auroc", "pixel_ap", "rates", "sizes", "kinds"))
                    print(name, test, *shown, sep=" | ", flush=True)
                write()
        # At the end, so that no other embedder is in use.
        for name, row in rows.items() if args.times and trials[0].index else ():
            index = indexes[row.index_key(trials[0])]
            running = AnomalyDetector(index, calibrations[name], settings=row.settings)
            times_ms[name] = milliseconds(running, next(iter(trials[0].tests.values())))
        write()
    for test, by_row in measures.items():
        print(f"\n### {test}\n\n{table(by_row, times_ms)}")


if __name__ == "__main__":
    main()
