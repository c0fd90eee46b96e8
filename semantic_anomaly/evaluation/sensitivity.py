"""What a calibrated detector would see: recall of things pasted over held-out nominal frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from semantic_anomaly.calibration.calibration import Calibration
from semantic_anomaly.calibration.leakage import is_seen, refuse_calibrated, refuse_seen
from semantic_anomaly.detection.detector import AnomalyDetector, load_detector, resolve_roi
from semantic_anomaly.detection.rendering import contact_sheet, draw_overlay
from semantic_anomaly.errors import CalibrationError, SourceError
from semantic_anomaly.evaluation import extras, figures, provenance, report
from semantic_anomaly.evaluation.checkpoint import (
    losses_of,
    refuse_other_content,
    report_folder,
    write_json,
)
from semantic_anomaly.evaluation.composites import (
    MIN_FRAMES,
    CompositeMaker,
    CompositePlan,
    Paste,
    check_kinds,
    cutouts_of,
)
from semantic_anomaly.evaluation.layouts import open_dataset
from semantic_anomaly.evaluation.metrics import PixelScores, rate_interval, share
from semantic_anomaly.index.nominal_index import NominalIndex
from semantic_anomaly.io.images import encode_jpeg
from semantic_anomaly.io.open import open_source
from semantic_anomaly.io.sources import MAX_BAD_SHARE, FrameSource
from semantic_anomaly.offline.drives import settings_of
from semantic_anomaly.roi import RegionOfInterest
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import AnomalyResult, Frame

if TYPE_CHECKING:
    from semantic_anomaly.embedding.identity import Embedder

RESULTS = "results.json"
SHEET, EXAMPLES = "composites.jpg", "examples"
BLIND_MAP, RECALL_CURVE = "blind_map.png", "recall.png"
WRITTEN = frozenset({RESULTS, SHEET, EXAMPLES, BLIND_MAP, RECALL_CURVE, report.NAME})
_EXAMPLES = 4
_SHEET_PICTURES = 24
# Raster of the pixels that the average precision counts.
_STEP_PX = 2
# Shares of control or untouched frames from which on the report warns.
_SUSPECT_RATE = 0.1

LIMITS = (
    "Composites are not real anomalies. Rendered things have flat colours, hard light and no "
    "motion blur; real things of the same size may be easier or harder to see.",
    "Things are pasted in front of everything: also of things that are nearer to the camera.",
    "Only things of the library or of the cut-outs are counted, and only "
    "standing alone: odd arrangements of usual things are not covered.",
    "Controls show the same boxes of another frame of the drive, with the same edges. They tell "
    "whether the pasting is seen, not whether the rendering is: the kinds 'person' and 'car' tell "
    "that where such things belong.",
    "All frames are of one drive: light, weather and road of other drives may change every figure.",
    "Each frame is judged by itself. In a drive a thing is seen in many frames, and a confirmation "
    "over time may delay its alarm or drop it.",
)


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What one or more detectors found of the same composites.

    Example:
        >>> found = sensitivity("index", "drives/sunday", out="seen")
        >>> found["detectors"][0]["recall"], found["detectors"][0]["by_size"]

    Attributes:
        results: content of results.json.
        out: folder of the report, None if none was written.
    """

    results: dict[str, Any]
    out: Path | None = None

    def __getitem__(self, name: str) -> Any:
        return self.results[name]


