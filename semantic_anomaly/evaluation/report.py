"""Report of an evaluation or a drive: pictures of frames and a self-contained report.html."""

from __future__ import annotations

import base64
import heapq
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from semantic_anomaly.detection.explain import mark_patch
from semantic_anomaly.detection.rendering import contact_sheet, draw_heatmap, draw_overlay
from semantic_anomaly.evaluation import extras
from semantic_anomaly.evaluation.figures import at_width
from semantic_anomaly.evaluation.measures import figure, interval, measure_rows, percent
from semantic_anomaly.io.images import encode_jpeg, encode_png, read_image
from semantic_anomaly.structures import AnomalyResult, Frame

if TYPE_CHECKING:
    from semantic_anomaly.detection.detector import AnomalyDetector

NAME = "report.html"
ALARM_PICTURES = 12
_CURVES = (
    ("curves.png", "ROC of the frames; precision and recall of the pixels"),
    ("score_histogram.png", "Frame scores in deviations of nominal distances, with the threshold"),
    ("calibration.png", "Target against realised false-alarm rate of the nominal frames"),
    ("blind_map.png", "Where things are found: found of pasted, by the cell in which they stand"),
    ("recall.png", "Recall by size or distance, and the same for the controls"),
    (
        "score_curve.png",
        "Scores in deviations of nominal distances, by frame, with the ground truth",
    ),
)
_GROUPS = (
    ("lowest_anomaly", "Anomalous frames with the lowest scores"),
    ("highest_anomaly", "Anomalous frames with the highest scores"),
    ("highest_nominal", "Nominal frames with the highest scores"),
)
_PROVENANCE = (
    *("protocol", "protocol_detail", "settings", "roi", "index", "stages", "device"),
    *("versions", "git_commit", "threshold", "threshold_from", "calibration", "pixels"),
    *("data_sha256", "calibration_sha256", "plan", "detectors"),
)
_EXAMPLES = (
    ("missed", "Largest things missed: untouched frame, composite, overlay of the detector"),
    ("found", "Smallest things found"),
    ("control_found", "Controls found: the box shows another frame of the drive, no thing"),
)
PANEL_WIDTH_PX = 640
SHEET_WIDTH_PX = 480
SHEET_COLUMNS = 4
WORST = 4
_SHEET = "sheet"
_TRUTH = (0, 220, 90)
_GOOD, _BAD = (200, 240, 205), (255, 214, 190)
_TINTS = {"FOUND": _GOOD, "MISSED": _BAD, "FALSE ALARM": _BAD, "SOMETHING ELSE": _BAD}
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def write_html(folder: Path, results: Mapping[str, Any]) -> None:
    """Write report.html of results.json; it embeds the curves and `worst/` of the folder.

    Raises:
        MissingPackageError: jinja2 is not installed.
    """
    _write(
        folder,
        "report.html.j2",
        r=results,
        title=results["dataset"],
        cards=_cards(results),
        warnings=results["warnings"],
        measures=measure_rows(results),
        frames=[
            _pictures(title, sorted((folder / "worst").glob(f"{group}_*.jpg")))
            for group, title in _GROUPS
        ],
    )


def write_drive_html(folder: Path, summary: Mapping[str, Any], begin_ns: int, end_ns: int) -> None:
    """Write report.html of summary.json; it embeds score_curve.png and `panels/` of the folder.

    Args:
        begin_ns, end_ns: stamps of the first and of the last frame, ns.

    Raises:
        MissingPackageError: jinja2 is not installed.
    """
    names = [PurePosixPath(alarm["first_frame"]) for alarm in summary["alarms"][:ALARM_PICTURES]]
    panels = [folder / "panels" / f"{name.stem}.jpg" for name in names]
    _write(
        folder,
        "drive.html.j2",
        r={"stages": [], **summary},
        title=summary["source"],
        duration_s=(end_ns - begin_ns) / 1e9,
        begin_ns=begin_ns,
        cards=_drive_cards(summary),
        warnings=(["No threshold: decisions are unknown."] if summary["threshold"] is None else []),
        frames=[_pictures("First frames of alarms", [f for f in panels if f.is_file()])],
    )


def write_sensitivity_html(folder: Path, results: Mapping[str, Any]) -> None:
    """Write report.html of the results of `sensitivity`; it embeds the pictures of the folder.

    Raises:
        MissingPackageError: jinja2 is not installed.
    """
    pictures = [
        _pictures(title, sorted((folder / "examples").glob(f"{group}_[0-9]*.jpg")))
        for group, title in _EXAMPLES
    ]
    sheet = _pictures("Some composites as the detector gets them", [folder / "composites.jpg"])
    _write(
        folder,
        "sensitivity.html.j2",
        r=results,
        title=f"{results['drive']}: will it see it?",
        cards=_sensitivity_cards(results),
        warnings=results["warnings"],
        frames=[*pictures, sheet],
    )


