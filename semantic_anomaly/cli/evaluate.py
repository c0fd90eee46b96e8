"""Measure the detector on labelled images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_anomaly.cli.options import (
    add_components_option,
    add_detector_options,
    add_layout_option,
    component_limits,
    count,
    load_detector,
    settings_of,
)
from semantic_anomaly.cli.tables import figure, table
from semantic_anomaly.errors import InputError

if TYPE_CHECKING:
    from semantic_anomaly.evaluation.protocols import Reference, SelfNominal
    from semantic_anomaly.evaluation.published import Dataset
    from semantic_anomaly.settings import Settings

PROTOCOLS = ("drive", "one-reference", "n-reference", "self-nominal")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly evaluate`."""
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        help="folder with images/, masks/ or labels_masks/ and labels.json; "
        "'DATASET[START:STOP]' takes a part of it",
    )
    parser.add_argument("--index", type=Path, help="folder of the index (protocol drive)")
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default=PROTOCOLS[0],
        help="what is nominal: drive, an index and its calibration from other drives; "
        "one-reference or n-reference, the images of --reference; self-nominal, the normal pixels "
        "of other images of the set (default: %(default)s)",
    )
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="SOURCE",
        help="nominal images, as for build-index; may be given several times",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--every", type=count, metavar="N", help="pictures of every N-th frame (default: about 20)"
    )
    parser.add_argument(
        "--save-maps",
        action="store_true",
        help="keep maps/<stem>.npy: float32, height x width, higher is more anomalous",
    )
    add_layout_option(parser)
    add_components_option(parser)
    add_detector_options(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, write the report and print its figures."""
    from semantic_anomaly.evaluation import extras
    from semantic_anomaly.evaluation.labelled import RESULTS, WRITTEN, evaluate
    from semantic_anomaly.evaluation.published import open_dataset
    from semantic_anomaly.evaluation.reports import refuse_other_content

    extras.require("sklearn.metrics", "matplotlib.figure")
    if (args.protocol == "drive") != bool(args.index):
        found = "none" if args.index is None else f"'{args.index}'"
        raise InputError(f"--index: needed by the protocol drive, and by it alone; found {found}")
    if args.protocol.endswith("reference") != bool(args.reference):
        raise InputError(f"--reference: for the reference protocols, found {args.protocol}")
    limits = component_limits(args.components)
    settings, camera = settings_of(args, args.index)
    refuse_other_content(args.out, RESULTS, WRITTEN)
    dataset = open_dataset(args.dataset, args.layout)
    protocol = None if args.index else _protocol(args, settings, camera, dataset)
    if protocol is None:
        detector = load_detector(args, settings, camera)
    else:
        detector = protocol.detector_of(dataset.truths[0])
    results = evaluate(
        dataset,
        detector,
        args.out,
        every=args.every,
        limits=limits,
        protocol=protocol,
        save_maps=args.save_maps,
    )
    print(_summary(results))
    print(f"wrote {args.out}")
    return 0


def _protocol(
    args: argparse.Namespace, settings: Settings, camera: str, dataset: Dataset
) -> Reference | SelfNominal:
    from semantic_anomaly.evaluation.protocols import Reference, SelfNominal
    from semantic_anomaly.segmentation.embedder import RunningEmbedder

    embedder = RunningEmbedder.from_settings(settings)
    if args.protocol == "self-nominal":
        return SelfNominal(settings, camera, dataset, embedder)
    made = Reference(settings, camera, args.reference, dataset, embedder)
    if made.name != args.protocol:
        images = made.detail["references"]
        raise InputError(f"--protocol {args.protocol}: found {images} reference images")
    return made


def _summary(results: dict[str, Any]) -> str:
    anomalous = results["frames_anomalous"]
    nominal = results["frames_counted"] - anomalous
    lines = [
        f"{results['dataset']}, protocol {results['protocol']}: {results['frames_counted']} "
        f"frames, {anomalous} anomalous"
        + (f", {results['frames_ignored']} ignored" if results["frames_ignored"] else ""),
        "",
        table(_measures(results, anomalous, nominal), ("measure", "value", "95 %", "remark")),
    ]
    for title in ("kind", "family"):
        rows = [
            (name, f"{m['frames']}", figure(m["tpr"]), figure(m["auroc"]), figure(m["pixel_ap"]))
            for name, m in results[f"by_{title}"].items()
        ]
        if rows:
            lines += ["", table(rows, (title, "frames", "TPR", "AUROC", "pixel AP"))]
    if results["calibration"]:
        lines += [f"warning: {sentence}" for sentence in results["calibration"]["warnings"]]
    return "\n".join(lines)


def _measures(results: dict[str, Any], anomalous: int, nominal: int) -> list[tuple[str, ...]]:
    """Return rows of name, value, interval over sequences, and remark."""
    pixels = results["pixels"]
    one_sided = "" if anomalous and nominal else "needs anomalous and nominal frames"
    if results["threshold"] is None:
        above = target = "no threshold: the index is not calibrated"
    else:
        above = f"{_count(results['tpr'], anomalous)} anomalous frames above the threshold"
        rate = results["target_false_alarm_rate"]
        aimed = "threshold set by hand" if rate is None else f"target {rate:g}"
        target = f"{_count(results['fpr'], nominal)} nominal frames; {aimed}"
    share = pixels["anomalous"] / max(pixels["anomalous"] + pixels["normal"], 1)
    inside = f"{pixels['region']}, {100 * share:.2g} % of the pixels are anomalous"
    if not pixels["anomalous"]:
        inside = "no anomalous pixels in the masks" + (
            "" if pixels["region"] == "whole image" else " within the region of interest"
        )
    rows = [
        ("threshold", figure(results["threshold"], 4), "", results["threshold_from"] or "none"),
        *frame_rows(results, one_sided, above, target),
    ]
    if results["localized"] is not None:
        touches = "of the anomalous frames with an alarm: a localization touches the anomaly"
        rows.append(("localized", figure(results["localized"]), "", touches))
    if results["settings"]["confirm_count"] > 1:
        confirmed = "of decisions, confirmed over time"
        rows += [
            ("alarm TPR", figure(results["alarm_tpr"]), "", confirmed),
            ("alarm FPR", figure(results["alarm_fpr"]), "", confirmed),
        ]
    total = results["latency_ms"]["total"]
    return [
        *rows,
        ("pixel AP", figure(results["pixel_ap"]), "", inside),
        ("pixel AUROC", figure(results["pixel_auroc"]), "", ""),
        ("pixel FPR95", figure(results["pixel_fpr95"]), "", ""),
        *component_rows(results),
        ("ms a frame", figure(total["p50"], 1), "", f"median; p95 {total['p95']:.1f}"),
    ]


def frame_rows(results: dict[str, Any], *remarks: str) -> list[tuple[str, ...]]:
    """Return the rows of the frame measures: name, value, interval over sequences, remark."""
    names = {"frame AUROC": "frame_auroc", "TPR": "tpr", "FPR": "fpr"}
    return [
        (
            name,
            figure(results[measure]),
            " to ".join(figure(end) for end in results[f"{measure}_interval"] or ()),
            remark,
        )
        for (name, measure), remark in zip(names.items(), remarks, strict=True)
    ]


def component_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the component measures at both thresholds."""
    limits = results["component_limits"]
    smallest = f"from {limits['predicted_px']} px (anomalies: {limits['truth_px']} px)"
    remarks = {"oracle": f"best pixel F1 afterwards; {smallest}", "calibrated": smallest}
    return [
        (
            f"sIoU, PPV, F1 {name}",
            " ".join(figure(results[f"component_{m}_{name}"]) for m in ("siou", "ppv", "f1")),
            "",
            remark if results[f"pixel_threshold_{name}"] is not None else "no threshold",
        )
        for name, remark in remarks.items()
    ]


def _count(share: float | None, total: int) -> str:
    return f"{round((share or 0.0) * total)} of {total}"
