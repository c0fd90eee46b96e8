"""The settings of what is embedded: backbone, instances, their surroundings and place."""

from __future__ import annotations

from dataclasses import dataclass

from semantic_anomaly.segmentation import FAMILIES, TOKENS
from semantic_anomaly.setting_spec import setting

GRID, INSTANCE, COMBINED = "grid", "instance", "combined"
# What shapes a score besides plain patch distances, and the values that leave it as it is.
UNUSED = {
    "variant": GRID,
    "surroundings_weight": 0.0,
    "min_agreement": 0.0,
    "scene_frames": 0,
    "usual_kinds": 0,
    "smoothing": 0.0,
}


@dataclass(frozen=True)
class EmbeddingSettings:
    """What is embedded and compared; the other settings build on it."""

    backbone: str = setting(
        "street_small",
        "Vision backbone: a shipped name, a local Hugging Face folder, or a hub id "
        "already downloaded.",
    )
    layers: tuple[int, ...] = setting(
        (),
        "Hidden states used as patch features, concatenated on the finest grid; empty: "
        "the backbone's own choice.",
    )
    input_size: int = setting(
        960,
        "Long side in pixels to which images are resized; both sides are rounded to the "
        "patch multiple.",
        minimum=32,
        maximum=8192,
    )
    device: str = setting("auto", "auto, cpu, cuda or cuda:N.")
    dtype: str = setting(
        "auto",
        "Precision of the backbone; auto: bfloat16 or float16 on a GPU, float32 on a CPU.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    place_weight: float = setting(
        0.2,
        "Weight of the place in the image in the distance of two embeddings; 0: none.",
        minimum=0.0,
        maximum=0.99,
    )
    variant: str = setting(
        GRID,
        "What is compared with the index: grid, the patches; instance, instances pooled over "
        "masks, and patches where there are none; combined, the mean of both.",
        choices=(GRID, INSTANCE, COMBINED),
    )
    segmenter: str = setting(
        TOKENS,
        "What finds the instances: tokens groups the patches; universal, promptless and detector "
        "are networks of their own.",
        choices=FAMILIES,
    )
    segmenter_model: str = setting(
        "",
        "Network of the segmenter: a local Hugging Face folder, or a hub id already downloaded; "
        "empty for tokens.",
    )
    surroundings_weight: float = setting(
        0.0,
        "Weight of an instance's surroundings in the distance of two; 0: instances alone.",
        minimum=0.0,
        maximum=0.99,
    )
    min_agreement: float = setting(
        0.0,
        "Share of its patches that must be unusual themselves before an instance counts, unless "
        "it is unusual together with its surroundings; 0: none.",
        minimum=0.0,
        maximum=1.0,
    )
    scene_frames: int = setting(
        0,
        "Nominal frames whose patches are compared, those that resemble the image most; 0: all.",
        minimum=0,
        maximum=1000000,
    )
    usual_kinds: int = setting(
        256,
        "Kinds of patches, told apart by their embeddings, for each of which calibration learns "
        "what distance is usual besides what is usual at its place; 0: one.",
        minimum=0,
        maximum=4096,
    )
    smoothing: float = setting(
        0.8,
        "Deviation of the Gaussian that smooths the map of distances before it is scored, in "
        "patches; 0: none.",
        minimum=0.0,
        maximum=10.0,
    )

    @property
    def segments(self) -> bool:
        """Return whether instances are needed."""
        return self.variant != GRID
