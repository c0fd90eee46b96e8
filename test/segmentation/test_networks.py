"""Segmentation networks of every family: small random models, saved and loaded again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from semantic_anomaly.errors import BackboneError, ModelOutputError
from semantic_anomaly.segmentation import networks
from semantic_anomaly.segmentation.embedder import load_segmenter
from semantic_anomaly.structures import PatchGrid

MEAN = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
          "layer_type": "basic",
          "out_features": ["stage1", "stage2", "stage3", "stage4"]}  # fmt: skip
SMALL = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_queries": 7,
         "encoder_feedforward_dim": 16, "encoder_layers": 1, "decoder_layers": 2,
         "num_attention_heads": 2, "dim_feedforward": 16, "num_labels": 3}  # fmt: skip
VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64,
       "patch_size": 16, "num_blocks": 1, "num_queries": 7, "num_labels": 3}  # fmt: skip
SQUARE = {"shortest_edge": 64, "longest_edge": 64}


def resnet() -> Any:
    return transformers.ResNetConfig(**RESNET)


def mask2former() -> tuple[Any, dict[str, Any]]:
    config = transformers.Mask2FormerConfig(backbone_config=resnet(), **SMALL)
    processor = {"size": {"shortest_edge": 64, "longest_edge": 128}, "size_divisor": 32}
    return transformers.Mask2FormerForUniversalSegmentation(config), processor


def oneformer() -> tuple[Any, dict[str, Any]]:
    names = {"feature_size": "conv_dim", "mask_feature_size": "mask_dim"}
    small = {names.get(key, key): value for key, value in SMALL.items()}
    config = transformers.OneFormerConfig(
        backbone_config=resnet(),
        text_encoder_vocab_size=64,
        text_encoder_width=16,
        text_encoder_num_layers=1,
        task_seq_len=12,
        **small,
    )
    processor = {"size": {"shortest_edge": 64, "longest_edge": 128}, "num_text": 4,
                 "repo_path": "nobody/nothing", "class_info_file": "absent.json"}  # fmt: skip
    return transformers.OneFormerForUniversalSegmentation(config), processor


def eomt() -> tuple[Any, dict[str, Any]]:
    config = transformers.EomtConfig(**VIT, mlp_ratio=2)
    return transformers.EomtForUniversalSegmentation(config), {"size": SQUARE, "do_pad": True}


def eomt_dinov3() -> tuple[Any, dict[str, Any]]:
    config = transformers.EomtDinov3Config(**VIT, intermediate_size=64)
    model = transformers.EomtDinov3ForUniversalSegmentation(config)
    return model, {"size": SQUARE, "do_pad": True}


def sam2() -> tuple[Any, dict[str, Any]]:
    hiera = transformers.Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[128, 128],
        blocks_per_stage=[1, 2, 3, 2],
        embed_dim_per_stage=[8, 16, 24, 32],
        num_attention_heads_per_stage=[1, 1, 1, 2],
        window_size_per_stage=[8, 4, 4, 2],
        global_attention_blocks=[5],
        window_positional_embedding_background_size=[8, 8],
    )
    vision = transformers.Sam2VisionConfig(
        backbone_config=hiera,
        backbone_channel_list=[32, 24, 16, 8],
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        fpn_hidden_size=32,
    )
    config = transformers.Sam2Config(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 32, "image_size": 128, "mask_input_channels": 8},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2,
                             "iou_head_hidden_dim": 16},
    )  # fmt: skip
    return transformers.Sam2Model(config), {"size": {"height": 128, "width": 128}}


def rf_detr() -> tuple[Any, dict[str, Any]]:
    backbone = {"model_type": "rf_detr_dinov2", "hidden_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 2, "image_size": 64, "patch_size": 16, "num_windows": 1,
                "out_features": ["stage1", "stage2"]}  # fmt: skip
    config = transformers.RfDetrConfig(
        backbone_config=backbone,
        d_model=32,
        decoder_ffn_dim=32,
        decoder_layers=2,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2,
        num_queries=7,
        group_detr=1,
        c2f_num_blocks=1,
        num_labels=3,
    )
    return transformers.RfDetrForInstanceSegmentation(config), {"size": {"height": 64, "width": 64}}


MAKERS = (mask2former, oneformer, eomt, eomt_dinov3, sam2, rf_detr)
FAMILIES = {make.__name__: "universal" for make in MAKERS}
FAMILIES |= {"sam2": "promptless", "rf_detr": "detector"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("segmenters")
    for make in MAKERS:
        torch.manual_seed(0)
        model, processor = make()
        folder = root / make.__name__
        model.eval().save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(processor | MEAN))
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    folder = root / "oneformer"
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "unk_token": "<|endoftext|>",
                 "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
                 "pad_token": "<|endoftext|>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return {name: root / name for name in FAMILIES}


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    # 100 points are two batches.
    monkeypatch.setattr(networks, "_POINTS_PER_SIDE", 10)
    for name, value in (("_MIN_SCORE", 0.0), ("_MIN_IOU", -10.0), ("_STABILITY_OFFSET", 0.0)):
        monkeypatch.setattr(networks, name, value)


def load(folder: Path, device: str = "cpu") -> Any:
    return load_segmenter(FAMILIES.get(folder.name, "detector"), str(folder), device, "float32")


def scene(image_hw: tuple[int, int] = (90, 150)) -> tuple[np.ndarray, PatchGrid]:
    image = np.random.default_rng(0).integers(0, 256, (*image_hw, 3), dtype=np.uint8)
    features = np.ones((2, 3, 1), np.float32)
    return image, PatchGrid(features, image_hw)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_gives_masks(folders: dict[str, Path], lenient: None, name: str) -> None:
    segmenter = load(folders[name])
    for image_hw in ((90, 150), (150, 90)):
        masks = segmenter.segment(*scene(image_hw))
        assert masks.dtype == bool and masks.ndim == 3 and masks.any((1, 2)).all()
        assert len(masks) > 0 or FAMILIES[name] == "universal"
    assert (segmenter.identity.family, segmenter.identity.model_id) == (FAMILIES[name], name)
    segmenter.close()
    with pytest.raises(ModelOutputError, match="closed"):
        segmenter.segment(*scene())


@pytest.mark.parametrize("name", FAMILIES)
def test_there_may_be_no_instances(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for constant, value in (("_MIN_SCORE", 1.0), ("_MIN_IOU", 100.0), ("_POINTS_PER_SIDE", 4)):
        monkeypatch.setattr(networks, constant, value)
    assert len(load(folders[name]).segment(*scene())) == 0


@pytest.mark.parametrize("name", ["mask2former", "sam2", "rf_detr"])
def test_an_output_that_is_not_finite_is_refused(folders: dict[str, Path], name: str) -> None:
    segmenter = load(folders[name])
    for parameter in [p for p in segmenter._model.parameters() if p.ndim > 1][-40:]:
        parameter.fill_(float("nan"))
    with pytest.raises(ModelOutputError, match="finite"):
        segmenter.segment(*scene())


def test_segments_lie_where_the_logits_are(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter = load(folders["mask2former"])

    def forward(pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> Any:
        kind = transformers.models.mask2former.modeling_mask2former
        classes = torch.full((1, 2, 4), -9.0)
        classes[0, 0, 1] = classes[0, 1, 2] = 9.0
        height, width = pixel_values.shape[2] // 4, pixel_values.shape[3] // 4
        inside = int(pixel_mask[0, 0].sum()) // 4
        masks = torch.full((1, 2, height, width), -9.0)
        masks[0, 0, :, : inside // 2] = masks[0, 1, :, inside // 2 :] = 9.0
        return kind.Mask2FormerForUniversalSegmentationOutput(
            class_queries_logits=classes, masks_queries_logits=masks
        )

    monkeypatch.setattr(segmenter._model, "forward", forward)
    masks = segmenter.segment(*scene((90, 150)))
    assert len(masks) == 2
    left = masks[0] if masks[0, 0, 0] else masks[1]
    half = left.shape[1] / 2
    assert abs(left.sum(1) - half).max() <= 2 and left[:, : int(half) - 2].all()


def test_boxes_that_overlap_a_better_one_are_suppressed() -> None:
    masks = torch.zeros((4, 20, 30), dtype=torch.bool)
    masks[0, 2:10, 2:10] = masks[1, 2:10, 2:11] = masks[2, 12:18, 20:29] = True
    masks[3, 2:6, 2:6] = True
    kept = networks._suppress(masks, torch.tensor([0.8, 0.9, 0.7, 0.95]))
    assert kept.tolist() == [3, 1, 2]
    assert networks._suppress(masks[:0], torch.zeros(0)).tolist() == []


def test_folders_that_cannot_be_loaded_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"'mask2former' is not .* one of: rf_detr"):
        load_segmenter("detector", str(folders["mask2former"]), "cpu")
    with pytest.raises(BackboneError, match=r"segmenter 'nobody/nothing'.*hub cache"):
        load(Path("nobody/nothing"))
    with pytest.raises(BackboneError, match="device 'tpu'"):
        load(folders["rf_detr"], "tpu")
    copy = tmp_path / "copy"
    shutil.copytree(folders["rf_detr"], copy)
    (copy / "preprocessor_config.json").write_text(json.dumps(MEAN | {"size": {"height": 0}}))
    with pytest.raises(BackboneError, match="size: expected height and width"):
        load(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_queries": 9}))
    with pytest.raises(BackboneError, match="copy"):
        load(copy)


def test_the_identity_depends_on_the_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    one = load(folders["rf_detr"]).identity
    shutil.copytree(folders["rf_detr"], tmp_path / "same")
    same = load(tmp_path / "same").identity
    assert one.matches(same) and one != same
    torch.manual_seed(1)
    rf_detr()[0].save_pretrained(tmp_path / "same")
    assert not one.matches(load(tmp_path / "same").identity)
