"""Folders of pretrained networks: what is read, and how incomplete or altered ones are refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from semantic_anomaly.embedding import pretrained
from semantic_anomaly.embedding.backbone import _OPTIONAL_WEIGHTS, open_backbone
from semantic_anomaly.embedding.pretrained import (
    choose_device,
    choose_dtype,
    load_network,
    open_folder,
    shipped_backbones,
)
from semantic_anomaly.errors import BackboneError


@pytest.fixture
def copy(tiny_backbone: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_backbone, tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "remove"}))


Damage = Callable[[Path], object]


def config(**changes: Any) -> Damage:
    return lambda folder: edit(folder / "config.json", **changes)


def preprocessor(**changes: Any) -> Damage:
    return lambda folder: edit(folder / "preprocessor_config.json", **changes)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def flip_last_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def load(folder: Path) -> None:
    opened = open_backbone(str(folder))
    assert len(opened.weights_sha256) == 64
    load_network(opened, transformers.AutoModel, _OPTIONAL_WEIGHTS)


def test_a_complete_folder_is_read(tiny_backbone: Path) -> None:
    folder = open_backbone(str(tiny_backbone))
    assert (folder.model_id, folder.revision) == ("tiny_dinov2", "")
    assert (folder.architecture, folder.default_layers) == ("dinov2", (3,))
    assert folder.mean == (0.485, 0.456, 0.406) and folder.rescale == pytest.approx(1 / 255)
    load(tiny_backbone)


def test_digests_follow_weights_and_both_configurations(copy: Path) -> None:
    before = open_backbone(str(copy))
    digests = {before.config_sha256}
    preprocessor(image_mean=[0.5, 0.5, 0.5])(copy)
    digests.add(open_backbone(str(copy)).config_sha256)
    config(layer_norm_eps=0.5)(copy)
    digests.add(open_backbone(str(copy)).config_sha256)
    assert len(digests) == 3
    weights_digest = before.weights_sha256
    flip_last_bit(copy / "model.safetensors")
    assert open_backbone(str(copy)).weights_sha256 != weights_digest


def shard(folder: Path) -> list[str]:
    """Split the weights into several files, as transformers does for large networks."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, mapping = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        name = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({k: tensors[k] for k in part}, folder / name, {"format": "pt"})
        mapping.update(dict.fromkeys(part, name))
    index = {"metadata": {"total_size": 0}, "weight_map": mapping}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sorted(set(mapping.values()))


def test_sharded_weights_are_read_and_every_shard_counts(copy: Path) -> None:
    shards = shard(copy)
    load(copy)
    digests = {open_backbone(str(copy)).weights_sha256}
    for name in shards:
        flip_last_bit(copy / name)
        digests.add(open_backbone(str(copy)).weights_sha256)
    assert len(digests) == 3


def test_missing_shards_and_shards_outside_the_folder_are_refused(copy: Path) -> None:
    shards = shard(copy)
    index = copy / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for odd in ("../other.safetensors", "weights.bin", 3):
        edit(index, weight_map={**good["weight_map"], "layernorm.bias": odd})
        with pytest.raises(BackboneError, match="weight_map"):
            load(copy)
    index.write_text(json.dumps(good))
    (copy / shards[1]).unlink()
    with pytest.raises(BackboneError, match=shards[1]):
        load(copy)


FOLDER_FAULTS: dict[str, tuple[Damage, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
    "config cut": (lambda f: (f / "config.json").write_text('{"model_type'), "not JSON"),
    "config list": (lambda f: (f / "config.json").write_text("[]"), "JSON object"),
    "no preprocessor": (
        lambda f: (f / "preprocessor_config.json").unlink(),
        "preprocessor_config.json: No such file.*config.json",
    ),
    "no mean": (
        preprocessor(image_mean="remove"),
        "image_mean: expected 3 finite numbers, found None",
    ),
    "two means": (preprocessor(image_mean=[0, 0]), "image_mean"),
    "zero std": (preprocessor(image_std=[1, 1, 0]), "image_std"),
    "nan std": (preprocessor(image_std=[1, 1, float("nan")]), "image_std"),
    "odd rescale": (preprocessor(rescale_factor="255"), "rescale_factor"),
    "type of another type": (config(model_type=["dinov2"]), "is not supported here"),
    "text model": (config(model_type="bert"), "'bert' is not supported"),
    "odd layers": (config(out_indices=["a"]), "out_indices"),
    "timm weights": (config(use_pretrained_backbone=True), "use_pretrained_backbone"),
    "other weights": (config(transformers_weights="model.safetensors"), "transformers_weights"),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapters"),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "safetensors only.*pytorch_model.bin",
    ),
    "weights cut": (lambda f: os.truncate(f / "model.safetensors", 1000), "copy"),
    "layer missing": (weights(lambda w: w.pop("layernorm.weight")), "1 missing: layernorm.weight"),
    "more layers in config": (
        config(num_hidden_layers=5, out_features=None, out_indices=None),
        "missing: encoder.layer",
    ),
    "other width": (config(hidden_size=64), "copy"),
    "surplus weights": (
        weights(lambda w: w.update({"neck.weight": torch.zeros(3)})),
        "1 unexpected: neck.weight",
    ),
    "nan weight": (
        weights(lambda w: w["layernorm.weight"].fill_(float("nan"))),
        "'layernorm.weight' are not finite",
    ),
}