def sensitivity(
    index: AnomalyDetector | str | Path,
    drive: FrameSource | str | Path,
    plan: CompositePlan | None = None,
    *,
    compare: Sequence[AnomalyDetector | str | Path] = (),
    cutouts: str | Path | None = None,
    layout: str = "",
    settings: Settings | None = None,
    camera: str | None = None,
    out: str | Path | None = None,
    topic: str | None = None,
    allow_seen: bool = False,
    embedder: Embedder | None = None,
    progress: bool = False,
    **overrides: Any,
) -> Sensitivity:
    """Paste things over held-out nominal frames and count which of them the detector finds.

    A thing is found when the score of the frame exceeds the threshold and a localization touches
    the thing. The same is counted in the boxes of the things for controls (these boxes of another
    frame of the drive) and for the untouched frames.

    Args:
        index: folder of a calibrated index, or a detector with a threshold.
        drive: nominal frames of the camera that neither index nor calibration has seen.
        plan: what is pasted where; None: all defaults.
        compare: further indexes, measured on the same composites.
        cutouts: labelled images from which further things are cut; their kinds are added.
        layout: layout of the labelled images, as in `open_dataset`.
        settings: for index folders; None: all defaults.
        camera: one of the cameras of the settings; None: the first.
        out: folder to write; an earlier report is replaced. None: nothing is written.
        topic: image topic of a bag that has several.
        allow_seen: measure on frames that index or calibration have seen; the report warns of them.
        embedder: already loaded, for the first index folder.
        progress: show a progress bar on a terminal.
        **overrides: values of single settings, for index folders.

    Raises:
        CalibrationError: an index without calibration or threshold, or that has seen the drive.
        InputError: the drive has too few frames or too many bad ones, the plan does not fit the
            images, or `out` holds something else.
        UnknownNameError: an unknown kind, setting or camera.
        MissingPackageError: a package of the extra [report] is not installed.
    """
    extras.require("scipy.stats", "sklearn.metrics")
    if out is not None:
        extras.require("matplotlib.figure", "jinja2")
        out = Path(out).expanduser()
        refuse_other_content(out, RESULTS, WRITTEN)
    plan = plan or CompositePlan()
    settings = settings_of(settings, overrides)
    camera = settings.cameras[0] if camera is None else camera
    labelled = None if cutouts is None else open_dataset(cutouts, layout)
    things = {} if labelled is None else cutouts_of(labelled)
    plan = replace(plan, kinds=tuple(dict.fromkeys((*plan.kinds, *things))))
    check_kinds(plan.kinds, things)
    source = drive if isinstance(drive, FrameSource) else open_source(drive, topic=topic)
    source.max_bad_share = MAX_BAD_SHARE
    frames = _chosen(source, plan.frames)
    indexes = [index, *compare]
    loaded = [
        _checked(item, settings, camera, source, frames, allow_seen, embedder if not n else None)
        for n, item in enumerate(indexes)
    ]
    names = _names(indexes)
    drives = [source.drive_of(frame) for frame in frames]
    maker = CompositeMaker(frames, drives, plan, loaded[0].roi, things)
    pastes, warnings = maker.pastes, [text for item in loaded for text in item.warnings]
    for name, item in zip(names, loaded, strict=True):
        if item.roi.describe() != loaded[0].roi.describe():
            warnings.append(f"{name}: its region of interest is another one than of {names[0]}")
    sources = [source, *(labelled.sources if labelled else ())]
    losses = losses_of(sources, ())
    warnings += [f"left out: {item.losses}" for item in sources if item.losses]
    described, measured = [], []
    steps = len(indexes) * (len(frames) + 2 * len(pastes))
    disable = None if progress else True
    with tqdm(total=steps, desc="sensitivity", unit="image", disable=disable) as bar:
        for number, name in enumerate(names):
            # Each is loaded when it is its turn: together they may not fit into memory.
            detector = loaded[number].detector()
            bar.set_postfix_str(name, refresh=False)
            rows, untouched, pixels = _measure(detector, maker, bar.update)
            measured.append(rows)
            described.append(
                {
                    "name": name,
                    **_summary(rows, untouched, maker),
                    "pixel_ap": pixels.metrics().average_precision,
                    "threshold": detector.threshold,
                    "target_false_alarm_rate": detector.settings.target_false_alarm_rate
                    if detector.settings.threshold is None
                    else None,
                    **provenance.describe(detector),
                }
            )
            warnings += _warnings(described[-1])
    results = {
        "drive": source.name,
        "frames": [frame.name for frame in frames],
        "bad_frames": losses["bad_frames"],
        "frames_missing": losses["frames_missing"],
        "image_hw": list(maker.image_hw),
        "unit": maker.unit,
        "sizes": list(maker.sizes),
        "plan": plan.to_dict(),
        "detectors": described,
        "comparisons": [
            _compared(names[0], names[n], measured[0], measured[n], maker)
            for n in range(1, len(names))
        ],
        "warnings": list(dict.fromkeys(warnings)),
        "limits": list(LIMITS),
        "composites": [
            {
                **_paste_row(paste, frames),
                **{name: rows[paste.number] for name, rows in zip(names, measured, strict=True)},
            }
            for paste in pastes
        ],
    }
    if out is not None:
        if len(indexes) > 1:
            detector = loaded[0].detector()
        with report_folder(out, RESULTS, WRITTEN) as folder:
            _write(folder, results, maker, detector, measured[0])
    return Sensitivity(results, None if out is None else Path(out))


