"""Measure on composites of CARLA frames: a traffic light or sign where none may be, on a vehicle.

Nearest here to the paper's own anomalies (traffic lights carried by a truck). Every composite is a
frame of the test town with one cut-out: a box labelled traffic light or sign, of any town, pasted
by a seeded rule onto the upper part of a labelled vehicle, its edge blended. Index, calibration
and test are of different towns; nominal test frames are the same town's own, unchanged.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from semantic_anomaly.cli import main as command
from semantic_anomaly.io.images import encode_png, read_image

INDEX, CALIBRATION, TEST = ("Town01", "Town04"), ("Town03",), ("Town02",)
RATES = (0.01, 0.05)
LEAST_VEHICLE_PX, LEAST_CUT_PX = (60, 40), (10, 20)
NARROWEST = 0.35
# Height of what is pasted, as a share of the vehicle's.
LOW, HIGH = 0.35, 0.6
KINDS = {"traffic_light": "light on vehicle", "traffic_sign": "sign on vehicle"}
Box = tuple[int, int, int, int]


def boxes(data: Path, kinds: tuple[str, ...], least_wh: tuple[int, int]) -> list[tuple[str, Box]]:
    """Return frame and box of every labelled thing of the kinds that is large enough."""
    labelled = json.loads((data / "boxes_xyxy.json").read_text(encoding="utf-8"))
    return [
        (frame, (int(x0), int(y0), int(x1), int(y1)))
        for frame, found in sorted(labelled.items())
        for kind, x0, y0, x1, y1 in found
        if kind in kinds and x1 - x0 >= least_wh[0] and y1 - y0 >= least_wh[1]
    ]


def composite(
    image: np.ndarray, vehicle: Box, cut: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the image with the cut-out on the vehicle, and its mask.

    Args:
        image: (height, width, 3) uint8.
        vehicle: x0, y0, x1, y1.
        cut: (h, w, 3) uint8.
        rng: source of chance.
    """
    x0, y0, x1, y1 = vehicle
    tall = max(8, round((y1 - y0) * rng.uniform(LOW, HIGH)))
    wide = max(4, round(cut.shape[1] * tall / cut.shape[0]))
    wide = min(wide, x1 - x0 - 2)
    small = cv2.resize(cut, (wide, tall), interpolation=cv2.INTER_AREA)
    left = int(rng.integers(x0, max(x0 + 1, x1 - wide)))
    top = int(rng.integers(y0, max(y0 + 1, y0 + round(0.4 * (y1 - y0)))))
    left, top = min(left, image.shape[1] - wide), min(top, image.shape[0] - tall)
    weight = np.zeros(image.shape[:2], np.float32)
    weight[top + 1 : top + tall - 1, left + 1 : left + wide - 1] = 1
    weight = cv2.GaussianBlur(weight, (3, 3), 0.8)
    pasted = image.copy()
    pasted[top : top + tall, left : left + wide] = small
    mixed = image + (pasted.astype(np.float32) - image) * weight[..., None]
    return np.clip(mixed, 0, 255).astype(np.uint8), (weight > 0.5).astype(np.uint8)


