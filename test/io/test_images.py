from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest

from semantic_anomaly.errors import ImageError
from semantic_anomaly.io.images import (
    DEPTH_ENCODINGS,
    RAW_ENCODINGS,
    UnsupportedEncodingError,
    decode_depth,
    decode_raw,
)

HEIGHT, WIDTH = 6, 8


@pytest.fixture
def rgb(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def gray(rgb: np.ndarray) -> np.ndarray:
    return np.repeat(rgb[..., :1], 3, axis=2)


def pack(encoding: str, rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return channels (H, W, C) uint8 as the encoding orders them, and the RGB they mean."""
    red, green, blue = np.moveaxis(rgb, 2, 0)
    alpha = np.full_like(red, 7)
    by_prefix = {
        "rgba": [red, green, blue, alpha],
        "bgra": [blue, green, red, alpha],
        "rgb": [red, green, blue],
        "bgr": [blue, green, red],
        "8UC4": [blue, green, red, alpha],
        "16UC4": [blue, green, red, alpha],
        "8UC3": [blue, green, red],
        "16UC3": [blue, green, red],
    }
    for prefix, planes in by_prefix.items():
        if encoding.startswith(prefix):
            return np.stack(planes, axis=2), rgb
    return red[..., None], gray(rgb)


def message(
    channels: np.ndarray, *, padding: int = 0, wide: bool = False, big: bool = False
) -> tuple[int, bytes]:
    """Return step and data; padding is filled with bytes that must not be seen."""
    height = channels.shape[0]
    if wide:
        # The lower byte differs from the upper one, so a mix-up shows.
        values = channels.astype(np.uint16) * 256 + (255 - channels)
        channels = values.astype(">u2" if big else "<u2").view(np.uint8)
    rows = channels.reshape(height, -1)
    padded = np.pad(rows, ((0, 0), (0, padding)), constant_values=0xEE)
    return padded.shape[1], padded.tobytes()


PLAIN = [e for e in RAW_ENCODINGS if not e.startswith(("bayer", "yu", "uy", "nv"))]


@pytest.mark.parametrize("padding", [0, 1, 5])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("encoding", PLAIN)
def test_every_plain_encoding_gives_the_known_rgb(
    encoding: str, big: bool, padding: int, rgb: np.ndarray
) -> None:
    channels, expected = pack(encoding, rgb)
    step, data = message(channels, padding=padding, wide="16" in encoding, big=big)
    image = decode_raw(encoding, HEIGHT, WIDTH, step, big, data)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer_patterns_give_back_a_flat_colour(pattern: str, bits: int, padding: int) -> None:
    colour = {"r": 200, "g": 90, "b": 30}
    cell = np.array([[colour[pattern[0]], colour[pattern[1]]],
                     [colour[pattern[2]], colour[pattern[3]]]], np.uint8)  # fmt: skip
    mosaic = np.tile(cell, (4, 5))[..., None]
    for big in (False, True):
        step, data = message(mosaic, padding=padding, wide=bits == 16, big=big)
        image = decode_raw(f"bayer_{pattern}{bits}", 8, 10, step, big, data)
        np.testing.assert_array_equal(image, np.broadcast_to([200, 90, 30], (8, 10, 3)))


# ITU-R BT.601, limited range: (Y, U, V) of the pure colours.
YUV = {(255, 0, 0): (82, 90, 240), (0, 0, 255): (41, 240, 110), (255, 255, 255): (235, 128, 128)}


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("encoding", ["yuv422", "uyvy", "yuyv", "yuv422_yuy2", "nv12", "nv21"])
@pytest.mark.parametrize("colour", YUV)
def test_yuv_encodings_give_the_known_colour(
    colour: tuple[int, int, int], encoding: str, padding: int
) -> None:
    y, u, v = YUV[colour]
    if encoding.startswith("nv"):
        chroma = [u, v] if encoding == "nv12" else [v, u]
        rows = np.full((9, 8), y, np.uint8)
        rows[6:] = np.tile(chroma, 4)
    else:
        pair = [u, y, v, y] if encoding in ("yuv422", "uyvy") else [y, u, y, v]
        rows = np.tile(np.array(pair, np.uint8), (6, 4))
    step, data = message(rows, padding=padding)
    image = decode_raw(encoding, 6, 8, step, False, data)
    assert image.shape == (6, 8, 3)
    assert np.abs(image.astype(int) - colour).max() <= 4


@pytest.mark.parametrize("padding", [0, 2])
def test_rgb8_is_a_view_of_the_message(rgb: np.ndarray, padding: int) -> None:
    step, data = message(rgb, padding=padding)
    buffer = bytearray(data)
    image = decode_raw("rgb8", HEIGHT, WIDTH, step, False, buffer)
    buffer[0] ^= 0xFF
    assert image[0, 0, 0] == rgb[0, 0, 0] ^ 0xFF


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, "array", "ndarray"])
def test_every_kind_of_buffer_is_taken(kind: object, rgb: np.ndarray) -> None:
    step, data = message(rgb[..., ::-1])
    made: Any = {
        bytes: data, bytearray: bytearray(data), memoryview: memoryview(data),
        "array": array("B", data), "ndarray": np.frombuffer(data, np.uint8),
    }[kind]  # fmt: skip
    np.testing.assert_array_equal(decode_raw("bgr8", HEIGHT, WIDTH, step, False, made), rgb)


GOOD: dict[str, Any] = {"encoding": "rgb8", "height": 4, "width": 5, "step": 15, "data": bytes(60)}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"step": 14}, "step of at least 15 bytes, found 14"),
        ({"step": 0}, "found 0"),
        ({"data": bytes(59)}, "expected 60 bytes .*found 59"),
        ({"data": bytes(61)}, "expected 60 bytes .*found 61"),
        ({"data": b""}, "found 0"),
        ({"height": 0}, "found 5x0"),
        ({"width": 0}, "found 0x4"),
        ({"height": -4}, "found 5x-4"),
        ({"height": 2**32 - 1, "width": 2**32 - 1, "step": 2**32 - 1}, "found 4294967295x"),
        ({"height": 5, "width": 4}, "expected 75 bytes"),
        ({"height": 3, "width": 6}, "step of at least 18"),
        ({"encoding": "mono16", "step": 9}, "at least 10 bytes, found 9"),
        ({"encoding": "uyvy", "step": 15}, "even width, found 5x4"),
        ({"encoding": "yuyv", "step": 15}, "even width, found 5x4"),
        ({"encoding": "nv12", "data": bytes(90)}, "even width and height, found 5x4"),
        ({"encoding": "nv21", "height": 3, "width": 4, "step": 4}, "found 4x3"),
        ({"encoding": "nv12", "width": 4}, "expected 90 bytes .6 rows of 15."),
        ({"encoding": "bayer_rggb8", "height": 2, "data": bytes(30)}, "3x3 pixels, found 5x2"),
        ({"data": [1, 2, 3]}, "expected bytes, found list"),
    ],
)
def test_what_does_not_agree_is_refused(change: dict[str, Any], found: str) -> None:
    assert decode_raw(is_bigendian=False, **GOOD).shape == (4, 5, 3)
    with pytest.raises(ImageError, match=found):
        decode_raw(is_bigendian=False, **{**GOOD, **change})


@pytest.mark.parametrize("encoding", ["", "RGB8", "32FC1", "jpeg", "64FC3", "x" * 10_000])
def test_unknown_encodings_are_named_with_those_supported(encoding: str) -> None:
    with pytest.raises(UnsupportedEncodingError, match=r"'.*' is not supported.*bgr8") as raised:
        decode_raw(encoding, 4, 5, 15, False, bytes(60))
    assert raised.value.encoding == encoding
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("encoding", DEPTH_ENCODINGS)
def test_depth_becomes_metres(encoding: str, big: bool, padding: int) -> None:
    metres = np.array([[0.0, 1.5, 65.0], [0.25, 2.0, 0.001]])
    order = ">" if big else "<"
    stored = metres.astype(f"{order}f4") if encoding == "32FC1" else (metres * 1000).round()
    stored = stored if encoding == "32FC1" else stored.astype(f"{order}u2")
    step, data = message(stored.view(np.uint8).reshape(2, -1), padding=padding)
    depth = decode_depth(encoding, 2, 3, step, big, data)
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth, metres, rtol=1e-6)


def test_depth_that_is_none_becomes_zero() -> None:
    values = np.array([[np.nan, np.inf, -np.inf, -1.0, 0.0, 3.0]], np.float32)
    depth = decode_depth("32FC1", 1, 6, 24, False, values.tobytes())
    np.testing.assert_array_equal(depth, [[0, 0, 0, 0, 0, 3.0]])


def test_depth_refuses_other_encodings_and_lengths() -> None:
    with pytest.raises(UnsupportedEncodingError, match=r"rgb8.*32FC1, 16UC1, mono16"):
        decode_depth("rgb8", 1, 1, 3, False, bytes(3))
    with pytest.raises(ImageError, match="found 7"):
        decode_depth("32FC1", 1, 2, 8, False, bytes(7))
