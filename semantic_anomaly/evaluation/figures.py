"""Curves and histograms of scores; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semantic_anomaly.detection.rendering import contact_sheet
from semantic_anomaly.evaluation import extras
from semantic_anomaly.evaluation.album import at_width, evenly
from semantic_anomaly.io.images import read_image, write_image

# Okabe and Ito's palette, told apart with any colour vision.
_SCORE, _ALARM, _THRESHOLD, _NOMINAL = "#0072B2", "#D55E00", "#000000", "#56B4E9"
_TRUTH = (
    *("#E69F00", "#CC79A7", "#009E73", "#F0E442", "#999999"),
    *("#8C564B", "#9467BD", "#17BECF", "#BCBD22", "#D55E00"),
)
_DPI = 120
_GIF_FRAMES = 100


@dataclass(frozen=True)
class ScoredFrame:
    """What the figures need of a frame.

    Attributes:
        stamp_ns: camera stamp; one before the last begins another drive.
        score: None where the frame was not scored.
        alarm: whether the decision was `anomaly`.
        truth: name of what was there to be found, '' for a nominal frame, None if not known.
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
        frames: in the order of the drive.
        threshold: None where there is none.
        title: of the figure.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    x, label = _axis(frames)
    scores = np.array([np.nan if f.score is None else f.score for f in frames])
    # A line across two drives would show scores that nobody measured.
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
    scores: dict[str, Sequence[float]],
    calibration: Sequence[float],
    threshold: float | None,
    title: str,
) -> None:
    """Draw how scores are spread, by group, with the threshold and the calibration's scores.

    Args:
        path: PNG to write.
        scores: frame scores by group; nominal frames first.
        calibration: the scores that the threshold was made of, empty if there are none.
        threshold: None where there is none.
        title: of the figure.

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
    """Draw the ROC of the frames and precision over recall of the pixels.

    Args:
        path: PNG to write.
        scores: (n,) frame scores.
        anomalous: (n,) bool.
        pixels: `recall` and `precision` of equal length, empty where there is no curve.
        operating: true- and false-positive rate at the threshold, None where there is none.

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
    """Draw realised over target false-alarm rates of nominal frames, with intervals.

    Args:
        path: PNG to write.
        targets: rates asked of the calibration.
        realised: shares of nominal frames above the threshold that it gave.
        intervals: of the realised rates.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    with _figure(path, (5.2, 3.9)) as (_, (axes,)):
        low, high = zip(*intervals, strict=True)
        axes.fill_between(targets, low, high, color=_NOMINAL, alpha=0.3, linewidth=0,
                          label="95 % interval over sequences")  # fmt: skip
        axes.plot(targets, realised, color=_SCORE, marker=".", label="realised")
        axes.plot([0, max(targets)], [0, max(targets)], color=_THRESHOLD, linestyle="--",
                  linewidth=1, label="as promised")  # fmt: skip
        axes.set(xlabel="target false-alarm rate", ylabel="realised on nominal frames")
        axes.set_xlim(0, max(targets))
        axes.set_ylim(0, min(1.0, max(2 * max(targets), 1.1 * max(realised))))
        axes.grid(alpha=0.25)
        axes.legend(loc="upper left", fontsize=9, frameon=False)


@contextmanager
def _figure(
    path: Path, size_inch: tuple[float, float], rows: int = 1, columns: int = 1
) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Yield figure and axes without pyplot, whose state all of the process would share."""
    agg = extras.load("matplotlib.backends.backend_agg")
    figure = extras.load("matplotlib.figure").Figure(size_inch, layout="constrained")
    agg.FigureCanvasAgg(figure)
    # Rows share their axis, columns show different things.
    yield figure, figure.subplots(rows, columns, sharex="col", squeeze=False).ravel()
    figure.savefig(path, dpi=_DPI)


def _legend_beside(figure: Any, rows: Sequence[Any]) -> None:
    handles, labels = [], []
    for axes in rows:
        found = axes.get_legend_handles_labels()
        handles += found[0]
        labels += found[1]
    # Outside the axes it covers no data, whatever the data.
    figure.legend(handles, labels, loc="outside right upper", fontsize=9, frameon=False)


def _axis(frames: Sequence[ScoredFrame]) -> tuple[np.ndarray, str]:
    """Return seconds where stamps rise throughout, else numbers of frames."""
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
        out: holds `live/overlays/<number>.jpg`, as many as the node's subscriber received.
        rows: one a frame sent: `score` or None, `decision`, `anomaly`, `kind`.
        threshold: the calibrated one.

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
    there = [n for n, file in pictures.items() if file.is_file()]
    if not there:
        return
    chosen = {n for name in dict.fromkeys(f.truth for f in frames)
              for n in evenly([n for n in there if frames[n].truth == name], 4)}  # fmt: skip
    sheet = [at_width(read_image(pictures[n]), 480) for n in sorted(chosen)]
    write_image(out / "contact_sheet.jpg", contact_sheet(sheet, 4))
    image = extras.load("PIL.Image")
    film = [
        image.fromarray(at_width(read_image(pictures[n]), 480)).quantize(128)
        for n in evenly(there, _GIF_FRAMES)
    ]
    film[0].save(
        out / "drive.gif",
        save_all=True,
        append_images=film[1:],
        duration=120,
        loop=0,
        optimize=True,
    )
