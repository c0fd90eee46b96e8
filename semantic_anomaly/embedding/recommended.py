"""Recommended stages by architecture, and what each recommendation was measured on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recommendation:
    """How a backbone of an architecture is used well.

    Attributes:
        stages: ends of stage texts, to be put behind the name of the backbone.
        measured: what the recommendation was measured with; empty: it follows the literature or
            a related network, and was not measured here.
    """

    stages: tuple[str, ...]
    measured: str = ""


_LAST_TOKENS = Recommendation(("size=960",))
_STAGE_3 = Recommendation(("layer=-2 size=960",))
RECOMMENDED: dict[str, Recommendation] = {
    "efficientnet": Recommendation(
        ("layer=15 size=640", "layer=20 size=640"), "EfficientNet-Lite2 of ImageNet"
    ),
    "mobilenet_v1": Recommendation(("layer=21 size=800",), "MobileNetV1 1.0 of ImageNet"),
    **dict.fromkeys(("dinov2", "dinov2_with_registers", "dinov3_vit"), _LAST_TOKENS),
    **dict.fromkeys(("deit", "ijepa", "vit", "vit_mae", "vit_msn"), _LAST_TOKENS),
    **dict.fromkeys(("clip", "clip_vision_model"), _LAST_TOKENS),
    **dict.fromkeys(("siglip", "siglip_vision_model"), _LAST_TOKENS),
    **dict.fromkeys(("siglip2", "siglip2_vision_model"), _LAST_TOKENS),
    **dict.fromkeys(("bit", "convnext", "convnextv2", "dinov3_convnext", "focalnet"), _STAGE_3),
    **dict.fromkeys(("poolformer", "regnet", "resnet", "swin", "swinv2"), _STAGE_3),
    "mobilenet_v2": Recommendation(("layer=-3 size=800",)),
}
