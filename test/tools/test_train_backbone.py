"""The trainer of the shipped backbone, and the shipped backbone itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, ConvNextConfig, ConvNextModel
from worlds.backbones import PREPROCESSOR

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import train_backbone  # noqa: E402

SHIPPED = ROOT / "semantic_anomaly" / "backbones" / "street_small"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    config = ConvNextConfig(
        patch_size=4, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], layer_scale_init_value=1.0
    )
    ConvNextModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


def arguments(out: Path, *more: str) -> list[str]:
    few = "--street-drives 0 --textures 2 --steps 3 --batch 2 --save-every 2 --device cpu"
    return ["--out", str(out), *few.split(), *more]


def load(folder: Path) -> nn.Module:
    model, info = AutoModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.slow
def test_training_is_reproducible_and_makes_a_loadable_backbone(
    tmp_path: Path, teacher: Path
) -> None:
    taught = ["--teacher", str(teacher), "--teacher-layers", "1", "2"]
    for name in ("one", "two"):
        assert train_backbone.main(arguments(tmp_path / name, *taught)) == 0
    train_backbone.main(arguments(tmp_path / "other", *taught, "--seed", "1"))
    one, two, other = (
        load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "other")
    )
    torch.manual_seed(0)
    start = train_backbone.make_student().state_dict()
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=0, atol=0)
    assert any(not torch.equal(one[key], start[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)
    processor = json.loads((tmp_path / "one" / "preprocessor_config.json").read_text())
    assert len(processor["image_mean"]) == len(processor["image_std"]) == 3
    with torch.inference_mode():
        states = load(tmp_path / "one")(torch.zeros(1, 3, 360, 640)).last_hidden_state
    assert states.shape == (1, 192, 36, 64)


@pytest.mark.slow
def test_a_run_continues_from_a_folder(tmp_path: Path) -> None:
    train_backbone.main(arguments(tmp_path / "one", "--steps", "1"))
    still = ["--steps", "1", "--lr", "0", "--init", str(tmp_path / "one")]
    train_backbone.main(arguments(tmp_path / "two", *still))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(value, two[key])


@pytest.mark.slow
def test_the_loss_falls(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_backbone, "WARM_UP_STEPS", 1)
    taught = ["--teacher", str(teacher), "--teacher-layers", "2", "--steps", "8"]
    args = train_backbone.parser().parse_args(arguments(tmp_path, *taught))
    images = train_backbone.procedural_images(1, 0)
    sampler = train_backbone.PairSampler([images], [1.0], 0)
    losses = list(train_backbone.Trainer(args, sampler).run())
    assert len(losses) == 8
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_depthwise_convolutions_stay_in_float32_under_autocast() -> None:
    depthwise, dense = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3)
    expected = depthwise(images := torch.rand(1, 4, 8, 8).bfloat16().float())
    train_backbone._keep_depthwise_float32(nn.Sequential(depthwise, dense))
    with torch.autocast("cpu", torch.bfloat16):
        assert dense(images).dtype == torch.bfloat16
        found = depthwise(images.bfloat16())
    torch.testing.assert_close(found, expected)


def test_a_time_budget_ends_the_run(tmp_path: Path) -> None:
    args = train_backbone.parser().parse_args(
        arguments(tmp_path, "--steps", "100000", "--minutes", "1e-9")
    )
    sampler = train_backbone.PairSampler([np.zeros((1, 360, 640, 3), np.uint8)], [1.0], 0)
    assert list(train_backbone.Trainer(args, sampler).run()) == []


def test_views_show_the_same_place_where_the_map_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train_backbone, "photometric", lambda rng, image: image)
    y, x = np.mgrid[:360, :640]
    image = np.stack([x * 255 / 639, y * 255 / 359, 0 * x], -1).astype(np.uint8)
    height, width = train_backbone.VIEW_HW
    for seed in range(10):
        rng = np.random.default_rng(seed)
        clean, first, second, across = train_backbone.make_pair(rng, image)
        np.testing.assert_array_equal(clean, first)
        assert clean.shape == (height, width, 3)
        places = rng.integers(0, (width, height), (200, 2))
        moved = np.rint(np.c_[places, np.ones(200)] @ across.T).astype(int)
        seen = ((moved >= 0) & (moved < (width, height))).all(1)
        assert seen.sum() > 20
        there = second[moved[seen, 1], moved[seen, 0]].astype(int)
        here = first[places[seen, 1], places[seen, 0]].astype(int)
        assert np.abs(there - here).max() <= 2


def test_corresponding_places_of_the_identity_are_the_places_themselves() -> None:
    features = torch.rand(2, 5, 6, 6)
    order = torch.arange(36).expand(2, -1)
    xy = torch.stack([order % 6, order // 6], -1).float()
    identity = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(2, -1, -1)
    target = train_backbone.corresponding(identity, xy, 10.0, (60, 60))
    sampled = nn.functional.grid_sample(features, target[:, :, None], align_corners=False)
    torch.testing.assert_close(sampled[..., 0], features.flatten(2))


def test_losses_prefer_what_they_should() -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 16, 8, 8)
    identity = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(3, -1, -1)
    same = train_backbone.contrast_loss(features, features, identity, (80, 80))
    mixed = train_backbone.contrast_loss(features, features.flip(2), identity, (80, 80))
    assert same < 0.2 * mixed
    unit = nn.functional.normalize(features, dim=1)
    learnt = train_backbone.imitation_loss(unit, unit)
    wrong = train_backbone.imitation_loss(unit.roll(3, 2), unit)
    assert float(learnt) == 0
    assert float(wrong) > 0.05


def test_projected_features_of_the_teacher_keep_their_distances(teacher: Path) -> None:
    model = train_backbone.Teacher(teacher, (1, 2), torch.device("cpu"))
    images = torch.from_numpy(train_backbone.procedural_images(2, 0)).permute(0, 3, 1, 2) / 255
    whole = model(images, (9, 16))
    dim = whole.shape[1]
    assert model.project_on(images, (9, 16), dim) == pytest.approx(1)
    turned = model(images, (9, 16))
    assert not torch.allclose(turned, whole, atol=0.1)

    def products(features: torch.Tensor) -> torch.Tensor:
        flat = features.flatten(2)[0]
        return flat.T @ flat

    torch.testing.assert_close(products(turned), products(whole), rtol=0, atol=1e-4)
    model = train_backbone.Teacher(teacher, (1, 2), torch.device("cpu"))
    kept = model.project_on(images, (9, 16), 6)
    few = model(images, (9, 16))
    assert few.shape == (2, 6, 9, 16)
    energy = (few.square().sum() / whole.square().sum()).item()
    assert kept == pytest.approx(energy, abs=0.02) and 0.5 < kept < 1


def test_a_pasted_thing_lies_where_its_mask_says() -> None:
    other = train_backbone.procedural_images(1, 3)[0]
    sizes = []
    for seed in range(40):
        before = np.full((360, 640, 3), 90, np.uint8)
        image = before.copy()
        mask = train_backbone.paste_thing(image, other, np.random.default_rng(seed))
        again = before.copy()
        train_backbone.paste_thing(again, other, np.random.default_rng(seed))
        np.testing.assert_array_equal(image, again)
        np.testing.assert_array_equal(image[mask == 0], before[mask == 0])
        sizes.append(int((mask > 127).sum()))
        if sizes[-1] > 200:
            assert (image[mask > 127] != 90).any(-1).mean() > 0.5
    assert sum(size > 200 for size in sizes) > 20
    assert max(sizes) < 360 * 640 / 2


def test_training_streets_are_nominal_and_not_those_of_the_evaluation(tmp_path: Path) -> None:
    seed = train_backbone.FIRST_TRAINING_SEED
    assert seed >= 1_000_000
    images = train_backbone.render_drive(seed, 1)
    assert images.shape == (1, 360, 640, 3)
    drive = train_backbone.StreetDrive(seed, frames=train_backbone.FRAMES_BETWEEN)
    frame = drive.frame(seed % train_backbone.FRAMES_BETWEEN)
    assert frame.kind is None
    np.testing.assert_array_equal(images[0], frame.image)


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no pictures"):
        train_backbone.folder_images([tmp_path])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png"):
        train_backbone.folder_images([tmp_path])
    with pytest.raises(ValueError, match="no images"):
        train_backbone.PairSampler([np.empty((0, 360, 640, 3), np.uint8)], [1.0], 0)


def test_shipped_backbone_is_small_whole_and_finite() -> None:
    model = load(SHIPPED)
    assert sum(p.numel() for p in model.parameters()) <= 6_000_000
    assert (SHIPPED / "model.safetensors").stat().st_size <= 12 * MEGABYTE
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_shipped_backbone_tells_places_apart() -> None:
    image = train_backbone.StreetDrive(7, frames=1).frame(0).image
    processor = json.loads((SHIPPED / "preprocessor_config.json").read_text())
    mean, std = np.array(processor["image_mean"]), np.array(processor["image_std"])
    pixels = ((image * processor["rescale_factor"] - mean) / std).astype(np.float32)
    with torch.inference_mode():
        states = load(SHIPPED)(torch.from_numpy(pixels).permute(2, 0, 1)[None]).last_hidden_state
    places = nn.functional.normalize(states[0].flatten(1).T, dim=1)
    assert torch.isfinite(places).all()
    # Without training all places look alike: a mean cosine of nearly 1.
    assert float((places @ places.T).mean()) < 0.8


def test_shipped_backbone_has_a_card_with_its_sources() -> None:
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    for needed in ("license: apache-2.0", "DanielHfnr/Carla-Object-Detection-Dataset", "MIT"):
        assert needed in card
