"""Measure the detector on CARLA images, which the project did not render itself.

`drive`: one CARLA drive with a box on the road. Index from frames 0-55, calibration from 65-87,
test on 89-139; over the whole image, and within a region of interest around the road with the
car's bonnet masked. Then the same with frames of four towns added to index and calibration.

`composites`: a traffic light or sign, cut out by its box, is pasted onto the upper part of a
vehicle by a seeded rule, with blended edges. Index, calibration and test are of different towns;
the nominal test frames are those of the test town, unchanged.

Needs a folder with carla_drives/spawn_props/ and carla_frames/ (images/ and boxes_xyxy.json). On
two CPU cores, for each row: `drive` 10 minutes, 2 minutes with --no-towns; `composites` 10
minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from semantic_anomaly import AnomalyDetector, Settings, build_index, calibrate, evaluate
from semantic_anomaly.evaluation.measures import figure
from semantic_anomaly.evaluation.metrics import frame_measures
from semantic_anomaly.io.images import encode_png, read_image
from semantic_anomaly.segmentation.embedder import RunningEmbedder

DRIVE, FRAMES = "carla_drives/spawn_props", "carla_frames"
INDEX_FRAMES, CALIBRATION_FRAMES, TEST_FRAMES = "[0:56]", "[65:88]", "[89:140]"
INDEX_TOWNS, CALIBRATION_TOWN, TEST_TOWN = ("Town01", "Town04"), "Town03", "Town02"
ROAD = [0.44, 0.565, 0.56, 0.565, 0.85, 1.0, 0.08, 1.0]
DRIVE_RATE = 0.05
COMPOSITE_RATES = (0.01, 0.05)
LEAST_VEHICLE_PX, LEAST_CUTOUT_PX = (60, 40), (10, 20)
# Width of a cut-out as a share of its height: a narrower one is a sign seen from the side.
LEAST_ASPECT = 0.35
# Height of the pasted cut-out as a share of the vehicle's.
LEAST_HEIGHT, MOST_HEIGHT = 0.35, 0.6
KINDS = {"traffic_light": "light on vehicle", "traffic_sign": "sign on vehicle"}
Box = tuple[int, int, int, int]


def town_slice(frames: Path, *towns: str) -> str:
    """Return the frames of consecutive towns as a source."""
    images = frames / "images"
    names = sorted(path.name for path in images.iterdir())
    rows = [row for row, name in enumerate(names) if name.startswith(towns)]
    return f"{images}[{rows[0]}:{rows[-1] + 1}]"


def composite_sources(frames: Path) -> tuple[list[str], list[str]]:
    """Return the sources of index and calibration that belong to the composites."""
    return [town_slice(frames, t) for t in INDEX_TOWNS], [town_slice(frames, CALIBRATION_TOWN)]


def write_composites(frames: Path, out: Path, seed: int) -> int:
    """Write the test set as a labelled folder and return the number of composites."""
    rng = np.random.default_rng(seed)
    vehicles = _boxes(frames, "vehicle", LEAST_VEHICLE_PX)
    cutouts = {
        kind: [
            (frame, box)
            for frame, box in _boxes(frames, kind, LEAST_CUTOUT_PX)
            # Not cut off by the left edge of the image.
            if box[0] > 2 and (box[2] - box[0]) >= LEAST_ASPECT * (box[3] - box[1])
        ]
        for kind in KINDS
    }
    (out / "images").mkdir(parents=True)
    (out / "masks").mkdir()
    labels: dict[str, dict[str, Any]] = {}
    for file in sorted((frames / "images").glob(f"{TEST_TOWN}*.jpg")):
        image = read_image(file)
        name = f"{file.stem}.png"
        (out / "images" / name).write_bytes(encode_png(image))
        labels[name] = {"anomaly": False, "drive": file.stem}
        boxes = [box for frame, box in vehicles if frame == file.stem]
        if not boxes:
            continue
        kind = str(rng.choice(list(KINDS)))
        frame, (x0, y0, x1, y1) = cutouts[kind][int(rng.integers(len(cutouts[kind])))]
        cutout = read_image(frames / "images" / f"{frame}.jpg")[y0:y1, x0:x1]
        pasted, mask = composite(image, boxes[int(rng.integers(len(boxes)))], cutout, rng)
        name = f"{file.stem}_composite.png"
        (out / "images" / name).write_bytes(encode_png(pasted))
        (out / "masks" / name).write_bytes(encode_png(mask))
        described = {"kind": KINDS[kind], "family": "odd arrangement", "drive": file.stem}
        labels[name] = {"anomaly": True, **described}
    (out / "labels.json").write_text(json.dumps(labels, indent=1))
    return sum(label["anomaly"] for label in labels.values())


def composite(
    image: np.ndarray, vehicle: Box, cutout: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the image with the cut-out on the vehicle, and its mask.

    Args:
        image: (height, width, 3) uint8.
        vehicle: x0, y0, x1, y1 in pixels.
        cutout: (h, w, 3) uint8.
        rng: random numbers.
    """
    x0, y0, x1, y1 = vehicle
    height = max(8, round((y1 - y0) * rng.uniform(LEAST_HEIGHT, MOST_HEIGHT)))
    width = max(4, round(cutout.shape[1] * height / cutout.shape[0]))
    width = min(width, x1 - x0 - 2)
    resized = cv2.resize(cutout, (width, height), interpolation=cv2.INTER_AREA)
    left = int(rng.integers(x0, max(x0 + 1, x1 - width)))
    top = int(rng.integers(y0, max(y0 + 1, y0 + round(0.4 * (y1 - y0)))))
    left, top = min(left, image.shape[1] - width), min(top, image.shape[0] - height)
    weight = np.zeros(image.shape[:2], np.float32)
    weight[top + 1 : top + height - 1, left + 1 : left + width - 1] = 1
    weight = cv2.GaussianBlur(weight, (3, 3), 0.8)
    pasted = image.copy()
    pasted[top : top + height, left : left + width] = resized
    mixed = image + (pasted.astype(np.float32) - image) * weight[..., None]
    return np.clip(mixed, 0, 255).astype(np.uint8), (weight > 0.5).astype(np.uint8)