@dataclass(frozen=True, eq=False)
class _Loadable:
    """A detector that was checked and can be loaded; `warnings` of what was allowed."""

    detector: Callable[[], AnomalyDetector]
    roi: RegionOfInterest
    warnings: tuple[str, ...]


def _checked(
    item: AnomalyDetector | str | Path,
    settings: Settings,
    camera: str,
    source: FrameSource,
    frames: Sequence[Frame],
    allow_seen: bool,
    embedder: Embedder | None,
) -> _Loadable:
    """Check index and calibration against the drive, before a backbone is loaded."""
    if isinstance(item, AnomalyDetector):
        index, calibration, given, roi = item.index, item.calibration, item, item.roi
        if given.threshold is None:
            raise CalibrationError(
                "sensitivity: expected a calibrated detector, found no threshold"
            )

        def load() -> AnomalyDetector:
            return given

    else:
        folder = settings_of(settings, {"index": str(item), f"{camera}.index": ""})
        path = Path(item).expanduser()
        index = NominalIndex.load(path)
        calibration = Calibration.load(path, camera)
        of_camera = folder.for_camera(camera).camera_settings[camera]
        roi = resolve_roi(of_camera, index, calibration)

        def load() -> AnomalyDetector:
            return load_detector(
                folder, camera, embedder=embedder, index=index, need_calibration=True
            )

    warnings = []
    try:
        for frame in frames:
            refuse_seen(index, frame)
        if calibration is not None:
            refuse_calibrated([drive.name for drive in calibration.drives], source)
    except CalibrationError as error:
        if not allow_seen:
            raise CalibrationError(f"{error}, or measure it anyway with --allow-seen") from None
        seen = sum(is_seen(index, frame) for frame in frames)
        found = f"{seen} of the {len(frames)} frames" if seen else "a drive of this name"
        warnings.append(f"data leakage: index or calibration have seen {found}")
    return _Loadable(load, roi, tuple(warnings))


def _chosen(source: FrameSource, count: int) -> list[Frame]:
    """Return so many frames of a source, evenly spaced, without the bad ones among them."""
    total = source.count
    if total is None:
        total = sum(1 for _ in source.read())
    if total < MIN_FRAMES:
        raise SourceError(
            f"drive '{source.path}': expected at least {MIN_FRAMES} frames, found {total}"
        )
    wanted = set(np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist())
    # The source may hold fewer than it announces; `CompositeMaker` counts again.
    numbered = enumerate(source.read())
    return [frame for n, frame in numbered if n in wanted and isinstance(frame, Frame)]


def _names(indexes: Sequence[AnomalyDetector | str | Path]) -> list[str]:
    names: list[str] = []
    for number, item in enumerate(indexes):
        is_detector = isinstance(item, AnomalyDetector)
        stem = f"detector_{number}" if is_detector else Path(str(item)).resolve().name
        name, again = stem, 2
        while name in names:
            name, again = f"{stem} ({again})", again + 1
        names.append(name)
    return names


def _measure(
    detector: AnomalyDetector, maker: CompositeMaker, update: Callable[[int], Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], PixelScores]:
    """Return the rows of the composites, those of the untouched frames, and the pixel scores."""
    by_frame: dict[int, list[Paste]] = {}
    for paste in maker.pastes:
        by_frame.setdefault(paste.frame, []).append(paste)
    rows: dict[int, dict[str, Any]] = {}
    untouched, pixels = [], PixelScores()
    roi = detector.roi.pixel_mask(maker.image_hw)[::_STEP_PX, ::_STEP_PX]
    for number, frame in enumerate(maker.frames):
        plain = _detected(detector, frame.image)
        untouched.append({"frame": frame.name, "score": plain.score, "alarm": _alarm(plain)})
        update(1)
        for paste in by_frame.get(number, ()):
            image, mask = maker.composite(paste)
            box = _box_mask(paste, mask)
            with_thing = _detected(detector, image)
            control = _detected(detector, maker.control(paste))
            heat, odd = (a[::_STEP_PX, ::_STEP_PX] for a in (with_thing.heatmap, mask))
            pixels.add(heat[roi], odd[roi])
            rows[paste.number] = {
                "score": with_thing.score,
                "alarm": _alarm(with_thing),
                "found": _touches(with_thing, mask),
                "control_score": control.score,
                "control_alarm": _alarm(control),
                "control_found": _touches(control, box),
                "untouched_score": plain.score,
                "untouched_found": _touches(plain, box),
            }
            update(2)
    return [rows[number] for number in range(len(rows))], untouched, pixels


