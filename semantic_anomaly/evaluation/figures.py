"""Figures of scores and measures; matplotlib is imported when a figure is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from semantic_anomaly.detection.rendering import contact_sheet
from semantic_anomaly.errors import CalibrationError
from semantic_anomaly.evaluation import extras
from semantic_anomaly.evaluation.metrics import PixelScores, frame_rates, rate_interval
from semantic_anomaly.io.images import read_image, write_image
from semantic_anomaly.structures import Decision

if TYPE_CHECKING:
    from semantic_anomaly.calibration.calibration import Calibration

# Okabe and Ito's palette, told apart with any colour vision.
_SCORE, _ALARM, _THRESHOLD, _NOMINAL = "#0072B2", "#D55E00", "#000000", "#56B4E9"
_TRUTH = (
    *("#E69F00", "#CC79A7", "#009E73", "#F0E442", "#999999"),
    *("#8C564B", "#9467BD", "#17BECF", "#BCBD22", "#D55E00"),
)
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
    """

    stamp_ns: int
    score: float | None
    alarm: bool
    truth: str | None


def score_curve(
    path: Path, frames: Sequence[ScoredFrame], threshold: float | None, title: str
) -> None:
    """Draw scores over the drive, with threshold, alarms and ground truth.

    Args:
        path: PNG to write.
        frames: frames in the order of the drive.
        threshold: threshold of the score, or None.
        title: title of the figure.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    x, label = _axis(frames)
    scores = np.array([np.nan if f.score is None else f.score for f in frames])
    # No line from one drive to the next: there are no scores between them.
    breaks = [i for i in range(1, len(frames)) if frames[i].stamp_ns < frames[i - 1].stamp_ns]
    with _figure(path, (11, 4.2)) as (figure, (axes,)):
        _shade_truth(axes, x, frames)
        axes.plot(
            np.insert(x, breaks, np.nan),
            np.insert(scores, breaks, np.nan),
            color=_SCORE,
            linewidth=1.2,
            marker="." if len(frames) <= 400 else "",
            markersize=4,
            label="score",
        )
        false = np.array([f.alarm and f.truth == "" for f in frames])
        alarms = np.array([f.alarm for f in frames]) & ~false
        if alarms.any():
            axes.plot(x[alarms], scores[alarms], "o", color=_ALARM, markersize=5, label="alarm")
        if false.any():
            axes.plot(x[false], scores[false], "X", color="#000000", markersize=6,
                      label="false alarm")  # fmt: skip
        if threshold is not None:
            axes.axhline(threshold, color=_THRESHOLD, linestyle="--", linewidth=1.2,
                         label=f"threshold {threshold:.3f}")  # fmt: skip
        axes.set_xlabel(label)
        axes.set_ylabel("frame score")
        axes.margins(x=0.01)
        axes.grid(alpha=0.25)
        axes.set_title(title, loc="left", fontsize=11)
        _legend_beside(figure, [axes])


def score_histogram(
    path: Path,
    scores: Mapping[str, Sequence[float]],
    calibration: Sequence[float],
    threshold: float | None,
    title: str,
) -> None:
    """Draw histograms of frame scores by group, with the threshold and the calibration scores.

    Args:
        path: PNG to write.
        scores: frame scores by group; nominal frames first.
        calibration: calibration scores, may be empty.
        threshold: threshold of the score, or None.
        title: title of the figure.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    groups = {name: np.asarray(values) for name, values in scores.items() if len(values)}
    everything = np.concatenate([*groups.values(), np.asarray(calibration, np.float64)])
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
                axes.axvline(threshold, color=_THRESHOLD, linestyle="--", linewidth=1.2,
                             label=label)  # fmt: skip
            axes.set_ylabel("frames")
            axes.yaxis.get_major_locator().set_params(integer=True)
        rows[-1].set_xlabel("frame score")
        rows[0].set_title(title, loc="left", fontsize=11)
        _legend_beside(figure, rows)


