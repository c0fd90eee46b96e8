"""Compare anomalib's PatchCore and AnomalyDINO with this package: same frames, same features.

Run it in a separate environment with anomalib and this package installed:

    python -m venv peers && peers/bin/pip install anomalib '.[report]'
    peers/bin/python benchmarks/peers.py DATASET --nominal DRIVE --calibration DRIVE --out OUT

The peers get the embeddings of this package's backbone in place of their own network. Memory bank,
coreset, neighbours, map and frame score are theirs. `score-maps` evaluates their maps with the same
measures as `evaluate`.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from semantic_anomaly.cli import main as command
from semantic_anomaly.detection.detector import load_detector
from semantic_anomaly.evaluation.datasets import LabelledFolder
from semantic_anomaly.evaluation.measures import figure
from semantic_anomaly.io.open import open_source
from semantic_anomaly.segmentation.embedder import RunningEmbedder
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import Frame

_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


class SharedFeatures(torch.nn.Module):
    """Replaces the network in a peer's model; takes images in 0..255."""

    def __init__(self, embedder: RunningEmbedder, tokens: bool) -> None:
        super().__init__()
        self._embedder, self._tokens = embedder, tokens

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return (n, dim, rows, cols) float32, or (n, rows * cols, dim), under 'features'."""
        pixels = images.permute(0, 2, 3, 1).to(torch.uint8).contiguous().numpy()
        grids = self._embedder.embed(list(pixels))
        features = torch.from_numpy(np.stack([grid.features for grid in grids]))
        return {"features": features.flatten(1, 2) if self._tokens else features.movedim(3, 1)}


def patchcore(
    embedder: RunningEmbedder, ratio: float
) -> tuple[torch.nn.Module, Callable[[], None]]:
    """Return PatchCore (Roth et al. 2022) on shared features, and the end of its training."""
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    # Any network of timm serves: it is replaced before use.
    model = PatchcoreModel(layers=["layer1"], backbone="resnet18", pre_trained=False)
    model.layers = ["features"]
    model.feature_extractor = SharedFeatures(embedder, tokens=False)

    def finish() -> None:
        if ratio < 1.0:
            model.subsample_embedding(ratio)
        else:
            model.memory_bank = torch.vstack(model.embedding_store)
            model.embedding_store.clear()

    return model, finish


def anomaly_dino(
    embedder: RunningEmbedder, hw: tuple[int, int]
) -> tuple[torch.nn.Module, Callable[[], None]]:
    """Return AnomalyDINO (Damm et al. 2025) on shared features, and the end of its training.

    The model derives its grid from the image size in square patches. It therefore gets an empty
    image of the grid's size times the patch size; its map is resized to the real size. No coreset,
    as by default.
    """
    from anomalib.models.image.anomaly_dino import torch_model

    class Local(torch_model.AnomalyDINOModel):
        def __init__(self) -> None:
            # The original downloads weights.
            torch.nn.Module.__init__(self)
            self.num_neighbours, self.masking, self.coreset_subsampling = 1, False, False
            [(rows, cols)] = embedder.grids_hw(hw)
            self.patch_size = max(1, round(hw[0] / rows))
            self.input_hw = rows * self.patch_size, cols * self.patch_size
            self.feature_encoder = SharedFeatures(embedder, tokens=True)
            self.register_buffer("memory_bank", torch.empty(0))
            self.embedding_store: list[torch.Tensor] = []
            self.anomaly_map_generator = torch_model.AnomalyMapGenerator()

        def forward(self, images: torch.Tensor) -> Any:
            self.extract_features = lambda _: self.feature_encoder(images)["features"]
            output = super().forward(torch.empty(len(images), 3, *self.input_hw))
            if self.training:
                return output
            maps = torch.nn.functional.interpolate(output.anomaly_map, hw, mode="bilinear")
            return output._replace(anomaly_map=maps)

    model = Local()
    return model, model.fit


@torch.inference_mode()
def measure_peer(
    name: str,
    peer: tuple[torch.nn.Module, Callable[[], None]],
    nominal: list[np.ndarray],
    dataset: str,
    out: Path,
    options: list[str],
) -> dict[str, Any]:
    """Train a peer on nominal images, write its maps, and return their results and times."""
    model, finish = peer
    begin = time.perf_counter()
    model.train()
    for image in tqdm(nominal, f"{name}: nominal", disable=None):
        model(_tensor(image))
    finish()
    model.eval()
    fit_s = time.perf_counter() - begin
    maps, scores = out / f"{name}_maps", {}
    maps.mkdir(parents=True)
    for frame, truth, _ in tqdm(LabelledFolder(dataset), f"{name}: test", disable=None):
        output = model(_tensor(frame.image))
        values = output.anomaly_map.reshape(frame.image_hw).numpy()
        np.save(maps / f"{truth.stem}.npy", values.astype(np.float32))
        scores[truth.file] = float(output.pred_score)
    (out / f"{name}_scores.json").write_text(json.dumps(scores))
    run(["score-maps", str(maps), dataset, "--scores", str(out / f"{name}_scores.json"),
         "--protocol", "drive", "--out", str(out / name), *options])  # fmt: skip
    shutil.rmtree(maps)
    return {
        **json.loads((out / name / "results.json").read_text(encoding="utf-8")),
        "fit_s": fit_s,
        "entries": len(model.memory_bank),
    }


def measure_ours(args: argparse.Namespace, settings: Path, options: list[str]) -> dict[str, Any]:
    """Build, calibrate and evaluate with the commands, and return results and times."""
    index, from_file = str(args.out / "index"), ["--settings", str(settings)]
    begin = time.perf_counter()
    run(["build-index", *args.nominal, "--out", index, *from_file])
    run(["calibrate", index, *args.calibration, *from_file])
    fit_s = time.perf_counter() - begin
    report = args.out / "semantic_anomaly"
    run(["evaluate", args.dataset, "--index", index, "--out", str(report), *from_file, *options])
    results = json.loads((report / "results.json").read_text(encoding="utf-8"))
    return {**results, "fit_s": fit_s, "entries": results["index"]["entries"]}


@torch.inference_mode()
def times_ms(
    calls: dict[str, Callable[[Frame], Any]], dataset: str, count: int
) -> dict[str, float]:
    """Return the median milliseconds of a frame by method; the methods take turns."""
    frames = [frame for frame, _, _ in itertools.islice(LabelledFolder(dataset), count + 1)]
    spent_ms: dict[str, list[float]] = {name: [] for name in calls}
    for number, frame in enumerate(tqdm(frames, "times", disable=None)):
        for name, call in calls.items():
            begin = time.perf_counter()
            call(frame)
            # The first frame prepares what is made once.
            if number:
                spent_ms[name].append((time.perf_counter() - begin) * 1e3)
    return {name: float(np.median(of_method)) for name, of_method in spent_ms.items()}


def run(line: list[str]) -> None:
    """Run a command, and stop with its exit code if it fails."""
    code = command(line)
    if code:
        raise SystemExit(code)


def _forward(model: torch.nn.Module, frame: Frame) -> Any:
    return model(_tensor(frame.image))


def _tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float()


def _import_torchvision() -> None:
    """Import torchvision, also if its compiled part does not fit this build of torch.

    None of its operators is called here, but its import fails without their definitions.
    """
    while True:
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            _OPERATORS.define(f"{missing[1]}(Tensor images) -> Tensor")
            for name in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
                del sys.modules[name]
        else:
            return


def main() -> None:
    """Print a table with one row for each method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="labelled folder, with or without a selection")
    parser.add_argument("--nominal", action="append", required=True, help="source; may be repeated")
    parser.add_argument("--calibration", action="append", required=True, help="only for ours")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--backbone", default="mobilenet_v1", help="NAME-OR-FOLDER[:LAYER]")
    parser.add_argument("--input-size", type=int, help="long side of the backbone's input in px")
    parser.add_argument(
        "--ratio", type=float, action="append", help="PatchCore's coreset; 1: without a coreset"
    )
    parser.add_argument("--timed", type=int, default=20, help="frames that are timed")
    parser.add_argument("--rate", type=float, default=0.05, help="target false-alarm rate")
    parser.add_argument("--components", default="obstacle-track")
    args = parser.parse_args()
    _import_torchvision()
    args.out.mkdir(parents=True)
    backbone, _, layers = args.backbone.partition(":")
    parameters = {"backbone": backbone, "target_false_alarm_rate": args.rate}
    if layers:
        parameters["layers"] = [int(layer) for layer in layers.split(",")]
    if args.input_size:
        parameters["input_size"] = args.input_size
    path = args.out / "settings.yaml"
    path.write_text(yaml.safe_dump({"/**": {"ros__parameters": parameters}}))
    options = ["--components", args.components]
    rows = {"semantic_anomaly": measure_ours(args, path, options)}
    embedder = RunningEmbedder.from_settings(Settings.from_parameters(parameters))
    nominal = [frame.image for source in args.nominal for frame in open_source(source)]
    hw = (nominal[0].shape[0], nominal[0].shape[1])
    ratios = args.ratio or [0.01, 0.1]
    peers = {f"PatchCore, coreset {ratio:.0%}": patchcore(embedder, ratio) for ratio in ratios}
    peers["AnomalyDINO"] = anomaly_dino(embedder, hw)
    for name, peer in peers.items():
        rows[name] = measure_peer(name, peer, nominal, args.dataset, args.out, options)
    detector = load_detector(Settings(index=str(args.out / "index")), "camera")
    calls: dict[str, Callable[[Frame], Any]] = {"semantic_anomaly": detector.detect}
    for name, (model, _) in peers.items():
        calls[name] = partial(_forward, model)
    for name, ms in times_ms(calls, args.dataset, args.timed).items():
        rows[name]["ms"] = ms
    (args.out / "peers.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("| method | frame AUROC | pixel AP | pixel AUROC | FPR95 | component F1, oracle "
          "| entries | fit s | ms a frame |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    measures = ("frame_auroc", "pixel_ap", "pixel_auroc", "pixel_fpr95", "component_f1_oracle")
    for name, row in rows.items():
        cells = [figure(row[measure]) for measure in measures]
        cells += [str(row["entries"]), figure(row["fit_s"], 0), figure(row["ms"], 0)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