def write_composites(data: Path, out: Path, seed: int) -> int:
    """Write the test set as a labelled folder and return the number of composites."""
    rng = np.random.default_rng(seed)
    vehicles = boxes(data, ("vehicle",), LEAST_VEHICLE_PX)
    cuts = {
        kind: [
            (frame, box)
            for frame, box in boxes(data, (kind,), LEAST_CUT_PX)
            # Cut off by the image's edge, or seen from the side, it is no sign any more.
            if box[0] > 2 and (box[2] - box[0]) >= NARROWEST * (box[3] - box[1])
        ]
        for kind in KINDS
    }
    (out / "images").mkdir(parents=True)
    (out / "masks").mkdir()
    labels: dict[str, dict[str, Any]] = {}
    for file in sorted((data / "images").glob("*.jpg")):
        if not file.stem.startswith(TEST):
            continue
        image = read_image(file)
        name = f"{file.stem}.png"
        (out / "images" / name).write_bytes(encode_png(image))
        labels[name] = {"anomaly": False, "drive": file.stem}
        there = [box for frame, box in vehicles if frame == file.stem]
        if not there:
            continue
        kind = str(rng.choice(list(KINDS)))
        frame, (x0, y0, x1, y1) = cuts[kind][int(rng.integers(len(cuts[kind])))]
        cut = read_image(data / "images" / f"{frame}.jpg")[y0:y1, x0:x1]
        made, mask = composite(image, there[int(rng.integers(len(there)))], cut, rng)
        name = f"{file.stem}_composite.png"
        (out / "images" / name).write_bytes(encode_png(made))
        (out / "masks" / name).write_bytes(encode_png(mask))
        labels[name] = {
            "anomaly": True, "kind": KINDS[kind], "family": "odd arrangement", "drive": file.stem
        }  # fmt: skip
    (out / "labels.json").write_text(json.dumps(labels, indent=1))
    return sum(label["anomaly"] for label in labels.values())


def slices(data: Path, wanted: tuple[str, ...]) -> list[str]:
    """Return the frames of towns as sources of the commands."""
    names = sorted(p.name for p in (data / "images").iterdir())
    found = []
    for town in wanted:
        numbers = [i for i, name in enumerate(names) if name.startswith(town)]
        found.append(f"{data / 'images'}[{numbers[0]}:{numbers[-1] + 1}]")
    return found


def run(line: list[str]) -> None:
    """Run a command, and stop with its exit code if it fails."""
    code = command(line)
    if code:
        raise SystemExit(code)


def measure(data: Path, test: Path, out: Path, backbone: str, layers: list[int]) -> list[Any]:
    """Build, calibrate at each rate and evaluate; return results.json of each rate."""
    out.mkdir(parents=True, exist_ok=True)
    parameters: dict[str, Any] = {"backbone": backbone}
    if layers:
        parameters["layers"] = layers
    settings = out / "settings.yaml"
    settings.write_text(yaml.safe_dump({"/**": {"ros__parameters": parameters}}))
    index = str(out / "index")
    run(["build-index", *slices(data, INDEX), "--out", index, "--settings", str(settings)])
    results = []
    for rate in RATES:
        given = ["--settings", str(settings)]
        run(["calibrate", index, *slices(data, CALIBRATION), *given,
             "--target-false-alarm-rate", str(rate)])  # fmt: skip
        report = out / f"report_{rate:g}"
        run(["evaluate", str(test), "--index", index, "--out", str(report), *given,
             "--components", "obstacle-track"])  # fmt: skip
        results.append(json.loads((report / "results.json").read_text(encoding="utf-8")))
    return results


def main() -> None:
    """Print one table row a backbone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path, help="folder with images/ and boxes_xyxy.json")
    parser.add_argument("--out", type=Path, help="keep composites, indexes and reports here")
    parser.add_argument("--backbone", action="append", help="NAME-OR-FOLDER[:LAYER,LAYER]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        count = write_composites(args.data, out / "composites", args.seed)
        print(f"{count} composites")
        rows = []
        for number, spec in enumerate(args.backbone or ["street_small"]):
            backbone, _, layers = spec.partition(":")
            chosen = [int(layer) for layer in layers.split(",") if layer]
            found = measure(args.data, out / "composites", out / str(number), backbone, chosen)
            rows.append((Path(backbone).name + (f":{layers}" if layers else ""), found))
    print("| backbone | frame AUROC | TPR at 1 % (realised) | TPR at 5 % (realised) | pixel AP |")
    print("|---|---|---|---|---|")
    for name, found in rows:
        rates = " | ".join(f"{r['tpr']:.3f} ({r['fpr']:.3f})" for r in found)
        first = found[0]
        print(f"| {name} | {first['frame_auroc']:.3f} | {rates} | {first['pixel_ap']:.3f} |")


if __name__ == "__main__":
    main()
