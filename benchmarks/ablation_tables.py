"""The tables of the ablation."""

from __future__ import annotations

from typing import Any

from semantic_anomaly.evaluation.measures import figure

RATES = (0.01, 0.05)


def table(rows: dict[str, dict[str, dict[str, Any]]], name: str) -> str:
    """Return the Markdown table of a test set.

    Args:
        rows: what was measured, by row and test set, and the times as `ms`.
        name: of the test set; rows that lack it are left out.
    """
    heads = ["row", "frame AUROC", *(f"TPR, FPR at {100 * rate:g} %" for rate in RATES)]
    heads += ["drives found at 5 %", "AUROC small, middle, large", "pixel AP", "FPR95", "F1", "ms"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row, found in rows.items():
        if name not in found:
            continue
        m = found[name]
        cells = [figure(m["auroc"]) + _interval(m["auroc_interval"])]
        for rate in RATES:
            r = m["rates"].get(str(rate))
            told = f"{r['tpr']:.3f}, {r['fpr']:.3f}{_interval(r['fpr_interval'])}" if r else "-"
            cells.append(told)
        hit = m["drives"].get(str(RATES[-1]))
        cells.append(f"{hit[0]} of {hit[1]}" if hit else "-")
        cells.append(", ".join(figure(auroc) for _, auroc in m["sizes"]) or "-")
        cells += [figure(m[k]) for k in ("pixel_ap", "pixel_fpr95", "component_f1_oracle")]
        cells.append(figure(found.get("ms", {}).get("median"), 0))
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(ends: tuple[float, float] | None) -> str:
    return f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""