def _detected(detector: AnomalyDetector, image: np.ndarray) -> AnomalyResult:
    # Composites do not follow each other in time.
    detector.reset()
    return detector.detect(Frame(image))


def _alarm(result: AnomalyResult) -> bool:
    return result.threshold is not None and result.score > result.threshold


def _touches(result: AnomalyResult, mask: np.ndarray) -> bool:
    """Return whether a localization, which a score above the threshold has, touches a mask."""
    return bool(result.label_map[mask].any())


def _box_mask(paste: Paste, mask: np.ndarray) -> np.ndarray:
    x0, y0, x1, y1 = paste.box_xyxy
    box = np.zeros_like(mask)
    box[y0:y1, x0:x1] = True
    return box


def _summary(
    rows: Sequence[Mapping[str, Any]],
    untouched: Sequence[Mapping[str, Any]],
    maker: CompositeMaker,
) -> dict[str, Any]:
    pastes = maker.pastes
    n_rows, n_cols = maker.plan.cells
    alarms = sum(row["alarm"] for row in untouched)
    cells = {
        key: [[0] * n_cols for _ in range(n_rows)]
        for key in ("composites", "found", "control_found")
    }
    for paste, row in zip(pastes, rows, strict=True):
        r, c = paste.cell
        cells["composites"][r][c] += 1
        cells["found"][r][c] += row["found"]
        cells["control_found"][r][c] += row["control_found"]
    return {
        **_rates(pastes, rows),
        "untouched": {"frames": len(untouched), "alarms": alarms, "rate": alarms / len(untouched)},
        "by_size": {f"{size:g}": _rates(*_part(pastes, rows, size=size)) for size in maker.sizes},
        "by_kind": {
            kind: {
                **_rates(*_part(pastes, rows, kind=kind)),
                "by_size": {
                    f"{size:g}": _rates(*_part(pastes, rows, kind=kind, size=size))["recall"]
                    for size in maker.sizes
                },
            }
            for kind in maker.plan.kinds
        },
        "by_cell": cells,
    }


def _part(
    pastes: Sequence[Paste], rows: Sequence[Mapping[str, Any]], **wanted: Any
) -> tuple[list[Paste], list[Mapping[str, Any]]]:
    """Return the composites whose attributes have the wanted values, and their rows."""
    numbers = [
        n
        for n, paste in enumerate(pastes)
        if all(getattr(paste, name) == value for name, value in wanted.items())
    ]
    return [pastes[n] for n in numbers], [rows[n] for n in numbers]


