"""Train a small dense backbone from images that the project makes itself, with or without teacher.

Without a teacher: dense contrastive learning between two views of one image with known geometry
(DenseCL, Wang et al. 2021, arXiv 2011.09157). With one, its features are distilled as well: by a
linear head (Hinton et al. 2015, arXiv 1503.02531) and by the cosines between places (relational
knowledge distillation, Park et al. 2019, arXiv 1904.05068), because the nominal index is searched
by cosine. The descriptor itself is trained, there is no projection to throw away. What is shipped
is an exponential moving average of the weights.

The result is a Hugging Face folder: `AutoModel.from_pretrained(out)`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from backbone_data import folder_images, procedural_images, street_images
from backbone_losses import ForeignLoss, Teacher, contrast_loss, taught_losses
from backbone_views import VIEW_PX, PairSampler, ViewPairs
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from transformers import ConvNextConfig, ConvNextModel

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Probabilities of street frames, photographs and procedural pictures.
SHARES = (0.55, 0.25, 0.2)
WARM_UP_STEPS = 100
AVERAGE_DECAY = 0.997
CENTRE_BATCHES = 4


def make_student() -> ConvNextModel:
    """Return the untrained architecture: one descriptor of 160 numbers every 10 pixels."""
    config = ConvNextConfig(
        patch_size=5,
        num_stages=2,
        hidden_sizes=[48, 160],
        depths=[1, 6],
        hidden_act="relu",
        image_size=640,
        layer_scale_init_value=0.1,
    )
    return ConvNextModel(config)


def save_backbone(model: ConvNextModel, out: Path) -> None:
    """Write config, weights and preprocessor config; files there are replaced one by one."""
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    processor = {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 384},
        "crop_pct": 1.0,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    text = json.dumps(processor, indent=2) + "\n"
    (part / "preprocessor_config.json").write_text(text, encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(part.iterdir()):
        # safetensors makes files that only their owner may read.
        path.chmod(0o644)
        path.replace(out / path.name)
    part.rmdir()


class Trainer:
    """The student, its moving average, the teacher if there is one, and the optimiser.

    Args:
        args: as `parser` makes them.
        sampler: gives the batches.
    """

    def __init__(self, args: argparse.Namespace, sampler: PairSampler) -> None:
        torch.manual_seed(args.seed)
        cuda = args.device == "auto" and torch.cuda.is_available()
        self._device = torch.device("cuda" if cuda else args.device.replace("auto", "cpu"))
        self._args, self._sampler = args, sampler
        student = ConvNextModel.from_pretrained(args.init) if args.init else make_student()
        self.student = student.to(self._device, memory_format=torch.channels_last).train()
        self.average = AveragedModel(self.student, multi_avg_fn=_move_average)
        if self._device.type == "cpu":
            _keep_depthwise_float32(self.student)
        self._weights = {"relation": args.relation, "imitation": args.imitation, "contrast": 1.0}
        self._weights["foreign"] = args.foreign
        self._foreign = ForeignLoss()
        self._teacher: Teacher | None = None
        self._head: nn.Conv2d | None = None
        parameters = list(self.student.parameters())
        if args.teacher:
            self._teacher = Teacher(args.teacher, tuple(args.teacher_layers), self._device)
            dim = self.student.config.hidden_sizes[-1]
            self._head = nn.Conv2d(dim, self._teacher.dim, 1).to(self._device)
            parameters += list(self._head.parameters())
            self._weights["contrast"] = args.contrast
        self._optimiser = torch.optim.AdamW(parameters, args.lr, weight_decay=args.weight_decay)
        self._parameters = parameters

    def run(self) -> Iterator[dict[str, float]]:
        """Train, and yield the terms of the loss after every step."""
        args = self._args
        begin, step = time.monotonic(), 0
        with ThreadPoolExecutor(1) as pool:
            self._find_centre()
            following = pool.submit(self._sampler.batch, 0, args.batch)
            while True:
                minutes = (time.monotonic() - begin) / 60
                done = max(step / args.steps, minutes / args.minutes if args.minutes else 0.0)
                if done >= 1:
                    return
                pairs = following.result()
                following = pool.submit(self._sampler.batch, step + 1, args.batch)
                rate = args.lr * 0.5 * (1 + np.cos(np.pi * done))
                for group in self._optimiser.param_groups:
                    group["lr"] = rate * min(1.0, (step + 1) / WARM_UP_STEPS)
                yield self._step(pairs)
                step += 1

    def _step(self, pairs: ViewPairs) -> dict[str, float]:
        terms: dict[str, Tensor] = {}
        taught = None
        # Without a use for them the second views are not looked at: half of the work.
        contrast = self._weights["contrast"] > 0
        views = np.concatenate([pairs.first, pairs.second]) if contrast else pairs.first
        inputs = _normalised(_inputs(views, self._device))
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._args.bfloat16):
            features = self.student(inputs).last_hidden_state
            if self._teacher is not None:
                grid_hw = (features.shape[2], features.shape[3])
                taught = self._teacher(_inputs(pairs.clean, self._device), grid_hw)
        features = features.float()
        first, second = features[: len(pairs.first)], features[len(pairs.first) :]
        if taught is not None and self._head is not None:
            terms = taught_losses(first, taught, self._head)
        if contrast:
            across = torch.from_numpy(pairs.across).to(self._device)
            terms["contrast"] = contrast_loss(first, second, across, VIEW_PX, taught)
        if self._weights["foreign"] > 0:
            masks = torch.from_numpy(pairs.foreign).to(self._device).float() / 255
            nominal = torch.from_numpy(pairs.nominal).to(self._device)
            terms["foreign"] = self._foreign(first, masks, nominal)
        loss = torch.stack([self._weights[name] * term for name, term in terms.items()]).sum()
        self._optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimiser.step()
        self.average.update_parameters(self.student)
        return {name: float(term.detach()) for name, term in terms.items()}

    def _find_centre(self) -> None:
        if self._teacher is None or not self._args.centred:
            return
        # Numbers below zero are no seeds; these batches lie beyond those of any training.
        batches = [self._sampler.batch(2**31 + i, self._args.batch) for i in range(CENTRE_BATCHES)]
        clean = np.concatenate([batch.clean for batch in batches])
        side = VIEW_PX // 10
        self._teacher.centre_on(_inputs(clean, self._device), (side, side))


def train(args: argparse.Namespace) -> dict[str, float]:
    """Train as the arguments say, write the folder, and return the last mean terms of the loss."""
    workers = args.workers or os.cpu_count() or 1
    groups = (
        street_images(args.street_drives, args.street_frames, args.cache, workers),
        folder_images(args.images),
        procedural_images(args.textures, args.seed),
    )
    sampler = PairSampler(groups, SHARES, args.seed, args.pasted)
    trainer = Trainer(args, sampler)
    means: dict[str, float] = {}
    steps = 0
    with tqdm(total=args.steps, desc="train", disable=None) as bar:
        for terms in trainer.run():
            steps += 1
            for name, value in terms.items():
                means[name] = 0.98 * means.get(name, value) + 0.02 * value
            bar.update()
            if steps % args.save_every == 0:
                save_backbone(trainer.average.module, args.out)
            if steps % 25 == 0:
                text = " ".join(f"{name} {value:.4f}" for name, value in means.items())
                bar.set_postfix_str(text)
                if args.log:
                    with args.log.open("a", encoding="utf-8") as log:
                        log.write(f"{steps} {text}\n")
    save_backbone(trainer.average.module, args.out)
    return {**means, "steps": float(steps), "images": float(sampler.count)}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--init", type=Path, help="continue from this folder")
    p.add_argument("--teacher", type=Path, help="Hugging Face folder of a convolutional backbone")
    p.add_argument("--teacher-layers", type=int, nargs="+", default=[11, 21])
    p.add_argument("--images", type=Path, action="append", default=[], help="more pictures")
    p.add_argument("--street-drives", type=int, default=360)
    p.add_argument("--street-frames", type=int, default=8, help="frames of each drive")
    p.add_argument("--textures", type=int, default=400, help="procedural pictures")
    p.add_argument("--cache", type=Path, help="folder that keeps rendered frames")
    p.add_argument("--steps", type=int, default=6000)
    p.add_argument("--minutes", type=float, default=0.0, help="end after so long; 0: by steps")
    p.add_argument("--batch", type=int, default=12, help="pairs of views a step")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--weight-decay", type=float, default=0.02)
    p.add_argument("--relation", type=float, default=16.0, help="weight of the relational term")
    p.add_argument("--imitation", type=float, default=1.0, help="weight of the linear head's term")
    p.add_argument("--contrast", type=float, default=0.1, help="its weight beside a teacher")
    p.add_argument("--foreign", type=float, default=0.0, help="weight of the pasted shapes' term")
    p.add_argument("--pasted", type=float, default=0.3, help="share of images with pasted shapes")
    p.add_argument("--centred", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--bfloat16", action="store_true", help="faster where the hardware has it")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--workers", type=int, default=0, help="processes that render; 0: one a core")
    p.add_argument("--save-every", type=int, default=250)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--log", type=Path, help="append the losses to this file")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Train from the command line and print the summary as JSON."""
    args = parser().parse_args(argv)
    print(json.dumps(train(args)))
    return 0


def _move_average(
    averages: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int
) -> None:
    # The early average forgets faster, or it would keep the random start for long.
    decay = min(AVERAGE_DECAY, (1 + int(count)) / (10 + int(count)))
    torch._foreach_lerp_(list(averages), list(current), 1 - decay)


def _keep_depthwise_float32(model: nn.Module) -> None:
    # On CPUs the gradient of depthwise convolutions is three times slower in bfloat16.
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.register_forward_pre_hook(lambda _, inputs: inputs[0].float())
            module.forward = torch.autocast("cpu", enabled=False)(module.forward)


def _inputs(views: np.ndarray, device: torch.device) -> Tensor:
    # (n, h, w, 3) uint8 -> (n, 3, h, w) float32 in [0, 1]; the memory stays channels last.
    return torch.from_numpy(views).to(device).permute(0, 3, 1, 2).float() / 255


def _normalised(images: Tensor) -> Tensor:
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    return (images - mean) / torch.tensor(STD, device=images.device).view(3, 1, 1)


if __name__ == "__main__":
    raise SystemExit(main())
