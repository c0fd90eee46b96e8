"""The table of measures in results.json: names, keys and remarks, and how numbers are formatted.

Commands and reports print from this table alone. It imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COMPONENT_MEASURES = ("siou", "ppv", "f1")
# Name of a row, and the keys of the measures in it.
MEASURES: Mapping[str, tuple[str, ...]] = {
    "frame AUROC": ("frame_auroc",),
    "TPR": ("tpr",),
    "FPR": ("fpr",),
    "localized": ("localized",),
    "alarm TPR": ("alarm_tpr",),
    "alarm FPR": ("alarm_fpr",),
    "pixel AP": ("pixel_ap",),
    "pixel AUROC": ("pixel_auroc",),
    "pixel FPR95": ("pixel_fpr95",),
    **{
        f"sIoU, PPV, F1 {name}": tuple(f"component_{m}_{name}" for m in COMPONENT_MEASURES)
        for name in ("oracle", "calibrated")
    },
}
HEADER = ("measure", "value", "95 %", "remark")


def figure(value: float | None, digits: int = 3) -> str:
    """Return a number with `digits` decimals, '-' for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """Return a share in percent, '-' for None."""
    return "-" if value is None else f"{100 * value:.1f} %"


def interval(bounds: Sequence[float] | None) -> str:
    """Return 'low to high', empty for None."""
    return " to ".join(figure(bound) for bound in bounds or ())


def measure_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return name, value, interval over sequences and remark of every measure to show.

    Args:
        results: content of results.json, of `evaluate` or `score_maps`.
    """
    remarks = _remarks(results)
    rows = [
        (
            name,
            " ".join(figure(results[key]) for key in keys),
            interval(results.get(f"{keys[0]}_interval")),
            remarks[name],
        )
        for name, keys in MEASURES.items()
        if name in remarks
    ]
    if "threshold_from" in results:
        source = results["threshold_from"] or "none"
        rows.insert(0, ("threshold", figure(results["threshold"], 4), "", source))
    if total := results.get("latency_ms", {}).get("total"):
        rows.append(("ms a frame", figure(total["p50"], 1), "", f"median; p95 {total['p95']:.1f}"))
    return rows


def _remarks(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the remark of every measure to show."""
    # Score maps of other methods say where their frame scores come from.
    frame_score = results.get("frame_score")
    anomalous = results["frames_anomalous"]
    nominal = results["frames_counted"] - anomalous
    auroc = "" if anomalous and nominal else "needs anomalous and nominal frames"
    if results["threshold"] is None:
        tpr = "no threshold given" if frame_score else "no threshold: the index is not calibrated"
        fpr = tpr
    else:
        tpr = f"{_count(results['tpr'], anomalous)} anomalous frames above the threshold"
        fpr = f"{_count(results['fpr'], nominal)} nominal frames"
        if not frame_score:
            rate = results["target_false_alarm_rate"]
            fpr += "; threshold set by hand" if rate is None else f"; target {rate:g}"
    remarks = {"frame AUROC": frame_score or auroc, "TPR": tpr, "FPR": fpr}
    if results.get("localized") is not None:
        remarks["localized"] = (
            "of the anomalous frames with an alarm: a localization touches the anomaly"
        )
    if results.get("settings", {}).get("confirm_count", 1) > 1:
        remarks |= dict.fromkeys(("alarm TPR", "alarm FPR"), "of decisions, confirmed over time")
    remarks |= {"pixel AP": _pixels(results["pixels"]), "pixel AUROC": "", "pixel FPR95": ""}
    limits = results["component_limits"]
    sizes = f"from {limits['predicted_px']} px (anomalies: {limits['truth_px']} px)"
    for name, remark in (("oracle", f"best pixel F1 afterwards; {sizes}"), ("calibrated", sizes)):
        absent = results[f"pixel_threshold_{name}"] is None
        remarks[f"sIoU, PPV, F1 {name}"] = "no threshold" if absent else remark
    return remarks


def _pixels(pixels: Mapping[str, Any]) -> str:
    area = pixels.get("roi", "whole image")
    if not pixels["anomalous"]:
        within = "" if area == "whole image" else f" within the {area}"
        return f"no anomalous pixels in the masks{within}"
    share = pixels["anomalous"] / (pixels["anomalous"] + pixels["normal"])
    return f"{area}, {100 * share:.2g} % of the pixels are anomalous"


def _count(share: float | None, total: int) -> str:
    return f"{round((share or 0.0) * total)} of {total}"
