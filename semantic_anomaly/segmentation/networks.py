"""Instance segmentation by networks: panoptic, point-prompted and detection architectures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np
import torch
import transformers
from torch.nn import functional

from semantic_anomaly.embedding.identity import SegmenterIdentity
from semantic_anomaly.embedding.pretrained import (
    PREPROCESSOR,
    PretrainedFolder,
    choose_device,
    choose_dtype,
    load_network,
    open_folder,
    quiet_transformers,
)
from semantic_anomaly.errors import (
    BackboneError,
    ModelOutputError,
    SemanticAnomalyError,
    first_line,
)
from semantic_anomaly.segmentation.masks import InstanceMasks
from semantic_anomaly.storage import canonical_json, sha256_bytes
from semantic_anomaly.structures import PatchGrid

_UNIVERSAL = "AutoModelForUniversalSegmentation"
# Architectures of each family, and the classes of transformers that load them.
_MODEL_CLASSES = {
    "universal": dict.fromkeys(("eomt", "eomt_dinov3", "mask2former", "oneformer"), _UNIVERSAL),
    "promptless": {"edgetam": "EdgeTamModel", "sam2": "Sam2Model", "sam2_video": "Sam2Model"},
    "detector": {"rf_detr": "RfDetrForInstanceSegmentation"},
}
_PROCESSORS = {
    "eomt": "EomtImageProcessor",
    "eomt_dinov3": "EomtImageProcessor",
    "mask2former": "Mask2FormerImageProcessor",
    "oneformer": "OneFormerImageProcessor",
}
_TASK = "panoptic"
_MIN_SCORE = 0.5
# Resolution of universal masks; finer ones would be averaged over patches anyway.
_PIXELS_PER_CELL = 4
# As the automatic mask generator of SAM 2, with half of its points per side.
_POINTS_PER_SIDE, _POINTS_PER_BATCH = 16, 64
_MIN_IOU, _MIN_STABILITY, _STABILITY_OFFSET, _MAX_BOX_IOU = 0.8, 0.95, 1.0, 0.7


def load_network_segmenter(family: str, model: str, device: str, dtype: str) -> NetworkSegmenter:
    """Load a segmenter with a network; nothing is downloaded.

    Args:
        family: universal, promptless or detector.
        model: local Hugging Face folder or hub id already downloaded.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16.

    Raises:
        BackboneError: the model cannot be loaded, its architecture is not of the family, or there
            is no such device.
    """
    segmenter_classes: dict[str, Callable[..., NetworkSegmenter]] = {
        "universal": UniversalSegmenter,
        "promptless": PromptlessSegmenter,
        "detector": DetectorSegmenter,
    }
    torch_device = choose_device(device)
    folder = open_folder("segmenter", model, _MODEL_CLASSES[family])
    torch_dtype = choose_dtype(dtype, torch_device)
    return segmenter_classes[family](family, folder, torch_device, torch_dtype)


class NetworkSegmenter(ABC):
    """Base of the families: loading, image preparation and errors.

    Args:
        family: universal, promptless or detector.
        folder: of the network.
        device, dtype: of the computation.

    Attributes:
        identity: stored in an index and compared when it is used.

    Raises:
        BackboneError: the network cannot be loaded, or transformers does not have it.
    """

    def __init__(
        self, family: str, folder: PretrainedFolder, device: torch.device, dtype: torch.dtype
    ) -> None:
        parts = [family, folder.weights_sha256, folder.config_sha256, *self._parameters()]
        digest = sha256_bytes(canonical_json(parts).encode())
        self.identity = SegmenterIdentity(family, folder.model_id, digest)
        self._folder, self._device, self._dtype = folder, device, dtype
        name = _MODEL_CLASSES[family][folder.architecture]
        model_class = getattr(transformers, name, None)
        if model_class is None:
            raise BackboneError(
                f"{folder.what}: transformers {transformers.__version__} has no {name}"
            )
        self._model: Any = load_network(folder, model_class).to(device=device, dtype=dtype)
        self._load_processor()

    def segment(self, image: np.ndarray, grid: PatchGrid) -> InstanceMasks:
        """Return the instances of an image.

        Args:
            image: (height, width, 3) uint8 RGB.
            grid: its patch grid, not used.

        Raises:
            ModelOutputError: the network failed, or its output is not finite.
        """
        what = self._folder.what
        if self._model is None:
            raise ModelOutputError(f"{what} was closed")
        try:
            with torch.inference_mode():
                masks, scores = self._instances(image)
        except SemanticAnomalyError:
            raise
        # Libraries raise nearly anything on unexpected images or outputs.
        except Exception as error:
            raise ModelOutputError(f"{what} failed: {first_line(error)}") from error
        filled = masks.flatten(1).any(1)  # (n,)
        return InstanceMasks(
            masks[filled].cpu().numpy(),
            scores[filled].float().clamp(0, 1).cpu().numpy(),
            (image.shape[0], image.shape[1]),
        )

    def close(self) -> None:
        """Free the network and the memory of the device; the segmenter cannot be used any more."""
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @abstractmethod
    def _instances(self, image: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (n, h, w) bool masks and (n,) scores of a (height, width, 3) uint8 image."""

    def _parameters(self) -> tuple[Any, ...]:
        """Return what the masks depend on besides the folder."""
        return (_MIN_SCORE,)

    def _load_processor(self) -> None:
        """Check that the folder has an input size."""
        self._input_hw((480, 640))

    def _input_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        size = self._folder.preprocessor.get("size")
        size = size if isinstance(size, dict) else {}
        height, width = size.get("height"), size.get("width")
        if _is_length(height) and _is_length(width):
            return height, width
        shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
        if not (_is_length(shortest) and _is_length(longest)):
            raise BackboneError(
                f"{self._folder.what}: {PREPROCESSOR}: size: expected height and width, or "
                f"shortest_edge and longest_edge, found {self._folder.preprocessor.get('size')!r}"
            )
        scale = min(shortest / min(image_hw), longest / max(image_hw))
        return max(1, round(image_hw[0] * scale)), max(1, round(image_hw[1] * scale))

    def _pixels(self, image: np.ndarray) -> torch.Tensor:
        """Return (1, 3, h, w), the whole image resized and normalised."""
        hw = self._input_hw((image.shape[0], image.shape[1]))
        pixels = torch.from_numpy(np.array(image)).to(self._device).permute(2, 0, 1)[None].float()
        pixels = functional.interpolate(pixels, hw, mode="bilinear", antialias=True)
        mean, std = (
            torch.tensor(values, device=self._device)[None, :, None, None]
            for values in (self._folder.mean, self._folder.std)
        )
        return ((pixels * self._folder.rescale - mean) / std).to(self._dtype)

    def _finite(self, values: torch.Tensor, name: str) -> torch.Tensor:
        """Return values as float32; raise ModelOutputError unless all are finite."""
        values = values.float()
        if not bool(torch.isfinite(values).all()):
            raise ModelOutputError(f"{self._folder.what}: {name}: expected finite numbers")
        return values


