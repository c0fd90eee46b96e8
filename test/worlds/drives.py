"""Small folders of images and videos whose gray levels are their frame numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from semantic_anomaly.io.images import write_image
from semantic_anomaly.structures import Frame


def gray_image(level: int, height: int = 24, width: int = 32) -> np.ndarray:
    """Return an image of one gray level, (height, width, 3) uint8."""
    return np.full((height, width, 3), level, np.uint8)


def make_folder(folder: Path, count: int = 10) -> Path:
    """Make images 0.png, 1.png, ... whose gray level is their number."""
    for index in range(count):
        write_image(folder / f"{index}.png", gray_image(index))
    return folder


def make_video(path: Path, count: int = 12, rate: float = 25.0, fourcc: str = "MJPG") -> Path:
    """Make a video whose frames are 10 gray levels apart."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), rate, (64, 48))
    assert writer.isOpened()
    for index in range(count):
        writer.write(gray_image(min(10 * index, 255), 48, 64))
    writer.release()
    return path


def gray_levels(frames: Iterable[Frame]) -> list[int]:
    """Return the gray level of each frame."""
    return [int(frame.image[0, 0, 0]) for frame in frames]
