"""List the nominal entries that are nearest to a part of an image."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_anomaly.cli.edits import part_of
from semantic_anomaly.cli.options import add_detector_options, positive, settings_of
from semantic_anomaly.cli.tables import table
from semantic_anomaly.errors import SourceError

if TYPE_CHECKING:
    import numpy as np

_NEAREST = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly explain`."""
    parser.add_argument("index", type=Path, metavar="INDEX", help="folder of the index")
    parser.add_argument(
        "image", metavar="IMAGE", help="image file, or one frame of a source: 'SOURCE[12:13]'"
    )
    parser.add_argument(
        "--box", type=float, nargs=4, required=True, metavar=("X0", "Y0", "X1", "Y1"), help="in px"
    )
    parser.add_argument("--out", type=Path, metavar="PICTURE.jpg", help="write a picture")
    parser.add_argument(
        "--count", type=positive, default=20, metavar="N", help="entries listed (default 20)"
    )
    parser.add_argument(
        "--nearest",
        type=positive,
        default=_NEAREST,
        metavar="K",
        help=f"nearest entries of each patch (default {_NEAREST})",
    )
    parser.add_argument(
        "--part",
        metavar="NAME",
        help="'instances': explain the instances in the box; default: its patches",
    )
    add_detector_options(parser)


def run(args: argparse.Namespace) -> int:
    """List the entries nearest to the patches of a box, and draw them."""
    from semantic_anomaly.detection import explain as explanation
    from semantic_anomaly.detection.detector import load_detector
    from semantic_anomaly.index import edits as index_edits
    from semantic_anomaly.io.images import write_image

    settings, camera = settings_of(args, args.index)
    image = _image(args)
    detector = load_detector(settings, camera)
    grid = detector.embedder.embed([image])[0]
    index = part_of(detector.index, args.part)
    box = tuple(args.box)
    inside = explanation.patches_of_box(grid, detector.roi, box)
    gain: Any = 1.0
    offset: Any = 0.0
    if args.part:
        embeddings = explanation.instances_of_box(grid, detector.roi, inside)
    else:
        embeddings = grid.features[inside]
        if detector.normalisations:
            # Distances in the unit of the threshold: unit_mean + unit_deviation * z.
            normalisation = detector.normalisations["grid"]
            mean, deviation = normalisation.parameters(inside, embeddings)
            unit_mean, unit_deviation = normalisation.unit
            gain = unit_deviation / deviation
            offset = unit_mean - gain * mean
    explanations = explanation.explain(index, embeddings, args.nearest, gain=gain, offset=offset)[
        : args.count
    ]
    rows = [
        (f"{e.number}", e.frame, f"{e.row}", f"{e.col}", f"{e.distance:.4f}", f"{e.patches}")
        for e in explanations
    ]
    print(table(rows, ("entry", "frame", "row", "col", "distance", "patches")))
    versions = [("with all entries", index)]
    if len(explanations) < index.count:
        rest = index_edits.retract(index, [e.number for e in explanations])
        versions.append((f"without these {len(explanations)} entries", rest))
    summary = []
    for name, version in versions:
        k = min(detector.settings.neighbours, version.count)
        distances = offset + gain * version.exact_distances(embeddings, k)
        summary.append((name, f"{max(distances.mean(), 0):.4f}", f"{max(distances.max(), 0):.4f}"))
    threshold = None if args.part else detector.threshold
    if not args.part:
        summary.append(("threshold", "-" if threshold is None else f"{threshold:.4f}", ""))
    unit = "instances" if args.part else "patches"
    print(f"\ndistances of the {len(embeddings)} {unit} in the box")
    print(table(summary, ("", "mean", "largest")))
    of_part = f" of part '{args.part}'" if args.part else ""
    print(f"\nentry numbers{of_part} belong to index {index.fingerprint[:16]}")
    if args.out is not None:
        picture = explanation.draw_explanations(image, box, index, explanations, threshold)
        write_image(args.out, picture)
        print(f"wrote {args.out}")
    return 0


def _image(args: argparse.Namespace) -> np.ndarray:
    from semantic_anomaly.io.open import open_source

    frames = list(itertools.islice(open_source(args.image, topic=args.topic), 2))
    if len(frames) > 1:
        raise SourceError(
            f"source '{args.image}': expected one frame, found several; "
            "choose one with SOURCE[N:N+1]"
        )
    return frames[0].image