def _sensitivity_cards(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    first = results["detectors"][0]
    untouched, target = first["untouched"], first["target_false_alarm_rate"]
    aimed = "" if target is None else f"; target {target:.1%}"
    of = f"{first['found']} of {first['composites']} pasted"
    places = "the same boxes of another frame of the drive"
    return [
        ("things found", percent(first["recall"]), of),
        ("controls found", percent(first["control_rate"]), places),
        (
            "untouched frames with an alarm",
            percent(untouched["rate"]),
            f"{untouched['alarms']} of {untouched['frames']}{aimed}",
        ),
        ("pixel AP", figure(first["pixel_ap"]), "of the things in the composites"),
    ]


def _write(folder: Path, template: str, r: Mapping[str, Any], **values: Any) -> None:
    jinja2 = extras.load("jinja2")

    def source(name: str) -> str:
        return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        autoescape=True, loader=jinja2.FunctionLoader(source), undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"figure": figure, "percent": percent}
    text = environment.get_template(template).render(
        r=r,
        curves=[
            {"alt": alt, "source": _data_url(folder / name)}
            for name, alt in _CURVES
            if (folder / name).is_file()
        ],
        provenance=json.dumps({key: r[key] for key in _PROVENANCE if key in r}, indent=1),
        **values,
    )
    (folder / NAME).write_text(text, encoding="utf-8")


def _pictures(title: str, files: Sequence[Path]) -> dict[str, Any]:
    return {
        "title": title,
        "pictures": [{"alt": file.stem, "source": _data_url(file)} for file in files],
    }


def _data_url(file: Path) -> str:
    kind = "png" if file.suffix == ".png" else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(file.read_bytes()).decode("ascii")


