from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from array import array
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from semantic_anomaly.errors import ImageError
from semantic_anomaly.io.images import (
    DEPTH_ENCODINGS,
    RAW_ENCODINGS,
    UnsupportedEncodingError,
    decode_compressed,
    decode_depth,
    decode_raw,
    encode_jpeg,
    encode_png,
    inspect_image,
    read_image,
    write_image,
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


@pytest.mark.parametrize(("padding", "big"), [(0, False), (5, False), (5, True)])
@pytest.mark.parametrize("encoding", PLAIN)
def test_every_plain_encoding_gives_the_known_rgb(
    encoding: str, big: bool, padding: int, rgb: np.ndarray
) -> None:
    channels, expected = pack(encoding, rgb)
    step, data = message(channels, padding=padding, wide="16" in encoding, big=big)
    image = decode_raw(encoding, HEIGHT, WIDTH, step, big, data)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize(("bits", "big"), [(8, False), (16, False), (16, True)])
@pytest.mark.parametrize("pattern", ["rggb", "bggr", "gbrg", "grbg"])
def test_bayer_patterns_give_back_a_flat_colour(pattern: str, bits: int, big: bool) -> None:
    colour = {"r": 200, "g": 90, "b": 30}
    cell = np.array([colour[channel] for channel in pattern], np.uint8).reshape(2, 2)
    mosaic = np.tile(cell, (4, 5))[..., None]
    step, data = message(mosaic, padding=3, wide=bits == 16, big=big)
    image = decode_raw(f"bayer_{pattern}{bits}", 8, 10, step, big, data)
    np.testing.assert_array_equal(image, np.broadcast_to([200, 90, 30], (8, 10, 3)))


# ITU-R BT.601, limited range: (Y, U, V) of the pure colours.
YUV = {(255, 0, 0): (82, 90, 240), (0, 0, 255): (41, 240, 110), (255, 255, 255): (235, 128, 128)}


@pytest.mark.parametrize("encoding", ["yuv422", "uyvy", "yuyv", "yuv422_yuy2", "nv12", "nv21"])
@pytest.mark.parametrize("colour", YUV)
def test_yuv_encodings_give_the_known_colour(colour: tuple[int, int, int], encoding: str) -> None:
    y, u, v = YUV[colour]
    if encoding.startswith("nv"):
        chroma = [u, v] if encoding == "nv12" else [v, u]
        rows = np.full((9, 8), y, np.uint8)
        rows[6:] = np.tile(chroma, 4)
    else:
        pair = [u, y, v, y] if encoding in ("yuv422", "uyvy") else [y, u, y, v]
        rows = np.tile(np.array(pair, np.uint8), (6, 4))
    step, data = message(rows, padding=4)
    image = decode_raw(encoding, 6, 8, step, False, data)
    assert image.shape == (6, 8, 3)
    assert np.abs(image.astype(int) - colour).max() <= 4


def test_rgb8_is_a_read_only_view_of_the_message(rgb: np.ndarray) -> None:
    step, data = message(rgb, padding=2)
    buffer = bytearray(data)
    image = decode_raw("rgb8", HEIGHT, WIDTH, step, False, buffer)
    buffer[0] ^= 0xFF
    assert image[0, 0, 0] == rgb[0, 0, 0] ^ 0xFF
    assert not image.flags.writeable


def test_every_kind_of_buffer_is_accepted(rgb: np.ndarray) -> None:
    step, data = message(rgb[..., ::-1])
    array_data, ndarray = array("B", data), np.frombuffer(data, np.uint8)
    for buffer in (data, bytearray(data), memoryview(data), array_data, ndarray):
        np.testing.assert_array_equal(
            decode_raw("bgr8", HEIGHT, WIDTH, step, False, buffer), rgb, str(type(buffer))
        )


GOOD: dict[str, Any] = {"encoding": "rgb8", "height": 4, "width": 5, "step": 15, "data": bytes(60)}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"step": 14}, "step of at least 15 bytes, found 14"),
        ({"data": bytes(59)}, "expected 60 bytes .*found 59"),
        ({"data": bytes(61)}, "expected 60 bytes .*found 61"),
        ({"width": 0}, "found 0x4"),
        ({"height": -4}, "found 5x-4"),
        ({"height": 2**32 - 1, "width": 2**32 - 1, "step": 2**32 - 1}, "found 4294967295x"),
        ({"encoding": "mono16", "step": 9}, "at least 10 bytes, found 9"),
        ({"encoding": "uyvy", "step": 15}, "even width, found 5x4"),
        ({"encoding": "nv12", "data": bytes(90)}, "even width and height, found 5x4"),
        ({"encoding": "nv21", "height": 3, "width": 4, "step": 4}, "found 4x3"),
        ({"encoding": "nv12", "width": 4}, "expected 90 bytes .6 rows of 15."),
        ({"encoding": "bayer_rggb8", "height": 2, "data": bytes(30)}, "3x3 pixels, found 5x2"),
        ({"data": [1, 2, 3]}, "expected bytes, found list"),
    ],
)
def test_sizes_that_disagree_are_refused(change: dict[str, Any], found: str) -> None:
    assert decode_raw(is_bigendian=False, **GOOD).shape == (4, 5, 3)
    with pytest.raises(ImageError, match=found):
        decode_raw(is_bigendian=False, **{**GOOD, **change})


