"""Loading the networks of segmenters: whole, unaltered, and never from the network.

Instances by a network of their own: panoptic, point-prompted and detecting architectures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional

from semantic_anomaly.embedding.identity import SegmenterIdentity
from semantic_anomaly.embedding.pretrained import (
    PREPROCESSOR,
    BackboneFolder,
    choose_device,
    choose_precision,
    first_line,
    load_pretrained,
    locate,
    normalisation,
    quiet_transformers,
    read_json,
    refuse_not_finite,
)
from semantic_anomaly.errors import BackboneError, ModelOutputError, SemanticAnomalyError
from semantic_anomaly.segmentation.masks import InstanceMasks, InstanceSegmenter
from semantic_anomaly.storage import canonical_json, sha256_bytes
from semantic_anomaly.structures import PatchGrid

_UNIVERSAL = "AutoModelForUniversalSegmentation"
# Architectures of each family, and the classes of transformers that they are loaded by.
_CLASSES = {
    "universal": dict.fromkeys(("eomt", "eomt_dinov3", "mask2former", "oneformer"), _UNIVERSAL),
    "promptless": {"edgetam": "EdgeTamModel", "sam2": "Sam2Model", "sam2_video": "Sam2Model"},
    "detector": {"rf_detr": "RfDetrForInstanceSegmentation"},
}


def open_segmenter(family: str, model: str) -> BackboneFolder:
    """Find a segmenter's folder and check what it says of itself.

    Args:
        family: universal, promptless or detector.
        model: a local folder, or a hub id that was downloaded before.

    Raises:
        BackboneError: not there, incomplete, or of another family.
    """
    path, model_id, revision = locate(model)
    config = read_json(path / "config.json", model_id)
    architecture = config.get("model_type")
    if architecture not in _CLASSES[family]:
        raise BackboneError(
            f"segmenter '{model_id}': architecture {architecture!r} is not of the family "
            f"'{family}'; expected one of: {', '.join(_CLASSES[family])}"
        )
    for odd in ("transformers_weights", "quantization_config", "use_pretrained_backbone"):
        if config.get(odd):
            raise BackboneError(f"segmenter '{model_id}': config.json: '{odd}' is not supported")
    content = read_json(path / PREPROCESSOR, model_id)
    values = normalisation(content, model_id)
    return BackboneFolder(path, model_id, revision, config, architecture, (), *values)


def read_size(folder: BackboneFolder) -> Any:
    """Return what preprocessor_config.json says of the size that images are resized to."""
    return read_json(folder.path / PREPROCESSOR, folder.model_id).get("size")


def load_segmentation_network(family: str, folder: BackboneFolder) -> torch.nn.Module:
    """Return the network of a folder in float32, for inference only.

    Unlike a backbone's, its heads count: no weight may be missing, nor be left over.

    Args:
        family: the one that the folder was opened for.
        folder: as `open_segmenter` returns it.

    Raises:
        BackboneError: damaged, incomplete, of another configuration, with weights that are not
            finite, or of an architecture that the installed transformers lacks.
    """
    name = _CLASSES[family][folder.architecture]
    what = f"segmenter '{folder.model_id}'"
    kind = getattr(transformers, name, None)
    if kind is None:
        raise BackboneError(f"{what}: transformers {transformers.__version__} has no {name}")
    model, info = load_pretrained(kind, folder.path, what)
    for sort in ("missing", "mismatched", "unexpected"):
        if info[f"{sort}_keys"]:
            shown = ", ".join(sorted(map(str, info[f"{sort}_keys"]))[:3])
            raise BackboneError(f"{what}: expected exactly its weights, found {sort}: {shown}")
    refuse_not_finite(model, what)
    return model.eval().requires_grad_(False)


_PROCESSORS = {
    "eomt": "EomtImageProcessor",
    "eomt_dinov3": "EomtImageProcessor",
    "mask2former": "Mask2FormerImageProcessor",
    "oneformer": "OneFormerImageProcessor",
}
_TASK = "panoptic"
_LEAST_SCORE = 0.5
_PIXELS_A_CELL = 4
# As the automatic mask generator of SAM 2 has them, but for half its points a side.
_POINTS_A_SIDE, _POINTS_AT_ONCE = 16, 64
_LEAST_IOU, _LEAST_STABILITY, _STABILITY_OFFSET, _MOST_BOX_IOU = 0.8, 0.95, 1.0, 0.7


def load_network_segmenter(family: str, model: str, device: str, dtype: str) -> InstanceSegmenter:
    """Load a segmenter with a network; nothing is downloaded.

    Args:
        family: universal, promptless or detector.
        model: a local Hugging Face folder or a hub id already downloaded.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16.

    Raises:
        BackboneError: the model cannot be had whole, its architecture is not of the family, or
            the device is absent.
    """
    makers: dict[str, Callable[..., InstanceSegmenter]]
    makers = {"universal": _Universal, "promptless": _Promptless, "detector": _Detector}
    where = choose_device(device)
    folder, precision = open_segmenter(family, model), choose_precision(dtype, where)
    return makers[family](family, folder, where, precision)


class _NetworkSegmenter(ABC):
    """What the families share: loading, the image as a tensor, and errors."""

    def __init__(
        self, family: str, folder: BackboneFolder, device: torch.device, dtype: torch.dtype
    ) -> None:
        parts = (folder.weights_sha256, folder.config_sha256, *self.parameters())
        digest = sha256_bytes(canonical_json([family, *parts]).encode())
        self.identity = SegmenterIdentity(family, folder.model_id, digest)
        self._folder, self._device, self._dtype = folder, device, dtype
        model = load_segmentation_network(family, folder)
        self._model: Any = model.to(device=device, dtype=dtype)
        self._prepare_for(folder.path)

    def parameters(self) -> tuple[Any, ...]:
        """Return what the masks depend on besides the folder."""
        return (_LEAST_SCORE,)

    def segment(self, image: np.ndarray, grid: PatchGrid) -> InstanceMasks:
        """Return the instances of an image; the grid is not looked at.

        Args:
            image: (height, width, 3) uint8 RGB.
            grid: its patch embeddings.

        Raises:
            ModelOutputError: the network failed, or gave what is not finite or of another shape.
        """
        what = f"segmenter '{self.identity.model_id}'"
        if self._model is None:
            raise ModelOutputError(f"{what} was closed")
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype != np.uint8:
            raise ModelOutputError(
                f"{what}: image: expected non-empty (height, width, 3) uint8, "
                f"found shape {image.shape}, {image.dtype}"
            )
        try:
            with torch.inference_mode():
                masks, scores = self._instances(image)
        except SemanticAnomalyError:
            raise
        # Libraries raise nearly anything for images or outputs they did not expect.
        except Exception as error:
            raise ModelOutputError(f"{what} failed: {first_line(error)}") from error
        filled = masks.flatten(1).any(1)
        found = masks[filled].cpu().numpy(), scores[filled].float().clamp(0, 1).cpu().numpy()
        return InstanceMasks(*found, (image.shape[0], image.shape[1]))

    def close(self) -> None:
        """Free the network and the device's memory; the segmenter cannot be used afterwards."""
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _prepare_for(self, path: Path) -> None:
        self._size = read_size(self._folder)
        self._input_hw((480, 640))

    @abstractmethod
    def _instances(self, image: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (n, h, w) bool masks and (n,) scores of a (height, width, 3) uint8 image."""

    def _input_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        size = self._size if isinstance(self._size, dict) else {}
        sides = size.get("height"), size.get("width")
        if all(type(side) is int and side > 0 for side in sides):
            return sides  # type: ignore[return-value]
        edges = size.get("shortest_edge"), size.get("longest_edge")
        if not all(type(edge) is int and edge > 0 for edge in edges):
            raise BackboneError(
                f"segmenter '{self._folder.model_id}': preprocessor_config.json: size: expected "
                f"height and width, or shortest_edge and longest_edge, found {self._size!r}"
            )
        scale = min(edges[0] / min(image_hw), edges[1] / max(image_hw))  # type: ignore[operator]
        return max(1, round(image_hw[0] * scale)), max(1, round(image_hw[1] * scale))

    def _pixels(self, image: np.ndarray) -> torch.Tensor:
        """Return (1, 3, h, w): the whole image, resized and normalised as the folder says."""
        hw = self._input_hw((image.shape[0], image.shape[1]))
        pixels = torch.from_numpy(np.array(image)).to(self._device).permute(2, 0, 1)[None].float()
        pixels = functional.interpolate(pixels, hw, mode="bilinear", antialias=True)
        mean, std = (
            torch.tensor(values, device=self._device)[None, :, None, None]
            for values in (self._folder.mean, self._folder.std)
        )
        return ((pixels * self._folder.rescale - mean) / std).to(self._dtype)


class _Universal(_NetworkSegmenter):
    """Panoptic segments of Mask2Former, OneFormer and EoMT (Cheng 2022, Jain 2023, Kerssies 2025).

    Image processors of the library prepare images and make segments of outputs.
    """

    def _prepare_for(self, path: Path) -> None:
        name = _PROCESSORS[self._folder.architecture]
        # The other backend needs torchvision.
        kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
        one_former = self._folder.architecture == "oneformer"
        # Class names are for training, and would be looked up on the hub.
        apart = {"class_info_file": None, "repo_path": None} if one_former else {}
        options: dict[str, Any] = {"local_files_only": True, **apart}
        self._tokens: torch.Tensor | None = None
        try:
            with quiet_transformers():
                self._processor = kind.from_pretrained(path, **options)
                if one_former:
                    self._tokens = self._task_tokens(path)
        except Exception as error:
            raise BackboneError(
                f"segmenter '{self._folder.model_id}': image processor or tokenizer: "
                f"{first_line(error)}"
            ) from error

    def _task_tokens(self, path: Path) -> torch.Tensor:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
        length = self._model.config.task_seq_len
        encoded = tokenizer(
            [f"the task is {_TASK}"], padding="max_length", max_length=length, truncation=True
        )
        tokens = torch.tensor(encoded["input_ids"]) * torch.tensor(encoded["attention_mask"])
        return tokens.to(self._device)

    def _instances(self, image: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        asked: dict[str, Any] = {} if self._tokens is None else {"task_inputs": [_TASK]}
        inputs = self._processor(image, return_tensors="pt", input_data_format="channels_last",
                                 **asked)  # fmt: skip
        given = {"pixel_values": inputs["pixel_values"].to(self._device, self._dtype)}
        inside = inputs.get("pixel_mask")
        if inside is not None:
            given["pixel_mask"] = inside.to(self._device)
        if self._tokens is not None:
            given["task_inputs"] = self._tokens.to(self._device)
        output = self._model(**given)
        for name in ("class_queries_logits", "masks_queries_logits"):
            output[name] = _finite(output[name].float(), name)
        extra: dict[str, Any] = {}
        if not self._folder.architecture.startswith("eomt"):
            extra["label_ids_to_fuse"] = set()
        if inside is not None:
            output["masks_queries_logits"] = _without_padding(
                output["masks_queries_logits"], inside[0]
            )
        sizes: list[tuple[int, ...]] | None
        sizes = [tuple(-(-side // _PIXELS_A_CELL) for side in image.shape[:2])]
        if self._tokens is not None:
            # Its processor resizes by torchvision alone.
            output["masks_queries_logits"] = functional.interpolate(
                output["masks_queries_logits"], sizes[0], mode="bilinear"
            )
            sizes = None
        (result,) = self._processor.post_process_panoptic_segmentation(
            output, threshold=_LEAST_SCORE, target_sizes=sizes, **extra
        )
        segments = result["segments_info"]
        ids = torch.tensor([s["id"] for s in segments], device=result["segmentation"].device)
        masks = result["segmentation"][None] == ids[:, None, None]
        return masks, torch.tensor([s["score"] for s in segments], device=masks.device)


class _Promptless(_NetworkSegmenter):
    """Masks of a grid of points, as the automatic mask generator of SAM 2 (Ravi et al. 2024).

    Kept are those of high predicted overlap, which hardly change with the threshold, and whose
    boxes do not repeat a better one's.
    """

    def parameters(self) -> tuple[Any, ...]:
        return (_POINTS_A_SIDE, _LEAST_IOU, _LEAST_STABILITY, _STABILITY_OFFSET, _MOST_BOX_IOU)

    def _instances(self, image: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = self._pixels(image)
        embeddings = self._model.get_image_embeddings(pixels)
        steps = (torch.arange(_POINTS_A_SIDE, device=self._device) + 0.5) / _POINTS_A_SIDE
        grid = torch.cartesian_prod(steps * pixels.shape[3], steps * pixels.shape[2])
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for points in grid[None, :, None].to(self._dtype).split(_POINTS_AT_ONCE, 1):
            output = self._model(
                image_embeddings=list(embeddings),
                input_points=points,
                input_labels=torch.ones(points.shape[:3], dtype=torch.int, device=self._device),
            )
            logits = _finite(output.pred_masks.float(), "masks").flatten(0, 2)
            ious = _finite(output.iou_scores.float(), "predicted overlaps").flatten()
            sure = (logits > _STABILITY_OFFSET).sum((1, 2))
            stability = sure / (logits > -_STABILITY_OFFSET).sum((1, 2)).clamp(min=1)
            good = (ious >= _LEAST_IOU) & (stability >= _LEAST_STABILITY)
            kept.append((logits[good] > 0, ious[good]))
        masks, scores = (torch.cat(part) for part in zip(*kept, strict=True))
        filled = masks.flatten(1).any(1)
        masks, scores = masks[filled], scores[filled]
        chosen = _suppress(masks, scores)
        return masks[chosen], scores[chosen]


class _Detector(_NetworkSegmenter):
    """Instances of RF-DETR (Robinson et al. 2025): every query that is sure of some class."""

    def _instances(self, image: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        output = self._model(pixel_values=self._pixels(image))
        scores = _finite(output.logits.float(), "logits")[0].sigmoid().amax(-1)
        masks = _finite(output.pred_masks.float(), "masks")[0] > 0
        good = scores >= _LEAST_SCORE
        return masks[good], scores[good]


def _finite(values: torch.Tensor, name: str) -> torch.Tensor:
    if not bool(torch.isfinite(values).all()):
        raise ModelOutputError(f"segmenter: {name}: expected finite numbers, found others")
    return values


def _without_padding(logits: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Return (1, n, h, w) cut to the part that shows the image."""
    shares = inside.any(1).float().mean().item(), inside.any(0).float().mean().item()
    height, width = (max(1, round(n * s)) for n, s in zip(logits.shape[2:], shares, strict=True))
    return logits[:, :, :height, :width]


def _suppress(masks: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return rows in order of score, without those whose box overlaps a better one's."""
    size = masks.new_tensor(masks.shape[1:], dtype=torch.long)
    spans = []
    for axis, other in ((1, 2), (2, 1)):
        hit = masks.any(other).int()
        spans += [hit.argmax(1), size[axis - 1] - hit.flip(1).argmax(1)]
    top, bottom, left, right = (span.cpu().numpy() for span in spans)
    areas, kept = (bottom - top) * (right - left), []
    rest = np.argsort(-scores.cpu().numpy(), kind="stable")
    while len(rest):
        best, rest = rest[0], rest[1:]
        kept.append(int(best))
        high = np.minimum(bottom[rest], bottom[best]) - np.maximum(top[rest], top[best])
        wide = np.minimum(right[rest], right[best]) - np.maximum(left[rest], left[best])
        shared = np.maximum(high, 0) * np.maximum(wide, 0)
        rest = rest[shared <= _MOST_BOX_IOU * (areas[rest] + areas[best] - shared)]
    return torch.tensor(kept, dtype=torch.long, device=masks.device)
