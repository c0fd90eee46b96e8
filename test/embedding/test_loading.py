"""Embedders that cannot be what was asked for do not come to be, and failures are told."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worlds.backbones import Averages, images, save_backbone

from semantic_anomaly.embedding.backbone import PatchEmbedder
from semantic_anomaly.errors import BackboneError, ModelOutputError
from semantic_anomaly.settings import Settings

DATA = Path(os.environ.get("SEMANTIC_ANOMALY_DATA", Path(__file__).parents[2] / "shared" / "data"))
MOBILENET = DATA / "weights" / "mobilenet_v1_imagenet"


@pytest.fixture(scope="module")
def embedder(tiny_backbone: Path) -> PatchEmbedder:
    return PatchEmbedder(str(tiny_backbone), input_size=112)


def test_settings_make_the_same_embedder(tiny_backbone: Path) -> None:
    given = {"layers": (1, 2), "input_size": 112, "place_weight": 0.3}
    settings = Settings(backbone=str(tiny_backbone), **given)
    direct = PatchEmbedder(str(tiny_backbone), **given)
    assert PatchEmbedder.from_settings(settings).identity == direct.identity
    assert direct.identity.model_id == "tiny_dinov2"
    assert (direct.identity.layers, direct.identity.input_size) == ((1, 2), 112)


def test_half_precision_is_recorded_and_close(
    tiny_backbone: Path, rng: np.random.Generator
) -> None:
    (image,) = images(rng, (112, 112))
    full = PatchEmbedder(str(tiny_backbone), input_size=112)
    half = PatchEmbedder(str(tiny_backbone), input_size=112, dtype="bfloat16")
    assert (full.identity.dtype, half.identity.dtype) == ("float32", "bfloat16")
    assert full.identity.matches(half.identity)
    one, other = (e.embed([image])[0].features for e in (full, half))
    assert other.dtype == np.float32
    change = 1 - np.einsum("rcd,rcd->rc", one, other)
    assert 0 < change.max() < 0.01


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"device": "cuda:99"}, "device 'cuda:99'"),
        ({"device": "gpu"}, "device 'gpu': expected auto, cpu, cuda"),
        ({"device": "mps"}, "device 'mps': expected auto, cpu, cuda"),
        ({"dtype": "int8"}, "dtype 'int8'"),
    ],
)
def test_devices_and_precisions_that_are_not_there(
    tiny_backbone: Path, keywords: dict[str, str], message: str
) -> None:
    with pytest.raises(BackboneError, match=message):
        PatchEmbedder(str(tiny_backbone), **keywords)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_not_replaced_silently(tiny_backbone: Path) -> None:
    with pytest.raises(BackboneError, match="expected a CUDA device, found 0"):
        PatchEmbedder(str(tiny_backbone), device="cuda")
    assert PatchEmbedder(str(tiny_backbone), input_size=56).identity.dtype == "float32"


@pytest.mark.parametrize("blind_to", ["image", "everything"])
def test_networks_that_see_nothing_fail_their_self_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blind_to: str
) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_backbone(tmp_path / "backbone")
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.patch_embeddings.projection.weight"].zero_()
    if blind_to == "everything":
        weights["layernorm.weight"].zero_()
        weights["layernorm.bias"].zero_()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match="'backbone': self-test"):
        PatchEmbedder(str(folder), input_size=56)


@pytest.mark.parametrize(("width", "warned"), [(1024, True), (64, False)])
def test_large_dinov2_without_registers_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, width: int, warned: bool
) -> None:
    small = {"hidden_size": width, "num_hidden_layers": 1, "mlp_ratio": 1}
    folder = save_backbone(tmp_path / "backbone", **small)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        PatchEmbedder(str(folder), input_size=56)
    assert ("registers" in caplog.text) is warned


def test_loading_prints_nothing(
    tiny_backbone: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    PatchEmbedder(str(tiny_backbone), input_size=56)
    assert capfd.readouterr() == ("", "") and not caplog.text


def test_out_of_memory_is_tried_once_more(
    embedder: PatchEmbedder, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image,) = images(rng, (60, 80))
    expected = embedder.embed([image])[0]
    run, failures = embedder._run_once, 1

    def scarce(batch: np.ndarray) -> Any:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return run(batch)

    monkeypatch.setattr(embedder, "_run_once", scarce)
    np.testing.assert_array_equal(embedder.embed([image])[0].features, expected.features)
    failures = 2
    with pytest.raises(ModelOutputError, match=r"CUDA out of memory\.$"):
        embedder.embed([image])
    monkeypatch.undo()
    np.testing.assert_array_equal(embedder.embed([image])[0].features, expected.features)


def test_what_the_network_raises_or_returns_wrong_is_an_error(
    tiny_backbone: Path, rng: np.random.Generator
) -> None:
    embedder = PatchEmbedder(str(tiny_backbone), input_size=112)
    (image,) = images(rng, (60, 80))
    with torch.no_grad():
        embedder._norm.weight.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(ModelOutputError, match="finite"):
        embedder.embed([image])
    embedder._model = Averages(patch=28)
    with pytest.raises(ModelOutputError, match="backbone failed"):
        embedder.embed([image])


def test_closed_embedders_say_so(tiny_backbone: Path, rng: np.random.Generator) -> None:
    embedder = PatchEmbedder(str(tiny_backbone), input_size=112)
    embedder.warm_up((60, 80))
    embedder.close()
    embedder.close()
    with pytest.raises(ModelOutputError, match="closed"):
        embedder.embed(images(rng, (60, 80)))


@pytest.mark.skipif(not MOBILENET.is_dir(), reason="no pretrained weights at hand")
def test_pretrained_mobilenet(rng: np.random.Generator) -> None:
    embedder = PatchEmbedder(str(MOBILENET), layers=(11, 21), input_size=320)
    assert (embedder.identity.dim, embedder.identity.patch_px) == (1024, 16)
    grid = embedder.embed(images(rng, (180, 320)))[0]
    assert grid.features.shape == (11, 20, 1024)
    # Its last stage is missing, and a network of zeros must not pass.
    with pytest.raises(BackboneError, match="self-test"):
        PatchEmbedder(str(MOBILENET), input_size=320)


def test_identities_differ_by_what_they_say(tiny_backbone: Path) -> None:
    one = PatchEmbedder(str(tiny_backbone), input_size=112).identity
    other = PatchEmbedder(str(tiny_backbone), layers=(1,), input_size=112).identity
    assert one.difference(other) == ("layers", (3,), (1,))
