"""A stage: one path from an image to a map of distances.

An index has one or more stages, each with its own entries. The anomaly map is the weighted sum of
the standardised maps of all stages.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from reprlib import repr as short
from typing import Any

from semantic_anomaly.errors import SettingsError

GRID, INSTANCES = "grid", "instances"
_KEY = re.compile(r"\s+(\w+)=(\S*)$")


@dataclass(frozen=True)
class StageSpec:
    """How one stage makes its embeddings.

    As text: the backbone and the values that differ from their defaults, such as
    'mobilenet_v1 layer=21 size=800 average=3'.

    Attributes:
        backbone: shipped name, local Hugging Face folder, or hub id already downloaded.
        layer: hidden state of the backbone, negative from the end; None: the last of `out_indices`
            in its config.json, or else the last.
        size: long side in pixels to which images are resized.
        average: side of the square of neighbouring patches over which embeddings are averaged, odd.
        kind: 'grid': the patches are compared; 'instances': instances pooled over masks, and the
            patches that no instance covers.
        weight: of the stage's map in the anomaly map, >= 0.

    Raises:
        SettingsError: a value of the wrong type or out of range.
    """

    backbone: str
    layer: int | None = None
    size: int = 960
    average: int = 1
    kind: str = GRID
    weight: float = 1.0

    def __post_init__(self) -> None:
        rules = {
            # Others would not survive the way through the text.
            "backbone": (
                "a name or folder",
                bool(self.backbone)
                and self.backbone == self.backbone.strip()
                and not _KEY.search(f" {self.backbone}"),
            ),
            "layer": ("an integer", self.layer is None or type(self.layer) is int),
            "size": ("1 to 8192 pixels", type(self.size) is int and 1 <= self.size <= 8192),
            "average": (
                "an odd number from 1 to 15",
                type(self.average) is int and self.average in range(1, 16, 2),
            ),
            "kind": (f"{GRID} or {INSTANCES}", self.kind in (GRID, INSTANCES)),
            "weight": (
                "a number >= 0",
                type(self.weight) in (int, float) and 0 <= self.weight < math.inf,
            ),
        }
        for name, (expected, is_valid) in rules.items():
            if not is_valid:
                found = getattr(self, name)
                raise SettingsError(f"stage: {name}: expected {expected}, found {short(found)}")

    @classmethod
    def parse(cls, text: str) -> StageSpec:
        """Make a stage from its text.

        Raises:
            SettingsError: an unknown or repeated key, or a value of the wrong type or out of range.
        """
        # The blank lets a text without a backbone match, too.
        rest, values = f" {text.strip()}", dict[str, Any]()
        text = f"{text[:200]}..." if len(text) > 200 else text
        types = {"layer": int, "size": int, "average": int, "kind": str, "weight": float}
        while match := _KEY.search(rest):
            key, value = match.groups()
            if key not in types or key in values:
                raise SettingsError(
                    f"stage '{text}': expected 'BACKBONE' and each of {', '.join(types)} at most "
                    f"once as 'key=value', found {short(f'{key}={value}')}"
                )
            try:
                values[key] = types[key](value)
            except ValueError:
                raise SettingsError(
                    f"stage '{text}': {key}: expected {types[key].__name__}, found {short(value)}"
                ) from None
            rest = rest[: match.start()]
        try:
            return cls(rest.strip(), **values)
        except SettingsError as error:
            raise SettingsError(f"stage '{text}': {error}") from None

    def __str__(self) -> str:
        changed = [
            f"{field.name}={str(value).removesuffix('.0')}"
            for field in fields(self)[1:]
            if (value := getattr(self, field.name)) != field.default
        ]
        return " ".join([self.backbone, *changed])