def quality_curves(
    path: Path,
    scores: np.ndarray,
    anomalous: np.ndarray,
    pixels: Mapping[str, np.ndarray],
    operating: tuple[float | None, float | None],
) -> None:
    """Draw the ROC curve of the frames and the precision-recall curve of the pixels.

    Args:
        path: PNG to write.
        scores: (n,) frame scores.
        anomalous: (n,) bool.
        pixels: `recall` and `precision`, (n,) each, may be empty.
        operating: true- and false-positive rate at the threshold, None when not defined.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    with _figure(path, (9, 3.9), columns=2) as (_, (left, right)):
        left.plot([0, 1], [0, 1], color="#999999", linestyle=":", linewidth=1)
        if anomalous.any() and not anomalous.all():
            fpr, tpr, _ = extras.load("sklearn.metrics").roc_curve(anomalous, scores)
            left.plot(fpr, tpr, color=_SCORE, linewidth=1.6)
        tpr_at, fpr_at = operating
        if tpr_at is not None and fpr_at is not None:
            left.plot(fpr_at, tpr_at, "o", color=_ALARM, label="threshold")
            left.legend(loc="lower right", fontsize=9, frameon=False)
        left.set(xlabel="false-positive rate", ylabel="true-positive rate", title="frames")
        right.plot(pixels["recall"], pixels["precision"], color=_SCORE, linewidth=1.6)
        right.set(xlabel="recall", ylabel="precision", title="pixels")
        for axes in (left, right):
            axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
            axes.grid(alpha=0.25)


def calibration_curve(
    path: Path,
    targets: Sequence[float],
    realised: Sequence[float],
    intervals: Sequence[tuple[float, float]],
) -> None:
    """Draw realised against target false-alarm rates of nominal frames, with intervals.

    Args:
        path: PNG to write.
        targets: (n,) target rates.
        realised: (n,) shares of nominal frames above the threshold for each target.
        intervals: (n, 2) intervals of the realised rates.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    with _figure(path, (5.2, 3.9)) as (_, (axes,)):
        low, high = zip(*intervals, strict=True)
        axes.fill_between(targets, low, high, color=_NOMINAL, alpha=0.3, linewidth=0,
                          label="95 % interval over sequences")  # fmt: skip
        axes.plot(targets, realised, color=_SCORE, marker=".", label="realised")
        axes.plot([0, max(targets)], [0, max(targets)], color=_THRESHOLD, linestyle="--",
                  linewidth=1, label="target")  # fmt: skip
        axes.set(xlabel="target false-alarm rate", ylabel="realised on nominal frames")
        axes.set_xlim(0, max(targets))
        axes.set_ylim(0, min(1.0, max(2 * max(targets), 1.1 * max(realised))))
        axes.grid(alpha=0.25)
        axes.legend(loc="upper left", fontsize=9, frameon=False)