@pytest.mark.parametrize(
    ("encoding", "row_bytes"), [("mono8", 30), ("bayer_rggb8", 30), ("mono8", 20), ("rgb8", 60)]
)
def test_wider_pixels_under_another_encoding_are_refused(
    encoding: str, row_bytes: int, rng: np.random.Generator
) -> None:
    pixels = rng.integers(0, 256, (6, row_bytes), np.uint8)
    with pytest.raises(ImageError, match="content behind the pixels; is the encoding wrong"):
        decode_raw(encoding, 6, 10, row_bytes, False, pixels)
    used = {"rgb8": 30}.get(encoding, 10)
    # Padding without content may be long.
    padded = np.zeros((6, 3 * used), np.uint8)
    padded[:, :used] = rng.integers(0, 256, (6, used), np.uint8)
    assert decode_raw(encoding, 6, 10, 3 * used, False, padded).shape == (6, 10, 3)


@pytest.mark.parametrize("encoding", ["", "RGB8", "32FC1", "x" * 10_000])
def test_unknown_encodings_are_named_with_those_supported(encoding: str) -> None:
    with pytest.raises(UnsupportedEncodingError, match=r"'.*' is not supported.*bgr8") as raised:
        decode_raw(encoding, 4, 5, 15, False, bytes(60))
    assert raised.value.encoding == encoding
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("encoding", DEPTH_ENCODINGS)
def test_depth_becomes_metres(encoding: str, big: bool) -> None:
    metres = np.array([[0.0, 1.5, 65.0], [0.25, 2.0, 0.001]])
    order = ">" if big else "<"
    scale, kind = (1, "f4") if encoding == "32FC1" else (1000, "u2")
    stored = (metres * scale).round(3).astype(f"{order}{kind}")
    step, data = message(stored.view(np.uint8).reshape(2, -1), padding=4)
    depth = decode_depth(encoding, 2, 3, step, big, data)
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth, metres, rtol=1e-6)


def test_unknown_depth_becomes_zero() -> None:
    values = np.array([[np.nan, np.inf, -np.inf, -1.0, 0.0, 3.0]], np.float32)
    depth = decode_depth("32FC1", 1, 6, 24, False, values.tobytes())
    np.testing.assert_array_equal(depth, [[0, 0, 0, 0, 0, 3.0]])


def test_depth_refuses_other_encodings_and_lengths() -> None:
    with pytest.raises(UnsupportedEncodingError, match=r"rgb8.*32FC1, 16UC1, mono16"):
        decode_depth("rgb8", 1, 1, 3, False, bytes(3))
    with pytest.raises(ImageError, match="found 7"):
        decode_depth("32FC1", 1, 2, 8, False, bytes(7))


