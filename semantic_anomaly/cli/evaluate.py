"""Measure the detector on labelled images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_anomaly.cli.options import (
    add_components_option,
    add_detector_options,
    add_fleet_options,
    add_layout_option,
    count,
    refuse_fleet_options,
    report_folders,
    settings_of,
    shards_folder,
)
from semantic_anomaly.cli.tables import print_losses, print_reports, report_losses, table
from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.measures import HEADER, figure, measure_rows

if TYPE_CHECKING:
    from semantic_anomaly.settings import Settings

PROTOCOLS = ("drive", "one-reference", "n-reference", "self-nominal")


_MOST_DRIVES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly evaluate`."""
    parser.add_argument(
        "datasets",
        nargs="+",
        metavar="DATASET",
        help="folder with images/, masks/ or labels_masks/ and labels.json; masks are 8-bit PNG of "
        "0 normal, 1 anomaly, 255 ignore, others need --layout; "
        "'DATASET[START:STOP]' takes a part of it",
    )
    parser.add_argument("--index", type=Path, help="folder of the index (protocol drive)")
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default=PROTOCOLS[0],
        help="what is nominal: drive, an index and its calibration from other drives; "
        "one-reference or n-reference, the images of --reference; self-nominal, the normal pixels "
        "of other images of the dataset (default: %(default)s)",
    )
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="SOURCE",
        help="nominal images, as for build-index; may be given several times",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder to write; of several datasets, with a folder for each",
    )
    parser.add_argument(
        "--every", type=count, metavar="N", help="pictures of every N-th frame (default: about 20)"
    )
    parser.add_argument(
        "--save-maps",
        action="store_true",
        help="keep maps/<stem>.npy: float32, height x width, higher is more anomalous",
    )
    parser.add_argument(
        "--allow-seen",
        action="store_true",
        help="evaluate frames that the index was built from; the report warns of them",
    )
    add_layout_option(parser)
    add_components_option(parser)
    add_detector_options(parser, topic=False)
    add_fleet_options(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write the report and print its measures."""
    from semantic_anomaly.evaluation.checkpoint import refuse_other_content
    from semantic_anomaly.evaluation.evaluate import RESULTS, WRITTEN, evaluate
    from semantic_anomaly.evaluation.layouts import open_dataset
    from semantic_anomaly.evaluation.protocols import open_protocol

    if (args.protocol == "drive") != bool(args.index):
        index = "none" if args.index is None else f"'{args.index}'"
        raise InputError(f"--index: needed by the protocol drive only; found {index}")
    if args.protocol.endswith("reference") != bool(args.reference):
        raise InputError(f"--reference: for the reference protocols, found {args.protocol}")
    settings, camera = settings_of(args, args.index)
    folders = report_folders(args.out, _names(args.datasets))
    # Before a backbone is loaded and references are indexed.
    for folder in folders.values():
        refuse_other_content(folder, RESULTS, WRITTEN)
    options = {
        "every": args.every,
        "save_maps": args.save_maps,
        "allow_seen": args.allow_seen,
    }
    if args.ray is not None:
        return _run_on_cluster(args, settings, camera, folders, options)
    refuse_fleet_options(args)
    datasets = []
    for path, folder in zip(args.datasets, folders.values(), strict=True):
        dataset = open_dataset(path, args.layout, progress=True)
        datasets.append(dataset)
        detector: Any = args.index
        detector_options: dict[str, Any] = {"settings": settings, "camera": camera}
        if args.index is None:
            detector = open_protocol(args.protocol, settings, camera, dataset, args.reference, True)
            detector_options = {}
        evaluation = evaluate(
            detector,
            dataset,
            **detector_options,
            out=folder,
            limits=args.components,
            progress=True,
            **options,
        )
        print(_summary(evaluation.results))
        print(f"wrote {folder}")
    return report_losses(datasets)


def _run_on_cluster(
    args: argparse.Namespace,
    settings: Settings,
    camera: str,
    folders: dict[str, Path],
    options: dict[str, Any],
) -> int:
    from semantic_anomaly.evaluation.evaluate import RESULTS
    from semantic_anomaly.evaluation.layouts import open_dataset
    from semantic_anomaly.evaluation.provenance import files_state
    from semantic_anomaly.fleet.cluster import on_nodes
    from semantic_anomaly.fleet.reports import evaluate_dataset, reports_on_cluster
    from semantic_anomaly.io.open import open_source, split_selection

    common = {
        "layout": args.layout,
        "protocol": args.protocol,
        "references": [open_source(reference).opened for reference in args.reference],
        "parameters": on_nodes(settings, args.num_gpus or 0.0).to_parameters(),
        "camera": camera,
        "options": options,
        "limits": [args.components.predicted_px, args.components.truth_px],
    }
    nominal = [args.index] if args.index else [split_selection(r)[0] for r in args.reference]
    requests, keys = {}, {}
    for name, path in zip(folders, args.datasets, strict=True):
        root = split_selection(path)[0]
        if not root.exists():
            # It says what is missing.
            open_dataset(path, args.layout)
        requests[name] = {"dataset": str(Path(path).expanduser().absolute()), **common}
        keys[name] = files_state(root, *nominal)
    reports = reports_on_cluster(
        evaluate_dataset,
        requests,
        keys=keys,
        folders=folders,
        summary=RESULTS,
        address=args.ray,
        shards=shards_folder(args),
        num_gpus=args.num_gpus or 0.0,
        progress=True,
    )
    print_reports(reports, folders, RESULTS, _summary)
    return print_losses(reports.losses.values(), reports.unreadable.items())


def _names(datasets: Sequence[str]) -> list[str]:
    """Return distinct names of datasets."""
    names: list[str] = []
    for dataset in datasets:
        name, number = Path(dataset).name, 2
        while name in names:
            name, number = f"{Path(dataset).name} ({number})", number + 1
        names.append(name)
    return names


def _summary(results: dict[str, Any]) -> str:
    apart = "".join(
        f", {results[f'frames_{name}']} {name}"
        for name in ("ignored", "unknown")
        if results[f"frames_{name}"]
    )
    lines = [
        f"{results['dataset']}, protocol {results['protocol']}: {results['frames_counted']} "
        f"frames, {results['frames_anomalous']} anomalous{apart}",
        "",
        table(measure_rows(results), HEADER),
    ]
    for group in ("kind", "family"):
        rows = [
            (name, f"{m['frames']}", figure(m["tpr"]), figure(m["auroc"]), figure(m["pixel_ap"]))
            for name, m in results[f"by_{group}"].items()
        ]
        if rows:
            lines += ["", table(rows, (group, "frames", "TPR", "AUROC", "pixel AP"))]
    if by_drive := results["false_alarms_by_drive"]:
        rates = [(name, f"{m['frames']}", figure(m["rate"])) for name, m in by_drive.items()]
        header = "drive", "nominal frames", "false-alarm rate"
        lines += ["", table(rates[:_MOST_DRIVES], header)]
        lines += [f"and {len(rates) - _MOST_DRIVES} more"] * (len(rates) > _MOST_DRIVES)
    if results["calibration"]:
        lines += ["", f"promise: {results['calibration']['promise']}"]
    return "\n".join([*lines, *(f"warning: {sentence}" for sentence in results["warnings"])])