def _cards(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rate, total = results["target_false_alarm_rate"], results["latency_ms"]["total"]
    above = "no threshold" if results["threshold"] is None else "at the threshold"
    target = above if rate is None else f"of nominal frames; target {rate:.1%}"
    f1 = {name: figure(results[f"component_f1_{name}"]) for name in ("calibrated", "oracle")}
    auroc = figure(results["frame_auroc"]), interval(results["frame_auroc_interval"])
    return [
        ("frame AUROC", *auroc),
        ("anomalous frames found", percent(results["tpr"]), above),
        ("false alarms", percent(results["fpr"]), target),
        ("pixel AP", figure(results["pixel_ap"]), "localization of anomalous pixels"),
        ("component F1", f1["calibrated"], f"oracle {f1['oracle']}"),
        ("ms a frame", figure(total["p50"], 0), f"median; p99 {figure(total['p99'], 0)}"),
    ]


def _drive_cards(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    alarms = len(summary["alarms"])
    threshold = f"threshold {figure(summary['threshold'])}"
    cards = [("alarm" if alarms == 1 else "alarms", f"{alarms}", threshold)]
    if against := summary["against_events"]:
        events = len(against["events"])
        delay = f"median delay {figure(against['delay_s_median'], 2)} s"
        nominal = f"{against['false_alarms']} in {against['nominal_s']:.1f} s of nominal driving"
        cards += [
            ("events found", f"{events - against['missed']} of {events}", delay),
            ("false alarms an hour", figure(against["false_per_hour"], 1), nominal),
        ]
    low, high = summary["score_min"], summary["score_max"]
    cards.append(("highest score", figure(high), f"lowest {figure(low)}"))
    if total := summary["latency_ms"].get("total"):
        note = f"p95 {figure(total['p95'], 0)}, p99 {figure(total['p99'], 0)}"
        cards.append(("ms a frame", figure(total["p50"], 0), note))
    return cards


def side_by_side(
    pictures: Sequence[np.ndarray], caption: str, nearest: np.ndarray | None = None
) -> np.ndarray:
    """Return pictures in a row under a caption of one line, (height, width, 3) uint8 RGB.

    Args:
        pictures: (height, width, 3) uint8 RGB of one size.
        caption: one line; its last word may tint it.
        nearest: (h, w, 3) uint8 RGB of a further picture, any size.
    """
    height, width = pictures[0].shape[:2]
    panels = [at_width(picture, PANEL_WIDTH_PX) for picture in pictures]
    if nearest is not None:
        resized = cv2.resize(nearest, (width, height), interpolation=cv2.INTER_LINEAR)
        panels.append(at_width(resized, PANEL_WIDTH_PX))
    row = contact_sheet(panels, len(panels))
    return np.concatenate([_strip(caption, row.shape[1], 30), row])


def nearest_nominal(detector: AnomalyDetector, frame: Frame) -> np.ndarray | None:
    """Return the nominal frame nearest to the most anomalous patch, with the patch marked.

    It is of the stage that adds most to the patch.

    Returns:
        (h, w, 3) uint8 RGB, at most 320 px wide; None when the index has no picture of it.
    """
    score = detector.score(detector.embedder.embed([frame.image])[0])
    # Patches outside the region of interest are 0, and those inside may be below.
    values = np.where(score.inside, score.anomaly_map, -np.inf)
    row, col = divmod(int(values.argmax()), values.shape[1])
    [example] = detector.nearest(score, [(row, col)])
    picture = detector.index.thumbnail(example.frame)
    if picture is None:
        return None
    picture = picture.copy()
    mark_patch(picture, example.grid_hw, example.row, example.col)
    return picture


class Album:
    """Writes the pictures of a run frame by frame, so that an interrupted run can be resumed.

    Args:
        folder: `overlays/`, `panels/`, `worst/` and `contact_sheet.jpg` are written here.
        every: write pictures of every n-th frame, 0 for none.
        sheet: numbers of the frames on the contact sheet.
    """

    def __init__(self, folder: Path, every: int, sheet: Collection[int] = ()) -> None:
        self._folder, self.every, self._sheet = folder, every, sheet
        self._worst: dict[str, list[tuple[float, int, str]]] = {}

    def add(
        self,
        number: int,
        frame: Frame,
        result: AnomalyResult,
        detector: AnomalyDetector,
        *,
        stem: str,
        caption: str,
        mask: np.ndarray | None = None,
        ranks: Sequence[tuple[str, float]] = (),
        always: bool = False,
    ) -> None:
        """Write the pictures of a frame that are due.

        Args:
            number: number of the frame in the run.
            stem: file name of the pictures, without suffix.
            caption: one line.
            mask: (height, width) uint8 ground truth, or None.
            ranks: group and rank value; the `WORST` highest of each group are kept.
            always: write this frame whatever its number. Kept and `always` frames get a fourth
                panel: the nearest nominal frame.
        """
        regular = always or (self.every > 0 and number % self.every == 0)
        extreme = self.rank(number, stem, ranks)
        if not (regular or extreme or number in self._sheet):
            return
        overlay = draw_overlay(frame.image, result, detector.roi, detector.settings.overlay_alpha)
        if number in self._sheet:
            small = at_width(outline_truth(overlay, mask), SHEET_WIDTH_PX)
            small = np.concatenate([_strip(caption, small.shape[1], 18), small])
            self._write(f"{_SHEET}/{number:09d}.png", encode_png(small))
        if not (regular or extreme):
            return
        pictures = [outline_truth(frame.image, mask), draw_heatmap(result, detector.roi), overlay]
        nominal = nearest_nominal(detector, frame) if extreme or always else None
        if regular:
            panel = side_by_side(pictures, caption, nominal if always else None)
            self._write(f"overlays/{stem}.jpg", encode_jpeg(overlay))
            self._write(f"panels/{stem}.jpg", encode_jpeg(panel, 88))
        if extreme:
            content = encode_jpeg(side_by_side(pictures, caption, nominal), 88)
            for group in extreme:
                self._write(_kept(group, number), content)

    def finish(self) -> None:
        """Rename the kept frames by rank and write the contact sheet."""
        for group, kept in self._worst.items():
            for rank, (_, number, stem) in enumerate(sorted(kept, reverse=True), start=1):
                file = self._folder / _kept(group, number)
                # An earlier run may have been interrupted after this.
                if file.exists():
                    file.rename(file.with_name(f"{group}_{rank}_{stem}.jpg"))
        thumbnails = [read_image(file) for file in sorted((self._folder / _SHEET).glob("*.png"))]
        if thumbnails:
            sheet = contact_sheet(thumbnails, SHEET_COLUMNS)
            self._write("contact_sheet.jpg", encode_jpeg(sheet, 88))
            shutil.rmtree(self._folder / _SHEET)

    def rank(self, number: int, stem: str, ranks: Sequence[tuple[str, float]]) -> list[str]:
        """Return the groups in which a frame is among the `WORST` so far.

        A resumed run calls it for the frames whose pictures an earlier run has written.
        """
        groups = []
        for group, value in ranks:
            kept = self._worst.setdefault(group, [])
            if len(kept) < WORST:
                heapq.heappush(kept, (value, number, stem))
            elif value > kept[0][0]:
                _, dropped, _ = heapq.heapreplace(kept, (value, number, stem))
                (self._folder / _kept(group, dropped)).unlink(missing_ok=True)
            else:
                continue
            groups.append(group)
        return groups

    def _write(self, name: str, content: bytes) -> None:
        path = self._folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def _kept(group: str, number: int) -> str:
    return f"worst/{group}@{number}.jpg"


def outline_truth(image: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Return a copy with the ground truth outlined in green."""
    marked = image.copy()
    if mask is not None:
        anomalous = (mask == 1).astype(np.uint8)
        contours, _ = cv2.findContours(anomalous, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(marked, contours, -1, _TRUTH, max(1, round(image.shape[0] / 300)))
    return marked


def _strip(text: str, width: int, height: int) -> np.ndarray:
    """Return a strip with dark text scaled to fit, tinted by the verdict at the end of the text."""
    strip = np.empty((height, width, 3), np.uint8)
    strip[:] = next((tint for word, tint in _TINTS.items() if text.endswith(word)), 255)
    (wide, high), _ = cv2.getTextSize(text, _FONT, 1.0, 1)
    scale = min(0.55 * height / max(high, 1), (width - 12) / max(wide, 1))
    baseline = round((height + high * scale) / 2) - 1
    cv2.putText(strip, text, (6, baseline), _FONT, scale, (20, 20, 20), 1, cv2.LINE_AA)
    return strip
