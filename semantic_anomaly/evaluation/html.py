"""report.html: what results.json or summary.json says, for people; no network is needed."""

from __future__ import annotations

import base64
import json
from importlib import resources
from pathlib import Path
from typing import Any

from semantic_anomaly.evaluation import extras

NAME = "report.html"
ALARM_PICTURES = 12
_CURVES = (
    ("curves.png", "ROC of the frames; precision and recall of the pixels"),
    ("score_histogram.png", "Frame scores, nominal against anomalous, with the threshold"),
    ("calibration.png", "Target against realised false-alarm rate of the nominal frames"),
    ("score_curve.png", "Scores in the order of the frames, with what was there to be found"),
)
_GROUPS = (
    ("lowest_anomaly", "Anomalous frames with the lowest scores"),
    ("highest_anomaly", "Anomalous frames with the highest scores"),
    ("highest_nominal", "Nominal frames with the highest scores"),
)
_PROVENANCE = (
    *("protocol", "protocol_detail", "settings", "region", "index", "backbone", "device"),
    *("versions", "git_commit", "threshold", "threshold_from", "calibration", "pixels"),
    *("data_sha256", "calibration_sha256"),
)


def write_html(folder: Path, results: dict[str, Any]) -> None:
    """Write report.html beside the pictures of an evaluation, which it holds all the same.

    Args:
        folder: holds the curves and `worst/`; those that are not there are left out.
        results: what results.json holds.

    Raises:
        MissingPackageError: jinja2 is not installed.
    """
    calibration = results["calibration"] or {"warnings": []}
    _write(
        folder,
        "report.html.j2",
        r=results,
        title=results["dataset"],
        cards=_cards(results),
        warnings=calibration["warnings"],
        measures=_measures(results),
        frames=[
            {
                "title": title,
                "pictures": [
                    {"alt": file.stem, "source": _embedded(file)}
                    for file in sorted((folder / "worst").glob(f"{group}_*.jpg"))
                ],
            }
            for group, title in _GROUPS
        ],
        provenance=json.dumps({k: results[k] for k in _PROVENANCE}, indent=1),
    )


def write_drive_html(folder: Path, summary: dict[str, Any], begin_ns: int, end_ns: int) -> None:
    """Write report.html of a drive beside its curve and pictures, which it holds all the same.

    Args:
        folder: holds score_curve.png and `panels/`; what is not there is left out.
        summary: what summary.json holds.
        begin_ns, end_ns: stamps of the first and of the last frame.

    Raises:
        MissingPackageError: jinja2 is not installed.
    """
    stems = [frame_stem(alarm["first_frame"]) for alarm in summary["alarms"][:ALARM_PICTURES]]
    panels = [folder / "panels" / f"{stem}.jpg" for stem in stems]
    _write(
        folder,
        "drive.html.j2",
        r={"backbone": None, **summary},
        title=summary["source"],
        duration_s=(end_ns - begin_ns) / 1e9,
        begin_ns=begin_ns,
        cards=_drive_cards(summary),
        warnings=[] if summary["threshold"] else ["No threshold: nothing was decided."],
        frames=[
            {
                "title": "First frames of alarms",
                "pictures": [
                    {"alt": file.stem, "source": _embedded(file)}
                    for file in panels
                    if file.is_file()
                ],
            }
        ],
        provenance=json.dumps({k: summary[k] for k in _PROVENANCE if k in summary}, indent=1),
    )


def frame_stem(name: str) -> str:
    """Return what pictures of a frame are called: its name without folder and suffix."""
    last = name.rpartition("/")[2]
    return last.rpartition(".")[0] or last


def _write(folder: Path, template: str, **values: Any) -> None:
    jinja2 = extras.load("jinja2")

    def source(name: str) -> str:
        return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        autoescape=True, loader=jinja2.FunctionLoader(source), undefined=jinja2.StrictUndefined
    )
    environment.filters["figure"] = _figure
    curves = [
        {"alt": alt, "source": _embedded(folder / name)}
        for name, alt in _CURVES
        if (folder / name).is_file()
    ]
    text = environment.get_template(template).render(curves=curves, **values)
    (folder / NAME).write_text(text, encoding="utf-8")


