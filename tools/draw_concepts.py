#!/usr/bin/env python3
"""Draw docs/images/concepts.png: all steps from an image to a decision, for one synthetic frame.

Everything shown is computed: an index and a calibration of drives on the synthetic street, with a
shipped backbone. It takes a few minutes and prints the values that docs/concepts.md quotes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from semantic_anomaly.calibration.calibration import Calibration  # noqa: E402
from semantic_anomaly.detection.detector import AnomalyDetector  # noqa: E402
from semantic_anomaly.detection.rendering import draw_overlay  # noqa: E402
from semantic_anomaly.index.nominal_index import NominalIndex  # noqa: E402
from semantic_anomaly.offline.calibrate import calibrate  # noqa: E402
from semantic_anomaly.roi import RegionOfInterest  # noqa: E402
from semantic_anomaly.scoring.anomaly_map import tail_count  # noqa: E402
from semantic_anomaly.scoring.distances import FrameScore, FrameScorer  # noqa: E402
from semantic_anomaly.segmentation.embedder import RunningEmbedder  # noqa: E402
from semantic_anomaly.settings import Settings  # noqa: E402
from semantic_anomaly.structures import AnomalyResult, Frame, PatchGrid  # noqa: E402
from semantic_anomaly.synthetic import StreetDrive  # noqa: E402

matplotlib.use("agg")

PICTURE = ROOT / "docs" / "images" / "concepts.png"
# One stage, so that the figure shows the whole way. Nominal drives: seed and number of frames.
STAGES = ("mobilenet_v1 layer=21 size=800",)
INDEX_SEEDS, CALIBRATION_SEEDS, FRAMES = range(4100, 4112), range(4200, 4208), 6
ODD_SEED, KIND, ODD_DISTANCE = 4300, "cow", 0.35
RATE = 0.05
_RED, _BLUE, _GREY = "#c0392b", "#7f9fbf", "#b8c2d0"


@dataclass(frozen=True, eq=False)
class Steps:
    """What the figure shows.

    Attributes:
        frame, mask: the image, and (height, width) bool, where the anomaly is.
        grid: its embeddings.
        distances: (rows, cols) float32, cosine distances.
        score: of the frame, with its map.
        z: (rows, cols) float32, standardised distances.
        calibration: of other drives.
        result: the decision.
        overlay: (height, width, 3) uint8 RGB, the frame with the result.
        tail_percent: as the setting.
    """

    frame: Frame
    mask: np.ndarray
    grid: PatchGrid
    distances: np.ndarray
    score: FrameScore
    z: np.ndarray
    calibration: Calibration
    result: AnomalyResult
    overlay: np.ndarray
    tail_percent: float


def compute(stages: tuple[str, ...]) -> Steps:
    """Build, calibrate and detect, with drives in memory."""
    settings = Settings(stages=stages, target_false_alarm_rate=RATE)
    embedder = RunningEmbedder.from_settings(settings)

    def nominal(seeds: range) -> Iterator[tuple[str, Frame, PatchGrid]]:
        for seed in seeds:
            drive = StreetDrive(seed, frames=12 * FRAMES)
            for number in range(0, len(drive), 12):
                image = drive.frame(number)
                frame = Frame(image.image, image.stamp_ns, name=image.name)
                yield drive.name, frame, embedder.embed([frame.image])[0]

    index = NominalIndex.build(
        ((frame, grid) for _, frame, grid in nominal(INDEX_SEEDS)),
        stages=embedder.stages,
        roi=RegionOfInterest(),
        settings=settings,
    )
    drives: dict[str, list[PatchGrid]] = {}
    for name, _, grid in nominal(CALIBRATION_SEEDS):
        drives.setdefault(name, []).append(grid)
    calibration = calibrate(index, drives, settings=settings)
    detector = AnomalyDetector(index, calibration, settings=settings, embedder=embedder)
    odd = _odd_frame()
    frame = Frame(odd.image, odd.stamp_ns, name=odd.name)
    grid = embedder.embed([frame.image])[0]
    scorer = FrameScorer(index, detector.settings, detector.roi)
    score = detector.score(grid)
    result = detector.assess(frame, grid)
    return Steps(
        frame,
        odd.anomaly_mask,
        grid,
        scorer.distance_maps(grid)[0].values,
        score,
        # The first stage has the only weight.
        score.stage_maps[0].values,
        calibration,
        result,
        draw_overlay(frame, result, detector.roi),
        detector.settings.tail_percent,
    )


def _odd_frame() -> Any:
    """Return the frame in which the anomaly is nearest to the wanted share of the image height."""
    drive = StreetDrive(ODD_SEED, frames=100, anomalies=(KIND,))
    frames = [frame for frame in drive if frame.kind == KIND]

    def error(frame: Any) -> float:
        rows = np.flatnonzero(frame.anomaly_mask.any(axis=1))
        return abs(float(np.ptp(rows)) / frame.image.shape[0] - ODD_DISTANCE)

    return min(frames, key=error)


def draw(steps: Steps, path: Path) -> None:
    """Write the figure."""
    from matplotlib.figure import Figure

    figure = Figure((10.5, 4.5), dpi=100)
    rows, cols = steps.grid.grid_hw
    values = np.sort(steps.score.anomaly_map[steps.score.inside])[::-1]
    tail = tail_count(len(values), steps.tail_percent)
    result, calibration = steps.result, steps.calibration
    threshold = calibration.threshold
    height, width = steps.frame.image_hw
    boxes = len(result.localizations)
    titles = [
        ("1. Image", f"{width} x {height} pixels, RGB"),
        ("2. Patch grid", f"{rows} x {cols} patches, one embedding of {steps.grid.dim} each"),
        ("3. Distances", "cosine, to the nearest nominal entry"),
        ("4. Score normalisation", "in deviations, by image cell and patch class"),
        ("5. Anomaly map", "mean of all stages (here one), smoothed"),
        ("6. Anomaly score", f"mean of the largest {steps.tail_percent:g} % ({tail} patches)"),
        ("7. Calibration", f"{calibration.count} nominal frames of other drives"),
        ("8. Decision", f"{result.decision.value}, {boxes} localization{'s' * (boxes != 1)}"),
    ]
    panels = []
    for number, (title, subtitle) in enumerate(titles):
        left, bottom = 0.015 + 0.2515 * (number % 4), 0.57 if number < 4 else 0.1
        axes = figure.add_axes((left, bottom, 0.217, 0.285))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0, 1.17, title, transform=axes.transAxes, fontsize=9.5, weight="bold")
        axes.text(0, 1.05, subtitle, transform=axes.transAxes, fontsize=7, color="#444444")
        for spine in axes.spines.values():
            spine.set(color="#999999", linewidth=0.7)
        if number % 4 < 3:
            figure.text(left + 0.2345, bottom + 0.14, "\u2192", fontsize=15, ha="center",
                        va="center", color="#444444")  # fmt: skip
        panels.append(axes)
    panels[0].imshow(steps.frame.image, aspect="auto")
    panels[1].imshow(_with_grid(steps.frame.image, (rows, cols)), aspect="auto")
    for axes, image in zip(
        panels[2:5], (steps.distances, steps.z, steps.score.anomaly_map), strict=True
    ):
        low, high = np.percentile(image, 5), image.max()
        shown = axes.imshow(image, aspect="auto", vmin=low, vmax=high, interpolation="nearest")
        bar = axes.inset_axes((0.985, 0.0, 0.015, 1.0))
        figure.colorbar(shown, cax=bar, ticks=[])
        for y, value in ((0.88, high), (0.03, low)):
            axes.text(0.97, y, f"{value:.2g}", transform=axes.transAxes, fontsize=7, ha="right",
                      color="white")  # fmt: skip
    most = values[: 10 * tail]
    panels[5].bar(range(len(most)), most, width=1.0, color=_GREY)
    panels[5].bar(range(tail), most[:tail], width=1.0, color=_RED)
    panels[5].axhline(result.score, color=_RED, linewidth=1)
    panels[5].text(0.97, 0.86, f"score {result.score:.2f} deviations", fontsize=7.5, color=_RED,
                   transform=panels[5].transAxes, ha="right")  # fmt: skip
    panels[5].set_ylim(0, 1.2 * most[0])
    panels[5].set_xlabel("patches, largest value first", fontsize=7.5)
    panels[6].hist(calibration.scores, bins=14, color=_BLUE)
    panels[6].axvline(threshold, color="black", linestyle="--", linewidth=1)
    panels[6].axvline(result.score, color=_RED, linewidth=1)
    low, high = calibration.scores[0], max(calibration.scores[-1], result.score)
    panels[6].set_xlim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    panels[6].set_ylim(0, 1.35 * panels[6].get_ylim()[1])
    for x, y, text, colour in (
        (threshold, 0.9, f"threshold {threshold:.2f} ", "black"),
        (result.score, 0.78, f"this frame, p = {result.p_value:.2g} ", _RED),
    ):
        panels[6].text(x, y, text, color=colour, fontsize=7.5, ha="right",
                       transform=panels[6].get_xaxis_transform())  # fmt: skip
    panels[6].xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    panels[6].tick_params(labelsize=7, length=2)
    panels[6].set_xlabel("anomaly score in deviations", fontsize=7.5)
    panels[7].imshow(steps.overlay, aspect="auto")
    figure.savefig(path)
    # Few colours suffice, and a third of the bytes.
    from PIL import Image

    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


def _with_grid(image: np.ndarray, grid_hw: tuple[int, int]) -> np.ndarray:
    """Return the image, pale, with the borders of the patches."""
    pale = cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR) // 2 + 127
    height, width = pale.shape[:2]
    for row in range(1, grid_hw[0]):
        pale[round(row * height / grid_hw[0])] = 140
    for col in range(1, grid_hw[1]):
        pale[:, round(col * width / grid_hw[1])] = 140
    return pale


def report(steps: Steps) -> None:
    """Print what the page quotes: the largest values on the anomaly and beside it."""
    rows, cols = steps.grid.grid_hw
    share = cv2.resize(steps.mask.astype(np.float32), (cols, rows), interpolation=cv2.INTER_AREA)
    # Patches near the anomaly see it, too.
    near = cv2.dilate(share, np.ones((7, 7))) > 0
    maps = {"distance": steps.distances, "z": steps.z, "map": steps.score.anomaly_map}
    for name, values in maps.items():
        beside = np.where(near, -np.inf, values)
        row, col = np.unravel_index(int(beside.argmax()), beside.shape)
        largest, at = values[share > 0].max(), f"row {row} of {rows}, column {col} of {cols}"
        print(f"{name}: on the anomaly {largest:.3f}, beside it {beside.max():.3f} in {at}, "
              f"where z is {steps.z[row, col]:.3f}")  # fmt: skip
    result = steps.result
    boxes = [item.box_xyxy for item in result.localizations]
    print(f"score {result.score:.3f}, threshold {result.threshold:.3f}, p {result.p_value:.3f}")
    print(f"{result.decision.value}, boxes {boxes}")


def main(arguments: list[str] | None = None) -> int:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PICTURE, help="default: %(default)s")
    args = parser.parse_args(arguments)
    steps = compute(STAGES)
    report(steps)
    draw(steps, args.out)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
