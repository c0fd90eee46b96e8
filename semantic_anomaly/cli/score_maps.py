"""Measure score maps of any method, exactly as `evaluate` measures its own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from semantic_anomaly.cli.evaluate import component_rows, frame_rows
from semantic_anomaly.cli.options import (
    add_components_option,
    add_layout_option,
    component_limits,
)
from semantic_anomaly.cli.tables import figure, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly score-maps`."""
    parser.add_argument(
        "maps",
        type=Path,
        metavar="MAPS",
        help="folder of <stem>.npy, floats of the mask's size, higher is more anomalous",
    )
    parser.add_argument(
        "dataset", metavar="DATASET", help="folder with images/ and masks/, as for evaluate"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--scores",
        type=Path,
        metavar="FILE.json",
        help="frame scores by file name, or a results.json; default: the mean of the largest "
        "--tail-percent of a map's pixels",
    )
    parser.add_argument("--tail-percent", type=float, default=1.0, metavar="Q")
    parser.add_argument("--threshold", type=float, metavar="T", help="of the frame scores")
    parser.add_argument(
        "--pixel-threshold", type=float, metavar="T", help="of the maps, chosen beforehand"
    )
    parser.add_argument(
        "--protocol", default="", metavar="NAME", help="what the method took as nominal"
    )
    add_layout_option(parser)
    add_components_option(parser)


def run(args: argparse.Namespace) -> int:
    """Measure the maps, write results.json and print its figures."""
    from semantic_anomaly.errors import InputError
    from semantic_anomaly.evaluation.maps import (
        RESULTS,
        WRITTEN,
        MapFolder,
        read_scores,
        score_maps,
    )
    from semantic_anomaly.evaluation.published import open_dataset
    from semantic_anomaly.evaluation.reports import refuse_other_content

    if not 0 < args.tail_percent <= 100:
        raise InputError(f"--tail-percent: expected (0, 100], found {args.tail_percent:g}")
    limits = component_limits(args.components)
    refuse_other_content(args.out, RESULTS, WRITTEN)
    scores = read_scores(args.scores) if args.scores else None
    dataset = open_dataset(args.dataset, args.layout)
    results = score_maps(
        MapFolder(args.maps, dataset),
        dataset,
        args.out,
        limits=limits,
        scores=scores,
        threshold=args.threshold,
        pixel_threshold=args.pixel_threshold,
        tail_percent=args.tail_percent,
        protocol=args.protocol,
    )
    print(_summary(results))
    print(f"wrote {args.out}")
    return 0


def _summary(results: dict[str, Any]) -> str:
    frames, anomalous = results["frames_counted"], results["frames_anomalous"]
    at = "" if results["threshold"] is not None else "no threshold given"
    rows = [
        *frame_rows(results, results["frame_score"], at, at),
        ("pixel AP", figure(results["pixel_ap"]), "", ""),
        ("pixel AUROC", figure(results["pixel_auroc"]), "", ""),
        ("pixel FPR95", figure(results["pixel_fpr95"]), "", ""),
        *component_rows(results),
    ]
    head = f"{results['dataset']}: {frames} frames, {anomalous} anomalous"
    return f"{head}\n\n{table(rows, ('measure', 'value', '95 %', 'remark'))}"