def _drive_cards(summary: dict[str, Any]) -> list[dict[str, str]]:
    total = summary["latency_ms"].get("total")
    cards = [
        {
            "name": "alarm" if len(summary["alarms"]) == 1 else "alarms",
            "value": f"{len(summary['alarms'])}",
            "note": f"threshold {_figure(summary['threshold'])}",
        }
    ]
    if against := summary["against_events"]:
        events, per_hour = len(against["events"]), against["false_per_hour"]
        nominal = f"{against['nominal_s']:.1f} s nominal, {against['false_episodes']} episodes"
        cards += [
            {
                "name": "events found",
                "value": f"{events - against['missed']} of {events}",
                "note": f"median delay {_figure(against['delay_s_median'], 2)} s",
            },
            {"name": "false alarms an hour", "value": _figure(per_hour, 1), "note": nominal},
        ]
    scores = summary["score_min"], summary["score_max"]
    cards.append({"name": "highest score", "value": _figure(scores[1]),
                  "note": f"lowest {_figure(scores[0])}"})  # fmt: skip
    if total:
        note = f"p95 {_figure(total['p95'], 0)}, p99 {_figure(total['p99'], 0)}"
        cards.append({"name": "ms a frame", "value": _figure(total["p50"], 0), "note": note})
    return cards


def _cards(results: dict[str, Any]) -> list[dict[str, str]]:
    rate = results["target_false_alarm_rate"]
    aim = "no threshold" if results["threshold"] is None else "at the threshold"
    return [
        {
            "name": "frame AUROC",
            "value": _figure(results["frame_auroc"]),
            "note": _interval(results["frame_auroc_interval"]),
        },
        {"name": "anomalous frames found", "value": _percent(results["tpr"]), "note": aim},
        {
            "name": "false alarms",
            "value": _percent(results["fpr"]),
            "note": aim if rate is None else f"of nominal frames; target {rate:.1%}",
        },
        {"name": "pixel AP", "value": _figure(results["pixel_ap"]), "note": "where it is"},
        {
            "name": "component F1",
            "value": _figure(results["component_f1_calibrated"]),
            "note": f"oracle {_figure(results['component_f1_oracle'])}",
        },
        {
            "name": "ms a frame",
            "value": _figure(results["latency_ms"]["total"]["p50"], 0),
            "note": f"median; p99 {_figure(results['latency_ms']['total']['p99'], 0)}",
        },
    ]


def _measures(results: dict[str, Any]) -> list[dict[str, str]]:
    limits = results["component_limits"]
    sizes = f"components from {limits['predicted_px']} px, anomalies from {limits['truth_px']} px"
    rows = [
        ("frame AUROC", "frame_auroc", "an anomalous frame scores above a nominal one"),
        ("TPR", "tpr", "anomalous frames above the threshold"),
        ("FPR", "fpr", "nominal frames above the threshold"),
        ("localized", "localized", "of the found frames: an outline touches the anomaly"),
        ("pixel AP", "pixel_ap", "area under precision and recall of all counted pixels"),
        ("pixel AUROC", "pixel_auroc", ""),
        ("pixel FPR95", "pixel_fpr95", "false-positive rate where 95 % of the pixels are found"),
    ]
    for threshold, note in (
        ("oracle", f"best pixel F1, chosen by the labels; {sizes}"),
        ("calibrated", "the detector's own threshold"),
    ):
        for name, measure in (("sIoU", "siou"), ("PPV", "ppv"), ("F1", "f1")):
            rows.append((f"{name}, {threshold}", f"component_{measure}_{threshold}", note))
    return [
        {
            "name": name,
            "value": _figure(results[key]),
            "interval": _interval(results.get(f"{key}_interval")),
            "note": note,
        }
        for name, key, note in rows
    ]


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _interval(interval: list[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _embedded(file: Path) -> str:
    kind = "png" if file.suffix == ".png" else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(file.read_bytes()).decode("ascii")
