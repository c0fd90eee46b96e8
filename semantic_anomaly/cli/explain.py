"""List the nominal entries that are nearest to a part of an image."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

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
        "--count",
        type=positive,
        default=20,
        metavar="N",
        help="entries listed of each stage (default 20)",
    )
    parser.add_argument(
        "--nearest",
        type=positive,
        default=_NEAREST,
        metavar="K",
        help=f"nearest entries of each embedding (default {_NEAREST})",
    )
    add_detector_options(parser)


def run(args: argparse.Namespace) -> int:
    """List the entries nearest to a box by stage, and draw them."""
    from semantic_anomaly.detection import explain as explanation
    from semantic_anomaly.detection.detector import load_detector
    from semantic_anomaly.index import edits as index_edits
    from semantic_anomaly.io.images import refuse_other_suffix, write_image
    from semantic_anomaly.scoring.distances import FrameScorer
    from semantic_anomaly.storage import refuse_unwritable

    if args.out is not None:
        refuse_other_suffix(args.out)
        refuse_unwritable(args.out)
    settings, camera = settings_of(args, args.index)
    image = _image(args)
    detector = load_detector(settings, camera)
    grid = detector.embedder.embed([image])[0]
    index, roi, box = detector.index, detector.roi, tuple(args.box)
    explanations = [
        entry
        for of_stage in explanation.explain(
            index, grid, roi, detector.normalisations, box, args.nearest
        )
        for entry in of_stage[: args.count]
    ]
    rows = [
        (e.entry, e.frame, f"{e.row}", f"{e.col}", f"{e.distance:.3f}", f"{e.embeddings}")
        for e in explanations
    ]
    print(table(rows, ("entry", "frame", "row", "col", "deviations", "embeddings")))
    versions = [("with all entries", index)]
    numbers: dict[int, list[int]] = {}
    for entry in explanations:
        numbers.setdefault(entry.stage, []).append(entry.number)
    # An index whose every entry is listed cannot be shown without them.
    if all(len(listed) < index.stages[stage].count for stage, listed in numbers.items()):
        rest = index_edits.retract(index, numbers)
        versions.append((f"without these {len(explanations)} entries", rest))
    summary = []
    for name, version in versions:
        frame_score = FrameScorer(version, detector.settings, roi).score(
            grid, detector.normalisations, detector.threshold
        )
        finest = max(grid.stages, key=lambda stage_grid: stage_grid.grid_hw)
        inside = explanation.patches_of_box(finest, roi, box)
        values = frame_score.anomaly_map[inside]
        summary.append((name, f"{values.mean():.4f}", f"{values.max():.4f}"))
    threshold = detector.threshold
    summary.append(("threshold", "-" if threshold is None else f"{threshold:.4f}", ""))
    print("\nanomaly map in the box")
    print(table(summary, ("", "mean", "largest")))
    print(f"\nentry numbers belong to index {index.fingerprint[:16]}")
    if args.out is not None:
        write_image(args.out, explanation.draw_explanations(image, box, index, explanations))
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
