"""Score maps of any method get the same measures as those of `evaluate`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score
from worlds.colours import make_detector
from worlds.labelled_drive import make_dataset

from semantic_anomaly.cli import main
from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.components import SizeLimits
from semantic_anomaly.evaluation.datasets import LabelledFolder
from semantic_anomaly.evaluation.evaluate import evaluate
from semantic_anomaly.evaluation.exports import MapFolder, read_scores, score_maps
from semantic_anomaly.io.images import write_image

LIMITS = SizeLimits(20, 10)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return a folder with a dataset and the report of an evaluation with maps."""
    root = tmp_path_factory.mktemp("maps")
    drive = make_dataset(root / "drive")
    evaluation = evaluate(make_detector(), drive, out=root / "out", limits=LIMITS, save_maps=True)
    return root, evaluation.results


def copied(own: tuple[Path, dict[str, Any]], out: Path, change: Any) -> MapFolder:
    """Return the maps after a change of their values."""
    out.mkdir()
    for file in (own[0] / "out" / "maps").iterdir():
        np.save(out / file.name, change(np.load(file)))
    return MapFolder(out, LabelledFolder(own[0] / "drive"))


def test_own_maps_get_the_same_measures(own: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, expected = own
    threshold = repr(expected["threshold"])
    argv = ["score-maps", str(root / "out" / "maps"), str(root / "drive")]
    argv += ["--out", str(tmp_path / "scored"), "--scores", str(root / "out" / "results.json")]
    argv += ["--threshold", threshold, "--pixel-threshold", threshold, "--components", "20,10"]
    assert main(argv) == 0
    found = json.loads((tmp_path / "scored" / "results.json").read_text())
    names = [
        n for n in found if n.startswith(("component_", "pixel_", "frame_auroc", "tpr", "fpr"))
    ]
    assert len(names) >= 18
    assert {n: found[n] for n in names} == {n: expected[n] for n in names}
    assert found["by_kind"] == expected["by_kind"]


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v * 1000 - 300,
        lambda v: (v.astype(np.float64) - 5) ** 3,
        lambda v: np.float32(1e-4) * v + 3,
    ],
)
def test_only_the_order_of_the_scores_counts(
    own: tuple[Path, dict[str, Any]], tmp_path: Path, change: Any
) -> None:
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
    limit = two["pixel_threshold_oracle"]
    raw = [changed.raw(t) for t in dataset.truths if t.has_pixels]
    same = [coarse.raw(t) > one["pixel_threshold_oracle"] for t in dataset.truths if t.has_pixels]
    for values, above in zip(raw, same, strict=True):
        np.testing.assert_array_equal(values > limit, above)


def test_heavy_tails_cost_less_than_a_thousandth(tmp_path: Path) -> None:
    from sklearn.metrics import average_precision_score, roc_auc_score

    dataset = LabelledFolder(make_dataset(tmp_path / "drive", "....oooo"))
    rng = np.random.default_rng(0)
    (tmp_path / "maps").mkdir()
    for truth in dataset.truths:
        _, _, mask = next(row for row in dataset if row[1] == truth)
        values = rng.standard_cauchy(mask.shape) * 1e3 + 2e3 * mask
        np.save(tmp_path / "maps" / f"{truth.stem}.npy", values.astype(np.float32))
    maps = MapFolder(tmp_path / "maps", dataset)
    found = score_maps(maps, dataset, tmp_path / "out", limits=LIMITS)
    labels = np.concatenate([mask.ravel() for _, _, mask in dataset])
    values = np.concatenate([maps.raw(truth).ravel() for truth in dataset.truths])
    assert found["pixel_ap"] == pytest.approx(average_precision_score(labels, values), abs=1e-3)
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(labels, values), abs=1e-3)
    assert found["frame_score"] == "mean of the largest 1 % pixels"
    assert found["tpr"] is None and found["component_f1_calibrated"] is None


def test_bad_maps_are_refused(own: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, _ = own
    dataset = LabelledFolder(root / "drive")
    with pytest.raises(InputError, match=r"expected <stem>.npy for each frame"):
        MapFolder(tmp_path, dataset)
    cases = {
        "finite numbers": lambda v: np.where(v > v.mean(), np.nan, v),
        r"\(height, width\) of floats, found .* int64": lambda v: v.astype(np.int64),
        r"\(height, width\) of floats, found \(1,": lambda v: v[None],
    }
    for number, (found, change) in enumerate(cases.items()):
        with pytest.raises(InputError, match=found):
            copied(own, tmp_path / str(number), change)
    small = copied(own, tmp_path / "small", lambda v: v[1:])
    with pytest.raises(InputError, match=r"expected .* as its image"):
        score_maps(small, dataset, tmp_path / "out", limits=LIMITS)
    assert not (tmp_path / "out").exists()
    objects = tmp_path / "objects"
    objects.mkdir()
    for truth in dataset.truths:
        np.save(objects / f"{truth.stem}.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read"):
        MapFolder(objects, dataset)


@pytest.mark.parametrize(
    ("text", "found"),
    [("{}", "finite scores"), ('{"a": "b"}', "finite scores"), ("[", "cannot be read")],
)
def test_bad_scores_are_refused(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(InputError, match=found):
        read_scores(path)


def test_a_frame_without_a_score_is_refused(
    own: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root, _ = own
    dataset = LabelledFolder(root / "drive")
    maps = MapFolder(root / "out" / "maps", dataset)
    with pytest.raises(InputError, match=r"none for '00000\.png'"):
        score_maps(maps, dataset, tmp_path / "o", limits=LIMITS, scores={"x": 1.0})


def test_large_sets_fit_into_two_gigabytes(tmp_path: Path, rng: np.random.Generator) -> None:
    for folder in ("images", "masks", "maps"):
        (tmp_path / folder).mkdir()
    image = np.zeros((1024, 2048, 3), np.uint8)
    mask = np.zeros((1024, 2048), np.uint8)
    mask[300:420, 500:700], mask[:, :40] = 1, 255
    values = (rng.random(mask.shape, np.float32) + (mask == 1)).astype(np.float32)
    write_image(tmp_path / "images/0.png", image)
    write_image(tmp_path / "masks/0.png", mask)
    np.save(tmp_path / "maps/0.npy", values)
    for number in range(1, 30):
        for file in ("images/{}.png", "masks/{}.png", "maps/{}.npy"):
            (tmp_path / file.format(number)).hardlink_to(tmp_path / file.format(0))
    code = (
        "import resource, sys; from semantic_anomaly.cli import main; code = main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    argv = ["score-maps", str(tmp_path / "maps"), str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 2_000_000
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["pixels"] == {"anomalous": 30 * 120 * 200, "normal": 30 * (1024 * 2008 - 24000)}
    # Thirty equal images have the measures of one.
    counted = mask.ravel() != 255
    label, score = mask.ravel()[counted] == 1, values.ravel()[counted]
    assert found["pixel_ap"] == pytest.approx(average_precision_score(label, score), abs=1e-3)
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(label, score), abs=1e-3)
