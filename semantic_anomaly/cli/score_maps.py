"""Measure score maps of any method, exactly as `evaluate` measures its own."""

from __future__ import annotations

import argparse
from pathlib import Path

from semantic_anomaly.cli.options import add_components_option, add_layout_option
from semantic_anomaly.cli.tables import table
from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.measures import HEADER, measure_rows


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
        help="frame scores by file name, or a results.json (default: the mean of the largest "
        "--tail-percent of a map's pixels)",
    )
    parser.add_argument("--tail-percent", type=float, default=1.0, metavar="Q")
    parser.add_argument(
        "--threshold", type=float, metavar="T", help="threshold of the frame scores"
    )
    parser.add_argument(
        "--pixel-threshold",
        type=float,
        metavar="T",
        help="threshold of the maps, chosen beforehand",
    )
    parser.add_argument(
        "--protocol", default="", metavar="NAME", help="name of the protocol, for compare"
    )
    add_layout_option(parser)
    add_components_option(parser)


def run(args: argparse.Namespace) -> int:
    """Measure the maps, write results.json and print its measures."""
    from semantic_anomaly.evaluation.checkpoint import refuse_other_content
    from semantic_anomaly.evaluation.exports import (
        RESULTS,
        WRITTEN,
        MapFolder,
        read_scores,
        score_maps,
    )
    from semantic_anomaly.evaluation.layouts import open_dataset

    if not 0 < args.tail_percent <= 100:
        raise InputError(f"--tail-percent: expected (0, 100], found {args.tail_percent:g}")
    refuse_other_content(args.out, RESULTS, WRITTEN)
    scores = read_scores(args.scores) if args.scores else None
    dataset = open_dataset(args.dataset, args.layout, progress=True)
    results = score_maps(
        MapFolder(args.maps, dataset, progress=True),
        dataset,
        args.out,
        limits=args.components,
        scores=scores,
        threshold=args.threshold,
        pixel_threshold=args.pixel_threshold,
        tail_percent=args.tail_percent,
        protocol=args.protocol,
        progress=True,
    )
    frames, anomalous = results["frames_counted"], results["frames_anomalous"]
    print(f"{results['dataset']}: {frames} frames, {anomalous} anomalous\n")
    print(table(measure_rows(results), HEADER))
    print(f"wrote {args.out}")
    return 0
