"""Which part of the method earns what: one row a part, on held-out streets.

Two sets of drives, one a family of anomalies, each with anomalous and nominal frames; index and
calibration of other drives, all through the package's own index, calibration and evaluation.
Rows differ in settings alone. Frames are embedded once; the times are those of a second pass.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from ablation_tables import RATES, table
from ablation_trials import Trial, real_trials, street_trial
from remembered import Remembered
from tqdm import tqdm

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.calibration.conformal import scores_needed
from semantic_anomaly.detection.detector import AnomalyDetector
from semantic_anomaly.evaluation.components import OBSTACLE_TRACK
from semantic_anomaly.evaluation.evaluate import evaluate
from semantic_anomaly.evaluation.layouts import Dataset, open_dataset
from semantic_anomaly.evaluation.metrics import frame_auroc, frame_measures
from semantic_anomaly.evaluation.protocols import SelfNominal
from semantic_anomaly.index.build import INSTANCES, PAIRS
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.open import open_source
from semantic_anomaly.offline.build_index import build_index
from semantic_anomaly.offline.calibrate import calibrate
from semantic_anomaly.roi import ImageRegion
from semantic_anomaly.scoring.normalisation import CELLS_HW, Kinds, UsualDistances, anchors_of
from semantic_anomaly.segmentation.embedder import RunningEmbedder
from semantic_anomaly.settings import Settings

TIMED_FRAMES = 40
SHOWN = "auroc", "pixel_ap", "rates", "sizes", "kinds"
COMMON: dict[str, Any] = {"place_weight": 0.0}
INSTANCE: dict[str, Any] = {"variant": "instance"}
AGREEMENT = {**INSTANCE, "min_agreement": 0.25}
SURROUNDED = {**AGREEMENT, "surroundings_weight": 0.3}
PLACE: dict[str, Any] = {"place_weight": 0.2}
PLACED = {**SURROUNDED, **PLACE}
BARE: dict[str, Any] = {"place_normalisation": False, "smoothing": 0.0}
ROWS: dict[str, dict[str, Any]] = {
    "grid": BARE,
    "grid + filters": {},
    "grid + filters + place": PLACE,
    "instances": {**INSTANCE, **BARE},
    "instances + filters": AGREEMENT,
    "instances + filters + surroundings": SURROUNDED,
    "instances + filters + surroundings + place": PLACED,
    "instances + filters + surroundings + place + scene": {**PLACED, "scene_frames": 80},
    "grid, instances and pairs + filters": {**SURROUNDED, "variant": "combined"},
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
        key = _made_of(trial, settings)
        if key not in indexes:
            indexes[key] = build_index(
                _with_all_parts(settings), "camera", trial.index, embedder=embedder
            )
        calibration = calibrate(
            settings, "camera", indexes[key], trial.calibration, embedder=embedder
        )
        detector = AnomalyDetector(embedder, indexes[key], calibration, settings, ImageRegion())
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


def _with_all_parts(settings: Settings) -> Settings:
    """Return the settings of an index that serves rows of every kind."""
    weight = settings.surroundings_weight or SURROUNDED["surroundings_weight"]
    parts = {"variant": "instance", "surroundings_weight": weight, "scene_frames": 1}
    return settings.replace(place_normalisation=True, **parts)


def _made_of(trial: Trial, settings: Settings) -> tuple[Any, ...]:
    """Return what an index depends on that rows may differ in."""
    limits = settings.dedup_distance, settings.max_entries
    weight = _with_all_parts(settings).surroundings_weight
    return (*trial.index, *_embedded_by(settings), weight, *limits)


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
    usual: dict[str, UsualDistances] = {}
    if settings.place_normalisation:
        flat = _flat(anchors_of(index.content.embeddings, settings.usual_kinds))
        usual = dict.fromkeys(("grid", INSTANCES, PAIRS), flat)
    embedder = RunningEmbedder.from_settings(settings)
    try:
        detector = AnomalyDetector(embedder, index, None, settings, ImageRegion(), usual)
        taken = []
        for frame in frames:
            begin = time.perf_counter()
            detector.assess(frame, embedder.embed([frame.image])[0])
            taken.append((time.perf_counter() - begin) * 1e3)
    finally:
        embedder.close()
    return float(np.median(taken[len(taken) // 4 :]))


def _flat(anchors: np.ndarray | None) -> UsualDistances:
    kinds = None
    if anchors is not None:
        even = np.zeros(len(anchors), np.float32), np.ones(len(anchors), np.float32)
        kinds = Kinds(anchors, *even)
    cells = np.full(CELLS_HW, 0.1, np.float32), np.full(CELLS_HW, 0.05, np.float32)
    return UsualDistances(*cells, kinds)


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
    made = {name: Settings.from_parameters({**common, **chosen[name]}) for name in chosen}
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
            segmenting = made[alike[0]].replace(variant="instance", place_normalisation=True)
            embedder = Remembered(RunningEmbedder.from_settings(segmenting))
            for name in tqdm(alike, "rows", disable=None):
                if made[name].scene_frames and not trial.index:
                    continue  # Of sets where every image shows an anomaly no scene is nominal.
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
            index = indexes[_made_of(trials[0], settings)]
            first = next(iter(trials[0].tests.values()))
            rows[name]["ms"] = {"median": milliseconds(settings, index, first)}
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for test in dict.fromkeys(test for found in rows.values() for test in found if test != "ms"):
        print(f"\n### {test}\n\n{table(rows, test)}")


if __name__ == "__main__":
    main()
