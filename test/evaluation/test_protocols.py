"""Protocols: what is in their indexes, and that no scored frame is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from worlds.colours import ColourEmbedder, street
from worlds.labelled_drive import make_dataset

from semantic_anomaly.cli import main
from semantic_anomaly.errors import CalibrationError, InputError
from semantic_anomaly.evaluation import protocols
from semantic_anomaly.evaluation.datasets import LabelledFolder
from semantic_anomaly.evaluation.evaluate import evaluate
from semantic_anomaly.evaluation.protocols import Reference, SelfNominal
from semantic_anomaly.io.images import write_image
from semantic_anomaly.settings import Settings

SETTINGS = Settings(dedup_distance=0.0, neighbours=1)


def references(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        write_image(folder / f"{number}.png", street(900 + number).image)
    return folder


@pytest.mark.parametrize(("count", "name"), [(1, "one-reference"), (3, "n-reference")])
def test_references_are_the_index(tmp_path: Path, count: int, name: str) -> None:
    dataset = LabelledFolder(make_dataset(tmp_path / "set", "..oo"))
    sources = [references(tmp_path / "refs", count)]
    protocol = Reference(SETTINGS, "camera", sources, dataset, ColourEmbedder())
    detector = protocol.detector_of(dataset.truths[0])
    assert {n.partition("/")[0] for n in detector.index.frame_names} == {"refs"}
    results = evaluate(protocol, dataset)
    assert results["protocol"] == name
    assert results["protocol_detail"] == {"references": count}
    assert results["frame_auroc"] == 1.0 and results["tpr"] is None


def test_a_reference_that_is_scored_is_refused(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "set", "..oo")
    dataset = LabelledFolder(root)
    with pytest.raises(CalibrationError, match=r"has seen frame 'set/00001\.png'"):
        Reference(SETTINGS, "camera", [f"{root}[1:2]"], dataset, ColourEmbedder())
    others = LabelledFolder(f"{root}[1:]")
    Reference(SETTINGS, "camera", [f"{root}[0:1]"], others, ColourEmbedder())


def test_self_nominal_indexes_other_folds_and_normal_pixels_alone(tmp_path: Path) -> None:
    dataset = LabelledFolder(make_dataset(tmp_path / "set", "oooooo"))
    protocol = SelfNominal(SETTINGS, "camera", dataset, ColourEmbedder(), folds=3)
    seen = []
    for truth in dataset.truths:
        detector = protocol.detector_of(truth)
        names = {name.partition("/")[2] for name in detector.index.frame_names}
        assert truth.file not in names and len(names) == 4
        seen.append(frozenset(names))
        # Magenta is in every image and in no index: its pixels are anomalies in every one.
        frame = next(frame for frame, other, _ in dataset if other == truth)
        assert detector.detect(frame).score > 0.1
    assert len(set(seen)) == 3 and seen[0] == seen[1]
    results = evaluate(protocol, dataset)
    assert (results["protocol"], results["protocol_detail"]) == ("self-nominal", {"folds": 3})
    assert results["pixel_ap"] > 0.5


def test_a_set_of_one_image_has_no_others(tmp_path: Path) -> None:
    dataset = LabelledFolder(make_dataset(tmp_path / "set", "o"))
    with pytest.raises(InputError, match="at least two images, found 1"):
        SelfNominal(SETTINGS, "camera", dataset, ColourEmbedder())
    two = LabelledFolder(make_dataset(tmp_path / "two", "oo"))
    assert SelfNominal(SETTINGS, "camera", two, ColourEmbedder()).detail == {"folds": 2}


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("name", ["one-reference", "self-nominal"])
def test_the_command_takes_protocols(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setattr(protocols, "_load_embedder", lambda _: ColourEmbedder())
    argv = ["evaluate", str(make_dataset(tmp_path / "set", ".o")), "--protocol", name]
    argv += ["--out", str(tmp_path / "out"), "--set", "input_size=128", "--set", "variant=grid"]
    if name == "one-reference":
        argv += ["--reference", str(references(tmp_path / "refs", 1))]
    assert main(argv) == 0
    assert f"set, protocol {name}: 2 frames, 1 anomalous" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["protocol"] == name and results["frame_auroc"] is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--index: needed by the protocol drive"),
        (["--protocol", "n-reference"], "--reference: for the reference protocols"),
        (["--protocol", "n-reference", "--reference", "refs"], "found 1 reference images"),
    ],
)
def test_protocols_that_do_not_fit_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    root = make_dataset(tmp_path / "set", ".o")
    references(tmp_path / "refs", 1)
    options = [str(tmp_path / "refs") if option == "refs" else option for option in options]
    argv = ["evaluate", str(root), "--out", str(tmp_path / "out"), "--set", "input_size=320"]
    assert main([*argv, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
