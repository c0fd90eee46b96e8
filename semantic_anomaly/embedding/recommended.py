"""Recommended stages by architecture, and what each recommendation was measured on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from semantic_anomaly.stages import StageSpec


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

    def specs(self, backbone: str, *, is_complete: bool = True) -> list[StageSpec]:
        """Return the stages of a backbone.

        Args:
            backbone: as in the settings.
            is_complete: whether the network has all of its hidden states. Those of a shipped one
                may end with the one to use: numbers from the end are left out.
        """
        specs = [StageSpec.parse(f"{backbone} {end}") for end in self.stages]
        return [
            spec if is_complete or (spec.layer or 0) >= 0 else replace(spec, layer=None)
            for spec in specs
        ]


_LAST_TOKENS = Recommendation(("size=960",))
_STAGE_3 = Recommendation(("layer=-2 size=960",))
RECOMMENDED: dict[str, Recommendation] = {
    "efficientnet": Recommendation(
        ("size=640",), "EfficientNet-Lite2 of ImageNet, hidden state 20"
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
