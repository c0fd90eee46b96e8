"""Figures of scores and measures; matplotlib is imported when a figure is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from semantic_anomaly.detection.rendering import contact_sheet
from semantic_anomaly.errors import CalibrationError
from semantic_anomaly.evaluation import extras
from semantic_anomaly.evaluation.metrics import PixelScores, assessed, rate_interval, share
from semantic_anomaly.io.images import read_image, write_image
from semantic_anomaly.structures import Decision

if TYPE_CHECKING:
    from semantic_anomaly.calibration.calibration import Calibration

# Okabe and Ito's palette, told apart with any colour vision.
_SCORE, _ALARM, _NOMINAL = "#0072B2", "#D55E00", "#56B4E9"
_THRESHOLD: Mapping[str, Any] = {"color": "#000000", "linestyle": "--", "linewidth": 1.2}
_TRUTH = (
    *("#E69F00", "#CC79A7", "#009E73", "#F0E442", "#999999"),
    *("#8C564B", "#9467BD", "#17BECF", "#BCBD22", "#D55E00"),
)
# A legend outside the axes never covers data.
_BESIDE: Mapping[str, Any] = {"loc": "outside right upper", "fontsize": 9, "frameon": False}
# Scores count deviations of nominal distances.
_SCORE_LABEL = "frame score [deviations]"
_DPI = 120
_GIF_FRAMES = 100
FIGURES = ("score_curve.png", "score_histogram.png", "curves.png", "calibration.png")
_TARGETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2)


@dataclass(frozen=True)
class ScoredFrame:
    """The values of a frame that figures show.

    Attributes:
        stamp_ns: camera stamp; a drop begins another drive.
        score: anomaly score, None when the frame was not scored.
        alarm: whether the decision was `anomaly`.
        truth: kind of the anomaly, '' for a nominal frame, None when unknown.
        drift: whether the scores up to it are unlike those of the calibration.
    """

    stamp_ns: int
    score: float | None
    alarm: bool
    truth: str | None
    drift: bool = False

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> ScoredFrame:
        """Return the values of a row with `score`, `decision`, `anomaly` and `kind`."""
        truth = (row["kind"] or "anomaly") if row["anomaly"] else ""
        alarm = row["decision"] == Decision.ANOMALY.value
        ignored = row.get("ignored", False)
        truth_shown = None if ignored else truth
        return cls(
            row.get("stamp_ns", 0), row["score"], alarm, truth_shown, row.get("drift", False)
        )


def score_curve(
    path: Path, frames: Sequence[ScoredFrame], threshold: float | None, title: str
) -> None:
    """Draw scores in the order of the drive, with threshold, alarms and ground truth.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    stamps_ns = np.array([f.stamp_ns for f in frames], np.int64)
    if len(frames) > 1 and np.all(np.diff(stamps_ns) >= 0) and stamps_ns[-1] > stamps_ns[0]:
        x, label = (stamps_ns - stamps_ns[0]) / 1e9, "time since the first frame [s]"
    else:
        x, label = np.arange(len(frames), dtype=np.float64), "frame"
    scores = np.array([np.nan if f.score is None else f.score for f in frames])
    # No line from one drive to the next: there are no scores between them.
    breaks = np.flatnonzero(np.diff(stamps_ns) < 0) + 1
    with _figure(path, (11, 4.2)) as (figure, (axes,)):
        _shade_truth(axes, x, [f.truth for f in frames])
        drift = np.array([f.drift for f in frames], bool)
        if drift.any():
            axes.fill_between(x, 0, 1, where=drift, transform=axes.get_xaxis_transform(),
                              facecolor="none", edgecolor="#888888", hatch="//", linewidth=0,
                              label="drift: recalibrate")  # fmt: skip
        x_parts, score_parts = (np.insert(values, breaks, np.nan) for values in (x, scores))
        marker = "." if len(frames) <= 400 else ""
        axes.plot(x_parts, score_parts, color=_SCORE, linewidth=1.2, marker=marker, markersize=4,
                  label="score")  # fmt: skip
        false = np.array([f.alarm and f.truth == "" for f in frames])
        alarms = np.array([f.alarm for f in frames]) & ~false
        if alarms.any():
            axes.plot(x[alarms], scores[alarms], "o", color=_ALARM, markersize=5, label="alarm")
        if false.any():
            axes.plot(x[false], scores[false], "X", color="#000000", markersize=6,
                      label="false alarm")  # fmt: skip
        if threshold is not None:
            axes.axhline(threshold, label=f"threshold {threshold:.3f}", **_THRESHOLD)
        axes.set(xlabel=label, ylabel=_SCORE_LABEL)
        axes.margins(x=0.01)
        axes.grid(alpha=0.25)
        axes.set_title(title, loc="left", fontsize=11)
        figure.legend(**_BESIDE)


