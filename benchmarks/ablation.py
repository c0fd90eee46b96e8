"""Which part of the method earns what: one row a part, on held-out streets.

Two sets of drives, one a family of anomalies, each with anomalous and nominal frames; index and
calibration of other drives, all through the package's own index, calibration and evaluation.
Rows differ in settings alone. Frames are embedded once; the times are those of a second pass.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from semantic_anomaly import offline
from semantic_anomaly.cli import main as command
from semantic_anomaly.detector import AnomalyDetector
from semantic_anomaly.evaluation.components import OBSTACLE_TRACK
from semantic_anomaly.evaluation.labelled import evaluate
from semantic_anomaly.evaluation.measures import frame_measures
from semantic_anomaly.evaluation.published import open_dataset
from semantic_anomaly.identity import EmbedderIdentity
from semantic_anomaly.index import NominalIndex
from semantic_anomaly.instance_embedding import RunningEmbedder
from semantic_anomaly.regions import ImageRegion
from semantic_anomaly.segmentation import SegmenterIdentity
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame, PatchGrid
from semantic_anomaly.synthetic import KINDS, family

RATES = (0.01, 0.05)
INDEX_DRIVES, CALIBRATION_DRIVES = 80, 60
TEST_DRIVES_A_KIND = 10
INSTANCES = {"variant": "instance"}
AGREEMENT = {**INSTANCES, "min_agreement": 0.25}
SURROUNDED = {**AGREEMENT, "surroundings_weight": 0.3}
PLACED = {**SURROUNDED, "place_weight": 0.5}
ROWS: dict[str, dict[str, Any]] = {
    "grid": {"place_normalisation": False},
    "grid + filters": {},
    "instances": {**INSTANCES, "place_normalisation": False},
    "instances + filters": AGREEMENT,
    "instances + filters + surroundings": SURROUNDED,
    "instances + filters + surroundings + place": PLACED,
    "instances + filters + surroundings + place + scene": {**PLACED, "scene_frames": 80},
    "grid + filters + place": {"place_weight": 0.5},
    "grid and instances + filters + place": {"variant": "combined", "place_weight": 0.5},
    "all": {**PLACED, "variant": "combined"},
}


class Remembered:
    """Embeds each image once.

    Attributes:
        identity, segmenter: of what it gives.
    """

    def __init__(self, running: RunningEmbedder) -> None:
        self._running = running
        self._known: dict[str, PatchGrid] = {}
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
                self._known[key] = self._running.embed([image])[0]
        return [self._known[key] for key in keys]


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


def measure(
    settings: Settings, embedder: Remembered, sets: dict[str, Path], out: Path, indexes: dict
) -> dict[str, Any]:
    """Build, calibrate and evaluate one row; return its figures by family."""
    made_of = settings.segments, settings.surroundings_weight, settings.place_weight
    key = (*made_of, settings.scene_frames > 0)
    if key not in indexes:
        indexes[key] = offline.build_index(settings, "camera", [sets["index"]], embedder=embedder)
    index: NominalIndex = indexes[key]
    calibration = offline.calibrate(
        settings, "camera", index, [sets["calibration"]], embedder=embedder
    )
    detector = AnomalyDetector(embedder, index, calibration, settings, ImageRegion())
    found: dict[str, Any] = {"entries": index.count}
    found["parts"] = {name: part.count for name, part in index.parts.items()}
    for name in [name for name in sets if name not in ("index", "calibration")]:
        dataset = open_dataset(sets[name], "")
        results = evaluate(dataset, detector, out / name, every=0, limits=OBSTACLE_TRACK)
        counted = [row for row in results["frames"] if not row["ignored"]]
        rates = {r: frame_measures(counted, calibration.threshold_for(r)) for r in RATES}
        keys = "pixel_ap", "pixel_fpr95", "component_f1_calibrated", "component_f1_oracle"
        found[name] = {
            **{key: results[key] for key in (*keys, "frames_counted", "frames_anomalous")},
            "auroc": results["frame_auroc"],
            "auroc_interval": results["frame_auroc_interval"],
            "rates": {
                str(rate): {k: m[k] for k in ("tpr", "fpr", "fpr_interval")}
                for rate, m in rates.items()
            },
            "kinds": {kind: m["auroc"] for kind, m in results["by_kind"].items()},
        }
    return found


def milliseconds(settings: Settings, found: NominalIndex, frames: Sequence[Frame]) -> float:
    """Return the median milliseconds of a frame, embedding and segmentation included."""
    embedder = RunningEmbedder.from_settings(settings)
    try:
        detector = AnomalyDetector(embedder, found, None, settings, ImageRegion())
        taken = []
        for frame in frames:
            begin = time.perf_counter()
            detector.assess(frame, embedder.embed([frame.image])[0])
            taken.append((time.perf_counter() - begin) * 1e3)
    finally:
        embedder.close()
    return float(np.median(taken[len(taken) // 4 :]))


def table(rows: dict[str, dict[str, Any]], name: str) -> str:
    """Return the Markdown table of a family."""
    lines = [
        "| row | frame AUROC | TPR, FPR at 1 % | TPR, FPR at 5 % | pixel AP | FPR95 | F1 | ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, found in rows.items():
        m = found[name]
        low, high = m["auroc_interval"] or (float("nan"),) * 2
        cells = [f"{m['auroc']:.3f} [{low:.3f}, {high:.3f}]"]
        for rate in RATES:
            r = m["rates"][str(rate)]
            ends = r["fpr_interval"] or (float("nan"),) * 2
            cells.append(f"{r['tpr']:.3f}, {r['fpr']:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]")
        cells += [f"{m[k]:.3f}" for k in ("pixel_ap", "pixel_fpr95", "component_f1_oracle")]
        cells.append(f"{found['ms']:.0f}" if found.get("ms") else "-")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables of both families, and write all figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", default="street_small", help="shipped name or folder")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="given")
    parser.add_argument("--first-seed", type=int, default=40000, help="first of the drives")
    parser.add_argument("--row", action="append", help="only this one; may be repeated")
    parser.add_argument(
        "--try", action="append", default=[], dest="tried", metavar="JSON", help="a row of settings"
    )
    parser.add_argument("--drives", type=Path, help="keep the drives here, or take those there")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    parser.add_argument("--no-times", action="store_true")
    args = parser.parse_args()
    common = {
        "tail_percent": 0.2,
        **{k: json.loads(v) for k, v in (g.split("=") for g in args.given)},
    }
    chosen = {name: ROWS[name] for name in args.row} if args.row else {} if args.tried else ROWS
    chosen = {**chosen, **{text: json.loads(text) for text in args.tried}}
    embedders: dict[float, Remembered] = {}
    rows: dict[str, dict[str, Any]] = {}
    indexes: dict[Any, NominalIndex] = {}
    with tempfile.TemporaryDirectory() as scratch:
        sets = synthesise(args.drives or Path(scratch) / "drives", args.first_seed)
        for number, (name, changes) in enumerate(tqdm(chosen.items(), "rows", disable=None)):
            settings = Settings.from_parameters(
                {"backbone": args.backbone, "target_false_alarm_rate": 0.05, **common, **changes}
            )
            weight = settings.place_weight
            if weight not in embedders:
                segmenting = settings.replace(variant="instance", place_normalisation=True)
                embedders[weight] = Remembered(RunningEmbedder.from_settings(segmenting))
            rows[name] = measure(
                settings, embedders[weight], sets, Path(scratch) / str(number), indexes
            )
            for family_name in sets:
                if family_name in rows[name]:
                    m = rows[name][family_name]
                    print(f"{name}: {family_name}: AUROC {m['auroc']:.3f}, AP {m['pixel_ap']:.3f}",
                          m["rates"], m["kinds"], flush=True)  # fmt: skip
            if args.out:
                args.out.write_text(json.dumps(rows, indent=1) + "\n")
    families = [n for n in sets if n not in ("index", "calibration")]
    for name in families:
        print(f"\n{name}\n\n{table(rows, name)}")


if __name__ == "__main__":
    main()
