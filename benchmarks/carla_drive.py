"""Measure the grid variant on a CARLA drive that the project did not draw.

Index from frames 0-55 of the drive, calibration from 65-87, evaluation on 89-139, over the whole
image and within a region of interest around the road with the car's bonnet masked; then with
frames of four other towns added to index and calibration. All through the commands.
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
from semantic_anomaly.io.images import encode_png

ROAD = [0.44, 0.565, 0.56, 0.565, 0.85, 1.0, 0.08, 1.0]
INDEX, CALIBRATION, TEST = "[0:56]", "[65:88]", "[89:140]"
RATE = 0.05


def bonnet_mask() -> np.ndarray:
    """Return (720, 1280) uint8, 255 on the bonnet of the drive's car."""
    mask = np.zeros((720, 1280), np.uint8)
    cv2.ellipse(mask, (640, 730), (380, 145), 0, 0, 360, 255, -1)
    return mask


def settings_file(folder: Path, backbone: str, layers: list[int], road: bool) -> Path:
    """Write the settings of one row and return their path."""
    parameters: dict[str, Any] = {"backbone": backbone, "target_false_alarm_rate": RATE}
    if layers:
        parameters["layers"] = layers
    if road:
        mask = folder / "bonnet.png"
        mask.write_bytes(encode_png(bonnet_mask()))
        parameters["camera"] = {"region_of_interest": ROAD, "ego_mask": str(mask)}
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump({"/**": {"ros__parameters": parameters}}))
    return path


def towns(data: Path) -> tuple[str, str]:
    """Return the frames of the towns for the index and of those for the calibration."""
    folder = data / "carla_frames/images"
    names = sorted(p.name for p in folder.iterdir())
    first = sum(name.startswith(("Town01", "Town02")) for name in names)
    return f"{folder}[0:{first}]", f"{folder}[{first}:{len(names)}]"


def measure(
    data: Path, out: Path, backbone: str, layers: list[int], road: bool, more: bool
) -> dict[str, Any]:
    """Build, calibrate and evaluate one row; return its results.json."""
    out.mkdir(parents=True, exist_ok=True)
    settings = ["--settings", str(settings_file(out, backbone, layers, road))]
    drive = str(data / "carla_drives/spawn_props")
    index = [drive + INDEX]
    calibration = [drive + CALIBRATION]
    if more:
        for_index, for_calibration = towns(data)
        index.append(for_index)
        calibration.append(for_calibration)
    for line in (
        ["build-index", *index, "--out", str(out / "index"), *settings],
        ["calibrate", str(out / "index"), *calibration, *settings],
        [
            *("evaluate", drive + TEST, "--index", str(out / "index")),
            *("--out", str(out / "report"), *settings),
        ],
    ):
        code = command(line)
        if code:
            raise SystemExit(code)
    return json.loads((out / "report/results.json").read_text(encoding="utf-8"))


def main() -> None:
    """Print one table row a configuration."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder with carla_drives/ and carla_frames/")
    parser.add_argument("--out", type=Path, help="keep indexes and reports here")
    parser.add_argument("--backbone", action="append", help="NAME-OR-FOLDER[:LAYER,LAYER]")
    parser.add_argument("--no-towns", action="store_true", help="skip the rows with other towns")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        for number, spec in enumerate(args.backbone or ["street_small"]):
            backbone, _, layers = spec.partition(":")
            chosen = [int(layer) for layer in layers.split(",") if layer]
            for more in (False,) if args.no_towns else (False, True):
                for road in (False, True):
                    folder = out / f"{number}_{'road' if road else 'whole'}_{'towns' * more}"
                    found = measure(args.data, folder, backbone, chosen, road, more)
                    rows.append((Path(backbone).name, more, road, found))
    print("| backbone | index and calibration | region | AUROC | TPR | FPR | pixel AP | FPR95 |")
    print("|---|---|---|---|---|---|---|---|")
    for name, more, road, found in rows:
        values = [found[key] for key in ("frame_auroc", "tpr", "fpr", "pixel_ap", "pixel_fpr95")]
        text = " | ".join("-" if v is None else f"{v:.3f}" for v in values)
        where = "road" if road else "whole image"
        print(f"| {name} | {'drive + towns' if more else 'drive'} | {where} | {text} |")


if __name__ == "__main__":
    main()
