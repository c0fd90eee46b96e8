"""Confirmation over time, frame by frame."""

from __future__ import annotations

import pytest

from semantic_anomaly.errors import SettingsError
from semantic_anomaly.filtering import FrameConfirmation


@pytest.mark.parametrize(
    ("count", "window", "frames", "expected", "reason"),
    [
        (1, 1, "A.A", "A.A", "no confirmation: every anomalous frame"),
        (1, 3, "A..A", "A..A", "the window alone delays nothing"),
        (2, 2, "A.AA", "...A", "two in a row"),
        (2, 3, "A.A", "..A", "two of three, not in a row"),
        (2, 3, "A..A", "....", "too far apart"),
        (2, 3, "AA..", ".A..", "a nominal frame is never confirmed"),
        (3, 3, "AAAA", "..AA", "stays while it lasts"),
    ],
)
def test_confirmation(count: int, window: int, frames: str, expected: str, reason: str) -> None:
    confirmation = FrameConfirmation(count, window)
    said = [confirmation.update(stamp, frame == "A") for stamp, frame in enumerate(frames)]
    assert "".join("A" if yes else "." for yes in said) == expected


def test_a_stamp_going_backwards_clears() -> None:
    confirmation = FrameConfirmation(2, 2)
    assert not confirmation.update(1000, True)
    assert not confirmation.update(500, True), "the frame before belongs to another run"
    assert confirmation.update(501, True)


def test_equal_stamps_do_not_clear() -> None:
    confirmation = FrameConfirmation(2, 2)
    confirmation.update(0, True)
    assert confirmation.update(0, True)


def test_reset_forgets_frames_and_stamps() -> None:
    confirmation = FrameConfirmation(2, 2)
    confirmation.update(1000, True)
    confirmation.reset()
    assert not confirmation.update(10, True)
    assert confirmation.update(11, True)


@pytest.mark.parametrize(("count", "window"), [(0, 1), (2, 1), (0, 0), (-1, 3)])
def test_refuses(count: int, window: int) -> None:
    with pytest.raises(SettingsError, match="1 <= count <= window"):
        FrameConfirmation(count, window)