def draw_evaluation(
    folder: Path,
    results: Mapping[str, Any],
    pixels: PixelScores,
    calibration: Calibration | None,
) -> None:
    """Write `FIGURES`; calibration.png only with a calibration and nominal frames.

    Args:
        folder: folder of the report.
        results: content of results.json.
        pixels: scores of all counted pixels.
        calibration: calibration of the detector, or None.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    frames = [
        ScoredFrame(
            row["stamp_ns"], row["score"], row["decision"] == Decision.ANOMALY.value, _truth(row)
        )
        for row in results["frames"]
    ]
    auroc, threshold = results["frame_auroc"], results["threshold"]
    title = results["dataset"] + (f": frame AUROC {auroc:.3f}" if auroc is not None else "")
    score_curve(folder / "score_curve.png", frames, threshold, title)
    counted = [row for row in results["frames"] if not row["ignored"]]
    groups: dict[str, list[float]] = {"nominal": []}
    for row in counted:
        name = (row["family"] or "anomalous") if row["anomaly"] else "nominal"
        groups.setdefault(name, []).append(row["score"])
    scores = calibration.scores.tolist() if calibration else ()
    score_histogram(folder / "score_histogram.png", groups, scores, threshold, title)
    quality_curves(
        folder / "curves.png",
        np.array([row["score"] for row in counted]),
        np.array([row["anomaly"] for row in counted], bool),
        pixels.curves(),
        (results["tpr"], results["fpr"]),
    )
    if calibration is not None:
        nominal = [row for row in counted if not row["anomaly"]]
        _draw_calibration(folder / "calibration.png", calibration, nominal)


def _draw_calibration(
    path: Path, calibration: Calibration, nominal: Sequence[Mapping[str, Any]]
) -> None:
    scores = np.array([row["score"] for row in nominal])
    sequences = len({row["sequence"] for row in nominal})
    targets, realised, intervals = [], [], []
    for target in _TARGETS:
        try:
            threshold = calibration.threshold_for(target)
        except CalibrationError:
            # There are too few calibration frames for so low a rate.
            continue
        rate = frame_rates(scores, np.zeros(len(scores), bool), threshold)[1]
        interval = rate_interval(rate, sequences)
        if rate is not None and interval is not None:
            targets.append(target)
            realised.append(rate)
            intervals.append(interval)
    if targets:
        calibration_curve(path, targets, realised, intervals)


def _truth(row: Mapping[str, Any]) -> str | None:
    if row["ignored"]:
        return None
    return (row["kind"] or "anomaly") if row["anomaly"] else ""


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


def _legend_beside(figure: Any, rows: Sequence[Any]) -> None:
    handles, labels = [], []
    for axes in rows:
        axes_handles, axes_labels = axes.get_legend_handles_labels()
        handles += axes_handles
        labels += axes_labels
    # Outside the axes it never covers data.
    figure.legend(handles, labels, loc="outside right upper", fontsize=9, frameon=False)


def _axis(frames: Sequence[ScoredFrame]) -> tuple[np.ndarray, str]:
    """Return seconds if all stamps rise, else frame numbers, and the axis label."""
    stamps = np.array([f.stamp_ns for f in frames], np.int64)
    if len(stamps) > 1 and np.all(np.diff(stamps) > 0):
        return (stamps - stamps[0]) / 1e9, "time since the first frame [s]"
    return np.arange(len(frames), dtype=np.float64), "frame"


def _shade_truth(axes: Any, x: np.ndarray, frames: Sequence[ScoredFrame]) -> None:
    names = list(dict.fromkeys(f.truth for f in frames if f.truth))
    colours = {name: _TRUTH[i % len(_TRUTH)] for i, name in enumerate(names)}
    step = float(np.median(np.diff(x))) if len(x) > 1 else 1.0
    shown: set[str] = set()
    start = 0
    for i in range(1, len(frames) + 1):
        if i < len(frames) and frames[i].truth == frames[start].truth:
            continue
        name = frames[start].truth
        if name:
            label = None if name in shown else name
            shown.add(name)
            axes.axvspan(x[start] - step / 2, x[i - 1] + step / 2, color=colours[name], alpha=0.35,
                         linewidth=0, label=label)  # fmt: skip
        start = i


def demo_pictures(out: Path, rows: Sequence[Mapping[str, Any]], threshold: float | None) -> None:
    """Write `score_curve.png`, `contact_sheet.jpg` and `drive.gif` of a drive through the node.

    Args:
        out: holds `live/overlays/<number>.jpg` of the frames received.
        rows: one per frame sent: `score` or None, `decision`, `anomaly`, `kind`.
        threshold: calibrated threshold, or None.

    Raises:
        MissingPackageError: matplotlib or Pillow, which comes with it, is not installed.
    """
    frames = [
        ScoredFrame(
            0,
            row["score"],
            row["decision"] == "anomaly",
            (row["kind"] or "anomaly") if row["anomaly"] else "",
        )
        for row in rows
    ]
    score_curve(out / "score_curve.png", frames, threshold, "scores published by the node")
    pictures = {n: out / f"live/overlays/{n:06d}.jpg" for n in range(len(rows))}
    received = [n for n, file in pictures.items() if file.is_file()]
    if not received:
        return
    chosen = {n for name in dict.fromkeys(f.truth for f in frames)
              for n in evenly([n for n in received if frames[n].truth == name], 4)}  # fmt: skip
    sheet = [at_width(read_image(pictures[n]), 480) for n in sorted(chosen)]
    write_image(out / "contact_sheet.jpg", contact_sheet(sheet, 4))
    image = extras.load("PIL.Image")
    gif_frames = [
        image.fromarray(at_width(read_image(pictures[n]), 480)).quantize(128)
        for n in evenly(received, _GIF_FRAMES)
    ]
    gif_frames[0].save(
        out / "drive.gif",
        save_all=True,
        append_images=gif_frames[1:],
        duration=120,
        loop=0,
        optimize=True,
    )


def evenly(numbers: list[int], count: int) -> list[int]:
    """Return at most `count` of the numbers, evenly spaced, including first and last."""
    if len(numbers) <= count:
        return list(numbers)
    return [numbers[round(i * (len(numbers) - 1) / max(count - 1, 1))] for i in range(count)]


def at_width(image: np.ndarray, width: int) -> np.ndarray:
    """Return the image resized to a width in px, keeping its aspect ratio."""
    height = max(1, round(image.shape[0] * width / image.shape[1]))
    shrinks = width < image.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=method)
