"""Train a small dense backbone from images that the project makes itself, with or without teacher.

With a teacher: its features, projected on their main directions, are what the student learns to
give, by squared distance and under other lights than the teacher sees (Hinton et al. 2015, arXiv
1503.02531; FitNets, Romero et al. 2015, arXiv 1412.6550). Without one: dense contrastive learning
between two views of one image with known geometry (DenseCL, Wang et al. 2021, arXiv 2011.09157).
The descriptor itself is trained, there is no projection to throw away. What is shipped is an
exponential moving average of the weights.

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
from backbone_losses import Teacher, contrast_loss, imitation_loss
from backbone_views import VIEW_HW, PairSampler, ViewPairs
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from transformers import ConvNextConfig, ConvNextModel

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Probabilities of street frames, photographs and procedural pictures.
SHARES = (0.55, 0.25, 0.2)
WARM_UP_STEPS = 100
AVERAGE_DECAY = 0.997
BASIS_BATCHES = 12


def make_student() -> ConvNextModel:
    """Return the untrained architecture: one descriptor of 192 numbers every 10 pixels."""
    config = ConvNextConfig(
        patch_size=5,
        num_stages=2,
        hidden_sizes=[48, 192],
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
        self._teacher: Teacher | None = None
        if args.teacher:
            self._teacher = Teacher(args.teacher, tuple(args.teacher_layers), self._device)
        self._parameters = list(self.student.parameters())
        self._optimiser = torch.optim.AdamW(
            self._parameters, args.lr, weight_decay=args.weight_decay
        )

    def run(self) -> Iterator[float]:
        """Train, and yield the loss of every step."""
        args = self._args
        begin, step = time.monotonic(), 0
        with ThreadPoolExecutor(1) as pool:
            self._find_basis()
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

    def _step(self, pairs: ViewPairs) -> float:
        views = pairs.first if self._teacher else np.concatenate([pairs.first, pairs.second])
        taught = None
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._args.bfloat16):
            features = self.student(_normalised(_inputs(views, self._device))).last_hidden_state
            if self._teacher is not None:
                grid_hw = (features.shape[2], features.shape[3])
                taught = self._teacher(_inputs(pairs.clean, self._device), grid_hw)
        features = features.float()
        if taught is not None:
            loss = imitation_loss(features, taught)
        else:
            across = torch.from_numpy(pairs.across).to(self._device)
            first, second = features.chunk(2)
            loss = contrast_loss(first, second, across, VIEW_HW)
        self._optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimiser.step()
        self.average.update_parameters(self.student)
        return float(loss.detach())

    def _find_basis(self) -> None:
        if self._teacher is None:
            return
        # Numbers below zero are no seeds; these batches lie beyond those of any training.
        numbers = range(2**31, 2**31 + BASIS_BATCHES)
        clean = np.concatenate([self._sampler.batch(i, self._args.batch).clean for i in numbers])
        dim = self.student.config.hidden_sizes[-1]
        grid_hw = (VIEW_HW[0] // 10, VIEW_HW[1] // 10)
        kept = self._teacher.project_on(_inputs(clean, self._device), grid_hw, dim)
        tqdm.write(f"{dim} numbers keep {kept:.1%} of the teacher's energy")


def train(args: argparse.Namespace) -> dict[str, float]:
    """Train as the arguments say, write the folder, and return mean loss, steps and images."""
    workers = args.workers or os.cpu_count() or 1
    groups = (
        street_images(args.street_drives, args.street_frames, args.cache, workers),
        folder_images(args.images),
        procedural_images(args.textures, args.seed),
    )
    sampler = PairSampler(groups, SHARES, args.seed, args.pasted, both=not args.teacher)
    trainer = Trainer(args, sampler)
    mean, steps = 0.0, 0
    with tqdm(total=args.steps, desc="train", disable=None) as bar:
        for loss in trainer.run():
            steps += 1
            mean += (loss - mean) / min(steps, 50)
            bar.update()
            if steps % args.save_every == 0:
                save_backbone(trainer.average.module, args.out)
            if steps % 25 == 0:
                bar.set_postfix(loss=f"{mean:.4f}")
                if args.log:
                    with args.log.open("a", encoding="utf-8") as log:
                        log.write(f"{steps} {mean:.4f}\n")
    save_backbone(trainer.average.module, args.out)
    return {"loss": mean, "steps": float(steps), "images": float(sampler.count)}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--out", type=Path, required=True, help="folder to write")
    p.add_argument("--init", type=Path, help="continue from this folder")
    p.add_argument("--teacher", type=Path, help="Hugging Face folder of a convolutional backbone")
    p.add_argument("--teacher-layers", type=int, nargs="+", default=[21, 23])
    p.add_argument("--images", type=Path, action="append", default=[], help="more pictures")
    p.add_argument("--street-drives", type=int, default=360)
    p.add_argument("--street-frames", type=int, default=8, help="frames of each drive")
    p.add_argument("--textures", type=int, default=400, help="procedural pictures")
    p.add_argument("--cache", type=Path, help="folder that keeps rendered frames")
    p.add_argument("--steps", type=int, default=6000)
    p.add_argument("--minutes", type=float, default=0.0, help="end after so long; 0: by steps")
    p.add_argument("--batch", type=int, default=8, help="views (or pairs of views) a step")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--weight-decay", type=float, default=0.02)
    p.add_argument("--pasted", type=float, default=0.5, help="share of images with pasted things")
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
