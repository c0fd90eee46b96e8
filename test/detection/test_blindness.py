"""A frozen or covered camera is recognised."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_anomaly.detection.blindness import BlindnessCheck, contrast
from semantic_anomaly.structures import Frame
from semantic_anomaly.synthetic.drive import StreetDrive

HW = 96, 160
RNG = np.random.default_rng(3)


def street(number: int = 0) -> np.ndarray:
    return StreetDrive(5, 20, image_hw=HW).frame(number).image


def dark_with_noise() -> np.ndarray:
    return np.clip(RNG.normal(6, 4, (*HW, 3)), 0, 255).astype(np.uint8)


def behind_a_wet_cloth() -> np.ndarray:
    shades = 120 + np.linspace(0, 6, HW[1])[None, :, None] + RNG.normal(0, 3, (*HW, 3))
    return shades.astype(np.uint8)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((*HW, 3), np.uint8),
        np.full((*HW, 3), 255, np.uint8),
        dark_with_noise(),
        behind_a_wet_cloth(),
    ],
    ids=["black", "white", "noise of a dark sensor", "cloth"],
)
def test_a_covered_camera_is_blind(image: np.ndarray) -> None:
    reason = BlindnessCheck().reason(Frame(image), 10.0, 2.0)
    assert reason.startswith("blind: image without contrast") and "least_contrast" in reason
    assert BlindnessCheck().reason(Frame(image), 0.0, 2.0) == ""


def test_a_street_is_not_blind_even_at_night() -> None:
    image = street()
    assert contrast(image) > 50
    at_night = (image * 0.08).astype(np.uint8)
    # The lamp of one car.
    at_night[40:60, 60:80] = 90
    assert BlindnessCheck().reason(Frame(at_night), 10.0, 2.0) == ""


def test_a_frozen_image_is_blind_until_it_changes() -> None:
    check, image = BlindnessCheck(), street()
    reasons = [check.reason(Frame(image.copy(), n * 500_000_000), 10.0, 2.0) for n in range(7)]
    assert reasons[:5] == [""] * 5
    assert (
        reasons[5].startswith("blind: frozen image") and "6 equal images over 2.5 s" in reasons[5]
    )
    assert reasons[6]
    changed = image.copy()
    changed[0, 0] += 1
    assert check.reason(Frame(changed, 4_000_000_000), 10.0, 2.0) == ""


def test_equal_images_are_allowed_where_they_are_expected() -> None:
    image = street()
    slow = BlindnessCheck()
    # A single repetition after a gap, at a camera of a frame each minute.
    assert [slow.reason(Frame(image, n * 60_000_000_000), 0, 2.0) for n in range(2)] == ["", ""]
    repeated = BlindnessCheck()
    assert not any(repeated.reason(Frame(image, 7), 0, 2.0) for _ in range(9))
    simulated = BlindnessCheck()
    stamps_ns = range(0, 20_000_000_000, 1_000_000_000)
    assert not any(simulated.reason(Frame(image, stamp), 0, 0.0) for stamp in stamps_ns)
