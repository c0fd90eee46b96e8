"""A labelled drive of simple streets, as the tests of evaluation and replay read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from semantic_anomaly.io.images import write_image
from worlds.colours import ODD_BOX, street

# One frame a letter: '.' nominal, 'o' odd, 'i' odd and to be ignored, 'u' odd and unmasked.
DRIVE = "...oo..i.uo."


def odd_mask(hw: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(hw, np.uint8)
    left, top, right, bottom = ODD_BOX
    mask[top:bottom, left:right] = 1
    return mask


def make_dataset(root: Path, drive: str = DRIVE) -> Path:
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    labels: dict[str, dict[str, Any]] = {}
    for number, letter in enumerate(drive):
        frame = street(5000 + number, odd=letter != ".")
        name = f"{number:05d}.png"
        write_image(root / "images" / name, frame.image)
        labels[name] = {"anomaly": letter != ".", "stamp_s": number / 10}
        if letter in "oi":
            write_image(root / "masks" / name, odd_mask(frame.image_hw))
        if letter == "o":
            kind = "box" if number < 6 else "crate"
            labels[name] |= {"kind": kind, "family": "odd object"}
        if letter == "i":
            labels[name]["ignore"] = True
    (root / "labels.json").write_text(json.dumps(labels))
    return root