class UniversalSegmenter(NetworkSegmenter):
    """Panoptic segments of Mask2Former, OneFormer and EoMT (Cheng 2022, Jain 2023, Kerssies 2025).

    Image processors of transformers prepare the images and turn outputs into segments.
    """

    def _load_processor(self) -> None:
        name = _PROCESSORS[self._folder.architecture]
        # The other implementation needs torchvision.
        processor_class = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
        is_oneformer = self._folder.architecture == "oneformer"
        # Class names serve training only, and would be looked up on the hub.
        options = {"class_info_file": None, "repo_path": None} if is_oneformer else {}
        self._task_tokens: torch.Tensor | None = None
        try:
            with quiet_transformers():
                self._processor = processor_class.from_pretrained(
                    self._folder.path, local_files_only=True, **options
                )
                if is_oneformer:
                    self._task_tokens = self._load_task_tokens()
        except Exception as error:
            raise BackboneError(
                f"{self._folder.what}: image processor or tokenizer: {first_line(error)}"
            ) from error

    def _load_task_tokens(self) -> torch.Tensor:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            self._folder.path, local_files_only=True, trust_remote_code=False
        )
        encoded = tokenizer(
            [f"the task is {_TASK}"],
            padding="max_length",
            max_length=self._model.config.task_seq_len,
            truncation=True,
        )
        tokens = torch.tensor(encoded["input_ids"]) * torch.tensor(encoded["attention_mask"])
        return tokens.to(self._device)

    def _instances(self, image: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        has_task = self._task_tokens is not None
        inputs = self._processor(
            image,
            return_tensors="pt",
            input_data_format="channels_last",
            **({"task_inputs": [_TASK]} if has_task else {}),
        )
        network_inputs = {"pixel_values": inputs["pixel_values"].to(self._device, self._dtype)}
        pixel_mask = inputs.get("pixel_mask")
        if pixel_mask is not None:
            network_inputs["pixel_mask"] = pixel_mask.to(self._device)
        if self._task_tokens is not None:
            network_inputs["task_inputs"] = self._task_tokens
        output = self._model(**network_inputs)
        for name in ("class_queries_logits", "masks_queries_logits"):
            output[name] = self._finite(output[name], name)
        if pixel_mask is not None:
            output["masks_queries_logits"] = _without_padding(
                output["masks_queries_logits"], pixel_mask[0]
            )
        mask_hw = tuple(-(-side // _PIXELS_PER_CELL) for side in image.shape[:2])
        if has_task:
            # The processor of OneFormer resizes with torchvision only.
            output["masks_queries_logits"] = functional.interpolate(
                output["masks_queries_logits"], mask_hw, mode="bilinear"
            )
        is_eomt = self._folder.architecture.startswith("eomt")
        (result,) = self._processor.post_process_panoptic_segmentation(
            output,
            threshold=_MIN_SCORE,
            target_sizes=None if has_task else [mask_hw],
            **({} if is_eomt else {"label_ids_to_fuse": set()}),
        )
        labels, segments = result["segmentation"], result["segments_info"]
        ids = torch.tensor([segment["id"] for segment in segments], device=labels.device)
        scores = torch.tensor([segment["score"] for segment in segments], device=labels.device)
        return labels[None] == ids[:, None, None], scores


class PromptlessSegmenter(NetworkSegmenter):
    """Masks of a grid of points, as the automatic mask generator of SAM 2 (Ravi et al. 2024).

    Kept are masks of a high predicted IoU that hardly change with the threshold and whose boxes do
    not overlap the box of a better one.
    """

    def _parameters(self) -> tuple[Any, ...]:
        return (_POINTS_PER_SIDE, _MIN_IOU, _MIN_STABILITY, _STABILITY_OFFSET, _MAX_BOX_IOU)

    def _instances(self, image: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = self._pixels(image)
        embeddings = self._model.get_image_embeddings(pixels)
        steps = (torch.arange(_POINTS_PER_SIDE, device=self._device) + 0.5) / _POINTS_PER_SIDE
        grid = torch.cartesian_prod(steps * pixels.shape[3], steps * pixels.shape[2])  # (n, 2) x, y
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for points in grid[None, :, None].to(self._dtype).split(_POINTS_PER_BATCH, 1):
            output = self._model(
                image_embeddings=list(embeddings),
                input_points=points,
                input_labels=torch.ones(points.shape[:3], dtype=torch.int, device=self._device),
            )
            logits = self._finite(output.pred_masks, "masks").flatten(0, 2)  # (m, h, w)
            ious = self._finite(output.iou_scores, "predicted IoU").flatten()  # (m,)
            # IoU of the masks at both shifted thresholds, one inside the other.
            inner = (logits > _STABILITY_OFFSET).sum((1, 2))
            stability = inner / (logits > -_STABILITY_OFFSET).sum((1, 2)).clamp(min=1)
            good = (ious >= _MIN_IOU) & (stability >= _MIN_STABILITY)
            kept.append((logits[good] > 0, ious[good]))
        masks, scores = (torch.cat(part) for part in zip(*kept, strict=True))
        filled = masks.flatten(1).any(1)
        masks, scores = masks[filled], scores[filled]
        chosen = _suppress(masks, scores)
        return masks[chosen], scores[chosen]


class DetectorSegmenter(NetworkSegmenter):
    """Instances of RF-DETR (Robinson et al. 2025): every query above the minimum score."""

    def _instances(self, image: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        output = self._model(pixel_values=self._pixels(image))
        scores = self._finite(output.logits, "logits")[0].sigmoid().amax(-1)  # (queries,)
        masks = self._finite(output.pred_masks, "masks")[0] > 0  # (queries, h, w)
        good = scores >= _MIN_SCORE
        return masks[good], scores[good]


def _is_length(value: object) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _without_padding(logits: torch.Tensor, pixel_mask: torch.Tensor) -> torch.Tensor:
    """Return (1, n, h, w) logits cut to the part of the image, by its (height, width) mask."""
    shares = (pixel_mask.any(axis).float().mean().item() for axis in (1, 0))
    height, width = (
        max(1, round(side * share)) for side, share in zip(logits.shape[2:], shares, strict=True)
    )
    return logits[:, :, :height, :width]


def _suppress(masks: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return the rows kept by non-maximum suppression of the boxes of (n, h, w) masks."""
    size = masks.new_tensor(masks.shape[1:], dtype=torch.long)
    spans = []
    for axis, other in ((1, 2), (2, 1)):
        hit = masks.any(other).int()  # (n, h) or (n, w)
        spans += [hit.argmax(1), size[axis - 1] - hit.flip(1).argmax(1)]
    top, bottom, left, right = (span.cpu().numpy() for span in spans)
    areas = (bottom - top) * (right - left)
    kept = []
    rest = np.argsort(-scores.cpu().numpy(), kind="stable")
    while len(rest):
        best, rest = rest[0], rest[1:]
        kept.append(int(best))
        height = np.minimum(bottom[rest], bottom[best]) - np.maximum(top[rest], top[best])
        width = np.minimum(right[rest], right[best]) - np.maximum(left[rest], left[best])
        shared = np.maximum(height, 0) * np.maximum(width, 0)
        rest = rest[shared <= _MAX_BOX_IOU * (areas[rest] + areas[best] - shared)]
    return torch.tensor(kept, dtype=torch.long, device=masks.device)