def score_histogram(
    path: Path,
    scores: Mapping[str, Sequence[float]],
    calibration: Sequence[float],
    threshold: float | None,
    title: str,
) -> None:
    """Draw histograms of frame scores by group, nominal frames first, and of the calibration."""
    groups = {name: values for name, values in scores.items() if values}
    everything = np.concatenate([*groups.values(), calibration])
    low, high = float(everything.min()), float(everything.max())
    edges = np.linspace(low, max(high, low + 1e-6), 41)
    with _figure(path, (9, 1.2 + 1.7 * len(groups)), rows=len(groups)) as (figure, rows):
        for number, (axes, (name, values)) in enumerate(zip(rows, groups.items(), strict=True)):
            colour = _NOMINAL if name == next(iter(scores)) else _TRUTH[number % len(_TRUTH)]
            axes.hist(values, bins=edges, color=colour, label=f"{name} ({len(values)})")
            if number == 0 and len(calibration):
                axes.hist(calibration, bins=edges, histtype="step", color="#444444", linewidth=1.2,
                          label=f"calibration ({len(calibration)})")  # fmt: skip
            if threshold is not None:
                label = f"threshold {threshold:.3f}" if number == 0 else None
                axes.axvline(threshold, label=label, **_THRESHOLD)
            axes.set_ylabel("frames")
            axes.yaxis.get_major_locator().set_params(integer=True)
        rows[-1].set_xlabel(_SCORE_LABEL)
        rows[0].set_title(title, loc="left", fontsize=11)
        figure.legend(**_BESIDE)


