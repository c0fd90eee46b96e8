"""Warnings about YUV of full range and about alpha, once for a source."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from worlds.bags import RAW, raw, write_bag

from semantic_anomaly.io.images import decode_compressed, decode_raw
from semantic_anomaly.io.open import open_source
from semantic_anomaly.io.remarks import ALPHA, FULL_RANGE, Remarks

HEIGHT, WIDTH, STEP = 8, 12, 64


def raw_data(encoding: str, luma: tuple[int, int]) -> np.ndarray:
    """Return rows with padding of other values; luma goes from one value to the other."""
    planar = encoding in ("nv12", "nv21")
    rows = np.full((HEIGHT * 3 // 2 if planar else HEIGHT, STEP), 255, np.uint8)
    values = np.linspace(*luma, WIDTH).astype(np.uint8)
    if planar:
        rows[:HEIGHT, :WIDTH] = values
        rows[HEIGHT:, :WIDTH] = 128
    else:
        begin = 1 if encoding in ("uyvy", "yuv422") else 0
        rows[:, : 2 * WIDTH] = 128
        rows[:, begin : 2 * WIDTH : 2] = values
    return rows.reshape(-1)


@pytest.mark.parametrize("luma", [(16, 235), (100, 120), (0, 255), (0, 100), (100, 255)])
@pytest.mark.parametrize(
    "encoding", ["uyvy", "yuv422", "yuyv", "yuv422_yuy2", "nv12", "nv21", "rgb8"]
)
def test_yuv_of_full_range_is_noticed_once(encoding: str, luma: tuple[int, int]) -> None:
    data, texts = raw_data(encoding, luma), []
    if encoding != "rgb8":
        decode_raw(encoding, HEIGHT, WIDTH, STEP, False, data)
    remarks = Remarks(texts.append)
    for _ in range(3):
        remarks.on_raw(encoding, HEIGHT, WIDTH, STEP, data)
    beyond = encoding != "rgb8" and not (luma[0] >= 16 and luma[1] <= 235)
    assert texts == [FULL_RANGE] * beyond


@pytest.mark.parametrize("alpha", [0, 254, 255])
@pytest.mark.parametrize("encoding", ["rgba8", "bgra8", "8UC4", "rgba16", "bgra16", "16UC4"])
def test_raw_alpha_is_noticed(encoding: str, alpha: int) -> None:
    size = 2 if "16" in encoding else 1
    pixels = np.full((HEIGHT, WIDTH, 4 * size), 90, np.uint8)
    pixels[..., 3 * size :] = 255
    pixels[3, 5, 3 * size :] = alpha
    texts: list[str] = []
    Remarks(texts.append).on_raw(encoding, HEIGHT, WIDTH, WIDTH * 4 * size, pixels.tobytes())
    assert texts == [ALPHA] * (alpha < 255)


def encoded(suffix: str, dtype: Any, alpha: int | None) -> bytes:
    most = np.iinfo(dtype).max
    pixels = np.full((HEIGHT, WIDTH, 3 if alpha is None else 4), most // 3, dtype)
    # Levels enough for 16 bits.
    pixels[..., 0] = np.linspace(0, most, WIDTH).astype(dtype)
    if alpha is not None:
        pixels[..., 3] = most
        pixels[2, 2, 3] = alpha * most // 255
    options = [cv2.IMWRITE_WEBP_QUALITY, 101] if suffix == ".webp" else []
    return cv2.imencode(suffix, pixels, options)[1].tobytes()


@pytest.mark.parametrize("alpha", [None, 0, 255])
@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [(".png", np.uint8), (".png", np.uint16), (".webp", np.uint8), (".tiff", np.uint8)],
)
def test_alpha_of_compressed_images_is_noticed(suffix: str, dtype: Any, alpha: int | None) -> None:
    data, texts = encoded(suffix, dtype, alpha), []
    decode_compressed(data)
    Remarks(texts.append).on_compressed(data)
    assert texts == [ALPHA] * (alpha == 0)


def test_a_bag_and_a_folder_say_it_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = raw_data("uyvy", (0, 255))
    fields = {"encoding": "uyvy", "height": HEIGHT, "width": WIDTH, "step": STEP, "data": data}
    bag = write_bag(tmp_path / "bag", {RAW: [raw(n, **fields) for n in range(3)]})
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(encoded(".png", np.uint8, 0))
    for source, text in ((bag, FULL_RANGE), (folder, ALPHA)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            opened = open_source(source)
            for _ in range(2):
                assert len(list(opened)) == 3
        [message] = [record.getMessage() for record in caplog.records]
        assert str(source) in message and text in message
