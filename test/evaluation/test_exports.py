"""Score maps of any method get the same measures as those of `evaluate`."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score
from worlds.colours import make_detector
from worlds.labelled_drive import make_dataset

from semantic_anomaly.cli import main
from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation import figures
from semantic_anomaly.evaluation.components import SizeLimits
from semantic_anomaly.evaluation.datasets import LabelledFolder
from semantic_anomaly.evaluation.evaluate import evaluate
from semantic_anomaly.evaluation.exports import MapFolder, read_scores, score_maps
from semantic_anomaly.io.images import write_image

LIMITS = SizeLimits(20, 10)
Own: TypeAlias = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Own:
    """Return a folder with a dataset and the report of an evaluation with maps."""
    root = tmp_path_factory.mktemp("maps")
    drive = make_dataset(root / "drive")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figures, "draw_evaluation", lambda *_: None)
        evaluation = evaluate(
            make_detector(), drive, out=root / "out", every=0, limits=LIMITS, save_maps=True
        )
    return root, evaluation.results


def copied(own: Own, out: Path, change: Any) -> MapFolder:
    """Return the maps after a change of their values."""
    out.mkdir()
    for file in (own[0] / "out" / "maps").iterdir():
        np.save(out / file.name, change(np.load(file)))
    return MapFolder(out, LabelledFolder(own[0] / "drive"))


def test_own_maps_get_the_same_measures(own: Own, tmp_path: Path) -> None:
    root, expected = own
    threshold = repr(expected["threshold"])
    argv = ["score-maps", str(root / "out" / "maps"), str(root / "drive")]
    argv += ["--out", str(tmp_path / "scored"), "--scores", str(root / "out" / "results.json")]
    argv += ["--threshold", threshold, "--pixel-threshold", threshold, "--components", "20,10"]
    assert main(argv) == 0
    results = json.loads((tmp_path / "scored" / "results.json").read_text())
    names = [
        n for n in results if n.startswith(("component_", "pixel_", "frame_auroc", "tpr", "fpr"))
    ]
    assert len(names) >= 18
    assert {n: results[n] for n in names} == {n: expected[n] for n in names}
    assert results["by_kind"] == expected["by_kind"]


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v * 1000 - 300,
        lambda v: 1e-4 * v,
    ],
)
def test_only_the_order_of_the_scores_counts(own: Own, tmp_path: Path, change: Any) -> None:
    root, _ = own
    dataset = LabelledFolder(root / "drive")
    # Few levels, which every one of the changes keeps apart.
    coarse = copied(own, tmp_path / "coarse", lambda v: np.round(v * 16) / 16)
    changed = copied(own, tmp_path / "changed", lambda v: change(np.round(v * 16) / 16))
    kept = read_scores(root / "out" / "results.json")
    one, two = (
        score_maps(maps, dataset, tmp_path / name, limits=LIMITS, scores=kept)
        for name, maps in (("one", coarse), ("two", changed))
    )
    for name in ("pixel_ap", "pixel_auroc", "pixel_fpr95", "component_f1_oracle"):
        assert two[name] == pytest.approx(one[name], abs=1e-9), name
    assert one["maps_sha256"] != two["maps_sha256"]
    for truth in dataset.truths:
        np.testing.assert_array_equal(
            changed.raw(truth) > two["pixel_threshold_oracle"],
            coarse.raw(truth) > one["pixel_threshold_oracle"],
        )


def test_heavy_tails_cost_less_than_a_thousandth(tmp_path: Path) -> None:
    dataset = LabelledFolder(make_dataset(tmp_path / "drive", "....oooo"))
    rng = np.random.default_rng(0)
    (tmp_path / "maps").mkdir()
    for _, truth, mask in dataset:
        values = rng.standard_cauchy(mask.shape) * 1e3 + 2e3 * mask
        np.save(tmp_path / "maps" / f"{truth.stem}.npy", values.astype(np.float32))
    maps = MapFolder(tmp_path / "maps", dataset)
    results = score_maps(maps, dataset, tmp_path / "out", limits=LIMITS)
    labels = np.concatenate([mask.ravel() for _, _, mask in dataset])
    values = np.concatenate([maps.raw(truth).ravel() for truth in dataset.truths])
    assert results["pixel_ap"] == pytest.approx(average_precision_score(labels, values), abs=1e-3)
    assert results["pixel_auroc"] == pytest.approx(roc_auc_score(labels, values), abs=1e-3)
    assert results["frame_score"] == "mean of the largest 1 % pixels"
    assert results["tpr"] is None and results["component_f1_calibrated"] is None


def test_bad_maps_are_refused(own: Own, tmp_path: Path) -> None:
    root, _ = own
    dataset = LabelledFolder(root / "drive")
    with pytest.raises(InputError, match=r"expected <stem>.npy for each frame"):
        MapFolder(tmp_path, dataset)
    cases = {
        "finite numbers": lambda v: np.where(v > v.mean(), np.nan, v),
        r"\(height, width\) of floats, found .* int64": lambda v: v.astype(np.int64),
        r"\(height, width\) of floats, found \(1,": lambda v: v[None],
    }
    for number, (message, change) in enumerate(cases.items()):
        with pytest.raises(InputError, match=message):
            copied(own, tmp_path / str(number), change)
    small = copied(own, tmp_path / "small", lambda v: v[1:])
    with pytest.raises(InputError, match=r"expected .* as its image"):
        score_maps(small, dataset, tmp_path / "out", limits=LIMITS)
    assert not (tmp_path / "out").exists()
    objects = tmp_path / "objects"
    objects.mkdir()
    for truth in dataset.truths:
        np.save(objects / f"{truth.stem}.npy", np.array([{}]))
    with pytest.raises(InputError, match="cannot be read"):
        MapFolder(objects, dataset)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "finite scores"), ('{"a": "b"}', "finite scores"), ("[", "cannot be read")],
)
def test_bad_scores_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_scores(path)


def test_a_frame_without_a_score_is_refused(own: Own, tmp_path: Path) -> None:
    dataset = LabelledFolder(own[0] / "drive")
    maps = MapFolder(own[0] / "out" / "maps", dataset)
    with pytest.raises(InputError, match=r"none for '00000\.png'"):
        score_maps(maps, dataset, tmp_path / "o", limits=LIMITS, scores={"x": 1.0})


def test_memory_does_not_grow_with_the_number_of_maps(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    for folder in ("images", "masks", "maps"):
        (tmp_path / folder).mkdir()
    mask = np.zeros((256, 512), np.uint8)
    mask[75:105, 125:175], mask[:, :10] = 1, 255
    values = (rng.random(mask.shape, np.float32) + (mask == 1)).astype(np.float32)
    write_image(tmp_path / "images/0.png", np.zeros((*mask.shape, 3), np.uint8))
    write_image(tmp_path / "masks/0.png", mask)
    np.save(tmp_path / "maps/0.npy", values)
    for number in range(1, 40):
        for file in ("images/{}.png", "masks/{}.png", "maps/{}.npy"):
            (tmp_path / file.format(number)).hardlink_to(tmp_path / file.format(0))

    def peak_bytes(source: str) -> int:
        dataset = LabelledFolder(source)
        tracemalloc.start()
        maps = MapFolder(tmp_path / "maps", dataset)
        score_maps(maps, dataset, tmp_path / "out", limits=LIMITS)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    peak_bytes(f"{tmp_path}[:1]")
    few = peak_bytes(f"{tmp_path}[:2]")
    assert peak_bytes(str(tmp_path)) < few + 10 * values.nbytes
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["pixels"] == {"anomalous": 40 * 30 * 50, "normal": 40 * (256 * 502 - 1500)}
