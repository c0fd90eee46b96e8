"""Load a backbone and print how it can be used, and how fast it is on this machine."""

from __future__ import annotations

import argparse
import time

from semantic_anomaly.cli.options import positive
from semantic_anomaly.cli.tables import table

_SIZES = (480, 640, 960, 1280)
_IMAGE_HW = (1080, 1920)
_INDEXED_FRAMES = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly backbone`."""
    parser.add_argument(
        "backbone",
        metavar="FOLDER-OR-NAME",
        help="shipped name, local Hugging Face folder, or hub id already downloaded",
    )
    parser.add_argument("--layer", type=int, metavar="L", help="hidden state; default: recommended")
    parser.add_argument(
        "--sizes",
        type=positive,
        nargs="+",
        default=list(_SIZES),
        metavar="PX",
        help=f"input sizes to time (default {' '.join(map(str, _SIZES))})",
    )
    parser.add_argument(
        "--repeat", type=positive, default=3, metavar="N", help="timed runs for each (default 3)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--execution", default="auto", help="auto, torch or openvino")


def run(args: argparse.Namespace) -> int:
    """Load the backbone, print its properties and time it."""
    import numpy as np

    from semantic_anomaly.embedding.backbone import Backbone, PatchEmbedder
    from semantic_anomaly.embedding.pretrained import shipped_backbones
    from semantic_anomaly.embedding.recommended import RECOMMENDED
    from semantic_anomaly.index.nominal_index import NominalIndex
    from semantic_anomaly.stages import StageSpec

    backbone = Backbone(args.backbone, args.device, args.dtype, args.execution)
    dtype = str(backbone.dtype).removeprefix("torch.")
    recommendation = RECOMMENDED[backbone.folder.architecture]
    is_complete = args.backbone not in shipped_backbones()
    recommended = recommendation.specs(args.backbone, is_complete=is_complete)
    layer = recommended[0].layer if args.layer is None else args.layer
    states = backbone.probe(range(backbone.layers))
    [(chosen, _, dim)] = backbone.probe([layer])
    print(
        table(
            [
                ("backbone", f"{backbone.folder.model_id} ({backbone.folder.architecture})"),
                ("weights", f"sha256 {backbone.weights_sha256[:16]}"),
                ("parameters", f"{backbone.parameters / 1e6:.2f} M"),
                ("device", f"{backbone.device_name}, {dtype} by {backbone.execution}"),
                ("hidden states", f"0 to {backbone.layers - 1}"),
            ]
        )
    )
    rows = [
        (f"{number}", f"{stride}", f"{channels}", "timed below" if number == chosen else "")
        for number, stride, channels in states
    ]
    print("\n" + table(rows, ("hidden state", "stride px", "dimension", "")))
    backbone.close()
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*_IMAGE_HW, 3), dtype=np.uint8)
    timed = []
    for size in args.sizes:
        embedder = PatchEmbedder(
            [StageSpec(args.backbone, chosen, size)],
            **{name: getattr(args, name) for name in ("device", "dtype", "execution")},
        )
        [grid] = embedder.embed([image])
        times_ms = []
        for _ in range(args.repeat):
            begin = time.perf_counter()
            embedder.embed([image])
            times_ms.append((time.perf_counter() - begin) * 1e3)
        embedder.close()
        grid_rows, grid_cols = grid.grid_hw
        size_bytes = NominalIndex.predicted_bytes(_INDEXED_FRAMES * grid_rows * grid_cols, dim)
        timed.append(
            (
                f"{size}",
                f"{grid_rows} x {grid_cols}",
                f"{float(np.median(times_ms)):.0f}",
                f"{size_bytes / 1e6:.0f} MB",
            )
        )
    height, width = _IMAGE_HW
    print(f"\nhidden state {chosen}, images of {width} x {height}, median of {args.repeat} runs")
    columns = ("input px", "grid", "ms per frame", f"index of {_INDEXED_FRAMES} frames, at most")
    print(table(timed, columns))
    print("\nrecommended stages")
    for stage in recommended:
        print(f"  {stage}")
    if recommendation.measured:
        print(f"measured with {recommendation.measured}")
    else:
        print("not measured here; docs/backbones.md has the command that measures them")
    return 0
