"""Measure whether the promised false-alarm rate is kept on the next drive.

Every drive is left out once as the next drive. From the others an index is built and calibrated in
two ways:

    pooled      one half of each drive is in the index, the other half calibrates: the usual split
                conformal threshold of the pooled frame scores
    next drive  the package's own: every drive scored against the entries of the others, threshold
                over the drives

The realised rate is the share of frames of the left-out drive above the threshold. True positives
are the share of anomalous frames above it: odd objects rendered in the street, odd objects and odd
arrangements pasted into CamVid (camvid.py). CamVid has controls with pasted usual things too. `own
frames` is the threshold that the frames of the left-out drive themselves would give. Nobody has it
before the drive; it shows the limit of any calibration. `--drives` sets the number of other drives.

The drift check runs on the left-out drives and on second halves of drives whose first halves are in
index and calibration. It also runs after a calibration with one drive alone (a third of it in the
index, a third calibrates), on the last third and on every other drive.

    street   ten drives of the synthetic street
    carla    frames of four towns, each of them a drive
    camvid   0001TP, 0006R0 and 0016E5 (train and val)

Needs a folder with camvid/, carla_frames/ and road_anomaly/; street needs no data. On two CPU cores
the street takes half an hour with the preset for small machines.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import camvid
import matplotlib.pyplot as plt
import numpy as np
from carla import FRAMES, town_slice
from tqdm import tqdm

from semantic_anomaly import AnomalyDetector, Calibration, NominalIndex, Settings, calibrate
from semantic_anomaly.evaluation.datasets import LabelledFolder
from semantic_anomaly.io.open import open_source
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.segmentation.embedder import RunningEmbedder
from semantic_anomaly.structures import Frame, PatchGrid
from semantic_anomaly.synthetic.drive import StreetDrive

TARGETS = (0.01, 0.05, 0.1)
SEED, STREET_DRIVES, STREET_STRIDE = 500, 10, 6
STREET_ODD_FRAMES = 300
TOWNS = ("Town01", "Town02", "Town03", "Town04")
CAMVID = {"0001TP": ["0001TP"], "0006R0": ["0006R0"], "0016E5": ["0016E5_train", "0016E5_val"]}
STREET_KINDS = ("cow", "sofa", "ladder")
OF_EACH_KIND = 5
WAYS = ("pooled", "next drive")
OWN_FRAMES = "own frames"
# Windows of the drift check in a drive: its default is longer than these drives.
DRIFT_WINDOWS = 6
Embedded = list[tuple[Frame, PatchGrid]]
Row = dict[str, Any]


@dataclass
class Drives:
    """The embedded drives of a set, and composites over each drive: anomalies and controls."""

    frames: dict[str, Embedded] = field(default_factory=dict)
    anomalies: dict[str, list[PatchGrid]] = field(default_factory=dict)
    controls: dict[str, list[PatchGrid]] = field(default_factory=dict)


def embedded(embedder: RunningEmbedder, frames: Sequence[Frame], drive: str) -> Embedded:
    """Return frames of a drive with their embeddings."""
    grids = (embedder.embed([f.image])[0] for f in tqdm(frames, drive, disable=None))
    return [(replace(f, recording=drive), grid) for f, grid in zip(frames, grids, strict=True)]


def street(embedder: RunningEmbedder, data: Path, size: float) -> Drives:
    """Return drives of the synthetic street."""
    count, drives = round(30 * size), Drives()
    for seed in range(SEED, SEED + STREET_DRIVES):
        name, length = f"street {seed}", count * STREET_STRIDE
        rendered = map(StreetDrive(seed, length).frame, range(0, length, STREET_STRIDE))
        frames = [Frame(f.image, name=f"{seed}/{n}") for n, f in enumerate(rendered)]
        drives.frames[name] = embedded(embedder, frames, name)
        with_odd = StreetDrive(seed, STREET_ODD_FRAMES, anomalies=STREET_KINDS)
        drives.anomalies[name] = [
            embedder.embed([frame.image])[0]
            for frame in map(with_odd.frame, range(0, STREET_ODD_FRAMES, STREET_STRIDE))
            if frame.kind is not None
        ]
    return drives


def carla(embedder: RunningEmbedder, data: Path, size: float) -> Drives:
    """Return the frames of each town."""
    drives = Drives()
    for town in TOWNS:
        frames = list(open_source(town_slice(data / FRAMES, town)))
        drives.frames[town] = embedded(embedder, frames[:: round(1 / size)], town)
    return drives


def camvid_drives(embedder: RunningEmbedder, data: Path, size: float) -> Drives:
    """Return the drives of CamVid, with composites over each."""
    drives = Drives()
    for number, (drive, folders) in enumerate(CAMVID.items()):
        files = [str(data / "camvid" / folder) for folder in folders]
        frames = [frame for folder in files for frame in open_source(folder)]
        drives.frames[drive] = embedded(embedder, frames[:: round(2 / size)], drive)
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "composites"
            camvid.write_composites(data, out, folders, 1, 900 + number, OF_EACH_KIND)
            dataset = LabelledFolder(out)
            for frame, truth, _ in dataset:
                kind = drives.anomalies if truth.anomaly else drives.controls
                kind.setdefault(drive, []).append(embedder.embed([frame.image])[0])
    return drives


SETS = {"street": street, "carla": carla, "camvid": camvid_drives}


def halves(frames: Embedded) -> tuple[Embedded, Embedded]:
    """Return the first and the second half of a drive."""
    return frames[: len(frames) // 2], frames[len(frames) // 2 :]


def calibrated(
    stored: Mapping[str, Embedded],
    scored: Mapping[str, Embedded],
    settings: Settings,
    embedder: RunningEmbedder,
) -> AnomalyDetector:
    """Return a detector with an index of the stored drives, calibrated with the scored ones."""
    index = NominalIndex.build(
        (row for rows in stored.values() for row in rows),
        stages=embedder.stages,
        roi=RegionOfInterest(),
        settings=settings,
    )
    grids = {drive: [grid for _, grid in rows] for drive, rows in scored.items()}
    common: dict[str, Any] = {"settings": settings, "embedder": embedder}
    return AnomalyDetector(index, calibrate(index, grids, **common), **common)


class Fold:
    """One drive left out: detectors of both calibrations, from the other drives.

    Args:
        frames: of the other drives.
        settings: of index and calibration.
        embedder: that made the embeddings.
        ways: of calibrating.
    """

    def __init__(
        self,
        frames: Mapping[str, Embedded],
        settings: Settings,
        embedder: RunningEmbedder,
        ways: Sequence[str] = WAYS,
    ) -> None:
        self.detectors: dict[str, AnomalyDetector] = {}
        for way in ways:
            stored, scored = frames, frames
            if way == "pooled":
                stored = {drive: halves(rows)[0] for drive, rows in frames.items()}
                scored = {f"{drive}, second half": halves(r)[1] for drive, r in frames.items()}
            self.detectors[way] = calibrated(stored, scored, settings, embedder)

    def threshold(self, way: str, target: float) -> float:
        """Return the threshold of a calibration at a target rate."""
        calibration = self.detectors[way].calibration
        assert isinstance(calibration, Calibration)
        if way == "next drive":
            return calibration.threshold_for(target)
        scores = calibration.scores
        rank = math.ceil((len(scores) + 1) * (1 - target) - 1e-9)
        return float(scores[min(rank, len(scores)) - 1])


def scores_of(detector: AnomalyDetector, grids: Sequence[PatchGrid]) -> np.ndarray:
    """Return (n,) float64 scores."""
    return np.array([detector.score(grid).score for grid in grids])


def drift_row(detector: AnomalyDetector, scores: np.ndarray, drive: str, kind: str) -> Row:
    """Return what the drift check says of the scores of a drive."""
    assert detector.calibration is not None
    window = max(1, len(scores) // DRIFT_WINDOWS)
    check = detector.calibration.drift_check(window)
    begins = [check.add(float(score)) for score in scores]
    return {
        "drive": drive,
        "frames are": kind,
        "window": window,
        "share": float((scores > check.level).mean()),
        "largest share": check.largest_share,
        "drift": any(begins),
    }


def drift_of_same_drives(
    drives: Drives, settings: Settings, embedder: RunningEmbedder
) -> list[Row]:
    """Return what the drift check says of second halves, calibrated with the first ones."""
    first = {drive: halves(rows)[0] for drive, rows in drives.frames.items()}
    [detector] = Fold(first, settings, embedder, WAYS[1:]).detectors.values()
    return [
        drift_row(
            detector,
            scores_of(detector, [grid for _, grid in halves(rows)[1]]),
            drive,
            "of a calibration drive",
        )
        for drive, rows in tqdm(drives.frames.items(), "same drives", disable=None)
    ]


def drift_of_single_drives(
    drives: Drives, settings: Settings, embedder: RunningEmbedder
) -> list[Row]:
    """Return what the drift check says after a calibration with one drive alone."""
    table = []
    for drive, rows in tqdm(drives.frames.items(), "single drives", disable=None):
        third = len(rows) // 3
        detector = calibrated(
            {drive: rows[:third]},
            {f"{drive}, second third": rows[third : 2 * third]},
            settings,
            embedder,
        )
        seen = {name: rows for name, rows in drives.frames.items() if name != drive}
        for name, frames in {drive: rows[2 * third :], **seen}.items():
            scores = scores_of(detector, [grid for _, grid in frames])
            kind = "of that drive" if name == drive else f"calibrated with {drive}"
            table.append(drift_row(detector, scores, name, kind))
    return table


def measure(
    drives: Drives, counts: Sequence[int], settings: Settings, embedder: RunningEmbedder
) -> tuple[list[Row], list[Row]]:
    """Return a row for each left-out drive, calibration and target, and rows of the drift check."""
    rows, drift = [], []
    names = list(drives.frames)
    folds = [(drive, count) for drive in names for count in counts or [len(names) - 1]]
    for drive, count in tqdm(folds, "left out", disable=None):
        first = names.index(drive) + 1
        others = {
            name: drives.frames[name] for name in (names[first:] + names[: first - 1])[:count]
        }
        fold = Fold(others, settings, embedder)
        grids = [grid for _, grid in drives.frames[drive]]
        for way, detector in fold.detectors.items():
            scores = scores_of(detector, grids)
            anomalous = scores_of(detector, drives.anomalies.get(drive, []))
            pasted = scores_of(detector, drives.controls.get(drive, []))
            if way == WAYS[1] and count == max(counts, default=count):
                drift.append(drift_row(detector, scores, drive, "of another drive"))
            for target in TARGETS:
                thresholds = {way: fold.threshold(way, target)}
                if way == WAYS[1]:
                    thresholds[OWN_FRAMES] = float(np.quantile(scores, 1 - target, method="higher"))
                for calibration, threshold in thresholds.items():
                    row: Row = {
                        "drive": drive,
                        "calibration": calibration,
                        "target": target,
                        "drives": len(others),
                        "frames": len(scores),
                        "fewest frames of a drive": min(map(len, others.values())),
                        "realised": float((scores > threshold).mean()),
                    }
                    if len(anomalous):
                        row["true positives"] = float((anomalous > threshold).mean())
                    if len(pasted):
                        row["controls"] = float((pasted > threshold).mean())
                    rows.append(row)
    drift += drift_of_same_drives(drives, settings, embedder)
    return rows, drift + drift_of_single_drives(drives, settings, embedder)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of realised rates by target, number of drives and calibration."""
    optional = [name for name in ("true positives", "controls") if name in rows[0]]
    titles = ["target", "drives", "calibration", "mean", "most", "within the target", *optional]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for target in TARGETS:
        for count in sorted({row["drives"] for row in rows}):
            for way in (*WAYS, OWN_FRAMES):
                chosen = [
                    row
                    for row in rows
                    if (row["target"], row["drives"], row["calibration"]) == (target, count, way)
                ]
                rates = [row["realised"] for row in chosen]
                within = sum(rate <= target + 1e-9 for rate in rates)
                cells = [f"{target:g}", f"{count}", way]
                cells += [f"{np.mean(rates):.3f}", f"{max(rates):.3f}", f"{within} of {len(rates)}"]
                cells += [f"{np.mean([row[name] for row in chosen]):.3f}" for name in optional]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def drift_table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of the drift check."""
    lines = ["| drive | its frames are | above the level | most of a calibration drive | drift |"]
    lines.append("|---" * 5 + "|")
    for row in rows:
        share, largest = (f"{row[name]:.3f}" for name in ("share", "largest share"))
        said = "yes" if row["drift"] else "no"
        lines.append(f"| {row['drive']} | {row['frames are']} | {share} | {largest} | {said} |")
    return "\n".join(lines)


def draw(results: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw the realised rate of every left-out drive against the target, by set."""
    figure, axes = plt.subplots(1, len(results), figsize=(4.2 * len(results), 4), squeeze=False)
    colours = {"pooled": "#c0392b", "next drive": "#2471a3"}
    for axis, (name, rows) in zip(axes[0], results.items(), strict=True):
        most = max(row["drives"] for row in rows)
        axis.axline((0, 0), slope=1, color="#888888", linewidth=1, linestyle=":")
        for way, shift in (("pooled", 0.985), ("next drive", 1.015)):
            of_way = [r for r in rows if r["calibration"] == way and r["drives"] == most]
            x = [100 * shift * row["target"] for row in of_way]
            y = [100 * row["realised"] for row in of_way]
            axis.plot(x, y, "o", color=colours[way], alpha=0.4, markersize=5)
            means = [
                100 * np.mean([r["realised"] for r in of_way if r["target"] == target])
                for target in TARGETS
            ]
            axis.plot([100 * t for t in TARGETS], means, color=colours[way], label=way)
        axis.set(title=name, xlabel="target, % of frames", ylabel="realised on the next drive, %")
        axis.set_ylim(-2, max(15.0, axis.get_ylim()[1]))
        axis.grid(alpha=0.25)
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the tables and write JSON and picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--size", type=float, default=1.0, help="share of the frames, at most 1")
    parser.add_argument(
        "--drives", nargs="+", type=int, default=[], help="numbers of other drives; default: all"
    )
    parser.add_argument("--stages", action="append", default=[], help="instead of the defaults")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(stages=tuple(args.stages)).with_build_defaults()
    embedder = RunningEmbedder.from_settings(settings)
    results: dict[str, list[Row]] = {}
    drift: dict[str, list[Row]] = {}
    for name in args.sets:
        drives = SETS[name](embedder, args.data, args.size)
        results[name], drift[name] = measure(drives, args.drives, settings, embedder)
        print(f"\n{name}\n\n{table(results[name])}\n", flush=True)
        print(drift_table(drift[name]), flush=True)
        figures = {"rates": results, "drift": drift}
        (args.out / "next_drive.json").write_text(json.dumps(figures, indent=1))
    draw(results, args.out / "next_drive.png")


if __name__ == "__main__":
    main()