def _boxes(frames: Path, kind: str, least_wh: tuple[int, int]) -> list[tuple[str, Box]]:
    """Return frame and box of every labelled object of a kind that is large enough."""
    labels = json.loads((frames / "boxes_xyxy.json").read_text(encoding="utf-8"))
    return [
        (frame, (int(x0), int(y0), int(x1), int(y1)))
        for frame, boxes in sorted(labels.items())
        for name, x0, y0, x1, y1 in boxes
        if name == kind and x1 - x0 >= least_wh[0] and y1 - y0 >= least_wh[1]
    ]


def ego_mask() -> bytes:
    """Return a PNG that masks the car's bonnet in the drive."""
    bonnet = np.zeros((720, 1280), np.uint8)
    cv2.ellipse(bonnet, (640, 730), (380, 145), 0, 0, 360, 255, -1)
    return encode_png(bonnet)


def make_detector(
    settings: Settings, index_sources: list[str], calibration_sources: list[str]
) -> AnomalyDetector:
    """Return the calibrated detector of one row."""
    embedder = RunningEmbedder.from_settings(settings)
    index = build_index(index_sources, settings=settings, embedder=embedder, progress=True)
    calibration = calibrate(
        index, calibration_sources, settings=settings, embedder=embedder, progress=True
    )
    return AnomalyDetector(index, calibration, settings=settings, embedder=embedder)


def stages_title(stages: list[str]) -> str:
    """Return the name of a row."""
    return " + ".join(stages) or "defaults"


def measure_drive(args: argparse.Namespace, scratch: Path) -> None:
    """Print the table of `drive`."""
    drive, frames = str(args.data / DRIVE), args.data / FRAMES
    (scratch / "bonnet.png").write_bytes(ego_mask())
    road = {"camera.region_of_interest": ROAD, "camera.ego_mask": str(scratch / "bonnet.png")}
    rows = []
    for stages in args.stages:
        for towns in (False,) if args.no_towns else (False, True):
            index, calibration = [drive + INDEX_FRAMES], [drive + CALIBRATION_FRAMES]
            if towns:
                index.append(town_slice(frames, "Town01", "Town02"))
                calibration.append(town_slice(frames, "Town03", "Town04"))
            for roi, camera in (("whole image", {}), ("road", road)):
                parameters = {"stages": stages, "target_false_alarm_rate": DRIVE_RATE, **camera}
                settings = Settings.from_parameters(parameters)
                detector = make_detector(settings, index, calibration)
                label = [stages_title(stages), "drive + towns" if towns else "drive", roi]
                out = args.out / ", ".join(label) if args.out else None
                evaluation = evaluate(detector, drive + TEST_FRAMES, out=out, progress=True)
                keys = "frame_auroc", "tpr", "fpr", "pixel_ap", "pixel_fpr95"
                rows.append([*label, *(figure(evaluation[key]) for key in keys)])
    print("| stages | index and calibration | ROI | frame AUROC | TPR | FPR | pixel AP | FPR95 |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def measure_composites(args: argparse.Namespace, scratch: Path) -> None:
    """Print the table of `composites`."""
    test = (args.out or scratch) / "composites"
    count = write_composites(args.data / FRAMES, test, args.seed)
    print(f"{count} composites")
    rows = []
    for stages in tqdm(args.stages, "stages", disable=None):
        settings = Settings.from_parameters(
            {"target_false_alarm_rate": COMPOSITE_RATES[0], "stages": stages}
        )
        detector = make_detector(settings, *composite_sources(args.data / FRAMES))
        out = args.out / stages_title(stages) if args.out else None
        evaluation = evaluate(detector, test, out=out, progress=True)
        cells = [stages_title(stages), figure(evaluation["frame_auroc"])]
        calibration = detector.calibration
        assert calibration is not None
        for rate in COMPOSITE_RATES:
            measures = frame_measures(evaluation["frames"], calibration.threshold_for(rate))
            cells.append(f"{figure(measures['tpr'])} ({figure(measures['fpr'])})")
        rows.append([*cells, figure(evaluation["pixel_ap"]), figure(evaluation["pixel_fpr95"])])
    rates = (f"TPR at {100 * rate:g} % (realised FPR)" for rate in COMPOSITE_RATES)
    print(f"| stages | frame AUROC | {' | '.join(rates)} | pixel AP | FPR95 |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=("drive", "composites"))
    parser.add_argument("data", type=Path, help="folder with carla_drives/ and carla_frames/")
    parser.add_argument(
        "--stages",
        action="append",
        type=lambda text: text.split(" + "),
        metavar="'STAGE + STAGE'",
        help="may be repeated (default: those of the package)",
    )
    parser.add_argument("--out", type=Path, help="new folder for reports and composites")
    parser.add_argument("--no-towns", action="store_true", help="drive: no rows with towns")
    parser.add_argument("--seed", type=int, default=0, help="composites: of the random numbers")
    args = parser.parse_args()
    args.stages = args.stages or [[]]
    with tempfile.TemporaryDirectory() as scratch:
        measure = measure_drive if args.benchmark == "drive" else measure_composites
        measure(args, Path(scratch))


if __name__ == "__main__":
    main()
