"""Instance segmentation by networks: panoptic, point-prompted and detection architectures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from torch.nn import functional

from semantic_anomaly.embedding.identity import SegmenterIdentity
from semantic_anomaly.embedding.pretrained import (
    PREPROCESSOR,
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
from semantic_anomaly.storage import canonical_json, sha256_bytes
from semantic_anomaly.structures import PatchGrid

_TASK = "panoptic"
_MIN_SCORE = 0.5
# Resolution of universal masks; finer ones would be averaged over patches anyway.
_PIXELS_PER_CELL = 4
# As the automatic mask generator of SAM 2, with half of its points per side.
_POINTS_PER_SIDE, _POINTS_PER_BATCH = 16, 64
_MIN_IOU, _MIN_STABILITY, _STABILITY_OFFSET, _MAX_BOX_IOU = 0.8, 0.95, 1.0, 0.7


class NetworkSegmenter(ABC):
    """Base of the families: loading, image preparation and errors.

    Args:
        model: local Hugging Face folder or hub id already downloaded.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32, bfloat16 or float16.

    Attributes:
        identity: stored in an index and compared when it is used.

    Raises:
        BackboneError: the network cannot be loaded, its architecture is not of the family,
            transformers does not have it, or there is no such device.
    """

    # Name of the family, and of the class of transformers of each architecture.
    _family: ClassVar[str]
    _model_classes: ClassVar[dict[str, str]]
    # What the masks depend on besides the folder.
    _parameters: ClassVar[tuple[float, ...]] = (_MIN_SCORE,)

    def __init__(self, model: str, device: str, dtype: str) -> None:
        self._device = choose_device(device)
        self._folder = folder = open_folder("segmenter", model, self._model_classes)
        self._dtype = choose_dtype(dtype, self._device)
        parts = [self._family, folder.weights_sha256, folder.config_sha256, *self._parameters]
        digest = sha256_bytes(canonical_json(parts).encode())
        self.identity = SegmenterIdentity(self._family, folder.model_id, digest)
        name = self._model_classes[folder.architecture]
        model_class = getattr(transformers, name, None)
        if model_class is None:
            raise BackboneError(
                f"{folder.what}: transformers {transformers.__version__} has no {name}"
            )
        self._model: Any = load_network(folder, model_class).to(self._device, self._dtype)
        self._load_processor()

    def segment(self, image: np.ndarray, grid: PatchGrid) -> np.ndarray:
        """Return the masks of the instances of an image, as in `InstanceSegmenter`."""
        what = self._folder.what
        if self._model is None:
            raise ModelOutputError(f"{what} was closed")
        try:
            with torch.inference_mode():
                masks = self._masks(image)
        except SemanticAnomalyError:
            raise
        # Libraries raise nearly anything on unexpected images or outputs.
        except Exception as error:
            raise ModelOutputError(f"{what} failed: {first_line(error)}") from error
        return np.asarray(masks[masks.flatten(1).any(1)].cpu().numpy())

    def close(self) -> None:
        """Free the network and the memory of the device; the segmenter cannot be used any more."""
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @abstractmethod
    def _masks(self, image: np.ndarray) -> torch.Tensor:
        """Return (n, h, w) bool masks of a (height, width, 3) uint8 image; some may be empty."""

    def _load_processor(self) -> None:
        """Check that the folder has an input size."""
        self._input_hw((480, 640))

    def _input_hw(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        size = self._folder.preprocessor.get("size")
        pairs = size.items() if isinstance(size, dict) else ()
        lengths = {name: value for name, value in pairs if type(value) is int and value > 0}
        if {"height", "width"} <= lengths.keys():
            return lengths["height"], lengths["width"]
        if not {"shortest_edge", "longest_edge"} <= lengths.keys():
            raise BackboneError(
                f"{self._folder.what}: {PREPROCESSOR}: size: expected height and width, or "
                f"shortest_edge and longest_edge, found {size!r}"
            )
        shortest, longest = lengths["shortest_edge"], lengths["longest_edge"]
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

    _family = "universal"
    _processors: ClassVar = {
        "eomt": "EomtImageProcessor",
        "eomt_dinov3": "EomtImageProcessor",
        "mask2former": "Mask2FormerImageProcessor",
        "oneformer": "OneFormerImageProcessor",
    }
    _model_classes = dict.fromkeys(_processors, "AutoModelForUniversalSegmentation")

    def _load_processor(self) -> None:
        name = self._processors[self._folder.architecture]
        # The other implementation needs torchvision.
        processor_class = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
        is_oneformer = self._folder.architecture == "oneformer"
        # Class names serve training only, and would be looked up on the hub.
        options = {"class_info_file": None, "repo_path": None} if is_oneformer else {}
        self._task_inputs: dict[str, torch.Tensor] = {}
        try:
            with quiet_transformers():
                self._processor = processor_class.from_pretrained(
                    self._folder.path, local_files_only=True, **options
                )
                if is_oneformer:
                    self._task_inputs = {"task_inputs": self._load_task_tokens()}
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

    def _masks(self, image: np.ndarray) -> torch.Tensor:
        task = {"task_inputs": [_TASK]} if self._task_inputs else {}
        inputs = self._processor(
            image, return_tensors="pt", input_data_format="channels_last", **task
        )
        pixel_values = inputs["pixel_values"].to(self._device, self._dtype)
        network_inputs = {"pixel_values": pixel_values, **self._task_inputs}
        pixel_mask = inputs.get("pixel_mask")
        if pixel_mask is not None:
            network_inputs["pixel_mask"] = pixel_mask.to(self._device)
        output = self._model(**network_inputs)
        for name in ("class_queries_logits", "masks_queries_logits"):
            output[name] = self._finite(output[name], name)
        if pixel_mask is not None:
            logits = output["masks_queries_logits"]  # (1, queries, h, w)
            shares = (pixel_mask[0].any(axis).float().mean().item() for axis in (1, 0))
            sides = zip(logits.shape[2:], shares, strict=True)
            height, width = (max(1, round(side * share)) for side, share in sides)
            output["masks_queries_logits"] = logits[:, :, :height, :width]
        mask_hw = tuple(-(-side // _PIXELS_PER_CELL) for side in image.shape[:2])
        if self._task_inputs:
            # The processor of OneFormer resizes with torchvision only.
            output["masks_queries_logits"] = functional.interpolate(
                output["masks_queries_logits"], mask_hw, mode="bilinear"
            )
        is_eomt = self._folder.architecture.startswith("eomt")
        (result,) = self._processor.post_process_panoptic_segmentation(
            output,
            threshold=_MIN_SCORE,
            target_sizes=None if self._task_inputs else [mask_hw],
            **({} if is_eomt else {"label_ids_to_fuse": set()}),
        )
        labels, segments = result["segmentation"], result["segments_info"]
        ids = torch.tensor([segment["id"] for segment in segments], device=labels.device)
        return labels[None] == ids[:, None, None]


class PromptlessSegmenter(NetworkSegmenter):
    """Masks of a grid of points, as the automatic mask generator of SAM 2 (Ravi et al. 2024).

    Kept are masks of a high predicted IoU that hardly change with the threshold and whose boxes do
    not overlap the box of a better one.
    """

    _family = "promptless"
    _model_classes: ClassVar = {
        "edgetam": "EdgeTamModel",
        "sam2": "Sam2Model",
        "sam2_video": "Sam2Model",
    }
    _parameters = (_POINTS_PER_SIDE, _MIN_IOU, _MIN_STABILITY, _STABILITY_OFFSET, _MAX_BOX_IOU)

    def _masks(self, image: np.ndarray) -> torch.Tensor:
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
        return masks[_suppress(masks, scores)]


class DetectorSegmenter(NetworkSegmenter):
    """Instances of RF-DETR (Robinson et al. 2025): every query above the minimum score."""

    _family = "detector"
    _model_classes: ClassVar = {"rf_detr": "RfDetrForInstanceSegmentation"}

    def _masks(self, image: np.ndarray) -> torch.Tensor:
        output = self._model(pixel_values=self._pixels(image))
        scores = self._finite(output.logits, "logits")[0].sigmoid().amax(-1)  # (queries,)
        masks = self._finite(output.pred_masks, "masks")[0] > 0  # (queries, h, w)
        return masks[scores >= _MIN_SCORE]


def _suppress(masks: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return the rows kept by non-maximum suppression of the boxes of (n, h, w) filled masks."""
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


NETWORK_SEGMENTERS: dict[str, type[NetworkSegmenter]] = {
    "universal": UniversalSegmenter,
    "promptless": PromptlessSegmenter,
    "detector": DetectorSegmenter,
}