def _rates(pastes: Sequence[Paste], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return recall, and the shares of controls and untouched frames found in the same places."""
    recall = share([row["found"] for row in rows])
    # Composites over one frame are correlated: the frames are the trials.
    bounds = rate_interval(recall, len({paste.frame for paste in pastes}))
    return {
        "composites": len(rows),
        "found": sum(row["found"] for row in rows),
        "recall": recall,
        "recall_interval": None if bounds is None else list(bounds),
        # Alarms anywhere in the frame, for the thing or not.
        "alarm_rate": share([row["alarm"] for row in rows]),
        "control_alarm_rate": share([row["control_alarm"] for row in rows]),
        "control_rate": share([row["control_found"] for row in rows]),
        "untouched_rate": share([row["untouched_found"] for row in rows]),
    }


def _compared(
    first: str,
    other: str,
    rows: Sequence[Mapping[str, Any]],
    other_rows: Sequence[Mapping[str, Any]],
    maker: CompositeMaker,
) -> dict[str, Any]:
    """Return how many of the same things two detectors find, of all and by size."""

    def counts(**wanted: Any) -> dict[str, int]:
        pairs = [
            (a["found"], b["found"])
            for a, b in zip(
                _part(maker.pastes, rows, **wanted)[1],
                _part(maker.pastes, other_rows, **wanted)[1],
                strict=True,
            )
        ]
        return {
            "both": pairs.count((True, True)),
            "first_only": pairs.count((True, False)),
            "other_only": pairs.count((False, True)),
            "neither": pairs.count((False, False)),
        }

    return {
        "first": first,
        "other": other,
        "all": counts(),
        "by_size": {f"{size:g}": counts(size=size) for size in maker.sizes},
    }


def _warnings(detector: Mapping[str, Any]) -> list[str]:
    name, untouched = detector["name"], detector["untouched"]
    target = detector["target_false_alarm_rate"]
    texts = []
    if untouched["rate"] > max(_SUSPECT_RATE, 2 * (target or 0.0)):
        aimed = "" if target is None else f"; the calibration aims at {target:.1%}"
        texts.append(
            f"{name}: {untouched['alarms']} of the {untouched['frames']} untouched frames raise an "
            f"alarm{aimed}. The drive is unlike the calibration drives; recall at this threshold "
            "says little"
        )
    if (detector["control_rate"] or 0.0) > _SUSPECT_RATE + detector["untouched_rate"]:
        texts.append(
            f"{name}: {detector['control_rate']:.1%} of the controls are found: the pasting itself "
            "is seen, and recall is too high by about as much"
        )
    return texts


def _paste_row(paste: Paste, frames: Sequence[Frame]) -> dict[str, Any]:
    return {
        "frame": frames[paste.frame].name,
        "donor": frames[paste.donor].name,
        "kind": paste.kind,
        "size": paste.size,
        "look": paste.look,
        "box_xyxy": list(paste.box_xyxy),
        "cell": list(paste.cell),
    }


def _write(
    folder: Path,
    results: Mapping[str, Any],
    maker: CompositeMaker,
    detector: AnomalyDetector,
    rows: Sequence[Mapping[str, Any]],
) -> None:
    background = maker.frames[len(maker.frames) // 2].image
    figures.blind_map(
        folder / BLIND_MAP,
        background,
        {d["name"]: d["by_cell"] for d in results["detectors"]},
    )
    figures.recall_curve(folder / RECALL_CURVE, results["detectors"], results["unit"])
    sheet = figures.evenly(list(range(len(maker.pastes))), _SHEET_PICTURES)
    pictures = [
        figures.at_width(maker.composite(maker.pastes[n])[0], report.SHEET_WIDTH_PX) for n in sheet
    ]
    (folder / SHEET).write_bytes(encode_jpeg(contact_sheet(pictures, report.SHEET_COLUMNS), 88))
    (folder / EXAMPLES).mkdir()
    for group, numbers in _examples(maker.pastes, rows).items():
        for rank, number in enumerate(numbers, start=1):
            picture = _example(maker, detector, number, group == "control_found")
            (folder / EXAMPLES / f"{group}_{rank}.jpg").write_bytes(encode_jpeg(picture, 88))
    write_json(folder / RESULTS, results)
    report.write_sensitivity_html(folder, results)


def _examples(pastes: Sequence[Paste], rows: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Return the smallest found, the largest missed, and controls that were found."""

    def area(number: int) -> int:
        x0, y0, x1, y1 = pastes[number].box_xyxy
        return (x1 - x0) * (y1 - y0)

    numbers = range(len(pastes))
    silent = [n for n in numbers if not rows[n]["untouched_found"]]
    return {
        "found": sorted((n for n in silent if rows[n]["found"]), key=area)[:_EXAMPLES],
        "missed": sorted((n for n in numbers if not rows[n]["found"]), key=area)[-_EXAMPLES:][::-1],
        "control_found": [n for n in silent if rows[n]["control_found"]][:_EXAMPLES],
    }


def _example(
    maker: CompositeMaker, detector: AnomalyDetector, number: int, control: bool
) -> np.ndarray:
    paste = maker.pastes[number]
    image, mask = maker.composite(paste)
    if control:
        image, mask = maker.control(paste), _box_mask(paste, mask)
    result = _detected(detector, image)
    overlay = draw_overlay(image, result, detector.roi, detector.settings.overlay_alpha)
    truth = mask.astype(np.uint8)
    verdict = "FOUND" if _touches(result, mask) else "MISSED"
    if control:
        verdict = "FALSE ALARM"
    what = f"control, box of {paste.kind}" if control else paste.kind
    caption = (
        f"{maker.frames[paste.frame].name}   {what}, {paste.size:g} {maker.unit}   "
        f"score {result.score:.3f}   {verdict}"
    )
    plain = maker.frames[paste.frame].image
    return report.side_by_side([plain, image, report.outline_truth(overlay, truth)], caption)