@pytest.mark.parametrize("fault", sorted(FOLDER_FAULTS))
def test_faults_are_named(copy: Path, fault: str) -> None:
    damage, message = FOLDER_FAULTS[fault]
    damage(copy)
    with pytest.raises(BackboneError, match=message) as caught:
        load(copy)
    assert "'copy'" in str(caught.value) and "\n" not in str(caught.value)


def test_heads_and_poolers_are_optional(copy: Path) -> None:
    heads = {"classifier.weight": torch.zeros(2, 64), "classifier.bias": torch.zeros(2)}
    weights(lambda w: (w.update(heads), w.pop("embeddings.mask_token")))(copy)
    load(copy)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_configurations_that_never_end_or_nest_too_deep_are_refused(copy: Path, name: str) -> None:
    for depth in (100, 900, 100_000):
        content = (copy / name).read_text()
        (copy / name).write_text('{"deep": ' + "[" * depth + "]" * depth + "," + content[1:])
        with pytest.raises(BackboneError, match=f"{name} is not JSON: the values nest too deep"):
            open_folder("backbone", str(copy), ["dinov2"])
        (copy / name).write_text(content)
    (copy / name).unlink()
    (copy / name).symlink_to("/dev/zero")
    with pytest.raises(BackboneError, match="expected a regular file"):
        open_folder("backbone", str(copy), ["dinov2"])


def test_weights_that_cannot_be_read_are_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(pretrained, "sha256_file", refuse)
    with pytest.raises(BackboneError, match=f"backbone '{copy.name}': weights: Permission denied"):
        _ = open_folder("backbone", str(copy), ["dinov2"]).weights_sha256


def test_more_layers_than_weights_are_refused_before_they_are_created(copy: Path) -> None:
    edit(copy / "config.json", num_hidden_layers=10**9)
    with pytest.raises(BackboneError, match=r"num_hidden_layers: expected at most \d+, the number"):
        load_network(open_folder("backbone", str(copy), ["dinov2"]), transformers.Dinov2Model)


def test_code_in_a_folder_is_not_run(copy: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    (copy / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass EvilModel: ...\n")
    config(auto_map={"AutoModel": "evil.EvilModel"})(copy)
    load(copy)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["", "~/none", "./none", "a/b/c"])
def test_missing_folders_are_not_taken_for_names(name: str) -> None:
    with pytest.raises(BackboneError, match="expected a folder, found none"):
        open_backbone(name)


def test_hub_ids_that_were_not_downloaded_name_the_command() -> None:
    with pytest.raises(BackboneError, match="hf download nobody/nothing"):
        open_backbone("nobody/nothing")


def test_downloaded_hub_ids_are_read_from_the_cache(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    store = tmp_path / "models--some--dinov2"
    shutil.copytree(tiny_backbone, store / "snapshots" / commit)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = open_backbone("some/dinov2")
    assert (folder.model_id, folder.revision) == ("some/dinov2", commit)


def test_shipped_names_come_first_and_similar_ones_are_suggested(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "SHIPPED", tmp_path)
    shutil.copytree(tiny_backbone, tmp_path / "street_tiny")
    assert shipped_backbones() == ["street_tiny"]
    assert open_backbone("street_tiny").model_id == "street_tiny"
    with pytest.raises(BackboneError, match=r"did you mean 'street_tiny'\?"):
        open_backbone("street_tinny")


def test_relative_and_home_folders_are_found(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parent)
    monkeypatch.setenv("HOME", str(copy.parent))
    for name in ("copy", "./copy", "~/copy", "copy/"):
        assert open_backbone(name).model_id == "copy"
    monkeypatch.chdir(copy)
    assert open_backbone(".").model_id == "copy"


def test_messages_name_the_role_of_the_network(copy: Path) -> None:
    assert open_folder("segmenter", str(copy), ("dinov2",)).what == "segmenter 'copy'"
    with pytest.raises(BackboneError, match=r"segmenter 'copy': .* expected one of: sam2, vit$"):
        open_folder("segmenter", str(copy), ("vit", "sam2"))


def test_heads_are_required_where_nothing_is_optional(copy: Path) -> None:
    weights(lambda w: w.pop("embeddings.mask_token"))(copy)
    with pytest.raises(BackboneError, match=r"1 missing: embeddings\.mask_token"):
        load_network(open_backbone(str(copy)), transformers.AutoModel)


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x"])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(BackboneError, match=f"device '{name}': expected auto, cpu, cuda"):
        choose_device(name)


def test_missing_devices_and_unknown_precisions_are_refused() -> None:
    with pytest.raises(BackboneError, match=r"device 'cuda:99': expected a CUDA device, found \d"):
        choose_device("cuda:99")
    with pytest.raises(BackboneError, match="dtype 'int8'"):
        choose_dtype("int8", torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_is_not_replaced_silently() -> None:
    with pytest.raises(BackboneError, match="expected a CUDA device, found 0"):
        choose_device("cuda")


def test_device_and_precision_are_chosen() -> None:
    cpu = choose_device("cpu")
    assert cpu == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_dtype("auto", cpu) is torch.float32
    assert choose_dtype("bfloat16", cpu) is torch.bfloat16
