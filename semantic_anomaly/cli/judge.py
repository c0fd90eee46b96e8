"""Ask a vision-language model about every frame of a labelled dataset."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from semantic_anomaly.cli import DONE, INCOMPLETE
from semantic_anomaly.cli.options import add_layout_option, count, positive
from semantic_anomaly.cli.tables import listed, report_losses, table
from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.measures import figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `semantic-anomaly judge`."""
    parser.add_argument("dataset", metavar="DATASET", help="labelled images, as for evaluate")
    parser.add_argument(
        "--base-url",
        required=True,
        metavar="URL",
        help="OpenAI-compatible endpoint; the key is read from OPENAI_API_KEY",
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="name of the model there")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--answers",
        type=Path,
        metavar="DIR",
        help="folder that caches answers, to resume a run (default: --out with .answers)",
    )
    parser.add_argument("--parallel", type=positive, default=4, help="number of parallel requests")
    parser.add_argument(
        "--retries", type=count, default=4, help="retries of a request, with back-off"
    )
    parser.add_argument("--timeout-s", type=float, default=60.0, help="timeout of a request")
    parser.add_argument("--image-px", type=positive, default=1024, help="long side of the images")
    parser.add_argument(
        "--prompt", type=Path, metavar="FILE", help="text to send instead of the built-in prompt"
    )
    parser.add_argument(
        "--price",
        metavar="IN,OUT",
        help="price of a million tokens, to report the price of a frame",
    )
    add_layout_option(parser)


def run(args: argparse.Namespace) -> int:
    """Ask, write results.json and print its measures; return 3 if frames have no verdict."""
    from semantic_anomaly.evaluation import extras
    from semantic_anomaly.evaluation.checkpoint import refuse_other_content
    from semantic_anomaly.evaluation.judge import PROMPT, RESULTS, WRITTEN, Judge, judge_dataset
    from semantic_anomaly.evaluation.layouts import open_dataset
    from semantic_anomaly.storage import refuse_unwritable

    extras.require("openai", extra="vlm")
    extras.require("sklearn.metrics", "scipy.stats")
    refuse_other_content(args.out, RESULTS, WRITTEN)
    answers = args.answers or args.out.with_name(f"{args.out.name}.answers")
    refuse_unwritable(answers / "answer.json")
    prompt = PROMPT
    if args.prompt is not None:
        try:
            prompt = args.prompt.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"--prompt '{args.prompt}' cannot be read: {error}") from error
    judge = Judge(
        base_url=args.base_url,
        model=args.model,
        answers=answers,
        parallel=args.parallel,
        retries=args.retries,
        timeout_s=args.timeout_s,
        image_px=args.image_px,
        prompt=prompt,
    )
    price = _price(args.price) if args.price else None
    dataset = open_dataset(args.dataset, args.layout, progress=True)
    results = judge_dataset(dataset, judge, args.out, price=price, progress=True)
    print(_summary(results))
    print(f"wrote {args.out}")
    unknown = [row["name"] for row in results["frames"] if row["decision"] == "unknown"]
    if unknown:
        print(f"warning: no verdict for {listed(unknown)}")
    return INCOMPLETE if report_losses([dataset]) or unknown else DONE


def _price(text: str) -> tuple[float, float]:
    try:
        price_in, price_out = (float(part) for part in text.split(","))
    except ValueError:
        price_in = price_out = -1.0
    if not (0 <= price_in < float("inf") and 0 <= price_out < float("inf")):
        raise InputError(f"--price: expected IN,OUT for a million tokens, found '{text}'")
    return price_in, price_out


def _summary(results: dict[str, Any]) -> str:
    unknown = results["frames_unknown"]
    rows = [
        ("frame AUROC", figure(results["frame_auroc"]), "by its confidence"),
        ("TPR", figure(results["tpr"]), "of the anomalous frames with a verdict"),
        ("FPR", figure(results["fpr"]), "of the nominal frames with a verdict"),
        ("unknown", f"{unknown}", f"of {results['frames_counted']} frames: no verdict"),
    ]
    if results["latency_ms"]:
        total = results["latency_ms"]["total"]
        rows.append(
            ("s a frame", figure(total["p50"] / 1e3, 2), f"median; p95 {total['p95'] / 1e3:.2f}")
        )
    if results["price_a_frame"] is not None:
        rows.append(("price a frame", f"{results['price_a_frame']:.6f}", "by the tokens used"))
    head = f"{results['dataset']}, {results['judge']['model']}: {results['frames_counted']} frames"
    return f"{head}\n\n{table(rows, ('measure', 'value', 'remark'))}"
