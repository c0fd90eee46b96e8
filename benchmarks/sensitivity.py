"""Does sensitivity to pasted things tell how well real anomalies are found?

For each of some stages: the recall and pixel AP of `semantic_anomaly.sensitivity` on composites
over CARLA frames (index of Town01 and Town04, calibration with Town03, composites over Town02), and
the pixel AP on the real images of Road Anomaly, self-nominal in two folds. Then their rank
correlation over the stages.

Needs a folder with carla_frames/ and road_anomaly/. On two CPU cores 15 minutes. A second run
with the same --out measures only what is missing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
from carla import CALIBRATION_TOWN, INDEX_TOWNS, TEST_TOWN, town_slice
from scipy import stats
from tqdm import tqdm

from semantic_anomaly import Settings, build_index, calibrate, evaluate, sensitivity
from semantic_anomaly.evaluation.composites import CompositePlan
from semantic_anomaly.evaluation.layouts import open_dataset
from semantic_anomaly.evaluation.measures import figure
from semantic_anomaly.evaluation.protocols import SelfNominal
from semantic_anomaly.segmentation.embedder import RunningEmbedder
from semantic_anomaly.settings import BUILD_DEFAULTS
from semantic_anomaly.storage import atomic_write_bytes, canonical_json

STAGES = {
    "mobilenet_v1:9@320": "mobilenet_v1 layer=9 size=320",
    **{f"mobilenet_v1:{n}@448": f"mobilenet_v1 layer={n} size=448" for n in (13, 21, 23)},
    **{f"mobilenet_v1:21@{n}": f"mobilenet_v1 layer=21 size={n}" for n in (256, 800)},
    **{f"efficientnet_lite2:{n}@448": f"efficientnet_lite2 layer={n} size=448" for n in (15, 20)},
}
DEFAULT = "default stages"
# Town02 is simpler than the town of the calibration: at lower rates hardly anything is found.
RATE = 0.2
INDEX_STEP, CALIBRATION_STEP, FOLDS = 6, 12, 2
SENSITIVITIES = {
    "recall": "recall at the calibrated threshold",
    "recall_large": "recall of the two larger sizes",
    "raised": "things that score above their control",
    "composite_ap": "pixel AP on the composites",
}


def real_ap(data: Path, stages: tuple[str, ...]) -> float:
    """Return the pixel AP of some stages on Road Anomaly."""
    settings, dataset = Settings(stages=stages), open_dataset(data / "road_anomaly")
    protocol = SelfNominal(settings, "camera", dataset, folds=FOLDS)
    return float(evaluate(protocol, dataset)["pixel_ap"])


def measured(
    data: Path, stages: tuple[str, ...], plan: CompositePlan, real: float | None
) -> dict[str, Any]:
    """Return sensitivity on CARLA and pixel AP on Road Anomaly of some stages.

    `real` is that pixel AP if it is known: it does not depend on the plan.
    """
    frames, settings = data / "carla_frames", Settings(stages=stages)
    embedder = RunningEmbedder.from_settings(settings.with_build_defaults())
    options: dict[str, Any] = {"settings": settings, "embedder": embedder}
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        towns = [f"{town_slice(frames, town)[:-1]}:{INDEX_STEP}]" for town in INDEX_TOWNS]
        built = build_index(towns, out=index, **options)
        nominal = f"{town_slice(frames, CALIBRATION_TOWN)[:-1]}:{CALIBRATION_STEP}]"
        calibrate(built, nominal, out=index, target_false_alarm_rate=RATE, **options)
        composites = town_slice(frames, TEST_TOWN)
        results = sensitivity(index, composites, plan, embedder=embedder)
    found = results["detectors"][0]
    pairs = [row[found["name"]] for row in results["composites"]]
    sizes = list(found["by_size"].values())
    large = [(m["found"], m["composites"]) for m in sizes[len(sizes) // 2 :]]
    return {
        "recall": found["recall"],
        "recall_large": sum(f for f, _ in large) / sum(n for _, n in large),
        "raised": sum(pair["score"] > pair["control_score"] for pair in pairs) / len(pairs),
        "composite_ap": found["pixel_ap"],
        "controls": found["control_rate"],
        "untouched": found["untouched"]["rate"],
        "real_ap": real_ap(data, stages) if real is None else real,
        "by_size": {size: m["recall"] for size, m in found["by_size"].items()},
    }


def correlations(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return Spearman's rank correlation with the real pixel AP, and its p-value."""
    real = [row["real_ap"] for row in rows.values()]
    result = {}
    for key in SENSITIVITIES:
        rho, p_value = stats.spearmanr([row[key] for row in rows.values()], real)
        result[key] = {"spearman": float(rho), "p": float(p_value)}
    return result


def draw(path: Path, rows: dict[str, dict[str, Any]], found: dict[str, dict[str, float]]) -> None:
    """Draw the real pixel AP against each sensitivity."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, panels = pyplot.subplots(
        1, len(SENSITIVITIES), figsize=(16, 4.4), sharey=True, layout="constrained"
    )
    for axes, (key, name) in zip(panels, SENSITIVITIES.items(), strict=True):
        for number, (stage, row) in enumerate(rows.items()):
            marker = "o^sDvP*X<>"[number % 10]
            label = stage if axes is panels[0] else None
            axes.plot(row[key], row["real_ap"], marker, markersize=8, label=label)
        axes.set(xlabel=name)
        axes.set_title(f"Spearman {found[key]['spearman']:+.2f}", loc="left", fontsize=11)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("pixel AP on Road Anomaly")
    drawn.legend(loc="outside right upper", fontsize=9, frameon=False)
    drawn.savefig(path, dpi=110)
    pyplot.close(drawn)


def main() -> None:
    """Measure all stages, print the table and write it with a picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with carla_frames/ and road_anomaly/")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--composites", type=int, default=48, help="default: %(default)s")
    parser.add_argument("--frames", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="some of the stages")
    args = parser.parse_args()
    plan = CompositePlan(composites=args.composites, frames=args.frames)
    every = {**{name: (text,) for name, text in STAGES.items()}, DEFAULT: BUILD_DEFAULTS["stages"]}
    file, key = args.out / "sensitivity.json", canonical_json({"rate": RATE, **plan.to_dict()})
    stored = json.loads(file.read_text()) if file.is_file() else {}
    known = {name: row["real_ap"] for name, row in stored.get("rows", {}).items()}
    rows = stored.get("rows", {}) if stored.get("plan") == key else {}
    for name in tqdm([n for n in every if n in (args.only or every)], unit="stage"):
        if name not in rows:
            rows[name] = measured(args.data, tuple(every[name]), plan, known.get(name))
            rows = {n: rows[n] for n in every if n in rows}
            atomic_write_bytes(file, json.dumps({"plan": key, "rows": rows}, indent=1).encode())
    columns = (*SENSITIVITIES, "controls", "untouched", "real_ap")
    print("| stages |", " | ".join(columns), "|")
    for name, row in rows.items():
        print(f"| {name} |", " | ".join(figure(row[column], 2) for column in columns), "|")
    if len(rows) > 2:
        found = correlations(rows)
        for measure, values in found.items():
            print(f"{measure}: Spearman {values['spearman']:+.2f}, p {values['p']:.3f}")
        content = {"plan": key, "rows": rows, "correlations": found}
        atomic_write_bytes(file, json.dumps(content, indent=1).encode())
        draw(args.out / "sensitivity.png", rows, found)


if __name__ == "__main__":
    main()