def smooth(height: int = 48, width: int = 64) -> np.ndarray:
    """Return an image that lossy coders keep: red grows to the right, green downwards."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([255 * x / width, 255 * y / height, np.full_like(x, 40, float)], axis=2)
    return image.astype(np.uint8)


def encoded(suffix: str, rgb: np.ndarray, *options: int) -> bytes:
    """Return a compressed image of RGB or grey channels of 8 or 16 bits."""
    bgr = rgb[..., ::-1] if rgb.ndim == 3 else rgb
    done, content = cv2.imencode(suffix, np.ascontiguousarray(bgr), options)
    assert done
    return content.tobytes()


LOSSLESS = (cv2.IMWRITE_WEBP_QUALITY, 101)
QUALITY = (cv2.IMWRITE_JPEG_QUALITY, 98)
# Suffix, largest difference after a round trip, and options of the encoder.
FORMATS: dict[str, tuple[str, int, tuple[int, ...]]] = {
    "JPEG": (".jpg", 4, QUALITY),
    "JPEG progressive": (".jpg", 4, (*QUALITY, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)),
    "JPEG with restart markers": (".jpg", 4, (*QUALITY, cv2.IMWRITE_JPEG_RST_INTERVAL, 2)),
    "PNG": (".png", 0, ()),
    "WebP lossy": (".webp", 12, (cv2.IMWRITE_WEBP_QUALITY, 95)),
    "WebP lossless": (".webp", 0, LOSSLESS),
    "BMP": (".bmp", 0, ()),
    "TIFF": (".tiff", 0, (cv2.IMWRITE_TIFF_COMPRESSION, 1)),
    "TIFF LZW in strips": (".tif", 0, (cv2.IMWRITE_TIFF_ROWSPERSTRIP, 4)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_format_and_size_are_read_from_the_header(name: str) -> None:
    suffix, _, options = FORMATS[name]
    for height, width in ((1, 1), (7, 300), (301, 5)):
        content = encoded(suffix, smooth(height, width), *options)
        assert inspect_image(content) == (name.split()[0], width, height)


@pytest.mark.parametrize("name", FORMATS)
def test_compressed_images_are_decoded_by_their_content(name: str) -> None:
    suffix, tolerance, options = FORMATS[name]
    content = encoded(suffix, smooth(), *options)
    # The format field of the message does not decide.
    for text in ("", "jpeg", "png", "rgb8; jpeg compressed bgr8", "bgr8; png compressed bgr8"):
        image = decode_compressed(content, text)
        assert image.dtype == np.uint8
        assert np.abs(image.astype(int) - smooth()).max() <= tolerance, text


def test_rgb_given_to_the_encoder_as_bgr_comes_back_as_rgb() -> None:
    content = encoded(".png", smooth()[..., ::-1])
    image = decode_compressed(content, "rgb8; png compressed rgb8")
    np.testing.assert_array_equal(image, smooth())


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_grey_and_alpha_become_rgb_and_sixteen_bits_their_upper_byte(suffix: str) -> None:
    deep = (smooth().astype(np.uint16) << 8) + 253
    np.testing.assert_array_equal(decode_compressed(encoded(suffix, deep)), smooth())
    for single in (smooth()[..., 0], deep[..., 0]):
        np.testing.assert_array_equal(decode_compressed(encoded(suffix, single)), gray(smooth()))
    done, content = cv2.imencode(suffix, np.dstack([smooth()[..., ::-1], smooth()[..., 0]]))
    assert done
    np.testing.assert_array_equal(decode_compressed(content), smooth())


def tiff(width: int, height: int, *tags: tuple[int, int, int], order: str = "<") -> bytes:
    """Return a grey 8-bit TIFF whose pixel at the top left is 255."""
    pixels = b"\xff" + bytes(width * height - 1)
    rows = sorted(
        [(256, 3, width), (257, 3, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8),
         (277, 3, 1), (278, 3, height), (279, 4, len(pixels)), *tags]
    )  # fmt: skip
    directory = struct.pack(f"{order}H", len(rows))
    for tag, kind, value in rows:
        packed = struct.pack(f"{order}{'H' if kind == 3 else 'I'}", value).ljust(4, b"\0")
        directory += struct.pack(f"{order}HHI", tag, kind, 1) + packed
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(f"{order}I", 8 + len(pixels)) + pixels + directory + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_orientation_of_a_tiff_is_applied(order: str) -> None:
    upright = decode_compressed(tiff(6, 4, order=order))
    assert upright.shape == (4, 6, 3) and upright[0, 0, 0] == 255
    turned = tiff(6, 4, (274, 3, 6), order=order)
    assert inspect_image(turned) == ("TIFF", 4, 6)
    assert decode_compressed(turned)[0, -1, 0] == 255


def test_a_tiff_of_floating_point_numbers_is_refused() -> None:
    with pytest.raises(ImageError, match=r"TIFF image.*(8 or 16 bits|cannot be decoded)"):
        decode_compressed(encoded(".tiff", smooth().astype(np.float64)))


def test_compressed_depth_is_refused() -> None:
    with pytest.raises(ImageError, match=r"16UC1; compressedDepth png.*colour image.*depth image"):
        decode_compressed(encoded(".png", smooth()), "16UC1; compressedDepth png")


def test_an_extended_webp_gives_its_canvas() -> None:
    still = encoded(".webp", smooth(), *LOSSLESS)
    sides = (63).to_bytes(3, "little") + (47).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sides + still[12:]
    content = b"RIFF" + struct.pack("<I", len(body)) + body
    assert inspect_image(content) == ("WebP", 64, 48)
    np.testing.assert_array_equal(decode_compressed(content), smooth())


@pytest.mark.parametrize("name", FORMATS)
def test_truncation_at_any_position_is_refused(name: str) -> None:
    suffix, _, options = FORMATS[name]
    content = encoded(suffix, smooth(), *options)
    for length in {0, 1, 3, 9, 20, 30, *range(0, len(content) - 2, 97), len(content) - 2}:
        with pytest.raises(ImageError, match=r"truncated|expected JPEG|damaged"):
            decode_compressed(content[:length])


def test_the_end_marker_of_a_preview_does_not_hide_truncation() -> None:
    content = encoded(".jpg", smooth())
    preview = encoded(".jpg", smooth(8, 8))
    segment = b"\xff\xe1" + struct.pack(">H", len(preview) + 2) + preview
    with_preview = content[:2] + segment + content[2:]
    assert decode_compressed(with_preview).shape == (48, 64, 3)
    with pytest.raises(ImageError, match="truncated"):
        decode_compressed(with_preview[: len(with_preview) * 9 // 10])


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".tiff"])
def test_bytes_after_the_end_are_no_damage(suffix: str) -> None:
    content = encoded(suffix, smooth())
    np.testing.assert_array_equal(
        decode_compressed(content + b"\0tail"), decode_compressed(content)
    )


def test_random_damage_raises_only_image_errors(rng: np.random.Generator) -> None:
    for suffix in (".jpg", ".png", ".webp", ".bmp", ".tiff"):
        content = np.frombuffer(encoded(suffix, smooth()), np.uint8)
        for _ in range(60):
            damaged = content.copy()
            damaged[rng.integers(0, len(content), 3)] = rng.integers(0, 256, 3)
            try:
                image = decode_compressed(damaged)
            except ImageError:
                continue
            assert image.shape[2] == 3


def exif(orientation: int, order: str) -> bytes:
    head = {"<": b"II*\0", ">": b"MM\0*"}[order]
    body = struct.pack(f"{order}IHHHIHHI", 8, 1, 274, 3, 1, orientation, 0, 0)
    return head + body


def with_exif(kind: str, content: bytes, block: bytes) -> bytes:
    if kind == "JPEG":
        block = b"Exif\0\0" + block
        return content[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + content[2:]
    if kind == "PNG":
        part = b"eXIf" + block
        chunk = struct.pack(">I", len(block)) + part + struct.pack(">I", zlib.crc32(part))
        # After the signature and the header.
        return content[:33] + chunk + content[33:]
    sides = (63).to_bytes(3, "little") + (47).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x08\0\0\0" + sides + content[12:]
    body += b"EXIF" + struct.pack("<I", len(block)) + block
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", ".jpg"), ("PNG", ".png"), ("WebP", ".webp")])
def test_an_exif_orientation_is_applied(
    kind: str, suffix: str, orientation: int, order: str
) -> None:
    content = encoded(suffix, smooth(48, 64), *(LOSSLESS if suffix == ".webp" else ()))
    reference = with_exif("JPEG", encoded(".jpg", smooth(48, 64)), exif(orientation, order))
    expected = cv2.imdecode(np.frombuffer(reference, np.uint8), cv2.IMREAD_COLOR)
    assert expected is not None
    found = decode_compressed(with_exif(kind, content, exif(orientation, order)))
    assert found.shape == expected.shape == ((48, 64, 3) if orientation < 5 else (64, 48, 3))
    assert np.abs(found.astype(int) - expected[..., ::-1]).mean() < 3


def test_damaged_exif_is_ignored() -> None:
    content = encoded(".jpg", smooth(48, 64))
    expected = decode_compressed(content)
    for block in (b"", b"II*\0", exif(9, "<"), exif(3, ">")[:-9], b"MM\0*" + b"\xff" * 8):
        np.testing.assert_array_equal(
            decode_compressed(with_exif("JPEG", content, block)), expected
        )


def infrared(low: int, high: int) -> np.ndarray:
    """Return a (48, 64) uint16 image that fills a range of counts."""
    return np.linspace(low, high, 48 * 64).astype(np.uint16).reshape(48, 64)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1020), (29_500, 29_806), (0, 4095), (65_000, 65_535), (7000, 9000)]
)
def test_sixteen_bits_that_lose_their_content_are_refused(low: int, high: int) -> None:
    image = infrared(low, high)
    message = rf"found {low} to {high}.*grey levels would remain"
    for suffix in (".png", ".tiff"):
        with pytest.raises(ImageError, match=message):
            decode_compressed(encoded(suffix, image))
    for big in (False, True):
        data = image.astype(">u2" if big else "<u2").tobytes()
        for encoding in ("mono16", "16UC1", "bayer_rggb16"):
            with pytest.raises(ImageError, match=message):
                decode_raw(encoding, 48, 64, 128, big, data)
    with pytest.raises(ImageError, match=message):
        decode_raw("rgb16", 48, 64, 384, False, np.repeat(image, 3).tobytes())


def test_sixteen_bits_that_keep_their_content_are_accepted() -> None:
    for image in (infrared(0, 65_535), infrared(0, 16_383), infrared(500, 500)):
        found = decode_raw("mono16", 48, 64, 128, False, image.tobytes())
        np.testing.assert_array_equal(found[..., 0], image >> 8)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    )


def jpeg_claiming(width: int, height: int) -> bytes:
    content = bytearray(encoded(".jpg", smooth()))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def test_decompression_bombs_are_refused_by_their_header(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("OpenCV was asked to decode")

    webp = bytearray(encoded(".webp", smooth(), *LOSSLESS))
    struct.pack_into("<I", webp, 21, 16383 | 16383 << 14)
    large_tiff = tiff(6, 4)
    for tag, side in ((256, 6), (257, 4)):
        entry = struct.pack("<HHI", tag, 3, 1)
        large_tiff = large_tiff.replace(entry + bytes([side, 0]), entry + b"\xff\xff")
    monkeypatch.setattr(cv2, "imdecode", decode)
    bombs = (png_claiming(50_000, 50_000), jpeg_claiming(65_000, 65_000), bytes(webp), large_tiff)
    for content in bombs:
        with pytest.raises(ImageError, match="expected 1 to 40000000 pixels"):
            decode_compressed(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found no bytes"),
        (b"\x00\x01\x02\x03\x04", "found bytes 00 01 02 03"),
        (b"GIF89a" + bytes(50), "expected JPEG, PNG, WebP, BMP or TIFF, found bytes 47 49 46 38"),
        (b"\xff\xd8\xff" + bytes(100), "JPEG image is truncated or damaged in its header"),
        (b"II*\0\x08\0\0\0" + bytes(100), "TIFF image is truncated or damaged in its header"),
        (png_claiming(0, 10), "found 0x10"),
        (png_claiming(300, 300), "PNG image of 300x300 pixels cannot be decoded"),
    ],
)
def test_content_that_is_no_image_is_named(content: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode_compressed(content)


def test_encoders_keep_the_channel_order() -> None:
    np.testing.assert_array_equal(decode_compressed(encode_png(smooth())), smooth())
    close = decode_compressed(encode_jpeg(smooth(), 98)).astype(int)
    assert np.abs(close - smooth()).max() <= 4
    assert len(encode_jpeg(smooth(), 20)) < len(encode_jpeg(smooth(), 95))
    # Views with negative strides are accepted too.
    flipped = decode_compressed(encode_png(smooth()[:, ::-1]))
    np.testing.assert_array_equal(flipped, smooth()[:, ::-1])


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((4, 5, 3), np.float32), np.zeros((4, 5, 4), np.uint8), np.zeros((0, 5, 3), np.uint8)],
)
def test_encoders_refuse_other_arrays(wrong: np.ndarray) -> None:
    for encode in (encode_png, encode_jpeg):
        with pytest.raises(ImageError, match="expected non-empty"):
            encode(wrong)


def test_an_image_too_large_for_jpeg_is_refused() -> None:
    with pytest.raises(ImageError, match="cannot be encoded"):
        encode_jpeg(np.zeros((1, 70_000, 3), np.uint8))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "new/a.JPEG"])
def test_files_are_written_and_read_back(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for image in (np.zeros((5, 5, 3), np.uint8), smooth()):
        write_image(path, image)
    assert np.abs(read_image(path).astype(int) - smooth()).max() <= 8
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.png': No such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="Is a directory"):
        read_image(tmp_path)
    (tmp_path / "half.jpg").write_bytes(encoded(".jpg", smooth())[:-300])
    with pytest.raises(ImageError, match=r"half\.jpg': JPEG image is truncated"):
        read_image(tmp_path / "half.jpg")
    with pytest.raises(ImageError, match=r"a\.gif': expected a name ending in \.png"):
        write_image(tmp_path / "a.gif", smooth())


def test_importing_the_package_first_sets_the_pixel_limit_of_opencv() -> None:
    code = (
        "import semantic_anomaly.io.images, numpy as np, cv2\n"
        "content = cv2.imencode('.png', np.zeros((6400, 6400), np.uint8))[1]\n"
        "try: cv2.imdecode(content, 0)\n"
        "except cv2.error as error: print('refused', 'CV_IO_MAX_IMAGE_PIXELS' in str(error))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OPENCV_IO_MAX_IMAGE_PIXELS"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "refused True"