def draw_evaluation(
    folder: Path,
    results: Mapping[str, Any],
    pixels: PixelScores,
    calibration: Calibration | None,
) -> None:
    """Write `FIGURES` of results.json; calibration.png only with a calibration and nominal frames.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    auroc, threshold = results["frame_auroc"], results["threshold"]
    title = results["dataset"] + (f": frame AUROC {auroc:.3f}" if auroc is not None else "")
    frames = [ScoredFrame.of_row(row) for row in results["frames"]]
    score_curve(folder / "score_curve.png", frames, threshold, title)
    counted = assessed(results["frames"])
    groups: dict[str, list[float]] = {"nominal": []}
    for row in counted:
        name = (row["family"] or "anomalous") if row["anomaly"] else "nominal"
        groups.setdefault(name, []).append(row["score"])
    scores = calibration.scores.tolist() if calibration else ()
    if counted:
        score_histogram(folder / "score_histogram.png", groups, scores, threshold, title)
    _draw_quality(folder / "curves.png", counted, pixels.curves(), results["tpr"], results["fpr"])
    if calibration is not None:
        nominal = [row for row in counted if not row["anomaly"]]
        _draw_calibration(folder / "calibration.png", calibration, nominal)


def _draw_quality(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    pixels: Mapping[str, np.ndarray],
    tpr: float | None,
    fpr: float | None,
) -> None:
    """Draw the ROC curve of the frames and the precision-recall curve of the pixels."""
    scores = np.array([row["score"] for row in rows])
    anomalous = np.array([row["anomaly"] for row in rows], bool)
    with _figure(path, (9, 3.9), columns=2) as (_, (left, right)):
        left.plot([0, 1], [0, 1], color="#999999", linestyle=":", linewidth=1)
        if anomalous.any() and not anomalous.all():
            false, true, _ = extras.load("sklearn.metrics").roc_curve(anomalous, scores)
            left.plot(false, true, color=_SCORE, linewidth=1.6)
        if tpr is not None and fpr is not None:
            left.plot(fpr, tpr, "o", color=_ALARM, label="threshold")
            left.legend(loc="lower right", fontsize=9, frameon=False)
        left.set(xlabel="false-positive rate", ylabel="true-positive rate", title="frames")
        right.plot(pixels["recall"], pixels["precision"], color=_SCORE, linewidth=1.6)
        right.set(xlabel="recall", ylabel="precision", title="pixels")
        for axes in (left, right):
            axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
            axes.grid(alpha=0.25)


def _draw_calibration(
    path: Path, calibration: Calibration, nominal: Sequence[Mapping[str, Any]]
) -> None:
    """Draw realised against target false-alarm rates of nominal frames, with intervals."""
    scores = np.array([row["score"] for row in nominal])
    sequences = len({row["sequence"] for row in nominal})
    points = []
    for target in _TARGETS:
        try:
            rate = share(scores > calibration.threshold_for(target))
        except CalibrationError:
            # There are too few calibration frames for so low a rate.
            continue
        interval = rate_interval(rate, sequences)
        if rate is not None and interval is not None:
            points.append((target, rate, *interval))
    if not points:
        return
    targets, realised, low, high = np.array(points).T
    with _figure(path, (5.2, 3.9)) as (_, (axes,)):
        axes.fill_between(targets, low, high, color=_NOMINAL, alpha=0.3, linewidth=0,
                          label="95 % interval over sequences")  # fmt: skip
        axes.plot(targets, realised, color=_SCORE, marker=".", label="realised")
        end = targets.max()
        axes.plot([0, end], [0, end], label="target", **{**_THRESHOLD, "linewidth": 1})
        axes.set(xlabel="target false-alarm rate", ylabel="realised on nominal frames")
        axes.set_xlim(0, end)
        axes.set_ylim(0, min(1.0, max(2 * end, 1.1 * realised.max())))
        axes.grid(alpha=0.25)
        axes.legend(loc="upper left", fontsize=9, frameon=False)


def blind_map(
    path: Path, image: np.ndarray, cells_by_name: Mapping[str, Mapping[str, Any]]
) -> None:
    """Draw the recall of each cell over a frame, one panel for each detector.

    Args:
        path: file to write.
        image: (height, width, 3) uint8 RGB.
        cells_by_name: `composites` and `found`, rows of columns of counts, by detector.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    height, width = image.shape[:2]
    grey = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    columns = min(2, len(cells_by_name))
    rows = -(-len(cells_by_name) // columns)
    size = (1.2 + 6.4 * columns, 0.5 + rows * (0.4 + 6.4 * height / width))
    with _figure(path, size, rows=rows, columns=columns) as (figure, panels):
        for axes in panels[len(cells_by_name) :]:
            axes.set_visible(False)
        for axes, (name, cells) in zip(panels, cells_by_name.items(), strict=False):
            counts, found = np.array(cells["composites"]), np.array(cells["found"])
            recall = np.where(counts > 0, found / np.maximum(counts, 1), np.nan)
            axes.imshow(grey, extent=(0, width, height, 0))
            shown = axes.imshow(recall, cmap="viridis", vmin=0, vmax=1, alpha=0.55,
                                extent=(0, width, height, 0), interpolation="nearest")  # fmt: skip
            high, wide = height / counts.shape[0], width / counts.shape[1]
            label = {"facecolor": "black", "alpha": 0.55, "pad": 1.5, "linewidth": 0}
            for row, col in np.argwhere(counts > 0):
                axes.text((col + 0.5) * wide, (row + 0.5) * high,
                          f"{found[row, col]}/{counts[row, col]}", color="white", fontsize=9,
                          ha="center", va="center", bbox=label)  # fmt: skip
            axes.set_title(name, loc="left", fontsize=11)
            axes.set(xlim=(0, width), ylim=(height, 0))
            axes.tick_params(labelsize=8)
        text = "recall of the things that stand in the cell"
        figure.colorbar(shown, ax=list(panels[: len(cells_by_name)]), label=text, shrink=0.85)


def recall_curve(path: Path, detectors: Sequence[Mapping[str, Any]], unit: str) -> None:
    """Draw recall against size or distance, with intervals and the rate of the controls.

    Args:
        path: file to write.
        detectors: `name` and `by_size`, as in the results of `sensitivity`.
        unit: of the sizes: px, or m for distances.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    colours = (_SCORE, *_TRUTH)
    with _figure(path, (9, 4.2)) as (figure, (axes,)):
        for number, detector in enumerate(detectors):
            points = {float(size): m for size, m in detector["by_size"].items() if m["composites"]}
            sizes = sorted(points)
            recall = np.array([points[size]["recall"] for size in sizes])
            bounds = np.array([points[size]["recall_interval"] for size in sizes]).T
            control = [points[size]["control_rate"] for size in sizes]
            colour = colours[number % len(colours)]
            # Intervals of several detectors would hide each other at the same place.
            at = np.array(sizes) * (1 + 0.012 * number)
            axes.errorbar(at, recall, np.maximum(np.abs(bounds - recall), 0), color=colour,
                          marker="o", markersize=5, capsize=3, linewidth=1.6,
                          label=detector["name"])  # fmt: skip
            axes.plot(at, control, color=colour, linestyle=":", marker=".",
                      label=f"{detector['name']}: controls")  # fmt: skip
        label = "distance [m]" if unit == "m" else "longer side of the thing [px]"
        axes.set_xscale("log")
        axes.set(xlabel=label, ylabel="share found", ylim=(-0.02, 1.02))
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.set_title("recall at the calibrated threshold, 95 % intervals over frames",
                       loc="left", fontsize=11)  # fmt: skip
        figure.legend(**_BESIDE)


@contextmanager
def _figure(
    path: Path, size_inch: tuple[float, float], rows: int = 1, columns: int = 1
) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Yield figure and axes; pyplot is avoided because its state is global."""
    agg = extras.load("matplotlib.backends.backend_agg")
    figure = extras.load("matplotlib.figure").Figure(size_inch, layout="constrained")
    agg.FigureCanvasAgg(figure)
    # Rows share their x axis, columns do not.
    yield figure, figure.subplots(rows, columns, sharex="col", squeeze=False).ravel()
    figure.savefig(path, dpi=_DPI)


def _shade_truth(axes: Any, x: np.ndarray, truths: Sequence[str | None]) -> None:
    names = list(dict.fromkeys(truth for truth in truths if truth))
    half = float(np.median(np.diff(x))) / 2 if len(x) > 1 else 0.5
    shown: set[str] = set()
    for name, span in groupby(zip(x, truths, strict=True), key=itemgetter(1)):
        positions = [position for position, _ in span]
        if name:
            label = None if name in shown else name
            shown.add(name)
            axes.axvspan(positions[0] - half, positions[-1] + half, alpha=0.35, linewidth=0,
                         color=_TRUTH[names.index(name) % len(_TRUTH)], label=label)  # fmt: skip


def demo_pictures(out: Path, rows: Sequence[Mapping[str, Any]], threshold: float | None) -> None:
    """Write `score_curve.png`, `contact_sheet.jpg` and `drive.gif` of a drive through the node.

    Args:
        out: holds `live/overlays/<number>.jpg` of the frames received.
        rows: one per frame sent: `score` or None, `decision`, `anomaly`, `kind`.
        threshold: calibrated threshold, or None.

    Raises:
        MissingPackageError: matplotlib or Pillow, which comes with it, is not installed.
    """
    frames = [ScoredFrame.of_row(row) for row in rows]
    score_curve(out / "score_curve.png", frames, threshold, "scores published by the node")
    files = {n: out / f"live/overlays/{n:06d}.jpg" for n in range(len(rows))}
    received = [n for n, file in files.items() if file.is_file()]
    if not received:
        return

    def pictures(numbers: Iterable[int]) -> list[np.ndarray]:
        return [at_width(read_image(files[n]), 480) for n in numbers]

    chosen = {n for name in dict.fromkeys(f.truth for f in frames)
              for n in evenly([n for n in received if frames[n].truth == name], 4)}  # fmt: skip
    write_image(out / "contact_sheet.jpg", contact_sheet(pictures(sorted(chosen)), 4))
    image = extras.load("PIL.Image")
    first, *others = (
        image.fromarray(picture).quantize(128)
        for picture in pictures(evenly(received, _GIF_FRAMES))
    )
    options = {"save_all": True, "duration": 120, "loop": 0, "optimize": True}
    first.save(out / "drive.gif", append_images=others, **options)


def evenly(numbers: list[int], count: int) -> list[int]:
    """Return at most `count` of the numbers, evenly spaced, including first and last."""
    if len(numbers) <= count:
        return list(numbers)
    return [numbers[round(i * (len(numbers) - 1) / max(count - 1, 1))] for i in range(count)]


def at_width(image: np.ndarray, width: int) -> np.ndarray:
    """Return the image resized to a width in px, keeping its aspect ratio."""
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    method = cv2.INTER_AREA if width < image.shape[1] else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=method)
