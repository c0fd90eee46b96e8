"""The table of measures that commands and reports print."""

from __future__ import annotations

from typing import Any

import pytest

from semantic_anomaly.evaluation.measures import MEASURES, figure, interval, measure_rows, percent


def results(**changes: Any) -> dict[str, Any]:
    """Return results.json of an evaluation, with all measures 0.5."""
    measures = {key: 0.5 for keys in MEASURES.values() for key in keys}
    intervals = {f"{name}_interval": [0.25, 0.75] for name in ("frame_auroc", "tpr", "fpr")}
    return {
        **{**measures, **intervals, "threshold": 0.3, "threshold_from": "calibration"},
        **{"frames_counted": 10, "frames_anomalous": 4, "target_false_alarm_rate": 0.05},
        "pixels": {"anomalous": 1, "normal": 99, "roi": "whole image"},
        "settings": {"confirm_count": 1},
        "component_limits": {"predicted_px": 50, "truth_px": 10},
        **{"pixel_threshold_oracle": 0.4, "pixel_threshold_calibrated": 0.3},
        "latency_ms": {"total": {"p50": 12.34, "p95": 20.0, "p99": 30.0}},
        **changes,
    }


def shown(**changes: Any) -> dict[str, tuple[str, ...]]:
    return {name: cells for name, *cells in measure_rows(results(**changes))}


def test_every_measure_has_a_row() -> None:
    rows = shown(settings={"confirm_count": 2})
    assert list(rows) == ["threshold", *MEASURES, "ms a frame"]
    assert rows["TPR"] == [
        "0.500", "0.250 to 0.750", "2 of 4 anomalous frames above the threshold"
    ]  # fmt: skip
    assert rows["FPR"][2] == "3 of 6 nominal frames; target 0.05"
    assert rows["pixel AP"][2] == "whole image, 1 % of the pixels are anomalous"
    assert rows["sIoU, PPV, F1 calibrated"][::2] == [
        "0.500 0.500 0.500", "from 50 px (anomalies: 10 px)"
    ]  # fmt: skip
    assert rows["ms a frame"] == ["12.3", "", "median; p95 20.0"]


def test_rows_without_a_meaning_are_left_out() -> None:
    rows = shown(localized=None)
    assert not {"localized", "alarm TPR", "alarm FPR"} & set(rows)


@pytest.mark.parametrize(
    ("changes", "name", "remark"),
    [
        ({"threshold": None}, "TPR", "no threshold: the index is not calibrated"),
        ({"threshold": None, "frame_score": "given"}, "FPR", "no threshold given"),
        ({"frame_score": "given"}, "frame AUROC", "given"),
        ({"target_false_alarm_rate": None}, "FPR", "3 of 6 nominal frames; threshold set by hand"),
        ({"frames_anomalous": 0}, "frame AUROC", "needs anomalous and nominal frames"),
        (
            {"pixels": {"anomalous": 0, "normal": 9, "roi": "region of interest"}},
            "pixel AP",
            "no anomalous pixels in the masks within the region of interest",
        ),
        ({"pixel_threshold_oracle": None}, "sIoU, PPV, F1 oracle", "no threshold"),
    ],
)
def test_remarks_explain_undefined_measures(
    changes: dict[str, Any], name: str, remark: str
) -> None:
    assert shown(**changes)[name][2] == remark


def test_numbers() -> None:
    assert (figure(0.12345), figure(1.0, 1), figure(None)) == ("0.123", "1.0", "-")
    assert (percent(0.125), percent(None)) == ("12.5 %", "-")
    assert (interval([0.1, 1]), interval(None)) == ("0.100 to 1.000", "")
